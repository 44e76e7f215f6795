"""The paper's nine benchmarks from the command to the table: a few real rows of each, stories260K
as the model and as TruthfulQA's judges, a small classifier, a real local server as GPT-4."""

import gzip
import json
import os
import shutil
import subprocess
import sys

import pytest
import small_classifier
from chat_server import Server

from tulu_jax.data import chat, tokenizer_files
from tulu_jax.evals import catalogue, scores
from tulu_jax.interop import tokenizer_export

PARTS = (("mmlu", "bbh"), ("codex_eval", "gsm8k"), ("tydiqa", "mt_bench"))
SAMPLES = "--set=codex_eval.samples=5"
POSITIONS = 3072  # its 512 pieces make long prompts
FIRST_LINES = {  # of each file below eval/, how many
    "mmlu/dev/anatomy_dev.csv": 5,
    "mmlu/test/anatomy_test.csv": 3,
    "mmlu/dev/virology_dev.csv": 5,
    "mmlu/test/virology_test.csv": 3,
    "gsm/test.jsonl": 2,
    "toxigen/hate_women.txt": 1,
    "toxigen/hate_trans.txt": 1,
    "truthfulqa/TruthfulQA.csv": 3,
    "mt_bench/question.jsonl": 1,
    "mt_bench/judge_prompts.jsonl": 8,
    "mt_bench/reference_answer/gpt-4.jsonl": 30,
}


@pytest.fixture(scope="module")
def data(shared_data, tmp_path_factory):
    """A few rows of each benchmark, in the upstream layout."""
    theirs, ours = shared_data / "eval", tmp_path_factory.mktemp("eval")

    def write(path: str, text: str) -> None:
        (ours / path).parent.mkdir(parents=True, exist_ok=True)
        (ours / path).write_text(text)

    for path, count in FIRST_LINES.items():
        with (theirs / path).open() as file:
            write(path, "".join(line for line, _ in zip(file, range(count), strict=False)))
    task = json.loads((theirs / "bbh/bbh/web_of_lies.json").read_text())
    write("bbh/bbh/web_of_lies.json", json.dumps(task | {"examples": task["examples"][:2]}))
    prompt = (theirs / "bbh/cot-prompts/web_of_lies.txt").read_text()
    write("bbh/cot-prompts/web_of_lies.txt", prompt)
    for name in ("english_tydiqa_dev", "english_tydiqa_train"):
        rows = json.loads((theirs / f"tydiqa/{name}.json").read_text())
        write(f"tydiqa/{name}.json", json.dumps(rows | {"data": rows["data"][:2]}))
    rows = json.loads((theirs / "alpaca_eval/text_davinci_003_outputs.json").read_text())
    write("alpaca_eval/text_davinci_003_outputs.json", json.dumps(rows[:1]))
    with gzip.open(theirs / "codex_humaneval/HumanEval.jsonl.gz", "rt") as file:
        problem = file.readline()
    (ours / "codex_humaneval").mkdir()
    with gzip.open(ours / "codex_humaneval/HumanEval.jsonl.gz", "wt") as file:
        file.write(problem)
    return ours


@pytest.fixture(scope="module")
def stories(shared_data, tmp_path_factory):
    """stories260K as an exported folder, with room for the prompts."""
    folder = tmp_path_factory.mktemp("models") / "stories"
    shutil.copytree(shared_data / "models" / "stories260K-hf", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": POSITIONS}))
    path = str(shared_data / "models" / "stories260K" / "tok512.model")
    backend = tokenizer_files.for_plain_text(chat.load_tokenizer(path).backend, path)
    tokenizer_export.save(backend, str(folder), max_length=None, mode="spec")
    return folder


def judgment(text: str, number: int) -> str:
    """What GPT-4 might say: a ranking of AlpacaEval's two, or a rating of MT-Bench's one."""
    if "model_1" in text:
        return "[{'model': 'model_1', 'rank': 1}, {'model': 'model_2', 'rank': 2}]"
    return "Rather short. Rating: [[3]]"


def command(stories, data, out, *more: str) -> str:
    """What `evaluate` prints, as typed, on one device; it must end with status 0."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tulu_jax.evaluate", f"--model_folder={stories}"),
            *("--benchmarks=all", f"--eval_data={data}", "--allow_altered_data", f"--out={out}"),
            *("--slots=2", *more),
        ],
        env=os.environ | {"XLA_FLAGS": "", "OPENAI_API_KEY": "none"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of an evaluation."""
    return tmp_path_factory.mktemp("evaluated")


@pytest.mark.parametrize("part", PARTS, ids="+".join)
def test_some_are_evaluated_before_the_others(part, data, stories, out):
    samples = (SAMPLES,) if "codex_eval" in part else ()
    command(stories, data, out, f"--benchmarks={','.join(part)}", *samples)
    assert set(part) <= {one.benchmark for one in scores.load(out)[1]}


@pytest.fixture(scope="module")
def answered(data, stories, out):
    """The same folder after that of all, without judges, and what it printed."""
    return out, command(stories, data, out, SAMPLES)


def test_without_judges_four_are_pending(answered):
    out, said = answered
    _, found = scores.load(out)
    assert {one.benchmark for one in found} == set(catalogue.PAPER)
    pending = {one.benchmark for one in found if one.metrics[0].value is None}
    assert pending == {"alpaca_eval", "mt_bench", "toxigen", "truthfulqa"}
    assert "pending" in said and "altered data" in said
    assert (out / "model_outputs.json").exists() and (out / "model_answer.jsonl").exists()


def test_with_judges_all_have_scores_and_nothing_is_asked_again(answered, data, stories, tmp_path):
    out, _ = answered
    before = {path: path.read_bytes() for path in out.glob("*.paper.jsonl")}
    server = Server(judgment)
    said = command(
        stories, data, out,
        *(f"--judge_url={server.url}", f"--truth_judge={stories}", f"--info_judge={stories}"),
        f"--toxicity_classifier={small_classifier.save(str(tmp_path / 'classifier'))}",
        *("--paper_row=Tulu 2 7B", "--groups", SAMPLES),
    )  # fmt: skip
    server.shutdown()
    server.server_close()
    _, found = scores.load(out)
    assert all(one.metrics[0].value is not None for one in found)
    assert "pending" not in said and "54.7" in said  # the paper's average of seven
    by_name = {one.benchmark: one for one in found}
    assert by_name["mt_bench"].metrics[0].value == 3.0
    assert len(server.asked) == 1 + 2  # AlpacaEval's answer, two turns of MT-Bench
    assert set(by_name["mmlu"].metrics[0].groups) == {"anatomy", "virology"}
    assert {path: path.read_bytes() for path in before} == before
