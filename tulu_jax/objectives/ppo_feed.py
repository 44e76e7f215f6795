"""Where PPO's batches come from: rollouts of the policy, what four models say of them, advantages.

An iteration is a function of config, data and the parameters before it: its prompts follow from the
data's seed, its draws from the run's seed and its number.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from tulu_jax import validation
from tulu_jax.data import chat as chat_lib
from tulu_jax.data import loader
from tulu_jax.decode import programs
from tulu_jax.decode.decoder import Decoder
from tulu_jax.decode.sampling import Sampling
from tulu_jax.models import llama, paged_attention
from tulu_jax.objectives import advantages, ppo_rewards
from tulu_jax.objectives import rollouts as rollouts_lib
from tulu_jax.objectives.rollouts import Rollouts
from tulu_jax.parallel import compiler, sharding, slices
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.training import watch
from tulu_jax.training.state import REWARD

Batch = dict[str, np.ndarray]
DRAWS = 0x70706F  # folded into the key of the run, whose other keys begin with other numbers
SHOWN = 10  # rows named in a message
WRITTEN_PAD = 0  # the original's padding, <unk>: its `tokenizer_pad_token_id`


class Prompts:
    """The prompts of a run's pairs of at most `longest` ids, in iterations of `count`: what of
    `loader.Rows` the trainer reads. Row r of the run is row r mod B of update r // B, and an
    iteration's updates go over its prompts `epochs` times. Of an epoch, whose order is drawn, what
    does not fill an iteration is left out."""

    pairs_per_row = 1

    def __init__(self, rows: loader.Rows, *, longest: int, count: int, epochs: int):
        self._rows, self._count, self._epochs = rows, count, epochs
        lengths = np.array([len(self._ids(i)) for i in range(rows.num_examples)])
        self._kept = np.flatnonzero(lengths <= longest)
        if left := np.flatnonzero(lengths > longest).tolist():
            named = ", ".join(rows.store.name(i) for i in left[:SHOWN])
            more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
            logging.warning(
                "%d of %d prompts are left out, longer than max_length - response_length = %d ids: "
                "%s%s", len(left), len(lengths), longest, named, more,
            )  # fmt: skip
        self.num_examples, self.num_left_out = len(self._kept), len(left)
        if self.num_examples < count:
            raise validation.UsageError(
                f"there are {self.num_examples} prompts of at most {longest} ids ({len(left)} "
                f"longer ones are left out); an iteration takes {count}. Lower "
                "ppo.PPOConfig.prompts, raise max_length, or give more data"
            )
        self.per_epoch = self.num_examples // count  # iterations
        self.rows_per_epoch = self.per_epoch * count * epochs
        identity = json.dumps([rows.fingerprint, longest, count, epochs])
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:32]

    def of_iteration(self, iteration: int) -> np.ndarray:
        """The examples, as indices in the encoded set, whose prompts `iteration` (from 0) takes."""
        epoch, place = divmod(iteration, self.per_epoch)
        rng = np.random.default_rng([self._rows.config.seed, epoch])
        order = rng.permutation(self._kept)
        return order[place * self._count : (place + 1) * self._count]

    def prompt(self, example: int | np.integer) -> list[int]:
        """The ids of a prompt, `<s>` first and `<|assistant|>` LF last."""
        return self._ids(example).tolist()

    def answers(self, example: int | np.integer) -> list[np.ndarray]:
        """The ids of the two answers of the pair, the chosen one first."""
        sides = self._rows.store.sides(int(example))
        return [ids[spans[0, 0] + 1 : spans[-1, 1] + 1] for ids, spans in sides]

    def names(self, examples: np.ndarray) -> list[str]:
        return [self._rows.store.name(int(i)) for i in examples]

    def example_ids(self, row: int) -> list[str]:
        """The id of the prompt in row `row` of the run, for messages."""
        iteration, place = divmod(row, self._count * self._epochs)
        return self.names(self.of_iteration(iteration)[[place % self._count]])

    def _ids(self, example: int | np.integer) -> np.ndarray:
        ids, spans = self._rows.store.sides(int(example))[0]
        return ids[: spans[0, 0] + 1]


class PPOFeed:
    """The mini-batches of a `trainer.Run` (`objective.Feed`)."""

    def __init__(self, objective, run):
        config = run.config
        self._objective, self._run = objective, run
        with validation.reading():
            pairs = loader.prepare(config.data, split="train")
            self._tokenizer = chat_lib.load_tokenizer(config.data.tokenizer)
        self.rows = Prompts(
            pairs,
            longest=config.data.max_length - objective.response_length,
            count=objective.prompts,
            epochs=objective.ppo_epochs,
        )
        self._updates = objective.updates(config.batch_size)
        self._number, self._rollouts = None, None  # of the iteration that is held
        self._sampling = Sampling(
            max_new_tokens=objective.response_length,
            temperature=objective.temperature,
            stop_ids=(self._tokenizer.eos_id,),
        )
        on_tpu = jax.default_backend() == "tpu"
        self._mesh, paged = run.mesh, {}
        if on_tpu:  # as `trained.Generator`: a step moves activations and no weights
            laid = slices.resident(jax.device_count(), config.axis_sizes)
            self._mesh = mesh_lib.make(laid)
            paged["page"] = paged_attention.page_for(config.model, tensor=laid.tensor)
        self._decoder = Decoder(
            config.model,
            config.execution,
            slots=objective.slots,
            max_length=config.data.max_length,
            **paged,
        )
        self._measure = jax.jit(
            make_measures(config),
            out_shardings=jax.NamedSharding(run.mesh, jax.P()),
            compiler_options=compiler.options(run.mesh.devices.flat[0].device_kind),
        )

    def begin(self, initial, weights: str) -> None:
        """Nothing is made before the first update: the reference is `run.frozen`."""

    def evaluation(self) -> Iterator[Batch] | None:
        """None: metrics are of prompts that are new to the policy anyway."""

    def groups(self, examples: list[Mapping[str, Any]]) -> dict[str, float]:
        return {}

    def __call__(self, step: int, params) -> Batch:
        """This process's rows of a mini-batch. Before the first update of an iteration its rollouts
        are made and written; in its middle a resumed run reads them."""
        iteration, update = divmod(step - 1, self._updates)
        if update == 0:
            self._rollouts = self._made(iteration, params)
            rollouts_lib.save(self._run.config.workdir, iteration, self._rollouts)
            self._sweep(iteration)
        elif iteration != self._number:
            self._rollouts = rollouts_lib.load(self._run.config.workdir, iteration)
        self._number = iteration
        size = self._run.config.batch_size
        start = update * size % self._objective.prompts
        found = self._rollouts[start : start + size]
        if self._objective.old_from == "minibatch":
            found = self._with_measures(found, params)
        part, parts = self._run.row_share
        own = slice(part * size // parts, (part + 1) * size // parts)
        return {name: value[own] for name, value in self._batch(found).items()}

    def _sweep(self, iteration: int) -> None:
        """Leaves the rollouts that a checkpoint from the middle of an iteration needs; one of the
        iteration before may still be on its way to the disk."""
        steps = self._run.checkpoints.steps()
        within = {step // self._updates for step in steps if step % self._updates}
        rollouts_lib.sweep(self._run.config.workdir, within | {iteration - 1, iteration})

    def _made(self, iteration: int, params) -> Rollouts:
        """Raises `watch.UnstableError` if the policy or the reward model has gone wrong."""
        objective, run = self._objective, self._run
        examples = self.rows.of_iteration(iteration)
        prompts = [self.rows.prompt(i)[0 if objective.bos else 1 :] for i in examples]
        run.watchdog.expect(f"the rollouts of iteration {iteration}")
        key = jax.random.fold_in(jax.random.key(run.config.seed), DRAWS)
        policy = llama.own(run.frozen.whole(params))
        if self._mesh is not run.mesh:
            policy = programs.in_compute_dtype(policy, run.config.execution)  # half moves
            policy = jax.device_put(policy, sharding.param_shardings(self._mesh, policy))
        with jax.set_mesh(self._mesh):
            results = self._decoder.generate(
                policy, prompts, self._sampling, jax.random.fold_in(key, iteration)
            )
        answers = [result.ids for result in results]
        if objective.end_token == "written":
            answers = [self._end_written(ids) for ids in answers]
        end, length = self._tokenizer.eos_id, run.config.data.max_length
        found = Rollouts.of(prompts, answers, end=end, length=length)
        found = self._with_measures(found, params, scored=True)
        if objective.reward != ppo_rewards.MODEL:
            found = dataclasses.replace(found, scores=self._programmed(examples, answers))
        scores = np.where(found.ended, found.scores, np.float32(objective.missing_end_score))
        self._check(iteration, examples, found, scores)
        return dataclasses.replace(found, scores=scores)

    def _end_written(self, ids: list[int]) -> list[int]:
        """As the original's generation gave it back: the end token as padding, of which one becomes
        the end token again."""
        end = self._tokenizer.eos_id
        tokens = ids[:-1] if ids[-1] == end else list(ids)
        while tokens and tokens[-1] == WRITTEN_PAD:
            tokens.pop()
        full = len(tokens) == self._objective.response_length
        return tokens if full else [*tokens, end]

    def _programmed(self, examples: np.ndarray, answers: list[list[int]]) -> np.ndarray:
        program, decode = ppo_rewards.REWARDS[self._objective.reward], self._tokenizer.decode
        return np.array(
            [
                program(decode(answer), *(decode(ids) for ids in self.rows.answers(example)))
                for example, answer in zip(examples, answers, strict=True)
            ],
            np.float32,
        )

    def _with_measures(self, rollouts: Rollouts, params, *, scored: bool = False) -> Rollouts:
        """`rollouts` with what the policy and the value model say, and if `scored` with what the
        reference and the reward model say; in forwards of the size that training has."""
        run, rows = self._run, rollouts.rows()
        part, parts = run.row_share
        size = run.config.micro_batch_size or run.config.batch_size
        frozen = run.frozen if scored else dataclasses.replace(run.frozen, reference=None)
        found = []
        for start in range(0, len(rollouts), size):
            own = slice(start + part * size // parts, start + (part + 1) * size // parts)
            batch = run.put({name: value[own] for name, value in rows.items()})
            found.append(jax.tree.map(np.asarray, self._measure(params, frozen, batch)))
        whole = {name: np.concatenate([one[name] for one in found]) for name in found[0]}
        if scored:
            per_token = whole.pop("scores")
            ends = np.take_along_axis(per_token, rollouts.lengths[:, None] - 1, axis=1)
            whole["scores"] = ends[:, 0]
        return dataclasses.replace(rollouts, **whole)

    def _check(self, iteration: int, examples, found: Rollouts, scores: np.ndarray) -> None:
        kl, name = found.kl().sum(axis=1), f"iteration {iteration}"
        bad = ~np.isfinite(scores)
        if bad.any():
            self._stop(
                f"{name}: the reward of {bad.sum()} of {len(bad)} answers is not finite",
                examples[bad], "Look at these rows, and at the reward model",
            )  # fmt: skip
        bad = ~np.isfinite(kl) | ~np.isfinite(np.where(found.mask, found.values, 0.0)).all(axis=1)
        if bad.any():
            self._stop(
                f"{name}: log-probabilities or values of {bad.sum()} of {len(bad)} answers are not "
                "finite", examples[bad], "Lower the learning rate",
            )  # fmt: skip
        most = self._objective.most_kl
        if kl.mean() > most:
            worst = np.argsort(-kl)
            self._stop(
                f"{name}: the KL divergence from the reference is {kl.mean():.5g} nats an answer; "
                f"expected at most most_kl = {most}. The largest are "
                f"{kl[worst[:3]].round(1).tolist()}",
                examples[worst[kl[worst] > most]],
                "Raise kl_coef, lower the learning rate, or raise ppo.PPOConfig.most_kl",
            )
        if _empty(found).all():
            self._stop(
                f"{name}: every answer is empty, an end token alone", examples,
                "The policy has collapsed: raise kl_coef, or lower the learning rate",
            )  # fmt: skip

    def _stop(self, said: str, examples: np.ndarray, advice: str) -> None:
        checkpoints, names = self._run.checkpoints, self.rows.names(examples[:SHOWN])
        checkpoints.wait()
        more = f" and {len(examples) - SHOWN} more" if len(examples) > SHOWN else ""
        raise watch.UnstableError(
            f"{said}. Rows: {', '.join(names)}{more}. Last good checkpoint: "
            f"{checkpoints.describe_latest()}. {advice}; started again, the run goes on from there"
        )

    def _batch(self, found: Rollouts) -> Batch:
        """The fields that the objective says, of a whole mini-batch."""
        objective, mask, kl = self._objective, found.mask, found.kl()
        rewards = advantages.token_rewards(
            kl, found.scores, found.last, mask, kl_coef=objective.kl_coef
        )
        gained, returns = advantages.gae(
            rewards, found.values, mask, gamma=objective.gamma, lam=objective.lam
        )
        explained = advantages.explained_variance(returns, found.values, mask)
        added = {
            "old_logps": np.where(mask, found.logps, 0.0),
            "old_values": np.where(mask, found.values, 0.0),
            "advantages": advantages.whitened(gained, mask),
            "returns": returns,
            "score": found.scores,
            "reward": rewards.sum(axis=1),
            "kl": kl.sum(axis=1),
            "length": mask.sum(axis=1),
            "ended": found.ended,
            "empty": _empty(found),
            "explained": np.full(len(found), explained),
        }
        added = {name: value.astype(np.float32) for name, value in added.items()}
        return {**found.rows(), **added}


def make_measures(config):
    """The function of (params, frozen, rows) to be jitted: float32 [B, T] `logps` and `values`,
    and with a reward model among the frozen `ref_logps` and `scores`."""
    objective, forward = config.objective, llama.forward(config.model, config.execution)

    def measures(params, frozen, batch):
        def scores(network):
            return llama.scores(forward(network, batch), network)

        found = {
            "logps": objective.token_logps(forward, frozen.whole(params), batch),
            "values": scores(frozen.value(params)),
        }
        if frozen.reference is not None:
            found["ref_logps"] = objective.token_logps(forward, frozen.first, batch)
            found["scores"] = scores(frozen.reference[REWARD])
        return jax.tree.map(jnp.float32, found)

    return measures


def _empty(rollouts: Rollouts) -> np.ndarray:
    """Which answers are an end token alone."""
    return rollouts.ended & (rollouts.lengths - rollouts.prompt_lengths == 1)
