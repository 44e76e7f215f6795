"""Asks an engine what a benchmark wants to know. It knows no benchmark, and no engine.

A request is answered from its ids, its settings and its own seed alone, whatever is asked beside
it. So an evaluation that was killed goes on where it was, and ends as it would have.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tqdm
import xxhash
from absl import logging

from tulu_jax import digests
from tulu_jax.data import chat as chat_lib
from tulu_jax.evals import llama2_chat
from tulu_jax.evals import predictions as predictions_lib
from tulu_jax.evals.benchmark import Answer, Request
from tulu_jax.serving import engine as engine_lib

NO_CHAT = "none"  # of `chat`: a base model, which is asked raw texts
SCORED_AT_ONCE = 64  # requests with choices; fixed, since a score's last bit depends on its batch
_FILLER = "."  # stands for a reply when the length of a conversation is reckoned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A request in ids: its prompt, or the (prompt, continuation) of each choice; a digest of all
    of them; and how many positions it may come to need, the answers among them."""

    request: Request
    prompt: list[int]
    choices: list[tuple[list[int], list[int]]]
    prompt_hash: str
    positions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """The requests of a benchmark as they are put to a model. `name` is that of its files. With
    `is_cap`, `max_new_tokens` is only the most that an answer may have, and a model that holds
    fewer is asked for fewer."""

    name: str
    asked: list[Asked]
    is_cap: bool
    chat: str
    tokenizer: chat_lib.ChatTokenizer


def encode(
    name: str,
    requests: Sequence[Request],
    tokenizer: chat_lib.ChatTokenizer,
    *,
    chat: str,
    is_cap: bool,
) -> Prompts:
    """Encodes requests; `chat` is a mode of `data/chat.py`, `llama2_chat.NAME` or `NO_CHAT`. Raises
    `UsageError` for requests that cannot be asked."""
    twice = [id_ for id_, n in collections.Counter(r.id for r in requests).items() if n > 1]
    if twice:
        raise ValueError(f"{name}: several requests have the ids {predictions_lib.shown(twice)}")
    asked = [_asked(request, tokenizer, chat) for request in requests]
    return Prompts(name=name, asked=asked, is_cap=is_cap, chat=chat, tokenizer=tokenizer)


def _asked(request: Request, tokenizer, chat: str) -> Asked:
    encode = _encoder(request, [], tokenizer, chat)
    prompt, choices = encode(request.prefix), []
    if request.sampling is None:
        choices = engine_lib.continuations(encode, request.choices, prefix=request.prefix)
        positions = max(len(before) + len(ids) for before, ids in choices) - 1
        lists = [ids for pair in choices for ids in pair]
    else:
        whole = [_FILLER] * len(request.then)
        last = _encoder(request, whole, tokenizer, chat)(request.prefix)
        turns = 1 + len(request.then)
        positions = len(last) + turns * request.sampling.max_new_tokens
        lists = [prompt, *map(tokenizer.encode, request.then)]
    return Asked(
        request=request,
        prompt=prompt,
        choices=choices,
        prompt_hash=hash_of(lists),
        positions=positions,
    )


def hash_of(lists: Sequence[Sequence[int]]) -> str:
    """xxh3 of the ids (int32, little endian) of one prompt; of several lists, with -1 between."""
    ids = list(lists[0])
    for more in lists[1:]:
        ids += [-1, *more]
    return digests.of_bytes(np.array(ids, "<i4").tobytes())


def _encoder(request: Request, replies: Sequence[str], tokenizer, chat: str):
    """What gives the ids of the turn behind `replies`, from what its answer begins with."""
    if isinstance(request.prompt, str):
        text = request.prompt
        for reply, further in zip(replies, request.then, strict=False):
            text += request.prefix + reply + further
        return lambda prefix: [tokenizer.bos_id, *tokenizer.encode(text + prefix)]
    messages = list(request.prompt)
    for reply, further in zip(replies, request.then, strict=False):
        messages.append({"role": "assistant", "content": (request.prefix + reply).strip()})
        messages.append({"role": "user", "content": further})
    if chat == llama2_chat.NAME:
        return lambda prefix: llama2_chat.generation_prompt(messages, tokenizer, prefix=prefix)
    # The paper's evaluations did not strip what a user says: TyDiQA's questions end with LF.
    return lambda prefix: chat_lib.generation_prompt(
        messages, tokenizer, chat=chat, prefix=prefix, strips=False
    )


