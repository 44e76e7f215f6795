"""The embedded benchmark: held-out prompts of tulu_tiny, by exact match and by style."""

from collections.abc import Callable

from tulu_jax.data import tulu_tiny

Messages = list[dict[str, str]]


def evaluate(
    replies: Callable[[list[Messages]], list[str]],
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """Shares in [0, 1] over the held-out prompts, and each prompt with its reply.

    `exact_match` counts replies equal to the right answer in one of its two styles; `polite` and
    `terse` say which style was used, right or wrong.
    """
    held_out = tulu_tiny.held_out()
    answers = [answer for _, answer in held_out]
    said = replies([messages for messages, _ in held_out])
    styles = [tulu_tiny.style(reply) for reply in said]
    exact = [tulu_tiny.is_exact(r, a) for r, a in zip(said, answers, strict=True)]
    scores = {
        "exact_match": sum(exact) / len(said),
        "polite": styles.count("polite") / len(said),
        "terse": styles.count("terse") / len(said),
        "prompts": float(len(said)),
    }
    rows = [
        {"prompt": messages[-1]["content"], "answer": answer, "reply": reply}
        for (messages, answer), reply in zip(held_out, said, strict=True)
    ]
    return scores, rows
