"""Benchmark prompts in training rows: what is planted is found, what nearly matches is not."""

import collections
import gzip
import json

import hypothesis
import pytest
from hypothesis import strategies
from raw_rows import messages, pair

from tulu_jax.audit import benchmarks, contamination, ngrams
from tulu_jax.data import components, examples

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"


def prompts(*texts: str, benchmark: str = "b") -> list[benchmarks.Prompt]:
    return [benchmarks.Prompt(benchmark, str(i), text) for i, text in enumerate(texts)]


def found(given: list[benchmarks.Prompt], *contents: str) -> list[contamination.Match]:
    """Matches in one conversation of these messages."""
    index = contamination.Index(given)
    return list(index.matches([("t/0", {"messages": messages(*contents)})]))


def grades(given: list[benchmarks.Prompt], *contents: str) -> list[str]:
    return [contamination.grade_of(match) for match in found(given, *contents)]


def test_words_leave_case_punctuation_and_spacing_out():
    assert ngrams.words("Don't\n PANIC — 42_000!") == ["don", "t", "panic", "42", "000"]
    assert ngrams.words("東京 is ขอ") == ["東", "京", "is", "ข", "อ"]
    assert ngrams.words("") == []


def test_rolling_hashes_tell_ngrams_apart_by_words_and_order():
    hashes = ngrams.word_hashes(["a", "b", "a", "b", "b", "a"])
    for n, grams in enumerate(ngrams.rolling(hashes, 8), 1):
        assert len(grams) == max(0, 6 - n + 1)
    two = ngrams.rolling(hashes, 2)[1].tolist()
    assert two[0] == two[2] and two[1] == two[4] and len(set(two)) == 3


def test_a_planted_prompt_is_found_whole_in_other_case_and_punctuation():
    (match,) = found(prompts(LONG), "hello", f"He said: “{LONG.upper().replace(' ', ', ')}”!")
    assert (match.row, match.place, match.prompt) == ("t/0", "messages 1 (assistant)", 0)
    assert match.whole and match.words == match.of == 15 and match.text == LONG


def test_a_shared_stretch_counts_from_n_words_on():
    assert contamination.Index(prompts(LONG)).n == {"b": 13}
    words = LONG.split()
    assert grades(prompts(LONG), " ".join(words[:13])) == ["most"]
    assert grades(prompts(LONG), " ".join(words[:12])) == []
    assert grades(prompts(LONG), " ".join([*words[:7], "x", *words[8:]])) == []
    assert grades(prompts(LONG), " ".join(reversed(words))) == []


def test_less_than_half_of_a_prompt_is_a_part():
    prompt = " ".join(f"w{i}" for i in range(40))
    assert grades(prompts(prompt), " ".join(f"w{i}" for i in range(5, 19))) == ["part"]
    pieces = [" ".join(f"w{i}" for i in range(start, start + 13)) for start in (0, 13, 27)]
    (match,) = found(prompts(prompt), " x ".join(pieces))
    assert match.words == 39 and not match.whole


def test_short_prompts_must_be_there_whole():
    assert contamination.Index(prompts("who are you now friend")).n == {"b": 8}
    assert grades(prompts("who are you now friend"), "Tell me: who are you now, friend?") == [
        "whole"
    ]
    assert grades(prompts("who are you now friend"), "Tell me: who are you now, fiend?") == []


def test_the_shortest_prompts_must_be_a_whole_message():
    assert grades(prompts("Who are you?"), "who are you") == ["whole"]
    assert grades(prompts("Who are you?"), "So, who are you?") == []
    assert grades(prompts("?!"), "?!", "") == []


def test_n_is_the_fifth_percentile_of_a_benchmark_between_8_and_13():
    given = prompts(*[" ".join(["w"] * n) for n in range(1, 21)])
    given += prompts(*[" ".join(["w"] * n) for n in range(10, 31)], benchmark="middle")
    given += prompts(" ".join(["w"] * 99), benchmark="long")
    assert contamination.Index(given).n == {"b": 8, "middle": 11, "long": 13}


def test_what_many_prompts_of_a_benchmark_share_is_its_template():
    template = "please read the following text with care and then answer the question below"
    items = [f"{template} {' '.join(f'{c}{i}' for i in range(9))}" for c in "abcdefghijk"]
    assert grades(prompts(*items[:10]), template) == ["most"] * 10
    assert grades(prompts(*items), template) == []
    assert len(found(prompts(*items), items[3])) == 1


