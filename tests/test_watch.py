"""Updates that go wrong: by the policy the run stops before they are saved, or skips them; killed
and resumed it skips the same ones."""

import os
import signal
import subprocess
import sys
import time

import builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tulu_jax import step as step_lib
from tulu_jax import trainer, validation
from tulu_jax.models import llama
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.training import checkpoint as checkpoint_lib
from tulu_jax.training import lease, optim, watch
from tulu_jax.training import metrics as metrics_lib
from tulu_jax.training.state import Frozen, TrainState

# One batch in `nan_of` has a loss that is no number, one in `spike_of` a loss 30 times as large.
CURSED = """
import dataclasses

import jax.numpy as jnp

from tulu_jax.objectives import sft


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cursed(sft.SFTConfig):
    nan_of: int
    spike_of: int

    def compute(self, forward, params, frozen, batch):
        found = super().compute(forward, params, frozen, batch)
        total = jnp.sum(batch["tokens"])
        factor = jnp.where(total % self.nan_of == 0, jnp.nan, 1.0)
        factor *= jnp.where(total % self.spike_of == 1, 30.0, 1.0)
        metrics = {**found.metrics, "loss": found.metrics["loss"] * factor}
        return dataclasses.replace(found, value=found.value * factor, metrics=metrics)
"""
RUN = """
from __gin__ import dynamic_registration
import cursed
from tulu_jax import recipe
from tulu_jax.data import tulu_tiny
from tulu_jax.models import llama
from tulu_jax.models import config
from tulu_jax.training import metrics
from tulu_jax.training import watch

include 'tulu_tiny_sft.gin'

recipe.TrainConfig.objective = @cursed.Cursed()
cursed.Cursed.nan_of = 11
cursed.Cursed.spike_of = 6
watch.WatchConfig.not_finite = 'skip'
watch.WatchConfig.spikes = 'skip'
watch.WatchConfig.window = 6
watch.WatchConfig.most_skipped = 6
config.LlamaConfig.num_layers = 1
config.LlamaConfig.embed_dim = 32
config.LlamaConfig.mlp_dim = 64
config.LlamaConfig.head_dim = 8
metrics.LoggingConfig.tensorboard = False
MAX_LENGTH = 64
BATCH_SIZE = 8
BASE = None
NUM_STEPS = 40
CHECKPOINT_EVERY = 5
EVAL_EVERY = 1000
"""


HANGING = """
import dataclasses
import time

import jax
import jax.numpy as jnp
from jax.experimental import io_callback

from tulu_jax.objectives import sft

calls = []


def third_call_never_ends(total):
    calls.append(total)
    if len(calls) == 3:
        time.sleep(1000)
    return jnp.float32(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hanging(sft.SFTConfig):
    def compute(self, forward, params, frozen, batch):
        found = super().compute(forward, params, frozen, batch)
        total = jnp.sum(batch["tokens"])
        nothing = io_callback(
            third_call_never_ends, jax.ShapeDtypeStruct((), jnp.float32), total, ordered=False
        )
        return dataclasses.replace(found, value=found.value + jax.lax.stop_gradient(nothing))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory, put_tokenizer):
    folder = tmp_path_factory.mktemp("watch")
    put_tokenizer(folder / "cache/tulu_tiny_tokenizer")
    (folder / "cursed.py").write_text(CURSED)
    (folder / "cursed.gin").write_text(RUN)
    return folder


@pytest.fixture
def cursed(home, monkeypatch):
    """The objective of one file, as `--allow_import=cursed` finds it."""
    monkeypatch.syspath_prepend(str(home))
    yield __import__("cursed").Cursed
    sys.modules.pop("cursed")


def config_of(home, tmp_path, tokenizer_dir, objective, policy, **changes):
    config = builders.train_config(home, tokenizer=tokenizer_dir, objective=objective, **changes)
    return builders.replace(config, workdir=str(tmp_path / "run"), watch=policy)


def lines(workdir):
    """Every metric of every step but the timings."""
    return [
        {name: value for name, value in line.items() if not name.startswith("perf/")}
        for line in metrics_lib.read(str(workdir))
    ]


def skipped_steps(workdir):
    before, found = 0, []
    for line in lines(workdir):
        now = line.get("train/skipped", before)
        found += [line["step"]] if now > before else []
        before = now
    return found


@pytest.mark.slow
def test_a_killed_run_skips_the_same_updates_again(home, tmp_path):
    """SIGKILL in the midst of them: the same losses, the same updates skipped, to the bit."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [
        *(sys.executable, "-m", "tulu_jax.train", "--gin_file=cursed.gin"),
        "--allow_import=cursed",
    ]
    environment["PYTHONPATH"] = f"{home}:{environment.get('PYTHONPATH', '')}"

    def start(name):
        return subprocess.Popen(
            [*command, f"--workdir={tmp_path / name}"],
            cwd=home,
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )

    whole = start("whole")
    said = whole.communicate(timeout=300)[1]
    assert whole.returncode == 0, said
    skipped = skipped_steps(tmp_path / "whole")
    assert len(skipped) > 5
    assert said.count("is not finite. ") + said.count("is a spike, above") == len(skipped)
    assert said.count("is not finite. ") > 1 and said.count("is a spike, above") > 1
    killed, file = start("killed"), tmp_path / "killed" / metrics_lib.FILE
    while not file.exists() or file.read_text().count("train/loss") < 18:
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    again = start("killed")
    said = again.communicate(timeout=300)[1]
    assert again.returncode == 0 and "Resuming from step" in said, said
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


