"""BIG-Bench-Hard (Suzgun et al. 2022): 27 tasks, three examples each with their reasoning.

Source: TÜLU 2 (arXiv 2311.10702), its evaluation code of November 2023. It took the tasks in the
order in which its file system listed them, and drew from one generator, so which 40 of a task the
paper has is not known. Here tasks are sorted.
"""

import dataclasses
import random
from collections.abc import Iterable, Sequence
from typing import ClassVar

from etils import epath

from tulu_jax import validation
from tulu_jax.data import chat as chat_lib
from tulu_jax.decode.sampling import Sampling
from tulu_jax.evals import benchmark, data_files, scoring, text_match

PAPER_ITEMS = 40  # of each task
SEED = 42


@dataclasses.dataclass(frozen=True, kw_only=True)
class BBH:
    """Accuracy, averaged over tasks. `punctuation_ignored` compares as the original did, for which
    -5 is 5, and any brackets of the right number are right; False compares all but case."""

    name: ClassVar[str] = "bbh"
    judges: ClassVar[tuple[str, ...]] = ()

    subset: str = "paper"
    allow_altered: bool = False
    punctuation_ignored: bool = True

    def __post_init__(self):
        validation.check(self, lambda: [scoring.subset_rule(self.subset)])

    def requests(
        self, data: epath.Path, tokenizer: chat_lib.ChatTokenizer, *, is_chat: bool
    ) -> list[benchmark.Request]:
        """40 items of each task, or all; a task without its prompt, or a prompt without its task,
        is left out (`allow_altered`)."""
        files = data_files.load(data, self.name, allow_altered=self.allow_altered).content
        generator, made = random.Random(SEED), []
        for task in tasks(files):
            items = list(enumerate(files[f"bbh/bbh/{task}.json"]))
            if self.subset == "paper":
                items = generator.sample(items, min(PAPER_ITEMS, len(items)))
            shots = files[f"bbh/cot-prompts/{task}.txt"].split("\n", 2)[-1].strip()
            for index, row in items:
                asked = f"{shots}\n\nQ: {row['input']}"
                made.append(
                    benchmark.Request(
                        id=f"bbh/{task}/{index}",
                        group=task,
                        prompt=[{"role": "user", "content": asked}] if is_chat else f"{asked}\nA:",
                        prefix="A:" if is_chat else "",
                        sampling=Sampling(max_new_tokens=512, stop=() if is_chat else ("\n\n",)),
                        truth={"answer": row["target"]},
                    )
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
        items = {
            request.id: float(self.is_correct(answer.texts[0], request.truth["answer"]))
            for request, answer in scoring.pairs(requests, answers)
        }
        return [scoring.mean_over_groups("accuracy", items, requests)]

    def is_correct(self, text: str, right: str) -> bool:
        """Whether what `text` says the answer is, or all of it, is `right`."""
        return text_match.is_match(
            text_match.after_answer_is(text), right, punctuation_ignored=self.punctuation_ignored
        )


def tasks(paths: Iterable[str]) -> list[str]:
    """The tasks that have both items and a prompt, sorted. Raises `UsageError` for none."""
    names = [path.rpartition("/")[2] for path in paths]
    items = {name.removesuffix(".json") for name in names if name.endswith(".json")}
    prompts = {name.removesuffix(".txt") for name in names if name.endswith(".txt")}
    if not items & prompts:
        raise validation.UsageError(
            f"found items of {sorted(items)} and prompts of {sorted(prompts)}; expected a task "
            "with both; give the folder that has bbh/bbh and bbh/cot-prompts"
        )
    return sorted(items & prompts)
