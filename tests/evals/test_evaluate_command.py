"""`python -m tulu_jax.evaluate` on benchmarks: a folder, a server, and one that is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import commands
import numpy as np
import pytest
import small_models
from completions_server import Server

from tulu_jax import cli, validation
from tulu_jax.data import tulu_tiny
from tulu_jax.evals import catalogue, held_out_prompts, model_folder, scores

ROWS = len(tulu_tiny.held_out())


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A small model as a Hugging Face folder."""
    return small_models.save(tmp_path_factory.mktemp("models") / "small", tokenizer)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The folder that an evaluation without a stop leaves."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert evaluate(folder, f"--out={out}") == 0
    return out


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    """The folder that an evaluation behind a server leaves, and what the server was asked."""
    out, server = tmp_path_factory.mktemp("served") / "out", Server()
    try:
        assert evaluate(folder, "--engine=openai", f"--url={server.url}", f"--out={out}") == 0
    finally:
        server.shutdown()
        server.server_close()
    return out, server.asked


def evaluate(folder, *flags):
    return commands.run(
        "evaluate", f"--model_folder={folder}", "--benchmarks=tulu_tiny", "--slots=4", *flags
    )


def refused(capsys, *flags):
    """What the command says, which must end with status 2 and without a traceback."""
    status = commands.run("evaluate", *flags)
    said = capsys.readouterr().err
    assert status == 2 and "Traceback" not in said, said
    return said


