"""Generation and scores: they are transformers', and depend on a request alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tulu_jax import validation
from tulu_jax.decode import programs
from tulu_jax.decode.decoder import Decoder
from tulu_jax.decode.sampling import Sampling
from tulu_jax.interop import hf
from tulu_jax.models import llama, lora, paged_attention
from tulu_jax.models.config import ExecutionConfig, LlamaConfig
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.parallel import sharding as sharding_lib
from tulu_jax.parallel import slices
from tulu_jax.quant import nf4

FLOAT32 = ExecutionConfig(compute_dtype="float32", remat=False)
DENSE = dataclasses.replace(FLOAT32, attention="xla")
CONFIG = LlamaConfig(
    vocab_size=64, num_layers=2, embed_dim=32, mlp_dim=48, num_heads=4, num_kv_heads=2,
    head_dim=8, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=False, max_positions=64,
)  # fmt: skip
PROMPTS = [[1, 5, 9], [1], [1, 40, 3, 22, 17, 8, 30, 11], [1, 2, 3, 4, 5]]
GREEDY = Sampling(max_new_tokens=12)
BEGINNING = [1, 40, 3, 22, 17, 8, 30, 11, 5, 9, 60, 2]  # three pages of `SMALL`
DRAWN = Sampling(max_new_tokens=12, temperature=1.0, top_p=0.9, top_k=30)
KEY = jax.random.key(0)
SMALL = dict(slots=4, steps=4, page=4, row_length=16, cache_positions=128)


def random_params(config, *, scale=0.3):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32),
        llama.abstract_params(config, "float32"),
    )


def text(ids) -> str:
    """Two ids make a letter, so that strings end inside them."""
    letters = "abcdefgh"
    return "".join(letters[(a + 3 * b) % 8] for a, b in zip(ids[::2], ids[1::2], strict=False))


@functools.cache
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def ours():
    decoder = Decoder(CONFIG, FLOAT32, **SMALL)

    def generate(prompts, sampling=GREEDY, key=KEY, **options):
        return decoder.generate(params(), prompts, sampling, key, **options)

    generate.decoder = decoder
    return generate


def whole(config, execution, params, rows) -> list[np.ndarray]:
    """float32 log-probabilities [T, V] after each position of `rows`, each alone in a row."""
    length = max(map(len, rows))

    @jax.jit
    def score(tokens, segment_ids):
        positions = jnp.arange(length)[None]
        return jax.nn.log_softmax(
            llama.logits(
                config, execution, params, tokens=tokens, segment_ids=segment_ids,
                positions=positions,
            )
        )  # fmt: skip

    found = []
    for row in rows:
        tokens, segment_ids = np.zeros((2, 1, length), np.int32)
        tokens[0, : len(row)], segment_ids[0, : len(row)] = row, 1
        found.append(np.asarray(score(tokens, segment_ids))[0, : len(row)])
    return found


def assert_likeliest(config, execution, params, results, *, atol=1e-5):
    """Every token is the likeliest after those before it, with the log-probability it came with."""
    rows = [PROMPTS[result.prompt] + result.ids for result in results]
    for result, logps in zip(results, whole(config, execution, params, rows), strict=True):
        logps = logps[len(PROMPTS[result.prompt]) - 1 : -1]
        np.testing.assert_allclose(logps.max(-1), result.logps, atol=atol)
        chosen = np.take_along_axis(logps, np.array(result.ids)[:, None], 1)[:, 0]
        np.testing.assert_allclose(chosen, logps.max(-1), atol=atol)


def test_steps_over_a_cache_equal_whole_forward_passes(ours):
    results = ours(PROMPTS)
    assert_likeliest(CONFIG, DENSE, params(), results)
    assert len({tuple(result.ids) for result in results}) == len(PROMPTS)
    assert [(r.prompt, r.ended, len(r.ids)) for r in results] == [
        (i, "length", 12) for i in range(4)
    ]
    assert ours([]) == []


@st.composite
def batches(draw):
    """A prompt with its sampling and key, and two batches around it."""
    begun = st.sampled_from([[], BEGINNING[:4], BEGINNING[:9], BEGINNING])
    ends = st.lists(st.integers(0, 63), min_size=1, max_size=10)
    prompts = st.tuples(begun, ends).map(lambda parts: [*parts[0], *parts[1]])
    samplings = st.builds(
        Sampling,
        max_new_tokens=st.integers(1, 9),
        temperature=st.floats(0.5, 2),
        top_p=st.floats(0.3, 1),
        top_k=st.integers(0, 64),
        stop_ids=st.tuples(st.integers(0, 63)),
        samples=st.integers(1, 3),
    ) | st.builds(Sampling, max_new_tokens=st.integers(1, 9))
    requests = st.tuples(prompts, samplings, st.integers(0, 9))
    others = [draw(st.lists(requests, max_size=7)) for _ in range(2)]
    return draw(requests), others, [draw(st.integers(0, len(o))) for o in others]


@given(batches())
@settings(max_examples=10, deadline=None, derandomize=True)
def test_a_request_has_the_same_bits_in_every_batch(ours, drawn):
    """Also in a cache so small that rows give their pages back and begin anew."""
    request, others, places = drawn
    found = []
    tight = Decoder(CONFIG, FLOAT32, **SMALL | dict(slots=2, steps=3, cache_positions=40))
    for decoder, batch, place in zip((ours.decoder, tight), others, places, strict=True):
        batch = [*batch[:place], request, *batch[place:]]
        prompts, samplings, seeds = zip(*batch, strict=True)
        keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        results = decoder.generate(params(), prompts, samplings, keys)
        found.append([(r.sample, r.ids, r.logps, r.ended) for r in results if r.prompt == place])
    assert found[0] == found[1]


def in_pages(*inputs, **settings):
    """The attention of a step in pages, as no row has a seat of its own."""
    return paged_attention.attend(*inputs, **settings)


@pytest.mark.parametrize("attend", [paged_attention.attend, in_pages], ids=["seats", "pages"])
@pytest.mark.parametrize("widths", [(128, 256), (896, 256), (128, 1408)], ids=str)
def test_rows_of_real_lengths_have_the_same_bits_in_every_batch(attend, widths):
    """Large enough for XLA's other ways to sum, over several groups of pages, beside shorter and
    longer rows, alone, and where there is one slot; and of widths at which XLA multiplies 2 or 8
    rows in another order than more."""
    wide = dataclasses.replace(
        CONFIG, vocab_size=2048, num_layers=1, embed_dim=widths[0], mlp_dim=widths[1], num_heads=6,
        num_kv_heads=6, head_dim=48, max_positions=1024,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    weights = random_params(wide, scale=0.1)
    lengths = (600, 250, 3, 500, 120)
    prompts = [rng.integers(0, 2048, n).tolist() for n in lengths]
    drawn = Sampling(max_new_tokens=20, temperature=1.0, top_p=0.9)
    many, one = (
        Decoder(wide, FLOAT32, slots=slots, row_length=512, attend=attend) for slots in (8, 1)
    )
    keys = jax.random.split(KEY, len(prompts))
    found = many.generate(weights, prompts, drawn, keys)
    for decoder, at in ((many, [0]), (one, [1, 2]), (many, [2, 3]), (many, [3, 1, 4])):
        fewer = [prompts[n] for n in at]
        alone = decoder.generate(weights, fewer, drawn, keys[np.array(at)])
        assert [(r.ids, r.logps) for r in alone] == [(found[n].ids, found[n].logps) for n in at]


def test_short_prompts_have_the_same_bits_in_packed_rows_of_small_pages():
    wide = dataclasses.replace(
        CONFIG, vocab_size=512, num_layers=2, embed_dim=704, mlp_dim=256, max_positions=256
    )
    rng = np.random.default_rng(0)
    weights = random_params(wide, scale=0.1)
    prompts = [rng.integers(0, 512, n).tolist() for n in (5, 40, 12, 60)]
    decoder = Decoder(wide, FLOAT32, page=4, row_length=128)
    found = decoder.generate(weights, prompts, GREEDY, KEY)
    for n, prompt in enumerate(prompts):
        (alone,) = decoder.generate(weights, [prompt], GREEDY, KEY)
        assert (alone.ids, alone.logps) == (found[n].ids, found[n].logps)


def test_a_head_beside_a_tied_embedding_copies_nothing_else():
    untied = params()
    assert programs.with_head(untied) is untied
    tied = {"model": untied["model"]}
    found = programs.with_head(tied)
    assert found["model"] is tied["model"]
    embedding = tied["model"]["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(found["lm_head"]["kernel"], embedding.T)


def test_a_packed_row_is_no_longer_for_large_pages():
    for page in (64, 128, 256):
        decoder = Decoder(CONFIG, FLOAT32, page=page)
        found = [decoder.bucket(n) for n in (1, 200, 257, 1098, 5000)]
        assert found == [page, max(page, 256), 512, 1280, 5120]


MESHES = (
    mesh_lib.MeshConfig(data=2, fsdp=2, tensor=2),
    mesh_lib.MeshConfig(context=2),
    slices.resident(8, CONFIG.axis_sizes),
)


@pytest.mark.parametrize("laid", MESHES, ids=["data, fsdp, tensor", "context, fsdp", "resident"])
def test_a_mesh_generates_and_scores_the_same(ours, laid):
    expected = ours(PROMPTS, dataclasses.replace(DRAWN, samples=2))
    scores = ours.decoder.score(params(), PROMPTS, [result.ids for result in expected[::2]])
    mesh = mesh_lib.make(laid)
    decoder = Decoder(CONFIG, FLOAT32, **SMALL | dict(slots=8, cache_positions=512))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params(), sharding_lib.param_shardings(mesh, params()))
        sampling = dataclasses.replace(DRAWN, samples=2)
        found = decoder.generate(sharded, PROMPTS, sampling, KEY)
        assert [r.ids for r in found] == [r.ids for r in expected]
        again = decoder.score(sharded, PROMPTS, [result.ids for result in found[::2]])
        alike = [[*BEGINNING, *prompt] for prompt in PROMPTS * 3]
        shared = decoder.generate(sharded, alike, GREEDY, KEY)
        assert decoder.usage.shared >= 12  # by those that come later to a part
    assert [r.ids for r in shared] == [r.ids for r in ours(alike)]
    for a, b in zip(again, scores, strict=True):  # sums over devices have another order
        np.testing.assert_allclose(a.token_logps, b.token_logps, atol=1e-5)


def test_rows_stop_at_a_stop_id_which_they_keep_but_not_before_the_least(ours):
    expected = [result.ids for result in ours(PROMPTS)]
    stop = expected[0][4]
    sampling = dataclasses.replace(GREEDY, stop_ids=(63, stop))
    results = ours(PROMPTS, sampling)
    for result, row in zip(results, expected, strict=True):
        ends = [n for n, token in enumerate(row, 1) if token in (63, stop)]
        assert result.ids == row[: ends[0]] if ends else row
        assert result.ended == ("stop_id" if ends else "length")
    later = ours(PROMPTS[:1], dataclasses.replace(sampling, min_new_tokens=9))[0]
    assert stop not in later.ids[:9] and 63 not in later.ids[:9]
    assert later.ids[: expected[0].index(stop)] == expected[0][: expected[0].index(stop)]


def test_a_stop_string_is_found_across_tokens_and_cut_off(ours):
    (plain,) = ours(PROMPTS[:1], detokenize=text)
    assert len(plain.text) == 6
    stop = plain.text[1:4]
    (result,) = ours(PROMPTS[:1], dataclasses.replace(GREEDY, stop=("zz", stop)), detokenize=text)
    cut = plain.text.index(stop)
    assert (result.text, result.ended) == (plain.text[:cut], "stop")
    assert result.ids == plain.ids[: 2 * (cut + 3)] and len(result.logps) == len(result.ids)
    sampling = dataclasses.replace(GREEDY, stop=(stop,), min_new_tokens=12)
    assert ours(PROMPTS[:1], sampling, detokenize=text)[0].ids == plain.ids[:12]


def test_a_stream_has_every_token_once_and_no_text_that_goes_again(ours):
    """In a small cache too, where a row begins anew."""
    (plain,) = ours(PROMPTS[:1], detokenize=text)
    tight = Decoder(CONFIG, FLOAT32, **SMALL | dict(slots=4, steps=3, cache_positions=28))
    sampling = dataclasses.replace(GREEDY, stop=(plain.text[3:5],))
    for decoder in (ours.decoder, tight):
        pieces = []
        results = decoder.generate(
            params(), PROMPTS, sampling, KEY, detokenize=text, stream=pieces.append
        )
        assert len(pieces) > 2 * len(PROMPTS)
        for result in results:
            own = [piece for piece in pieces if piece.prompt == result.prompt]
            assert "".join(piece.text for piece in own) == result.text
            ids = [token for piece in own for token in piece.ids]
            assert ids[: len(result.ids)] == result.ids
            assert [piece.ended for piece in own] == [None] * (len(own) - 1) + [result.ended]
    usage = tight.usage
    assert usage.prompts + usage.shared > sum(len(p) - 1 for p in PROMPTS)  # some began anew


def test_samples_are_drawn_from_one_prompt_and_their_own_keys(ours):
    one, many = ours(PROMPTS, DRAWN), ours(PROMPTS, dataclasses.replace(DRAWN, samples=6))
    assert ours.decoder.usage.prompts == sum(len(prompt) - 1 for prompt in PROMPTS)
    assert [r.sample for r in many[:6]] == list(range(6))
    assert [r.ids for r in many[::6]] == [r.ids for r in one]
    assert len({tuple(r.ids) for r in many[:6]}) == 6
    assert ours(PROMPTS, DRAWN) == one != ours(PROMPTS, DRAWN, jax.random.key(1))
    cold = dataclasses.replace(DRAWN, temperature=1e-4)
    assert [r.ids for r in ours(PROMPTS, cold)] == [r.ids for r in ours(PROMPTS)]


def test_prompts_that_begin_alike_are_computed_once(ours):
    """As far as pages are full, also when the one that was computed has ended; the bits are those
    of prompts that are computed whole."""
    prompts = [[*BEGINNING, *prompt] for prompt in [*PROMPTS, [1, 5, 9, 33]] * 2]
    found, usage = ours(prompts), ours.decoder.usage
    each = [ours([prompt])[0] for prompt in prompts]
    assert [(r.ids, r.logps) for r in found] == [(r.ids, r.logps) for r in each]
    assert usage.prompts + usage.shared == sum(len(prompt) - 1 for prompt in prompts)
    assert usage.shared >= 12 * (len(prompts) - 1)


def test_few_programs_are_compiled_and_slots_are_used(ours):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 64, n).tolist() for n in rng.integers(1, 16, 24)]
    samplings = [Sampling(max_new_tokens=int(n)) for n in rng.integers(2, 40, 24)]
    before = programs.run_steps._cache_size(), programs.fill._cache_size()
    for first in (0, 5, 10):
        ours(prompts[first:], samplings[: 24 - first])
    compiled = programs.run_steps._cache_size(), programs.fill._cache_size()
    assert compiled[0] - before[0] <= 9  # 4 rows, 2 or one; tables of 8, 12 or 16 pages
    assert compiled[1] - before[1] <= 9  # packed rows of 1, 2 or 4 pages behind 0, 4 or 16
    ours(prompts, samplings)
    assert compiled == (programs.run_steps._cache_size(), programs.fill._cache_size())
    usage = ours.decoder.usage
    assert usage.useful == sum(sampling.max_new_tokens for sampling in samplings)
    assert (
        usage.useful / usage.decoded > 0.85
    )  # of answers of 2 to 40; of 50 to 400 it is above 0.9
    assert usage.live / usage.held > 0.85
    assert [programs.rounded(n) for n in (1, 3, 8, 9, 13, 17, 100)] == [1, 4, 8, 10, 14, 20, 112]


def load(folder):
    config = hf.read_config(folder)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return config, hf.load(folder, config, shardings=one, dtype="float32")


def assert_says_as(model, results, prompts, *, new_tokens, eos_id):
    """Each token is the likeliest after those before it, and rows end where they must."""
    import torch

    torch.set_num_threads(1)
    for result in results:
        ids = prompts[result.prompt] + result.ids
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        assert logits[len(prompts[result.prompt]) - 1 : -1].argmax(-1).tolist() == result.ids
        assert eos_id not in result.ids[:-1]
        assert len(result.ids) == new_tokens or result.ids[-1] == eos_id


def test_a_trained_model_says_what_it_says_in_transformers(shared_data):
    pytest.importorskip("torch")
    import transformers

    folder = shared_data / "models" / "stories260K-hf"
    config, params = load(folder)
    stored = np.load(shared_data / "reference_vectors" / "stories260K_hf_logits.npz")
    ids = stored["ids_0"].tolist()
    prompts = [ids, ids[:5], [1], [1] + ids[9:20], ids[:17]]
    decoder = Decoder(config, FLOAT32, slots=4, page=16)
    sampling = Sampling(max_new_tokens=120, stop_ids=(2,))
    results = decoder.generate(params, prompts, sampling, KEY)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert_says_as(model, results, prompts, new_tokens=120, eos_id=2)


@pytest.mark.parametrize(("tied", "kv_heads"), [(False, 1), (True, 4)])
def test_random_models_say_what_they_say_in_transformers(tmp_path, tied, kv_heads):
    torch = pytest.importorskip("torch")
    import transformers

    config = dataclasses.replace(CONFIG, tie_embeddings=tied, num_kv_heads=kv_heads)
    torch.manual_seed(1)
    fields = hf.write_config(config) | dict(initializer_range=0.3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
    model.save_pretrained(tmp_path)
    config, params = load(tmp_path)
    decoder = Decoder(config, FLOAT32, **SMALL | dict(cache_positions=256))
    plain = decoder.generate(params, PROMPTS[:1], Sampling(max_new_tokens=40), KEY)[0]
    sampling = Sampling(max_new_tokens=40, stop_ids=(plain.ids[8],))
    results = decoder.generate(params, PROMPTS, sampling, KEY)
    assert_says_as(model, results, PROMPTS, new_tokens=40, eos_id=plain.ids[8])
    assert len(results[0].ids) <= 9  # the end marker does occur


def quantised_with_adapter():
    """A config, its execution, and parameters in four bits with an adapter beside them."""
    adapter = lora.LoRAConfig(rank=4, dropout=0.25)
    config = dataclasses.replace(
        CONFIG, embed_dim=128, mlp_dim=256, num_heads=8, num_kv_heads=2, head_dim=32
    )
    params = nf4.quantise_params(random_params(config, scale=0.2), nf4.QuantConfig())
    found = lora.init(adapter, config.projections, 2, jax.random.key(2))
    found = jax.tree.map(lambda x: x + 0.1, found)["model"]["layers"]
    for part, projections in found.items():
        for name, leaves in projections.items():
            params["model"]["layers"][part][name] |= leaves
    return config, dataclasses.replace(FLOAT32, adapter=adapter), params


def test_a_quantised_base_with_an_adapter_beside_it():
    config, execution, params = quantised_with_adapter()
    results = Decoder(config, execution, **SMALL).generate(params, PROMPTS, GREEDY, KEY)
    assert_likeliest(config, execution, params, results)


def test_devices_that_share_a_head_have_their_part_of_codes_and_adapters():
    config, execution, params = quantised_with_adapter()
    mesh = mesh_lib.make(slices.resident(4, config.axis_sizes), jax.devices()[:4])
    assert mesh.shape["group"] == 2
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding_lib.param_shardings(mesh, params))
        results = Decoder(config, execution, **SMALL).generate(placed, PROMPTS[:1], GREEDY, KEY)
    assert_likeliest(config, execution, params, results)


def test_bfloat16_runs_from_either_storage(ours):
    execution = dataclasses.replace(FLOAT32, compute_dtype="bfloat16")
    matrices = jax.tree.map_with_path(
        lambda path, x: x if path[-1].key == "scale" else x.astype(jnp.bfloat16), params()
    )
    decoder = Decoder(CONFIG, execution, **SMALL)
    results = decoder.generate(params(), PROMPTS, GREEDY, KEY)
    assert results == decoder.generate(matrices, PROMPTS, GREEDY, KEY)
    assert_likeliest(CONFIG, DENSE, params(), results, atol=0.5)  # 8 bits of a sum of 32


def test_another_attention_may_take_its_place():
    """A kernel comes in so; this one sees nothing, and the layer goes on without it."""
    seen = []

    def attend(q, k, v, cache, layer, *, table, positions, active):
        seen.append((q.shape, cache["k"].shape, table.shape))
        return jnp.zeros_like(q), cache

    decoder = Decoder(CONFIG, FLOAT32, **SMALL, attend=attend)
    decoder.generate(params(), PROMPTS[:1], GREEDY, KEY)
    assert seen == [((2, 1, 4, 8), (2, 33, 2, 4, 8), (2, 16))]


def scored():
    """Prompts that begin alike, continuations that do, and one that continues another's."""
    rng = np.random.default_rng(1)
    few, rest = rng.integers(0, 64, 20).tolist(), rng.integers(0, 64, (6, 7)).tolist()
    prompts = [few + ids[:4] for ids in rest for _ in range(4)] + PROMPTS + [few, few[:9]]
    continuations = [[n] for _ in rest for n in range(4)]
    continuations += [[7, 8, 9], [7], [1, 2], [3, 4]] + [rest[0], few[9:]]
    return prompts, continuations