def in_ids(of: Prompts, asked: Asked, answer: Answer) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of each sample of a generated answer, its text encoded as in training, with
    the end token where it came to an end by itself."""
    request = asked.request
    encode, found = _encoder(request, [], of.tokenizer, of.chat), []
    for text, ended in zip(answer.texts, answer.ended, strict=True):
        prompt, ids = asked.prompt, []
        if text:
            ((prompt, ids),) = engine_lib.continuations(encode, [text], prefix=request.prefix)
        is_whole = ended == "stop" and not request.sampling.stop
        found.append((prompt, [*ids, of.tokenizer.eos_id] if is_whole else ids))
    return found


def length_problems(of: Prompts, max_length: int | None) -> Iterator[str]:
    """Why a model of `max_length` positions cannot be asked, in one line; and what is asked less of
    it, in the log. An engine that does not tell (None) has to say so itself."""
    if max_length is None:
        return
    longer = [asked for asked in of.asked if asked.positions > max_length]
    if of.is_cap:
        cut = longer
        longer = [asked for asked in longer if len(asked.prompt) >= max_length]
        if cut and not longer:
            logging.info(
                "%s: of %d answers fewer than max_new_tokens are asked, at least %d, which is what "
                "a model of %d positions holds",
                *(of.name, len(cut), min(max_length - len(a.prompt) for a in cut), max_length),
            )
    if longer:
        longest = max(longer, key=lambda asked: asked.positions)
        new = longest.positions - len(longest.prompt)
        yield (
            f"{of.name}: {len(longer):,} of {len(of.asked):,} prompts and their answers are longer "
            f"than the model's {max_length:,} positions; the longest is {longest.request.id!r} of "
            f"{len(longest.prompt):,} ids, with {new:,} to come; expected a model of "
            f"{longest.positions:,} positions, or benchmarks without {of.name}"
        )


def answers(
    engine: engine_lib.Engine,
    of: Prompts,
    path: pathlib.Path,
    *,
    about: dict[str, Any],
    shows: bool = True,
) -> list[Answer]:
    """The answers of `engine`, in the order of the requests; those that `path` has are not asked
    for again. `about` says what was evaluated, and how. Raises `UsageError` as `Predictions` and
    the engine do; what was answered until then is kept."""
    hashes = {asked.request.id: asked.prompt_hash for asked in of.asked}
    settings = sorted({repr(asked.request.sampling) for asked in of.asked})
    about = {**about, "chat": of.chat, "sampling": settings}
    file = predictions_lib.Predictions(path, about=about, hashes=hashes)
    done = sum(_is_done(asked, file) for asked in of.asked)
    try:
        with tqdm.tqdm(
            total=len(of.asked), initial=done, desc=of.name, unit="request", disable=not shows
        ) as bar:

            def add(asked: Asked, answer: Answer) -> None:
                file.add(answer)
                bar.update(_is_done(asked, file))

            _score(engine, of, file, add)
            for turn in range(1 + max((len(a.request.then) for a in of.asked), default=0)):
                _generate(engine, of, turn, file, add)
    finally:
        file.close()
    return [file.answers[asked.request.id] for asked in of.asked]


def _is_done(asked: Asked, file: predictions_lib.Predictions) -> bool:
    answer, request = file.answers.get(asked.request.id), asked.request
    if answer is None:
        return False
    return request.sampling is None or not request.then or len(answer.texts) > len(request.then)


def _score(engine, of: Prompts, file, add: Callable) -> None:
    """Scores choices, in batches that are the same however often the evaluation was stopped."""
    scored = [asked for asked in of.asked if asked.request.sampling is None]
    for first in range(0, len(scored), SCORED_AT_ONCE):
        batch = scored[first : first + SCORED_AT_ONCE]
        if all(_is_done(asked, file) for asked in batch):
            continue
        pairs = [pair for asked in batch for pair in asked.choices]
        scores = iter(engine.score(*map(list, zip(*pairs, strict=True))))
        for asked in batch:
            logps = [next(scores).logps for _ in asked.choices]
            if not _is_done(asked, file):
                add(asked, _answer(asked, choice_logps=logps))


def _generate(engine, of: Prompts, turn: int, file, add: Callable) -> None:
    """Asks turn `turn` of whoever has not said it; requests of the same settings together."""
    groups = collections.defaultdict(list)
    for asked in of.asked:
        request = asked.request
        said = file.answers[request.id].texts if request.id in file.answers else []
        is_asked = not said if turn == 0 else turn == len(said) and turn <= len(request.then)
        if request.sampling is not None and is_asked:
            groups[request.sampling].append(asked)
    for sampling, group in groups.items():
        before = [file.answers.get(a.request.id) or _answer(a) for a in group]
        prompts = [
            _encoder(a.request, b.texts, of.tokenizer, of.chat)(a.request.prefix)
            for a, b in zip(group, before, strict=True)
        ]

        def done(place, replies, group=group, before=before):
            add(group[place], _answer(
                group[place],
                texts=before[place].texts + [reply.text for reply in replies],
                ended=before[place].ended + [reply.ended for reply in replies],
            ))  # fmt: skip

        seeds = [seed_of(of.name, a.request.id, turn) for a in group]
        engine.generate(prompts, sampling, seeds=seeds, done=done)


def seed_of(name: str, request_id: str, turn: int) -> int:
    """The seed of a request's draws: of what it is, never of when it is asked."""
    return xxhash.xxh3_64_intdigest(f"{name}/{request_id}/{turn}".encode()) & 0xFFFFFFFF


def _answer(asked: Asked, **said) -> Answer:
    return Answer(id=asked.request.id, prompt_hash=asked.prompt_hash, **said)
