"""The server's addresses: OpenAI's completions, chat completions and models, and /health.

A request waits in the event loop for what the decoder's thread tells it. If its client goes away,
streaming or not, it is given up, and its slots go to others.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable

from absl import logging
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from tulu_jax import strict_json, validation
from tulu_jax.decode.batcher import MOST_SEED, Batcher, BusyError
from tulu_jax.decode.results import Score
from tulu_jax.serving import api_requests
from tulu_jax.serving.api_replies import Answer, Choice
from tulu_jax.serving.api_requests import ApiError, Asked, Served

MOST_BYTES = 64 << 20  # of a body
JSON = "application/json"


def make(batcher: Batcher, served: Served) -> Starlette:
    """The application that serves what `batcher` decodes."""
    seeds = itertools.count()

    def answering(read: Callable[[dict, Served], Asked]):
        async def answer(request: Request) -> Response:
            asked = read(api_requests.parse(await _body(request)), served)
            seed = next(seeds) % MOST_SEED if asked.seed is None else asked.seed
            work = _Work(batcher, asked, seed=seed)
            try:
                work.begin()
                if asked.stream:
                    first = await work.first(request)  # an error has a status of its own
                    events = _events(request, work, Answer(asked, served), first)
                    return _Stream(events, work)
                choices = await work.whole(request)
            except BaseException:
                work.cancel()
                raise
            return _json(Answer(asked, served).whole(choices))

        return answer

    async def models(request: Request) -> Response:
        del request
        about = {"id": served.name, "object": "model", "created": 0, "owned_by": "tulu_jax"}
        about["max_model_len"] = served.max_length
        return _json({"object": "list", "data": [about]})

    async def health(request: Request) -> Response:
        del request
        is_well = batcher.error is None
        about = {"status": "ok" if is_well else "failed", "model": served.name}
        names = ("running", "waiting", "given_up")
        about |= {name: getattr(batcher, name) for name in names}
        return _json(about, status=200 if is_well else 500)

    return Starlette(
        routes=[
            Route("/v1/completions", answering(api_requests.completion), methods=["POST"]),
            Route("/v1/chat/completions", answering(api_requests.chat), methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
        ],
        exception_handlers={
            ApiError: _said, 404: _no_address, 405: _no_address, _GoneError: _nobody,
            ClientDisconnect: _nobody, Exception: _broken,
        },
    )  # fmt: skip


class _GoneError(Exception):
    """The client is not there any more."""


class _Work:
    """The parts of a request at the decoder, and what they have told."""

    def __init__(self, batcher: Batcher, asked: Asked, *, seed: int):
        self.batcher, self.asked, self.seed = batcher, asked, seed
        self.samples = asked.sampling.samples if asked.sampling else 1
        self.choices = [
            Choice(prompt=prompt, echo=asked.echo)
            for prompt in asked.prompts
            for _ in range(self.samples)
        ]
        self.told: asyncio.Queue = asyncio.Queue()
        self.numbers: list[int] = []
        self.left = 0

    def begin(self) -> None:
        """Asks the decoder for all parts, or for none. Raises `ApiError`."""
        asked = self.asked
        scores = asked.echo and asked.logprobs
        try:
            for place, prompt in enumerate(asked.prompts):
                if asked.sampling is not None:
                    self.batcher.check(prompt, asked.sampling, seed=self._seed(place))
                if scores and len(prompt) > 1:
                    self.batcher.check_scored(prompt[:1], prompt[1:])
            for place, prompt in enumerate(asked.prompts):
                listener = self._listener(place)
                if asked.sampling is not None:
                    seed = self._seed(place)
                    self.numbers.append(
                        self.batcher.generate(prompt, asked.sampling, seed=seed, listener=listener)
                    )
                    self.left += self.samples
                if scores and len(prompt) > 1:
                    self.numbers.append(
                        self.batcher.score(prompt[:1], prompt[1:], listener=listener)
                    )
                    self.left += 1
        except validation.UsageError as error:
            said = str(error).removeprefix("cannot generate: ").removeprefix("cannot score: ")
            raise ApiError(
                said, param="messages" if asked.is_chat else "prompt", code="invalid_value"
            ) from error
        except BusyError as error:
            raise ApiError(
                str(error), status=429, kind="rate_limit_error", code="rate_limit_exceeded"
            ) from error

    def _seed(self, place: int) -> int:
        return (self.seed + place) % (MOST_SEED + 1)

    def _listener(self, place: int):
        loop, tell = asyncio.get_running_loop(), self.told.put_nowait

        def listen(found):
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends
                loop.call_soon_threadsafe(tell, (place, found))

        return listen

    def cancel(self) -> None:
        """Gives up what is not done."""
        if self.left:
            self.left = 0
            for number in self.numbers:
                self.batcher.cancel(number)

    async def _next(self, gone: asyncio.Task):
        """(index of the choice, piece) of what is told next, or (None, None) for a score. Raises
        `_GoneError` if the client goes away before."""
        told = asyncio.ensure_future(self.told.get())
        await asyncio.wait({told, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not told.done():
            told.cancel()
            raise _GoneError
        place, found = told.result()
        if isinstance(found, BaseException):
            raise RuntimeError("the decoder has failed") from found
        begin = place * self.samples
        if isinstance(found, Score):
            self.left -= 1
            for choice in self.choices[begin : begin + self.samples]:
                choice.score = found
            return None, None
        index = begin + found.sample
        self.choices[index].add(found)
        self.left -= found.ended is not None
        return index, found

    async def first(self, request: Request):
        """The first that is told."""
        async with _watched(request) as gone:
            return await self._next(gone)

    async def whole(self, request: Request) -> list[Choice]:
        """All choices, whole."""
        async with _watched(request) as gone:
            while self.left:
                await self._next(gone)
        return self.choices

    async def rest(self, request: Request, first) -> AsyncIterator:
        """All pieces, the `first` one first."""
        yield first
        async with _watched(request) as gone:
            while self.left:
                yield await self._next(gone)


@contextlib.asynccontextmanager
async def _watched(request: Request) -> AsyncIterator[asyncio.Task]:
    """A task that ends when the client goes away."""

    async def watch():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(watch())
    try:
        yield task
    finally:
        task.cancel()


class _Stream(StreamingResponse):
    """Events of `work`, which is given up however the sending of them ends."""

    def __init__(self, events: AsyncIterator[str], work: _Work):
        super().__init__(events, media_type="text/event-stream")
        self.work = work

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.work.cancel()


async def _events(request: Request, work: _Work, answer: Answer, first) -> AsyncIterator[str]:
    """The stream of an answer, as server-sent events."""
    try:
        if work.asked.is_chat:
            for index in range(len(work.choices)):
                yield _event(answer.first(index))
        async with contextlib.aclosing(work.rest(request, first)) as pieces:
            async for index, piece in pieces:
                yield _event(answer.part(index, work.choices[index], piece))
        if work.asked.include_usage:
            yield _event(answer.last(work.choices))
        yield "data: [DONE]\n\n"
    except _GoneError:
        return
    except RuntimeError as error:
        yield _event(ApiError(str(error), status=500, kind="server_error").body())


def _event(about: dict) -> str:
    return f"data: {strict_json.dumps(about)}\n\n"


async def _body(request: Request) -> bytes:
    """The body of a request. A page of another site may send any but JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON:
        raise ApiError(f"content-type {kind!r}: expected {JSON}", status=415)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MOST_BYTES:
            raise ApiError(f"the body is larger than {MOST_BYTES >> 20} MiB", status=413)
        parts.append(part)
    return b"".join(parts)


def _json(about: dict, *, status: int = 200, headers: dict | None = None) -> Response:
    return Response(strict_json.dumps(about), status_code=status, headers=headers, media_type=JSON)


async def _said(request: Request, error: ApiError) -> Response:
    del request
    headers = {"retry-after": "1"} if error.status == 429 else None
    return _json(error.body(), status=error.status, headers=headers)


async def _no_address(request: Request, error) -> Response:
    said = (
        f"{request.method} {request.url.path} is not served; expected POST /v1/completions, POST "
        "/v1/chat/completions, GET /v1/models or GET /health"
    )
    return _json(ApiError(said).body(), status=error.status_code)


async def _nobody(request: Request, error) -> Response:
    del request, error
    return Response(status_code=499)  # nobody reads it


async def _broken(request: Request, error: Exception) -> Response:
    logging.error("%s failed", request.url.path, exc_info=error)
    said = ApiError("the server failed; its log tells more", kind="server_error", status=500)
    return _json(said.body(), status=500)