def test_a_hung_update_ends_the_run_with_stacks_and_its_lease_is_given_up(home, tmp_path):
    """An update whose device never answers: nothing of it fails by itself."""
    (home / "hanging.py").write_text(HANGING)
    text = RUN.replace("cursed.Cursed()", "hanging.Hanging()").replace("cursed", "hanging")
    kept = [line for line in text.splitlines() if "_of" not in line]
    (home / "hanging.gin").write_text("\n".join([*kept, "watch.WatchConfig.hung_after = 15"]))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment["PYTHONPATH"] = f"{home}:{environment.get('PYTHONPATH', '')}"
    command = [
        *(sys.executable, "-m", "tulu_jax.train", "--gin_file=hanging.gin"),
        *("--allow_import=hanging", f"--workdir={tmp_path}/run"),
    ]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    assert "did not end within 15 s. Start the same command again" in done.stderr
    assert "Where each thread stands:" in done.stderr and "trainer.py" in done.stderr
    assert "in third_call_never_ends" in done.stderr
    assert not (tmp_path / "run" / lease.FILE).exists()


def test_a_skipped_update_names_its_rows_and_changes_nothing(
    home, tmp_path, tokenizer_dir, cursed, caplog
):
    objective = cursed(vocab_chunk=32, nan_of=2, spike_of=10**6)
    config = config_of(
        *(home, tmp_path, tokenizer_dir, objective),
        watch.WatchConfig(not_finite="skip", most_skipped=50),
        num_steps=8,
    )
    config = builders.replace(config, checkpoint__every=1, checkpoint__keep=8)
    run = trainer.Run(config)
    with caplog.at_level("WARNING"):
        run.train()
    skipped = skipped_steps(config.workdir)
    assert 1 < len(skipped) < 7
    checkpoints = checkpoint_lib.Checkpoints(config.workdir)
    for step in range(2, 9):
        before, after = (checkpoints.restore(s, run.abstract) for s in (step - 1, step))
        same = jax.tree.map(np.array_equal, before.params, after.params)
        assert all(jax.tree.leaves(same)) == (step in skipped)
        counts = [x for x in jax.tree.leaves(after.opt_state) if x.ndim == 0]
        assert counts and all(int(count) == step == int(after.step) for count in counts)
    for step in skipped:
        [said] = [text for text in caplog.messages if text.startswith(f"step {step}: ")]
        rows = [i for r in range((step - 1) * 8, step * 8) for i in run.feed.rows.example_ids(r)]
        assert "loss nan" in said and "grad_norm nan" in said and "was skipped" in said
        assert all(row in said for row in rows)
    rates = [line["train/learning_rate"] for line in lines(config.workdir) if "train/loss" in line]
    plain = builders.replace(config, objective__nan_of=10**6, workdir=str(tmp_path / "plain"))
    trainer.Run(plain).train()
    assert rates == [x["train/learning_rate"] for x in lines(plain.workdir) if "train/loss" in x]
    assert not any("is a spike" in text for text in caplog.messages)


