"""A run's folder is whole by itself: it is read without its rows, base, tokenizer or mesh."""

import os
import pathlib
import shutil
import subprocess
import sys

import builders
import commands
import jax
from raw_rows import chats, write_jsonl

from tulu_jax.interop import hf
from tulu_jax.models import llama

RUN = """
from __gin__ import dynamic_registration
from tulu_jax.models import config
from tulu_jax.parallel import mesh
from tulu_jax.training import metrics

include 'tulu_tiny_sft.gin'

config.LlamaConfig.num_layers = 2
config.LlamaConfig.embed_dim = 32
config.LlamaConfig.mlp_dim = 64
config.LlamaConfig.num_heads = 8
config.LlamaConfig.num_kv_heads = 4
config.LlamaConfig.head_dim = 8
mesh.MeshConfig.fsdp = 4
mesh.MeshConfig.tensor = 2
metrics.LoggingConfig.tensorboard = False
MIXTURE = '{away}/my.jsonl'
TOKENIZER = '{tokenizer}'
BASE = '{away}/base'
MAX_LENGTH = 64
NUM_STEPS = 2
CHECKPOINT_EVERY = 2
EVAL_EVERY = None
"""


def on_one_device(module: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"tulu_jax.{module}", *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_moved_run_converts_and_generates_on_another_machine(
    tmp_path, monkeypatch, put_tokenizer
):
    """Trained on eight devices from rows and a base that are gone since; on one, and on eight."""
    monkeypatch.chdir(tmp_path)
    away, run, moved = tmp_path / "away", tmp_path / "run", tmp_path / "elsewhere/run"
    away.mkdir()
    tokenizer = put_tokenizer(away / "tokenizer")
    model = builders.replace(builders.MODEL, max_positions=2048)
    params = jax.jit(lambda: llama.init_params(model, jax.random.key(3)))()
    hf.save(
        away / "base",
        params,
        model,
        dtype="float32",
        generation_config={"top_k": 7, "temperature": 0.6},
        write_tokenizer=None,
    )
    write_jsonl(away / "my.jsonl", chats(12))
    (tmp_path / "mine.gin").write_text(RUN.format(away=away, tokenizer=tokenizer))
    assert commands.run("train", "--gin_file=mine.gin", f"--workdir={run}") == 0
    whole = tmp_path / "whole"
    assert commands.run("convert", "--gin_file=mine.gin", f"--workdir={run}", f"--out={whole}") == 0

    shutil.rmtree(away)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    moved.parent.mkdir()
    run.rename(moved)
    (tmp_path / "mine.gin").unlink()
    here = (f"--gin_file={moved}/config.gin", f"--workdir={moved}")
    on_one_device("convert", *here, f"--out={tmp_path}/one")
    assert contents(tmp_path / "one") == contents(whole)
    assert b'"top_k": 7' in contents(whole)["generation_config.json"]
    assert commands.run("convert", *here, f"--out={tmp_path}/eight") == 0
    assert contents(tmp_path / "eight") == contents(whole)
    said = on_one_device("generate", *here, "--prompt=Opposite of hot?", "--max_new_tokens=4")
    assert said.startswith("> Opposite of hot?\n")
    assert commands.run("train", *here) == 2  # whoever needs the rows says that they are gone
