"""MT-Bench (Zheng et al. 2023): 80 conversations of two turns, each turn rated from 1 to 10.

Source: FastChat's `llm_judge` (lm-sys/FastChat@0e6d3e4beaab), which TÜLU 2 (arXiv 2311.10702) names
without its settings: 1,024 new tokens and `top_k` are defaults, of FastChat and of transformers at
that time. FastChat's template for TÜLU puts no `</s>` behind the first reply; ours does, as in
training. The subset of the paper is the whole set.
"""

import dataclasses
import math
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from etils import epath

from tulu_jax import strict_json, validation
from tulu_jax.data import chat as chat_lib
from tulu_jax.decode.sampling import Sampling
from tulu_jax.evals import benchmark, data_files, scoring

MODEL = "gpt-4-0613"  # the judge
JUDGING = Sampling(max_new_tokens=2048)
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0,
    "reasoning": 0.0, "stem": 0.1, "humanities": 0.1,
}  # fmt: skip
WITH_REFERENCE = ("math", "reasoning", "coding")
SCORE, TURNS, UNRATED = "score", ("turn_1", "turn_2"), "unrated"
NO_RATING = -1.0
_FOLDER = "mt_bench/"
_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
_NUMBER = r"(\d+(?:\.\d+)?)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MTBench:
    """The mean rating of both turns. `top_k` is that of the turns that are drawn; 0 is all."""

    name: ClassVar[str] = "mt_bench"
    judges: ClassVar[tuple[str, ...]] = ("mt_bench",)

    subset: str = "paper"
    allow_altered: bool = False
    top_k: int = 50

    def __post_init__(self):
        validation.check(
            self,
            lambda: [
                scoring.subset_rule(self.subset),
                (self.top_k >= 0, f"top_k = {self.top_k}: expected 0 (all) or more"),
            ],
        )

    def requests(
        self, data: epath.Path, tokenizer: chat_lib.ChatTokenizer, *, is_chat: bool
    ) -> list[benchmark.Request]:
        """One for each question: the first turn, and the second to follow. What the judge is to be
        asked is in `truth`."""
        content = data_files.load(data, self.name, allow_altered=self.allow_altered).content
        self._check(content, is_chat)
        prompts = {row["name"]: row for row in content[f"{_FOLDER}judge_prompts.jsonl"]}
        references = {
            row["question_id"]: row["choices"][0]["turns"]
            for row in content[f"{_FOLDER}reference_answer/gpt-4.jsonl"]
        }
        made = []
        for row in content[f"{_FOLDER}question.jsonl"]:
            category, number = row["category"], row["question_id"]
            temperature = TEMPERATURES.get(category, 0.7)
            with_reference = category in WITH_REFERENCE
            names = [f"single{'-math' * with_reference}-v1{end}" for end in ("", "-multi-turn")]
            made.append(
                benchmark.Request(
                    id=f"mt_bench/{number}",
                    group=category,
                    prompt=[{"role": "user", "content": row["turns"][0]}],
                    then=tuple(row["turns"][1:]),
                    sampling=Sampling(
                        max_new_tokens=1024,
                        temperature=temperature,
                        top_k=self.top_k if temperature else 0,
                    ),
                    truth={
                        "question_id": number,
                        "turns": row["turns"],
                        "reference": references[number] if with_reference else None,
                        "judge_prompts": [
                            {
                                key: prompts[name][key]
                                for key in ("system_prompt", "prompt_template")
                            }
                            for name in names
                        ],
                    },
                )
            )
        return made

    def _check(self, content: Mapping[str, Sequence[Mapping]], is_chat: bool) -> None:
        """Refuses what cannot be asked, all at once."""
        problems = []
        if not is_chat:
            problems.append("it is made of conversations; give --chat for a model that chats")
        wanted = {
            "question.jsonl": ("question_id", "category", "turns"),
            "judge_prompts.jsonl": ("name", "system_prompt", "prompt_template"),
            "reference_answer/gpt-4.jsonl": ("question_id", "choices"),
        }
        for name, fields in wanted.items():
            rows = content.get(_FOLDER + name)
            if rows is None:
                problems.append(f"{_FOLDER}{name} is missing")
            elif bad := [str(n) for n, row in enumerate(rows, 1) if not set(fields) <= set(row)]:
                problems.append(
                    f"{_FOLDER}{name}, rows {', '.join(bad[:5])}: expected the fields {fields}"
                )
        if problems:
            raise validation.UsageError(f"{self.name} cannot be asked: {'; '.join(problems)}")

    def questions(
        self, requests: Sequence[benchmark.Request], answers: Sequence[benchmark.Answer]
    ) -> list[benchmark.Question]:
        """Two for each conversation, one a turn; ids are that of the request with "/1" and "/2"."""
        return [
            benchmark.Question(
                id=f"{request.id}/{turn}",
                kind=self.judges[0],
                prompt=_judged(request, [text.strip() for text in answer.texts], turn),
                sampling=JUDGING,
            )
            for request, answer in scoring.pairs(requests, answers)
            for turn in (1, 2)
        ]

    def score(
        self,
        requests: Sequence[benchmark.Request],
        answers: Sequence[benchmark.Answer],
        verdicts: benchmark.Verdicts | None,
    ) -> list[benchmark.Metric]:
        """The mean rating, that of each turn, and the part of turns without a rating."""
        named = {(r.id, turn): f"{r.id}/{turn}" for r in requests for turn in (1, 2)}
        if verdicts is None or any(name not in verdicts for name in named.values()):
            return [scoring.pending(name) for name in (SCORE, *TURNS, UNRATED)]
        ratings = {place: rating(verdicts[name][0]) for place, name in named.items()}
        return means([(*place, value) for place, value in ratings.items()], requests)


