"""A connection of every process to process 0: they agree before they start, and learn who is gone.

Process 0 listens on the coordinator's port until all others have told what they run. Then JAX's
coordination service takes the port over; these connections stay, and carry a pulse both ways. One
that closes, or is silent for too long, is of a process that died: process 0 tells everybody, and
everybody stops and says which one. JAX by itself stops too, later, by an abort without a name.
"""

import collections
import contextlib
import ctypes
import dataclasses
import difflib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import jax
from absl import logging

from tulu_jax import validation

TRY_AGAIN = 75  # exit status: nothing is wrong with the run, start it again (EX_TEMPFAIL)
GRACE = 3.0  # seconds for a process to tell its own error when another tells the same one
PULSES = 10  # in the time after which silence is death
CONFIG = "config"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """A process of the run, and what it says of itself: versions and, as `config`, its text."""

    process_id: int
    num_processes: int
    host: str
    facts: dict[str, str]

    def __str__(self):
        return f"process {self.process_id} ({self.host})"


def disagreements(members: list[Member]) -> list[str]:
    """What differs between the members, one line for each member and fact."""
    usual = {
        name: collections.Counter(m.facts.get(name) for m in members).most_common(1)[0][0]
        for name in members[0].facts
    }
    problems = []
    for member in members:
        for name, expected in usual.items():
            found = member.facts.get(name)
            if found != expected and name == CONFIG:
                problems.append(
                    f"{member} has another configuration than most: {_difference(found, expected)}"
                    "; start all with the same files and flags"
                )
            elif found != expected:
                problems.append(
                    f"{member} has {name} {found}; most have {expected}; install the same on all"
                )
    return problems


def _difference(found: str, expected: str) -> str:
    lines = difflib.ndiff(expected.split("\n"), found.split("\n"))
    changed = [line for line in lines if line[:2] in ("+ ", "- ")]
    said = {sign: [c[2:].strip() for c in changed if c[0] == sign][:3] for sign in "+-"}
    return f"found {said['+']}, expected {said['-']}"


class _Wire:
    """One connection: JSON objects, one a line."""

    def __init__(self, connection: socket.socket, member: Member | None = None):
        self.socket, self.member = connection, member
        self.socket.settimeout(10)
        self.done = False  # whether it may close
        self.heard = time.monotonic()
        self._rest, self._lock = b"", threading.Lock()

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, **message) -> None:
        with contextlib.suppress(OSError), self._lock:
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict] | None:
        """What has come; None if the other end is closed, or speaks something else."""
        try:
            data = self.socket.recv(1 << 16)
            *lines, self._rest = (self._rest + data).split(b"\n")
            self.heard = time.monotonic()
            return [json.loads(line) for line in lines] if data else None
        except (OSError, ValueError):
            return None


