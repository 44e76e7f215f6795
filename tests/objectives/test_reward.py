"""The reward objective: what is scored, packed against plain rows, the loss against numpy."""

import functools

import builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tulu_jax.data import packing
from tulu_jax.data import truncation as truncation_lib
from tulu_jax.data.chat import TokenIds
from tulu_jax.models import llama
from tulu_jax.objectives import reward, reward_feed
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.parallel import sharding
from tulu_jax.parallel.mesh import MeshConfig
from tulu_jax.training.state import Frozen

LENGTH = 144
REWARD = reward.RewardConfig()
PAIRS = builders.random_pairs(9, 48)
MODEL = builders.MODEL.with_head("score")
EXECUTION = builders.ExecutionConfig(compute_dtype="float32", attention="xla", remat=False)
FORWARD = llama.forward(builders.MODEL, EXECUTION)


@functools.cache
def params():
    with jax.ensure_compile_time_eval():
        made = jax.jit(lambda: llama.init_params(MODEL, jax.random.key(1)))()
        # Larger than the usual initialisation, so that scores differ.
        return jax.tree.map(lambda p: 5 * p if p.ndim > 1 and p.shape[-1] > 1 else p, made)


def rows(fill, sides) -> dict:
    return {name: np.stack([fill(side)[name] for side in sides]) for name in fill(sides[0])}


def plain(pairs) -> dict:
    """Rows [B, 2, T], a pair each."""
    fill = functools.partial(packing.fill_row_to_ends, capacity=LENGTH)
    halves = [rows(fill, [[pair[side]] for pair in pairs]) for side in (0, 1)]
    batch = {name: np.stack([half[name] for half in halves], axis=1) for name in halves[0]}
    return as_batch(batch, np.arange(len(pairs)))