def rating(text: str) -> int | float:
    """The first number in [[ ]], else the first in [ ], else -1: FastChat's rule."""
    for pattern in _RATINGS:
        if found := pattern.search(text):
            return float(found[1]) if "." in found[1] else int(found[1])
    return int(NO_RATING)


def review_scores(text: str) -> tuple[float, float] | None:
    """The two scores of a review that compares two assistants, as for Vicuna: the first line if it
    is two numbers, else the last "scores are (a, b)", or the last "Assistant 1: a" and
    "Assistant 2: b"; None where there are none."""
    first = text.split("\n")[0].replace(",", " ").split()
    if len(first) == 2 and all(re.fullmatch(_NUMBER, one) for one in first):
        return float(first[0]), float(first[1])
    pairs = re.findall(rf"scores? (?:are|is):? \(?{_NUMBER}, ?{_NUMBER}\)?", text, re.IGNORECASE)
    each = [
        re.findall(rf"Assistant {n}(?:'s)?(?: score)?: ?{_NUMBER}\b(?!\.\w)", text) for n in (1, 2)
    ]
    if all(each):
        return float(each[0][-1]), float(each[1][-1])
    return (float(pairs[-1][0]), float(pairs[-1][1])) if pairs else None


def means(
    rated: Sequence[tuple[str, int, float]], requests: Sequence[benchmark.Request]
) -> list[benchmark.Metric]:
    """The mean of all ratings, of each turn, and the part that has none, of (id of a request, turn,
    rating).

    Turns without a rating (-1) are left out, as FastChat does. Items are means of the turns of a
    request. The two turns of a conversation are not independent: the standard error of the mean is
    that over conversations.
    """
    categories = {request.id: request.group for request in requests}
    found = [_mean(SCORE, [(name, value) for name, _, value in rated], categories)]
    for turn, name in enumerate(TURNS, 1):
        found.append(_mean(name, [(n, value) for n, t, value in rated if t == turn], categories))
    without = [(name, float(value == NO_RATING)) for name, _, value in rated]
    found.append(dataclasses.replace(_mean(UNRATED, without, categories), is_percent=True))
    return found


