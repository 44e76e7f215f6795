"""PPO's arithmetic, and one whole step of it, against independent numpy."""

import dataclasses

import builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tulu_jax import validation
from tulu_jax.models import llama
from tulu_jax.models.config import ExecutionConfig
from tulu_jax.objectives import advantages, ppo, ppo_rewards
from tulu_jax.objectives.rollouts import Rollouts
from tulu_jax.training import optim
from tulu_jax.training.state import VALUE, Frozen

ROWS, LENGTH, END = 6, 24, 2
SETTINGS = dict(clip=0.2, value_clip=0.2, value_coef=0.1)
CONFIG = ppo.PPOConfig(reward_from="unused", prompts=ROWS, response_length=12, vocab_chunk=16)
FORWARD = llama.forward(
    builders.MODEL, ExecutionConfig(compute_dtype="float32", attention="xla", remat=False)
)


@pytest.fixture(scope="module")
def params():
    """A policy and a value model of two layers, whose scores are far from 0."""
    keys = jax.random.split(jax.random.key(0))
    policy = llama.init_params(builders.MODEL, keys[0])
    value = llama.init_params(builders.MODEL.with_head("score"), keys[1])
    value["score"]["kernel"] *= 20
    return {**policy, VALUE: value}


@pytest.fixture(scope="module")
def rollouts():
    """Answers of one token to twelve, the longest cut off; old numbers near the params' own."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 512, rng.integers(2, 10)).tolist() for _ in range(ROWS)]
    answers = [rng.integers(3, 512, size).tolist() + [END] for size in (0, 3, 11, 5, 7)]
    answers += [rng.integers(3, 512, 12).tolist()]
    return Rollouts.of(prompts, answers, end=END, length=LENGTH)


def loops(rewards, values, mask, gamma, lam):
    """GAE of Schulman et al. 2016, eq. 16, as its sum over the future, answer by answer."""
    found = np.zeros(rewards.shape)
    for b in range(len(rewards)):
        where = np.flatnonzero(mask[b])
        for i, t in enumerate(where):
            for distance, s in enumerate(where[i:]):
                following = values[b, s + 1] if s + 1 in where else 0.0
                delta = rewards[b, s] + gamma * following - values[b, s]
                found[b, t] += (gamma * lam) ** distance * delta
    return found


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_advantages_are_the_sums_of_the_paper(rollouts, gamma, lam):
    rng, mask = np.random.default_rng(1), rollouts.mask
    rewards, values = np.where(mask, rng.normal(size=(2, *mask.shape)), 0.0)
    found, returns = advantages.gae(rewards, values, mask, gamma=gamma, lam=lam)
    expected = loops(rewards, values, mask, gamma, lam)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(returns[mask], (expected + values)[mask], atol=1e-12)
    assert not found[~mask].any() and not returns[~mask].any()
    if (gamma, lam) == (1.0, 1.0):  # what is still to come
        np.testing.assert_allclose(returns[mask], np.cumsum(rewards[:, ::-1], 1)[:, ::-1][mask])


def test_whitening_has_bessels_correction():
    values, mask = np.array([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]]), np.array([[1, 1, 0], [1, 0, 0]])
    found = advantages.whitened(values, mask.astype(bool))
    inside = found[mask.astype(bool)]
    np.testing.assert_allclose(inside, (np.array([1, 2, 4]) - 7 / 3) / np.sqrt(7 / 3 + 1e-6))
    assert not found[mask == 0].any() and inside.std(ddof=1) == pytest.approx(1, abs=1e-6)
    one = np.array([[True, False, False], [False] * 3])
    assert advantages.whitened(values, one).tolist() == [[0.0] * 3] * 2


def test_a_score_is_the_reward_of_an_answers_last_token(rollouts):
    kl = np.where(rollouts.mask, 0.5, 9.0)
    rewards = advantages.token_rewards(
        kl, np.arange(ROWS) + 1.0, rollouts.last, rollouts.mask, kl_coef=0.1
    )
    for row in range(ROWS):
        where = np.flatnonzero(rollouts.mask[row])
        assert where[-1] == rollouts.last[row] == rollouts.lengths[row] - 2
        expected = np.full(len(where), -0.05)
        expected[-1] += row + 1
        np.testing.assert_allclose(rewards[row, where], expected)
    assert rewards.sum() == pytest.approx(21 - 0.05 * rollouts.mask.sum())
    assert rollouts.ended.tolist() == [True] * 5 + [False]


def test_rows_are_shifted_and_hold_the_last_token(rollouts):
    rows = rollouts.rows()
    for row in range(ROWS):
        end, first = rollouts.lengths[row], rollouts.prompt_lengths[row]
        where = np.flatnonzero(rows["loss_mask"][row])
        assert where.tolist() == list(range(first - 1, end - 1))
        tokens = rollouts.tokens[row]
        assert rows["targets"][row, where].tolist() == tokens[first:end].tolist()
        assert rows["segment_ids"][row].tolist() == [1] * end + [0] * (LENGTH - end)
        assert rows["positions"][row, :end].tolist() == list(range(end))


def numpy_log_softmax(logits):
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def numpy_step(logps, values, batch):
    """The loss and its gradients with respect to both, by hand, in float64: Schulman et al. 2017,
    eq. 7 and 9, token by token."""
    mask = np.asarray(batch["loss_mask"])
    d_logps, d_values, losses = np.zeros(mask.shape), np.zeros(mask.shape), {"p": 0.0, "v": 0.0}
    n, c, vc = mask.sum(), SETTINGS["clip"], SETTINGS["value_clip"]
    old = {name: np.asarray(batch[name], np.float64) for name in ppo.BY_TOKEN}
    clipped = 0
    for at in zip(*np.nonzero(mask), strict=True):
        a, ratio = old["advantages"][at], np.exp(logps[at] - old["old_logps"][at])
        held = min(max(ratio, 1 - c), 1 + c)
        losses["p"] += max(-a * ratio, -a * held) / n
        if -a * ratio >= -a * held:
            d_logps[at] = -a * ratio / n
        clipped += abs(ratio - 1) > c
        v, before, r = values[at], old["old_values"][at], old["returns"][at]
        near = before + min(max(v - before, -vc), vc)
        losses["v"] += 0.5 * max((v - r) ** 2, (near - r) ** 2) / n
        if (v - r) ** 2 >= (near - r) ** 2:
            d_values[at] = SETTINGS["value_coef"] * (v - r) / n
        elif abs(v - before) < vc:
            d_values[at] = SETTINGS["value_coef"] * (near - r) / n
    return (
        losses["p"] + SETTINGS["value_coef"] * losses["v"],
        losses,
        d_logps,
        d_values,
        clipped / n,
    )


def batch_of(rollouts, params, spread=0.3):
    """A batch of the rollouts, from what the params say of them and what is `spread` off, so that
    ratios and values are on both sides of every clip."""
    rng, rows = np.random.default_rng(2), {n: jnp.asarray(v) for n, v in rollouts.rows().items()}
    mask = rollouts.mask
    said = jax.jit(
        lambda params, rows: (
            CONFIG.token_logps(FORWARD, params, rows),
            ppo.token_values(FORWARD, params[VALUE], rows),
        )
    )
    logps, values = map(np.asarray, said(params, rows))
    noise = rng.normal(size=(5, *mask.shape))
    made = dict(
        old_logps=logps + spread * noise[0],
        old_values=values + spread * noise[1],
        advantages=noise[2],
        returns=values + noise[3],
    )
    rows |= {n: jnp.asarray(np.where(mask, v, 0.0), jnp.float32) for n, v in made.items()}
    rows |= {name: jnp.asarray(rng.normal(size=ROWS), jnp.float32) for name in ppo.BY_ROW}
    return rows, logps, values


def test_a_step_is_that_of_numpy(rollouts, params):
    """Log-probabilities at the sampling temperature, loss, and gradients of every parameter: those
    of Σ d_logps · logps + Σ d_values · values, with numpy's hand-made d."""
    batch, logps, values = batch_of(rollouts, params)
    mask = rollouts.mask
    logits = llama.logits(
        builders.MODEL, ExecutionConfig(compute_dtype="float32", attention="xla", remat=False),
        llama.own(params), **{n: batch[n] for n in ("tokens", "segment_ids", "positions")},
    )  # fmt: skip
    scaled = numpy_log_softmax(np.asarray(logits, np.float64) / CONFIG.temperature)
    own = np.take_along_axis(scaled, np.asarray(batch["targets"])[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(logps[mask], own[mask], atol=1e-5)

    expected, parts, d_logps, d_values, clipped = numpy_step(
        logps.astype(np.float64), values.astype(np.float64), batch
    )
    weighed = CONFIG.weigh(batch)

    def loss(params):
        found = CONFIG.compute(FORWARD, params, Frozen(), weighed)
        return found.value, found

    (value, found), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert value == pytest.approx(expected, abs=1e-5)
    assert found.metrics["policy/loss"] == pytest.approx(parts["p"], abs=1e-5)
    assert found.metrics["value/loss"] == pytest.approx(parts["v"], abs=1e-5)
    assert 0.1 < clipped < 0.9 and found.metrics["policy/clipped"] == pytest.approx(clipped)

    def linear(params):
        of_policy = CONFIG.token_logps(FORWARD, params, batch) * d_logps.astype(np.float32)
        of_value = ppo.token_values(FORWARD, params[VALUE], batch) * d_values.astype(np.float32)
        return jnp.sum(of_policy) + jnp.sum(of_value)

    by_hand = jax.jit(jax.grad(linear))(params)
    for (path, grad), hand in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(by_hand), strict=True
    ):
        np.testing.assert_allclose(grad, hand, atol=1e-5, err_msg=str(path))
    assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(grads))


