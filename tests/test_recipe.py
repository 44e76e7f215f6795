"""The recipe through its commands: a shortened tulu_tiny, and real weights, tokenizer and rows."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tulu_jax.training import metrics


def run(folder: pathlib.Path, module: str, *arguments: str) -> str:
    """`python -m tulu_jax.MODULE` on one device in `folder`; its stdout."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-m", f"tulu_jax.{module}", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=590,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def evals(folder: pathlib.Path, name: str) -> tuple[dict, dict]:
    """The first and the last evaluation of a run."""
    lines = metrics.read(str(folder / "runs" / name))
    found = [line for line in lines if "eval/loss" in line]
    return found[0], found[-1]


def last_json(text: str) -> dict:
    return json.loads(text.strip().split("\n")[-1])


SMALL = """
from __gin__ import dynamic_registration
from tulu_jax.models import config

include 'tulu_tiny_{stage}.gin'

config.LlamaConfig.num_layers = 2
config.LlamaConfig.embed_dim = 64
config.LlamaConfig.mlp_dim = 160
config.LlamaConfig.num_heads = 4
config.LlamaConfig.num_kv_heads = 2
config.LlamaConfig.head_dim = 16
MAX_LENGTH = 128
"""
OPTIONS = {
    "sft": "BATCH_SIZE = 8\nNUM_STEPS = 150\nLEARNING_RATE = 6e-3\n",
    "dpo": "BATCH_SIZE = 4\nNUM_STEPS = 15\nLEARNING_RATE = 4e-4\nBASE = 'runs/small_sft'\n",
}


def supervised(folder: pathlib.Path, name: str, *options: str) -> tuple[dict, dict]:
    """Trains NAME_sft.gin; the scores before and after."""
    sft = f"--gin_file={name}_sft.gin"
    before = last_json(run(folder, "evaluate", sft, "--initial"))
    run(folder, "train", sft, *options)
    after = last_json(run(folder, "evaluate", sft))
    print(before, after, evals(folder, f"{name}_sft"), sep="\n")
    return before, after


def preferred(folder: pathlib.Path, name: str) -> dict:
    """Trains NAME_dpo.gin behind that, and what comes after it in launch/quickstart.sh; the scores
    after it."""
    dpo = f"--gin_file={name}_dpo.gin"
    run(folder, "train", dpo)
    after = last_json(run(folder, "evaluate", dpo))
    first, last = evals(folder, f"{name}_dpo")
    print(after, first, last, sep="\n")
    assert first["eval/loss"] == pytest.approx(0.6931, abs=1e-3)
    assert last["eval/rewards/accuracies"] >= 0.95
    run(folder, "convert", dpo, "--out=hf")
    ours = run(folder, "generate", dpo, "--prompt=Opposite of hot?", "--max_new_tokens=20")
    assert ours == f"> Opposite of hot?\n{reply_of_transformers(folder / 'hf')}\n"
    workdirs = f"--workdirs=runs/{name}_sft,runs/{name}_dpo"
    run(folder, "report", workdirs, "--out=page.html")
    page = (folder / "page.html").read_text()
    assert page.count("data:image/png;base64") == 3 and "<th>right answer</th>" in page
    return after


def reply_of_transformers(folder: pathlib.Path) -> str:
    """What the model in `folder` says to "Opposite of hot?"."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    message = [{"role": "user", "content": "Opposite of hot?"}]
    prompt = tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        new = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    reply = tokenizer.decode(new[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return reply.strip()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder in which small_sft.gin, a twentieth of the default's model, is trained; its scores
    before and after."""
    folder = tmp_path_factory.mktemp("small")
    for stage, options in OPTIONS.items():
        (folder / f"small_{stage}.gin").write_text(SMALL.format(stage=stage) + options)
    return folder, *supervised(folder, "small")


def test_a_small_model_learns_its_first_answers(small):
    folder, before, after = small
    first, last = evals(folder, "small_sft")
    assert last["eval/loss"] < first["eval/loss"] - 4
    assert before["exact_match"] == 0 and after["exact_match"] > 0.03


