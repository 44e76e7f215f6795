"""Adapters to and from PEFT, against PEFT itself on a transformers Llama."""

import dataclasses
import json
import warnings

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from tulu_jax import validation
from tulu_jax.interop import hf, peft
from tulu_jax.models import llama, lora

ADAPTER = lora.LoRAConfig(rank=4, alpha=8.0, dropout=0.0)
SETTINGS = {
    "all": ADAPTER,
    "attention": dataclasses.replace(ADAPTER, targets="attention", rank_stabilised=True),
    "two": dataclasses.replace(ADAPTER, targets="q_proj,down_proj", rank=3),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A transformers Llama, its folder, its config and parameters here."""
    folder = tmp_path_factory.mktemp("base")
    model = hf_models.random_llama(num_key_value_heads=2)
    model.save_pretrained(folder)
    config = hf.read_config(folder)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return model, folder, config, hf.load(folder, config, shardings=one, dtype="float32")


def tokens():
    return np.random.default_rng(0).integers(0, 96, (2, 12))


def ours(config, adapter, params):
    ids = jnp.asarray(tokens(), jnp.int32)
    ones = jnp.ones(ids.shape, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), ids.shape)
    execution = dataclasses.replace(hf_models.FLOAT32, adapter=adapter)
    return np.asarray(
        llama.logits(config, execution, params, tokens=ids, segment_ids=ones, positions=positions)
    )


def theirs(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens())).logits.numpy()


def joined(base, adapter):
    common = base.keys() & adapter.keys()
    return base | adapter | {name: joined(base[name], adapter[name]) for name in common}


def drawn(settings, config):
    made = lora.init(settings, config.projections, config.num_layers, jax.random.key(0))
    key = jax.random.key(1)
    return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(key, x.shape), made)


@pytest.mark.parametrize("name", SETTINGS)
def test_ours_opens_in_peft_with_our_logits(base, tmp_path, name):
    from peft import PeftModel

    _, folder, config, params = base
    settings = SETTINGS[name]
    adapters = drawn(settings, config)
    peft.save(epath.Path(tmp_path), adapters, settings, base=str(folder), weights="abc")
    fresh = hf_models.random_llama(num_key_value_heads=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of keys that it does not find
        model = PeftModel.from_pretrained(fresh, tmp_path)
    expected = theirs(model)
    found = ours(config, settings, joined(params, adapters))
    assert np.abs(found - ours(config, None, params)).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    merged = lora.merge(settings, joined(params, adapters), jnp.float32)
    np.testing.assert_allclose(
        ours(config, None, merged), expected, atol=1e-4 * np.abs(expected).max()
    )
    again = peft.load(epath.Path(tmp_path), peft.read_config(epath.Path(tmp_path)), config)
    jax.tree.map(np.testing.assert_array_equal, adapters, again)
    assert peft.of_base(epath.Path(tmp_path)) == "abc"
    assert peft.read_config(epath.Path(tmp_path)) == dataclasses.replace(
        settings, targets=peft.read_config(epath.Path(tmp_path)).targets
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_theirs_loads_here_with_their_logits(base, tmp_path, name):
    import torch
    from peft import LoraConfig, get_peft_model

    _, _, config, params = base
    settings = SETTINGS[name]
    fresh = hf_models.random_llama(num_key_value_heads=2)
    model = get_peft_model(
        fresh,
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=list(settings.names),
            use_rslora=settings.rank_stabilised,
            task_type="CAUSAL_LM",
        ),
    )
    torch.manual_seed(1)
    for leaf, weight in model.named_parameters():
        if "lora_" in leaf:
            weight.data.normal_(0, 0.2)
    model.save_pretrained(tmp_path)
    read = peft.read_config(epath.Path(tmp_path))
    assert (read.scale, set(read.names)) == (settings.scale, set(settings.names))
    adapters = jax.tree.map(jnp.asarray, peft.load(epath.Path(tmp_path), read, config))
    expected = theirs(model.eval())
    found = ours(config, read, joined(params, adapters))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert peft.of_base(epath.Path(tmp_path)) is None


def test_what_is_not_computed_here_is_named(base, tmp_path):
    _, _, config, _ = base
    folder = epath.Path(tmp_path)
    with pytest.raises(validation.UsageError, match=r"has no adapter_config\.json"):
        peft.read_config(folder)
    peft.save(folder, drawn(ADAPTER, config), ADAPTER, base=None, weights="abc")
    fields = json.loads((tmp_path / peft.CONFIG).read_text())
    for change, said in (
        ({"peft_type": "IA3"}, "peft_type = 'IA3'; expected 'LORA'"),
        ({"use_dora": True, "bias": "all"}, "bias = 'all' is not computed here(.|\n)*use_dora"),
        ({"target_modules": ".*proj"}, "target_modules = '.*proj'; expected a list"),
        ({"target_modules": ["wq"]}, "wq is unknown"),
        ({"r": 0}, "rank = 0"),
    ):
        (tmp_path / peft.CONFIG).write_text(json.dumps(fields | change))
        with pytest.raises(validation.UsageError, match=said):
            peft.read_config(folder)
    (tmp_path / peft.CONFIG).write_text("{")
    with pytest.raises(validation.UsageError, match="is not JSON"):
        peft.read_config(folder)


def test_an_adapter_of_another_shape_is_named_whole(base, tmp_path):
    _, _, config, _ = base
    folder = epath.Path(tmp_path)
    peft.save(folder, drawn(ADAPTER, config), ADAPTER, base=None, weights="abc")
    tensors = safetensors.numpy.load((tmp_path / peft.WEIGHTS).read_bytes())
    prefix = "base_model.model.model.layers."
    del tensors[f"{prefix}1.mlp.up_proj.lora_A.weight"]
    tensors[f"{prefix}0.self_attn.q_proj.lora_B.weight"] = np.zeros((5, 4), np.float32)
    tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((4, 32), np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / peft.WEIGHTS)
    with pytest.raises(validation.UsageError) as error:
        peft.load(folder, ADAPTER, config)
    said = str(error.value)
    assert "mlp.up_proj.lora_a of layers [1]: expected all of 3 layers" in said
    assert r"q_proj.lora_b of layer 0 has shape [5, 4]; expected [32, 4]" in said
    assert "lm_head.lora_A.weight is not known" in said
