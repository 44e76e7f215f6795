"""Runs of adapters, on whole and on quantised bases, from the first update to the export."""

import dataclasses
import shutil

import builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tulu_jax import adapted, conversion, trained, trainer, validation
from tulu_jax import step as step_lib
from tulu_jax.data import tulu_tiny
from tulu_jax.models.lora import LoRAConfig
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.quant.nf4 import QuantConfig
from tulu_jax.training import agreement
from tulu_jax.training import checkpoint as checkpoint_lib
from tulu_jax.training import metrics as metrics_lib
from tulu_jax.training import state as state_lib

MODEL = dataclasses.replace(
    builders.MODEL, embed_dim=128, mlp_dim=128, num_heads=2, num_kv_heads=2, head_dim=64
)
ADAPTER = LoRAConfig(rank=8, alpha=16.0, dropout=0.1)


@pytest.fixture(scope="module")
def home(tmp_path_factory, put_tokenizer):
    """A folder with a tokenizer, and encoded rows that the tests of this file share."""
    folder = tmp_path_factory.mktemp("home")
    put_tokenizer(folder / "tokenizer")
    return folder


def run_config(home, tmp_path, **changes):
    tokenizer = tulu_tiny.tokenizer(str(home / "tokenizer"))
    values = dict(model=MODEL, adapter=ADAPTER, quant=QuantConfig(), param_dtype="bfloat16")
    config = builders.train_config(home, tokenizer=tokenizer, **values | changes)
    return builders.replace(config, workdir=str(tmp_path / "run"))


def curve(workdir) -> list[tuple]:
    lines = metrics_lib.read(workdir)
    return [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]


