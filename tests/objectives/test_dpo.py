"""Packed pairs against plain rows, number for number; and the facts of DPO."""

import functools

import builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tulu_jax.data import chat as chat_lib
from tulu_jax.models import llama
from tulu_jax.objectives import dpo, pairs, preference_losses
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.parallel import sharding
from tulu_jax.parallel.mesh import MeshConfig
from tulu_jax.training.state import Frozen

LENGTH = 144


@functools.cache
def params():
    with jax.ensure_compile_time_eval():  # some tests ask for them first inside a jit
        made = jax.jit(lambda: llama.init_params(builders.MODEL, jax.random.key(1)))()
        # larger than the usual initialisation, so that log-probabilities differ from −log V
        return jax.tree.map(lambda p: 5 * p if p.ndim > 2 else p, made)


@pytest.fixture(scope="module")
def chats(tokenizer_dir):
    """Real ids of pairs with prompts of one, three and five turns, and one with a system turn."""
    tokenizer = chat_lib.load_tokenizer(tokenizer_dir)
    turns = [
        {"role": "user", "content": "Opposite of hot?"},
        {"role": "assistant", "content": "cold"},
        {"role": "user", "content": "Reverse: cat fox"},
        {"role": "assistant", "content": "fox cat"},
        {"role": "user", "content": "Which is larger, 7 or 12?"},
    ]
    prompts = [turns[:1], turns[:3], turns, [{"role": "system", "content": "Be kind"}, *turns[:3]]]
    answers = [
        ("Sure: cold.", "cold"),
        ("Sure: fox cat.", "x"),
        ("12", "Well, it is 7"),
        ("a", "b"),
    ]
    rows = [
        {
            "prompt": prompt,
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for prompt, (chosen, rejected) in zip(prompts, answers, strict=True)
    ]
    names = [str(i) for i in range(len(rows))]
    encoded = chat_lib.tokenize_pairs(rows, names=names, tokenizer=tokenizer, chat="spec")
    return [[(side.ids, side.spans) for side in pair] for pair in encoded]


DPO = dpo.DPOConfig(vocab_chunk=32)


def forward(attention="xla", dtype="float32"):
    execution = builders.ExecutionConfig(compute_dtype=dtype, attention=attention, remat=False)
    return llama.forward(builders.MODEL, execution)


def scored(batch, config=DPO, **execution):
    """`response_logps` of the shared parameters."""
    run = forward(**execution)
    return jax.jit(lambda b: config.response_logps(run, params(), b))(batch)


def computed(batch, config=DPO, **execution):
    """The loss of the shared parameters on a batch, weighed."""
    run = forward(**execution)
    return jax.jit(lambda b: config.compute(run, params(), Frozen(), b))(config.weigh(batch))


def by_pair(values, batch):
    """[*pairs, ...] as an array in the order of the pairs."""
    example = np.asarray(batch["example"]).reshape(-1)
    values = np.asarray(values).reshape(len(example), *values.shape[batch["example"].ndim :])
    return values[np.argsort(example)][np.sum(example < 0) :]


def loss_and_gradient(batch, ref_logps, config=DPO, attention="xla"):
    """Loss, metrics, log-probs by pair, and gradient; `ref_logps` [pairs, 2] in their order."""
    example = np.asarray(batch["example"])
    known = jnp.asarray(np.where((example >= 0)[..., None], ref_logps[example], 0.0), jnp.float32)
    batch, run = config.weigh({**batch, "ref_logps": known}), forward(attention)

    def scalar(params):
        found = config.compute(run, params, Frozen(), batch)
        return found.value, found

    (value, found), grads = jax.jit(jax.value_and_grad(scalar, has_aux=True))(params())
    sides = [found.examples[f"logps/{side}"] for side in ("chosen", "rejected")]
    return value, found.metrics, by_pair(jnp.stack(sides, axis=-1), batch), grads


def assert_packed_equals_plain(pairs, rows, *, length, attention):
    ref_logps = np.random.default_rng(0).uniform(-60, -20, (len(pairs), 2))
    plain = builders.plain_rows(pairs, length)
    packed = builders.packed_rows(pairs, rows, length)
    one = loss_and_gradient(plain, ref_logps)
    two = loss_and_gradient(packed, ref_logps, attention=attention)
    np.testing.assert_allclose(two[2], one[2], rtol=2e-6)  # sums of up to 60 terms near −6
    np.testing.assert_allclose(two[0], one[0], rtol=1e-5)
    for name in one[1]:
        np.testing.assert_allclose(two[1][name], one[1][name], rtol=1e-5, atol=2e-6, err_msg=name)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(one[3]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * scale, rtol=1e-4), two[3], one[3]
    )


