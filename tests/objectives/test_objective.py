"""A new objective is one file and one gin line; and what is frozen stays what it was."""

import dataclasses
import shutil
import sys
from typing import ClassVar

import builders
import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tulu_jax import base, cli, preflight, trained, trainer, validation
from tulu_jax.data import loader, tulu_tiny
from tulu_jax.models import llama
from tulu_jax.objectives import dpo, losses, objective, reward, sft
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.training import agreement
from tulu_jax.training import checkpoint as checkpoint_lib
from tulu_jax.training import metrics as metrics_lib
from tulu_jax.training import state as state_lib
from tulu_jax.training.state import Frozen

OBJECTIVE = '''
"""SFT with a penalty on the mean log-probability, beside its loss: an objective of one file."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from tulu_jax.models import llama
from tulu_jax.objectives import losses, objective, sft


@dataclasses.dataclass(frozen=True, kw_only=True)
class Penalised(sft.SFTConfig):
    strength: float = 0.5
    metrics: ClassVar[tuple[str, ...]] = ("loss", "penalty")

    def compute(self, forward, params, frozen, batch):
        hidden, unembedding = forward(params, batch), llama.unembedding(params)
        logps = losses.token_logps(hidden, unembedding, batch["targets"], self.vocab_chunk)
        nll, penalty = -jnp.sum(batch["weights"] * logps), jnp.sum(batch["weights"] * logps**2)
        value = nll + self.strength * penalty
        return objective.Loss(value=value, metrics={"loss": value, "penalty": penalty}, examples={})
'''

