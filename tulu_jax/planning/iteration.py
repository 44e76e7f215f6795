"""What a whole iteration of PPO takes on a slice that is not there, by phase.

Three phases follow one another: `rollout` computes the prompts and decodes the answers,
`measuring` is one pass of policy, value model, reference and reward model over the rows,
`updates` trains. The four models and the moments are there in each of them. Prompts and answers are
priced as long as rows allow, so decoding is at its longest; measuring and updates take whole rows
whatever is in them. Not in it: moving the policy to the decoder's layout, the host's visits,
compiling, and the files of rollouts.
"""

import dataclasses
import functools
import math
from typing import Any

from tulu_jax import step as step_lib
from tulu_jax.data import fields
from tulu_jax.models import llama
from tulu_jax.objectives import ppo_feed
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.planning import aot, calibration, decoding, decoding_times, passes, plan, render
from tulu_jax.planning.topology import Topology
from tulu_jax.recipe import TrainConfig
from tulu_jax.training.state import REWARD, VALUE, Frozen, TrainState

PHASES = ("rollout", "measuring", "updates")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Iteration:
    """An iteration of the run of `result`. `models` are bytes a device by what is always there;
    `decode` and `measure` are None where the compiler found no room, and `refused` has its words by
    phase."""

    result: plan.Result
    models: dict[str, int]
    decode: decoding_times.Decoding | None
    measure: passes.Pass | None
    refused: dict[str, str]

    @property
    def topology(self) -> Topology:
        return self.result.topology

    @property
    def updates(self) -> int:
        """Of one iteration."""
        return self.result.config.objective.updates(self.result.config.batch_size)

    @property
    def iterations(self) -> int:
        """Of the whole run, those that are whole."""
        return self.result.updates // self.updates

    @property
    def fits(self) -> bool:
        return not self.refused and max(self.peaks.values()) <= self.topology.hardware.hbm

    @functools.cached_property
    def peaks(self) -> dict[str, int]:
        """Bytes a device at the peak of each phase that compiled: models, the code of all programs,
        and what the phase adds."""
        programs = [one for one in (self.decode, self.measure) if one is not None]
        code = sum(one.code for one in programs)
        added = {}
        if self.decode is not None:
            decode = self.decode
            added["rollout"] = decode.weights + decode.cache + decode.temporaries
        if self.measure is not None:
            added["measuring"] = self.measure.temporaries
        if self.result.step is not None:
            memory = self.result.step.memory
            code += memory.code
            added["updates"] = memory.temporaries
        always = sum(self.models.values()) + code
        return {phase: always + size for phase, size in added.items()}

    @functools.cached_property
    def seconds(self) -> dict[str, float]:
        """By part; those that did not compile are not in it. A pass of the policy and the value
        model alone, as `old_from` 'minibatch' makes for each update, counts half of one of four."""
        objective, found = self.result.config.objective, {}
        if self.decode is not None:
            found["decoding"] = self.decode.steps * self.decode.step.seconds
            found["prefill"] = self.decode.fills * self.decode.fill.seconds
        if self.measure is not None:
            rows = float(objective.prompts)
            if objective.old_from == "minibatch":
                rows += self.updates * self.result.config.batch_size / 2
            found["measuring"] = rows / self.measure.rows * self.measure.cost.seconds
        if self.result.step is not None:
            found["updates"] = self.updates * self.result.step.cost.seconds
        return found

    @property
    def total(self) -> float:
        """Seconds of the iteration; NaN where a phase did not compile."""
        return math.nan if self.refused else sum(self.seconds.values())

    @property
    def between(self) -> tuple[float, float]:
        """The least and the most seconds of the iteration, all phases off the same way; NaN where a
        phase did not compile."""
        if self.refused:
            return math.nan, math.nan
        low, high = zip(
            self.decode.between,
            calibration.band(self.measure.cost).of(self.seconds["measuring"]),
            self.result.step.band.of(self.seconds["updates"]),
            strict=True,
        )
        return sum(low), sum(high)

    @property
    def rates(self) -> dict[str, float]:
        """Tokens a second: `rollout` of answers, prompts computed among the time, and `updates` of
        rows; of an iteration that fits."""
        new = self.decode.asked.rows * self.decode.asked.new_tokens
        spent = self.seconds["decoding"] + self.seconds["prefill"]
        return {"rollout": new / spent, "updates": self.result.step.tokens_per_second}

    @property
    def share(self) -> float:
        """Of the seconds, those of decoding, the prompts' not among them."""
        return math.nan if self.refused else self.seconds["decoding"] / self.total

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return self.iterations * self.total / 3600

    def as_dict(self) -> dict[str, Any]:
        """JSON: everything that the table shows, in bytes, seconds and hours."""
        hbm, known = self.topology.hardware.hbm, not self.refused
        found = {
            "topology": self.topology.name,
            "chips": self.topology.num_chips,
            "fits": self.fits,
            "refused": self.refused,
            "prompts": self.result.config.objective.prompts,
            "updates": self.updates,
            "iterations": self.iterations,
            "bytes": {"always": self.models, "peaks": self.peaks, "hbm": hbm},
            "seconds": self.seconds,
        }
        if known:
            found["seconds_of_all"], found["decoding_share"] = self.total, self.share
            found["seconds_between"], found["tokens_per_second"] = self.between, self.rates
            step = self.result.step
            found["updates_mfu"], found["updates_mfu_whole_attention"] = step.mfu, step.whole_mfu
            found["hours"] = self.hours
            found["chip_hours"] = self.hours * self.topology.num_chips
        if self.decode is not None:
            found["decode"] = self.decode.as_dict()
        if self.measure is not None:
            found["measure"] = self.measure.as_dict()
        return found


