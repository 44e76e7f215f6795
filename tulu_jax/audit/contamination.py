"""Benchmark prompts in training rows: word n-grams in common, as GPT-3 measured it.

Brown et al. 2020, appendix C: an example counts as seen if it shares one n-gram of words with the
training text, where n is the 5th percentile of the lengths of its benchmark's examples, at least 8
and at most 13. Here, messages of training rows are searched, and

- a prompt of fewer than n words counts if it is there whole; one of fewer than `SHORTEST` words
  only if it is a whole message;
- 8-grams that stand in more than `TEMPLATE_PROMPTS` prompts of one benchmark are its template and
  begin no match.

All 8-grams of the prompts lie in one table of hashes. A training word costs a look-up of its
number and a few numpy operations; where a hash is in the table, words are compared and the match
is extended both ways, so no collision of hashes is ever reported.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tulu_jax.audit import benchmarks, ngrams

SEED_WORDS, LONGEST_N = 8, 13
SHORTEST = 5
TEMPLATE_PROMPTS = 10
WORDS_AT_ONCE = 1 << 16
GRADES = ("whole", "most", "part")
_UNKNOWN = 0  # the number of every word that is in no prompt
_TABLE_BITS = 25


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """A benchmark prompt in a training row: `words` of its `of` words lie in n-grams in common.

    `place` is the message: its key and index in the example. `text` is the longest stretch in
    common, as words. `whole` tells whether that is all of the prompt.
    """

    row: str
    place: str
    prompt: int
    words: int
    of: int
    whole: bool
    text: str


class Index:
    """The n-grams of benchmark prompts. `n` maps each benchmark to the n that its prompts need."""

    def __init__(self, prompts: Sequence[benchmarks.Prompt]):
        self.prompts = prompts
        texts = [ngrams.words(prompt.text) for prompt in prompts]
        self.n = _lengths_needed(prompts, texts)
        vocabulary = {w: i for i, w in enumerate(dict.fromkeys(itertools.chain(*texts)), 1)}
        self._words = list(vocabulary)
        self._number = vocabulary.get
        self._hash_of = ngrams.mixed(np.arange(len(vocabulary) + 1, dtype=np.uint64))
        self._ids = [[vocabulary[word] for word in text] for text in texts]
        self._messages: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)
        for number, ids in enumerate(self._ids):
            if 0 < len(ids) < SHORTEST:
                self._messages[tuple(ids)].append(number)
        # Seed s is the hash of an n-gram; prompts _owners[_starts[s]:_starts[s + 1]] have it, from
        # their words _places[...] on. The table tells quickly that a hash is none.
        grams, owners, places = self._grams()
        self._seeds, starts = np.unique(grams, return_index=True)
        self._starts = [*starts.tolist(), len(grams)]
        self._owners, self._places = owners.tolist(), places.tolist()
        self._table = np.zeros(1 << _TABLE_BITS, bool)
        self._table[_slots(self._seeds)] = True

    def matches(self, rows: Iterable[tuple[str, dict]]) -> Iterator[Match]:
        """Every prompt in every (id, example), each at most once a message."""
        held, waiting = 0, []
        for row, example in rows:
            for place, content in _messages(example):
                found = ngrams.words(content)
                numbers = list(map(self._number, found, itertools.repeat(_UNKNOWN)))
                waiting.append((row, place, numbers))
                held += len(numbers)
            if held >= WORDS_AT_ONCE:
                yield from self._search(waiting)
                held, waiting = 0, []
        yield from self._search(waiting)

    def _grams(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(hash, prompt, first word) of every 8-gram, of a shorter prompt of the whole, but for
        templates; sorted by hash."""
        columns = [(np.zeros(0, np.uint64), np.zeros((0, 2), np.int64))]
        for number, ids in enumerate(self._ids):
            if len(ids) >= SHORTEST:
                size = min(len(ids), SEED_WORDS)
                grams = ngrams.rolling(self._hash_of[ids], size)[-1]
                where = np.stack([np.full(len(grams), number), np.arange(len(grams))], axis=1)
                columns.append((grams, where))
        grams, where = (np.concatenate(column) for column in zip(*columns, strict=True))
        owners, places = where.T
        names = [prompt.benchmark for prompt in self.prompts]
        benchmark_of = np.unique(names, return_inverse=True)[1][owners]
        order = np.lexsort((places, owners, benchmark_of, grams))
        grams, owners, places = grams[order], owners[order], places[order]
        begins = _changes(grams) | _changes(benchmark_of[order])  # an n-gram within a benchmark
        groups = np.cumsum(begins) - 1
        prompts_with = np.bincount(groups, weights=begins | _changes(owners))
        kept = (prompts_with <= TEMPLATE_PROMPTS)[groups]
        return grams[kept], owners[kept], places[kept]

    def _search(self, waiting: list[tuple[str, str, list[int]]]) -> Iterator[Match]:
        """Matches in some messages, which lie in one array with an unknown word between them."""
        joined, starts = [], [0]
        for _, _, numbers in waiting:
            joined += numbers
            joined.append(_UNKNOWN)
            starts.append(len(joined))
        grams = ngrams.rolling(self._hash_of[np.array(joined, np.int64)], SEED_WORDS)
        hits = collections.defaultdict(list)
        starts_array = np.array(starts)
        for gram in grams[SHORTEST - 1 :]:
            found = np.flatnonzero(self._table[_slots(gram)])
            seeds = np.searchsorted(self._seeds, gram[found])
            exact = self._seeds[np.minimum(seeds, len(self._seeds) - 1)] == gram[found]
            found, seeds = found[exact], seeds[exact]
            messages = np.searchsorted(starts_array, found, side="right") - 1
            positions = (found - starts_array[messages]).tolist()
            for message, hit in zip(
                messages.tolist(), zip(positions, seeds.tolist(), strict=True), strict=True
            ):
                hits[message].append(hit)
        for message, (row, place, numbers) in enumerate(waiting):
            if len(numbers) < SHORTEST and tuple(numbers) in self._messages:
                runs = {p: [(0, len(numbers))] for p in self._messages[tuple(numbers)]}
            elif message in hits:
                runs = self._runs(numbers, hits[message])
            else:
                continue
            for prompt, found in sorted(runs.items()):
                yield self._match(row, place, prompt, found)

    def _runs(self, numbers: list[int], hits) -> dict[int, list[tuple[int, int]]]:
        """By prompt, the stretches [start, stop) of it that are long enough and in the message."""
        runs, seen = collections.defaultdict(set), {}
        for position, seed in hits:
            for posting in range(self._starts[seed], self._starts[seed + 1]):
                prompt, at = self._owners[posting], self._places[posting]
                ids, diagonal = self._ids[prompt], (prompt, position - at)
                if seen.get(diagonal, -1) > position:
                    continue
                start, stop = _extended(ids, numbers, at, position)
                seen[diagonal] = position + stop - at
                if stop - start >= min(self.n[self.prompts[prompt].benchmark], len(ids)):
                    runs[prompt].add((start, stop))
        return {prompt: sorted(found) for prompt, found in runs.items()}

    def _match(self, row: str, place: str, prompt: int, runs: list[tuple[int, int]]) -> Match:
        ids = self._ids[prompt]
        start, stop = max(runs, key=lambda run: run[1] - run[0])
        return Match(
            row=row,
            place=place,
            prompt=prompt,
            words=len(set().union(*(range(*run) for run in runs))),
            of=len(ids),
            whole=stop - start == len(ids),
            text=" ".join(self._words[i - 1] for i in ids[start:stop]),
        )