@pytest.mark.slow
def test_a_folder_is_evaluated(folder, whole, capsys):
    model, (found,) = scores.load(whole)
    assert model == "small" and found.benchmark == "tulu_tiny" and found.requests == ROWS
    assert [one.name for one in found.metrics] == ["exact_match", "polite", "terse"]
    rows = [json.loads(line) for line in (whole / "tulu_tiny.paper.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [str(n) for n in range(ROWS)]
    assert found.ended == {
        why: sum(row["ended"] == [why] for row in rows)
        for why in ("stop", "length")
        if any(row["ended"] == [why] for row in rows)
    }
    before = (whole / "tulu_tiny.paper.jsonl").read_bytes()
    capsys.readouterr()
    assert evaluate(folder, f"--out={whole}", "--paper_row=Tulu 2 7B", "--groups") == 0
    said = capsys.readouterr()
    assert "tulu_tiny.paper: 100%" in said.err and f"{ROWS}/{ROWS}" in said.err
    assert "Tulu 2 7B" in said.out and f"Answers and scores are in {whole}" in said.out
    assert (whole / "tulu_tiny.paper.jsonl").read_bytes() == before


@pytest.mark.slow
def test_weights_are_rounded_as_they_are_read(folder, tokenizer, tmp_path, capsys):
    """int8 by outputs; answers are those of the rounded weights, under a name of their own."""
    rounded = model_folder.load(str(folder), tokenizer, slots=4, weights="int8")
    whole = model_folder.load(str(folder), tokenizer, slots=4)
    kernels = [
        engine.params["model"]["layers"]["mlp"]["up_proj"]["kernel"] for engine in (rounded, whole)
    ]
    assert kernels[0]["codes"].dtype == np.int8
    by_hand = kernels[0]["codes"] * (kernels[0]["outmax"] / 127)
    assert np.abs(by_hand - kernels[1]).max() <= (kernels[0]["outmax"] / 254).max() * 1.001
    prompts, said = [[1, 20, 30, 40]], [[50, 60]]
    scores_ = [engine.score(prompts, said)[0].logps for engine in (rounded, whole)]
    assert scores_[0] != scores_[1] and scores_[0] == pytest.approx(scores_[1], rel=0.1)
    assert evaluate(folder, f"--out={tmp_path}", "--weights=int8") == 0
    assert scores.load(tmp_path)[0] == "small_int8"
    capsys.readouterr()
    said = refused(
        capsys, "--gin_file=tulu_tiny_dpo.gin", "--benchmarks=tulu_tiny", "--weights=int8"
    )
    assert "--weights rounds those of --model_folder" in said


@pytest.mark.slow
def test_one_that_is_killed_goes_on_and_ends_the_same(folder, whole, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "tulu_jax.evaluate", f"--model_folder={folder}"),
            *("--benchmarks=tulu_tiny", "--slots=2", f"--out={out}"),
        ],
        env=dict(os.environ, XLA_FLAGS=""), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    file, begin = out / "tulu_tiny.paper.jsonl", time.monotonic()
    while process.poll() is None and time.monotonic() < begin + 300:
        if file.exists() and file.read_bytes().count(b"\n") >= 5:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    said, _ = process.communicate()
    done = file.read_bytes().count(b"\n")
    assert 5 <= done < ROWS, said[-2000:]
    with file.open("ab") as half:
        half.write(b'{"id": "2')
    assert evaluate(folder, f"--out={out}") == 0
    for name in ("tulu_tiny.paper.jsonl", "tulu_tiny.paper.about.json", "scores.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_two_at_once_are_refused(folder, tmp_path, capsys):
    from tulu_jax.training import lease

    held = lease.Lease(str(tmp_path / "out"))
    held.acquire()
    try:
        assert evaluate(folder, f"--out={tmp_path / 'out'}") == 2
    finally:
        held.release()
    said = capsys.readouterr().err
    assert f"{tmp_path / 'out'} is held by process {os.getpid()}" in said


def test_rows_of_another_prompt_are_refused(folder, served, capsys):
    said = refused(
        capsys, f"--model_folder={folder}", "--benchmarks=tulu_tiny", "--chat=none",
        f"--out={served[0]}",
    )  # fmt: skip
    assert f"{ROWS} rows whose prompt_hash is not that of the prompt now ('0', '1', '2'" in said
    assert "chat = 'spec', and now it is 'none'" in said


WRONG = [
    (["--benchmarks=gsmk,foo"], "--benchmarks has 'gsmk', 'foo'; expected some of mmlu, gsm8k"),
    (["--benchmarks=gsmk"], "did you mean 'gsm8k'"),
    (["--benchmarks=tulu_tiny", "--set=a"], "--set=a: expected BENCHMARK.SWITCH=VALUE"),
    (["--benchmarks=tulu_tiny", "--set=bbh.x=1"], "bbh is not asked for; expected ['tulu_tiny']"),
    (["--benchmarks=tulu_tiny", "--set=tulu_tiny.x=1"], "'x' is no switch; there are no switches"),
    (
        ["--benchmarks=tulu_tiny", "--paper_row=Tulu 3"],
        "--paper_row: the paper has no row 'Tulu 3'",
    ),
    (["--benchmarks=tulu_tiny", "--out=gs://b/x"], "expected a local folder"),
    (["--benchmarks=tulu_tiny", "--url=http://x/v1"], "give --engine=openai with them"),
    (["--benchmarks=tulu_tiny", "--engine=openai"], "give --url"),
    (["--benchmarks=tulu_tiny", "--step=3"], "a --model_folder has no steps"),
    ([], "--model_folder is evaluated on --benchmarks; name some, or all"),
    (["--benchmarks=tulu_tiny", "--gin_file=tulu_tiny_sft.gin"], "give one of them"),
]


@pytest.mark.parametrize(("flags", "said"), WRONG)
def test_flags(flags, said, capsys, folder):
    assert said in refused(capsys, f"--model_folder={folder}", *flags)


def test_folders_that_are_none(capsys, tmp_path, folder, tokenizer):
    (tmp_path / "empty").mkdir()
    flags = ("--benchmarks=tulu_tiny", f"--model_folder={tmp_path / 'empty'}")
    assert f"{tmp_path / 'empty'}" in refused(capsys, *flags)
    said = refused(capsys, "--compare", str(tmp_path / "empty"), str(tmp_path / "empty"))
    assert "scores.json does not exist; expected the folder of an evaluation" in said
    assert "give two of them" in refused(capsys, "--compare=a")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "has no chat template; expected TÜLU's; give --chat=none for a base model"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "writes chats as 'Onetwothree'"),
        ("{{ nothing.at.all }}", "has a chat template that fails"),
        # Zephyr's marks are the same, and what it writes is not.
        (
            "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' "
            "}}{% endfor %}{{ '<|assistant|>\n' }}",
            "writes chats as",
        ),
    ],
)
def test_a_tokenizer_without_the_template(folder, tmp_path, template, said):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "tokenizer_config.json").read_text())
    config.pop("chat_template")
    if template is not None:
        config["chat_template"] = template
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    (problem,) = model_folder.chat_problems(str(other))
    assert said in problem
    assert model_folder.chat_problems(str(folder)) == []