def price(result: plan.Result) -> Iteration:
    """An iteration of the run of `result`, whose update is compiled already."""
    config, topology = result.config, result.topology
    mesh = mesh_lib.make(config.mesh, topology.devices())
    refused = {} if result.step is not None else {"updates": result.refused or "HBM is full"}
    decode = measure = None
    state, frozen = step_lib.abstract_state(config, mesh)
    try:
        measure = _measuring(config, topology, mesh, state, frozen)
    except aot.DoesNotFit as error:
        refused["measuring"] = str(error)
    try:
        asked = _asked(config)
        slots = config.objective.slots
        decode = decoding.compiled(config, topology, asked, slots=slots).price(asked)
    except aot.DoesNotFit as error:
        refused["rollout"] = str(error)
    return Iteration(
        result=result,
        models=_models(state, frozen),
        decode=decode,
        measure=measure,
        refused=refused,
    )


def _asked(config: TrainConfig) -> decoding_times.Asked:
    objective = config.objective
    return decoding_times.Asked(
        prompts=objective.prompts,
        prompt_length=config.data.max_length - objective.response_length,
        new_tokens=objective.response_length,
    )


def _models(state: TrainState, frozen: Frozen) -> dict[str, int]:
    """Bytes a device of what a run holds from its start to its end."""
    policy, value = llama.own(state.params), state.params[VALUE]
    kept = {"policy": policy, "value model": value, "reference": llama.own(frozen.reference)}
    if frozen.base:
        kept = {"base of three models": frozen.base, "adapters of policy": policy}
        kept["adapters and head of value model"] = value
    kept |= {"moments of both": state.opt_state, "reward model": frozen.reference[REWARD]}
    return {name: aot.bytes_per_device(tree) for name, tree in kept.items()}


def _measuring(
    config: TrainConfig, topology: Topology, mesh, state: TrainState, frozen: Frozen
) -> passes.Pass:
    """`ppo_feed.make_measures` as the feed jits it, over as many rows as a forward of training."""
    rows = config.micro_batch_size or config.batch_size
    return passes.compile_pass(
        config,
        topology,
        mesh,
        ppo_feed.make_measures(config),
        state.params,
        frozen,
        fields=fields.conversations(rows=rows, length=config.data.max_length),
    )


def table(found: list[Iteration]) -> str:
    """Memory and time by phase, one column a slice."""
    columns = [_column(one) for one in found]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    lines = render.aligned(
        [[label, *(column.get(label, "") for column in columns)] for label in labels]
    )
    for one in found:
        name, hbm = one.topology.name, one.topology.hardware.hbm
        lines += [f"{name}: {phase} does not fit: {said}" for phase, said in one.refused.items()]
        lines += [
            f"{name}: {phase} takes {render.gib(peak - hbm)} GiB a device more than there is"
            for phase, peak in one.peaks.items()
            if peak > hbm
        ]
        if not one.fits:
            lines.append(
                "  To change: fewer ppo.PPOConfig.slots for the rollout, a smaller "
                "micro_batch_size for the others, or a larger slice"
            )
        faults = one.decode.faults if one.decode is not None else []
        lines += [f"{name} loses to the decoder's layout: {fault}" for fault in faults]
    return "\n".join(lines)


def _column(one: Iteration) -> dict[str, str]:
    config, gib, hbm = one.result.config, render.gib, one.topology.hardware.hbm
    column = {
        "an iteration of PPO on": one.topology.name,
        "all of it fits": "yes" if one.fits else "NO",
        "prompts, updates": f"{config.objective.prompts}, {one.updates}",
        "GiB a device, always: all models": gib(sum(one.models.values())),
    }
    column |= {f"  {name}": gib(size) for name, size in one.models.items()}
    if one.decode is not None:
        column["added by the rollout: weights to decode with"] = gib(one.decode.weights)
        column["  cache"] = gib(one.decode.cache)
        column["  temporaries"] = gib(one.decode.temporaries)
    for phase in PHASES:
        if phase in one.peaks:
            column[f"peak of {phase} / HBM"] = f"{gib(one.peaks[phase])} / {gib(hbm)}"
            column[f"  to spare in {phase}"] = f"{1 - one.peaks[phase] / hbm:.1%}"
    if one.decode is not None:
        decode = one.decode
        axes = " x ".join(f"{name} {size}" for name, size in decode.mesh.items() if size > 1)
        column["mesh of the decoder"] = axes or "1 device"
        column["answers at once, ms a token of each"] = (
            f"{decode.rows}, {1e3 * decode.step.seconds:.2f}"
        )
    if one.measure is not None:
        column["seconds of a pass over rows"] = (
            f"{one.measure.cost.seconds:.2f}, {one.measure.rows}"
        )
    column |= {f"seconds of {part}": f"{value:.1f}" for part, value in one.seconds.items()}
    if not one.refused:
        step = one.result.step
        column["seconds an iteration"] = f"{one.total:.1f}"
        column["  between"] = " to ".join(f"{end:.1f}" for end in one.between)
        column |= {f"tokens/s of {name}": f"{rate:,.0f}" for name, rate in one.rates.items()}
        column["  MFU, visible attention counted"] = f"{step.mfu:.1%}"
        column["  MFU, attention counted whole"] = f"{step.whole_mfu:.1%}"
        column["  share of decoding"] = f"{one.share:.1%}"
        column["iterations"] = f"{one.iterations:,}"
        column["hours"] = f"{one.hours:.2f}"
        column["chip-hours"] = f"{one.hours * one.topology.num_chips:,.0f}"
    return column
