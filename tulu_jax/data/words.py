"""Llama's ids of many texts, with each distinct word encoded once by the library.

No piece of a Llama vocabulary has a space behind another character, and none has a newline, so no
merge crosses from a character to a space, or over a newline: the ids of a text are those of its
words. Most words of a corpus repeat, so most of the work of encoding it is looking them up.
"""

import itertools
import json
import re
from collections.abc import Sequence

import numpy as np

SPACE, NEWLINE = "▁", "<0x0A>"
WORD_BORDER = re.compile(f"(?<=[^ {SPACE}]) (?!\\Z)")  # the word behind it gets the space back
LONGEST_KEPT, MOST_KEPT = 64, 1 << 20  # characters of a word, words
NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}
BEHIND_A_CHARACTER = re.compile(f"[^{SPACE}]{SPACE}|\n")


def allows(backend) -> bool:
    """Whether the ids of a text are those of its words with this `tokenizers.Tokenizer`."""
    settings = json.loads(backend.to_str())
    model, vocab = settings["model"], backend.get_vocab()
    plain = (
        settings["normalizer"] == NORMALIZER
        and settings["pre_tokenizer"] is None
        and model["type"] == "BPE"
        and model["byte_fallback"]
        and not model["dropout"]
        and not model.get("ignore_merges")
    )
    added = backend.get_added_tokens_decoder().values()
    return (
        plain
        and {SPACE, *(f"<0x{byte:02X}>" for byte in range(256))} <= vocab.keys()
        and not any(t.normalized or t.lstrip or t.rstrip or t.single_word for t in added)
        and not any(NEWLINE in piece and piece != NEWLINE for piece in vocab)
        and not any(
            BEHIND_A_CHARACTER.search(piece)
            for piece in vocab.keys() - {token.content for token in added}
        )
    )


class Words:
    """An encoder with the ids of `backend`, which `allows` it. Threads may share it."""

    def __init__(self, backend):
        self._backend = backend
        special = [token.content for token in backend.get_added_tokens_decoder().values()]
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._known: dict[str, bytes] = {}

    def encode(
        self, texts: Sequence[str], cuts: Sequence[Sequence[int]]
    ) -> list[tuple[np.ndarray, list[int]]]:
        """For each text its ids, int32 [n], and for each of its ascending `cuts`, which are
        character positions, the number of ids before it.

        A cut lies at either end of the text, beside a special token, or behind a newline and before
        no space; raises `ValueError` for another, where a token could lie on both sides.
        """
        split = [self._split(text, at) for text, at in zip(texts, cuts, strict=True)]
        distinct = {word for words, _ in split for word in words}
        distinct |= {begun for _, places in split for _, begun in places if begun}
        ids_of = self._look_up(distinct)
        results = []
        for words, places in split:
            parts = [ids_of[word] for word in words]
            ends = list(itertools.accumulate(map(len, parts), initial=0))
            at = [
                (ends[whole] + (len(ids_of[begun]) if begun else 0)) // 4 for whole, begun in places
            ]
            results.append((np.frombuffer(b"".join(parts), np.int32), at))
        return results

    def _split(self, text: str, cuts: Sequence[int]) -> tuple[list[str], list[tuple[int, str]]]:
        """The words of a text, and each cut as (whole words before it, part of a word before it).

        A special token is a word by itself.
        """
        words, places, start, number = [], [], 0, 0
        for index, part in enumerate(self._special.split(text)):
            stop, begun, first = start + len(part), "", start
            if index % 2:  # a special token
                words.append(part)
                start = stop
                continue
            while number < len(cuts) and cuts[number] <= stop:
                cut = cuts[number]
                if start < cut < stop:
                    if text[cut - 1] != "\n" or text[cut] == " ":
                        raise ValueError(f"character {cut} of {text!r} may lie inside a token")
                    found = WORD_BORDER.split(text[first:cut])
                    found[0] = begun + found[0]
                    begun, first = found.pop(), cut
                    words += found
                    places.append((len(words), begun))
                elif cut == start:
                    places.append((len(words), ""))
                else:  # at the end of this stretch, which is not in `words` yet
                    break
                number += 1
            if first < stop:
                found = WORD_BORDER.split(text[first:stop])
                found[0] = begun + found[0]
                words += found
            while number < len(cuts) and cuts[number] == stop:
                places.append((len(words), ""))
                number += 1
            start = stop
        if number < len(cuts):
            raise ValueError(f"character {cuts[number]} of {text!r} lies inside a token")
        return words, places

    def _look_up(self, distinct: set[str]) -> dict[str, bytes]:
        """The ids of each word, int32 as bytes; words that are not long are kept for next time."""
        if len(self._known) > MOST_KEPT:
            self._known = {}
        known = self._known
        new = [word for word in distinct if word not in known]
        encoded = self._backend.encode_batch_fast(new, add_special_tokens=False)
        found = {w: np.array(e.ids, np.int32).tobytes() for w, e in zip(new, encoded, strict=True)}
        result = {word: known[word] for word in distinct if word not in found} | found
        known.update({word: ids for word, ids in found.items() if len(word) <= LONGEST_KEPT})
        return result
