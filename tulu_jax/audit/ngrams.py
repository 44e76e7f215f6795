"""Words of a text, and hashes of their n-grams, for overlap of texts at the speed of numpy."""

import re
import zlib
from collections.abc import Iterable

import numpy as np

# Thai, kana and Chinese are written without spaces: there, each character is a word.
_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, thus the polynomial in it loses no bit


def words(text: str) -> list[str]:
    """The words of a text: letter case, punctuation and white space do not count.

    >>> words("Don't panic, 42!")
    ['don', 't', 'panic', '42']
    """
    return _WORD.findall(text.lower())


def word_hashes(found: Iterable[str]) -> np.ndarray:
    """A hash of each word, uint64 [words], the same in every process."""
    codes = [zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in found]
    return mixed(np.array(codes, np.uint64))


def mixed(values: np.ndarray) -> np.ndarray:
    """uint64 values spread over all 64 bits (the finalizer of SplitMix64)."""
    values = values + _FACTOR
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def rolling(hashes: np.ndarray, longest: int) -> list[np.ndarray]:
    """Hashes of the n-grams for n = 1 to `longest`; entry n - 1 is uint64 [max(words - n + 1, 0)].

    The n-gram at i hashes to the polynomial of its word hashes in one factor: h_n[i] =
    h_{n-1}[i] * factor + h[i + n - 1].
    """
    grams = [hashes]
    for n in range(2, longest + 1):
        last = hashes[n - 1 :]
        grams.append(grams[-1][: len(last)] * _FACTOR + last)
    return grams
