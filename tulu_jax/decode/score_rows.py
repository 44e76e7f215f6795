"""How scored continuations lie in packed rows, and their log-probabilities.

A sequence is a prompt with its continuation but the last token. Sequences that begin alike are one
segment: the common beginning is branch 0, the rest of each is a branch of its own, which sees
itself and the beginning, as the answers of a packed pair do in training. What continues a sequence
in several ways is computed once. Scores over the vocabulary are made where something is scored.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tulu_jax.decode.results import Score

FIELDS = ("tokens", "segment_ids", "positions", "branches")
CHUNK = 64  # positions whose scores over the vocabulary exist at once
FEWEST_BRANCHED = 8  # positions of a beginning that are worth a segment with branches


@dataclasses.dataclass(kw_only=True)
class Row:
    """Segments, each a beginning and the rests behind it; the places that are scored; and, of each
    entry, (continuation, its token's number, index among the places, target)."""

    segments: list[tuple[list[int], list[list[int]]]]
    length: int
    places: list[int]
    entries: list[tuple[int, int, int, int]]


def lay_out(
    prompts: Sequence[list[int]], continuations: Sequence[list[int]], *, length: int
) -> list[Row]:
    """Rows of at most `length` positions, or one sequence that is longer."""
    asked: dict[tuple[int, ...], list[int]] = {}
    for i, (prompt, ids) in enumerate(zip(prompts, continuations, strict=True)):
        asked.setdefault((*prompt, *ids[:-1]), []).append(i)
    sequences, rows = sorted(asked), []
    for group, common in _grouped(sequences):
        for start, stop in _pieces(group, common, sequences, length):
            members = [sequences[n] for n in range(start, stop)]
            shared = common if stop - start > 1 else len(members[0])
            size = shared + sum(len(member) - shared for member in members)
            row = next((row for row in rows[-8:] if row.length + size <= length), None)
            if row is None:
                row = Row(segments=[], length=0, places=[], entries=[])
                rows.append(row)
            _add(row, members, shared, [asked[m] for m in members], prompts, continuations)
    return rows


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences begin with alike."""
    most = min(len(a), len(b))
    return next((n for n in range(most) if a[n] != b[n]), most)


def _grouped(sequences: Sequence[tuple[int, ...]]) -> Iterator[tuple[tuple[int, int], int]]:
    """((start, stop), common beginning) of neighbours that take fewest positions together: another
    one joins if it costs those before it less of their beginning than it shares itself."""
    start, shared = 0, 0
    for n in range(1, len(sequences) + 1):
        count = n - start
        longer = len(sequences[start]) if count == 1 else shared
        common = 0 if n == len(sequences) else min(longer, _common(sequences[n - 1], sequences[n]))
        joins = common >= FEWEST_BRANCHED and (count == 1 or count * common > (count - 1) * shared)
        if joins:
            shared = common
        else:
            yield (start, n), longer
            start, shared = n, 0


def _pieces(group, common, sequences, length) -> Iterator[tuple[int, int]]:
    """The group in pieces that fit in rows, each with the beginning again."""
    (start, end), size = group, common
    for n in range(start, end):
        rest = len(sequences[n]) - common
        if n > start and size + rest > length:
            yield start, n
            start, size = n, common
        size += rest
    yield start, end


def _add(row, members, shared, asked, prompts, continuations) -> None:
    """Adds a segment and what is scored of it."""
    begin, places = row.length, {}
    rests = [list(member[shared:]) for member in members]
    row.segments.append((list(members[0][:shared]), rests))
    row.length += shared + sum(map(len, rests))
    at = begin + shared
    for rest, who in zip(rests, asked, strict=True):
        for i in who:
            for number, target in enumerate(continuations[i]):
                position = len(prompts[i]) - 1 + number
                place = begin + position if position < shared else at + position - shared
                if place not in places:
                    places[place] = len(row.places)
                    row.places.append(place)
                row.entries.append((i, number, places[place], target))
        at += len(rest)


def sizes(rows: Sequence[Row]) -> tuple[int, int]:
    """Room for the scored places and for the entries of any of `rows`."""
    places, entries = (
        max(map(len, x)) for x in zip(*((r.places, r.entries) for r in rows), strict=True)
    )
    return -(-places // CHUNK) * CHUNK, 1 << (entries - 1).bit_length()


def batch(
    rows: Sequence[Row], *, count: int, length: int, places: int, entries: int
) -> dict[str, np.ndarray]:
    """The FIELDS [B, T] of B = `count` rows, of which the last may be empty, their `places` [B, P]
    and of each entry `at` [B, E], its index among them, and `targets` [B, E]."""
    found = {name: np.zeros((count, length), np.int32) for name in FIELDS}
    found["places"] = np.zeros((count, places), np.int32)
    found |= {name: np.zeros((count, entries), np.int32) for name in ("at", "targets")}
    for b, row in enumerate(rows):
        start = 0
        for number, (shared, rests) in enumerate(row.segments, 1):
            for branch, ids in enumerate([shared, *rests]):
                here = (b, slice(start, start + len(ids)))
                first = 0 if branch == 0 else len(shared)
                found["tokens"][here] = ids
                found["segment_ids"][here], found["branches"][here] = number, branch
                found["positions"][here] = range(first, first + len(ids))
                start += len(ids)
        found["places"][b, : len(row.places)] = row.places
        found["at"][b, : len(row.entries)] = [at for _, _, at, _ in row.entries]
        found["targets"][b, : len(row.entries)] = [target for *_, target in row.entries]
    return found


def score(hidden, unembedding, batch: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each entry [B, E] the float32 log-probability of its target, the likeliest id, and the
    log-probability of that; `hidden` [B, T, D], `unembedding` [V, D]."""
    unembedding = unembedding.astype(hidden.dtype)
    scored = jnp.take_along_axis(hidden, batch["places"][:, :, None], axis=1)  # [B, P, D]

    def chunk(x):
        logits = jnp.einsum("BCD,VD->BCV", x, unembedding, preferred_element_type=jnp.float32)
        return jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1), logits.max(axis=-1)

    B, P, D = scored.shape
    chunks = scored.reshape(B, P // CHUNK, CHUNK, D).swapaxes(0, 1)
    totals, likeliest, largest = (
        x.swapaxes(0, 1).reshape(B, P) for x in jax.lax.map(chunk, chunks)
    )
    at, targets = batch["at"], batch["targets"]
    own = jnp.take_along_axis(scored, at[:, :, None], axis=1)  # [B, E, D]
    logits = jnp.einsum(
        "BED,BED->BE", own, unembedding[targets], preferred_element_type=jnp.float32
    )
    totals, likeliest, largest = (
        jnp.take_along_axis(x, at, axis=1) for x in (totals, likeliest, largest)
    )
    return logits - totals, likeliest, largest - totals


def collect(rows: Sequence[Row], scored, count: int, continuations: int) -> Iterator[Score]:
    """The score of each continuation; `scored` are results of `score` of `count` rows each."""
    found: list[dict] = [{} for _ in range(continuations)]
    for n, row in enumerate(rows):
        logps, likeliest, largest = (x[n % count] for x in scored[n // count])
        for e, (i, number, _, target) in enumerate(row.entries):
            own, best = float(logps[e]), int(likeliest[e])
            # The same sum in another order: one number for one token.
            most = own if best == target else float(largest[e])
            found[i][number] = own, best, most, best == target
    for tokens in found:
        logps, best, most, is_best = zip(*(tokens[n] for n in range(len(tokens))), strict=True)
        yield Score(
            token_logps=list(logps),
            likeliest=list(best),
            likeliest_logps=list(most),
            is_greedy=all(is_best),
        )