def test_hand_made_gradients_are_those_of_finite_differences(rollouts, params):
    """The numpy step checks itself: else both could be wrong alike."""
    batch, logps, values = batch_of(rollouts, params)
    logps, values = logps.astype(np.float64), values.astype(np.float64)
    _, _, d_logps, d_values, _ = numpy_step(logps, values, batch)
    for at in list(zip(*np.nonzero(rollouts.mask), strict=True))[::3]:
        for place, (array, gradient) in enumerate(((logps, d_logps), (values, d_values))):
            sides = []
            for change in (1e-6, -1e-6):
                moved = array.copy()
                moved[at] += change
                both = (moved, values) if place == 0 else (logps, moved)
                sides.append(numpy_step(*both, batch)[0])
            assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(gradient[at], abs=1e-5)


def test_pieces_of_an_update_add_up(rollouts, params):
    batch = CONFIG.weigh(batch_of(rollouts, params)[0])
    compute = jax.jit(lambda b: CONFIG.compute(FORWARD, params, Frozen(), b).metrics)
    whole = compute(batch)
    parts = [compute({n: v[half::2] for n, v in batch.items()}) for half in (0, 1)]
    assert whole.keys() == set(CONFIG.metrics)
    for name in whole:
        assert whole[name] == pytest.approx(float(sum(part[name] for part in parts)), abs=2e-5)