def test_scores_are_those_of_whole_forward_passes(ours):
    prompts, continuations = scored()
    for length in (16, 64):
        decoder = Decoder(CONFIG, FLOAT32, **SMALL | dict(row_length=length))
        scores = decoder.score(params(), prompts, continuations)
        rows = [prompt + ids for prompt, ids in zip(prompts, continuations, strict=True)]
        found = whole(CONFIG, DENSE, params(), rows)
        for prompt, ids, score, logps in zip(prompts, continuations, scores, found, strict=True):
            logps = logps[len(prompt) - 1 : -1]
            chosen = np.take_along_axis(logps, np.array(ids)[:, None], 1)[:, 0]
            np.testing.assert_allclose(score.token_logps, chosen, atol=1e-5)
            assert score.is_greedy == (logps.argmax(-1) == ids).all()
            assert score.logps == sum(score.token_logps)
    assert ours.decoder.score(params(), [], []) == []


def test_what_is_generated_greedily_is_greedy_to_score(ours):
    results = ours(PROMPTS)
    scores = ours.decoder.score(params(), PROMPTS, [result.ids for result in results])
    for score, result in zip(scores, results, strict=True):
        assert score.is_greedy
        np.testing.assert_allclose(score.token_logps, result.logps, atol=1e-5)


