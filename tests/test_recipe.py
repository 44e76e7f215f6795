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


def test_shortened_quickstart_learns_and_flips_the_style(tmp_path):
    """launch/quickstart.sh with two thirds of its SFT updates."""
    sft, dpo = "--gin_file=tulu_tiny_sft.gin", "--gin_file=tulu_tiny_dpo.gin"
    before = last_json(run(tmp_path, "evaluate", sft, "--initial"))
    run(tmp_path, "train", sft, "--gin.NUM_STEPS=600")
    after_sft = last_json(run(tmp_path, "evaluate", sft))
    run(tmp_path, "train", dpo)
    after_dpo = last_json(run(tmp_path, "evaluate", dpo))
    print(before, after_sft, after_dpo, evals(tmp_path, "tulu_tiny_dpo"), sep="\n")
    assert before["exact_match"] < 0.02
    assert after_sft["exact_match"] >= 0.9
    assert after_sft["terse"] >= 0.7
    assert after_dpo["polite"] >= after_sft["polite"] + 0.5  # the style flips ...
    assert after_dpo["exact_match"] >= 0.7  # ... and the answers stay
    first, last = evals(tmp_path, "tulu_tiny_dpo")
    assert first["eval/loss"] == pytest.approx(0.6931, abs=1e-3)
    assert last["eval/rewards/accuracies"] >= 0.95

    run(tmp_path, "convert", dpo, "--out=hf")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    message = [{"role": "user", "content": "Opposite of hot?"}]
    prompt = tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        new = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    theirs = tokenizer.decode(new[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    ours = run(tmp_path, "generate", dpo, "--prompt=Opposite of hot?", "--max_new_tokens=20")
    assert ours == f"> Opposite of hot?\n{theirs.strip()}\n"

    run(tmp_path, "report", "--workdirs=runs/tulu_tiny_sft,runs/tulu_tiny_dpo", "--out=page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64") == 2 and "<th>right answer</th>" in page


def test_real_weights_rows_and_pairs(tmp_path, shared_data):
    """stories260K, instructions, UltraFeedback: held-out loss falls, held-out margin rises."""
    root = f'--gin.DATA_ROOT="{shared_data}"'
    run(tmp_path, "train", "--gin_file=stories260k_sft.gin", root, "--gin.NUM_EPOCHS=0.5")
    first, last = evals(tmp_path, "stories260k_sft")
    assert last["eval/loss"] < first["eval/loss"] - 1
    run(tmp_path, "train", "--gin_file=stories260k_dpo.gin", root, "--gin.NUM_EPOCHS=3.0")
    first, last = evals(tmp_path, "stories260k_dpo")
    assert first["eval/rewards/margins"] == pytest.approx(0, abs=1e-3)
    assert last["eval/rewards/margins"] > 0
    run(tmp_path, "convert", "--gin_file=stories260k_sft.gin", root, "--out=hf")
    assert (tmp_path / "hf" / "model.safetensors").exists()


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
