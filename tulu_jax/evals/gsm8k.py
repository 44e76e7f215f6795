"""GSM8K (Cobbe et al. 2021): grade-school arithmetic, eight examples with their reasoning.

Source: TÜLU 2 (arXiv 2311.10702), its evaluation code of November 2023. The examples are those of
Wei et al. 2022 (arXiv 2201.11903), Table 20.
"""

import dataclasses
import random
from collections.abc import Sequence
from typing import ClassVar

from etils import epath

from tulu_jax import validation
from tulu_jax.data import chat as chat_lib
from tulu_jax.decode.sampling import Sampling
from tulu_jax.evals import benchmark, data_files, scoring, text_match

PAPER_ITEMS = 200
SEED = 42
EXAMPLES = (  # question, reasoning with the answer at its end
    (
        "There are 15 trees in the grove. Grove workers will plant trees in the grove "
        "today. After they are done, there will be 21 trees. How many trees did the "
        "grove workers plant today?",
        "There are 15 trees originally. Then there were 21 trees after some more were "
        "planted. So there must have been 21 - 15 = 6. So the answer is 6.",
    ),
    (
        "If there are 3 cars in the parking lot and 2 more cars arrive, how many cars "
        "are in the parking lot?",
        "There are originally 3 cars. 2 more cars arrive. 3 + 2 = 5. So the answer is 5.",
    ),
    (
        "Leah had 32 chocolates and her sister had 42. If they ate 35, how many pieces "
        "do they have left in total?",
        "Originally, Leah had 32 chocolates. Her sister had 42. So in total they had 32 "
        "+ 42 = 74. After eating 35, they had 74 - 35 = 39. So the answer is 39.",
    ),
    (
        "Jason had 20 lollipops. He gave Denny some lollipops. Now Jason has 12 "
        "lollipops. How many lollipops did Jason give to Denny?",
        "Jason started with 20 lollipops. Then he had 12 after giving some to Denny. So "
        "he gave Denny 20 - 12 = 8. So the answer is 8.",
    ),
    (
        "Shawn has five toys. For Christmas, he got two toys each from his mom and dad. "
        "How many toys does he have now?",
        "Shawn started with 5 toys. If he got 2 toys each from his mom and dad, then "
        "that is 4 more toys. 5 + 4 = 9. So the answer is 9.",
    ),
    (
        "There were nine computers in the server room. Five more computers were "
        "installed each day, from monday to thursday. How many computers are now in the "
        "server room?",
        "There were originally 9 computers. For each of 4 days, 5 more computers were "
        "added. So 5 * 4 = 20 computers were added. 9 + 20 is 29. So the answer is 29.",
    ),
    (
        "Michael had 58 golf balls. On tuesday, he lost 23 golf balls. On wednesday, he "
        "lost 2 more. How many golf balls did he have at the end of wednesday?",
        "Michael started with 58 golf balls. After losing 23 on tuesday, he had 58 - 23 "
        "= 35. After losing 2 more, he had 35 - 2 = 33 golf balls. So the answer is 33.",
    ),
    (
        "Olivia has $23. She bought five bagels for $3 each. How much money does she have left?",
        "Olivia had 23 dollars. 5 bagels for 3 dollars each will be 5 x 3 = 15 dollars. "
        "So she has 23 - 15 dollars left. 23 - 15 is 8. So the answer is 8.",
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GSM8K:
    """Accuracy of the last number in an answer. It is compared as a text without punctuation, as
    the original did, for which -5 is 5, 1.8 is 18 and 18.00 is not 18; or `as_numbers`."""

    name: ClassVar[str] = "gsm8k"
    judges: ClassVar[tuple[str, ...]] = ()

    subset: str = "paper"
    allow_altered: bool = False
    as_numbers: bool = False

    def __post_init__(self):
        validation.check(self, lambda: [scoring.subset_rule(self.subset)])

    def requests(
        self, data: epath.Path, tokenizer: chat_lib.ChatTokenizer, *, is_chat: bool
    ) -> list[benchmark.Request]:
        """The first draw of 200 by Python's generator with seed 42, or all, by line."""
        (rows,) = data_files.load(
            data, self.name, allow_altered=self.allow_altered
        ).content.values()
        items = list(enumerate(rows))
        if self.subset == "paper" and len(items) > PAPER_ITEMS:
            items = random.Random(SEED).sample(items, PAPER_ITEMS)
        shots = [f"Question: {question}\nAnswer: {answer}" for question, answer in EXAMPLES]
        begin = "\n\n".join(["Answer the following questions.", *shots, "Question: "])
        made = []
        for index, row in items:
            asked = begin + row["question"].strip()
            made.append(
                benchmark.Request(
                    id=f"gsm8k/{index}",
                    group="test",
                    prompt=[{"role": "user", "content": asked}] if is_chat else f"{asked}\nAnswer:",
                    prefix="Answer:" if is_chat else "",
                    sampling=Sampling(max_new_tokens=512, stop=() if is_chat else ("\n",)),
                    truth={"answer": truth(row["answer"], index)},
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
        return [scoring.mean_over_items("accuracy", items, requests)]

    def is_correct(self, text: str, right: str) -> bool:
        """Whether the last number of `text` is `right`."""
        said = text_match.last_number(text, signed=self.as_numbers)
        if self.as_numbers:
            return text_match.is_same_number(said, right)
        return text_match.is_match(said, right, punctuation_ignored=True)


def truth(solution: str, index: int) -> str:
    """The number behind "####", without commas. Raises `UsageError` for none."""
    _, mark, number = solution.partition("####")
    number = text_match.without_commas(number.partition("####")[0].strip())
    try:
        float(number)
    except ValueError as error:
        found = repr(number[:20]) if mark else "no #### in it"
        raise validation.UsageError(
            f"gsm/test.jsonl, line {index + 1}: found an answer with {found}; expected a number "
            "behind ####; download the file again"
        ) from error
    return number


def openai_is_correct(solution: str, ground_truth: str) -> bool:
    """The rule of OpenAI's published solutions, which is not the paper's: texts behind the last
    "A:" are equal, commas removed."""
    said, right = (
        text.rpartition("A:")[2].replace(",", "").strip() for text in (solution, ground_truth)
    )
    return said == right