@pytest.mark.parametrize("policy", ["stop", pytest.param("log", marks=pytest.mark.slow)])
def test_a_spike_is_told_or_stops_before_it_is_saved(
    home, tmp_path, tokenizer_dir, cursed, caplog, policy
):
    objective = cursed(vocab_chunk=32, nan_of=10**6, spike_of=5)
    config = config_of(
        *(home, tmp_path, tokenizer_dir, objective),
        watch.WatchConfig(spikes=policy, window=4, most_skipped=4),
        num_steps=16,
    )
    config = builders.replace(config, checkpoint__every=1)
    run = trainer.Run(config)
    if policy == "log":
        with caplog.at_level("WARNING"):
            run.train()
        assert any("is a spike, above" in text and "goes on" in text for text in caplog.messages)
        return
    with pytest.raises(
        watch.UnstableError, match=r"is a spike, above .* as the 4 updates"
    ) as error:
        run.train()
    step = int(str(error.value).split()[1].rstrip(":"))
    assert f"Last good checkpoint: step {step - 1} in" in str(error.value)
    assert "set WatchConfig.spikes = 'skip'" in str(error.value)
    assert checkpoint_lib.Checkpoints(config.workdir).steps()[-1] == step - 1
    trainer.Run(builders.replace(config, watch__spikes="skip")).train()  # as it says
    assert step in skipped_steps(config.workdir)


def test_skipping_ends_where_nothing_else_is_left(home, tmp_path, tokenizer_dir, cursed):
    objective = cursed(vocab_chunk=32, nan_of=1, spike_of=10**6)
    config = config_of(
        *(home, tmp_path, tokenizer_dir, objective),
        watch.WatchConfig(not_finite="skip", most_skipped=3),
    )
    with pytest.raises(watch.UnstableError, match=r"step 3: .* last of 3 updates skipped in a row"):
        trainer.Run(config).train()


def test_the_step_judges_by_the_bound_it_is_given(tmp_path):
    """Above it nothing changes; below it the update is that of a run that never skips."""
    config = builders.train_config(tmp_path, mesh=mesh_lib.MeshConfig(data=2, fsdp=2, tensor=2))
    skips = builders.replace(config, watch__spikes="skip")
    mesh = mesh_lib.make(config.mesh)
    params = llama.init_params(config.model, jax.random.key(0))
    opt_state = optim.make(config.optimizer, 8).init(params)
    state = TrainState(step=jnp.int32(0), params=params, opt_state=opt_state)
    with jax.set_mesh(mesh):
        batch = builders.placed(mesh, config.objective, builders.sft_batch(8, 64))
        plain, measured = jax.jit(step_lib.make_train_step(config, 8))(state, Frozen(), batch)
        assert "skipped" not in measured.scalars
        step = jax.jit(step_lib.make_train_step(skips, 8))
        loss = measured.scalars["loss"]
        for bound, after, flag in ((loss - 1, state, 1), (loss + 1, plain, 0)):
            found, said = step(state, Frozen(), batch, bound)
            assert said.scalars["skipped"] == flag
            for x, y in zip(*map(jax.tree.leaves, (found.params, after.params)), strict=True):
                np.testing.assert_allclose(x, y, rtol=0 if flag else 1e-6, atol=0 if flag else 1e-9)


def test_a_bound_is_of_the_updates_before_the_last_alone():
    policy = watch.WatchConfig(window=4, mads=2.0, most_skipped=4)
    history, bounds = watch.History(policy, 0), {}
    for step, loss in enumerate([3.0, 5.0, 4.0, 4.0, 100.0, None, 4.5, 2.0], 1):
        before = history.bound(step + 1)  # while `step` is still on the devices
        history.add(loss)
        bounds[step + 1] = history.bound(step + 1)
        again = watch.History(policy, step, history.as_saved())  # and in a run that goes on
        assert bounds[step + 1] == before == again.bound(step + 1)
    assert [bounds[step] for step in range(2, 6)] == [np.inf] * 4
    assert bounds[6] == 4.0 + 2 * 0.5  # of 3, 5, 4, 4: deviations 1, 1, 0, 0
    assert bounds[7] == 4.5 + 2 * 0.5  # of 5, 4, 4, 100
    assert bounds[8] == 4.0 + 2 * watch.FLOOR * 4.0  # of 4, 4, 100 and one that was skipped
    assert history.skipped == 1 and history.skipped_in_a_row() == 0


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("not_finite", "log", "expected one of ['skip', 'stop']"),
        ("spikes", "skipp", "did you mean 'skip'?"),
        ("window", 1, "expected at least 2 updates"),
        ("mads", 0.0, "expected a positive number"),
        ("most_skipped", 101, "expected 1 to window = 100"),
        ("hung_after", -1.0, "expected a positive number of seconds, or None"),
    ],
)
def test_a_policy_that_is_none_is_refused(field, value, said):
    with pytest.raises(validation.UsageError) as refused:
        watch.WatchConfig(**{field: value})
    assert f"{field} = {value!r}" in str(refused.value) and said in str(refused.value)
