"""Proximal policy optimisation against a reward model, as Tülu 2.5 did it or as it should be.

Two networks train, the policy and a value model that starts as the reward model; the reference,
which is the policy as the run began, and the reward model are frozen. With an adapter policy, value
model and reference share one frozen base: the policy has adapters on it, the value model others and
the reward model's score head (`step.split`). An update is one mini-batch;
`ppo_feed` makes the rollouts of an iteration of several updates before the first of them.
(Ouyang et al. 2022; Ivison et al. 2024, "Unpacking DPO and PPO".)

Rows are [B, T], a prompt and its answer each, shifted; `loss_mask` marks the answer's tokens.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tulu_jax import validation
from tulu_jax.data import fields as fields_lib
from tulu_jax.models import llama
from tulu_jax.models.config import DTYPES, LM_HEAD, SCORE
from tulu_jax.objectives import advantages, losses, objective, ppo_feed, ppo_rewards
from tulu_jax.parallel import sharding
from tulu_jax.training.state import REWARD, VALUE, Frozen

# What each mode sets where a field is None. Those of 'easylm' are the original's, named for its
# trainer (`llama_train_ppo.py` at dbf2212).
MODES = {
    "correct": {
        "old_from": "rollout",
        "logps_at": "sampling",
        "bos": True,
        "end_token": "sampled",
        "log_softmax_dtype": "float32",
    },
    "easylm": {
        "old_from": "minibatch",
        "logps_at": "one",
        "bos": False,
        "end_token": "written",
        "log_softmax_dtype": "bfloat16",
    },
}
BY_ROW = ("score", "reward", "kl", "length", "ended", "empty", "explained")
BY_TOKEN = ("old_logps", "old_values", "advantages", "returns")
COLLECTED = ("score", "reward", "kl", "length", "ended", "empty")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """An iteration is `prompts` prompts with one answer each, of up to `response_length` tokens at
    `temperature`, and `ppo_epochs` passes over them in mini-batches of the run's `batch_size` rows.
    A prompt may have max_length − response_length tokens; longer ones are left out, and counted.

    `reward_from` is a reward model: a run's workdir or a Hugging Face folder, placed below `bucket`
    if that is given. `reward` names what scores an answer (`ppo_rewards.REWARDS`): 'model', or a
    program. An answer without its end token scores `missing_end_score` instead. `kl_coef` times the
    log-ratio to the reference is taken off the reward of each token. `gamma` and `lam` are those of
    `advantages.gae`, `clip` and `value_clip` those of the losses, whose sum has `value_coef` before
    the value's. The run stops if the mean over an iteration of an answer's summed log-ratio is
    above `most_kl` nats. `slots` answers are decoded at once.

    `mode` sets each of these that is None: `old_from` 'rollout' compares with log-probabilities,
    values and advantages from before the iteration's first update, 'minibatch' with those of this
    very update, so that nothing is ever clipped; `logps_at` takes log-probabilities at the
    temperature of 'sampling' or at 'one'; `bos` says whether prompts begin with the token that SFT
    began with; `end_token` 'written' drops the sampled end and what pads it, and writes one behind
    the last token unless the answer is full; `log_softmax_dtype` as in `DPOConfig`.

    `vocab_chunk` as in `SFTConfig`. The functions are those of `objective.Objective`.
    """

    reward_from: str
    reward: str = "model"
    mode: str = "correct"
    prompts: int = 512
    ppo_epochs: int = 1
    response_length: int = 1024
    temperature: float = 0.7
    kl_coef: float = 0.05
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    value_coef: float = 0.1
    missing_end_score: float = -10.0
    most_kl: float = 1000.0
    old_from: str | None = None
    logps_at: str | None = None
    bos: bool | None = None
    end_token: str | None = None
    log_softmax_dtype: str | None = None
    slots: int = 64
    vocab_chunk: int = 512
    bucket: dataclasses.InitVar[str | None] = None

    kind: ClassVar[str] = "preference"
    stage: ClassVar[str] = "sft"  # rows divide over fsdp
    head: ClassVar[str] = LM_HEAD
    metrics: ClassVar[tuple[str, ...]] = (
        *("loss", *(f"rollout/{name}" for name in COLLECTED)),
        *("policy/loss", "policy/clipped", "policy/ratio", "policy/kl", "policy/entropy"),
        *("value/loss", "value/clipped", "value/explained"),
    )
    watched: ClassVar[tuple[str, ...]] = ("loss",)
    row_multiple: ClassVar[int] = 1

    def __post_init__(self, bucket):
        if self.mode in MODES:
            for name, value in MODES[self.mode].items():
                if getattr(self, name) is None:
                    object.__setattr__(self, name, value)
        validation.check(self, self._rules, paths={"reward_from": bucket})

    def _rules(self):
        yield validation.one_of("mode", self.mode, MODES)
        yield validation.one_of("reward", self.reward, ppo_rewards.REWARDS)
        if self.mode not in MODES:
            return
        yield validation.one_of("old_from", self.old_from, ("rollout", "minibatch"))
        yield validation.one_of("logps_at", self.logps_at, ("sampling", "one"))
        yield validation.one_of("end_token", self.end_token, ("sampled", "written"))
        yield validation.one_of("log_softmax_dtype", self.log_softmax_dtype, DTYPES)
        names = ("prompts", "ppo_epochs", "response_length", "slots", "vocab_chunk", "temperature")
        for name in (*names, "clip", "value_clip", "value_coef", "most_kl"):
            yield getattr(self, name) > 0, f"{name} = {getattr(self, name)}: expected more than 0"
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            yield 0 <= value <= 1, f"{name} = {value}: expected 0 to 1"
        yield self.kl_coef >= 0, f"kl_coef = {self.kl_coef}: expected 0 or more"
        yield (
            self.log_softmax_dtype != "bfloat16" or self.logps_at == "one",
            "log_softmax_dtype = 'bfloat16' with logps_at = 'sampling', which nobody had; expected "
            "float32, or logps_at = 'one'",
        )

    @property
    def param_axes(self):
        """Those of the two networks that have a score head, below their names."""
        return tuple((f"({VALUE}|{REWARD})/{path}", axes) for path, axes in sharding.PARAM_AXES)

    def first_pass(self, config, mesh):
        return None

    def saves_memory(self):
        return []

    def updates(self, batch_size: int) -> int:
        """Updates of an iteration."""
        return self.prompts // batch_size * self.ppo_epochs

    def problems(self, config):
        yield (
            config.reference_dir is None,
            f"reference_dir = {config.reference_dir!r} is for DPO with reference = 'cached'; PPO's "
            "answers are new in each iteration",
        )
        yield (
            config.adapter is None or config.adapter.dropout == 0,
            "adapter.dropout is above 0, so an update's policy would be another than the one that "
            "drew its answers; set lora.LoRAConfig.dropout = 0.0",
        )
        yield (
            config.execution.gather_dtype is None,
            f"execution.gather_dtype = {config.execution.gather_dtype!r}: an update's policy would "
            "have other weights than the one that drew its answers; remove it",
        )
        yield (
            config.adapter_from is None,
            f"adapter_from = {config.adapter_from!r}: the reference is the base without adapters, "
            "so a run that begins with some would begin far from it; merge them into a base "
            "(tulu_jax.convert --merge), or remove it",
        )
        yield (
            config.eval_every is None and config.checkpoint.best is None,
            f"eval_every = {config.eval_every} and checkpoint.best = {config.checkpoint.best!r}: "
            "PPO has no evaluation within a run; set both None, and see train/rollout/*, or run "
            "tulu_jax.evaluate on its checkpoints",
        )
        yield (
            config.data.packing == "none" and config.data.truncation == "cut",
            f"data.packing = {config.data.packing!r} and truncation = {config.data.truncation!r}: "
            "PPO takes prompts alone, one a row; expected 'none' and 'cut'",
        )
        yield (
            self.response_length < config.data.max_length,
            f"response_length = {self.response_length} leaves no room for a prompt in max_length = "
            f"{config.data.max_length}",
        )
        whole = self.prompts % config.batch_size == 0
        yield (
            whole,
            f"prompts = {self.prompts} of an iteration are not a multiple of batch_size = "
            f"{config.batch_size}",
        )
        updates = max(1, self.updates(config.batch_size))
        yield (
            not whole or (config.num_steps or 0) % updates == 0,
            f"num_steps = {config.num_steps} is not a multiple of the {updates} updates of an "
            "iteration, whose rollouts would be made in vain",
        )
        yield losses.rule(self.log_softmax_dtype, config.execution.compute_dtype)

    def identity(self):
        """All but where the reward model lies, whose weights are in the run's fingerprint, and what
        changes no number."""
        free = ("reward_from", "most_kl", "slots")
        return {name: v for name, v in dataclasses.asdict(self).items() if name not in free}

    def fields(self, *, rows, length, packing, places):
        """Those of `fields.conversations`; float32 `BY_TOKEN` [B, T] and `BY_ROW` [B]."""
        del packing, places
        by_token = fields_lib.Field((rows, length), "float32", ("batch", "length"))
        by_row = fields_lib.Field((rows,), "float32", ("batch",))
        return {
            **fields_lib.conversations(rows=rows, length=length),
            **dict.fromkeys(BY_TOKEN, by_token),
            **dict.fromkeys(BY_ROW, by_row),
        }

    def split(self, params, key):
        """The policy, and as `VALUE` beside it a network that starts as the reward model with its
        head in float32; frozen both as they begin, the reward model as `REWARD`."""
        del key
        reward, policy = params[REWARD], llama.own(params)
        head = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), reward[SCORE])
        value = {"model": reward["model"], SCORE: head}
        return {**policy, VALUE: value}, Frozen(reference={**policy, REWARD: value})

    def weigh(self, batch):
        """`batch` with float32 `weights` [B, T], 1 / answers' tokens of the update, 0 off the mask,
        and `row_weights` [B], 1 / rows."""
        mask = batch["loss_mask"].astype(jnp.float32)
        rows = jnp.full(mask.shape[:1], 1.0 / mask.shape[0])
        return {**batch, "weights": mask / jnp.maximum(mask.sum(), 1.0), "row_weights": rows}

    def counts(self, batch):
        return {"rollouts": self.measured(batch)} | objective.position_counts(batch)

    def measured(self, batch):
        return jnp.float32(batch["tokens"].shape[0])

    def compute(self, forward, params, frozen, batch):
        """Policy loss + value_coef · value loss, means over the update's answers' tokens; in
        `examples` the share that each row has of it, [B]."""
        mask, weights = batch["loss_mask"], batch["weights"]
        logps = jnp.where(mask, self.token_logps(forward, params, batch), 0.0)
        values = jnp.where(mask, token_values(forward, frozen.value(params), batch), 0.0)
        old_logps, old_values = batch["old_logps"], batch["old_values"]
        of_policy, ratios = advantages.policy_losses(
            logps, old_logps, batch["advantages"], clip=self.clip
        )
        of_value, held = advantages.value_losses(
            values, old_values, batch["returns"], clip=self.value_clip
        )
        by_row = jnp.sum(weights * (of_policy + self.value_coef * of_value), axis=1)
        by_token = {
            "policy/loss": of_policy,
            "policy/clipped": (jnp.abs(ratios - 1) > self.clip).astype(jnp.float32),
            "policy/ratio": ratios,
            "policy/kl": ratios - 1 - (logps - old_logps),
            "policy/entropy": -old_logps,
            "value/loss": of_value,
            "value/clipped": held,
        }
        found = {name: jnp.sum(weights * value) for name, value in by_token.items()}
        row_values = {f"rollout/{name}": batch[name] for name in COLLECTED}
        row_values["value/explained"] = batch["explained"]
        found |= {name: jnp.sum(batch["row_weights"] * v) for name, v in row_values.items()}
        found["loss"] = jnp.sum(by_row)
        examples = {"loss": jax.lax.stop_gradient(by_row)}
        return objective.Loss(value=found["loss"], metrics=found, examples=examples)

    def token_logps(
        self, forward: objective.Forward, params: llama.Params, batch: objective.Batch
    ) -> Float[Array, "B T"]:
        """float32 log-probability of every target, at the temperature that `logps_at` says."""
        paper = self.log_softmax_dtype == "bfloat16"
        token_logps = losses.bfloat16_token_logps if paper else losses.token_logps
        hidden, unembedding = forward(params, batch), llama.unembedding(params)
        if self.logps_at == "sampling":  # before the cast to the compute dtype: one rounding
            unembedding = unembedding / jnp.asarray(self.temperature, unembedding.dtype)
        return token_logps(hidden, unembedding, batch["targets"], self.vocab_chunk)

    def evaluating(self):
        return self

    def feed(self, run):
        return ppo_feed.PPOFeed(self, run)


def token_values(
    forward: objective.Forward, params: llama.Params, batch: objective.Batch
) -> Float[Array, "B T"]:
    """float32 scores of every position by a network with a score head."""
    return llama.scores(forward(params, batch), params)