def test_a_run_is_evaluated(tmp_path, tokenizer_dir, capsys):
    """What training starts from, as a run that has trained would be; into its workdir."""
    (tmp_path / "small.gin").write_text(
        "from __gin__ import dynamic_registration\n"
        "from tulu_jax.models import config\n"
        "include 'tulu_tiny_sft.gin'\n"
        f"TOKENIZER = {tokenizer_dir!r}\n"
        "config.LlamaConfig.num_layers = 1\n"
        "config.LlamaConfig.embed_dim = 32\n"
        "config.LlamaConfig.mlp_dim = 64\n"
        "config.LlamaConfig.num_heads = 8\n"
        "config.LlamaConfig.num_kv_heads = 8\n"
        "config.LlamaConfig.head_dim = 8\n"
    )
    flags = (f"--gin_file={tmp_path / 'small.gin'}", "--initial", "--benchmarks=tulu_tiny")
    assert commands.run("evaluate", *flags) == 0
    out = tmp_path / "runs" / "small" / "evals" / "initial"
    model, (found,) = scores.load(out)
    assert model == "small, initial" and found.requests == ROWS
    assert "Answers and scores are in runs/small/evals/initial" in capsys.readouterr().out


def test_two_folders_behind_one_flag():
    given = ["x", "--compare", "a", "b", "--groups"]
    assert cli.joined(given, "--compare") == ["x", "--compare=a,b", "--groups"]
    for as_it_is in (["x", "--compare", "a,b", "--groups"], ["x", "--compare=a,b"], ["x"]):
        assert cli.joined(as_it_is, "--compare") == as_it_is


def test_a_prompt_that_is_too_long_is_named_before_the_model_is_loaded(capsys, tmp_path, folder):
    short = tmp_path / "short"
    shutil.copytree(folder, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 48}))
    for weights in short.glob("*.safetensors"):
        weights.unlink()
    said = refused(capsys, f"--model_folder={short}", "--benchmarks=tulu_tiny")
    assert "prompts and their answers are longer than the model's 48 positions" in said
    assert not (tmp_path / "evals").exists()


def test_an_endpoint_is_evaluated(served, tokenizer):
    """Ids go to the server, of which nothing but the tokenizer is read here."""
    out, asked = served
    assert len(asked) == ROWS
    assert all(one["max_tokens"] == held_out_prompts.MOST_TOKENS for one in asked)
    assert all(one["prompt"][0] == tokenizer.bos_id for one in asked)
    _, (found,) = scores.load(out)
    assert found.ended == {"stop": ROWS}


def test_an_endpoint_that_refuses_is_named_and_what_it_said_is_kept(folder, tmp_path, capsys):
    server = Server(answer=(400, {"error": {"message": "no room"}}))
    try:
        said = refused(
            capsys, f"--model_folder={folder}", "--benchmarks=tulu_tiny", "--engine=openai",
            f"--url={server.url}", f"--out={tmp_path / 'out'}",
        )  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    assert "refuses a request with status 400: no room" in said
    assert (tmp_path / "out" / "tulu_tiny.paper.jsonl").exists()


def test_two_evaluations_are_compared(folder, served, tmp_path, capsys):
    """Of one server, and of one that gives the right answer to the first question."""
    a, b = served[0], tmp_path / "b"
    shutil.copytree(a, b)
    rows = [json.loads(line) for line in (b / "tulu_tiny.paper.jsonl").read_text().splitlines()]
    rows[0]["texts"] = [tulu_tiny.held_out()[0][1]]
    (b / "tulu_tiny.paper.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    server = Server()
    try:
        flags = ("--engine=openai", f"--url={server.url}", f"--out={b}", "--groups")
        assert evaluate(folder, *flags, "--paper_row=Tulu 2 7B") == 0
    finally:
        server.shutdown()
        server.server_close()
    assert server.asked == []
    said = capsys.readouterr()
    assert "tulu_tiny.paper: 100%" in said.err and f"{ROWS}/{ROWS}" in said.err
    assert "Tulu 2 7B" in said.out
    assert commands.run("evaluate", "--compare", str(a), str(b), "--groups") == 0
    said = capsys.readouterr().out
    assert "tulu_tiny.paper" in said and "McNemar, exact" in said
    lines = [json.loads(line) for line in (b / "differences.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["metric"] == "exact_match")
    assert (first["id"], first["a"], first["b"]) == ("0", 0.0, 1.0)
    assert f"{len(lines)} differences are in {b / 'differences.jsonl'}" in said


def test_names_of_benchmarks():
    assert catalogue.names(["all", "mmlu", "tulu_tiny"]) == [*catalogue.PAPER, "tulu_tiny"]
    (one,) = catalogue.make(["tulu_tiny"], subset="full", settings=[], allow_altered=True)
    assert catalogue.switches(one) == {"subset": "full"}
    with pytest.raises(validation.UsageError, match="has nothing"):
        catalogue.names([])
