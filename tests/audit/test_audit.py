"""`prepare --show` and `--check`: what is shown is what is trained on; differences are found."""

import json
import os
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import hypothesis
import pytest
from hypothesis import strategies as st
from raw_rows import messages, write_jsonl
from sentencepiece_models import trained

from tulu_jax.audit import check, pieces, show, show_html, show_text
from tulu_jax.data import chat, examples, loader, registry
from tulu_jax.interop import tokenizer_export

ROWS = 12
ODD = [
    {"messages": messages("I typed </s> here", "It is </s>, 2.\r\n\t<unk> is 0. \x1b[31m\u202e")},
    {"messages": [{"role": "system", "content": "Be <script>alert('&')</script>."}]
     + messages("Hi", "long " * 60, "And?", "💡 " * 30)},
    {"messages": messages("", "x", "<|assistant|>\nfake", "<s> naïve 東京")},
]  # fmt: skip


@pytest.fixture(scope="session")
def llama2_dir(shared_data) -> str:
    return str(shared_data / "tokenizer" / "llama2")


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def config(train: str, tokenizer: str, cache: str, **changes) -> loader.DataConfig:
    """A run on 300 rows of a task of tulu_tiny, or on all of another."""
    if train.startswith("tulu_tiny"):
        train = registry.Mixture(name="few", tasks={train: 300})
    values = {"max_length": 96, "cache_dir": cache, "accept_counts": True}
    return loader.DataConfig(train=train, tokenizer=tokenizer, **(values | changes))


def shown(data: loader.DataConfig, *, split: str = "train", count: int = ROWS):
    """(rows, shown rows) of a config, from row 1 on."""
    rows = loader.prepare(data, split=split)
    return rows, list(show.shown_rows(rows, first=1, count=count, split=split))


def raw_texts(data: loader.DataConfig, split: str, names: set[str]) -> dict[str, list[str]]:
    """By example: BOS and the rendered conversation, or that of both sides."""
    texts = {}
    for component in loader.split_components(data, split):
        loaded = examples.load_examples(component.task, data.drawing(component, split))
        for name, example in zip(loaded.ids, loaded.examples, strict=True):
            if name not in names:
                continue
            sides = (
                [example["messages"]]
                if "messages" in example
                else [example["prompt"] + example[side] for side in ("chosen", "rejected")]
            )
            texts[name] = ["<s>" + chat.render(side, chat=data.chat).text for side in sides]
    return texts


def text_of(*parts: show.Part) -> str:
    return "".join(piece.text for part in parts for piece in part.pieces)


def kept_ids(part: show.Part) -> list[int]:
    return [id for piece in part.pieces if piece.kind != "cut" for id in piece.ids]


TINY = [
    ("tulu_tiny", {}),
    ("tulu_tiny", {"max_length": 20, "chat": "paper"}),
    ("tulu_tiny", {"packing": "none", "chat": "open_instruct"}),
    ("tulu_tiny_preference", {}),
    ("tulu_tiny_preference", {"packing": "none", "chat": "paper"}),
]
REAL = [
    ("real_small_sft", {"max_length": 200}),
    ("real_small_dpo", {"max_length": 700, "chat": "paper"}),
    ("real_small_dpo", {"max_length": 400, "packing": "none", "chat": "open_instruct"}),
]


@pytest.mark.parametrize(("train", "changes"), TINY)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_tulu_tiny_is_shown_whole(tokenizer_dir, cache, train, changes, split):
    assert_shown_whole(config(train, tokenizer_dir, cache, **changes), split)


@pytest.mark.parametrize(("train", "changes"), REAL)
def test_real_rows_are_shown_whole(llama2_dir, shared_data, cache, train, changes):
    data = config(train, llama2_dir, cache, data_root=str(shared_data), **changes)
    cut = assert_shown_whole(data, "train")
    assert cut > 0


