"""The embedded benchmark: held-out prompts of tulu_tiny, by exact match and by style."""

import re
from collections.abc import Callable, Iterator

from etils import epath

from tulu_jax import atomic, strict_json, validation
from tulu_jax.data import components, loader, registry, tulu_tiny

Messages = list[dict[str, str]]
INITIAL = "initial"
FILES = re.compile(rf"tulu_tiny_(?:{INITIAL}|step_(\d+))\.json")


def problems(data: loader.DataConfig) -> Iterator[str]:
    """Why these prompts are not held-out ones of a run on `data`, if none of its rows is of
    tulu_tiny."""
    tasks = [component.task.name for component in components.of(data.train)]
    if not set(tasks) & set(tulu_tiny.OF_KIND.values()):
        yield (
            f"evaluate scores the held-out prompts of tulu_tiny; this run trains on "
            f"{registry.name_of(data.train)!r} ({', '.join(tasks)}), to which they do not belong; "
            f"expected a run on {' or '.join(tulu_tiny.OF_KIND.values())}. What this run says of "
            "its own held-out rows is in its metrics.jsonl (eval/*), with holdout_every or a "
            "validation set"
        )


def save(workdir: str, step: int | None, scores: dict, replies: list[dict]) -> None:
    """Writes the scores of `step` (None: of what training starts from) into a file of their own."""
    name = INITIAL if step is None else f"step_{step}"
    folder = epath.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"step": step, "scores": scores, "replies": replies}
    file = folder / f"tulu_tiny_{name}.json"
    atomic.write_text(file, strict_json.dumps(content, indent=1))


def saved(workdir: str) -> list[dict]:
    """What `save` left in a workdir, the initial scores first and then by step. Raises `UsageError`
    for a file that is not whole."""
    found = []
    for file in epath.Path(workdir).iterdir():
        if FILES.fullmatch(file.name):
            try:
                found.append(strict_json.loads(file.read_text()))
            except ValueError as error:
                raise validation.UsageError(
                    f"{file} is not JSON ({error}); evaluate that step again"
                ) from error
    return sorted(found, key=lambda scores: -1 if scores["step"] is None else scores["step"])


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