def join(
    me: Member, address: str, *, start_timeout: float, peer_timeout: float
) -> tuple[list[Member], "Lifeline"]:
    """All members once all are there and agree, and the connection to them.

    `address` is host:port of process 0. Raises `ValueError`, on every process, that names those
    that did not come or that differ.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + start_timeout
    if me.process_id == 0:
        with _listening(int(port)) as server:
            wires = _call_roll(me, server, deadline)
        members = [me, *(wires[i].member for i in sorted(wires))]
        for wire in wires.values():
            wire.send(members=[dataclasses.asdict(m) | {"facts": {}} for m in members])
        return members, Lifeline(me, list(wires.values()), peer_timeout)
    wire, members = _report(me, (host.strip("[]"), int(port)), deadline)
    return members, Lifeline(me, [wire], peer_timeout)


@contextlib.contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen on port {port} ({error.strerror}): end what uses it on this "
            "host, an earlier run perhaps, or give all processes another coordinator port"
        ) from error
    with server:
        yield server


def _call_roll(me: Member, server: socket.socket, deadline: float) -> dict[int, _Wire]:
    """The wires of all others by process id."""
    arrived: dict[int, _Wire] = {}
    strangers: list[_Wire] = []  # have not yet said who they are
    said = time.monotonic()
    while len(arrived) < me.num_processes - 1:
        missing = sorted(set(range(1, me.num_processes)) - set(arrived))
        now = time.monotonic()
        if now > deadline:
            came = ", ".join(str(wire.member) for wire in arrived.values())
            _refuse(
                [*arrived.values(), *strangers],
                [
                    f"{len(arrived) + 1} of {me.num_processes} processes came ({me}"
                    f"{', ' + came if came else ''}); processes {missing} did not. Start those "
                    "too, look at what they print, or correct the number of processes"
                ],
            )
        if now > said + 15:
            said = now
            logging.info("Waiting for processes %s of %d", missing, me.num_processes)
        for ready in select.select([server, *strangers, *arrived.values()], [], [], 0.5)[0]:
            if ready is server:
                strangers.append(_Wire(server.accept()[0]))
                continue
            messages = ready.receive()
            if ready in strangers and messages == []:
                continue  # half a line
            if ready in strangers:
                strangers.remove(ready)
            if not messages:
                ready.socket.close()
                if ready.member:
                    arrived.pop(ready.member.process_id, None)  # it may come again
                continue
            ready.member = Member(**messages[0])
            problem = _misplaced(me, ready.member, arrived)
            if problem:
                _refuse([*arrived.values(), *strangers, ready], [problem])
            arrived[ready.member.process_id] = ready
    problems = disagreements([me, *(arrived[i].member for i in sorted(arrived))])
    if problems:
        _refuse([*arrived.values(), *strangers], problems)
    return arrived


def _misplaced(me: Member, member: Member, arrived: dict[int, _Wire]) -> str | None:
    if member.num_processes != me.num_processes:
        return (
            f"{member} was told of {member.num_processes} processes, {me} of {me.num_processes}; "
            "give all the same number"
        )
    twin = me if member.process_id == 0 else None
    if member.process_id in arrived:
        twin = arrived[member.process_id].member
    if twin or not 0 < member.process_id < me.num_processes:
        return (
            f"{member.host} says it is process {member.process_id} of {me.num_processes}"
            f"{f', and so does {twin.host}' if twin else ''}; give each its own id from 0 to "
            f"{me.num_processes - 1}"
        )
    return None


def _refuse(wires: list[_Wire], problems: list[str]) -> None:
    for wire in wires:
        wire.send(refused=problems)
    raise ValueError("\n".join(problems))


def _report(me: Member, address: tuple[str, int], deadline: float) -> tuple[_Wire, list[Member]]:
    """The wire to process 0 and all members."""
    problem: object = "no answer"
    while time.monotonic() < deadline:
        try:
            wire = _Wire(socket.create_connection(address, timeout=10))
        except OSError as error:
            problem = error.strerror or error
            time.sleep(0.5)
            continue
        wire.send(**dataclasses.asdict(me))
        messages: list[dict] | None = []
        while messages == [] and time.monotonic() < deadline + 10:  # its own limit comes first
            if select.select([wire], [], [], 1.0)[0]:
                messages = wire.receive()
        if messages and "refused" in messages[0]:
            raise ValueError("\n".join(messages[0]["refused"]))
        if messages:
            members = [Member(**member) for member in messages[0]["members"]]
            wire.member = members[0]
            return wire, members
        problem = "it closed the connection"
        time.sleep(0.5)
    raise ValueError(
        f"{me} cannot reach process 0 at {address[0]}:{address[1]} ({problem}). Start process 0 "
        "there, or correct the coordinator's address; the network must let that port through"
    )


class Lifeline:
    """The wires of this process: of process 0 to all others, of these to process 0."""

    def __init__(self, me: Member, wires: list[_Wire], timeout: float):
        self.me, self._wires, self._timeout = me, wires, timeout
        self._leaving = threading.Event()

    def watch(self) -> None:
        """Watches in a thread: if a process dies or fails, this one ends, saying which and why."""
        _delay_aborts()
        threading.Thread(target=self._watch, daemon=True, name="lifeline").start()

    def done(self) -> None:
        """Tells the others that this process is at its end and may go."""
        self._tell(done=True)

    def fail(self, error: BaseException) -> None:
        """Ends this process because of `error`, and tells the others.

        A collective that fails may be the echo of a death elsewhere: that is waited for.
        """
        out_of_memory = "RESOURCE_EXHAUSTED" in str(error)
        if isinstance(error, jax.errors.JaxRuntimeError) and not out_of_memory:
            time.sleep(self._timeout * (1 + 1 / PULSES) + 1)  # the thread ends the process
        self._leaving.set()
        code = 1
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 1
        if not isinstance(error, SystemExit) or isinstance(error.code, str):
            traceback.print_exception(error)
        told = error
        if isinstance(error, SystemExit) and error.__cause__ is not None:
            told = error.__cause__  # what it refused, and has printed
        reason = "see its output" if isinstance(told, SystemExit) else str(told)
        self._tell(failed=f"{type(told).__name__}: {reason[:500]}", code=code)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _tell(self, **message) -> None:
        for wire in self._wires:
            wire.send(**message)

    def _watch(self) -> None:
        period, sent = self._timeout / PULSES, 0.0
        while self._wires:
            if time.monotonic() > sent + period:
                self._tell(pulse=True)
                sent = time.monotonic()
            for wire in select.select(self._wires, [], [], min(period, 1.0))[0]:
                self._hear(wire, wire.receive())
            for wire in self._wires:
                silent = time.monotonic() - wire.heard
                if silent > self._timeout and not wire.done:
                    self._stop(f"{wire.member} has been silent for {silent:.0f} s", TRY_AGAIN)

    def _hear(self, wire: _Wire, messages: list[dict] | None) -> None:
        if messages is None:
            self._wires.remove(wire)
            if not wire.done:
                self._stop(f"{wire.member} died: its connection closed", TRY_AGAIN)
        for message in messages or ():
            wire.done |= message.get("done", False)
            if "failed" in message:
                wire.done = True
                self._stop(f"{wire.member} failed: {message['failed']}", message["code"])
            if "stop" in message:
                self._stop(*message["stop"])

    def _stop(self, reason: str, code: int) -> None:
        self._tell(stop=[reason, code])
        if code != TRY_AGAIN:
            time.sleep(GRACE)
        if self._leaving.is_set():
            return
        advice = "Start the same command on every process again to go on from the last checkpoint"
        if code == validation.REFUSED:
            advice = "Correct that, then start every process again"
        print(
            f"\n{self.me} stops: {reason}. {advice}.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(code)


def _delay_aborts() -> None:
    """Makes an abort take six seconds, in which the watching thread tells what happened.

    When process 0 dies, JAX's client aborts from C++ at once, without calling Python. The handler
    is libc's `sleep`, which may be called there; its argument is the number of the signal, 6.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
