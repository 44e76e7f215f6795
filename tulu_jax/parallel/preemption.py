"""SIGTERM, which a spot slice gets before it goes: all processes stop after the same update."""

import signal
import threading

import jax
from absl import logging
from jax.experimental import multihost_utils


class Preempted(Exception):
    """The run was asked to stop, and has saved its state; started again, it goes on from there."""


class Notice:
    """Whether this host, or with several processes any of them, got SIGTERM since this was made.

    With several processes jax catches the signal and agrees on the update with all of them; for a
    single one a handler is installed here, and `close` puts the former one back.
    """

    def __init__(self):
        self._received = threading.Event()
        self._former = None
        alone = not jax.distributed.is_initialized()
        if alone and threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number, frame) -> None:
        del number, frame
        self._received.set()

    def reached(self, step: int) -> bool:
        """Whether to stop after update `step`, the same answer on every process."""
        if jax.distributed.is_initialized():
            reached = multihost_utils.reached_preemption_sync_point(step)
        else:
            reached = self._received.is_set()
        if reached:
            logging.warning("Asked to stop (SIGTERM): saving step %d", step)
        return reached

    def close(self) -> None:
        if self._former is not None:
            signal.signal(signal.SIGTERM, self._former)