def assert_shown_whole(data: loader.DataConfig, split: str) -> int:
    """Every character once, each id and position as in the row, nothing lost; tokens cut."""
    rows, found = shown(data, split=split)
    names = {segment.example for row in found for segment in row.segments}
    texts, cut = raw_texts(data, split, names), 0
    for row in found:
        arrays = rows.row(row.index) if split == "train" else rows.in_order(row.index)
        assert row.tokens == (arrays["segment_ids"] > 0).sum()
        assert row.trained == arrays["loss_mask"].sum()
        assert sum(length for *_, length in row.runs) == row.capacity == arrays["tokens"].size
        assert sum(length for *_, trained, length in row.runs if trained) == row.trained
        targets = []
        for segment in row.segments:
            *prompt, first = segment.parts[:2] if rows.one_row else segment.parts[:1]
            shared = [*prompt] if rows.one_row else []
            sides = [(*shared, first)] + [
                (*shared, part) for part in segment.parts[len(shared) + 1 :]
            ]
            assert [text_of(*side) for side in sides] == texts[segment.example]
            for part in segment.parts:
                ids = kept_ids(part)
                has_start = part.name not in ("chosen", "rejected") or not rows.one_row
                targets += ids[1:] if has_start else ids
                assert len(ids) == part.tokens + has_start == part.last - part.first + 1 + has_start
                cut += part.cut
                assert not any(piece.kind in ("lost", "unknown") for piece in part.pieces)
        assert targets == arrays["targets"][arrays["segment_ids"] > 0].tolist()
    return cut


def test_trained_text_is_what_is_trained(tokenizer_dir, tokenizer, cache):
    for train, changes in TINY:
        rows, found = shown(config(train, tokenizer_dir, cache, **changes))
        for row in found:
            parts = [part for segment in row.segments for part in segment.parts]
            trained = [p for part in parts for p in part.pieces if p.trained]
            arrays = rows.row(row.index)
            ids = arrays["targets"][arrays["loss_mask"]]
            assert [id for piece in trained for id in piece.ids] == ids.tolist()
            text = tokenizer.decode(ids, skip_special=False)
            assert "".join(piece.text for piece in trained) == text
            assert sum(part.trained for part in parts) == row.trained > 0


@pytest.mark.parametrize("rule", ["cut", "whole_turns", "split", "drop"])
def test_truncated_rows_of_every_rule(tokenizer_dir, cache, add_task, tmp_path, rule):
    long = messages("one two", "three " * 9, "four five", "six " * 9, "seven", "eight " * 40)
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": long}, {"messages": messages("a", "b")}])
    add_task("t", {"train": str(tmp_path / "rows.jsonl")})
    data = config("t", tokenizer_dir, cache, max_length=100, truncation=rule, packing="none")
    _, found = shown(data, count=4)
    by_name = {row.segments[0].example: row.segments[0].parts[0] for row in found}
    whole = "<s>" + chat.render(long, chat="spec").text
    kept = {
        name: "".join(p.text for p in part.pieces if p.kind != "cut")
        for name, part in by_name.items()
    }
    if rule == "drop":
        assert set(by_name) == {"t/1"}
    elif rule == "split":
        assert set(by_name) == {"t/0.0", "t/0.1", "t/1"}
        assert kept["t/0.0"].endswith("six</s>") and not by_name["t/0.0"].cut
        assert kept["t/0.1"].startswith("<s><|user|>\nseven") and by_name["t/0.1"].cut
    else:
        assert text_of(by_name["t/0"]) == whole and whole.startswith(kept["t/0"])
        assert kept["t/0"] != whole and by_name["t/0"].cut > 20
        assert kept["t/0"].endswith("six</s>") == (rule == "whole_turns")


def test_character_cut_in_its_middle(llama2_dir, cache, add_task, tmp_path):
    """💡 is four ids; whatever is left of it, its character is shown once, with what was cut."""
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages("a", "b💡c")}])
    add_task("t", {"train": str(tmp_path / "rows.jsonl")})
    halves = []
    for length in range(17, 20):
        data = config("t", llama2_dir, cache, max_length=length)
        part = shown(data, count=1)[1][0].segments[0].parts[0]
        assert text_of(part) == "<s><|user|>\na\n<|assistant|>\nb💡c</s>"
        halves += [p for p in part.pieces if p.text == ""]
        assert [p.text for p in part.pieces if p.kind == "cut"][:1] != [""]
    assert [half.ids for half in halves] == [(243,), (243, 162), (243, 162, 149)]
    assert "�" in show_text.text(halves, colour=False)


