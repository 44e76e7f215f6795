"""What lies in a tokenizer's folder: added tokens, two files that disagree, damaged files."""

import json
import pathlib
import shutil

import pytest
from sentencepiece_models import trained

from tulu_jax.data import chat, data_checks, loader, tokenizer_files
from tulu_jax.interop import tokenizer_export

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 499723\n"


def token(content: str, *, special: bool, lstrip: bool = False, rstrip: bool = False) -> dict:
    flags = {"lstrip": lstrip, "rstrip": rstrip, "normalized": not special, "single_word": False}
    return {"content": content, "special": special} | flags


DECODER = {
    "301": token("<b>", special=False, rstrip=True),
    "300": token("<pad>", special=True, lstrip=True),
}
# What lies beside, and the ids of the tokens that it adds, as transformers gives them.
BESIDE = {
    "nothing": ({}, {}),
    "Tulu's pad": ({"added_tokens.json": {"<pad>": 300}}, {"<pad>": 300}),
    "added tokens": ({"added_tokens.json": {"<b>": 301, "<pad>": 300}}, {"<b>": 301}),
    "decoder": ({"tokenizer_config.json": {"added_tokens_decoder": DECODER}}, {"<b>": 301}),
    "decoder before added tokens": (
        {
            "tokenizer_config.json": {"added_tokens_decoder": {"300": DECODER["300"]}},
            "added_tokens.json": {"<b>": 300},
        },
        {"<pad>": 300},
    ),
    "one by name": ({"special_tokens_map.json": {"pad_token": "<pad>"}}, {"<pad>": 300}),
    "several by name": (
        {
            "tokenizer_config.json": {"pad_token": "<pad>", "sep_token": "<b>"},
            "special_tokens_map.json": {"additional_special_tokens": ["<c>"]},
        },
        {"<b>": 300, "<pad>": 301, "<c>": 302},
    ),
    "names of Code Llama": (
        {"tokenizer_config.json": {"prefix_token": "\u2581the", "fill_token": "<FILL_ME>"}},
        {"\u2581the": 263},
    ),
    "flags of the map": (
        {
            "special_tokens_map.json": {"pad_token": token("<pad>", special=True, rstrip=True)},
            "added_tokens.json": {"<pad>": 300},
        },
        {"<pad>": 300},
    ),
    "a piece of the vocabulary": (
        {"tokenizer_config.json": {"additional_special_tokens": ["\u2581the"]}},
        {"\u2581the": 263},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
    """A model of 300 pieces."""
    file = tmp_path_factory.mktemp("model") / "tokenizer.model"
    file.write_bytes(trained(vocab_size=300))
    return file


def write(folder: pathlib.Path, files: dict) -> str:
    for name, value in files.items():
        (folder / name).write_bytes(
            value if isinstance(value, bytes) else json.dumps(value).encode()
        )
    return str(folder)


@pytest.mark.parametrize("name", BESIDE)
def test_added_tokens_have_their_ids_here_and_in_the_export(model, tmp_path, name):
    """As with slow Llama tokenizers: the text is split at them, and the library gets the rest."""
    transformers = pytest.importorskip("transformers")
    beside, ids = BESIDE[name]
    shutil.copy(model, tmp_path)
    ours = chat.load_tokenizer(write(tmp_path, beside))
    assert {text: ours.encode(text) for text in ids} == {text: [id] for text, id in ids.items()}
    library = tokenizer_files.Library(tmp_path / "tokenizer.model", ours.backend)
    assert set(library.added) >= set(ids)
    out = str(tmp_path / "out")
    tokenizer_export.save(ours.backend, out, max_length=None, mode="spec")
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    for text in tokenizer_files.probes(["<pad>", "<b>", "<c>", "\u2581the", " the", "</s>"]):
        assert ours.encode(text) == library.encode(text), text
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text), text
    assert len(theirs) == ours.vocab_size == max(300, *(id + 1 for id in (0, *ids.values())))


def test_tokens_beside_a_tokenizer_json_are_added_too(model, tmp_path):
    chat.load_tokenizer(str(model)).backend.save(str(tmp_path / "tokenizer.json"))
    folder = write(tmp_path, {"tokenizer_config.json": {"added_tokens_decoder": DECODER}})
    assert chat.load_tokenizer(folder).encode("<pad><b>") == [300, 301]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"added_tokens.json": {"<pad>": 305}},
            r"added_tokens.json: gives '<pad>' the id 305, but with tokenizer.model it has 300",
        ),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"7": token("<s>", special=True)}}},
            r"tokenizer_config.json: gives '<s>' the id 7, but with tokenizer.model it has 1",
        ),
        ({"added_tokens.json": [1]}, r"added_tokens.json: found a list; expected an object"),
        ({"added_tokens.json": {"<pad>": "x"}}, r"its added tokens are not readable"),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"300": {}}}},
            r"tokenizer_config.json: its added tokens are not readable \(KeyError\('content'\)",
        ),
        ({"tokenizer_config.json": b'{"a": '}, r"tokenizer_config.json: is not whole JSON"),
        ({"special_tokens_map.json": LFS}, r"special_tokens_map.json: found a Git LFS pointer"),
    ],
)
def test_tokens_beside_that_do_not_fit_are_refused(model, tmp_path, files, message):
    shutil.copy(model, tmp_path)
    with pytest.raises(ValueError, match=message):
        chat.load_tokenizer(write(tmp_path, files))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", LFS, r".* the file of 499,723 bytes .* run `git lfs pull`"),
        ("tokenizer.model", LFS, r"found a Git LFS pointer"),
        ("tokenizer.json", b"<!DOCTYPE html><html>", r"found a web page"),
        ("tokenizer.model", b"\n <html><body>no", r"found a web page"),
        ("tokenizer.json", b"", r"is empty; download it again"),
        ("tokenizer.model", b"", r"not a SentencePiece model \(no pieces\); download it again"),
        ("tokenizer.json", b'{"version": "1.0", "mod', r"is not whole JSON .* download it again"),
        ("tokenizer.json", b"\xff\xfe{", r"is not whole JSON"),
        ("tokenizer.json", b'{"hidden_size": 3}', r"found \['hidden_size'\], expected a tokenizer"),
        ("tokenizer.json", b"[]", r"found list, expected a tokenizer.json"),
        (
            "tokenizer.json",
            b'{"model": {"type": "Newer", "vocab": {}}}',
            r"tokenizers [\d.]+ cannot read it .*newer format: install a newer tokenizers",
        ),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, name, content, message):
    folder = write(tmp_path, {name: content})
    for path in (folder, f"{folder}/{name}"):
        with pytest.raises(ValueError, match=rf"{name}: {message}"):
            chat.load_tokenizer(path)
    config = loader.DataConfig(train="tulu_tiny", tokenizer=folder, max_length=64)
    (problem,) = data_checks.problems(config, kind="sft")
    assert problem.startswith("tokenizer: ") and "\n" not in problem


