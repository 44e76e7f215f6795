"""What is asked of a decoder on a slice, what it takes, and both as a table."""

import dataclasses
import math
from typing import Any

from tulu_jax import chips
from tulu_jax.models.config import SCORE, LlamaConfig
from tulu_jax.planning import calibration, cost
from tulu_jax.planning.topology import Topology

STEPS = 16  # of a program, as the decoder has them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """`prompts` of `prompt_length` ids each, and `samples` of `new_tokens` after every one; no new
    tokens, where prompts are scored."""

    prompts: int
    prompt_length: int
    new_tokens: int
    samples: int = 1

    @property
    def rows(self) -> int:
        return self.prompts * self.samples

    @property
    def length(self) -> int:
        return self.prompt_length + self.new_tokens

    @property
    def live(self) -> float:
        """Positions that a row has in the middle of its answer."""
        return self.prompt_length + self.new_tokens / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """`rows` are decoded at once, `per_fill` prompts computed at once. Bytes are those of a device,
    `temporaries` of the larger program, `relaid` those of weights that a program of `STEPS` steps
    copies to another layout before the first. `step` is a step of it with its part of that, `fill`
    one run. `least` and `most` are the seconds of a step by traffic alone, and where no operation
    is shorter than the compiler's own estimate of it; `limit` is what HBM takes to read weights and
    live cache once, over the whole slice."""

    topology: Topology
    model: LlamaConfig
    asked: Asked
    mesh: dict[str, int]
    rows: int
    per_fill: int
    weights: int
    cache: int
    temporaries: int
    code: int
    relaid: int
    step: cost.Cost
    least: float
    most: float
    limit: float
    fill: cost.Cost
    faults: list[str]
    compile_seconds: float
    texts: dict[str, str]

    @property
    def fits(self) -> bool:
        return self.peak <= self.topology.hardware.hbm

    @property
    def peak(self) -> int:
        return self.weights + self.cache + self.temporaries + self.code

    @property
    def ratio(self) -> float:
        """A step over the limit of HBM."""
        return self.step.seconds / self.limit

    @property
    def fills(self) -> int:
        """Runs of the program that computes prompts, for all of them."""
        return math.ceil(self.asked.prompts / self.per_fill)

    @property
    def steps(self) -> int:
        """Steps for all tokens."""
        return math.ceil(self.asked.rows / self.rows) * self.asked.new_tokens

    @property
    def seconds(self) -> float:
        """All prompts and all their tokens; the host's visits are not in it."""
        return self.fills * self.fill.seconds + self.steps * self.step.seconds

    @property
    def step_between(self) -> tuple[float, float]:
        """The least and the most seconds of a step: by the readings that `least` and `most` are and
        by the calibration, which has no decoder in it."""
        low, high = calibration.band(self.step).of(self.step.seconds)
        return min(low, self.least), max(high, self.most)

    @property
    def fill_between(self) -> tuple[float, float]:
        """The least and the most seconds of a fill, by the calibration."""
        return calibration.band(self.fill).of(self.fill.seconds)

    @property
    def between(self) -> tuple[float, float]:
        """The least and the most seconds of all prompts and all tokens."""
        low, high = (
            self.fills * fill + self.steps * step
            for fill, step in zip(self.fill_between, self.step_between, strict=True)
        )
        return low, high

    @property
    def mfu(self) -> float:
        """Of steps while all rows are in use. A query sees all that is live, so that attention
        counted whole is the same."""
        seen = 2 * self.asked.prompt_length + self.asked.new_tokens  # twice what is live
        flops = self.model.flops_per_token(seen) / 3
        return cost.ideal_seconds(flops * self.decoded, self.topology)

    def prefill_mfu(self, *, whole: bool) -> float:
        """Of prompts, which have no output projection, by visible attention or counted `whole`."""
        length = (1 + whole) * (self.asked.prompt_length - 1)
        flops = self.model.with_head(SCORE).flops_per_token(length) / 3
        return cost.ideal_seconds(flops * self.prefilled, self.topology)

    @property
    def decoded(self) -> float:
        """New tokens a second while all rows are in use."""
        return min(self.rows, self.asked.rows) / self.step.seconds

    @property
    def prefilled(self) -> float:
        """Prompt tokens a second."""
        return self.per_fill * (self.asked.prompt_length - 1) / self.fill.seconds

    def as_dict(self) -> dict[str, Any]:
        """JSON: everything that the table shows, in bytes and seconds."""
        hbm = self.topology.hardware.hbm
        return {
            "topology": self.topology.name,
            "chips": self.topology.num_chips,
            **dataclasses.asdict(self.asked),
            "mesh": self.mesh,
            "fits": self.fits,
            "rows": self.rows,
            "bytes": {
                "weights": self.weights,
                "cache": self.cache,
                "temporaries": self.temporaries,
                "code": self.code,
                "peak": self.peak,
                "hbm": hbm,
            },
            "spare": 1 - self.peak / hbm,
            "step": _parts(self.step),
            "step_by_traffic": self.least,
            "step_by_compiler": self.most,
            "relaid_bytes": self.relaid,
            "hbm_limit": self.limit,
            "over_hbm_limit": self.ratio,
            "fill": _parts(self.fill),
            "decode_tokens_per_second": self.decoded,
            "decode_mfu": self.mfu,
            "prefill_tokens_per_second": self.prefilled,
            "prefill_mfu": self.prefill_mfu(whole=False),
            "prefill_mfu_whole_attention": self.prefill_mfu(whole=True),
            "seconds": self.seconds,
            "seconds_between": self.between,
            "step_between": self.step_between,
            "fill_between": self.fill_between,
            "wire_bytes": {f"{k} over {a}": v for (k, a), v in self.step.wire.items()},
            "faults": self.faults,
            "compile_seconds": self.compile_seconds,
            "largest": self.step.top[:20],
        }