def test_bad_requests_are_all_named(ours):
    with pytest.raises(validation.UsageError) as refusal:
        ours([[1], [], [64], [-1], [1] * 64, [1] * 40], Sampling(max_new_tokens=24, stop_ids=(64,)))
    for said in (
        "prompt 1 is empty",
        "prompt 2 has the id 64; the model's vocabulary has 64",
        "prompt 3 has the id -1",
        "prompt 4 has 64 ids; expected at most 63, for a model of 64 positions",
        "prompt 0 is to end with the id 64",
    ):
        assert said in str(refusal.value)
    tight = Decoder(CONFIG, FLOAT32, **SMALL | dict(cache_positions=20))
    with pytest.raises(validation.UsageError, match="needs 24 positions of the cache, whose parts"):
        tight.generate(params(), [[1] * 13], GREEDY, KEY)
    with pytest.raises(validation.UsageError, match="no `detokenize` to find them"):
        ours(PROMPTS, dataclasses.replace(GREEDY, stop=("x",)))
    with pytest.raises(validation.UsageError, match="1 samplings for 4 prompts"):
        ours(PROMPTS, [GREEDY])
    with pytest.raises(validation.UsageError, match="keys \\(3,\\) for 4 prompts"):
        ours(PROMPTS, GREEDY, jax.random.split(KEY, 3))
    with pytest.raises(validation.UsageError) as refusal:
        ours.decoder.score(params(), [[1], [1], [64], [1] * 60], [[], [99], [1], [1] * 6])
    for said in (
        "continuation 0 is empty",
        "continuation 1 has the id 99",
        "prompt 2 has the id 64",
        "prompt 3 of 60 ids and its continuation of 6 are longer",
    ):
        assert said in str(refusal.value)
    with pytest.raises(validation.UsageError, match="slots = 0"):
        Decoder(CONFIG, FLOAT32, slots=0)


def test_a_prompt_that_leaves_little_room_goes_on_to_the_end_of_the_model(ours):
    (result,) = ours([[1] * 60])
    assert (len(result.ids), result.ended) == (4, "length")
