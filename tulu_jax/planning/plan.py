"""What a run costs on a slice, compiled, and the search for what suits it best."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from etils import epath

from tulu_jax import atomic, preflight, validation
from tulu_jax.data import registry
from tulu_jax.models.config import KEEP_NOTHING
from tulu_jax.planning import aot, passes, ranking, rows
from tulu_jax.planning.cycles import attention_cycles
from tulu_jax.planning.topology import Topology
from tulu_jax.recipe import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A run on a slice: its config, the compiled step or why there is none, and the whole run.

    `updates` of training; `first_pass` is a forward of the pass over all rows before it, of DPO
    over all pairs. `attention_milliseconds` are those of a row by size of block, where a search
    counted them.
    """

    config: TrainConfig
    topology: Topology
    step: aot.Step | None
    updates: int
    first_pass: passes.Pass | None = None
    refused: str | None = None
    attention_milliseconds: dict[int, float] = dataclasses.field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return self.step is not None and self.spare >= 0

    @property
    def spare(self) -> float:
        """The part of HBM that is left at the peak of the update, or of the pass before it."""
        memory, first = self.step.memory, self.first_pass
        if first is None:
            return memory.spare
        always = memory.peak - memory.temporaries
        return 1 - max(memory.peak, always + first.temporaries) / memory.hbm

    @property
    def first_seconds(self) -> float:
        """Of the pass over an epoch's rows before the first update."""
        if self.first_pass is None:
            return 0.0
        rows = self.updates * self.config.batch_size / (self.config.num_epochs or 1)
        return math.ceil(rows / self.first_pass.rows) * self.first_pass.cost.seconds

    @property
    def hours(self) -> float:
        if self.step is None:
            return math.nan
        return (self.updates * self.step.cost.seconds + self.first_seconds) / 3600

    def as_dict(self) -> dict[str, Any]:
        """JSON: everything that the table shows, in bytes, seconds, FLOPs and hours."""
        about = {
            "topology": self.topology.name,
            "chips": self.topology.num_chips,
            "fits": self.fits,
            "refused": self.refused,
            "updates": self.updates,
        }
        if self.step is None:
            return about
        step = self.step
        seconds = step.cost.seconds
        return about | {
            "mesh": step.mesh,
            "context_first": self.config.mesh.context_first,
            "pairs_first": self.config.mesh.pairs_first,
            "micro_batch_size": self.config.micro_batch_size or self.config.batch_size,
            "remat_policy": self.config.execution.remat_policy,
            "row_parts": self.config.execution.row_parts,
            "products_apart": bool(self.config.execution.products_apart),
            "gather_dtype": self.config.execution.gather_dtype,
            "bytes": dataclasses.asdict(step.memory),
            "spare": self.spare,
            "faults": step.faults,
            "seconds": {
                "step": seconds,
                "matrix": step.cost.matrix,
                "attention": step.cost.attention,
                "memory": step.cost.memory,
                "interconnect": step.cost.interconnect,
                "hidden_interconnect": step.cost.hidden,
                "reference_pass": self.first_seconds,
            },
            "first_pass": self.first_pass and self.first_pass.as_dict(),
            "binding": step.cost.binding,
            "wire_bytes": {f"{k} over {a}": v for (k, a), v in step.cost.wire.items()},
            "model_flops": step.model_flops,
            "executed_flops": step.executed_flops,
            "whole_flops": step.whole_flops,
            "mfu": step.mfu,
            "mfu_counts": "visible attention",
            "mfu_whole_attention": step.whole_mfu,
            "tokens_per_second": step.tokens_per_second,
            "tokens_per_second_per_chip": step.tokens_per_second / self.topology.num_chips,
            "band": step.band.as_dict(),
            "examples_per_second": step.examples / seconds,
            "hours": self.hours,
            "chip_hours": self.hours * self.topology.num_chips,
            "compile_seconds": step.compile_seconds,
            "attention_block": self.config.execution.attention_block,
            "attention_milliseconds": self.attention_milliseconds,
            "largest": step.cost.top[:20],
        }


