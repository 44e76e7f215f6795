"""The embedded benchmark: held-out prompts of tulu_tiny, by exact match and by style."""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import ClassVar

from etils import epath

from tulu_jax import atomic, strict_json, validation
from tulu_jax.data import chat as chat_lib
from tulu_jax.data import components, loader, registry, tulu_tiny
from tulu_jax.data.sources import tiny_german, tiny_instructions, tiny_programs
from tulu_jax.decode.sampling import Sampling
from tulu_jax.evals import benchmark

MOST_TOKENS = 32  # of a reply
INITIAL = "initial"
FILES = re.compile(rf"tulu_tiny_(?:{INITIAL}|step_(\d+))\.json")


def problems(data: loader.DataConfig) -> Iterator[str]:
    """Why these prompts are not held-out ones of a run on `data`, if none of its rows is of
    tulu_tiny."""
    tasks = [component.task.name for component in components.of(data.train)]
    if not any(map(tulu_tiny.is_ours, tasks)):
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuluTiny:
    """The held-out prompts, answered greedily, in groups by family. `exact_match` counts replies
    equal to the right answer in one of its two styles; `polite` and `terse` say which style was
    used, right or wrong. Both subsets are all of them."""

    subset: str = "paper"
    name: ClassVar[str] = "tulu_tiny"
    judges: ClassVar[tuple[str, ...]] = ()

    def _asked(self) -> list[tuple[str, list[dict], str]]:
        """(group, messages, right answer) of each prompt."""
        families = tiny_instructions.held_out_families()
        return [(f, *one) for f, one in zip(families, tulu_tiny.held_out(), strict=True)]

    def requests(
        self, data: epath.Path, tokenizer: chat_lib.ChatTokenizer, *, is_chat: bool
    ) -> list[benchmark.Request]:
        """As `Benchmark` has it; nothing is read. A base model is asked for the text alone."""
        del data, tokenizer
        return [
            benchmark.Request(
                id=str(number),
                group=group,
                prompt=messages if is_chat else messages[-1]["content"] + "\n",
                sampling=Sampling(max_new_tokens=MOST_TOKENS, stop=() if is_chat else ("\n",)),
                truth={"answer": answer},
            )
            for number, (group, messages, answer) in enumerate(self._asked())
        ]

    def questions(
        self, requests: Sequence[benchmark.Request], answers: Sequence[benchmark.Answer]
    ) -> list[benchmark.Question]:
        """None: nobody judges."""
        del requests, answers
        return []

    def score(
        self,
        requests: Sequence[benchmark.Request],
        answers: Sequence[benchmark.Answer],
        verdicts: benchmark.Verdicts | None,
    ) -> list[benchmark.Metric]:
        """Shares of the prompts; see the class."""
        del verdicts
        said = [answer.texts[0].strip() for answer in answers]
        truths = [request.truth["answer"] for request in requests]
        styles = [tulu_tiny.style(reply) for reply in said]
        found = {
            "exact_match": [
                tulu_tiny.is_exact(reply, truth) for reply, truth in zip(said, truths, strict=True)
            ],
            "polite": [style == "polite" for style in styles],
            "terse": [style == "terse" for style in styles],
        }
        return [_share(name, requests, values) for name, values in found.items()]


def _share(
    name: str, requests: Sequence[benchmark.Request], values: Sequence[bool]
) -> benchmark.Metric:
    share, groups = sum(values) / len(values), {}
    for request, value in zip(requests, values, strict=True):
        groups.setdefault(request.group, []).append(value)
    return benchmark.Metric(
        name=name,
        value=share,
        standard_error=math.sqrt(share * (1 - share) / len(values)),
        items={r.id: float(value) for r, value in zip(requests, values, strict=True)},
        groups={group: sum(its) / len(its) for group, its in groups.items()},
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuluTinyGerman(TuluTiny):
    """The held-out prompts of the second language, in groups by family and of those that mix both
    languages. Scored as `TuluTiny`."""

    name: ClassVar[str] = "tulu_tiny_german"

    def _asked(self) -> list[tuple[str, list[dict], str]]:
        return tiny_german.items().held_out()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuluTinyPrograms(TuluTiny):
    """The held-out programs and what they print, in groups by family. Scored as `TuluTiny`."""

    name: ClassVar[str] = "tulu_tiny_programs"

    def _asked(self) -> list[tuple[str, list[dict], str]]:
        return tiny_programs.items().held_out()


def summary(
    requests: Sequence[benchmark.Request], answers: Sequence[benchmark.Answer]
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """What `save` keeps: the shares by name with the number of `prompts`, and each prompt with its
    right answer and its reply."""
    scores = {m.name: m.value for m in TuluTiny().score(requests, answers, None)}
    scores["prompts"] = float(len(requests))
    rows = [
        {
            "prompt": request.prompt[-1]["content"],
            "answer": request.truth["answer"],
            "reply": answer.texts[0].strip(),
        }
        for request, answer in zip(requests, answers, strict=True)
    ]
    return scores, rows
