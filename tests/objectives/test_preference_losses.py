"""Every loss against TRL's own code on the same log-probabilities, and its gradient."""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tulu_jax.objectives import preference_losses

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

PAIRS, LONGEST = 6, 9


def draw(seed=0):
    """Token log-probs [2·PAIRS, LONGEST] of answers behind one prompt token, chosen first, their
    mask, and the reference's sums [2·PAIRS]: float64."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, LONGEST + 1, 2 * PAIRS)
    mask = np.arange(LONGEST)[None] < lengths[:, None]
    logps = -rng.gamma(1.0, 2.0, mask.shape) * mask
    return logps, mask, logps.sum(axis=1) + rng.normal(0, 3, 2 * PAIRS)


def ours(loss, logps, mask, ref_logps, *, beta, label_smoothing=0.0, target_margin=0.0):
    """Mean loss and its gradient for the summed log-probs [2·PAIRS]."""
    lengths = jnp.asarray(mask.sum(axis=1).reshape(2, PAIRS).T, jnp.float32)

    def mean(sums):
        ratios = sums if loss in preference_losses.REFERENCE_FREE else sums - ref_logps
        return preference_losses.pair_losses(
            loss,
            ratios.reshape(2, PAIRS).T,
            lengths,
            real=jnp.ones(PAIRS, bool),
            beta=beta,
            label_smoothing=label_smoothing,
            target_margin=target_margin,
        ).mean()

    ref_logps = jnp.asarray(ref_logps, jnp.float32)
    return jax.value_and_grad(mean)(jnp.asarray(logps.sum(axis=1), jnp.float32))


def stand_in(**fields):
    """The fields of a TRL trainer that its loss reads, on one CPU process."""
    accelerator = types.SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    return types.SimpleNamespace(
        model=types.SimpleNamespace(training=True),
        accelerator=accelerator,
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        _metrics={"train": collections.defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **fields,
    )


def scores(token_logps):
    """What TRL's fused head gives for these log-probs: a model of it."""
    zeros = torch.zeros_like(token_logps)
    return types.SimpleNamespace(
        log_probs=token_logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )


def trl_inputs(mask):
    completion = torch.tensor(np.concatenate([np.zeros((len(mask), 1)), mask], axis=1)).long()
    return {
        "input_ids": torch.ones_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
    }


def dpo_trainer(loss, logps, mask, ref_logps, *, beta, label_smoothing=0.0):
    from trl.trainer.dpo_trainer import DPOTrainer

    trainer = stand_in(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        beta=beta,
        label_smoothing=label_smoothing,
        loss_types=[loss],
        loss_weights=[1.0],
        use_weighting=False,
    )
    logps = torch.tensor(logps, requires_grad=True)
    chosen, rejected = torch.tensor(ref_logps).chunk(2)
    inputs = trl_inputs(mask) | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    value = DPOTrainer._compute_loss(trainer, lambda **_: scores(logps), inputs, False)
    value.backward()
    return value.item(), logps.grad[:, 0].numpy(), trainer._metrics["train"]


def assert_agree(ours, theirs):
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("sigmoid", {"beta": 0.1}),
        ("sigmoid_norm", {"beta": 5.0}),
        ("ipo", {"beta": 0.1}),
        ("hinge", {"beta": 0.3}),
        ("robust", {"beta": 0.1, "label_smoothing": 0.2}),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_losses_of_dpo_trainer(loss, options, seed):
    data = draw(seed)
    assert_agree(ours(loss, *data, **options), dpo_trainer(loss, *data, **options)[:2])


def cpo_trainer(loss, chosen, rejected, **fields):
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    trainer = stand_in(loss_type=loss, alpha=0.0, **fields)
    return CPOTrainer.cpo_loss(trainer, chosen, rejected)[0].mean()


