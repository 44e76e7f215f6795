"""The mixture card: every number of it from rows of known fate, its page, its pictures."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from raw_rows import messages, pair, write_jsonl

from tulu_jax.audit import benchmarks, card
from tulu_jax.data import chat, loader, registry
from tulu_jax.data.sources import name_filter

PNG = b"\x89PNG\r\n"


def built(config: loader.DataConfig, *, batch_size: int = 4, prompts=None) -> card.Card:
    splits = {split: loader.prepare(config, split=split) for split in registry.SPLITS}
    splits = {split: rows for split, rows in splits.items() if rows is not None}
    return card.build(config, splits, batch_size=batch_size, prompts=prompts)


def length(conversation: list[dict], tokenizer: chat.ChatTokenizer) -> int:
    (ids,) = chat.tokenize([conversation], tokenizer=tokenizer, chat="spec", names=["-"])
    return len(ids.ids) - 1


@pytest.fixture
def config(tmp_path, tokenizer_dir, add_task):
    """`config(name, rows, ...)` is a run over a task of these rows."""

    def make(name: str, rows: list[dict], *, kind="sft", filters=(), expected=None, **options):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
        source = {"train": str(tmp_path / f"{name}.jsonl")}
        add_task(name, source, kind=kind, filters=filters, expected=expected)
        options = {"train": name, "max_length": 256, "accept_counts": True} | options
        return loader.DataConfig(
            tokenizer=tokenizer_dir, cache_dir=str(tmp_path / "cache"), **options
        )

    return make


NAMED = (
    messages("Who made you?", "OpenAI did, and GPT-4 is my name."),
    messages("What did it hit?", "The ship was bombarded."),
    messages("And ChatGPT?", "No."),
)


def test_rows_and_tokens_before_and_after_filters(config, tokenizer):
    kept = [messages(f"question {i}", "answer") for i in range(5)]
    long = messages("go", "on " * 400)
    rows = [{"messages": m} for m in [*kept, *NAMED, long]]
    made = config("named", rows, filters=(name_filter.NAME_FILTER,), expected=10)
    numbers = built(made).numbers
    (task,) = numbers["tasks"]
    assert (task["raw_rows"], task["examples"], task["cut"]) == (9, 6, 1)
    assert task["dropped"] == {name_filter.NAME_FILTER.name: 3}
    assert (task["found"], task["expected"]) == (9, 10)
    assert task["tokens"] == sum(length(m, tokenizer) for m in kept) + 256
    assert task["tokens_filtered"] == sum(length(m, tokenizer) for m in NAMED)
    assert task["tokens_over_length"] == length(long, tokenizer) - 256
    assert pathlib.Path(task["aside"]).read_text().count("\n") == 3


def test_the_name_filter_by_name(config):
    rows = [{"messages": m} for m in (*NAMED, messages("a", "b"))]
    found = built(config("by_name", rows, filters=(name_filter.NAME_FILTER,))).numbers
    assert found["name_filter"] == {
        "rows": 3,
        "names": {
            "OpenAI": {"rows": 1, "alone": 0},
            "GPT-4": {"rows": 1, "alone": 0},
            "BARD": {"rows": 1, "alone": 1},
            "ChatGPT": {"rows": 1, "alone": 1},
        },
    }
    assert built(config("no_names", rows)).numbers["name_filter"] is None


@pytest.mark.parametrize("rule", ["cut", "whole_turns", "drop"])
def test_tokens_before_are_those_of_the_whole_rows(config, tokenizer, rule):
    """Whatever becomes of long rows, what is kept and what is taken add up."""
    chats = [messages("a", "b " * n, "c", "d") for n in (2, 40, 300)]
    made = config(f"long_{rule}", [{"messages": m} for m in chats], max_length=64, truncation=rule)
    (task,) = built(made).numbers["tasks"]
    before = task["tokens"] + task["tokens_filtered"] + task["tokens_over_length"]
    assert before == sum(length(m, tokenizer) for m in chats)


def test_tokens_before_of_split_rows_are_those_of_the_parts(config, tokenizer):
    short, long = messages("a", "b", "c", "d"), messages("a", "b " * 300)
    rows = [{"messages": short}, {"messages": long + messages("c", "d")}]
    made = config("split", rows, max_length=64, truncation="split")
    prompt = [benchmarks.Prompt("b", "0", "b " * 20)]
    whole = built(made, prompts=prompt)
    (task,) = whole.numbers["tasks"]
    assert (task["examples"], task["added_parts"], task["cut"]) == (3, 1, 1)
    assert task["tokens_over_length"] == length(long, tokenizer) - 64
    assert [m["row"] for m in whole.matches] == ["split/1"]


def test_lengths_packings_and_updates_are_those_of_the_loader(config):
    rng = np.random.default_rng(0)
    rows = [{"messages": messages("q", "w " * int(n))} for n in rng.integers(1, 90, 300)]
    made = config("lengths", rows)
    prepared = loader.prepare(made, split="train")
    numbers = built(made, batch_size=3).numbers
    lengths = prepared.store.lengths
    assert numbers["lengths"]["mean"] == pytest.approx(lengths.mean())
    assert numbers["lengths"]["25 %"] == np.percentile(lengths, 25)
    assert sum(numbers["lengths"]["histogram"]["counts"]) == 300
    packed, none, original = numbers["packings"]
    assert packed["rows"] == prepared.rows_per_epoch
    assert packed["used"] == pytest.approx(prepared.stats.packing_efficiency)
    assert none["rows"] == 300 and none["used"] == pytest.approx(lengths.mean() / 256)
    assert original["used"] == pytest.approx(lengths.mean() / 8192)
    configured, paper = numbers["updates"]
    assert configured["rows"] == 3
    assert configured["all"] == [
        sum(len(prepared.examples(row)) for row in range(3 * update, 3 * update + 3))
        for update in range(prepared.rows_per_epoch // 3)
    ]
    assert configured["std"] == pytest.approx(np.std(configured["all"]))
    assert paper["rows"] == round(128 / (300 / prepared.rows_per_epoch))
    assert numbers["lengths"]["paper"]["mean"] == 1097


def test_pairs_in_both_packings(config):
    rows = [pair(f"q{i} " + "z " * 30, "yes " * 12, "no " * 6) for i in range(20)]
    found = {}
    for packing in ("best_fit", "none"):
        made = config(f"pairs_{packing}", rows, kind="preference", packing=packing)
        found[packing] = built(made).numbers
        branches, plain, original = found[packing]["packings"]
        assert plain["rows"] == 40 and original["row_length"] == 8192
        assert branches["used"] > plain["used"] > original["used"] > 0
        assert branches["too_long"] == 0
        assert found[packing]["lengths"]["count"] == 40
        assert found[packing]["lengths"]["paper"] is None
        assert found[packing]["audit"]["length"]["chosen_longer"] == 20
    assert found["best_fit"]["packings"] == found["none"]["packings"]
    configured, paper = found["none"]["updates"]
    assert configured["expected"] == 4 and configured["std"] == 0 and configured["updates"] == 5
    assert found["best_fit"]["updates"][1] == paper and paper["packing"] == "best_fit"
    assert paper["rows"] == round(32 / (20 / found["none"]["packings"][0]["rows"]))
    assert paper["updates"] == 0 and paper["std"] is None


def test_pairs_too_long_for_one_row_are_counted_apart(config):
    rows = [pair("q", "yes " * 40, "no " * 40), pair("r", "yes", "no")]
    made = config("wide", rows, kind="preference", packing="none", max_length=80)
    branches, plain, _ = built(made).numbers["packings"]
    assert branches["too_long"] == 1 and branches["rows"] == 1 and plain["too_long"] == 0


def test_overlaps_are_of_the_rows_that_are_trained_on(config):
    prompt = "one two three four five six seven eight nine ten"
    rows = [{"messages": messages(prompt, answer)} for answer in ("yes", "ask OpenAI", "no")]
    made = config("overlaps", rows, filters=(name_filter.NAME_FILTER,))
    whole = built(made, prompts=[benchmarks.Prompt("b", "7", prompt)])
    assert [(m["row"], m["item"], m["grade"]) for m in whole.matches] == [
        ("overlaps/0", "7", "whole"),
        ("overlaps/2", "7", "whole"),
    ]
    found = whole.numbers["contamination"]
    assert found["rows"] == found["rows_with_a_match"] == 2
    assert found["by_task"] == {"overlaps": {"b": 2}}


def test_validation_rows_are_counted_and_not_audited(config):
    rows = [{"messages": messages(f"q {i}", "a")} for i in range(10)]
    made = config("held", rows, holdout_every=5)
    tasks = built(made).numbers["tasks"]
    assert [(t["split"], t["examples"]) for t in tasks] == [("train", 8), ("validation", 2)]


def test_repeated_upstream_ids_are_said(config, tmp_path):
    rows = [{"messages": messages(f"q {i}", "a"), "about": {"id": "same"}} for i in range(3)]
    page = card.write(built(config("again", rows)), tmp_path / "data")
    assert "Kept with the upstream id of an earlier row: 2 of again." in page


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_what_is_written(config, tmp_path, kind):
    rows = [{"messages": messages(f"q {i} | `x`", "a b c")} for i in range(12)]
    if kind == "preference":
        rows = [pair(f"q {i}", "a b c d", "a `|` b") for i in range(12)]
    made = config(f"written_{kind}", rows, kind=kind)
    whole = built(made, batch_size=1, prompts=[benchmarks.Prompt("b", "0", "a b c d e")])
    page = card.write(whole, tmp_path / "data")
    assert (tmp_path / "data/card.md").read_text(encoding="utf-8") == page
    assert json.loads((tmp_path / "data/card.json").read_text()) == whole.numbers
    assert (tmp_path / "data/contamination.jsonl").read_text() == ""
    pictures = sorted(path.name for path in (tmp_path / "data").glob("*.png"))
    wanted = {"components.png", "lengths.png", "updates.png"}
    if kind == "preference":
        wanted |= {"pair_lengths.png", "pair_regularities.png", "pair_similarity.png"}
    assert set(pictures) == wanted
    for name in pictures:
        assert (tmp_path / "data" / name).read_bytes().startswith(PNG)
        assert page.count(f"]({name})") == 1
    for block in page.split("\n\n"):
        if block.startswith("|"):  # every line of a table has the cells of its head
            lines = [line.replace("\\|", "") for line in block.splitlines()]
            assert len({line.count("|") for line in lines}) == 1, block


def prepare(*arguments: str, cwd: pathlib.Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tulu_jax.prepare", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_the_command_prints_and_writes_the_card(tmp_path):
    done = prepare("--gin_file=tulu_tiny_dpo.gin", "--workdir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "run/data/card.md").read_text(encoding="utf-8")
    assert page in done.stdout and page.startswith("# Mixture card: tulu_tiny_preference\n")
    numbers = json.loads((tmp_path / "run/data/card.json").read_text())
    assert {t["split"] for t in numbers["tasks"]} == {"train", "validation"}
    assert numbers["audit"]["length"]["longer_chosen"]["chosen_share"] == 1.0
    assert numbers["contamination"] is None


@pytest.mark.slow
def test_the_command_on_real_pairs_with_real_benchmarks(tmp_path, shared_data):
    done = prepare(
        "--gin_file=stories260k_dpo.gin",
        f'--gin.DATA_ROOT="{shared_data}"',
        "--gin.HOLDOUT_EVERY=None",
        "--gin.MAX_LENGTH=2048",
        f"--eval_data={shared_data / 'eval'}",
        "--workdir=run",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "run/data/card.json").read_text())
    (task,) = numbers["tasks"]
    assert task["dropped"]["equal scores"] == 53 and task["raw_rows"] == 500
    found = {b["benchmark"]: b["rows"] for b in numbers["contamination"]["benchmarks"]}
    assert len(found) == 14
    assert found["gsm train"]["whole"] == 1 and found["truthfulqa"]["whole"] == 0


def test_the_command_refuses_a_folder_without_benchmarks(tmp_path):
    done = prepare("--gin_file=tulu_tiny_sft.gin", "--eval_data=nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert "--eval_data: nowhere: found no benchmark; expected some of" in done.stderr
    assert "Traceback" not in done.stderr
