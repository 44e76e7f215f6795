"""Generation: greedy equals transformers, rows are independent of their batch, meshes agree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tulu_jax.decode import sampler
from tulu_jax.interop import hf
from tulu_jax.models import llama
from tulu_jax.models.config import ExecutionConfig, LlamaConfig
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.parallel import sharding as sharding_lib

EXECUTION = ExecutionConfig(compute_dtype="float32", attention="blockwise", remat=False)
NO_EOS = -1
CONFIG = LlamaConfig(
    vocab_size=64, num_layers=2, embed_dim=32, mlp_dim=48, num_heads=4, num_kv_heads=2,
    head_dim=8, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=False, max_positions=64,
)  # fmt: skip
PROMPTS = [[1, 5, 9], [1], [1, 40, 3, 22, 17, 8, 30, 11], [1, 2, 3, 4, 5]]


def random_params(config, *, scale=0.3):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32),
        llama.abstract_params(config, "float32"),
    )


def generate(params, prompts, *, config=CONFIG, execution=EXECUTION, **changes):
    settings = dict(
        max_new_tokens=12, eos_id=NO_EOS, temperature=0.0, top_p=1.0, key=jax.random.key(0)
    )
    return sampler.generate(config, execution, params, prompts, **settings | changes)


@functools.cache
def reference():
    """Greedy continuations by the whole forward pass again for every token."""
    params = random_params(CONFIG)

    @jax.jit
    def next_token(tokens, length):
        logits = llama.logits(
            CONFIG,
            EXECUTION,
            params,
            tokens=tokens,
            segment_ids=(jnp.arange(32)[None] < length).astype(jnp.int32),
            positions=jnp.arange(32)[None],
        )
        return logits[0, length - 1].argmax()

    continuations = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(12):
            tokens = jnp.asarray([ids + [0] * (32 - len(ids))])
            ids.append(int(next_token(tokens, jnp.int32(len(ids)))))
        continuations.append(ids[len(prompt) :])
    return params, continuations


def assert_greedy_in_transformers(model, prompts, continuations, *, new_tokens, eos_id):
    """Each token is the likeliest after those before it, and rows end where they must."""
    import torch

    torch.set_num_threads(1)
    for prompt, continuation in zip(prompts, continuations, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + continuation])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == continuation
        assert eos_id not in continuation[:-1]
        assert len(continuation) == new_tokens or continuation[-1] == eos_id


def load(folder):
    config = hf.read_config(folder)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return config, hf.load(folder, config, shardings=one, dtype="float32")


@pytest.mark.parametrize("attention", ["xla", "blockwise"])
def test_cached_steps_equal_whole_forward_passes(attention):
    params, expected = reference()
    execution = dataclasses.replace(EXECUTION, attention=attention)
    assert generate(params, PROMPTS, execution=execution) == expected
    assert len({tuple(row) for row in expected}) == len(PROMPTS)


def test_a_row_does_not_depend_on_its_batch():
    params, expected = reference()
    for i, prompt in enumerate(PROMPTS):
        assert generate(params, [prompt]) == [expected[i]]
    assert generate(params, PROMPTS[:3]) == expected[:3]
    assert generate(params, []) == []


def test_rows_stop_at_the_end_marker_which_they_keep():
    params, expected = reference()
    eos_id = expected[0][4]
    cut = [row[: row.index(eos_id) + 1] if eos_id in row else row for row in expected]
    assert generate(params, PROMPTS, eos_id=eos_id) == cut
    assert len(cut[0]) < 12 and any(len(row) == 12 for row in cut)


def test_the_loop_stops_when_all_rows_have_ended():
    """The number of steps is read off the compiled program's own output: later columns stay 0."""
    params, expected = reference()
    eos_id = expected[0][0]
    tokens, segment_ids = sampler._left_padded(PROMPTS[:1])
    new_tokens, counts = sampler._generate(
        params,
        jnp.asarray(tokens),
        jnp.asarray(segment_ids),
        config=CONFIG,
        execution=EXECUTION,
        num_slots=16,
        max_new_tokens=jnp.int32(16),
        eos_id=jnp.int32(eos_id),
        sampling=None,
    )
    assert counts.tolist() == [1]
    assert new_tokens[0].tolist() == [eos_id] + [0] * 15


def test_few_programs_are_compiled():
    params, _ = reference()
    generate(params, PROMPTS, max_new_tokens=9)
    compiled = sampler._generate._cache_size()
    for rows, new_tokens, eos_id in [(4, 16, 3), (3, 10, NO_EOS), (4, 1, 0)]:
        generate(params, PROMPTS[:rows], max_new_tokens=new_tokens, eos_id=eos_id)
    assert sampler._generate._cache_size() == compiled
    assert [sampler.bucket(n) for n in (1, 16, 17, 200, 256, 257, 600)] == [
        16, 16, 32, 256, 256, 512, 768,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "sizes",
    [dict(fsdp=8), dict(data=2, fsdp=2, tensor=2), dict(context=2, fsdp=2, tensor=2)],
)
def test_a_mesh_generates_the_same(sizes):
    params, expected = reference()
    mesh = mesh_lib.make(mesh_lib.MeshConfig(**dict(fsdp=1) | sizes))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, sharding_lib.param_shardings(mesh, params))
        assert generate(sharded, PROMPTS[:3]) == expected[:3]


