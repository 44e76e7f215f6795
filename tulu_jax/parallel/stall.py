"""A process that waits for what does not come: said in bounded time, with where each thread stands.

A collective whose other half never starts, a read of a disk that is gone: neither fails, and the
pulse of `lifeline` goes on beside it. So what the loop waits for is announced here, and has to be
followed by the next announcement in time.
"""

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Iterator

from tulu_jax.parallel import distributed

LAST_RESORT = 60.0  # seconds later, for a hang that holds the lock of the interpreter
POLL = 1.0


class Watchdog:
    """Ends this process, and with it the run, `seconds` after the last `expect` (None: never).

    A thread of Python writes the stacks of all threads, tells the other processes, which write
    theirs, and exits with `lifeline.TRY_AGAIN`. Where the lock of the interpreter is never given
    back that thread stands too; then C code of `faulthandler` writes the stacks and exits with 1.
    """

    def __init__(self, seconds: float | None):
        self._seconds, self._what = seconds, ""
        self._deadline: float | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def expect(self, what: str) -> None:
        """Says what comes next, and that all before it is done."""
        if self._seconds is None:
            return
        self._what, self._deadline = what, time.monotonic() + self._seconds
        faulthandler.dump_traceback_later(
            self._seconds + LAST_RESORT, exit=True, file=sys.__stderr__
        )
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
            self._thread.start()

    def close(self) -> None:
        """Expects nothing any more."""
        self._closed.set()
        if self._thread is not None:
            faulthandler.cancel_dump_traceback_later()
            self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(POLL):
            if time.monotonic() > self._deadline:
                distributed.hung(f"{self._what} did not end within {self._seconds:g} s")


@contextlib.contextmanager
def watching(seconds: float | None) -> Iterator[Watchdog]:
    """A `Watchdog` inside."""
    watchdog = Watchdog(seconds)
    try:
        yield watchdog
    finally:
        watchdog.close()
