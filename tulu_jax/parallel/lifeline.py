"""A connection of every process to process 0: they agree before they start, and learn who is gone.

Process 0 listens on the coordinator's port until all others have told what they run. Then JAX's
coordination service takes the port over; these connections stay, and carry a pulse both ways. One
that closes, or is silent for too long, is of a process that died: process 0 tells everybody, and
everybody stops and says which one. JAX alone aborts, later or not at all, and names no host:
benchmarks/deaths.py.
"""

import collections
import contextlib
import dataclasses
import difflib
import faulthandler
import os
import queue
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
from absl import logging

from tulu_jax import atomic, validation
from tulu_jax.parallel import wire as wire_lib

TRY_AGAIN = 75  # exit status: nothing is wrong with the run, start it again (EX_TEMPFAIL)
GRACE = 3.0  # seconds for a process to tell its own error when another tells the same one
ECHO = 1.0  # seconds for a closed connection to be noticed after the error that it caused
HOLD = 0.2  # seconds for a word of the fault handler, which writes some 30 at least
PULSES = 10  # in the time after which silence is death
CONFIG = "config"
WAITING = 64  # connections that have not said yet who they are

before_exit: list[Callable[[], None]] = []  # called when this process ends without unwinding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """A process of the run, and what it says of itself: versions and, as `config`, its text."""

    process_id: int
    num_processes: int
    host: str
    facts: dict[str, str]

    def __str__(self):
        return f"process {self.process_id} ({self.host})"


def unusual(found: list[str]) -> list[tuple[int, str, str]]:
    """(place, text, what most have) of each of `found` that is not what most are."""
    usual = [text for text, _ in collections.Counter(found).most_common(1)]
    return [(i, text, usual[0]) for i, text in enumerate(found) if text != usual[0]]


def disagreements(members: list[Member]) -> list[str]:
    """What differs between the members, one line for each member and fact."""
    problems = []
    for name in members[0].facts:
        for i, found, usual in unusual([member.facts.get(name, "") for member in members]):
            said = f"has {name} {found}; most have {usual}; install the same on all"
            if name == CONFIG:
                lines = list(difflib.ndiff(usual.split("\n"), found.split("\n")))
                new, old = ([x[2:].strip() for x in lines if x[0] == sign][:3] for sign in "+-")
                said = (
                    f"has another configuration than most: found {new}, expected {old}; start all "
                    "with the same files and flags"
                )
            problems.append(f"{members[i]} {said}")
    return problems


_MEMBER = {"process_id": int, "num_processes": int, "host": str, "facts": {str: str}}
_MESSAGES = (
    _MEMBER,
    {"members": [_MEMBER]},
    {"refused": [str]},
    {"pulse": bool},
    {"done": bool},
    {"failed": str, "code": int},
    {"stop": (str, int)},
    {"hung": str},
)


def is_message(found: Any) -> bool:
    """Whether `found`, of JSON, is one of the messages that processes send."""
    return any(_has_form(found, form) for form in _MESSAGES)


def _has_form(found: Any, form: Any) -> bool:
    """A form is a type; a list or dict of any length; a tuple, of these; a dict of just these."""
    if isinstance(form, type):
        return type(found) is form
    if isinstance(form, list):
        return type(found) is list and all(_has_form(item, form[0]) for item in found)
    if isinstance(form, tuple):
        same = type(found) is list and len(found) == len(form)
        return same and all(map(_has_form, found, form))
    if type(found) is not dict:
        return False
    if str in form:
        return all(_has_form(item, form[str]) for item in found.values())
    return found.keys() == form.keys() and all(_has_form(found[key], form[key]) for key in form)