def test_conservative_dpo_is_label_smoothing_on_ratios():
    """TRL's `DPOTrainer` has it no more; its `CPOTrainer`, given ratios, computes it."""
    logps, mask, ref_logps = draw()
    sums = torch.tensor(logps.sum(axis=1), requires_grad=True)
    chosen, rejected = (sums - torch.tensor(ref_logps)).chunk(2)
    value = cpo_trainer("sigmoid", chosen, rejected, beta=0.1, label_smoothing=0.1)
    value.backward()
    found = ours("sigmoid", logps, mask, ref_logps, beta=0.1, label_smoothing=0.1)
    assert_agree(found, (value.item(), sums.grad.numpy()))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_simpo_of_cpo_trainer(label_smoothing):
    logps, mask, ref_logps = draw()
    sums = torch.tensor(logps.sum(axis=1), requires_grad=True)
    chosen, rejected = (sums / torch.tensor(mask.sum(axis=1))).chunk(2)
    fields = dict(beta=2.0, label_smoothing=label_smoothing)
    value = cpo_trainer("simpo", chosen, rejected, simpo_gamma=0.5, **fields)
    value.backward()
    found = ours("simpo", logps, mask, ref_logps, target_margin=0.5, **fields)
    assert_agree(found, (value.item(), sums.grad.numpy()))


def test_orpo_of_orpo_trainer():
    """Its odds ratio; the likelihood term is the paper's, a mean over the tokens of each answer."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    logps, mask, ref_logps = draw()
    sums = torch.tensor(logps.sum(axis=1), requires_grad=True)
    chosen, rejected = (sums / torch.tensor(mask.sum(axis=1))).chunk(2)
    odds_ratio = ORPOTrainer.odds_ratio_loss(stand_in(beta=0.1), chosen, rejected)[0]
    value = -chosen.mean() - odds_ratio.mean()
    value.backward()
    found = ours("orpo", logps, mask, ref_logps, beta=0.1)
    np.testing.assert_allclose(found[0], value.item(), rtol=1e-5)
    np.testing.assert_allclose(found[1], sums.grad.numpy(), rtol=2e-3, atol=1e-6)


def kto_trainer(logps, mask, ref_logps, label, *, kl, beta):
    """TRL's KTO of one side, all with `label`, against a given KL: mean loss."""
    from trl.trainer.kto_trainer import KTOTrainer

    trainer = stand_in(
        beta=beta,
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=1.0,
        undesirable_weight=1.0,
        _compute_kl_logps=lambda model, batch: kl,
    )
    inputs = trl_inputs(mask) | {
        "label": torch.full((PAIRS,), label),
        "ref_logps": ref_logps,
        "ref_KL_logps": torch.zeros(()),
    }
    return KTOTrainer._compute_loss(trainer, lambda **_: scores(logps), inputs, False)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kto_on_pairs_is_kto_of_each_side_against_the_other_sides_kl(seed):
    """The paired form left TRL with its `DPOTrainer`'s rewrite; its `KTOTrainer` has the terms."""
    logps, mask, ref_logps = draw(seed)
    token_logps = torch.tensor(logps, requires_grad=True)
    halves = [
        (token_logps[side], mask[side], torch.tensor(ref_logps[side]))
        for side in (slice(0, PAIRS), slice(PAIRS, None))
    ]
    kl = [(part.sum(dim=1) - ref).mean().detach() for part, _, ref in halves]
    chosen = kto_trainer(*halves[0], True, kl=kl[1], beta=0.1)
    rejected = kto_trainer(*halves[1], False, kl=kl[0], beta=0.1)
    value = (chosen + rejected) / 2
    value.backward()
    found = ours("kto_pair", logps, mask, ref_logps, beta=0.1)
    assert_agree(found, (value.item(), token_logps.grad[:, 0].numpy()))


def test_swapping_sides_mirrors_the_sigmoid_loss():
    """L(m) − L(−m) = −m, whatever the lengths."""
    margins = jnp.linspace(-30, 30, 13)
    left = preference_losses.sigmoid(margins, label_smoothing=0.0)
    right = preference_losses.sigmoid(-margins, label_smoothing=0.0)
    np.testing.assert_allclose(left - right, -margins, rtol=1e-5, atol=1e-5)