def summary(index: Index, found: Sequence[Match]) -> list[dict]:
    """For each benchmark: its prompts and n, and how many are in the rows, by how much of them.

    A prompt, and a row, counts once, by its best match: `whole`, `most` (half of the words or
    more) or `part`.
    """
    total = collections.Counter(prompt.benchmark for prompt in index.prompts)
    best_prompts, best_rows = (collections.defaultdict(dict) for _ in range(2))
    for match in found:
        benchmark, grade = index.prompts[match.prompt].benchmark, grade_of(match)
        for best, key in ((best_prompts, match.prompt), (best_rows, match.row)):
            best[benchmark][key] = min(grade, best[benchmark].get(key, grade), key=GRADES.index)
    return [
        {
            "benchmark": name,
            "prompts": total[name],
            "n": index.n[name],
            "prompts_found": _by_grade(best_prompts[name]),
            "rows": _by_grade(best_rows[name]),
        }
        for name in index.n
    ]


def grade_of(match: Match) -> str:
    if match.whole:
        return "whole"
    return "most" if 2 * match.words >= match.of else "part"


def listed(index: Index, found: Sequence[Match]) -> list[dict]:
    """The matches as plain rows, the fullest first, each with the prompt it is of."""
    order = sorted(found, key=lambda m: (GRADES.index(grade_of(m)), -m.words / m.of, m.row))
    return [
        {
            "row": match.row,
            "place": match.place,
            "benchmark": index.prompts[match.prompt].benchmark,
            "item": index.prompts[match.prompt].item,
            "grade": grade_of(match),
            "words": match.words,
            "of": match.of,
            "text": match.text,
            "prompt": index.prompts[match.prompt].text,
        }
        for match in order
    ]


def _by_grade(best: dict) -> dict[str, int]:
    counts = collections.Counter(best.values())
    return {grade: counts[grade] for grade in GRADES}


def _extended(ids: list[int], numbers: list[int], at: int, position: int) -> tuple[int, int]:
    """The longest stretch of `ids` around `at` that equals `numbers` around `position`."""
    start, stop, shift = at, at, position - at
    while stop < len(ids) and stop + shift < len(numbers) and ids[stop] == numbers[stop + shift]:
        stop += 1
    while start > 0 and start + shift > 0 and ids[start - 1] == numbers[start - 1 + shift]:
        start -= 1
    return start, stop


def _lengths_needed(prompts, texts) -> dict[str, int]:
    lengths = collections.defaultdict(list)
    for prompt, text in zip(prompts, texts, strict=True):
        lengths[prompt.benchmark].append(len(text))
    return {
        name: int(np.clip(np.percentile(found, 5), SEED_WORDS, LONGEST_N))
        for name, found in lengths.items()
    }


def _messages(example: dict) -> Iterator[tuple[str, str]]:
    for key in ("messages", "prompt", "chosen", "rejected"):
        for index, message in enumerate(example.get(key, ())):
            yield f"{key} {index} ({message['role']})", message["content"]


def _changes(values: np.ndarray) -> np.ndarray:
    """Where a value differs from the one before; the first does."""
    return np.append(True, values[1:] != values[:-1])[: len(values)]


def _slots(hashes: np.ndarray) -> np.ndarray:
    return hashes >> np.uint64(64 - _TABLE_BITS)