def join(
    me: Member, address: str, *, token: bytes | None, start_timeout: float, peer_timeout: float
) -> tuple[list[Member], "Lifeline"]:
    """All members once all are there and agree, and the connection to them.

    `address` is host:port of process 0; `token` signs what is said (`wire.token_of`). Raises
    `ValueError`, on every process, that names those that did not come or that differ.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + start_timeout
    shared = wire_lib.Shared(token=token, fits=is_message)
    if me.process_id:
        wire, members = _report(me, (host.strip("[]"), int(port)), deadline, shared)
        return members, Lifeline(me, [wire], shared.events, peer_timeout)
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    both = family == socket.AF_INET6
    try:
        server = socket.create_server(
            ("", int(port)), family=family, dualstack_ipv6=both, backlog=1024
        )
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen on port {port} ({error.strerror}): end what uses it on this "
            "host, an earlier run perhaps, or give all processes another coordinator port"
        ) from error
    with server:
        wires = _call_roll(me, server, deadline, shared)
    members = [me, *(wire.member for wire in wires)]
    for wire in wires:
        wire.send(members=[dataclasses.asdict(m) | {"facts": {}} for m in members])
    return members, Lifeline(me, wires, shared.events, peer_timeout)


def _call_roll(me: Member, server, deadline: float, shared: wire_lib.Shared) -> list[wire_lib.Wire]:
    """The wires of all others, by process id. Who does not say who it is, is passed over."""
    wires, arrived, problems = [], {}, []
    server.settimeout(0.2)
    said = time.monotonic()
    while missing := sorted(set(range(1, me.num_processes)) - set(arrived)):
        if time.monotonic() > deadline:
            came = [str(member) for member in (me, *(wire.member for wire in arrived.values()))]
            problems.append(
                f"{len(came)} of {me.num_processes} processes came ({', '.join(came)}); processes "
                f"{missing} did not. Start those too, look at what they print, or correct the "
                f"number of processes{_of_strangers(shared.dropped)}"
            )
        if problems:
            break
        if time.monotonic() > said + 15:
            said = time.monotonic()
            logging.info("Waiting for processes %s of %d", missing, me.num_processes)
        wires = [wire for wire in wires if not wire.closed]
        waiting = [wire for wire in wires if wire.member is None]
        for wire in waiting:
            if time.monotonic() > wire.begun + wire_lib.HELLO:
                wire.close()
        with contextlib.suppress(TimeoutError):
            if len(waiting) < WAITING:
                wires.append(wire_lib.Wire(server.accept()[0], shared))
            else:
                time.sleep(0.05)
        while not shared.events.empty() and not problems:
            wire, message = shared.events.get()
            if message is None and wire.member:
                del arrived[wire.member.process_id]  # it may come again
            elif message is not None and "host" in message and wire.member is None:
                wire.member = Member(**message)
                problems += _misplaced(wire.member, [me, *(w.member for w in arrived.values())])
                arrived.setdefault(wire.member.process_id, wire)
    found = [arrived[i] for i in sorted(arrived)]
    problems = problems or disagreements([me, *(wire.member for wire in found)])
    if problems:
        for wire in wires:
            if wire.member is not None:
                wire.send(refused=problems)
        raise ValueError("\n".join(problems))
    for wire in wires:
        if wire.member is None:
            wire.close()
    return found


def _of_strangers(dropped: dict[str, str]) -> str:
    """What to add where processes are missing and something was dropped."""
    listed = "; ".join(f"{host} was turned away: {reason}" for host, reason in dropped.items())
    return f". {listed[:500]}" if listed else ""


def _misplaced(member: Member, others: list[Member]) -> list[str]:
    """Why `member` cannot be one of the run of `others`, of which process 0 is the first."""
    first, count = others[0], others[0].num_processes
    if member.num_processes != count:
        return [
            f"{member} was told of {member.num_processes} processes, {first} of {count}; give all "
            "the same number"
        ]
    twins = [f", and so does {x.host}" for x in others if x.process_id == member.process_id]
    if twins or not 0 < member.process_id < count:
        return [
            f"{member.host} says it is process {member.process_id} of {count}{''.join(twins)}; "
            f"give each its own id from 0 to {count - 1}"
        ]
    return []


def _report(
    me: Member, address: tuple[str, int], deadline: float, shared: wire_lib.Shared
) -> tuple[wire_lib.Wire, list[Member]]:
    """The wire to process 0 and all members."""
    problem: object = "no answer"
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection(address, timeout=10)
        except OSError as error:
            problem = error.strerror or error
            time.sleep(0.5)
            continue
        connection.settimeout(None)
        wire = wire_lib.Wire(connection, shared)
        wire.send(**dataclasses.asdict(me))
        with contextlib.suppress(queue.Empty):  # process 0's own limit comes first
            _, message = shared.events.get(timeout=deadline + 10 - time.monotonic())
            if message and "refused" in message:
                raise ValueError("\n".join(message["refused"]))
            if message and "members" in message:
                members = [Member(**member) for member in message["members"]]
                wire.member = members[0]
                return wire, members
            problem = f"it closed the connection, perhaps for another {wire_lib.TOKEN}"
        time.sleep(0.5)
    raise ValueError(
        f"{me} cannot reach process 0 at {address[0]}:{address[1]} ({problem}). Start process 0 "
        "there, or correct the coordinator's address; the network must let that port through"
        f"{_of_strangers(shared.dropped)}"
    )


class Lifeline:
    """The wires of this process: of process 0 to all others, of these to process 0."""

    def __init__(
        self, me: Member, wires: list[wire_lib.Wire], events: queue.SimpleQueue, timeout: float
    ):
        self.me, self._wires, self._events, self._timeout = me, wires, events, timeout
        self._leaving = threading.Event()

    def watch(self) -> None:
        """Watches in a thread: if a process dies or fails, this one ends, saying which and why."""
        _hold_aborts()
        threading.Thread(target=self._watch, daemon=True, name="lifeline").start()

    def done(self) -> None:
        """Tells the others that this process is at its end and may go."""
        self._tell(done=True)

    def fail(self, error: BaseException) -> None:
        """Ends this process because of `error`, and tells the others.

        What is not refused may be the echo of a death elsewhere, of which the thread tells; a
        collective that failed waits as long as silence is no death.
        """
        refused = isinstance(error, SystemExit)
        if not refused:
            out_of_memory = "RESOURCE_EXHAUSTED" in str(error)
            collective = isinstance(error, jax.errors.JaxRuntimeError) and not out_of_memory
            time.sleep(ECHO + (self._timeout * (1 + 1 / PULSES) if collective else 0))
        self._leaving.set()
        code = error.code if refused and isinstance(error.code, int) else 1
        if not refused or isinstance(error.code, str):
            traceback.print_exception(error)
        told = (refused and error.__cause__) or error  # what it refused, and has printed
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
            with contextlib.suppress(queue.Empty):
                self._hear(*self._events.get(timeout=min(period, 1.0)))
            for wire in self._wires:
                silent = time.monotonic() - wire.heard
                if silent > self._timeout and not wire.done:
                    self._stop(f"{wire.member} has been silent for {silent:.0f} s", TRY_AGAIN)

    def _hear(self, wire: wire_lib.Wire, message: dict | None) -> None:
        if wire not in self._wires:  # it never said who it is
            return
        if message is None:
            self._wires.remove(wire)
            if not wire.done:
                self._stop(f"{wire.member} died: its connection closed", TRY_AGAIN)
            return
        wire.done |= "done" in message or "failed" in message
        if "failed" in message:
            self._stop(f"{wire.member} failed: {message['failed']}", message["code"])
        if "stop" in message:
            self._stop(*message["stop"])
        if "hung" in message:
            self.hung(message["hung"])

    def hung(self, reason: str) -> None:
        """Ends every process because one hangs; each says where its threads stand, which tells the
        one that hangs from those that wait for it."""
        self._tell(hung=reason)
        if not self._leaving.is_set():
            leave(f"{self.me} stops: {reason}. {_AGAIN}", TRY_AGAIN, stacks=True)

    def _stop(self, reason: str, code: int) -> None:
        self._tell(stop=[reason, code])
        if code != TRY_AGAIN:
            time.sleep(GRACE)
        if self._leaving.is_set():
            return
        advice = _AGAIN
        if code == validation.REFUSED:
            advice = "Correct that, then start every process again."
        leave(f"{self.me} stops: {reason}. {advice}", code)


_AGAIN = "Start the same command on every process again to go on from the last checkpoint."


def leave(said: str, code: int, *, stacks: bool = False) -> None:
    """Ends this process at once, whatever its other threads wait for; with `stacks` it first writes
    where these stand."""
    if stacks:
        print("\nWhere each thread stands:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
    print(f"\n{said}", file=sys.stderr, flush=True)
    clean_up()
    os._exit(code % 256)


def clean_up() -> None:
    """What a process does that ends at once, without unwinding."""
    for act in [*before_exit, atomic.remove_unfinished]:
        thread = threading.Thread(target=act, daemon=True)
        thread.start()
        thread.join(GRACE)  # a bucket that is out of reach must not keep it


def _hold_aborts() -> None:
    """Makes an abort take some seconds, in which the watching thread tells what happened.

    When process 0 dies, JAX's client aborts from C++ at once, without calling Python, and no option
    of JAX prevents it. Python's fault handler then writes, word by word, to a socket that is soon
    full: each word waits `HOLD` seconds, without the lock of the interpreter, and is dropped.
    """
    unread, full = socket.socketpair()
    full.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    full.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, int(HOLD * 1e6)))
    unread.detach()  # stays open
    faulthandler.enable(full.detach(), all_threads=False)