@pytest.mark.parametrize("attention", ["xla", "triangular", "blockwise", "pallas_interpret"])
def test_packed_pairs_equal_plain_rows(attention):
    """Nine pairs in four rows: several a row, prompts down to one token, unequal answers."""
    pairs = builders.random_pairs(9, 48)
    assert_packed_equals_plain(pairs, 4, length=LENGTH, attention=attention)


def test_packed_multi_turn_prompts_equal_plain_rows(chats):
    assert len({len(pair[0][0]) - len(pair[1][0]) for pair in chats}) > 2
    assert_packed_equals_plain(chats, 2, length=160, attention="triangular")


def test_branches_continue_the_prompt_and_ignore_each_other():
    """Another rejected answer leaves the chosen log-probability bit for bit what it was."""
    pairs = builders.random_pairs(2, 48)
    other = [[pairs[0][0], builders.random_pairs(1, 48, seed=5)[0][1]], pairs[1]]
    shared = int(pairs[0][0][1][0, 0])
    ids = np.concatenate(
        [pairs[0][0][0][: shared + 1], np.full(len(pairs[0][1][0]) - shared - 1, 7)]
    )
    other[0][1] = (ids, np.array([[shared, len(ids) - 1]]))
    one, two = (scored(builders.packed_rows(p, 1, LENGTH)) for p in (pairs, other))
    assert one[0, 0, 0] == two[0, 0, 0] and one[0, 0, 1] != two[0, 0, 1]
    np.testing.assert_array_equal(one[0, 1], two[0, 1])


MESHES = [
    MeshConfig(data=4, fsdp=2),
    MeshConfig(data=2, fsdp=2, context=2),
    MeshConfig(data=1, fsdp=2, context=2, tensor=2),
]


@pytest.mark.parametrize(
    ("mesh", "attention"),
    [(MESHES[0], "xla"), (MESHES[1], "blockwise"), (MESHES[2], "pallas_interpret")],
    ids=str,
)
def test_packed_log_probabilities_on_eight_devices(mesh, attention):
    pairs = builders.random_pairs(10, 24)
    batch = builders.packed_rows(pairs, 8, 48)
    expected, run = scored(batch), forward(attention)
    mesh = mesh_lib.make(mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params(), sharding.param_shardings(mesh, params()))
        rows = builders.placed(mesh, DPO, batch)
        found = jax.jit(lambda p, b: DPO.response_logps(run, p, b))(placed, rows)
    np.testing.assert_allclose(found, expected, rtol=5e-6)


def test_loss_is_log_two_at_the_reference_and_a_tie_is_no_win():
    batch = builders.packed_rows(builders.random_pairs(9, 48), 4, LENGTH)
    found = computed({**batch, "ref_logps": scored(batch)})
    assert np.float32(found.value) == np.float32(np.log(2))
    assert found.metrics["rewards/margins"] == 0 and found.metrics["rewards/accuracies"] == 0


def test_swapping_the_sides_negates_the_margin():
    pairs = builders.random_pairs(5, 48)
    ref_logps = np.random.default_rng(0).uniform(-60, -20, (5, 2))
    one = builders.packed_rows(pairs, 2, LENGTH)
    two = builders.packed_rows([pair[::-1] for pair in pairs], 2, LENGTH)
    _, left, _, _ = loss_and_gradient(one, ref_logps)
    _, right, _, _ = loss_and_gradient(two, ref_logps[:, ::-1])
    np.testing.assert_allclose(left["rewards/margins"], -right["rewards/margins"], rtol=1e-5)


