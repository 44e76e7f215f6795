"""PPO with adapters: one frozen base for policy, value model and reference."""

import dataclasses
import shutil

import builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tulu_jax import conversion, trained, trainer, validation
from tulu_jax import step as step_lib
from tulu_jax.data import tulu_tiny
from tulu_jax.models import llama, lora
from tulu_jax.objectives import ppo, reward
from tulu_jax.parallel.mesh import MeshConfig
from tulu_jax.quant.nf4 import QuantConfig
from tulu_jax.training import agreement
from tulu_jax.training import metrics as metrics_lib
from tulu_jax.training.state import REWARD, VALUE, Frozen

MODEL = dataclasses.replace(
    builders.MODEL, num_layers=1, embed_dim=64, mlp_dim=64, num_heads=2, num_kv_heads=2, head_dim=32
)
SETTINGS = dict(prompts=16, response_length=8, slots=16, vocab_chunk=32, kl_coef=0.1)


@pytest.fixture(scope="module")
def home(tmp_path_factory, put_tokenizer):
    """A tokenizer, encoded rows, and a reward model without training."""
    folder = tmp_path_factory.mktemp("home")
    put_tokenizer(folder / "tokenizer")
    scored = config_of(folder, objective=reward.RewardConfig())
    scored = builders.replace(
        scored, workdir=str(folder / "rm"), data__packing="best_fit", seed=7
    )  # fmt: skip
    trainer.Run(scored).save_initial()
    return folder


def config_of(home, **changes):
    tokenizer = tulu_tiny.tokenizer(str(home / "tokenizer"))
    values = dict(dpo_stage=True, model=MODEL, mesh=MeshConfig(data=8))
    return builders.train_config(home, tokenizer=tokenizer, **values | changes)


def run_config(home, folder, quant=None, **changes):
    """Two iterations of two updates, on random weights."""
    objective = ppo.PPOConfig(**SETTINGS, reward_from=str(home / "rm"))
    values = dict(objective=objective, adapter=lora.LoRAConfig(rank=4), quant=quant, num_steps=4)
    return builders.replace(
        config_of(home, **values | changes),
        workdir=str(folder / "run"),
        data__max_length=80,
        optimizer__warmup_ratio=0.0,
        optimizer__learning_rate=1e-2,
        checkpoint__every=1,
        checkpoint__keep=4,
    )


def lines_of(workdir):
    return [
        {name: value for name, value in line.items() if not name.startswith("perf/")}
        for line in metrics_lib.read(workdir)
        if "train/loss" in line
    ]


@pytest.mark.parametrize("quant", [None, QuantConfig()], ids=["lora", "qlora"])
def test_three_networks_are_one_base_with_adapters(home, tmp_path, quant):
    """What trains are two sets of adapters and one head; no weight is there twice."""
    config = run_config(home, tmp_path, quant)
    trains, frozen = step_lib.abstract_split(config)
    names = agreement.param_shapes(trains)
    assert len(names) == 14 + 14 + 1 and names["value/score/kernel"] == [64, 1]
    assert all("lora_" in name or name == "value/score/kernel" for name in names)
    assert frozen.base.keys() == {"model", "lm_head"}
    assert frozen.reference.keys() == {"reward"} and frozen.first is frozen.base
    whole, _ = step_lib.abstract_split(dataclasses.replace(config, adapter=None, quant=None))
    sizes = [
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for tree in (trains, whole)
    ]
    assert sizes[0] < sizes[1] / 3
    of_reward = agreement.param_shapes(frozen.reference)
    assert any("codes" in name for name in of_reward) == (quant is not None)


