"""AlpacaEval 1.0 (Li et al. 2023): a judge prefers an answer to that of text-davinci-003, or not.

Source: TÜLU 2 (arXiv 2311.10702), its evaluation code of November 2023, and alpaca_eval 0.3.1,
whose annotator `alpaca_eval_gpt4` this is: its prompt (`alpaca_eval_gpt4.txt`, unchanged,
Apache-2.0), its order of the two answers, its parser, its win rate. There are 805 instructions; the
subset of the paper is the whole set.
"""

import ast
import dataclasses
import importlib.resources
import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from etils import epath

from tulu_jax import strict_json, validation
from tulu_jax.data import chat as chat_lib
from tulu_jax.decode.sampling import Sampling
from tulu_jax.evals import benchmark, data_files, scoring

MODEL = "gpt-4-0613"  # the judge; what alpaca_eval called gpt-4 then
JUDGING = Sampling(max_new_tokens=100)
REFERENCE = "text_davinci_003"
WIN_RATE, LENGTH = "win_rate", "length"
_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)
_PLACE = re.compile(r"\{(instruction|output_1|output_2)\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlpacaEval:
    """The rate of wins over text-davinci-003, draws counted half, and the mean length of answers in
    characters."""

    name: ClassVar[str] = "alpaca_eval"
    judges: ClassVar[tuple[str, ...]] = ("alpaca_eval",)

    subset: str = "paper"
    allow_altered: bool = False

    def __post_init__(self):
        validation.check(self, lambda: [scoring.subset_rule(self.subset)])

    def requests(
        self, data: epath.Path, tokenizer: chat_lib.ChatTokenizer, *, is_chat: bool
    ) -> list[benchmark.Request]:
        """All instructions, greedy; 8,192 new tokens, or what the model holds."""
        (rows,) = data_files.load(
            data, self.name, allow_altered=self.allow_altered
        ).content.values()
        return [
            benchmark.Request(
                id=f"alpaca_eval/{number}",
                group=row.get("dataset", self.name),
                prompt=[{"role": "user", "content": row["instruction"]}]
                if is_chat
                else row["instruction"],
                sampling=Sampling(max_new_tokens=8192),
                truth={"instruction": row["instruction"], "reference": row["output"]},
            )
            for number, row in enumerate(rows)
        ]

    def questions(
        self, requests: Sequence[benchmark.Request], answers: Sequence[benchmark.Answer]
    ) -> list[benchmark.Question]:
        """One for each answer that is not the reference itself."""
        template = _turns()
        asked = []
        for request, answer in scoring.pairs(requests, answers):
            instruction, outputs = request.truth["instruction"], _outputs(request, answer)
            if outputs[0] == outputs[1]:
                continue
            if is_switched(instruction):
                outputs.reverse()
            values = {
                "instruction": instruction, "output_1": outputs[0], "output_2": outputs[1],
            }  # fmt: skip
            messages = [
                {
                    "role": role,
                    "content": _PLACE.sub(lambda found, v=values: v[found[1]], text).strip(),
                }
                for role, text in template
            ]
            asked.append(
                benchmark.Question(
                    id=request.id, kind=self.judges[0], prompt=messages, sampling=JUDGING
                )
            )
        return asked

    def score(
        self,
        requests: Sequence[benchmark.Request],
        answers: Sequence[benchmark.Answer],
        verdicts: benchmark.Verdicts | None,
    ) -> list[benchmark.Metric]:
        """Win rate and length. Texts in which no ranking is found are left out, as published."""
        both = list(scoring.pairs(requests, answers))
        lengths = {request.id: len(answer.texts[0]) for request, answer in both}
        differ = {r.id: o[0] != o[1] for r, o in ((r, _outputs(r, a)) for r, a in both)}
        length = _length(lengths, requests)
        if verdicts is None or any(differ[r.id] and r.id not in verdicts for r in requests):
            return [scoring.pending(WIN_RATE), length]
        preferences = {}
        for request in requests:
            if not differ[request.id]:
                preferences[request.id] = 0.0
                continue
            ranked = rank(verdicts[request.id][0])
            if ranked is not None and is_switched(request.truth["instruction"]):
                ranked = 3 - ranked
            preferences[request.id] = ranked
        return [win_rate(preferences, requests), length]


def is_switched(instruction: str) -> bool:
    """Whether the judge sees the model's answer first: alpaca_eval's draw, with its seed 0."""
    return random.Random(f"is_switched_outputs{instruction}0").choices([False, True], k=1)[0]


def rank(text: str) -> int | None:
    """The rank, 1 or 2, that a judge gave `model_1`: the answer preferred is 1 or 2; None where the
    text is no Python list of models and ranks."""
    try:
        ours = [one for one in ast.literal_eval(text) if one["model"] == "model_1"]
        ranked = ours[0]["rank"]
    except (ValueError, SyntaxError, TypeError, LookupError, MemoryError, RecursionError):
        return None
    return int(ranked) if ranked in (1, 2) else None


def win_rate(
    preferences: Mapping[str, float | None], requests: Sequence[benchmark.Request]
) -> benchmark.Metric:
    """The mean of preference - 1, by id; a preference is 1 for the reference, 2 for the model,
    something between, or 0 or 1.5 for a draw. Others (None, -1) are left out.

    The standard error is s / √n with n - 1 in s, as published. Without any preference the value is
    None.
    """
    items = {}
    for name, found in preferences.items():
        found = 1.5 if found == 0 else found
        if found is not None and 1 <= found <= 2:
            items[name] = found - 1
    return _mean(WIN_RATE, items, requests, is_percent=True)


def annotations(path: epath.Path) -> list[dict[str, Any]]:
    """The rows that alpaca_eval wrote to an `annotations.json`. Raises `UsageError`."""
    path = epath.Path(path)
    with validation.reading():
        try:
            rows = strict_json.loads(path.read_bytes(), finite=False)
        except ValueError as error:
            raise ValueError(f"{path}: found no JSON ({error}); expected a list of rows") from error
    fields = {"instruction": str, "output_2": str}
    problems = []
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        wrong = [
            name
            for name, kind in fields.items()
            if not (isinstance(row, dict) and isinstance(row.get(name), kind))
        ]
        preference = row.get("preference") if isinstance(row, dict) else None
        if isinstance(preference, bool) or not isinstance(preference, int | float | None):
            wrong.append("preference")
        if wrong:
            problems.append(f"row {number}: {', '.join(wrong)}")
    if problems or not isinstance(rows, list):
        raise validation.UsageError(
            f"{path}: found {len(problems)} rows that are no annotations "
            f"({'; '.join(problems[:3])}); expected a list of objects with the texts instruction "
            "and output_2, and preference, a number or null; give what alpaca_eval wrote"
        )
    return rows


def score_annotations(
    rows: Sequence[Mapping[str, Any]], requests: Sequence[benchmark.Request] = ()
) -> list[benchmark.Metric]:
    """Win rate of `output_2` and its mean length, from the rows of `annotations`.

    Items have the ids of `requests` with the same instruction; without, they are numbers of rows.
    Groups are the rows' `dataset`.
    """
    ids = {request.truth["instruction"]: request.id for request in requests}
    names = [ids.get(row["instruction"], str(number)) for number, row in enumerate(rows)]
    if len(set(names)) < len(names):
        names = [f"{name}/{number}" for number, name in enumerate(names)]
    groups = [
        benchmark.Request(id=name, group=row.get("dataset") or "alpaca_eval", prompt="")
        for name, row in zip(names, rows, strict=True)
    ]
    preferences = {name: row.get("preference") for name, row in zip(names, rows, strict=True)}
    lengths = {name: len(row["output_2"]) for name, row in zip(names, rows, strict=True)}
    return [win_rate(preferences, groups), _length(lengths, groups)]


def model_outputs(
    requests: Sequence[benchmark.Request], answers: Sequence[benchmark.Answer], *, generator: str
) -> str:
    """The answers as the `model_outputs.json` that alpaca_eval reads."""
    rows = [
        {
            "dataset": request.group,
            "instruction": request.truth["instruction"],
            "output": answer.texts[0],
            "generator": generator,
        }
        for request, answer in scoring.pairs(requests, answers)
    ]
    return strict_json.dumps(rows, indent=2) + "\n"


def _outputs(request: benchmark.Request, answer: benchmark.Answer) -> list[str]:
    """The reference, which is output_1, and the model's answer."""
    return [request.truth["reference"], answer.texts[0]]


def _turns() -> list[tuple[str, str]]:
    """(role, text) of the published prompt."""
    file = importlib.resources.files("tulu_jax.evals") / "alpaca_eval_gpt4.txt"
    return _TURN.findall(file.read_text("utf-8"))


def _length(lengths: Mapping[str, int], requests: Sequence[benchmark.Request]) -> benchmark.Metric:
    return _mean(LENGTH, lengths, requests, is_percent=False)


def _mean(
    name: str, items: Mapping[str, float], requests: Sequence[benchmark.Request], *, is_percent
) -> benchmark.Metric:
    """The mean over items, with s / √n."""
    groups: dict[str, list[float]] = {}
    for request in requests:
        if request.id in items:
            groups.setdefault(request.group, []).append(items[request.id])
    values = [float(value) for value in items.values()]
    n = len(values)
    mean = math.fsum(values) / n if n else None
    error = None
    if n > 1:
        error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return benchmark.Metric(
        name=name,
        value=mean,
        standard_error=error,
        items={key: float(value) for key, value in items.items()},
        groups={group: math.fsum(found) / len(found) for group, found in groups.items()},
        is_percent=is_percent,
    )