def test_a_newer_normalizer_is_named(model, tmp_path):
    content = json.loads(chat.load_tokenizer(str(model)).backend.to_str())
    content["normalizer"] = {"type": "Newer"}
    with pytest.raises(ValueError, match=r"tokenizer.json: tokenizers .* cannot read it"):
        chat.load_tokenizer(write(tmp_path, {"tokenizer.json": content}))


@pytest.mark.parametrize(
    ("held", "path", "message"),
    [
        ([], "", r": found no tokenizer; expected .* there, and it is empty"),
        (
            ["vocab.json", "merges.txt"],
            "",
            r"\(it has merges.txt, vocab.json\)\. If transformers opens .* writes tokenizer.json",
        ),
        ([], "nowhere", r"nowhere: found no tokenizer, as there is no such file or folder"),
        (["tokenizer.bin"], "tokenizer.bin", r"expected a tokenizer.json, a SentencePiece file"),
    ],
)
def test_a_path_without_a_tokenizer_says_what_is_there(tmp_path, held, path, message):
    for name in held:
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        chat.load_tokenizer(str(tmp_path / path))


def test_a_name_on_the_hub_is_told_how_to_become_a_folder():
    with pytest.raises(FileNotFoundError, match=r"`hf download meta-llama/Llama-2-7b-hf --include"):
        chat.load_tokenizer("meta-llama/Llama-2-7b-hf")


def test_files_that_disagree_are_refused_until_one_is_named(model, tmp_path):
    shutil.copy(model, tmp_path)
    content = json.loads(chat.load_tokenizer(str(model)).backend.to_str())
    content["normalizer"] = content["normalizer"]["normalizers"][1]
    folder = write(tmp_path, {"tokenizer.json": content})
    with pytest.raises(
        ValueError, match=r"give different ids for .*Name the one .*--gin.TOKENIZER"
    ):
        chat.load_tokenizer(folder)
    by_json = chat.load_tokenizer(f"{folder}/tokenizer.json")
    by_model = chat.load_tokenizer(f"{folder}/tokenizer.model")
    assert by_json.encode("a") != by_model.encode("a")


def test_a_token_that_only_the_tokenizer_json_adds(model, tmp_path):
    """Beyond the pieces of the model, the two cannot disagree."""
    shutil.copy(model, tmp_path)
    content = json.loads(chat.load_tokenizer(str(model)).backend.to_str())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 300, "content": "<pad>"})
    assert chat.load_tokenizer(write(tmp_path, {"tokenizer.json": content})).vocab_size == 301


def test_legacy_false_is_not_passed_over_in_silence(model, tmp_path, caplog):
    shutil.copy(model, tmp_path)
    ids = chat.load_tokenizer(str(tmp_path)).encode("a</s>b")
    folder = write(tmp_path, {"tokenizer_config.json": {"legacy": False}})
    assert chat.load_tokenizer(folder).encode("a</s>b") == ids
    assert "says legacy = False" in caplog.text


def test_a_model_that_cannot_be_read_does_not_shut_out_its_tokenizer_json(model, tmp_path):
    chat.load_tokenizer(str(model)).backend.save(str(tmp_path / "tokenizer.json"))
    folder = write(tmp_path, {"tokenizer.model": LFS})
    with pytest.raises(
        ValueError, match=r"tokenizer.model: found a Git LFS .*To do without it, name"
    ):
        chat.load_tokenizer(folder)
    assert chat.load_tokenizer(f"{folder}/tokenizer.json").vocab_size == 300