def packed(pairs, number) -> dict:
    """Rows [B, T], pair i in row i mod B; the last place of each holds none."""
    fill = functools.partial(packing.fill_pair_row_to_ends, capacity=LENGTH)
    batch = rows(fill, [pairs[r::number] for r in range(number)])
    example = np.full((number, -(-len(pairs) // number) + 1), -1)
    for r in range(number):
        here = range(r, len(pairs), number)
        example[r, : len(here)] = here
    return as_batch(batch, example)


def as_batch(batch, example) -> dict:
    batch |= {"example": example.astype(np.int32), "truncated": (example >= 0) & (example % 3 == 0)}
    return {name: jnp.asarray(value) for name, value in batch.items()}


@jax.jit
def loss_and_gradient(params, batch):
    def loss(params):
        found = REWARD.compute(FORWARD, params, Frozen(), REWARD.weigh(batch))
        return found.value, found

    (_, found), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return found, grads


def by_pair(value, batch):
    """[*pairs] in the order of the pairs."""
    example = np.asarray(batch["example"]).reshape(-1)
    return np.asarray(value).reshape(-1)[np.argsort(example)][np.sum(example < 0) :]


def alone(pairs) -> np.ndarray:
    """Hidden states [pairs, 2, D] at the last id of each side, each in a row of its own."""
    ends = np.array([[len(ids) - 1 for ids, _ in pair] for pair in pairs])
    sides = [ids for pair in pairs for ids, _ in pair]
    tokens = np.stack([np.pad(ids, (0, LENGTH - len(ids))) for ids in sides])
    segments = np.stack([np.arange(LENGTH) < len(ids) for ids in sides]).astype(np.int32)
    places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    batch = {"tokens": tokens.astype(np.int32), "segment_ids": segments, "positions": places}
    hidden = np.asarray(jax.jit(FORWARD)(params(), batch)).reshape(len(pairs), 2, LENGTH, -1)
    return np.take_along_axis(hidden, ends[..., None, None], axis=2)[:, :, 0].astype(np.float64)


def test_loss_scores_and_gradient_of_the_head_are_those_of_numpy():
    """From the hidden state at each side's last id, computed in a row of its own."""
    batch = packed(PAIRS, 4)
    found, grads = loss_and_gradient(params(), batch)
    hidden, kernel = alone(PAIRS), np.asarray(params()["score"]["kernel"], np.float64)[:, 0]
    scores = hidden @ kernel
    margins = scores[:, 0] - scores[:, 1]
    assert np.abs(margins).min() > 1e-3
    lengths = np.array([[len(ids) - 1 - spans[0, 0] for ids, spans in pair] for pair in PAIRS])
    losses = np.log1p(np.exp(-margins))
    expected = {
        "loss": losses,
        "rewards/chosen": scores[:, 0],
        "rewards/rejected": scores[:, 1],
        "rewards/margins": margins,
        "rewards/accuracies": margins > 0,
        "lengths/chosen": lengths[:, 0],
        "lengths/rejected": lengths[:, 1],
        "truncated": np.arange(9) % 3 == 0,
    }
    assert expected.keys() == set(REWARD.metrics) == found.metrics.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(
            by_pair(found.examples[name], batch), values, atol=2e-5, err_msg=name
        )
        np.testing.assert_allclose(found.metrics[name], np.mean(values), atol=2e-5, err_msg=name)
    slope = -1 / (1 + np.exp(margins))
    gradient = np.mean(slope[:, None] * (hidden[:, 0] - hidden[:, 1]), axis=0)
    np.testing.assert_allclose(grads["score"]["kernel"][:, 0], gradient, atol=2e-5)


def test_packed_pairs_equal_plain_rows():
    one, grads = loss_and_gradient(params(), plain(PAIRS))
    two, packed_grads = loss_and_gradient(params(), packed(PAIRS, 4))
    for name in one.metrics:
        np.testing.assert_allclose(two.metrics[name], one.metrics[name], rtol=2e-5, err_msg=name)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * scale), packed_grads, grads
    )


def test_a_margin_is_subtracted():
    batch, config = packed(PAIRS, 4), reward.RewardConfig(margin=0.5)
    hidden = jax.random.normal(jax.random.key(0), (*batch["tokens"].shape, MODEL.embed_dim))
    found = jax.jit(
        lambda batch: config.compute(lambda *_: hidden, params(), Frozen(), config.weigh(batch))
    )(batch)
    margins = by_pair(found.examples["rewards/margins"], batch)
    assert margins.std() > 0.01
    np.testing.assert_allclose(found.value, np.log1p(np.exp(0.5 - margins)).mean(), rtol=1e-5)


def test_a_score_that_is_not_finite_is_watched_pair_by_pair():
    """An infinite hidden state where pair 5 ends, and all that is padding: only that pair shows."""
    batch = packed(PAIRS, 4)
    row, place = np.argwhere(batch["example"] == 5)[0]
    here = (batch["segment_ids"][row] == place + 1) & reward.ends(batch)[row]
    broken = (batch["segment_ids"] == 0).at[row].set(here | (batch["segment_ids"][row] == 0))
    hidden = jnp.broadcast_to(
        jnp.where(broken, jnp.inf, 1.0)[..., None], (*broken.shape, MODEL.embed_dim)
    )
    found = jax.jit(
        lambda batch: REWARD.compute(lambda *_: hidden, params(), Frozen(), REWARD.weigh(batch))
    )(batch)
    (watched,) = REWARD.watched
    bad = np.argwhere(~np.isfinite(np.asarray(found.examples[watched])))
    np.testing.assert_array_equal(bad, [[row, place]])


@pytest.mark.parametrize("most", [LENGTH, 30])
def test_the_end_of_each_answer_is_scored_also_of_cut_ones(most):
    """The last id of each side, once: `</s>`, or where the rule cut it."""
    sides = [[TokenIds(ids=ids, spans=spans) for ids, spans in pair] for pair in PAIRS[:6]]
    kept = [
        truncation_lib.fit(pair, max_length=most - 1, rule="cut", one_row=True)[1] for pair in sides
    ]
    assert any(len(a.ids) < len(b.ids) for a, b in zip(kept[0], sides[0], strict=True)) or most > 30
    pairs = [[(side.ids, side.spans) for side in pair] for pair in kept if pair]
    assert len(pairs) >= 3
    batch = packed(pairs, 3)
    ends = np.asarray(reward.ends(batch))
    for number, pair in enumerate(pairs):
        row, segment = number % 3, number // 3 + 1
        for branch, (ids, _) in enumerate(pair, 1):
            here = (batch["segment_ids"][row] == segment) & (batch["branches"][row] == branch)
            (place,) = np.flatnonzero(ends[row] & here)
            assert batch["positions"][row, place] == len(ids) - 1
            assert batch["tokens"][row, place] == ids[-1]
    assert ends.sum() == 2 * len(pairs)
    np.testing.assert_array_equal(
        np.argwhere(reward.ends(plain(pairs)))[:, 2], [len(ids) - 1 for p in pairs for ids, _ in p]
    )


def test_rows_to_ends_hold_every_id_once():
    """Prompt once, and one position more a pair than a row that is shifted."""
    batch = packed(PAIRS[:2], 1)
    used = int((batch["segment_ids"] > 0).sum())
    shifted = builders.packed_rows(PAIRS[:2], 1, LENGTH)
    assert used == int((shifted["segment_ids"] > 0).sum()) + 2
    (ids, spans), (other, _) = PAIRS[0]
    first = int(spans[0, 0]) + 1
    expected = [*ids, *other[first:]]
    np.testing.assert_array_equal(batch["tokens"][0, : len(expected)], expected)
    np.testing.assert_array_equal(batch["targets"], batch["tokens"])
    with pytest.raises(ValueError, match="cannot hold"):
        packing.fill_pair_row_to_ends(PAIRS[:2], capacity=used - 1)


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(data=4, fsdp=2), MeshConfig(data=1, fsdp=2, context=2, tensor=2)],
    ids=str,
)
def test_eight_devices_give_the_same_loss_and_gradient(mesh):
    pairs = builders.random_pairs(10, 48)
    batch = packed(pairs, 8)
    expected, grads = loss_and_gradient(params(), batch)
    mesh = mesh_lib.make(mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params(), sharding.param_shardings(mesh, params()))
        found, sharded = loss_and_gradient(placed, builders.placed(mesh, REWARD, batch))
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-5)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * scale), sharded, grads)