CONTENTS = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
        st.sampled_from(["</s>", "<s>", "<unk>", "\n", "\r", " ", "💡", "<|user|>\n", "\u2581"]),
    ),
    max_size=5,
).map("".join)
CHATS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": CONTENTS}
    ),
    min_size=1,
    max_size=4,
)


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(CHATS, st.sampled_from(chat.MODES))
def test_tokens_of_any_conversation(tokenizer, conversation, mode):
    found = pieces.tokens(conversation, tokenizer=tokenizer, chat=mode)
    (ids,) = chat.tokenize([conversation], tokenizer=tokenizer, chat=mode, names=["t/0"])
    assert [token.id for token in found] == ids.ids.tolist()
    text = chat.render(conversation, chat=mode).text
    assert "".join(token.text for token in found) == "<s>" + text
    kinds = {k: [t.text for t in found if t.kind == k] for k in ("special", "typed", "tag")}
    answers = sum(m["role"] == "assistant" for m in conversation)
    assert kinds["special"] == ["<s>"] + ["</s>"] * answers
    contents = "\n".join(m["content"] for m in conversation)
    assert kinds["typed"] == re.findall("<s>|</s>|<unk>", contents)
    tags = "".join(f"<|{m['role']}|>" for m in conversation)
    assert re.sub(r"\s", "", "".join(kinds["tag"])) == tags


def visible_text(shown_pieces) -> str:
    return "".join(pieces.visible(piece.text) or "�" for piece in shown_pieces)


def odd_rows(tokenizer: str, cache: str, add_task, folder: pathlib.Path):
    write_jsonl(folder / "rows.jsonl", ODD)
    add_task("odd", {"train": str(folder / "rows.jsonl")})
    rows, found = shown(config("odd", tokenizer, cache, max_length=150), count=6)
    return show.facts(rows, split="train"), found


def test_terminal_with_colour_and_without(llama2_dir, cache, add_task, tmp_path):
    facts, found = odd_rows(llama2_dir, cache, add_task, tmp_path)
    parts = [part for row in found for segment in row.segments for part in segment.parts]
    assert {p.kind for part in parts for p in part.pieces} == set(show_text.MEANINGS)
    for part in parts:
        plain, coloured = (show_text.text(part.pieces, colour=c) for c in (False, True))
        visible = visible_text(part.pieces)
        assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == visible
        marks = r"⟦|⟧|\{typed (.*?)\}|\{cut ([^}]*)\}"
        assert re.sub(marks, lambda m: m[1] or m[2] or "", plain) == visible
        trained = visible_text(p for p in part.pieces if p.trained)
        inside = "".join(re.findall("⟦(.*?)⟧", plain, re.DOTALL))
        assert re.sub(marks, lambda m: m[1] or "", inside) == trained
    listed = "\n".join(show_text.listing(facts, found, colour=False))
    assert "\x1b" not in listed and "\u202e" not in listed
    assert "{typed </s>}" in listed and "{cut " in listed and "odd/1" in listed


def test_page_is_well_formed_and_holds_everything(llama2_dir, cache, add_task, tmp_path):
    facts, found = odd_rows(llama2_dir, cache, add_task, tmp_path)
    page = show_html.page(facts, found)
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))
    parts = [part for row in found for segment in row.segments for part in segment.parts]
    shown_texts = ["".join(pre.itertext()) for pre in root.iter("pre")]
    assert shown_texts == [visible_text(part.pieces) for part in parts]
    for part, pre in zip(parts, root.iter("pre"), strict=True):
        kinds = [span.get("class", "").split() for span in pre.iter("span")]
        assert ["trained" in kind for kind in kinds] == [p.trained for p in part.pieces]
        assert ["cut" in kind for kind in kinds] == [p.kind == "cut" for p in part.pieces]
        assert ["typed" in kind for kind in kinds] == [p.kind == "typed" for p in part.pieces]
    assert "odd/1" in "".join(root.itertext())
    assert "&lt;script&gt;alert(&#39;&amp;&#39;)" in "".join(
        re.sub("<[^>]*>", "", page).split("\n")
    )