def test_each_network_is_clipped_by_its_own_norm():
    config = optim.OptimizerConfig(learning_rate=1.0, warmup_ratio=0.0, clip_norm=1.0)
    optimizer = optim.make(config, 10)
    grads = {"model": jnp.full(4, 0.1), VALUE: {"score": jnp.full(4, 100.0)}}
    state = optimizer.init(grads)
    _, after = optimizer.update(grads, state, grads)
    mu = after[1][0].mu  # a tenth of the clipped gradients
    np.testing.assert_allclose(mu["model"], 0.01, rtol=1e-5)
    np.testing.assert_allclose(mu[VALUE]["score"], 0.05, rtol=1e-5)
    alone = {"model": jnp.full(4, 100.0)}
    _, after = optimizer.update(alone, optimizer.init(alone), alone)
    np.testing.assert_allclose(after[1][0].mu["model"], 0.05, rtol=1e-5)


def test_a_mode_sets_each_quirk_and_gives_way_to_what_is_set():
    correct, easylm = (ppo.PPOConfig(reward_from="x", mode=mode) for mode in ppo.MODES)
    assert (correct.old_from, correct.logps_at, correct.bos) == ("rollout", "sampling", True)
    assert (easylm.old_from, easylm.logps_at, easylm.bos) == ("minibatch", "one", False)
    assert (easylm.end_token, easylm.log_softmax_dtype) == ("written", "bfloat16")
    mixed = ppo.PPOConfig(reward_from="x", mode="easylm", bos=True, log_softmax_dtype="float32")
    assert mixed.bos and mixed.old_from == "minibatch" and mixed.log_softmax_dtype == "float32"
    assert dataclasses.replace(mixed, kl_coef=0.1).bos
    assert "reward_from" not in correct.identity() and correct.identity()["bos"]
    placed = ppo.PPOConfig(reward_from="runs/rm", bucket="gs://b/x")
    assert placed.reward_from == "gs://b/x/runs/rm"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"mode": "easylmm"}, "did you mean 'easylm'"),
        ({"reward": "length"}, "expected one of"),
        ({"lam": 1.5}, "lam = 1.5: expected 0 to 1"),
        ({"temperature": 0.0}, "temperature = 0.0: expected more than 0"),
        ({"log_softmax_dtype": "bfloat16"}, "which nobody had"),
        ({"end_token": "none"}, "end_token = 'none': expected one of"),
    ],
)
def test_settings_that_are_refused(changes, said):
    with pytest.raises(validation.UsageError, match=said):
        ppo.PPOConfig(reward_from="x", **changes)


def test_the_programs_that_score():
    assert ppo_rewards.right("Sure: red.", "Sure: red.", "red") == 1
    assert ppo_rewards.right(" red ", "Sure: red.", "red") == 1
    assert ppo_rewards.right("blue", "Sure: red.", "red") == 0
    long = ppo_rewards.right_or_long("blue " * 12, "Sure: red.", "red")
    assert long > ppo_rewards.right_or_long("red", "Sure: red.", "red")
