"""What becomes of an example that is longer than a row: a recorded choice, counted by outcome.

| rule | conversations | pairs |
|---|---|---|
| `cut` | cut on the right, as the original did | both answers are cut to one limit |
| `whole_turns` | end with the last assistant turn that fits whole | left out |
| `split` | split between exchanges, into several examples | refused |
| `drop` | left out | left out |

Under every rule, what has no trained token is left out, and so is what has its first after the
limit (its prompt fills the row), and a pair whose answers are the same after the cut, or whose
prompts are not the same ids (`chat.tokenize_pairs`).
"""

from collections.abc import Sequence

import numpy as np

from tulu_jax.data.chat import TokenIds, same_prompt

RULES = ("cut", "whole_turns", "split", "drop")
# Up to CUT, the example is kept.
WHOLE, CUT, TOO_LONG, UNTRAINED, NO_TURN, SAME, PROMPTS, FILLED = range(8)
REASONS = {
    TOO_LONG: "longer than max_length",
    UNTRAINED: "no trained token",
    NO_TURN: "no whole turn fits",
    SAME: "difference cut away",
    PROMPTS: "prompts differ",
    FILLED: "prompt fills the row",
}


def fit(
    parts: Sequence[TokenIds], *, max_length: int, rule: str, one_row: bool
) -> tuple[int, list[TokenIds]]:
    """(outcome, sides) of the one side of a conversation or the two of a pair; `[]` if left out.

    A side fits with up to `max_length` tokens after the shift. With `one_row`, the sides of a pair
    must fit in one row that stores their prompt once.
    """
    if len(parts) > 1 and not same_prompt(*parts):
        return PROMPTS, []
    if not all(map(trained, parts)):
        return UNTRAINED, []
    limits = _limits(parts, max_length, one_row)
    lengths = [len(part.ids) - 1 for part in parts]
    if all(length <= limit for length, limit in zip(lengths, limits, strict=True)):
        return WHOLE, list(parts)
    if rule == "drop" or (rule == "whole_turns" and len(parts) > 1):
        return TOO_LONG, []
    cut = [_cut(part, limit) for part, limit in zip(parts, limits, strict=True)]
    if not all(map(trained, cut)):
        return FILLED, []
    if rule == "whole_turns":
        stops = parts[0].spans[:, 1]
        cut = [_cut(parts[0], int(stops[stops <= limits[0]].max(initial=0)))]
        if not trained(cut[0]):
            return NO_TURN, []
    if len(cut) > 1 and np.array_equal(cut[0].ids, cut[1].ids):
        return SAME, []
    return CUT, cut


def trained(part: TokenIds) -> int:
    """The number of trained targets."""
    return int((part.spans[:, 1] - part.spans[:, 0]).sum())


def exchanges(messages: list[dict]) -> list[list[dict]]:
    """A conversation split before each user turn; what precedes the first goes with it."""
    groups: list[list[dict]] = []
    for message in messages:
        starts = message["role"] == "user" and groups and groups[-1][-1]["role"] == "assistant"
        if starts or not groups:
            groups.append([])
        groups[-1].append(message)
    return groups


def _limits(parts: Sequence[TokenIds], max_length: int, one_row: bool) -> list[int]:
    """The most tokens that each side may have."""
    if len(parts) == 1 or not one_row:
        return [max_length] * len(parts)
    shared = int(parts[0].spans[0, 0])
    answers = [len(part.ids) - 1 - shared for part in parts]
    room = max(max_length - shared, 0)
    limit = max(room // 2, room - min(answers))  # the largest that lets both fit
    return [shared + limit] * 2


def _cut(part: TokenIds, limit: int) -> TokenIds:
    spans = np.minimum(part.spans[part.spans[:, 0] < limit], limit)
    return TokenIds(ids=part.ids[: limit + 1], spans=spans)