def test_page_fetches_nothing(llama2_dir, cache, add_task, tmp_path):
    page = show_html.page(*odd_rows(llama2_dir, cache, add_task, tmp_path))
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))
    assert not {"script", "link", "img", "iframe", "object"} & {node.tag for node in root.iter()}
    names = {name for node in root.iter() for name in node.attrib}
    assert names <= {"lang", "charset", "name", "content", "class", "style", "title", "type", "id"}
    assert not re.search(r"https?:|//|url\(|@import", "".join(s.text for s in root.iter("style")))


def test_pair_branches_side_by_side(tokenizer_dir, cache):
    rows, found = shown(config("tulu_tiny_preference", tokenizer_dir, cache))
    prompt, chosen, rejected = found[0].segments[0].parts
    assert (prompt.name, chosen.name, rejected.name) == ("prompt", "chosen", "rejected")
    assert prompt.trained == 0 and chosen.trained == chosen.tokens
    assert chosen.first == rejected.first == prompt.last + 1
    assert text_of(prompt).endswith("<|assistant|>\n")
    assert text_of(chosen) == f"Sure: {text_of(rejected).removesuffix('</s>')}.</s>"
    page = show_html.page(show.facts(rows, split="train"), found)
    assert page.count('class="sides"') == sum(len(row.segments) for row in found)


def test_rows_that_have_changed_or_do_not_exist(tokenizer_dir, cache, add_task, tmp_path):
    file = tmp_path / "rows.jsonl"
    write_jsonl(file, [{"messages": messages("a", "b")}])
    add_task("t", {"train": str(file)})
    rows = loader.prepare(config("t", tokenizer_dir, cache), split="train")
    write_jsonl(file, [{"messages": messages("a", "c")}])
    with pytest.raises(ValueError, match=r"row t/0: it holds \d+ ids that are not the first of"):
        list(show.shown_rows(rows, first=0, count=1, split="train"))
    assert list(show.problems(rows, first=7, split="train")) == []
    (problem,) = show.problems(rows, first=7, split="validation")
    assert "it has rows 0 to 0" in problem
    assert list(show.problems(None, first=0, split="validation")) == [
        "there is no validation split to show"
    ]


@pytest.mark.parametrize(
    ("train", "mode", "real"),
    [
        ("tulu_tiny", "paper", False),
        ("tulu_tiny_preference", "open_instruct", False),
        ("real_small_sft", "spec", True),
        ("real_small_dpo", "paper", True),
    ],
)
def test_everything_is_equal(tokenizer_dir, cache, request, train, mode, real):
    pytest.importorskip("transformers")
    if real:
        tokenizer_dir = request.getfixturevalue("llama2_dir")
    root = str(request.getfixturevalue("shared_data")) if real else None
    data = config(train, tokenizer_dir, cache, chat=mode, data_root=root)
    outcomes = check.check(data)
    said = check.report(outcomes, data)
    assert not any(outcome.difference for outcome in outcomes), said
    assert said.endswith(f"all {len(outcomes)} cases are equal")
    assert sum(o.case.startswith("rows of") for o in outcomes) == len(
        loader.split_components(data, "train")
    )


