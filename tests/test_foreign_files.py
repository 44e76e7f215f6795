"""Files that came with a download: none leads out of its folder, is waited for, or is believed."""

import json
import os
import struct
import time

import pytest
from etils import epath
from raw_rows import read_rows

from tulu_jax import strict_json
from tulu_jax.data import chat
from tulu_jax.interop import config_file, hf, weight_files

DEEP = b"[" * 100_000
SIZES = dict(vocab_size=512, num_layers=1, embed_dim=16, mlp_dim=16, num_heads=2, num_kv_heads=2)


@pytest.fixture(autouse=True)
def at_once():
    started = time.perf_counter()
    yield
    assert time.perf_counter() - started < 5.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (DEEP, "brackets are nested too deep"),
        (b'{"a":' * 100_000, "brackets are nested too deep"),
        (b"[1, NaN]", "found NaN; expected a finite number"),
        (b"-Infinity", "found -Infinity"),
        (b"1e999", "found 1e999"),
        (b"9" * 5000, "4300 digits"),
        (b"\xff", "can't decode byte"),
    ],
)
def test_json_that_is_none(text, said):
    with pytest.raises(ValueError, match=said):
        strict_json.loads(text)


def test_json_that_is_some():
    assert strict_json.loads(b'\xef\xbb\xbf{"a": [1.5, -2e3]}') == {"a": [1.5, -2000.0]}
    assert strict_json.loads("[1e999, -Infinity]", finite=False) == [float("inf"), -float("inf")]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "rows.json", "rows.jsonl"])
def test_deep_json_and_pipes(tmp_path, name):
    file = tmp_path / name

    def read():
        if name == "config.json":
            hf.read_config(tmp_path)
        elif name == "tokenizer.json":
            chat.load_tokenizer(str(file))
        else:
            read_rows(file)

    file.write_bytes(DEEP)
    with pytest.raises(ValueError, match="brackets are nested too deep"):
        read()
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match=f"{name}: found a pipe, socket or device, exp"):
        read()


def problems(folder):
    return weight_files.WeightFiles(epath.Path(folder)).problems


def index(folder, *names):
    content = {"weight_map": {f"w{i}": name for i, name in enumerate(names)}}
    (folder / weight_files.INDEX).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "a/x.safetensors", "..", "", "..\\x", "x\0.safetensors"],
)
def test_an_index_does_not_leave_its_folder(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.safetensors").write_bytes(b"")
    index(tmp_path / "folder", "x.safetensors", name)
    (problem,) = problems(tmp_path / "folder")
    assert "expected names of files in its own folder" in problem and "make links" in problem


def test_what_an_index_names_is_a_file_or_a_link_to_one(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    header = json.dumps({"w0": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    (folder / "x.safetensors").symlink_to(tmp_path / "x")  # as the hub's cache has them
    index(folder, "x.safetensors")
    assert problems(folder) == []
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    index(folder, "folder", "pipe", "zero")
    a_folder, pipe, zero = problems(folder)
    assert "folder/folder: found a folder, expected a file" in a_folder
    assert "pipe: found a pipe, socket or device" in pipe and "zero: found a pipe" in zero
    (folder / weight_files.INDEX).write_bytes(DEEP)
    assert "brackets are nested too deep" in problems(folder)[0]
    (folder / weight_files.INDEX).unlink()
    os.mkfifo(folder / weight_files.INDEX)
    assert "is not a weight index: ValueError('found a pipe" in problems(folder)[0]


WEIGHT = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ([], "another form"),
        ({"w": 1}, "another form"),
        ({"w": WEIGHT | {"shape": None}}, "another form"),
        ({"w": {"dtype": "F32"}}, "another form"),
        ({"w": WEIGHT | {"data_offsets": [0, 4, 8]}}, "too many values"),
        ({"w": WEIGHT | {"data_offsets": [-4, 4]}}, "expected whole numbers"),
        ({"w": WEIGHT | {"shape": [2**40]}}, "does not fill the bytes 0 to 4"),
        ({"w": WEIGHT | {"shape": ["1"]}}, "expected whole numbers"),
        (None, "nested too deep"),
    ],
)
def test_a_header_that_is_read_here_is_not_believed(tmp_path, header, said):
    text = DEEP if header is None else json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(ValueError, match=said):
        weight_files._headers(epath.Path(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**7),
        ("vocab_size", 2**40),
        ("max_position_embeddings", 2**40),
        ("hidden_size", 10**9),
        ("rms_norm_eps", float("inf")),
    ],
)
def test_absurd_numbers_of_a_config_json(tmp_path, field, value):
    config = hf.LlamaConfig(
        **SIZES, head_dim=8, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True, max_positions=64
    )
    fields = config_file.write_config(config)
    (tmp_path / "config.json").write_text(json.dumps(fields | {field: value}))
    with pytest.raises(ValueError, match="expected"):
        hf.read_config(tmp_path)
