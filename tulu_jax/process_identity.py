"""Which process wrote something, and whether it still runs: what temporary names and leases say."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import socket


@dataclasses.dataclass(frozen=True, kw_only=True)
class Process:
    """One process of one machine. `machine` stands for host name, boot and space of process ids, so
    that neither a reboot nor a container of the same name is taken for it. `started` is the clock
    tick of its start, which tells it from a later one with the same `pid`; "" where no /proc is."""

    host: str
    machine: str
    pid: int
    started: str

    def __str__(self):
        return f"process {self.pid} on {self.host}"

    def runs(self) -> bool | None:
        """Whether it still runs; None where this machine cannot tell, as it is of another."""
        if self.machine != _machine():
            return None
        return _started(self.pid) == self.started


def current() -> Process:
    """This process."""
    pid = os.getpid()
    return Process(
        host=socket.gethostname(), machine=_machine(), pid=pid, started=_started(pid) or ""
    )


@functools.cache
def _machine() -> str:
    """16 hexadecimal digits."""
    parts = [socket.gethostname()]
    for read in (_boot, lambda: os.readlink("/proc/self/ns/pid")):
        try:
            parts.append(read())
        except OSError:  # no Linux
            parts.append("")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _boot() -> str:
    return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _started(pid: int) -> str | None:
    """The clock tick at which a process started; None if there is none, or only its remains."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        if pathlib.Path("/proc/self").exists():
            return None
        return _without_proc(pid)
    return None if fields[0] in "ZX" else fields[19]


def _without_proc(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # it runs, as another user
        return ""
    return ""
