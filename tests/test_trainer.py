"""The loop on real (tulu_tiny) data: kills, full disks, exact resume, not-finite numbers."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import builders
import numpy as np
import pytest

from tulu_jax import meter as meter_lib
from tulu_jax import provenance, trainer, validation
from tulu_jax import step as step_lib
from tulu_jax.data import tulu_tiny
from tulu_jax.parallel.mesh import MeshConfig
from tulu_jax.training import checkpoint as checkpoint_lib
from tulu_jax.training import lease, watch
from tulu_jax.training import metrics as metrics_lib

SMALL = """
from __gin__ import dynamic_registration
from tulu_jax.data import tulu_tiny
from tulu_jax.models import config
from tulu_jax.training import metrics

include '{stage}.gin'

config.LlamaConfig.num_layers = 1
config.LlamaConfig.embed_dim = 32
config.LlamaConfig.mlp_dim = 64
config.LlamaConfig.head_dim = 8
metrics.LoggingConfig.tensorboard = False
MAX_LENGTH = 64
BATCH_SIZE = 8
BASE = None
NUM_STEPS = 60
CHECKPOINT_EVERY = 5
EVAL_EVERY = 1000
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory, put_tokenizer):
    """A folder with a tokenizer and an encode cache that the tests of this file share."""
    folder = tmp_path_factory.mktemp("trainer")
    put_tokenizer(folder / "cache/tulu_tiny_tokenizer")
    for stage in ("tulu_tiny_sft", "tulu_tiny_dpo"):
        (folder / f"small_{stage}.gin").write_text(SMALL.format(stage=stage))
    return folder