@pytest.mark.slow
def test_a_run_on_a_quantised_base(home, tmp_path):
    """Adapters alone train and are saved; killed and resumed the run is the same bit for bit; it
    goes on with its own base alone; the model, the adapter and both merges come out of it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    mesh = mesh_lib.MeshConfig(data=2, fsdp=2, tensor=2)
    config = run_config(home, tmp_path, mesh=mesh, param_dtype="float32", num_steps=8)
    run = trainer.Run(config)
    run.train()
    whole = curve(config.workdir)
    first, *_, last = (line for line in metrics_lib.read(config.workdir) if "eval/loss" in line)
    assert last["eval/loss"] < first["eval/loss"]
    names = agreement.param_shapes(run.abstract.params)
    assert len(names) == 14 and all(name.split("/")[-1] in ("lora_a", "lora_b") for name in names)
    saved = checkpoint_lib.Checkpoints(config.workdir)
    assert saved.about(8)["params"] == names
    assert not set(names) & set(saved.about(8)["frozen"])

    shutil.rmtree(tmp_path / "run/checkpoints/8")
    with pytest.raises(validation.UsageError, match="this run began with"):
        trainer.Run(builders.replace(config, seed=7)).train()
    with pytest.raises(validation.UsageError, match=r"adapter\.rank = 8; this run has 4"):
        trainer.Run(builders.replace(config, adapter__rank=4)).train()
    trainer.Run(config).train()
    assert curve(config.workdir) == whole

    folders = {}
    for merge in (None, *adapted.MERGES):
        folders[merge] = str(tmp_path / f"hf_{merge}")
        settings = dict(step=8, dtype="float32", overwrite=False, merge=merge)
        conversion.export(config, folders[merge], **settings)
    for merge, other in (adapted.MERGES, adapted.MERGES[::-1]):
        conversion.verify(config, folders[merge], step=8, merge=merge)
        with pytest.raises(validation.UsageError, match="by this project differ by up to"):
            conversion.verify(config, folders[other], step=8, merge=merge)
    ids = torch.tensor([[1, 40, 77, 300, 12, 9]])
    full, dequantised = (
        AutoModelForCausalLM.from_pretrained(folders[merge]) for merge in ("full", "dequantised")
    )
    with torch.no_grad():
        found = {"full": full(ids).logits, "dequantised": dequantised(ids).logits}
        fresh = AutoModelForCausalLM.from_pretrained(folders["full"])
        adapter = PeftModel.from_pretrained(fresh, folders[None])
        assert (adapter(ids).logits - found["full"]).abs().max() > 1e-4  # it is added once more
    assert (found["full"] - found["dequantised"]).abs().max() > 1e-4
    lines = adapted.check(config, 8, ["What is 2 + 3?"])
    assert lines[0].startswith("merged into the dequantised base") and len(lines) == 2
    # float32: merging beside the very weights that were trained is rounding.
    apart = [float(line.split("differ by ")[1].split()[0]) for line in lines]
    assert apart[0] < 1e-5 < apart[1]


@pytest.mark.parametrize("reference", ["resident", pytest.param("cached", marks=pytest.mark.slow)])
def test_one_base_is_policy_and_reference(home, tmp_path, reference):
    """The first loss is ln 2, and exactly so if both are computed in one program."""
    config = run_config(home, tmp_path, dpo_stage=True, batch_size=8, num_steps=3)
    config = builders.replace(
        config, objective__reference=reference, mesh=mesh_lib.MeshConfig(data=8)
    )
    run = trainer.Run(config)
    assert run.abstract_frozen.reference is None
    run.train()
    (_, first), *_, (_, last) = curve(config.workdir)
    if reference == "resident":
        assert np.float32(first) == np.float32(np.log(2))
    assert abs(first - np.log(2)) < 1e-4 < abs(last - np.log(2))


@pytest.mark.slow
def test_dropout_does_not_depend_on_how_an_update_is_cut(home, tmp_path):
    """All rows at once over eight devices, and four at a time over other axes."""
    config = run_config(home, tmp_path, quant=None, param_dtype="float32", num_steps=3)
    curves = []
    for micro, mesh in ((None, dict(data=2, fsdp=4)), (4, dict(fsdp=4, tensor=2))):
        cut = dataclasses.replace(
            config,
            micro_batch_size=micro,
            mesh=mesh_lib.MeshConfig(**mesh),
            workdir=str(tmp_path / f"run{micro}"),
        )
        trainer.Run(cut).train()
        curves.append(curve(cut.workdir))
    np.testing.assert_allclose(*curves, rtol=2e-4)


@pytest.mark.slow
def test_adapters_begin_with_those_of_a_folder(home, tmp_path):
    config = run_config(home, tmp_path, num_steps=4, mesh=mesh_lib.MeshConfig(data=8))
    trainer.Run(config).train()
    out = str(tmp_path / "adapter")
    conversion.export(config, out, step=4, dtype=None, overwrite=False)
    onto = builders.replace(config, adapter_from=out, workdir=str(tmp_path / "second"))
    run = trainer.Run(onto)
    with jax.set_mesh(run.mesh):
        state, _ = run._start()
    _, params = trained.load(config, step=4)
    for path, leaf in jax.tree.leaves_with_path(state.params):
        found = params
        for step in path:
            found = found[step.key]
        np.testing.assert_array_equal(leaf, found)
    for changes, said in (
        (dict(adapter__alpha=3.0), r"adapter\.alpha = 16\.0; this config has 3\.0"),
        (dict(quant__double=False), r"quant\.double = True; this config has False"),
        (dict(quant=None, adapter=None), "this config has None"),
    ):
        with pytest.raises(validation.UsageError, match=said):
            trained.load(builders.replace(config, **changes), step=4)
    other = builders.replace(onto, seed=5)
    with pytest.raises(validation.UsageError, match="is of a base with weights"):
        trainer.Run(other)._start()
    from tulu_jax import base

    (problem,) = base.problems(builders.replace(onto, adapter__alpha=3.0))
    assert "alpha = 16.0; the run has 3.0" in problem


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(adapter=None), "quant is set and adapter is None"),
        (dict(adapter=dataclasses.replace(ADAPTER, rank=200)), "rank = 200 is above 128"),
        (
            dict(adapter=None, quant=None, adapter_from="x"),
            "adapter_from = 'x' and adapter is None",
        ),
    ],
)
def test_settings_that_do_not_go_together(home, tmp_path, changes, said):
    with pytest.raises(validation.UsageError, match=said):
        run_config(home, tmp_path, **changes)


def test_a_base_that_cannot_be_cut_in_blocks(home, tmp_path):
    small = builders.MODEL  # 32 wide
    with pytest.raises(validation.UsageError, match="cannot be cut into blocks of 64"):
        trainer.Run(run_config(home, tmp_path, model=small))


def test_training_changes_nothing_of_the_base(home, tmp_path):
    run = trainer.Run(run_config(home, tmp_path))
    run.open()
    with jax.set_mesh(run.mesh):
        state, frozen = run._start()
        before = state_lib.fingerprint(frozen.base)
        step = jax.jit(step_lib.make_train_step(run.config, 8), donate_argnums=0)
        for number in (1, 2):
            state, _ = step(state, frozen, run.put(run.feed(number, state.params)))
        assert state_lib.fingerprint(frozen.base) == before
        assert jnp.any(jax.tree.leaves(state.params)[1] != 0)