def test_a_trained_model_says_what_it_says_in_transformers(shared_data):
    pytest.importorskip("torch")
    import transformers

    folder = shared_data / "models" / "stories260K-hf"
    config, params = load(folder)
    stored = np.load(shared_data / "reference_vectors" / "stories260K_hf_logits.npz")
    text = stored["ids_0"].tolist()
    prompts = [text, text[:5], [1], [1] + text[9:20], text[:17]]
    ours = generate(params, prompts, config=config, max_new_tokens=200, eos_id=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert_greedy_in_transformers(model, prompts, ours, new_tokens=200, eos_id=2)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_random_models_say_what_they_say_in_transformers(tmp_path, tied, kv_heads):
    torch = pytest.importorskip("torch")
    import transformers

    config = dataclasses.replace(CONFIG, tie_embeddings=tied, num_kv_heads=kv_heads)
    torch.manual_seed(1)
    fields = hf.write_config(config) | dict(initializer_range=0.3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
    model.save_pretrained(tmp_path)
    config, params = load(tmp_path)
    eos_id = generate(params, PROMPTS[:1], config=config, max_new_tokens=40)[0][8]
    ours = generate(params, PROMPTS, config=config, max_new_tokens=40, eos_id=eos_id)
    assert_greedy_in_transformers(model, PROMPTS, ours, new_tokens=40, eos_id=eos_id)
    assert len(ours[0]) <= 9  # the end marker does occur


def test_bfloat16_compute_runs_from_either_storage():
    params, _ = reference()
    execution = dataclasses.replace(EXECUTION, compute_dtype="bfloat16")
    matrices = jax.tree.map_with_path(
        lambda path, x: x if path[-1].key == "scale" else x.astype(jnp.bfloat16), params
    )
    assert generate(params, PROMPTS, execution=execution) == generate(
        matrices, PROMPTS, execution=execution
    )


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    logits = jnp.log(jnp.asarray([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]]))
    table = {
        0.4: [[0, 1, 0, 0], [1, 0, 0, 0]],
        0.6: [[0, 1, 0, 1], [1, 0, 0, 0]],
        0.8: [[0, 1, 1, 1], [1, 0, 0, 0]],
        1.0: [[1, 1, 1, 1], [1, 1, 1, 1]],
    }
    for top_p, kept in table.items():
        np.testing.assert_array_equal(sampler.nucleus(logits, top_p), np.asarray(kept, bool))


def test_draws_follow_the_tempered_distribution():
    """4,096 first tokens against the exact probabilities: within 5 standard errors."""
    logits = np.random.default_rng(2).normal(size=16).astype(np.float32) * 2
    rows = 4096
    draws = sampler._choose(
        jnp.tile(jnp.asarray(logits)[None], (rows, 1)),
        0,
        (jnp.float32(0.7), jnp.float32(0.9), jax.random.key(3)),
    )
    exact = np.exp(logits.astype(np.float64) / 0.7)
    exact /= exact.sum()
    order = np.argsort(-exact)
    kept = order[: np.searchsorted(np.cumsum(exact[order]), 0.9) + 1]
    expected = np.zeros(16)
    expected[kept] = exact[kept] / exact[kept].sum()
    found = np.bincount(np.asarray(draws), minlength=16) / rows
    assert found[expected == 0].sum() == 0
    error = np.sqrt(expected * (1 - expected) / rows)
    assert (np.abs(found - expected) <= 5 * error).all()


def test_sampled_rows_are_reproducible_and_independent_of_the_batch():
    params, expected = reference()
    sample = functools.partial(generate, params, temperature=1.0, top_p=0.9)
    first = sample(PROMPTS)
    assert sample(PROMPTS) == first != expected
    assert sample(PROMPTS[:2]) == first[:2]
    assert sample(PROMPTS, key=jax.random.key(1)) != first
    assert sample([PROMPTS[0]] * 2)[0] != sample([PROMPTS[0]] * 2)[1]
    assert sample(PROMPTS, temperature=1e-4) == expected  # the limit is greedy


def test_bad_settings_are_listed():
    params, _ = reference()
    with pytest.raises(ValueError) as refusal:
        generate(params, [[1], [], [64]], max_new_tokens=0, temperature=-1.0, top_p=0.0)
    for text in (
        "prompt 1 is empty",
        "prompt 2 has the id 64; the model's vocabulary has 64",
        "max_new_tokens = 0",
        "temperature = -1.0",
        "top_p = 0.0",
    ):
        assert text in str(refusal.value)
