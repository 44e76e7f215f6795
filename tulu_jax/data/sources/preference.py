"""Converters of preference sources: a raw row to `{"prompt", "chosen", "rejected"}` or `Dropped`.

An empty side and two identical sides are dropped for every preference task (`examples.py`).
"""

from tulu_jax.data.registry import Dropped
from tulu_jax.data.sources import columns


def ultrafeedback_binarized(row: dict) -> dict | Dropped:
    """`prompt`, `chosen`, `rejected` texts and `metadata` scores; equal scores prefer neither.

    Raises `ValueError` if the rejected side scores higher than the chosen one.
    """
    prompt, chosen, rejected = columns.text(row, "prompt", "chosen", "rejected")
    scores = row.get("metadata", {})
    if not {"score_chosen", "score_rejected"} <= scores.keys():
        raise ValueError(
            f"metadata has {sorted(scores)}; expected 'score_chosen' and 'score_rejected'"
        )
    if scores["score_chosen"] == scores["score_rejected"]:
        return Dropped("equal scores")
    if scores["score_chosen"] < scores["score_rejected"]:
        raise ValueError(
            f"chosen scores {scores['score_chosen']}, rejected {scores['score_rejected']}; "
            "expected the chosen side to score higher"
        )
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
