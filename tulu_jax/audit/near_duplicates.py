"""Texts that are nearly the same: Jaccard similarity of their sets of word 5-grams.

Candidates among many texts come from MinHash signatures in bands (Broder 1997; Leskovec et al.,
Mining of Massive Datasets, §3.4) and are then compared in full. With 25 bands of 5, a pair at
similarity 0.8 is a candidate with probability 1 - (1 - 0.8^5)^25 > 0.9999.
"""

import collections
from collections.abc import Sequence

import numpy as np

from tulu_jax.audit import ngrams

SHINGLE_WORDS = 5
BANDS, BAND_ROWS = 25, 5


def shingles(text: str) -> np.ndarray:
    """The set of hashed word 5-grams, sorted uint64; of a shorter text, all its words as one."""
    hashes = ngrams.word_hashes(ngrams.words(text))
    size = max(1, min(SHINGLE_WORDS, len(hashes)))
    return np.unique(ngrams.rolling(hashes, size)[-1])


def jaccard(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Size of the intersection over that of the union; 1 of two empty sets."""
    union = np.union1d(ours, theirs).size
    return (ours.size + theirs.size - union) / union if union else 1.0


def clusters(sets: Sequence[np.ndarray], *, threshold: float) -> list[list[int]]:
    """Groups of two or more texts, linked by a similarity of `threshold` or more; largest first.

    Within a band's bucket each text is compared with the first only, so that many copies of one
    answer cost no square of their number.
    """
    parent = list(range(len(sets)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    filled = [index for index, found in enumerate(sets) if found.size]
    signatures = _signatures([sets[index] for index in filled])
    for band in range(BANDS):
        first: dict[bytes, int] = {}
        columns = np.ascontiguousarray(signatures[:, band * BAND_ROWS : (band + 1) * BAND_ROWS])
        for index, row in zip(filled, columns, strict=True):
            other = root(first.setdefault(row.tobytes(), index))
            ours = root(index)
            if ours != other and jaccard(sets[index], sets[first[row.tobytes()]]) >= threshold:
                parent[max(ours, other)] = min(ours, other)
    groups = collections.defaultdict(list)
    for index in filled:
        groups[root(index)].append(index)
    return sorted((g for g in groups.values() if len(g) > 1), key=lambda g: (-len(g), g))


def _signatures(sets: Sequence[np.ndarray]) -> np.ndarray:
    """MinHash values, uint64 [sets, BANDS * BAND_ROWS], of random affine maps modulo 2^64."""
    rng = np.random.default_rng(0)
    count = BANDS * BAND_ROWS
    factors = rng.integers(0, 1 << 63, count, np.uint64) * np.uint64(2) + np.uint64(1)
    offsets = rng.integers(0, 1 << 63, count, np.uint64)
    result = np.empty((len(sets), count), np.uint64)
    for index, found in enumerate(sets):
        result[index] = (found[:, None] * factors + offsets).min(axis=0)
    return result
