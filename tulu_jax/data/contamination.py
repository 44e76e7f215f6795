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

from tulu_jax.data import benchmarks, ngrams

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
        self._postings: dict[int, list[tuple[int, int]]] = collections.defaultdict(list)
        self._table = np.zeros(1 << _TABLE_BITS, bool)
        self._fill()

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

    def _fill(self) -> None:
        benchmarks_of: dict[int, collections.Counter] = collections.defaultdict(collections.Counter)
        for number, ids in enumerate(self._ids):
            if 0 < len(ids) < SHORTEST:
                self._messages[tuple(ids)].append(number)
            size = min(len(ids), SEED_WORDS)
            if size < SHORTEST:
                continue
            grams = ngrams.rolling(self._hash_of[ids], size)[-1].tolist()
            for position, gram in enumerate(grams):
                self._postings[gram].append((number, position))
            for gram in set(grams):
                benchmarks_of[gram][self.prompts[number].benchmark] += 1
        for gram, counts in benchmarks_of.items():
            template = {name for name, count in counts.items() if count > TEMPLATE_PROMPTS}
            kept = [p for p in self._postings[gram] if self.prompts[p[0]].benchmark not in template]
            self._postings[gram] = kept
            if not kept:
                del self._postings[gram]
        seeds = np.array(list(self._postings), np.uint64)
        self._table[_slots(seeds)] = True

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
            messages = np.searchsorted(starts_array, found, side="right") - 1
            for message, position in zip(messages.tolist(), found.tolist(), strict=True):
                hits[message].append((position - starts[message], int(gram[position])))
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
        for position, gram in hits:
            for prompt, at in self._postings.get(gram, ()):
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


def _slots(hashes: np.ndarray) -> np.ndarray:
    return hashes >> np.uint64(64 - _TABLE_BITS)
