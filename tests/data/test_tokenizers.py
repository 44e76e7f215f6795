"""Loading, training and saving tokenizers, and refusing those that cannot end a turn."""

import json
import pathlib

import pytest

from tulu_jax.data import chat, tulu_tiny
from tulu_jax.data.sources import tiny_instructions
from tulu_jax.interop import tokenizer_export


def test_words_and_numbers_are_single_tokens(tokenizer):
    words = (
        tiny_instructions.WORDS
        + tiny_instructions.NAMES
        + [str(n) for n in range(tiny_instructions.LARGEST + 1)]
    )
    assert all(len(tokenizer.encode(f" {word}")) == 1 for word in words)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.encode("<unk>")) == (1, 2, [0])


def test_training_is_repeatable_and_done_once(tokenizer, tmp_path):
    folder = tulu_tiny.tokenizer(str(tmp_path))
    again = chat.load_tokenizer(folder)
    assert again.fingerprint == tokenizer.fingerprint and again.vocab_size == 512
    files = {file: file.stat().st_mtime_ns for file in pathlib.Path(folder).iterdir()}
    assert {file.name for file in files} == {"tokenizer.json"}
    assert tulu_tiny.tokenizer(str(tmp_path)) == folder
    assert files == {file: file.stat().st_mtime_ns for file in pathlib.Path(folder).iterdir()}


def test_folder_and_file_are_the_same(tokenizer_dir, tokenizer):
    assert (
        chat.load_tokenizer(f"{tokenizer_dir}/tokenizer.json").fingerprint == tokenizer.fingerprint
    )


def test_opens_in_transformers_with_bos(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer_export.save(tokenizer.backend, str(tmp_path), max_length=None, mode="spec")
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs("hen").input_ids[0] == theirs.bos_token_id == 1
    assert (theirs.eos_token_id, theirs.unk_token_id) == (2, 0)


def test_round_trip_of_any_text(tokenizer):
    text = "naïve 💡\r\n\ttab  two \x00 三"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_without_single_id_eos_is_refused(tokenizer_dir, tmp_path):
    content = json.loads(pathlib.Path(tokenizer_dir, "tokenizer.json").read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "</s>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"without a single-id </s>: it encodes to \[\d+, "):
        chat.load_tokenizer(str(tmp_path))


def test_missing_tokenizer_names_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: found no tokenizer"):
        chat.load_tokenizer(str(tmp_path / "nowhere"))


def test_file_that_is_no_sentencepiece_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xfenot a model")
    with pytest.raises(ValueError, match=r"tokenizer.model: not a SentencePiece model"):
        chat.load_tokenizer(str(tmp_path))


def test_stories260k_tokenizer(shared_data):
    tokenizer = chat.load_tokenizer(str(shared_data / "models" / "stories260K" / "tok512.model"))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (512, 1, 2)
    text = "Once upon a time, there was a little girl."
    assert tokenizer.decode(tokenizer.encode(text)) == text
