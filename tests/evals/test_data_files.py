"""Benchmark data: what is upstream is taken, what is not is named, what is broken is refused."""

import csv
import gzip
import io
import json
import shutil

import pytest
from etils import epath

from tulu_jax import validation
from tulu_jax.evals import bbh, data_files, mmlu, tydiqa

NAMES = ("mmlu", "gsm8k", "bbh", "tydiqa", "codex_eval", "truthfulqa", "toxigen")


@pytest.fixture(scope="module")
def data(shared_data):
    return epath.Path(shared_data / "eval")


def refused(folder, name, *, allow_altered=False) -> str:
    with pytest.raises(validation.UsageError) as error:
        data_files.load(folder, name, allow_altered=allow_altered)
    return str(error.value)


def put(folder, path: str, content: str | bytes) -> None:
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("name", ["alpaca_eval", "mt_bench"])
def test_whole_upstream_files_are_taken_without_a_note(data, name):
    files = data_files.load(data, name, allow_altered=False)
    assert files.notes == ()
    for file in data_files.upstream(name):
        assert len(files.content[file.path]) == file.rows


def test_rows_of_whole_files_are_those_of_the_table(data):
    """18 tasks of BBH and six languages of TyDiQA are there whole, and 38 subjects of MMLU."""
    whole = 0
    for name in ("bbh", "tydiqa", "mmlu"):
        table = {
            file.path: file
            for file in data_files.upstream("tydiqa_languages" if name == "tydiqa" else name)
        }
        files = data_files.load(data, name, allow_altered=True)
        altered = {note.partition(":")[0] for note in files.notes}
        for path, content in files.content.items():
            if path not in altered and table[path].rows is not None:
                assert len(content) == table[path].rows, path
                whole += 1
    assert whole == 18 + 6 + 38 + 57


def test_the_table_is_whole():
    rows = {name: [file.rows for file in data_files.upstream(name)] for name in NAMES}
    assert len(rows["mmlu"]) == 2 * 57 and sum(rows["mmlu"]) == 14_042 + 57 * 5
    assert len(rows["bbh"]) == 2 * 27
    assert rows["gsm8k"] == [1319] and rows["codex_eval"] == [164] and rows["truthfulqa"] == [817]
    assert rows["toxigen"] == [1000] * 14
    assert rows["tydiqa"] == [5077, 49_881]
    languages = [file.rows for file in data_files.upstream("tydiqa_languages")]
    assert (sum(languages[:9]), sum(languages[9:])) == (5077, 49_881)


@pytest.mark.parametrize("name", NAMES)
def test_a_part_is_refused_with_checksums_and_taken_when_allowed(data, name):
    said = refused(data, name)
    files = data_files.load(data, name, allow_altered=True)
    assert data_files.notes(data, name) == files.notes
    assert said.startswith(f"{len(files.notes)} problem")
    for note in files.notes:  # every file, at once
        assert f"{data}/{note}" in said
        path = note.partition(":")[0]
        expected = next(
            file
            for file in data_files.upstream(name) + data_files.upstream("tydiqa_languages")
            if file.path == path
        )
        assert (expected.sha256 or f"{expected.rows:,} rows") in note
    assert "allow_altered" in said


def test_no_file_at_all_is_refused_also_when_altered_ones_are_allowed(tmp_path):
    said = refused(tmp_path, "gsm8k", allow_altered=True)
    assert f"{tmp_path}/gsm/test.jsonl: missing; expected the file with sha256 3730d312" in said
    assert "upstream" not in said.partition("\n")[0]


def test_one_changed_byte_is_named_with_both_checksums(data, tmp_path):
    content = (data / "mt_bench/question.jsonl").read_bytes()
    shutil.copytree(data / "mt_bench", tmp_path / "mt_bench")
    (tmp_path / "mt_bench/question.jsonl").chmod(0o644)
    put(tmp_path, "mt_bench/question.jsonl", content.replace(b"Hawaii", b"Hawaij", 1))
    said = refused(tmp_path, "mt_bench")
    assert said.count("found sha256") == 1
    assert (
        "expected sha256 119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7" in said
    )


def test_the_checksum_of_a_gz_file_is_of_what_is_in_it(data, tmp_path):
    packed = (data / "codex_humaneval/HumanEval.jsonl.gz").read_bytes()
    put(tmp_path, "codex_humaneval/HumanEval.jsonl.gz", gzip.compress(gzip.decompress(packed), 1))
    notes = [data_files.notes(folder, "codex_eval") for folder in (data, tmp_path)]
    assert notes[0] == notes[1]