def test_a_template_that_drops_system_turns(tokenizer_dir, tokenizer, cache, tmp_path):
    """As the released tokenizers' does."""
    pytest.importorskip("transformers")
    folder = str(tmp_path)
    tokenizer_export.save(tokenizer.backend, folder, max_length=None, mode="spec")
    file = tmp_path / "tokenizer_config.json"
    exported = json.loads(file.read_text())
    exported["chat_template"] = exported["chat_template"].replace(
        "in messages", "in messages if message['role'] != 'system'"
    )
    file.write_text(json.dumps(exported))
    data = config("tulu_tiny", tokenizer_dir, cache)
    outcomes = check.compare(data, exported=folder)
    different = {o.case: o.difference for o in outcomes if o.difference}
    assert "two system turns" in different and "no system turn" not in different
    found = different["plain"]
    assert found.what == "texts of the template" and found.at == len("<s><|")
    said = check.report(outcomes, data).splitlines()
    assert f"{len(different)} of {len(outcomes)} cases differ" in said
    assert "→  5   's'   'u'" in said


def test_a_tokenizer_that_changes_what_is_trained(tokenizer_dir, cache, tmp_path):
    """One with a normalizer: all ids agree, but they are not those of the assistant's words."""
    pytest.importorskip("transformers")
    content = json.loads(pathlib.Path(tokenizer_dir, "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    outcomes = check.check(config("tulu_tiny", str(tmp_path), cache))
    found = {o.case: o.difference for o in outcomes if o.difference}
    assert found["plain"].what == "trained texts" and found["plain"].at == 0
    assert (found["plain"].ours[0], found["plain"].theirs[0]) == ("'h'", "'H'")
    assert "numbers" not in found


def test_a_user_defined_piece_that_is_not_found_is_seen(cache, tmp_path):
    """The texts compared hold the pieces of the model: ordinary ones would not tell."""
    pytest.importorskip("transformers")
    (tmp_path / "tokenizer.model").write_bytes(trained(user_defined_symbols=["<sep>", "\n"]))
    good = check.check(config("tulu_tiny", str(tmp_path), cache))
    assert "its own user-defined pieces" in {o.case for o in good}
    assert not any(outcome.difference for outcome in good)
    content = json.loads(chat.load_tokenizer(str(tmp_path)).backend.to_str())
    pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    pattern["Regex"] = pattern["Regex"].replace("<sep>", "<sepp>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    outcomes = check.check(config("tulu_tiny", f"{tmp_path}/tokenizer.json", cache))
    found = {o.case: o.difference.what for o in outcomes if o.difference}
    assert found == {"its own user-defined pieces": "ids of tokenizer.model"}


def prepare(folder: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tulu_jax.prepare", "--gin_file=tulu_tiny_sft.gin"]
    return subprocess.run(
        [*command, *arguments], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip


def test_show_as_a_process(tmp_path):
    page = tmp_path / "rows.html"
    done = prepare(tmp_path, "--show=2", "--row=3", "--split=validation", f"--html={page}")
    assert done.returncode == 0, done.stderr
    assert "tulu_tiny, validation split" in done.stdout and "\x1b" not in done.stdout
    assert "━━ row 3 · " in done.stdout and "━━ row 4 · " in done.stdout
    assert "━━ row 5" not in done.stdout and "⟦" in done.stdout
    assert len(ElementTree.parse(page).getroot().findall("body/article")) == 2
    late = prepare(tmp_path, "--show=1", "--split=validation", "--row=100000")
    assert late.returncode == 2 and "it has rows 0 to" in late.stderr
    alone = prepare(tmp_path, f"--html={page}")
    assert alone.returncode == 2 and "give --show=N" in alone.stdout + alone.stderr


@pytest.mark.slow
def test_check_as_a_process_finds_a_tokenizer_json_unlike_its_model(llama2_dir, tmp_path):
    pytest.importorskip("transformers")
    model = pathlib.Path(llama2_dir, "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    content = json.loads(chat.load_tokenizer(llama2_dir).backend.to_str())
    merges = content["model"]["merges"]
    content["model"]["merges"] = [merge for merge in merges if "".join(merge) != "▁quick"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    done = prepare(tmp_path, "--check", f'--gin.TOKENIZER="{tmp_path}"')
    assert done.returncode == 1, done.stderr
    assert re.search(r"a very long message .* ids of tokenizer.model differ at", done.stdout)
    assert re.search(r"→ +\d+ +\d+ '▁qu' +\d+ '▁quick'", done.stdout)