def test_a_small_model_becomes_polite_and_is_exported(small):
    folder, before, after_sft = small
    after = preferred(folder, "small")
    assert before["polite"] == 0 and after["polite"] > max(0.9, after_sft["polite"])
    assert after["exact_match"] > 0.03  # what answers there were stay


@pytest.mark.slow
def test_shortened_quickstart_learns_and_flips_the_style(tmp_path):
    """launch/quickstart.sh with two thirds of its SFT updates."""
    before, after_sft = supervised(tmp_path, "tulu_tiny", "--gin.NUM_STEPS=600")
    after_dpo = preferred(tmp_path, "tulu_tiny")
    assert before["exact_match"] < 0.02
    assert after_sft["exact_match"] >= 0.9
    assert after_sft["terse"] >= 0.7
    assert after_dpo["polite"] >= after_sft["polite"] + 0.5  # the style flips ...
    assert after_dpo["exact_match"] >= 0.7  # ... and the answers stay


def real_sft(folder, root, *options):
    """stories260K on real instructions: the held-out loss falls, and the model is exported."""
    sft = ("--gin_file=stories260k_sft.gin", f'--gin.DATA_ROOT="{root}"')
    run(folder, "train", *sft, *options)
    first, last = evals(folder, "stories260k_sft")
    assert last["eval/loss"] < first["eval/loss"] - 1
    run(folder, "convert", *sft, *options, "--out=hf")
    assert (folder / "hf" / "model.safetensors").exists()


def real_dpo(folder, root, *options):
    """Then on UltraFeedback: the held-out margin rises."""
    dpo = ("--gin_file=stories260k_dpo.gin", f'--gin.DATA_ROOT="{root}"')
    run(folder, "train", *dpo, *options)
    first, last = evals(folder, "stories260k_dpo")
    assert first["eval/rewards/margins"] == pytest.approx(0, abs=1e-3)
    assert last["eval/rewards/margins"] > 0


@pytest.mark.slow
def test_real_weights_and_rows(tmp_path, shared_data):
    real_sft(tmp_path, shared_data, "--gin.NUM_EPOCHS=0.05", "--gin.MAX_LENGTH=256")


def test_real_weights_and_pairs(tmp_path, shared_data):
    base = f'--gin.BASE="{shared_data}/models/stories260K-hf"'
    real_dpo(tmp_path, shared_data, base, "--gin.NUM_EPOCHS=1.0", "--gin.MAX_LENGTH=256")


@pytest.mark.slow
def test_real_weights_rows_and_pairs(tmp_path, shared_data):
    real_sft(tmp_path, shared_data, "--gin.NUM_EPOCHS=0.5")
    real_dpo(tmp_path, shared_data, "--gin.NUM_EPOCHS=3.0")


def test_imports_stay_light():
    """What is not needed yet is not imported: no TensorFlow, torch, transformers or datasets."""
    code = (
        "import sys, tulu_jax.train, tulu_jax.trainer, tulu_jax.preflight;"
        "print(sorted({'tensorflow', 'torch', 'transformers', 'datasets', 'orbax', 'grain'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "module", ["train", "prepare", "convert", "generate", "evaluate", "report"]
)
def test_help_shows_real_examples(tmp_path, module):
    done = subprocess.run(
        [sys.executable, "-m", f"tulu_jax.{module}", "--help"], capture_output=True, text=True
    )
    assert f"python -m tulu_jax.{module} --" in done.stdout


def test_misuse_ends_with_code_two_and_every_problem(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tulu_jax.train", "--gin_file=tulu_tiny_sft.gin"),
            *("--gin.NUM_STEPZ=3", "--gin.BATCH_SIZE=2.5"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert (
        "did you mean 'NUM_STEPS'" in done.stderr
        and "TrainConfig.batch_size = 2.5 is a float; expected int" in done.stderr
    )
    assert "Traceback" not in done.stderr
