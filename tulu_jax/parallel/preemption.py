"""SIGTERM, which a spot slice gets before it goes: a command stops, and leaves nothing torn.

What it does depends on what there is to save:

- Until the first update of this process is done there is nothing. `Preempted` is raised in the main
  thread, wherever that is, and the command unwinds: leases are given up, temporary files removed.
  Where the main thread is in compiled code, which no Python exception leaves (a compilation takes
  minutes), a watching thread waits `GRACE` seconds, cleans up in its place, and ends the process.
- From then on `Notice` remembers the signal, and the loop saves after the update it is in. With
  several processes jax catches the signal and agrees on that update with all of them.
- What must not be torn, such as the making of a lease, is done inside `later`; what had better be
  finished, such as a checkpoint that is being written, inside `finishing`.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

import jax
from absl import logging
from jax._src import distributed as jax_distributed  # its one way to start what takes the signal
from jax.experimental import multihost_utils

from tulu_jax.parallel import lifeline

GRACE = 12.0  # seconds for the main thread to unwind; a spot VM has 30 before it goes
_SERVICE = "jax_enable_preemption_service"


class Preempted(BaseException):
    """The command was asked to stop; started again, it goes on. No `except Exception` takes it for
    a damaged file or a bucket out of reach.

    `together` tells that all processes of the run stop for it after the same update.
    """

    def __init__(self, message: str, *, together: bool = False):
        super().__init__(message)
        self.together = together


class _State:
    """What this process, which has one main thread, does about the signal."""

    def __init__(self):
        self.listens = False
        self.received = threading.Event()
        self.remembering = 0  # depth of what is done to its end
        self.raised = False


_state = _State()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Inside, SIGTERM raises `Preempted`. Only in a main thread, and once: inside of another one
    this does nothing."""
    global _state
    if _state.listens or not _is_main():
        yield
        return
    _state = _State()
    _state.listens = True
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    former = signal.signal(signal.SIGTERM, _receive)
    former_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    ended = threading.Event()
    threading.Thread(target=_watch, args=(reader, ended), daemon=True, name="sigterm").start()
    try:
        yield
    finally:
        ended.set()
        signal.signal(signal.SIGTERM, former or signal.SIG_DFL)
        signal.set_wakeup_fd(former_writer)
        os.close(writer)
        _state.listens = False


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Around a command: `listening`, and what it raises ends with its message and status 75."""
    with listening():
        try:
            yield
        except Preempted as stopped:
            print(f"{stopped}. Start the same command again to go on.", file=sys.stderr)
            raise SystemExit(lifeline.TRY_AGAIN) from stopped


@contextlib.contextmanager
def later() -> Iterator[None]:
    """Inside, the signal waits, and raises behind the end."""
    with finishing():
        yield
    waited = _state.received.is_set() and not _state.remembering
    if waited and _state.listens and _is_main():
        _raise()


@contextlib.contextmanager
def finishing() -> Iterator[None]:
    """Inside, the signal is remembered and changes nothing, however long it takes."""
    mine = _is_main()  # which alone gets the signal
    _state.remembering += mine
    try:
        yield
    finally:
        _state.remembering -= mine


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _receive(number, frame) -> None:
    del number, frame
    _state.received.set()
    if not _state.remembering:
        _raise()


def _raise() -> None:
    if not _state.raised:
        _state.raised = True
        raise Preempted("Asked to stop (SIGTERM), with nothing to save since the last checkpoint")


def _watch(reader: int, ended: threading.Event) -> None:
    """Waits for the signal, of which Python's own handler writes to `reader` at once, also while
    the main thread is in compiled code."""
    with open(reader, "rb", buffering=0) as signals:
        while number := signals.read(1):
            if number[0] == signal.SIGTERM and not _state.remembering:
                break
        else:
            return
    if ended.wait(GRACE) or _state.remembering:
        return
    print(
        f"Asked to stop (SIGTERM), and {GRACE:.0f} s later still in compiled code: ended, with "
        "nothing to save since the last checkpoint. Start the same command again to go on.",
        file=sys.stderr,
        flush=True,
    )
    lifeline.clean_up()
    os._exit(lifeline.TRY_AGAIN)


class Notice:
    """Whether this host, or with several processes any of them, was asked to stop. Made before the
    first update; the signal is remembered from the first `reached` to `close`."""

    def __init__(self):
        self._finishing = contextlib.ExitStack()
        self._begun = False

    def reached(self, step: int) -> bool:
        """Whether to stop after update `step`, the same answer on every process."""
        if not self._begun:
            self._begin()
        if jax.distributed.is_initialized():
            reached = multihost_utils.reached_preemption_sync_point(step)
        else:
            reached = _state.received.is_set()
        if reached:
            _state.raised = True  # by the loop, once all is saved
            logging.warning("Asked to stop (SIGTERM): saving step %d", step)
        return reached

    def _begin(self) -> None:
        self._finishing.enter_context(finishing())
        self._begun = True
        if jax.distributed.is_initialized():
            found = jax_distributed.global_state
            if found.preemption_sync_manager is None:  # see `leave_to_us`
                jax.config.update(_SERVICE, True)
                found.initialize_preemption_sync_manager()

    def close(self) -> None:
        self._finishing.close()
        _state.raised |= self._begun  # the loop has stopped, or the run is at its end


def leave_to_us() -> None:
    """Before jax connects several processes: it would take the signal from there on, and a process
    that encodes or compiles would go on until it is killed. Now it does once `Notice` begins."""
    jax.config.update(_SERVICE, False)