def start(home, stage, workdir, *flags, **options):
    """`python -m tulu_jax.train` on one device, in a process of its own."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"),  # the same programs, many times
    }
    command = [sys.executable, "-m", "tulu_jax.train", f"--gin_file=small_{stage}.gin"]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", *flags],
        cwd=home,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        **options,
    )


def finish(process, *, code=0):
    error = process.communicate(timeout=400)[1]
    assert process.returncode == code, error
    return error


def steps_logged(workdir):
    path = workdir / metrics_lib.FILE
    return path.read_text().count("train/loss") if path.exists() else 0


def checkpoint_folders(workdir, *, complete):
    """Names below checkpoints/: finished ones are numbers, others are being written."""
    folder = workdir / checkpoint_lib.FOLDER
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return [name for name in names if name.isdigit() == complete]


def kill_when(process, condition, after=0.0):
    """SIGKILL `after` seconds from when `condition()` holds."""
    deadline = time.time() + 400
    while not condition():
        assert process.poll() is None and time.time() < deadline, process.communicate()[1]
        time.sleep(0.005)
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def kill_at(process, workdir, step):
    """SIGKILL once `step` updates are in the metrics and a checkpoint is complete."""
    kill_when(
        process,
        lambda: steps_logged(workdir) >= step and checkpoint_folders(workdir, complete=True),
    )


def without_times(workdir):
    """Every metric of every step but the timings."""
    return [
        {name: value for name, value in line.items() if not name.startswith("perf/")}
        for line in metrics_lib.read(str(workdir))
    ]


def saved_steps(workdir):
    return checkpoint_lib.Checkpoints(str(workdir)).steps()


@pytest.mark.parametrize(
    "stage", ["tulu_tiny_sft", pytest.param("tulu_tiny_dpo", marks=pytest.mark.slow)]
)
def test_killed_and_resumed_run_is_bit_identical(home, tmp_path, stage):
    """SIGKILL at a random update, start again: the same losses, token counts and evaluation."""
    finish(start(home, stage, tmp_path / "whole"))
    step = random.SystemRandom().randint(10, 40)
    killed = start(home, stage, tmp_path / "killed")
    kill_at(killed, tmp_path / "killed", step)
    left = saved_steps(tmp_path / "killed")
    assert left and max(left) < 60, f"killed at {step}, checkpoints {left}"
    message = finish(start(home, stage, tmp_path / "killed"))
    assert f"Resuming from step {max(left)}" in message
    assert without_times(tmp_path / "killed") == without_times(tmp_path / "whole"), step


def test_kills_early_in_a_run_leave_each_line_once(home, tmp_path):
    """Before the first checkpoint, while the lines are written again, and soon after."""
    workdir, pause = tmp_path / "run", random.SystemRandom().uniform
    file = workdir / metrics_lib.FILE
    for lines in (1, 7):
        former = file.stat().st_ino if file.exists() else None
        process = start(home, "tulu_tiny_sft", workdir, "--gin.NUM_STEPS=12")

        def written(former=former, lines=lines):
            return (
                file.exists()
                and file.stat().st_ino != former
                and file.read_text().count("\n") >= lines
            )

        kill_when(process, written, after=pause(0, 0.05))
    finish(start(home, "tulu_tiny_sft", workdir, "--gin.NUM_STEPS=12"))
    steps = [line["step"] for line in metrics_lib.read(str(workdir)) if "train/loss" in line]
    evaluated = [line["step"] for line in metrics_lib.read(str(workdir)) if "eval/loss" in line]
    assert steps == list(range(1, 13)) and evaluated == [0, 12]
    kept = {"checkpoints", "config.gin", "tokenizer.json", metrics_lib.FILE, provenance.FILE}
    assert {path.name for path in workdir.iterdir()} == kept


def test_of_two_runs_in_one_workdir_one_is_refused(home, tmp_path):
    workdir = tmp_path / "run"
    both = [start(home, "tulu_tiny_sft", workdir) for _ in range(2)]
    said = [process.communicate(timeout=400)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], said
    holder = both[codes.index(0)].pid
    assert f"{workdir} is held by process {holder} on " in said[codes.index(2)]
    steps = [line["step"] for line in metrics_lib.read(str(workdir)) if "train/loss" in line]
    assert steps == list(range(1, 61)) and not (workdir / lease.FILE).exists()


def test_files_in_a_workdir_that_no_run_wrote_stay(home, tmp_path):
    run = trainer.Run(run_config(home, tmp_path), "# Parameters for x:")
    workdir = tmp_path / "run"
    workdir.mkdir()
    for name in ("tokenizer.json", "config.gin"):
        (workdir / name).write_text("mine")
        with pytest.raises(validation.UsageError, match=f"{name} would be replaced, and no run"):
            run._keep()
        assert [path.name for path in workdir.iterdir() if path.read_text() == "mine"] == [name]
        (workdir / name).unlink()
    run._keep()
    run._keep()
    assert (workdir / "config.gin").read_text() == run.config_text


def test_a_terminated_run_saves_and_goes_on_from_there(home, tmp_path):
    """SIGTERM: the checkpoint is of the update it came in, and the curve goes on bit for bit."""
    whole, workdir = tmp_path / "whole", tmp_path / "terminated"
    finish(start(home, "tulu_tiny_sft", whole))
    process = start(home, "tulu_tiny_sft", workdir)
    while steps_logged(workdir) < 20:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    message = finish(process, code=75)
    saved = max(saved_steps(workdir))
    assert saved >= 20 and f"Stopped and saved: step {saved} in" in message
    assert f"Resuming from step {saved}" in finish(start(home, "tulu_tiny_sft", workdir))
    assert without_times(workdir) == without_times(whole)


@pytest.mark.slow
def test_full_disk_keeps_the_previous_checkpoint(home, tmp_path):
    """No file may grow past 8 kB, as on a full disk: the run stops, the old one restores."""
    workdir = tmp_path / "run"
    kill_at(start(home, "tulu_tiny_sft", workdir), workdir, 10)
    good = max(saved_steps(workdir))

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    message = finish(start(home, "tulu_tiny_sft", workdir, preexec_fn=limit), code=2)
    assert "could not be written" in message
    assert f"Last good checkpoint: step {good}" in message
    assert max(saved_steps(workdir)) == good
    finish(start(home, "tulu_tiny_sft", workdir))
    assert max(saved_steps(workdir)) == 60


def test_kill_during_a_checkpoint_keeps_the_previous_one(home, tmp_path):
    workdir = tmp_path / "run"

    def writing():
        return all(checkpoint_folders(workdir, complete=c) for c in (True, False))

    kill_when(start(home, "tulu_tiny_sft", workdir), writing)
    torn = checkpoint_folders(workdir, complete=False)
    good = max(saved_steps(workdir))
    assert torn and all(not name.isdigit() for name in torn)
    message = finish(start(home, "tulu_tiny_sft", workdir))
    assert f"Resuming from step {good}" in message
    assert max(saved_steps(workdir)) == 60


def run_config(home, tmp_path, **changes):
    tokenizer = tulu_tiny.tokenizer(str(home / "cache/tulu_tiny_tokenizer"))
    config = builders.train_config(home, tokenizer=tokenizer, **changes)
    return builders.replace(config, workdir=str(tmp_path / "run"))


def test_resume_on_another_mesh_continues_the_curve(home, tmp_path):
    whole = run_config(home, tmp_path / "whole")
    trainer.Run(whole).train()
    workdir = tmp_path / "moved" / "run"
    for step in (8,):  # what a kill after step 4 leaves
        shutil.copytree(tmp_path / "whole" / "run", workdir)
        shutil.rmtree(workdir / checkpoint_lib.FOLDER / str(step))
    moved = run_config(home, tmp_path / "moved", mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    trainer.Run(moved).train()
    losses = [
        [line["train/loss"] for line in metrics_lib.read(c.workdir) if "train/loss" in line]
        for c in (whole, moved)
    ]
    assert losses[0][:4] == losses[1][:4] and len(losses[1]) == 8
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-5)


def test_resume_with_other_settings_is_refused_by_name(home, tmp_path):
    config = run_config(home, tmp_path)
    trainer.Run(config).train()
    other = builders.replace(config, optimizer__learning_rate=1.0, data__seed=7)
    with pytest.raises(ValueError, match=r"made with data_seed = 0; this run has 7") as error:
        trainer.Run(other).train()
    assert "optimizer" in str(error.value)


def test_a_finished_run_started_again_changes_nothing(home, tmp_path):
    config = run_config(home, tmp_path)
    trainer.Run(config).train()
    before = without_times(config.workdir)
    result = trainer.Run(config).train()
    assert without_times(config.workdir) == before
    assert result["eval/loss"] == before[-1]["eval/loss"]


def test_not_finite_loss_stops_with_step_rows_and_checkpoint(home, tmp_path):
    config = run_config(home, tmp_path)
    config = builders.replace(config, optimizer__learning_rate=1e30, checkpoint__every=1)
    run = trainer.Run(config)
    with pytest.raises(watch.UnstableError) as error:
        run.train()
    message = str(error.value)
    step = int(message.split()[1].rstrip(":"))
    rows = [i for row in range((step - 1) * 8, step * 8) for i in run.feed.rows.example_ids(row)]
    assert rows and all(row in message for row in rows)
    assert f"Last good checkpoint: step {step - 1}" in message
    assert saved_steps(config.workdir)[-1] == step - 1


def test_best_checkpoint_is_kept_beside_the_last(home, tmp_path):
    """With a rate that ruins the model after a good start, the best is not among the last."""
    config = run_config(home, tmp_path, num_steps=12, eval_every=2)
    config = builders.replace(
        config,
        optimizer__learning_rate=3.0,
        optimizer__warmup_ratio=0.9,
        checkpoint__every=2,
        checkpoint__keep=1,
        checkpoint__best="eval/loss",
    )
    trainer.Run(config).train()
    evals = {
        line["step"]: line["eval/loss"]
        for line in metrics_lib.read(config.workdir)
        if "eval/loss" in line and line["step"] > 0
    }
    best = min(evals, key=evals.get)
    assert best < 12
    assert saved_steps(config.workdir) == [best, 12]


def test_checkpoint_of_another_shape_is_refused(home, tmp_path):
    config = run_config(home, tmp_path)
    trainer.Run(config).train()
    other = builders.replace(config, model__mlp_dim=96, base=config.workdir)
    other = builders.replace(other, workdir=str(tmp_path / "other"))
    with pytest.raises(
        ValueError, match=r"mlp/gate_proj/kernel has shape \[2, 32, 64\]; the model"
    ):
        trainer.Run(other).train()


def test_dpo_starts_from_the_run_before_it(home, tmp_path):
    """The reference is the SFT checkpoint: the first loss is log 2, and its cache is reused."""
    sft = run_config(home, tmp_path / "sft")
    trainer.Run(sft).train()
    dpo = run_config(home, tmp_path / "dpo", dpo_stage=True, base=sft.workdir)
    trainer.Run(dpo).train()
    first = next(line for line in metrics_lib.read(dpo.workdir) if "train/loss" in line)
    assert first["train/loss"] == pytest.approx(np.log(2), abs=1e-5)
    begin, *_, end = [line for line in metrics_lib.read(dpo.workdir) if "eval/loss" in line]
    assert begin["eval/rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert end["eval/rewards/margins"] > begin["eval/rewards/margins"]


@pytest.mark.slow
def test_reference_of_a_resumed_run_is_never_another_base(home, tmp_path):
    """The cache is gone: the same base gives the same curve, another base is refused."""
    config = run_config(home, tmp_path, dpo_stage=True)
    trainer.Run(config).train()
    whole = without_times(config.workdir)
    folder = tmp_path / "run"
    for split in ("train", "eval"):
        shutil.rmtree(folder / f"reference_{split}")
    shutil.rmtree(folder / checkpoint_lib.FOLDER / "8")
    shutil.copytree(folder, tmp_path / "copy")
    other = builders.replace(config, workdir=str(tmp_path / "copy"), seed=7)  # other random weights
    with pytest.raises(ValueError, match="this run began with"):
        trainer.Run(other).train()
    trainer.Run(config).train()
    assert without_times(config.workdir) == whole


def packed_dpo(home, tmp_path, **changes):
    """A DPO run on packed rows, four pairs in most."""
    config = run_config(home, tmp_path, dpo_stage=True, **changes)
    return builders.replace(config, data__packing="best_fit", data__max_length=128)


@pytest.mark.slow
def test_packed_pairs_start_at_log_two_and_a_resident_reference_gives_the_same(home, tmp_path):
    cached = packed_dpo(home, tmp_path / "cached", micro_batch_size=8)
    trainer.Run(cached).train()
    resident = packed_dpo(home, tmp_path / "resident", micro_batch_size=8)
    resident = builders.replace(resident, objective__reference="resident")
    trainer.Run(resident).train()
    assert not (tmp_path / "resident/run/reference_train").exists()
    lines = [without_times(config.workdir) for config in (cached, resident)]
    first = next(line for line in lines[0] if "train/loss" in line)
    # summed log-probs near −100 in float32, beta 0.1: 1e-6 is one rounding of a sum
    assert first["train/loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["train/rewards/margins"] == pytest.approx(0, abs=2e-6)
    assert 24 <= first["batch/pairs"] <= 48 and first["train/lengths/chosen"] > 5
    assert any(name.startswith("eval/by_length/Q4/rewards") for name in lines[0][0])
    for a, b in zip(*lines, strict=True):
        for name in {"train/loss", "eval/loss", "train/kl", "train/grad_norm"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=2e-5, abs=2e-5), (name, a["step"])


def test_a_killed_reference_goes_on_behind_its_last_shard(home, tmp_path):
    """Without its second shard a run computes that alone; with other data it is refused."""
    config = packed_dpo(home, tmp_path, num_steps=2)
    trainer.Run(config).train()
    folder = tmp_path / "run/reference_train"
    shards = sorted(folder.glob("*.npz"))
    kept = shards[0].stat().st_mtime_ns
    whole = [np.load(shard)["logps"] for shard in shards]
    assert len(shards) > 1 and whole[0].dtype == np.float32
    for shard in shards[1:]:
        shard.unlink()
    shutil.rmtree(tmp_path / "run" / checkpoint_lib.FOLDER)
    trainer.Run(config).train()
    assert shards[0].stat().st_mtime_ns == kept
    for shard, logps in zip(shards, whole, strict=True):
        np.testing.assert_allclose(np.load(shard)["logps"], logps, rtol=1e-6)
    shutil.rmtree(tmp_path / "run" / checkpoint_lib.FOLDER)
    other = builders.replace(config, seed=9, data__max_length=96)
    with pytest.raises(ValueError, match=r"weights was .* max_length was '128' and is '96'"):
        trainer.Run(other).train()


def test_a_loss_without_reference_computes_none(home, tmp_path):
    config = packed_dpo(home, tmp_path, num_steps=2)
    config = builders.replace(config, objective__loss="orpo")
    result = trainer.Run(config).train()
    assert np.isfinite(result["eval/loss"])
    assert not (tmp_path / "run/reference_train").exists()


def test_a_margin_that_is_not_finite_names_its_pair(home, tmp_path):
    config = packed_dpo(home, tmp_path)
    run = trainer.Run(config)
    run.open()
    recorder = metrics_lib.Recorder(config.logging, config.workdir, 0, {})
    margins = np.zeros((8, run.feed.rows.pairs_per_row), np.float32)
    margins[3, 1] = np.nan
    meter = meter_lib.Meter(run, recorder)
    scalars, examples = {"loss": np.float32(np.nan)}, {"rewards/margins": margins}
    meter.push(2, step_lib.Measured(scalars=scalars, examples=examples), None)
    named = run.feed.rows.example_ids(8 + 3)[1]
    with pytest.raises(
        watch.UnstableError, match=f"Examples whose rewards/margins is not finite: {named}. Rows"
    ):
        meter.flush(None)


def test_rates_say_how_much_was_useful():
    counts = {"positions": 1000.0, "nonpadding": 600.0, "trained": 200.0, "conversations": 8.0}
    rates = metrics_lib.rates(counts, 2.0, flops=5e9, peak_flops=1e10)
    assert rates["perf/mfu"] == 0.25
    assert rates["perf/nonpadding_tokens_per_second"] == 300
    assert rates["perf/trained_tokens_per_second"] == 100
    assert rates["perf/conversations_per_second"] == 4
    assert rates["perf/useful_fraction"] == 0.6


def test_epochs_too_short_to_train_are_refused_before_the_devices(home, tmp_path):
    config = run_config(home, tmp_path, num_steps=None, num_epochs=1e-4)
    with pytest.raises(validation.UsageError, match="the only update has rate 0"):
        trainer.Run(config).train()
    assert not (tmp_path / "run").exists()
