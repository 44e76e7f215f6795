"""MMLU (Hendrycks et al. 2021): 57 subjects, four options, the likeliest letter.

Source: TÜLU 2 (arXiv 2311.10702), its evaluation code of November 2023. The subset of the paper is
the whole test split.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

from etils import epath

from tulu_jax import validation
from tulu_jax.data import chat as chat_lib
from tulu_jax.evals import benchmark, data_files, scoring

LETTERS = "ABCD"
MOST_TOKENS = 2048  # of a prompt, BOS not counted
MOST_SHOTS = 5
NA_WORDS = frozenset(  # what pandas reads as no value
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN")
    + ("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null")
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MMLU:
    """Accuracy over all questions, each of the same weight.

    `shots` examples of the development split come first, as many as keep the prompt within 2,048
    tokens. `na_words_lost` shows an option such as "None" as "nan", as the original did, which read
    the files with pandas (from 2.0 on "None" too).
    """

    name: ClassVar[str] = "mmlu"
    judges: ClassVar[tuple[str, ...]] = ()

    subset: str = "paper"
    allow_altered: bool = False
    shots: int = 0
    na_words_lost: bool = True

    def __post_init__(self):
        validation.check(self, self._rules)

    def _rules(self):
        yield scoring.subset_rule(self.subset)
        yield 0 <= self.shots <= MOST_SHOTS, f"shots = {self.shots}: expected 0 to {MOST_SHOTS}"

    def requests(
        self, data: epath.Path, tokenizer: chat_lib.ChatTokenizer, *, is_chat: bool
    ) -> list[benchmark.Request]:
        """Every question of every subject; a subject whose examples are missing has none
        (`allow_altered`)."""
        files = data_files.load(data, self.name, allow_altered=self.allow_altered).content
        made = []
        for path, rows in files.items():
            if not path.startswith("mmlu/test/"):
                continue
            subject = path.removeprefix("mmlu/test/").removesuffix("_test.csv")
            examples = files.get(f"mmlu/dev/{subject}_dev.csv", [])[: self.shots]
            shown = [f"{self._asked(row)} {row[5]}\n\n" for row in examples]
            for index, row in enumerate(rows):
                asked = self._asked(row)
                content = _fitting(subject, shown, asked, tokenizer, is_chat=is_chat)
                made.append(
                    benchmark.Request(
                        id=f"mmlu/{subject}/{index}",
                        group=subject,
                        prompt=_conversation(content) if is_chat else content,
                        prefix=_prefix(is_chat),
                        choices=tuple(f" {letter}" for letter in LETTERS),
                        truth={"letter": row[5]},
                    )
                )
        if not made:
            raise validation.UsageError(
                f"found no file of {epath.Path(data) / 'mmlu/test'}; expected at least one subject"
            )
        return made

    def questions(
        self, requests: Sequence[benchmark.Request], answers: Sequence[benchmark.Answer]
    ) -> list[benchmark.Question]:
        return []

    def score(
        self,
        requests: Sequence[benchmark.Request],
        answers: Sequence[benchmark.Answer],
        verdicts: benchmark.Verdicts | None,
    ) -> list[benchmark.Metric]:
        """Accuracy over questions, as the paper has it, and its mean over subjects."""
        items = {}
        for request, answer in scoring.pairs(requests, answers):
            likeliest = max(range(len(LETTERS)), key=answer.choice_logps.__getitem__)
            items[request.id] = float(LETTERS[likeliest] == request.truth["letter"])
        return [
            scoring.mean_over_items("accuracy", items, requests),
            scoring.mean_over_groups("accuracy, mean of subjects", items, requests),
        ]

    def _asked(self, row: Sequence[str]) -> str:
        """A question with its options, up to "Answer:"."""
        options = row[1:5]
        if self.na_words_lost:
            options = ["nan" if option in NA_WORDS else option for option in options]
        lines = [f"{a}. {option}" for a, option in zip(LETTERS, options, strict=True)]
        return "\n".join([row[0], *lines, "Answer:"])


def question_weighted(accuracies: Mapping[str, float]) -> float:
    """The accuracy over all questions from that of each subject, for tables that have no more.

    Raises `UsageError` for subjects that are none.
    """
    count = {
        file.path.removeprefix("mmlu/test/").removesuffix("_test.csv"): file.rows
        for file in data_files.upstream("mmlu")
        if file.path.startswith("mmlu/test/")
    }
    if unknown := sorted(set(accuracies) - set(count)):
        raise validation.UsageError(
            f"found the subjects {unknown}; expected subjects of MMLU, such as 'anatomy'"
        )
    total = sum(count[subject] for subject in accuracies)
    return math.fsum(count[subject] * value for subject, value in accuracies.items()) / total


def _fitting(
    subject: str,
    shown: Sequence[str],
    asked: str,
    tokenizer: chat_lib.ChatTokenizer,
    *,
    is_chat: bool,
) -> str:
    """The prompt, with as many of the examples `shown` as fit. Without any it is as long as it is:
    there the original would have looped for ever, so none was too long."""
    about = subject.replace("_", " ")  # behind a second space, as the authors of MMLU have it
    begin = f"The following are multiple choice questions (with answers) about  {about}.\n\n"
    for count in range(len(shown), 0, -1):
        content = begin + "".join(shown[:count]) + asked
        if _length(content, tokenizer, is_chat=is_chat) <= MOST_TOKENS:
            return content
    return begin + asked


def _length(content: str, tokenizer: chat_lib.ChatTokenizer, *, is_chat: bool) -> int:
    if not is_chat:
        return len(tokenizer.encode(content))
    ids = chat_lib.generation_prompt(
        _conversation(content), tokenizer, chat="spec", prefix=_prefix(is_chat)
    )
    return len(ids) - 1


def _conversation(content: str) -> benchmark.Messages:
    return [{"role": "user", "content": content}]


def _prefix(is_chat: bool) -> str:
    return "The answer is:" if is_chat else ""
