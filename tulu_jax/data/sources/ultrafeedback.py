"""UltraFeedback from its raw records: several completions of a prompt, scored, made into a pair.

Facts: the binarization scripts of HuggingFaceH4/ultrafeedback_binarized (October 2023 and January
2024) and the score repair of github.com/OpenBMB/UltraFeedback (December 2023).
"""

import dataclasses
import random
import re
import statistics

from tulu_jax.data.registry import Dropped
from tulu_jax.data.sources import messages

SEED = 42
BEST_OVERALL = 10
WORST_OVERALL = 1
SCORES = ("overall", "aspects")
TENS = ("keep", "repair")


@dataclasses.dataclass(frozen=True)
class Completion:
    """Equal but for the slot means the same completion, as in the original script."""

    score: float
    response: str
    model: str
    slot: int = dataclasses.field(compare=False)


def binarize(row: dict, *, rejected: str, score: str, tens: str) -> dict | Dropped:
    """The best completion of a raw record against another; equal scores are dropped.

    `chosen` is the first of the completions with the highest score. `rejected` names the other:

    - "first": the draw of the first public binarization, whose generator started anew at every
      record. Of four completions it gives slot 0, or slot 2 where slot 0 is chosen.
    - "random": one of the others, drawn with a seed made of the prompt, so that a record's pair
      depends on no other record. (The second public binarization drew on from record to record.)
    - "lowest": the first of those with the lowest score.

    `score` is "overall" (GPT-4's overall score of 1 to 10) or "aspects" (the mean of the ratings
    of 1 to 5 that are not "N/A"). `tens` says what is done about overall scores of 10 that were
    meant as 1, in records from before their repair: "keep" takes every score as it stands; "repair"
    follows the rule of the repair for a completion scored 10. A mean of aspects up to 2 makes it 1;
    one up to 4 leaves the completion out (upstream asked GPT-4 again); above 4, or with no mean,
    the 10 stands.

    A completion without a score is left out. Records with fewer than two are dropped, where the
    public binarizations have the placeholder "N/A" on both sides.
    """
    _one_of("rejected", rejected, REJECTED)
    _one_of("score", score, SCORES)
    _one_of("tens", tens, TENS)
    (prompt,) = messages.texts(row, "instruction")
    completions = _scored(messages.mappings(row, "completions"), score=score, tens=tens)
    if len(completions) < 2:
        return Dropped("fewer than two scored completions")
    best = max(completions, key=lambda completion: completion.score)
    if all(completion == best for completion in completions):
        return Dropped("completions all the same")
    other = REJECTED[rejected](completions, best, prompt)
    example = messages.pair(
        [messages.message("user", prompt)],
        best.response,
        other.response,
        **messages.noted(row, "source"),
        model_chosen=best.model,
        model_rejected=other.model,
        slot_chosen=best.slot,
        slot_rejected=other.slot,
    )
    return messages.scored(example, chosen=best.score, rejected=other.score, ties="drop")


def not_truthfulqa(example: dict) -> bool:
    """Whether a record comes from another source than TruthfulQA, which TÜLU is evaluated on."""
    return example["about"].get("source") != "truthful_qa"


def _first(completions: list[Completion], best: Completion, prompt: str) -> Completion:
    generator = random.Random(SEED)
    drawn = generator.choice(completions)
    while drawn == best:
        drawn = generator.choice(completions)
    return drawn


def _random(completions: list[Completion], best: Completion, prompt: str) -> Completion:
    generator = random.Random(f"{SEED}/{prompt}".encode())
    return generator.choice([completion for completion in completions if completion != best])


def _lowest(completions: list[Completion], best: Completion, prompt: str) -> Completion:
    others = [completion for completion in completions if completion != best]
    return min(others, key=lambda completion: completion.score)


REJECTED = {"first": _first, "random": _random, "lowest": _lowest}


def _scored(raw: list[dict], *, score: str, tens: str) -> list[Completion]:
    """The completions that have a score; `slot` is their place among all."""
    completions = []
    for slot, completion in enumerate(raw):
        response, model = messages.texts(completion, "response", "model")
        aspects = score == "aspects"
        value = _mean_rating(completion) if aspects else _overall_score(completion, tens)
        if value is not None:
            completions.append(Completion(value, response, model, slot))
    return completions


def _overall_score(raw: dict, tens: str) -> float | None:
    value = messages.number(raw, "overall_score")
    # The repaired records carry the mean of their aspects under this name.
    if tens == "keep" or value != BEST_OVERALL or "fine-grained_score" in raw:
        return value
    mean = _mean_rating(raw)
    if mean is None or mean > 4:
        return value
    return float(WORST_OVERALL) if mean <= 2 else None


def _mean_rating(raw: dict) -> float | None:
    """The mean over the aspects that have a rating; None if none has."""
    aspects = messages.mapping(raw, "annotations")
    rated = [name for name, given in aspects.items() if given is not None]
    given = [messages.mapping(aspects, name).get("Rating") for name in rated]
    ratings = [_rating(rating) for rating in given if rating not in (None, "N/A")]
    return statistics.fmean(ratings) if ratings else None


def _rating(value) -> int:
    if not isinstance(value, str) or not re.fullmatch("[1-5]", value):
        raise ValueError(f"found the rating {value!r:.40}; expected '1' to '5' or 'N/A'")
    return int(value)


def _one_of(name: str, value: str, known) -> None:
    if value not in known:
        raise ValueError(f"{name} = {value!r}; expected one of {tuple(known)}")