def _parts(of: cost.Cost) -> dict[str, float]:
    return {
        "seconds": of.seconds,
        "matrix": of.matrix,
        "attention": of.attention,
        "memory": of.memory,
        "interconnect": of.interconnect,
        "hidden_interconnect": of.hidden,
    }


def table(results: list[Decoding]) -> str:
    """One line a fact, one column a slice."""
    columns = [_column(result) for result in results]
    rows = [[label, *(column[label] for column in columns)] for label in columns[0]]
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:],
                                                                         strict=True))])
        for row in rows
    ]  # fmt: skip
    for result in results:
        if not result.fits:
            lines.append(f"{result.topology.name} does not fit; take fewer prompts at once, "
                         "shorter ones, or more chips")  # fmt: skip
        lines += [f"{result.topology.name} loses to its layout: {one}" for one in result.faults]
    return "\n".join(lines)


def _column(of: Decoding) -> dict[str, str]:
    step, fill, hbm = of.step, of.fill, of.topology.hardware.hbm
    axes = " x ".join(f"{name} {size}" for name, size in of.mesh.items() if size > 1)

    def gib(size):
        return f"{size / chips.GIB:.2f}"

    return {
        "slice": of.topology.name,
        "chips": f"{of.topology.num_chips}",
        "fits": "yes" if of.fits else "NO",
        "mesh": axes or "1 device",
        "prompts, length, new tokens": f"{of.asked.prompts} x {of.asked.prompt_length} + "
        f"{of.asked.new_tokens}",
        "rows at once": f"{of.rows}",
        "GiB a device: weights": gib(of.weights),
        "  cache": gib(of.cache),
        "  temporaries": gib(of.temporaries),
        "  code": gib(of.code),
        "  peak / HBM": f"{gib(of.peak)} / {gib(hbm)}",
        "ms a step": f"{1e3 * step.seconds:.3f}",
        "  between": " to ".join(f"{1e3 * end:.3f}" for end in of.step_between),
        "  HBM": f"{1e3 * step.memory:.3f}",
        "  matrix units": f"{1e3 * step.matrix:.3f}",
        "  attention (live pages)": f"{1e3 * step.attention:.3f}",
        "  interconnect, waited for": f"{1e3 * step.interconnect:.3f}",
        "  limit of HBM": f"{1e3 * of.limit:.3f}",
        "  over that limit": f"{of.ratio:.2f}",
        "    by traffic alone, by the compiler": f"{of.least / of.limit:.2f}, "
        f"{of.most / of.limit:.2f}",
        "ms a fill of prompts": f"{1e3 * fill.seconds:.2f}",
        "  between, by calibration": " to ".join(f"{1e3 * end:.2f}" for end in of.fill_between),
        "  binds": fill.binding,
        "prefill tokens/s": f"{of.prefilled:,.0f}",
        "  MFU, visible attention counted": f"{of.prefill_mfu(whole=False):.1%}",
        "  MFU, attention counted whole": f"{of.prefill_mfu(whole=True):.1%}",
        "decode tokens/s": f"{of.decoded:,.0f}",
        "  a chip": f"{of.decoded / of.topology.num_chips:,.0f}",
        "  MFU, by either count": f"{of.mfu:.2%}",
        "seconds of all": f"{of.seconds:,.1f}",
        "  all between": " to ".join(f"{end:,.1f}" for end in of.between),
        "kernels not counted": ", ".join({**step.unknown, **fill.unknown}) or "none",
        "compiled in, s": f"{of.compile_seconds:.0f}",
    }