def test_each_network_has_its_own_adapters(home, tmp_path):
    """Policy, value network and reference are the models into which their adapters are merged."""
    config = run_config(home, tmp_path)
    keys = jax.random.split(jax.random.key(0))
    base = llama.init_params(config.model, keys[0])
    base[REWARD] = llama.init_params(config.model.with_head("score"), keys[1])
    params, frozen = step_lib.split(config, base)
    policy, value = params["model"]["layers"], params[VALUE]["model"]["layers"]
    a = [layers["mlp"]["up_proj"]["lora_a"] for layers in (policy, value)]
    assert np.abs(a[0] - a[1]).max() > 1e-3  # drawn apart
    params = jax.tree.map(lambda leaf: leaf + 0.02, params)
    merged = {
        "policy": lora.merge(config.adapter, frozen.whole(llama.own(params)), "float32"),
        "value": lora.merge(config.adapter, frozen.value(params), "float32"),
    }
    rng = np.random.default_rng(0)
    batch = {"tokens": rng.integers(3, 512, (2, 16)), "segment_ids": np.ones((2, 16), np.int32)}
    batch["positions"] = np.broadcast_to(np.arange(16, dtype=np.int32), (2, 16))
    batch = {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}
    batch["targets"] = jnp.roll(batch["tokens"], -1, axis=1)
    forward = llama.forward(config.model, config.execution)
    objective = config.objective

    @jax.jit
    def logps(network):
        return objective.token_logps(forward, network, batch)

    @jax.jit
    def values(network):
        return ppo.token_values(forward, network, batch)

    found = {"policy": logps(frozen.whole(params)), "value": values(frozen.value(params))}
    found["reference"] = logps(frozen.first)
    expected = {"policy": logps(merged["policy"]), "value": values(merged["value"])}
    for name in ("policy", "value"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-4, err_msg=name)
    assert np.abs(found["reference"] - found["policy"]).max() > 1e-2
    assert Frozen().value({VALUE: {"score": 1}}) == {"score": 1}


@pytest.fixture(scope="module", params=[None, pytest.param(QuantConfig(), marks=pytest.mark.slow)])
def config(request, home, tmp_path_factory):
    """A run that has ended, with a checkpoint of each update."""
    config = run_config(home, tmp_path_factory.mktemp("run"), request.param)
    trainer.Run(config).train()
    return config


def test_the_ratio_is_one_at_the_first_inner_step(config):
    first, second, third, _ = lines_of(config.workdir)
    for line in (first, third):
        assert line["train/policy/ratio"] == pytest.approx(1, abs=1e-6)
        assert line["train/policy/clipped"] == line["train/value/clipped"] == 0
    assert abs(second["train/policy/ratio"] - 1) > 1e-4
    assert first["train/rollout/kl"] == pytest.approx(0, abs=1e-5)  # the reference is the base
    assert abs(third["train/rollout/kl"]) > 1e-3


@pytest.mark.slow
def test_a_resumed_run_is_the_same_bit_for_bit(config, tmp_path):
    """From the middle of an iteration: base and reward model are loaded again."""
    mine = builders.replace(config, workdir=str(tmp_path / "run"))
    shutil.copytree(config.workdir, mine.workdir)
    for later in (2, 3, 4):
        shutil.rmtree(f"{mine.workdir}/checkpoints/{later}")
    trainer.Run(mine).train()
    assert lines_of(mine.workdir) == lines_of(config.workdir)


@pytest.mark.slow
def test_the_policy_is_read_without_its_reward_model(home, config, tmp_path):
    """Its adapter is a PEFT folder of the base, with which another run begins."""
    away = builders.replace(config, objective__reward_from=str(tmp_path / "gone"))
    generator = trained.Generator(away, max_new_tokens=4)
    assert generator.params.keys() == {"model", "lm_head"}
    out = tmp_path / "peft"
    conversion.export(away, str(out), step=None, dtype=None, overwrite=False)
    assert (out / "adapter_model.safetensors").exists()
    onto = config_of(
        home, adapter=lora.LoRAConfig(rank=4), adapter_from=str(out), quant=config.quant
    )  # fmt: skip
    onto = trained.Generator(onto, initial=True, max_new_tokens=4)
    for path, leaf in jax.tree.leaves_with_path(lora.only(generator.params)):
        beside = onto.params
        for step in path:
            beside = beside[step.key]
        np.testing.assert_array_equal(leaf, beside)


def test_settings_of_adapters_that_do_not_go_with_ppo(home, tmp_path):
    for changes, said in (
        ({"adapter": lora.LoRAConfig(rank=4, dropout=0.1)}, r"set lora\.LoRAConfig\.dropout = 0"),
        ({"adapter_from": "x"}, "the reference is the base without adapters"),
    ):
        with pytest.raises(validation.UsageError, match=said):
            run_config(home, tmp_path, **changes)


@pytest.mark.slow
def test_another_base_is_refused(home, config, tmp_path):
    mine = builders.replace(config, workdir=str(tmp_path / "run"), seed=config.seed + 1)
    shutil.copytree(config.workdir, mine.workdir)
    with pytest.raises(validation.UsageError, match=r"has weights .*; this run began with"):
        trainer.Run(mine).train()
