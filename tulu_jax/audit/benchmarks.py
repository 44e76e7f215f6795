"""The prompts of the paper's nine benchmarks, read from the folder that evaluation reads.

Layout below the folder, as upstream has it; a benchmark that is not there is left out:

    mmlu/{dev,test}/*.csv                question, four options, letter
    gsm/{train,test}.jsonl               question
    bbh/bbh/*.json                       examples: input
    tydiqa/*_{train,dev}.json            SQuAD layout: question and passage, apart
    codex_humaneval/HumanEval.jsonl.gz   prompt
    toxigen/hate_*.txt                   a prompt of several statements a line
    truthfulqa/TruthfulQA.csv            Question
    alpaca_eval/*.json                   instruction
    mt_bench/question.jsonl              turns
"""

import csv
import dataclasses
import gzip
from collections.abc import Callable, Iterator

from tulu_jax import strict_json
from tulu_jax.audit import ngrams
from tulu_jax.data.sources import readers

BRIEF = 8  # words; an MMLU question of fewer is taken with its options


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """One benchmark prompt; `benchmark` names the set and, where there are several, its split."""

    benchmark: str
    item: str
    text: str


def read_prompts(folder: str) -> list[Prompt]:
    """The prompts of every benchmark in `folder`, a path or a bucket.

    Raises `FileNotFoundError` if there is none, and `ValueError` naming a file that is not in the
    layout of its benchmark.
    """
    root = readers.as_path(folder)
    prompts = []
    for pattern, read in _LAYOUTS:
        for file in sorted(root.glob(pattern)):
            try:
                prompts += list(read(file))
            except (KeyError, TypeError, IndexError, ValueError, EOFError, OSError) as error:
                raise ValueError(
                    f"{file}: not in the layout of a benchmark ({type(error).__name__}: {error}); "
                    f"docs/data_card.md lists what {pattern} should hold"
                ) from error
    if not prompts:
        patterns = ", ".join(pattern for pattern, _ in _LAYOUTS)
        raise FileNotFoundError(f"{folder}: found no benchmark; expected some of {patterns}")
    return prompts


def _mmlu(file) -> Iterator[Prompt]:
    split = file.parent.name
    for number, row in enumerate(csv.reader(_text(file).splitlines(keepends=True))):
        question, *options, _ = row
        if len(ngrams.words(question)) < BRIEF:
            question = "\n".join([question, *options])
        yield Prompt(f"mmlu {split}", f"{file.stem}/{number}", question)


def _gsm(file) -> Iterator[Prompt]:
    for number, row in enumerate(_json_lines(_text(file))):
        yield Prompt(f"gsm {file.stem}", str(number), row["question"])


def _bbh(file) -> Iterator[Prompt]:
    for number, example in enumerate(strict_json.loads(_text(file))["examples"]):
        yield Prompt("bbh", f"{file.stem}/{number}", example["input"])


def _tydiqa(file) -> Iterator[Prompt]:
    split = file.stem.rpartition("_")[2]
    for article in strict_json.loads(_text(file))["data"]:
        for paragraph in article["paragraphs"]:
            questions = paragraph["qas"]
            for question in questions:
                yield Prompt(f"tydiqa {split} questions", question["id"], question["question"])
            yield Prompt(f"tydiqa {split} passages", questions[0]["id"], paragraph["context"])


def _humaneval(file) -> Iterator[Prompt]:
    for row in _json_lines(gzip.decompress(file.read_bytes()).decode()):
        yield Prompt("codex_humaneval", row["task_id"], row["prompt"])


def _toxigen(file) -> Iterator[Prompt]:
    for number, line in enumerate(_text(file).splitlines()):
        yield Prompt("toxigen", f"{file.stem}/{number}", line.replace("\\n", "\n"))


def _truthfulqa(file) -> Iterator[Prompt]:
    for number, row in enumerate(csv.DictReader(_text(file).splitlines(keepends=True))):
        yield Prompt("truthfulqa", str(number), row["Question"])


def _alpaca_eval(file) -> Iterator[Prompt]:
    for number, row in enumerate(strict_json.loads(_text(file))):
        yield Prompt("alpaca_eval", str(number), row["instruction"])


def _mt_bench(file) -> Iterator[Prompt]:
    for row in _json_lines(_text(file)):
        for number, turn in enumerate(row["turns"], 1):
            yield Prompt("mt_bench", f"{row['question_id']} turn {number}", turn)


def _text(file) -> str:
    return file.read_bytes().decode()


def _json_lines(text: str) -> Iterator[dict]:
    return (strict_json.loads(line) for line in text.split("\n") if line.strip())


_LAYOUTS: tuple[tuple[str, Callable], ...] = (
    ("mmlu/dev/*.csv", _mmlu),
    ("mmlu/test/*.csv", _mmlu),
    ("gsm/train.jsonl", _gsm),
    ("gsm/test.jsonl", _gsm),
    ("bbh/bbh/*.json", _bbh),
    ("tydiqa/*_train.json", _tydiqa),
    ("tydiqa/*_dev.json", _tydiqa),
    ("codex_humaneval/HumanEval.jsonl.gz", _humaneval),
    ("toxigen/hate_*.txt", _toxigen),
    ("truthfulqa/TruthfulQA.csv", _truthfulqa),
    ("alpaca_eval/*.json", _alpaca_eval),
    ("mt_bench/question.jsonl", _mt_bench),
)