def problems(config: TrainConfig, topology: Topology) -> Iterator[str]:
    """What of the config's mesh, heads and batch the slice does not divide, and what would."""
    for problem in preflight.mesh_problems(config, topology.num_devices):
        yield f"{topology.name}: {problem}"


def num_updates(config: TrainConfig) -> int:
    """Updates of the whole run; of epochs by the published counts and mean lengths. Raises
    `UsageError` for epochs of data without a published count."""
    count = registry.expected_examples(config.data.train)
    if count is None and config.num_steps is None:
        raise validation.UsageError(
            f"{registry.name_of(config.data.train)!r} has no published number of examples, so its "
            "epochs cannot be counted; give NUM_STEPS instead of NUM_EPOCHS for the dry run"
        )
    rows_per_epoch = (count or 0) / aot.documents(config).examples(config.data.max_length)
    return config.num_updates(round(rows_per_epoch))


def suited(config: TrainConfig, topology: Topology) -> TrainConfig:
    """`config` if its mesh fills the slice, else with the mesh that the estimate prefers there.

    Raises `UsageError` if nothing fits by estimate.
    """
    if config.mesh.topology == topology.name:
        return config
    try:
        mesh = config.mesh_on(topology.num_devices)
        data = mesh.sizes(topology.num_devices)["data"]
    except ValueError:
        return ranking.ranked(config, topology)[0]
    if data % topology.slices or list(problems(config, topology)):
        return ranking.ranked(config, topology)[0]
    return dataclasses.replace(config, mesh=dataclasses.replace(mesh, topology=topology.name))


def price(config: TrainConfig, topology: Topology, *, held: rows.Documents | None = None) -> Result:
    """The run of `config` on `topology`, compiled; `refused` has the compiler's words if it does
    not fit. Rows hold documents `held`, by default those of the recipe."""
    updates, step, first, refused = num_updates(config), None, None, None
    try:
        first = passes.first(config, topology)
        step = aot.compile_step(config, topology, num_steps=updates, held=held)
    except aot.DoesNotFit as error:
        refused = str(error)
    return Result(
        config=config,
        topology=topology,
        step=step,
        updates=updates,
        first_pass=first,
        refused=refused,
    )


def advice(result: Result) -> str:
    """What to change in a run that does not fit."""
    execution, config = result.config.execution, result.config
    found = []
    if not execution.remat or execution.remat_policy != KEEP_NOTHING:
        found.append(f"remat_policy = {KEEP_NOTHING!r} keeps only the input of each layer")
    if (config.micro_batch_size or config.batch_size) > 1:
        found.append("a smaller micro_batch_size, or larger context and tensor")
    if config.optimizer.mu_dtype == "float32":
        found.append("OptimizerConfig.mu_dtype = 'bfloat16'")
    found += config.objective.saves_memory()
    found.append("a larger slice (--topologies compares them); --plan searches all of this")
    return "; ".join(found)


def search(
    config: TrainConfig, topology: Topology, *, compiles: int, out: epath.Path
) -> list[Result]:
    """The results of the `compiles` most promising candidates that were compiled, best first; the
    fragment of the best, in the form of its layers that takes least (`with_best_form`) and with the
    attention blocks that count least for its part of a row, is written to `out`. The same inputs
    give the same choice.

    Raises `UsageError` if nothing divides the slice.
    """
    import tqdm

    best = ranking.ranked(config, topology)[:compiles]
    results = [price(candidate, topology) for candidate in tqdm.tqdm(best, "plan", unit="compile")]
    results.sort(key=lambda r: (not (r.fits and r.spare >= ranking.SPARE), r.hours))
    if results[0].fits:
        results[0] = with_best_blocks(with_best_form(results[0]))
        atomic.write_text(out / "slice.gin", fragment(results[0]))
    return results