def test_masked_tokens_get_no_gradient_even_if_not_finite():
    row = builders.packed_rows(builders.random_pairs(2, 48), 1, LENGTH)
    values = jnp.where(row["loss_mask"], -1.0, -jnp.inf)
    total, grad = jax.value_and_grad(lambda v: pairs.response_sums(v, row).sum())(values)
    assert total == -row["loss_mask"].sum()
    np.testing.assert_array_equal(grad, row["loss_mask"])


def test_places_without_a_pair_weigh_nothing():
    batch = DPO.weigh({"example": jnp.asarray([[4, -1], [0, -1]])})
    np.testing.assert_allclose(batch["weights"], [[0.5, 0], [0.5, 0]])


@pytest.mark.parametrize("loss", preference_losses.LOSSES)
def test_every_loss_is_finite_with_rows_that_are_not_full(loss):
    """The last place of each row holds no pair: neither loss nor gradient sees it."""
    pairs = builders.random_pairs(3, 48)
    beta = 2.0 if loss in preference_losses.PER_TOKEN else 0.1
    config = dpo.DPOConfig(loss=loss, beta=beta, vocab_chunk=32)
    ref_logps = np.random.default_rng(0).uniform(-60, -20, (3, 2))
    packed = loss_and_gradient(builders.packed_rows(pairs, 2, LENGTH), ref_logps, config)
    plain = loss_and_gradient(builders.plain_rows(pairs, LENGTH), ref_logps, config)
    np.testing.assert_allclose(packed[0], plain[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), packed[3], plain[3])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(packed[3]))


def test_bfloat16_log_probabilities_are_float32_sums_of_rounded_ones():
    """The original's arithmetic on plain rows; the reference is rounded alike: step 0 is ln 2."""
    batch = builders.plain_rows(builders.random_pairs(5, 48), LENGTH)
    config = dpo.DPOConfig(vocab_chunk=32, log_softmax_dtype="bfloat16")
    found = scored(batch, config, dtype="bfloat16")
    names = ("tokens", "segment_ids", "positions")
    flat = {name: batch[name].reshape(-1, LENGTH) for name in names}
    hidden = jax.jit(lambda: forward(dtype="bfloat16")(params(), flat))()
    kernel = llama.unembedding(params()).astype(jnp.bfloat16)
    with jax.disable_jit():
        logps = jax.nn.log_softmax(jnp.einsum("BTD,VD->BTV", hidden, kernel))
        targets = batch["targets"].reshape(-1, LENGTH, 1)
        logps = jnp.take_along_axis(logps, targets, axis=-1).reshape(5, 2, LENGTH)
        expected = jnp.sum(jnp.where(batch["loss_mask"], logps.astype(jnp.float32), 0.0), axis=-1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    exact = scored(batch, dpo.DPOConfig(), dtype="bfloat16")
    assert float(jnp.abs(found - exact).max()) > 0.01
    found = computed({**batch, "ref_logps": found}, config, dtype="bfloat16")
    assert np.float32(found.value) == np.float32(np.log(2))


def test_beta_of_the_wrong_scale_warns_with_the_reason():
    with pytest.warns(UserWarning, match=r"means over tokens.*Tülu 3: 5"):
        dpo.DPOConfig(loss="sigmoid_norm", beta=0.1)
    with pytest.warns(UserWarning, match=r"sums over tokens.*TÜLU 2: 0.1"):
        dpo.DPOConfig(loss="sigmoid", beta=5.0)


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="did you mean 'sigmoid_norm'"):
        dpo.DPOConfig(loss="sigmoid_nrom")
    with pytest.raises(ValueError, match=r"label_smoothing = 0\.1 with loss = 'ipo'"):
        dpo.DPOConfig(loss="ipo", label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"below 0\.5"):
        dpo.DPOConfig(loss="robust", label_smoothing=0.5)
