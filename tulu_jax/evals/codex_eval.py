"""Codex-Eval, which is HumanEval (Chen et al. 2021): Python functions, run against their tests.

Source: TÜLU 2 (arXiv 2311.10702), its evaluation code of November 2023, and OpenAI's human-eval.
The subset of the paper is the whole set, and prompts are raw also for chat models.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

from etils import epath

from tulu_jax import strict_json, validation
from tulu_jax.data import chat as chat_lib
from tulu_jax.decode.sampling import Sampling
from tulu_jax.evals import benchmark, data_files, scoring

PASSED = "passed"
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
KS = (10, 1)  # the paper's first


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodexEval:
    """pass@10 from 20 samples, unbiased, and pass@1 from the same; a `temperature` of 0.1 suits
    pass@1 better, and 0 is greedy, with `samples` 1. A verdict on a sample is 'passed' or anything
    else."""

    name: ClassVar[str] = "codex_eval"
    judges: ClassVar[tuple[str, ...]] = ("execution",)

    subset: str = "paper"
    allow_altered: bool = False
    temperature: float = 0.8
    samples: int = 20

    def __post_init__(self):
        validation.check(self, lambda: [scoring.subset_rule(self.subset)])
        self._sampling()

    def _sampling(self) -> Sampling:
        return Sampling(
            max_new_tokens=512,
            temperature=self.temperature,
            top_p=0.95 if self.temperature else 1.0,
            samples=self.samples,
            stop=STOP,
        )

    def requests(
        self, data: epath.Path, tokenizer: chat_lib.ChatTokenizer, *, is_chat: bool
    ) -> list[benchmark.Request]:
        (rows,) = data_files.load(
            data, self.name, allow_altered=self.allow_altered
        ).content.values()
        sampling = self._sampling()
        return [
            benchmark.Request(
                id=row["task_id"],
                group="HumanEval",
                prompt=row["prompt"],
                sampling=sampling,
                truth={"test": row["test"], "entry_point": row["entry_point"]},
            )
            for row in rows
        ]

    def questions(
        self, requests: Sequence[benchmark.Request], answers: Sequence[benchmark.Answer]
    ) -> list[benchmark.Question]:
        """The program of each sample, to be run. Ids are that of the request with "/0", "/1", …"""
        return [
            benchmark.Question(
                id=f"{request.id}/{number}", kind="execution", prompt=program(request, text)
            )
            for request, answer in scoring.pairs(requests, answers)
            for number, text in enumerate(answer.texts)
        ]

    def score(
        self,
        requests: Sequence[benchmark.Request],
        answers: Sequence[benchmark.Answer],
        verdicts: benchmark.Verdicts | None,
    ) -> list[benchmark.Metric]:
        """pass@10, where there are ten samples, and pass@1."""
        passed = {}
        for request, answer in scoring.pairs(requests, answers):
            ids = [f"{request.id}/{number}" for number in range(len(answer.texts))]
            if verdicts is None or any(name not in verdicts for name in ids):
                passed = None
                break
            passed[request.id] = [verdicts[name][0] == PASSED for name in ids]
        found = []
        for k in KS:
            if k <= self.samples and passed is None:
                found.append(scoring.pending(f"pass@{k}"))
            elif k <= self.samples:
                items = {name: pass_at_k(len(p), sum(p), k) for name, p in passed.items()}
                found.append(scoring.mean_over_items(f"pass@{k}", items, requests))
        return found


def program(request: benchmark.Request, text: str) -> str:
    """A sample and what checks it, as JSON in the form of `sandbox.Program`.

    `solution` is the prompt and the sample, `checks` the tests and the call that runs them: one
    after the other they are the source that human-eval executes. `setup` has the functions of the
    prompt that tests use too, and the one that is asked for without a body.
    """
    entry_point = request.truth["entry_point"]
    parts = {
        "solution": request.prompt + text,
        "setup": f"{request.prompt}    pass\n",
        "checks": f"{request.truth['test']}\ncheck({entry_point})",
        "entry_point": entry_point,
    }
    return strict_json.dumps(parts)


def pass_at_k(n: int, passed: int, k: int) -> float:
    """The probability that of `k` samples drawn from `n`, of which some `passed`, one has passed:
    1 - C(n - passed, k) / C(n, k) (Chen et al. 2021, eq. 1). `k` is at most `n`."""
    return 1 - math.comb(n - passed, k) / math.comb(n, k)
