"""How long the paper's nine benchmarks take a decoder on a slice that is not there.

One pair of programs is compiled for a slice, as long as the longest benchmark needs, and priced for
each with its own lengths (`LOADS`). Not in it: loading the model, compiling, judges, execution of
programs, and the host's visits.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from tulu_jax.planning import decoding, decoding_times
from tulu_jax.planning.topology import Topology
from tulu_jax.recipe import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What the paper's subset of a benchmark asks: `requests` prompts of `prompt_length` ids in the
    mean, `samples` answers of `new_tokens` in the mean to each; of no new tokens, scores."""

    name: str
    requests: int
    prompt_length: int
    new_tokens: int
    samples: int = 1

    @property
    def asked(self) -> decoding_times.Asked:
        return decoding_times.Asked(
            prompts=self.requests,
            prompt_length=self.prompt_length,
            new_tokens=self.new_tokens,
            samples=self.samples,
        )


# Prompts: means of each benchmark's own requests with the template and Llama's tokenizer, over the
# rows at hand (2026-11-29). Answers: means of published ones where there are some (GSM8K's own
# solutions, code-davinci-002 on four tasks of BBH, WizardCoder on HumanEval, tulu-2-dpo-7b on
# AlpacaEval, granite-7b on MT-Bench, whose second turns have the first in their prompt); of the
# others the most that a request allows.
LOADS = (
    Load(name="mmlu", requests=14_042, prompt_length=177, new_tokens=0),
    Load(name="gsm8k", requests=200, prompt_length=861, new_tokens=125),
    Load(name="bbh", requests=1_080, prompt_length=1_098, new_tokens=113),
    Load(name="tydiqa", requests=900, prompt_length=452, new_tokens=50),
    Load(name="codex_eval", requests=164, prompt_length=163, new_tokens=223, samples=20),
    Load(name="truthfulqa", requests=817, prompt_length=212, new_tokens=50),
    Load(name="toxigen", requests=7_000, prompt_length=147, new_tokens=512),
    Load(name="alpaca_eval", requests=805, prompt_length=48, new_tokens=534),
    Load(name="mt_bench", requests=160, prompt_length=261, new_tokens=369),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """The benchmarks on one slice, each as `decoding` prices it."""

    topology: Topology
    of: dict[str, decoding_times.Decoding]

    @property
    def hours(self) -> float:
        return sum(one.seconds for one in self.of.values()) / 3600

    @property
    def hours_between(self) -> tuple[float, float]:
        """The least and the most hours, all benchmarks off the same way."""
        low, high = zip(*(one.between for one in self.of.values()), strict=True)
        return sum(low) / 3600, sum(high) / 3600

    @property
    def fits(self) -> bool:
        return all(one.fits for one in self.of.values())

    def as_dict(self) -> dict[str, Any]:
        """JSON: hours, chip-hours, and of each benchmark what `Decoding.as_dict` has."""
        return {
            "topology": self.topology.name,
            "chips": self.topology.num_chips,
            "hours": self.hours,
            "hours_between": self.hours_between,
            "chip_hours": self.hours * self.topology.num_chips,
            "fits": self.fits,
            "benchmarks": {name: one.as_dict() for name, one in self.of.items()},
        }


def longest(loads: Sequence[Load] = LOADS) -> int:
    """Positions that the longest of `loads` takes."""
    return max(load.asked.length for load in loads)


def price(config: TrainConfig, topology: Topology, loads: Sequence[Load] = LOADS) -> Suite:
    """`loads` on `topology`. Raises what `decoding.compiled` does."""
    prompt = max(load.prompt_length for load in loads)
    made = decoding.compiled(
        config,
        topology,
        decoding_times.Asked(
            prompts=decoding.MOST_ROWS, prompt_length=prompt, new_tokens=longest(loads) - prompt
        ),
    )
    return Suite(topology=topology, of={load.name: made.price(load.asked) for load in loads})


def table(suites: Sequence[Suite]) -> str:
    """Minutes of each benchmark, one column a slice."""
    names = list(suites[0].of)
    rows = [["minutes", *(f"{suite.topology.name}" for suite in suites)]]
    rows += [[name, *(f"{suite.of[name].seconds / 60:.1f}" for suite in suites)] for name in names]
    rows.append(["hours in all", *(f"{suite.hours:.2f}" for suite in suites)])
    ends = [[f"{end:.2f}" for end in suite.hours_between] for suite in suites]
    rows.append(["  between", *(" to ".join(end) for end in ends)])
    chip_hours = [math.ceil(10 * suite.hours * suite.topology.num_chips) / 10 for suite in suites]
    rows.append(["chip-hours", *(f"{hours:.1f}" for hours in chip_hours)])
    rows.append(["rows at once", *(f"{suite.of[names[0]].rows}" for suite in suites)])
    rows.append(["fits", *("yes" if suite.fits else "NO" for suite in suites)])
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    )