def test_a_head_is_kept_or_drawn_and_no_output_projection_stays():
    model = jax.eval_shape(lambda: llama.init_params(builders.MODEL, jax.random.key(0)))
    trains, frozen = jax.eval_shape(lambda p: REWARD.split(p, jax.random.key(0)), model)
    assert trains.keys() == {"model", "score"} and not jax.tree.leaves(frozen)
    assert trains["score"]["kernel"].shape == (builders.MODEL.embed_dim, 1)
    drawn, _ = REWARD.split({"model": params()["model"]}, jax.random.key(0))
    wide, _ = REWARD.split({"model": {"norm": {"scale": jnp.ones(4096)}}}, jax.random.key(0))
    assert float(wide["score"]["kernel"].std()) == pytest.approx(0.02, rel=0.05)
    kept, _ = REWARD.split(params(), jax.random.key(0))
    assert drawn["score"]["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(kept["score"]["kernel"], params()["score"]["kernel"])


def test_calibration_of_margins_in_bins():
    """Against a loop; margins that are not finite are left out, and a tie is half won."""
    rng = np.random.default_rng(0)
    margins = np.concatenate([rng.normal(1, 2, 200), [0.0, np.nan, 40.0, -np.inf]])
    found = reward_feed.calibration(margins)
    finite, error = margins[np.isfinite(margins)], 0.0
    sure = np.array([1 / (1 + np.exp(-abs(m))) for m in finite])
    for number in range(10):
        low, high = 0.5 + number / 20, 0.5 + (number + 1) / 20
        here = (sure >= low) & ((sure < high) | (number == 9))
        assert found[f"calibration/{number}/pairs"] == here.sum() > 0
        won = np.mean([0.5 if m == 0 else float(m > 0) for m in finite[here]])
        assert found[f"calibration/{number}/won"] == pytest.approx(won)
        assert found[f"calibration/{number}/sure"] == pytest.approx(sure[here].mean())
        error += here.sum() / len(finite) * abs(won - sure[here].mean())
    assert found["calibration/error"] == pytest.approx(error)
    assert len(found) == 31
    assert sum(found[f"calibration/{n}/pairs"] for n in range(10)) == 202