RUN = """
from __gin__ import dynamic_registration
import penalised
from tulu_jax import recipe
from tulu_jax.models import config
from tulu_jax.training import metrics

include 'tulu_tiny_sft.gin'

recipe.TrainConfig.objective = @penalised.Penalised()
config.LlamaConfig.num_layers = 1
config.LlamaConfig.embed_dim = 32
config.LlamaConfig.mlp_dim = 64
config.LlamaConfig.head_dim = 8
metrics.LoggingConfig.tensorboard = False
NUM_STEPS = 3
CHECKPOINT_EVERY = 3
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory, put_tokenizer):
    """A folder with a tokenizer, and encoded rows that the tests of this file share."""
    folder = tmp_path_factory.mktemp("home")
    put_tokenizer(folder / "tokenizer")
    return folder


def run_config(home, tmp_path, **changes):
    tokenizer = tulu_tiny.tokenizer(str(home / "tokenizer"))
    config = builders.train_config(home, tokenizer=tokenizer, **changes)
    return builders.replace(config, workdir=str(tmp_path / "run"))


def test_a_new_objective_is_one_file_and_one_gin_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "penalised.py").write_text(OBJECTIVE)
    (tmp_path / "mine.gin").write_text(RUN)
    try:
        config = cli.load(
            "mine.gin", ["--gin.MAX_LENGTH=64"], workdir="run", allow_import=["penalised"]
        )
    finally:
        gin.clear_config()
        sys.modules.pop("penalised", None)
    assert preflight.to_train(config, jax.device_count()) == []
    found = trainer.Run(config).train()
    assert found.keys() == {"eval/loss", "eval/penalty"}
    lines = [line for line in metrics_lib.read("run") if "train/loss" in line]
    assert len(lines) == 3 and all(line["train/penalty"] > 0 for line in lines)
    assert lines[0]["train/loss"] > 0.5 * lines[0]["train/penalty"] > 10
    about = checkpoint_lib.Checkpoints("run").about(3)
    assert about["must_match"]["objective"]["strength"] == 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shifted(sft.SFTConfig):
    """SFT of two added vectors on the hidden states over a base that is frozen."""

    param_axes: ClassVar[tuple] = ((r"shift/(scale|bias)", ("norm",)),)

    def split(self, params, key):
        size = params["model"]["norm"]["scale"].shape
        noise = 0.01 * jax.random.normal(key, size)
        return {"shift": {"scale": jnp.ones(size), "bias": noise}}, Frozen(base=params)

    def compute(self, forward, params, frozen, batch):
        scale, bias = (params["shift"][name][None, None] for name in ("scale", "bias"))
        hidden = forward(params, batch) * scale + bias
        value = losses.weighted_nll(
            hidden,
            llama.unembedding(params),
            batch["targets"],
            batch["weights"],
            self.vocab_chunk,
        )
        return objective.Loss(value=value, metrics={"loss": value}, examples={})


def shifted(home, tmp_path, **changes):
    # Alike on every mesh: XLA:CPU of jax 0.12 rounds otherwise where shards are 4 values wide.
    model = dataclasses.replace(builders.MODEL, embed_dim=64)
    config = run_config(home, tmp_path, model=model, **changes)
    return builders.replace(config, objective=Shifted(vocab_chunk=32), optimizer__learning_rate=1.0)


def curve(workdir):
    return [line["train/loss"] for line in metrics_lib.read(workdir) if "train/loss" in line]


def test_a_frozen_base_with_a_few_leaves_that_train(home, tmp_path):
    """Its state has those leaves alone; killed and resumed, it goes on bit for bit, on the same
    base; `generate` and `convert` see the whole model; it is no base for another run by itself."""
    config = shifted(home, tmp_path, mesh=mesh_lib.MeshConfig(data=2, fsdp=2, tensor=2))
    run = trainer.Run(config)
    run.train()
    whole = curve(config.workdir)
    first, *_, last = (line for line in metrics_lib.read(config.workdir) if "eval/loss" in line)
    assert last["eval/loss"] < first["eval/loss"] - 0.1
    state, frozen = run.abstract, run.abstract_frozen
    assert agreement.param_shapes(state.params) == {"shift/bias": [64], "shift/scale": [64]}
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert [leaf.shape for leaf in moments] == [(64,)] * 4
    base_shapes = agreement.param_shapes(frozen.base)
    saved = checkpoint_lib.Checkpoints(config.workdir)
    assert saved.about(8)["frozen"] == base_shapes and len(base_shapes) > 9
    assert state_lib.fingerprint(base.initial_params(config, run.mesh)) == saved.about(8)["weights"]

    shutil.rmtree(tmp_path / "run/checkpoints/8")
    other = builders.replace(config, seed=7)  # another random base
    with pytest.raises(validation.UsageError, match="this run began with"):
        trainer.Run(other).train()
    trainer.Run(config).train()
    assert curve(config.workdir) == whole

    _, params = trained.load(config, step=8)
    assert agreement.param_shapes(params) == base_shapes
    onto = run_config(home, tmp_path, model=config.model, base=config.workdir)
    (problem,) = base.problems(onto)
    assert f"holds what trained beside {len(base_shapes)} frozen parameters" in problem


def test_training_changes_nothing_that_is_frozen(home, tmp_path):
    config = shifted(home, tmp_path)
    run = trainer.Run(config)
    run.open()
    with jax.set_mesh(run.mesh):
        state, frozen = run._start()
        before = state_lib.fingerprint(frozen.base)
        step = jax.jit(trainer.step_lib.make_train_step(config, 8), donate_argnums=0)
        for number in (1, 2):
            state, _ = step(state, frozen, run.put(run.feed(number, state.params)))
        assert state_lib.fingerprint(frozen.base) == before


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@pytest.mark.parametrize(
    "made",
    [sft.SFTConfig(), dpo.DPOConfig(), reward.RewardConfig()],
    ids=["sft", "dpo", "reward"],
)
def test_batches_have_the_fields_that_the_objective_says(home, tmp_path, packing, made):
    """By name, shape and dtype, as the dry run compiles them; another dtype is refused by name."""
    config = run_config(home, tmp_path, dpo_stage=made.kind != "sft")
    config = builders.replace(config, objective=made, data__packing=packing, data__max_length=96)
    run = trainer.Run(config)
    run.open()
    with jax.set_mesh(run.mesh):
        state, frozen = run._start()
        run.feed.begin(lambda: run._initial_params(state, frozen), run.weights)
        batch = run.feed(1, state.params)
    found = {name: (value.shape, value.dtype) for name, value in batch.items()}
    said = {name: (f.shape, np.dtype(f.dtype)) for name, f in run.fields.items()}
    assert found == said
    places = run.feed.rows.pairs_per_row
    abstract = trainer.step_lib.abstract_batch(config, run.mesh, places=places)
    placed = run.put(batch)
    assert {n: (a.shape, a.dtype, a.sharding) for n, a in abstract.items()} == {
        n: (a.shape, a.dtype, a.sharding) for n, a in placed.items()
    }
    with pytest.raises(ValueError, match=r"'tokens' of a batch is int64 \[.*; expected int32"):
        run.put({**batch, "tokens": batch["tokens"].astype(np.int64)})


def test_building_a_run_reads_no_data(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "prepare", None)
    trainer.Run(builders.train_config(tmp_path, tokenizer="/nowhere"))
