"""Requests of several callers, decoded together as they come: one thread, one cache.

The thread that `Batcher` starts runs a program, takes what was asked meanwhile, drops what was
given up, and goes on: a request that comes joins the rows that are being decoded as soon as a slot
is free, and one that is given up leaves its slot and pages to the next. What is to be scored is
scored between programs, with all else that waits to be. What a request gets depends on it alone, as
everything that a decoder makes.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Sequence

import jax

from tulu_jax import validation
from tulu_jax.decode import call as call_lib
from tulu_jax.decode import continuation
from tulu_jax.decode.decoder import Decoder
from tulu_jax.decode.results import Piece, Score
from tulu_jax.decode.sampling import Sampling
from tulu_jax.models import llama

MOST_STOP_IDS = 8  # of a request: programs are compiled for so many
MOST_SEED = 2**32 - 1
SCORED_AT_ONCE = 64  # continuations between two programs, so that rows do not wait long

Listener = Callable[[Piece | Score | BaseException], None]


class BusyError(RuntimeError):
    """As many requests wait as may."""


@dataclasses.dataclass(kw_only=True)
class _Asked:
    prompt: list[int]
    sampling: Sampling | None  # None: to be scored
    continuation: list[int]
    seed: int
    listener: Listener
    left: int  # continuations that have not ended


class Batcher:
    """The thread of a decoder and its parameters, from `start` to `close`.

    A `listener` is called in that thread: with each `Piece` of a request (whose `prompt` is the
    request's number), with its `Score`, or with the error that ended the thread and with it all
    requests; `failed` is then called, and `error` is that error. At most `most_waiting` requests
    wait for a slot.
    """

    def __init__(
        self,
        decoder: Decoder,
        params: llama.Params,
        *,
        mesh: jax.sharding.Mesh | None,
        detokenize: continuation.Detokenize,
        most_waiting: int = 1024,
        failed: Callable[[], None] = lambda: None,
    ):
        self.decoder, self.params, self.mesh = decoder, params, mesh
        self.detokenize, self.most_waiting, self.failed = detokenize, most_waiting, failed
        self.error: BaseException | None = None
        self.running = self.waiting = 0  # rows, for whoever looks
        self.given_up = 0  # requests that were cancelled before they ended
        self._changed = threading.Condition()
        self._numbers = 0
        self._new: dict[int, _Asked] = {}
        self._taken: dict[int, _Asked] = {}
        self._dropped: set[int] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the thread behind the program that it runs; what is not done is not told."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def check(self, prompt: Sequence[int], sampling: Sampling, *, seed: int = 0) -> None:
        """Raises `UsageError` for a request that `generate` would refuse."""
        with self._on_mesh():
            self.decoder.check(prompt, sampling)
        if len(sampling.stop_ids) > MOST_STOP_IDS:
            raise validation.UsageError(
                f"there are {len(sampling.stop_ids)} stop ids, with that of the tokenizer; "
                f"expected at most {MOST_STOP_IDS}"
            )
        if not 0 <= seed <= MOST_SEED:
            raise validation.UsageError(f"seed = {seed}: expected 0 to {MOST_SEED:,}")

    def check_scored(self, prompt: Sequence[int], continuation: Sequence[int]) -> None:
        """Raises `UsageError` for a request that `score` would refuse."""
        self.decoder.check_scored(prompt, continuation)

    def generate(
        self, prompt: Sequence[int], sampling: Sampling, *, seed: int, listener: Listener
    ) -> int:
        """The number of a request whose samples draw from `jax.random.key(seed)`, each folded with
        its number. Raises `UsageError` or `BusyError`."""
        self.check(prompt, sampling, seed=seed)
        return self._ask(_Asked(
            prompt=list(prompt), sampling=sampling, continuation=[], seed=seed, listener=listener,
            left=sampling.samples,
        ))  # fmt: skip

    def score(
        self, prompt: Sequence[int], continuation: Sequence[int], *, listener: Listener
    ) -> int:
        """The number of a request to score `continuation`. Raises `UsageError` or `BusyError`."""
        self.check_scored(prompt, continuation)
        return self._ask(_Asked(
            prompt=list(prompt), sampling=None, continuation=list(continuation), seed=0,
            listener=listener, left=1,
        ))  # fmt: skip

    def cancel(self, number: int) -> None:
        """Gives a request up, if it has not ended."""
        with self._changed:
            self._dropped.add(number)
            self._changed.notify()

    def _ask(self, asked: _Asked) -> int:
        with self._changed:
            if self.error is not None:
                raise RuntimeError("the decoder has failed") from self.error
            if len(self._new) + self.waiting >= self.most_waiting:
                raise BusyError(f"{self.most_waiting:,} requests wait already; try again later")
            self._numbers += 1
            self._new[self._numbers] = asked
            self._changed.notify()
            return self._numbers

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _run(self) -> None:
        try:
            with self._on_mesh():
                self._serve()
        except BaseException as error:
            with self._changed:
                self.error = error
                asked = [*self._new.values(), *self._taken.values()]
            for one in asked:
                one.listener(error)
            self.failed()

    def _serve(self) -> None:
        call = self.decoder.open(self.params, stops=MOST_STOP_IDS)
        self.params = call.params  # in the dtype they are multiplied in, also for scores
        scored: dict[int, _Asked] = {}
        while True:
            with self._changed:
                while not (self._new or self._dropped or scored or call.is_busy or self._closed):
                    self._changed.wait()
                if self._closed:
                    return
                new, self._new = self._new, {}
                dropped, self._dropped = self._dropped, set()
                self._taken |= new
            for number, asked in new.items():
                if asked.sampling is None:
                    scored[number] = asked
                else:
                    self._add(call, number, asked)
            for number in dropped & self._taken.keys():
                asked = self._taken.pop(number)
                self.given_up += 1
                if asked.sampling is None:
                    del scored[number]
                else:
                    call.drop(number)
            self._score(scored)
            if call.is_busy:
                self._advance(call)
            self.running, self.waiting = len(call.schedule.rows), len(call.schedule.waiting)

    def _add(self, call: call_lib.Call, number: int, asked: _Asked) -> None:
        sampling, words = asked.sampling, {}
        if sampling.temperature:
            key = jax.random.key(asked.seed)[None]
            found = call_lib.words_of(key, [(0, s) for s in range(sampling.samples)])
            words = {(number, s): word for (_, s), word in found.items()}
        call.add(number, asked.prompt, sampling, words)

    def _score(self, scored: dict[int, _Asked]) -> None:
        """Scores the first of `scored`, and takes them out of it."""
        numbers = list(scored)[:SCORED_AT_ONCE]
        asked = [scored.pop(number) for number in numbers]
        found = self.decoder.score(
            self.params, [one.prompt for one in asked], [one.continuation for one in asked]
        )
        for number, one, score in zip(numbers, asked, found, strict=True):
            del self._taken[number]
            one.listener(score)

    def _advance(self, call: call_lib.Call) -> None:
        def tell(piece: Piece) -> None:
            self._taken[piece.prompt].listener(piece)

        for result in call.advance(self.detokenize, tell):
            asked = self._taken[result.prompt]
            asked.left -= 1
            if not asked.left:
                del self._taken[result.prompt]
                call.drop(result.prompt)