def with_best_form(result: Result) -> Result:
    """`result` with its mesh and micro-batch, and of a layer what no estimate from shapes tells
    (`ranking.FORMS`): each change is compiled on the best before it, and kept if it takes less,
    fits as well and has no more faults."""
    for change in ranking.FORMS:
        changed = change(result.config, result.topology)
        if changed is None:
            continue
        again = price(changed, result.topology)
        if (
            again.fits
            and again.hours < result.hours
            and again.spare >= min(ranking.SPARE, result.spare)
            and len(again.step.faults) <= len(result.step.faults)
        ):
            result = again
    return result


def with_best_blocks(result: Result) -> Result:
    """`result` with its attention kernel counted for every size of block, compiled again if another
    than the tuned size counts least. Where the kernel does not run it is as it was."""
    config, sizes = result.config, result.step.mesh
    model, execution = config.model, config.execution
    if execution.attention not in ("auto", "pallas"):
        return result
    shape = attention_cycles.Shape(
        heads=model.num_heads // sizes["tensor"],
        kv_heads=model.num_kv_heads // sizes["tensor"],
        head_dim=model.head_dim,
        queries=config.data.max_length // sizes["context"],
        keys=config.data.max_length,
        dtype=execution.compute_dtype,
    )
    try:
        counted = attention_cycles.block_milliseconds(
            result.topology.chip, shape, aot.documents(config)
        )
    except ValueError:  # no tiles for this dtype: the kernel is not chosen
        return result
    best = min(counted, key=counted.get, default=None)
    if best not in (None, next(iter(counted))):
        execution = dataclasses.replace(execution, attention_block=best)
        again = price(dataclasses.replace(config, execution=execution), result.topology)
        result = again if again.fits else result
    return dataclasses.replace(result, attention_milliseconds=counted)


def fragment(result: Result) -> str:
    """The gin text that sets what the search chose, to be included after the complete file."""
    config, step = result.config, result.step
    millions = config.model.num_params / 1e6
    size = f"{millions / 1e3:.0f}B" if millions >= 1e3 else f"{millions:.0f}M"
    whole = config.micro_batch_size == config.batch_size
    low, high = step.band.of(step.cost.seconds)
    lines = [
        f"# {size} on {result.topology.accelerator_type}: predicted {step.cost.seconds:.2f} s "
        f"an update ({low:.2f} to {high:.2f}), {step.tokens_per_second:,.0f} tokens/s, MFU "
        f"{step.mfu:.0%} (visible attention) or {step.whole_mfu:.0%} (whole),\n# "
        f"{result.spare:.0%} of HBM to spare.",
        "# Written by python -m tulu_jax.dryrun --plan: include it after the complete file, in one",
        "# of your own. To give the slice a name, add the mesh to tulu_jax/parallel/slices.py.",
        "from __gin__ import dynamic_registration",
        "from tulu_jax import recipe",
        "from tulu_jax.models import config",
        "from tulu_jax.parallel import mesh",
        "from tulu_jax.training import optim",
        "",
        "SLICE = 'any'  # the mesh is this one",
        f"mesh.MeshConfig.topology = {result.topology.name!r}",
        *(f"mesh.MeshConfig.{axis} = {size}" for axis, size in step.mesh.items()),
        f"mesh.MeshConfig.context_first = {config.mesh.context_first}",
        f"mesh.MeshConfig.pairs_first = {config.mesh.pairs_first}",
        "recipe.TrainConfig.micro_batch_size = "
        f"{'%BATCH_SIZE' if whole else config.micro_batch_size}",
        f"config.ExecutionConfig.remat_policy = {config.execution.remat_policy!r}",
        f"config.ExecutionConfig.row_parts = {config.execution.row_parts}",
        f"config.ExecutionConfig.products_apart = {bool(config.execution.products_apart)}",
        f"config.ExecutionConfig.attention_block = {config.execution.attention_block}",
        f"config.ExecutionConfig.gather_dtype = {config.execution.gather_dtype!r}",
        f"optim.OptimizerConfig.mu_dtype = {config.optimizer.mu_dtype!r}",
        "",
    ]
    return "\n".join(lines)
