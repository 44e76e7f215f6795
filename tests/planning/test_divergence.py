"""Two meshes or dtypes agree to rounding; what computes otherwise is found in its place."""

import builders
import commands
import jax
import pytest

from tulu_jax import trainer
from tulu_jax.models import layers
from tulu_jax.parallel.mesh import MeshConfig
from tulu_jax.planning import divergence
from tulu_jax.training import checkpoint as checkpoint_lib

ONE = MeshConfig(fsdp=1)
BOTH_WAYS = MeshConfig(fsdp=2, tensor=2)
LONG = MeshConfig(fsdp=1, context=2)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("divergence")


@pytest.fixture
def config(home, tokenizer_dir):
    return builders.train_config(home, tokenizer=tokenizer_dir)


MADE: dict[str, divergence.Side] = {}  # the first sides, each with what it compiled


def differences(config, a, b, *, rows=2):
    """Of two sides, each a dict of changes of `config` with its mesh."""
    first = builders.replace(config, **a)
    if repr(first) not in MADE:
        MADE[repr(first)] = divergence.Side(first, 1)
    one = MADE[repr(first)]
    other = builders.replace(config, **b)
    mesh = other.mesh
    other = divergence.Side(other, mesh.fsdp * mesh.context * mesh.tensor)
    return list(divergence.compare(one, other, divergence.first_rows(config, rows)))


def places(found):
    return [difference.place for difference in found if difference.diverges]


@pytest.mark.parametrize("mesh", [BOTH_WAYS, LONG])
def test_meshes_agree_forward_and_backward(config, mesh):
    found = differences(config, {"mesh": ONE}, {"mesh": mesh})
    assert places(found) == []
    compared = [difference.place for difference in found]
    assert compared.index("layers/1/attention out") < compared.index("layers/1/mlp out")
    assert "layers/0/attention gradient of self_attn/q_proj/kernel" in compared
    assert "embedding gradient of embed_tokens/embedding" in compared
    assert "whole gradient of lm_head/kernel" in compared
    assert any(difference.found > 0 for difference in found)


def test_bfloat16_is_rounding_and_float32_has_less_of_it(config):
    coarse = {"mesh": BOTH_WAYS, "execution__compute_dtype": "bfloat16"}
    found = differences(config, {"mesh": ONE}, coarse)
    assert places(found) == []
    assert max(difference.found for difference in found) > 1e-3


@pytest.mark.slow
def test_packed_pairs_with_branches(home, tokenizer_dir):
    config = builders.train_config(home, tokenizer=tokenizer_dir, dpo_stage=True)
    config = builders.replace(config, data__packing="best_fit", data__max_length=128)
    assert "branches" in divergence.first_rows(config, 2)
    assert places(differences(config, {"mesh": ONE}, {"mesh": BOTH_WAYS})) == []


@pytest.mark.parametrize(
    ("field", "value"), [("model__rope_theta", 500.0), ("model__norm_eps", 1e-4)]
)
def test_what_a_field_computes_otherwise_is_named(config, field, value):
    found = places(differences(config, {"mesh": ONE}, {"mesh": ONE, field: value}))
    assert found[0] == "layers/0/attention out"
    forward = [place for place in found if place.endswith(" out")]
    if field == "model__rope_theta":  # and nothing that has no positions
        assert forward == ["layers/0/attention out", "layers/1/attention out"]
    else:
        assert "layers/1/mlp out" in forward and "embedding out" not in forward


@pytest.mark.slow
def test_weights_of_another_base_are_named_and_what_they_change(config, home):
    """One kernel of layer 1 is another one: nothing is blamed that lies before or behind."""
    run = trainer.Run(builders.replace(config, workdir=str(home / "one")))
    run.save_initial()
    saved = checkpoint_lib.Checkpoints(str(home / "one"))
    state = saved.restore(0, run.abstract)
    kernel = state.params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    state.params["model"]["layers"]["mlp"]["up_proj"]["kernel"] = kernel.at[1, 3, 5].add(0.5)
    other = checkpoint_lib.Checkpoints(
        str(home / "other"), checkpoint_lib.CheckpointConfig(every=1)
    )
    other.save(0, state, saved.about(0), {})
    other.close()
    found = places(
        differences(
            config,
            {"mesh": ONE, "base": str(home / "one")},
            {"mesh": BOTH_WAYS, "base": str(home / "other")},
        )
    )
    assert found[0] == "weights model/layers/mlp/up_proj/kernel of layer 1"
    assert [place for place in found if place.endswith(" out")] == ["layers/1/mlp out"]


def test_a_gradient_that_a_mesh_loses_is_named(config, monkeypatch):
    """What a wrong transposition looks like: forward all is well, on one mesh alone."""
    rotate = layers.rotate

    def broken(x, cos, sin):
        mesh = jax.sharding.get_abstract_mesh()
        divided = not mesh.empty and mesh.shape["context"] > 1
        return rotate(jax.lax.stop_gradient(x) if divided else x, cos, sin)

    monkeypatch.setattr(layers, "rotate", broken)
    found = places(differences(config, {"mesh": ONE}, {"mesh": LONG}))
    assert found[0].startswith("layers/1/attention gradient of ")
    assert not any(place.endswith(" out") or "/mlp gradient" in place for place in found)
    assert "layers/1/attention gradient of self_attn/k_proj/kernel" in found
    assert "layers/1/attention gradient of self_attn/v_proj/kernel" not in found


SMALL = """
from __gin__ import dynamic_registration
from tulu_jax.data import tulu_tiny
from tulu_jax.models import config

include 'tulu_tiny_sft.gin'

config.LlamaConfig.num_layers = 1
config.LlamaConfig.embed_dim = 32
config.LlamaConfig.mlp_dim = 64
config.LlamaConfig.head_dim = 8
config.LlamaConfig.num_heads = 4
config.LlamaConfig.num_kv_heads = 2
MAX_LENGTH = 64
BATCH_SIZE = 8
BASE = None
"""


@pytest.fixture
def compared(home, capsys, monkeypatch):
    monkeypatch.chdir(home)
    (home / "small.gin").write_text(SMALL)

    def run(*flags):
        status = commands.run("compare", "--gin_file=small.gin", *flags)
        told = capsys.readouterr()
        return status, told.out, told.err

    return run


def test_the_command_names_the_first_place(compared):
    status, out, _ = compared("--b=rope_theta=99", "--all")
    assert status == 1
    assert "The first is layers/0/attention out." in out
    assert any(line.startswith("layers/0/mlp out ") for line in out.splitlines())  # --all


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--a=tensr=2", "did you mean 'tensor'?"),
        ("--a=fsdp", "expected name=value"),
        ("--a=fsdp=2,fsdp=4", "each name once"),
        ("--a=fsdp=-1", "expected a number for each axis"),
        ("--a=fsdp=64", "a mesh takes 64 devices, and there are 8"),
        ("--a=tensor=4", "kv_heads of size 2"),
        ("--a=fsdp=3", "embed of size 32"),
        ("--b=compute_dtype=float17", "compute_dtype = 'float17'"),
        ("--b=base=none/such", "base = 'none/such': it does not exist"),
        ("--b=num_layers=4", "expected name=value"),
        ("--b=adapter=None", "expected name=value"),  # the run sets it, whatever it is given
    ],
)
def test_sides_that_are_none_are_refused(compared, flag, said):
    status, _, err = compared(flag)
    assert status == 2 and said in err and "Traceback" not in err
