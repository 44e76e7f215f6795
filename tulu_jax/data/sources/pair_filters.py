"""Pairs that an audit of preferences would leave in: what a label may have been, besides quality.

Each is a rule for one pair as a converter gives it, and holds for those that are kept.
"""

AS_LONG = 1.25  # times the shorter answer, at most
ALIKE = 0.8  # Jaccard similarity of two sets of words, from which answers are nearly the same


def of_equal_length(example: dict) -> bool:
    """Whether no answer has over `AS_LONG` times the characters of the other: length then tells
    little of the label."""
    shorter, longer = sorted(len(text) for text in _answers(example))
    return longer <= AS_LONG * shorter


def scored_as_labelled(example: dict) -> bool:
    """Whether the chosen answer has the higher score of the two, where the converter records them;
    a tie is none."""
    about = example.get("about", {})
    chosen, rejected = about.get("score_chosen"), about.get("score_rejected")
    return chosen is None or rejected is None or chosen > rejected


def of_different_answers(example: dict) -> bool:
    """Whether the words of the two answers are less alike than `ALIKE`."""
    chosen, rejected = (set(text.lower().split()) for text in _answers(example))
    return len(chosen & rejected) < ALIKE * len(chosen | rejected)


def _answers(example: dict) -> list[str]:
    return [example[side][-1]["content"].strip() for side in ("chosen", "rejected")]