def judgments(path: epath.Path, *, model: str | None = None) -> list[dict[str, Any]]:
    """The rows that FastChat wrote to a `gpt-4_single.jsonl`, of one model; None: of the only one.

    Raises `UsageError` for rows that are none, and for a file of several models or without that
    one.
    """
    path = epath.Path(path)
    with validation.reading():
        lines = [line for line in path.read_text().split("\n") if line.strip()]
    rows, bad = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = strict_json.loads(line)
        except ValueError:
            row = None
        is_row = isinstance(row, dict) and {"question_id", "turn"} <= set(row)
        if is_row and (isinstance(row.get("judgment"), str) or "score" in row):
            rows.append(row)
        else:
            bad.append(str(number))
    if bad:
        raise validation.UsageError(
            f"{path}: lines {', '.join(bad[:5])} are no judgments; expected JSON objects with "
            "question_id, turn and judgment; give what FastChat's gen_judgment wrote"
        )
    models = sorted({str(row.get("model")) for row in rows})
    if (model is None and len(models) > 1) or (model is not None and model not in models):
        raise validation.UsageError(
            f"{path} has judgments of {', '.join(models)}; expected one of these names"
        )
    return [row for row in rows if model is None or str(row.get("model")) == model]


def score_judgments(
    rows: Sequence[Mapping[str, Any]], requests: Sequence[benchmark.Request] = ()
) -> list[benchmark.Metric]:
    """As `MTBench.score` has them, from the rows of `judgments`. Groups are those of `requests`."""
    rated = []
    for row in rows:
        text = row.get("judgment")
        value = rating(text) if isinstance(text, str) else float(row["score"])
        rated.append((f"mt_bench/{row['question_id']}", int(row["turn"]), value))
    return means(rated, requests)


def model_answers(
    requests: Sequence[benchmark.Request],
    answers: Sequence[benchmark.Answer],
    *,
    model: str,
    time: float,
) -> str:
    """The answers as the JSON lines that FastChat reads, given at `time` in seconds."""
    rows = [
        {
            "question_id": request.truth["question_id"],
            "answer_id": uuid.uuid5(uuid.NAMESPACE_OID, f"{model}/{request.id}").hex,
            "model_id": model,
            "choices": [{"index": 0, "turns": [text.strip() for text in answer.texts]}],
            "tstamp": time,
        }
        for request, answer in scoring.pairs(requests, answers)
    ]
    return "".join(strict_json.dumps(row) + "\n" for row in rows)


def _judged(request: benchmark.Request, texts: Sequence[str], turn: int) -> benchmark.Messages:
    """The conversation with the judge about one turn."""
    turns, reference = request.truth["turns"], request.truth["reference"]
    if turn == 1:
        values = {"question": turns[0], "answer": texts[0]}
    else:
        values = {f"question_{n}": turns[n - 1] for n in (1, 2)}
        values |= {f"answer_{n}": texts[n - 1] for n in (1, 2)}
    if reference is not None:
        values |= {f"ref_answer_{n}": reference[n - 1] for n in range(1, turn + 1)}
    prompt = request.truth["judge_prompts"][turn - 1]
    return [
        {"role": "system", "content": prompt["system_prompt"]},
        {"role": "user", "content": prompt["prompt_template"].format(**values)},
    ]


def _mean(
    name: str, rated: Sequence[tuple[str, float]], categories: Mapping[str, str]
) -> benchmark.Metric:
    """The mean of ratings, by request and by category, and its error over requests."""
    by_request: dict[str, list[float]] = {}
    by_category: dict[str, list[float]] = {}
    for request, value in rated:
        if value != NO_RATING:
            by_request.setdefault(request, []).append(float(value))
            if request in categories:
                by_category.setdefault(categories[request], []).append(float(value))
    values = [value for ratings in by_request.values() for value in ratings]
    mean, error, n = None, None, len(by_request)
    if values:
        mean = math.fsum(values) / len(values)
    if n > 1:
        sums = [math.fsum(value - mean for value in ratings) for ratings in by_request.values()]
        error = math.sqrt(math.fsum(s * s for s in sums) * n / (n - 1)) / len(values)
    return benchmark.Metric(
        name=name,
        value=mean,
        standard_error=error,
        items={request: math.fsum(found) / len(found) for request, found in by_request.items()},
        groups={c: math.fsum(found) / len(found) for c, found in by_category.items()},
        is_percent=False,
    )
