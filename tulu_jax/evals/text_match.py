"""Rules by which a benchmark finds the answer in a text, and compares it with the right one."""

import collections
import re
import string
from collections.abc import Sequence

_COMMA_IN_NUMBER = re.compile(r"(\d),(\d)")
_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")  # a whole number has no sign
_ANSWER_IS = re.compile(r"[t|T]he answer is (.*?)\.")
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def without_commas(text: str) -> str:
    """`text` with "1,234" as "1234". Of "1,2,3" one comma stays: pairs of digits do not overlap."""
    return _COMMA_IN_NUMBER.sub(r"\1\2", text)


def last_number(text: str) -> str:
    """The last number of `text`, its commas removed; the text without commas if it has none."""
    text = without_commas(text)
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else text


def after_answer_is(text: str) -> str:
    """What stands between the first "the answer is " and the next period of that line, else all of
    the text, stripped."""
    found = _ANSWER_IS.search(text)
    return found[1].strip() if found else text.strip()


def is_match(prediction: str, target: str, *, punctuation_ignored: bool) -> bool:
    """Whether both are equal but for case, and with `punctuation_ignored` for ASCII punctuation:
    then -5 is 5, 1.8 is 18, and "] )" is "> }"."""
    sides = [text.lower() for text in (prediction, target)]
    if punctuation_ignored:
        sides = [text.translate(_NO_PUNCTUATION) for text in sides]
    return sides[0] == sides[1]


def is_same_number(prediction: str, target: str) -> bool:
    """Whether both are numbers and equal as such: "18.00" and "18", not "-5" and "5"."""
    try:
        return float(prediction) == float(target)
    except ValueError:
        return False


def normalized(text: str) -> str:
    """SQuAD's form of an answer: lower case, without ASCII punctuation and English articles, single
    spaces (Rajpurkar et al. 2016)."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def squad_exact(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of `answers` in SQuAD's form, else 0."""
    return float(any(normalized(prediction) == normalized(answer) for answer in answers))


def squad_f1(prediction: str, answers: Sequence[str]) -> float:
    """SQuAD's F1 in [0, 1]: of the words that both have, against the answer for which it is most.

    0 if no word is shared, also where both are empty in SQuAD's form.
    """
    return max(_f1(normalized(prediction).split(), normalized(a).split()) for a in answers)


def _f1(predicted: list[str], right: list[str]) -> float:
    shared = (collections.Counter(predicted) & collections.Counter(right)).total()
    if shared == 0:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(right)
    return 2 * precision * recall / (precision + recall)
