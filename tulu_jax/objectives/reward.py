"""Reward modelling: a score of an answer, trained on which of two is preferred.

A score head stands in place of the output projection (Ouyang et al. 2022, §3.5); the loss is that
of Bradley and Terry, −log σ(r_chosen − r_rejected). Rows are those of DPO but unshifted
(`DataConfig.to_ends`), so that each answer's last token, `</s>` or where it was cut, is an input:
its hidden state is scored. `*pairs` is the shape of `example`, as in `pairs`.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tulu_jax import validation
from tulu_jax.models import llama
from tulu_jax.models.config import SCORE
from tulu_jax.objectives import objective, pairs, reward_feed
from tulu_jax.training.state import Frozen


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(pairs.OnPairs):
    """`margin` is subtracted from r_chosen − r_rejected before the loss. A base that is a language
    model gets a new head, drawn with the run's seed; one with a score head goes on with it. The
    functions are those of `objective.Objective`.
    """

    margin: float = 0.0

    head: ClassVar[str] = SCORE
    metrics: ClassVar[tuple[str, ...]] = (
        *("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
        *pairs.OnPairs.LENGTHS,
    )

    def __post_init__(self):
        rule = self.margin >= 0, f"margin = {self.margin}: expected 0 or more"
        validation.check(self, lambda: [rule])

    def saves_memory(self):
        return []

    def problems(self, config):
        yield (
            config.reference_dir is None,
            f"reference_dir = {config.reference_dir!r} is for DPO with reference = 'cached'; a "
            "reward model has no reference",
        )
        yield (
            config.adapter_from is None,
            f"adapter_from = {config.adapter_from!r}: a PEFT folder of ours has no score head; "
            "expected None, or a base that it is merged into",
        )

    def split(self, params, key):
        """The trunk and a float32 score head, that of the base or a new one; no output projection,
        which nothing would read."""
        score = params.get(SCORE)
        if score is None:
            score = llama.init_score(params["model"]["norm"]["scale"].shape[0], key)
        score = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), score)
        return {"model": params["model"], SCORE: score}, Frozen()

    def compute(self, forward, params, frozen, batch):
        """The mean of the pairs' losses; in `examples` each metric pair by pair, [*pairs]."""
        del frozen
        scores = self.scores(forward, params, batch)
        told = pairs.rewards(scores)
        losses = -jax.nn.log_sigmoid(told["rewards/margins"] - self.margin)
        return pairs.loss({"loss": losses} | told, batch)

    def scores(
        self, forward: objective.Forward, params: llama.Params, batch: objective.Batch
    ) -> Float[Array, "*pairs 2"]:
        """float32 scores of both answers of each pair, [CHOSEN, REJECTED]; 0 where there is no
        pair."""
        rows = pairs.rows(batch)
        scores = llama.scores(forward(params, rows), params).reshape(batch["tokens"].shape)
        return pairs.response_sums(scores, {**batch, "loss_mask": ends(batch)})

    def feed(self, run):
        return reward_feed.RewardFeed(run)


def ends(batch: dict) -> Bool[Array, "B *two T"]:
    """The positions that are scored: the last of each answer that `loss_mask` marks."""
    mask = batch["loss_mask"]
    place = jnp.broadcast_to(jnp.arange(mask.shape[-1]), mask.shape)
    if "branches" not in batch:
        return mask & (place == jnp.max(jnp.where(mask, place, -1), axis=-1, keepdims=True))
    places = 2 * batch["example"].shape[1]
    answer = 2 * (batch["segment_ids"] - 1) + batch["branches"] - 1
    answer = jnp.where(mask, answer, places)

    def row(place, answer):
        return jax.ops.segment_max(place, answer, num_segments=places + 1)[answer]

    return mask & (place == jax.vmap(row)(place, answer))