GSM = json.dumps({"question": "How many?", "answer": "Two.\n#### 2"})
BROKEN = [
    ("gsm8k", "gsm/test.jsonl", f"{GSM}\n{{'a'}}\n", "line 2: found no JSON"),
    ("gsm8k", "gsm/test.jsonl", f'{GSM}\n{{"question": 3}}\n', "line 2: found question = '3'"),
    ("gsm8k", "gsm/test.jsonl", '{"question": "a"}\n', "line 1: found no 'answer'"),
    ("gsm8k", "gsm/test.jsonl", '["a"]\n', "line 1: found a JSON list; expected an object"),
    ("gsm8k", "gsm/test.jsonl", f"{GSM}\n".encode() + b"\xff\n", "line 2: found the byte 0xff"),
    ("gsm8k", "gsm/test.jsonl", "version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ("gsm8k", "gsm/test.jsonl", "<!DOCTYPE html>\n", "found a web page"),
    ("bbh", "bbh/bbh/snarks.json", '{"canary": ""}', "found no 'examples'"),
    ("bbh", "bbh/bbh/snarks.json", '{"examples": [{"input": "a"}]}', "row 0: found no 'target'"),
    ("bbh", "bbh/bbh/snarks.json", "[", "found no JSON"),
    ("mmlu", "mmlu/test/anatomy_test.csv", "q,a,b,c,d,A\nq,a,b,c,A\n", "line 2: found 5 columns"),
    ("mmlu", "mmlu/test/anatomy_test.csv", "q,a,b,c,d,answer\n", "the last 'answer'; expected"),
    ("mmlu", "mmlu/test/anatomy_test.csv", 'q,"a\n', "line 1: not CSV"),
    ("truthfulqa", "truthfulqa/TruthfulQA.csv", "Type,Question\na,b\n", "expected ['Category']"),
    (
        "truthfulqa",
        "truthfulqa/TruthfulQA.csv",
        "Category,Question\na\n",
        "line 2: found 1 columns",
    ),
    ("codex_eval", "codex_humaneval/HumanEval.jsonl.gz", b"\x1f\x8b\x08\x00", "no whole gzip file"),
    ("codex_eval", "codex_humaneval/HumanEval.jsonl.gz", b"{}\n", "no whole gzip file"),
    (
        "tydiqa",
        "tydiqa/tydiqa-goldp-v1.1-dev.json",
        '{"data": [{}]}',
        "row 0: found no 'paragraphs'",
    ),
    ("toxigen", "toxigen/hate_women.txt", b"\xc3(\n", "line 1: found the byte 0xc3"),
]


@pytest.mark.parametrize(("name", "path", "content", "expected"), BROKEN)
def test_what_is_broken_is_refused_by_file_and_line(tmp_path, name, path, content, expected):
    put(tmp_path, path, content)
    said = refused(tmp_path, name, allow_altered=True)
    line = next(line for line in said.splitlines() if f"{tmp_path}/{path}: " in line)
    assert expected in line


def test_with_altered_data_allowed_only_what_is_broken_is_refused(tmp_path):
    put(tmp_path, "gsm/test.jsonl", "")
    put(tmp_path, "mmlu/dev/anatomy_dev.csv", "q,a,b,c,d,A\n")
    put(tmp_path, "mmlu/test/anatomy_test.csv", "q,a,b,c,d,E\n")
    assert refused(tmp_path, "mmlu").startswith("114 problems")
    assert refused(tmp_path, "mmlu", allow_altered=True).startswith("1 problem with")


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "gsm/test.jsonl").mkdir(parents=True)
    assert "found a folder, expected a file" in refused(tmp_path, "gsm8k")


def test_an_answer_without_a_number_is_named_by_line(tmp_path, tokenizer):
    from tulu_jax.evals import gsm8k

    put(tmp_path, "gsm/test.jsonl", f"{GSM}\n{GSM.replace('#### 2', '2')}\n")
    with pytest.raises(validation.UsageError, match="line 2: found an answer with no ####"):
        gsm8k.GSM8K(allow_altered=True).requests(tmp_path, tokenizer, is_chat=True)


def test_missing_tasks_and_subjects_leave_the_others(data, tokenizer):
    made = bbh.BBH(allow_altered=True).requests(data, tokenizer, is_chat=True)
    assert len({request.group for request in made}) == 18 and len(made) == 18 * 40
    made = mmlu.MMLU(allow_altered=True).requests(data, tokenizer, is_chat=True)
    assert len({request.group for request in made}) == 38 and len(made) == 9765


def test_a_question_of_an_unknown_language_is_named(tmp_path, tokenizer):
    rows = {"id": "klingon-1-0", "question": "?", "answers": [{"text": "a"}]}
    whole = {"data": [{"paragraphs": [{"context": "a", "qas": [rows]}]}]}
    put(tmp_path, "tydiqa/tydiqa-goldp-v1.1-dev.json", json.dumps(whole))
    with pytest.raises(validation.UsageError, match="'klingon-1-0'; expected an id that begins"):
        tydiqa.TyDiQA(allow_altered=True).requests(tmp_path, tokenizer, is_chat=True)


def test_cells_of_mmlu_are_those_that_pandas_reads(data):
    """What is lost is named by `NA_WORDS`; the rest of the recipe's prompts is the text itself."""
    pandas = pytest.importorskip("pandas")
    lost = 0
    for file in sorted((data / "mmlu").glob("*/*.csv")):
        text = file.read_text()
        theirs = pandas.read_csv(io.StringIO(text), header=None).to_numpy(object).tolist()
        rows = list(csv.reader(io.StringIO(text, newline="")))
        ours = [["nan" if cell in mmlu.NA_WORDS else cell for cell in row] for row in rows]
        assert ours == [[f"{cell}" for cell in row] for row in theirs], file
        lost += sum(a != b for a, b in zip(ours, rows, strict=True))
    assert lost == 3