def test_no_match_crosses_messages_or_rows():
    words = LONG.split()
    halves = " ".join(words[:8]), " ".join(words[8:])
    assert found(prompts(LONG), *halves) == []
    index = contamination.Index(prompts(LONG))
    rows = [(f"t/{i}", {"messages": messages(half)}) for i, half in enumerate(halves)]
    assert list(index.matches(rows)) == []


def test_every_side_of_a_pair_is_searched():
    index = contamination.Index(prompts(LONG))
    for key, example in (
        ("prompt 0 (user)", pair(LONG, "a", "b")),
        ("chosen 0 (assistant)", pair("a", LONG, "b")),
        ("rejected 0 (assistant)", pair("a", "b", LONG)),
    ):
        assert [m.place for m in index.matches([("t/0", example)])] == [key]


@hypothesis.given(
    strategies.lists(strategies.text("abc ", max_size=60), min_size=1, max_size=5),
    strategies.lists(strategies.text("abc ", max_size=120), min_size=1, max_size=3),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_matches_are_those_of_comparing_every_stretch(texts, contents):
    """The hashed search against the definition, over texts of few words."""
    given_prompts = prompts(*texts)
    index = contamination.Index(given_prompts)
    index.n = dict.fromkeys(index.n, 9)
    ours = {
        (match.prompt, int(match.place.split()[1]), match.whole)
        for match in index.matches([("t/0", {"messages": messages(*contents)})])
    }
    expected = set()
    for number, text in enumerate(texts):
        for place, content in enumerate(contents):
            prompt, message = ngrams.words(text), ngrams.words(content)
            longest = common(prompt, message)
            enough = 0 < min(9, len(prompt)) <= longest
            if len(prompt) < contamination.SHORTEST:
                enough = bool(prompt) and prompt == message
            if enough:
                expected.add((number, place, longest == len(prompt)))
    assert ours == expected


def common(ours: list[str], theirs: list[str]) -> int:
    """Length of the longest common stretch."""
    return max(
        (
            size
            for i in range(len(ours))
            for j in range(len(theirs))
            for size in range(1, len(ours) - i + 1)
            if ours[i : i + size] == theirs[j : j + size]
        ),
        default=0,
    )


def test_a_prompt_and_a_row_count_once_by_their_best_match():
    index = contamination.Index(prompts(LONG))
    part = " ".join(LONG.split()[:13])
    rows = [("t/0", {"messages": messages(part, LONG)}), ("t/1", {"messages": messages(part)})]
    matches = list(index.matches(rows))
    (line,) = contamination.summary(index, matches)
    assert line["prompts_found"] == {"whole": 1, "most": 0, "part": 0}
    assert line["rows"] == {"whole": 1, "most": 1, "part": 0}
    assert [m["grade"] for m in contamination.listed(index, matches)] == ["whole", "most", "most"]


def test_layouts_of_the_benchmarks(tmp_path):
    write = {
        "mmlu/test/law_test.csv": 'What holds?,"a, b",c,d,e,B\n' + f"{LONG},a,b,c,d,A\n",
        "gsm/train.jsonl": json.dumps({"question": "gsm q", "answer": "1"}) + "\n\n",
        "bbh/bbh/sports.json": json.dumps({"examples": [{"input": "bbh q", "target": "yes"}]}),
        "truthfulqa/TruthfulQA.csv": 'Type,Question\nA,"tq, q"\n',
        "toxigen/hate_x.txt": "- a\\n- b\n",
        "alpaca_eval/ref.json": json.dumps([{"instruction": "ae q"}]),
        "mt_bench/question.jsonl": json.dumps({"question_id": 81, "turns": ["one", "two"]}),
        "tydiqa/thai_tydiqa_dev.json": json.dumps(
            {"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "7", "question": "q"}]}]}]}
        ),
    }
    for name, text in write.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    human = tmp_path / "codex_humaneval/HumanEval.jsonl.gz"
    human.parent.mkdir()
    human.write_bytes(gzip.compress(json.dumps({"task_id": "H/0", "prompt": "def"}).encode()))
    read = {(p.benchmark, p.item): p.text for p in benchmarks.read_prompts(str(tmp_path))}
    assert read == {
        ("mmlu test", "law_test/0"): "What holds?\na, b\nc\nd\ne",
        ("mmlu test", "law_test/1"): LONG,
        ("gsm train", "0"): "gsm q",
        ("bbh", "sports/0"): "bbh q",
        ("truthfulqa", "0"): "tq, q",
        ("toxigen", "hate_x/0"): "- a\n- b",
        ("alpaca_eval", "0"): "ae q",
        ("mt_bench", "81 turn 1"): "one",
        ("mt_bench", "81 turn 2"): "two",
        ("tydiqa dev questions", "7"): "q",
        ("tydiqa dev passages", "7"): "c",
        ("codex_humaneval", "H/0"): "def",
    }
    human.write_bytes(human.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"HumanEval\.jsonl\.gz: not in the layout"):
        benchmarks.read_prompts(str(tmp_path))


def test_a_folder_without_benchmarks_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found no benchmark; expected some of mmlu/dev"):
        benchmarks.read_prompts(str(tmp_path))


@pytest.fixture(scope="module")
def real_index(shared_data) -> contamination.Index:
    return contamination.Index(benchmarks.read_prompts(str(shared_data / "eval")))


def loaded(task: str, shared_data) -> list[tuple[str, dict]]:
    (component,) = components.of(task)
    drawing = examples.Drawing(
        split="train", amount=None, seed=0, holdout_every=None, data_root=str(shared_data)
    )
    result = examples.load_examples(component.task, drawing)
    return list(zip(result.ids, result.examples, strict=True))


def rows_of(index: contamination.Index, rows, grade: str) -> collections.Counter:
    """Rows with a match of that grade, by benchmark."""
    matches = list(index.matches(rows))
    return collections.Counter(
        {b["benchmark"]: b["rows"][grade] for b in contamination.summary(index, matches)}
    )


def test_real_prompts_and_their_n(real_index):
    counts = collections.Counter(prompt.benchmark for prompt in real_index.prompts)
    assert counts["mmlu test"] == 9765 and counts["truthfulqa"] == 545
    assert counts["gsm train"] == 600 and counts["gsm test"] == 880
    assert real_index.n["truthfulqa"] == 8 and real_index.n["gsm test"] == 13


def test_gsm8k_train_is_in_cot_and_gsm8k_test_is_not(real_index, shared_data):
    rows = loaded("flan_cot", shared_data)
    assert +rows_of(real_index, rows, "whole") == {"gsm train": 400}
    assert +rows_of(real_index, rows, "most") == {} == +rows_of(real_index, rows, "part")


def test_what_is_in_the_real_rows_of_ultrafeedback(real_index, shared_data):
    """One GSM8K train question; of TruthfulQA none, in this sample of a cleaned set."""
    rows = loaded("ultrafeedback_binarized", shared_data)
    assert +rows_of(real_index, rows, "whole") == {"gsm train": 1}
    (match,) = [m for m in real_index.matches(rows) if m.whole]
    assert (match.row, match.place) == ("ultrafeedback_binarized/487", "prompt 0 (user)")
    assert real_index.prompts[match.prompt].item == "481"


def test_alpaca_eval_prompts_are_in_the_oasst_trees(real_index, shared_data):
    rows = loaded("oasst1_sample", shared_data)
    assert +rows_of(real_index, rows, "whole") == {"alpaca_eval": 4}


def test_truthfulqa_questions_planted_in_ultrafeedback_are_found(real_index, shared_data):
    """Every one that is put in, and none with its middle word changed."""
    rows = loaded("ultrafeedback_binarized", shared_data)
    questions = [p for p in real_index.prompts if p.benchmark == "truthfulqa"]
    planted, changed = [], []
    for (name, example), question in zip(rows, questions, strict=False):
        words = question.text.split()
        words[len(words) // 2] = "xylophone"
        for target, text in ((planted, question.text), (changed, " ".join(words))):
            target.append((name, {**example, "prompt": messages(text)}))
    assert rows_of(real_index, planted, "whole")["truthfulqa"] == len(rows) == 445
    assert rows_of(real_index, changed, "whole")["truthfulqa"] == 0
