"""The configuration of a whole run: what `cli` builds from gin and everything else takes."""

import dataclasses
import math

from tulu_jax import validation
from tulu_jax.data import loader
from tulu_jax.models.config import DTYPES, KEEP_NOTHING, SCORE, ExecutionConfig, LlamaConfig
from tulu_jax.models.lora import LoRAConfig
from tulu_jax.objectives.objective import Objective
from tulu_jax.parallel import slices
from tulu_jax.parallel.mesh import AXES, MeshConfig
from tulu_jax.quant import nf4
from tulu_jax.quant.nf4 import QuantConfig
from tulu_jax.training.checkpoint import CheckpointConfig
from tulu_jax.training.metrics import LoggingConfig
from tulu_jax.training.optim import OptimizerConfig
from tulu_jax.training.watch import WatchConfig

MOST_EPOCHS = 10**6


def _balanced(asked: bool | None, packing: str) -> bool:
    """Rows of one example have the most work at their end, rows of many nearly none more there."""
    return packing == "none" if asked is None else asked


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run. Batch k depends on this and k alone.

    An update is `batch_size` rows, packed or of one conversation or pair each, in forwards of
    `micro_batch_size` (None: all at once). Its length is `num_steps` updates or `num_epochs` passes
    over the data; exactly one is given. `base` is where the parameters come from: a Hugging Face
    folder, the workdir of another run, or None for random ones. `eval_every` None evaluates only at
    the end. `reference_dir` is where runs share the cached reference of DPO, each under the
    fingerprint of what its numbers depend on; None keeps it in the workdir.

    With an `adapter` only that trains, on a frozen `base` of `param_dtype`; `quant` says how the
    linear layers of the base are kept: None in `param_dtype` as well (LoRA), else in four bits or
    eight (QLoRA, Dettmers et al. 2023). `adapter_from` is a PEFT folder that the adapter begins
    with; None draws a new one.

    `bucket` and `slice` are consumed here. Relative paths lie below `bucket`, a folder or a `gs://`
    prefix; one of the working directory begins with `./`. `slice`, a name in `parallel/slices.py`,
    gives the mesh, and where they are None the micro-batch and the `remat_policy` and `row_parts`
    of `execution`; 'any' leaves a mesh that is set as it is, and one that is not to the devices
    there are (`mesh_on`).
    """

    model: LlamaConfig
    data: loader.DataConfig
    objective: Objective
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    execution: ExecutionConfig = dataclasses.field(default_factory=ExecutionConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)
    watch: WatchConfig = dataclasses.field(default_factory=WatchConfig)
    workdir: str
    base: str | None
    reference_dir: str | None = None
    batch_size: int
    micro_batch_size: int | None = None
    num_steps: int | None = None
    num_epochs: float | None = None
    eval_every: int | None = None
    param_dtype: str = "float32"
    adapter: LoRAConfig | None = None
    adapter_from: str | None = None
    quant: QuantConfig | None = None
    seed: int = 42
    bucket: dataclasses.InitVar[str | None] = None
    slice: dataclasses.InitVar[str] = slices.ANY

    def __post_init__(self, bucket, slice):
        names = ("workdir", "base", "reference_dir", "adapter_from")
        paths = dict.fromkeys(names, bucket)
        validation.check(self, lambda: [*self._put_on(slice), *self._rules()], paths=paths)

    def _put_on(self, slice):
        """Sets what `slice` decides; the rule that this breaks, if it does."""
        layout = slices.Layout(1, 1, 1, remat_policy=KEEP_NOTHING)
        if slice != slices.ANY:
            try:
                mesh, layout = slices.find(
                    slice, num_params=self.model.num_params, stage=self.stage
                )
            except validation.UsageError as error:
                return [(False, str(error))]
            if self.mesh not in (MeshConfig(), mesh):
                axes = {name: getattr(self.mesh, name) for name in AXES}
                return [
                    (
                        False,
                        f"slice = {slice!r} and mesh.MeshConfig has {axes}; expected one of the "
                        f"two: remove the mesh, or set SLICE = {slices.ANY!r} to keep it",
                    )
                ]
            micro = self.micro_batch_size or layout.micro_batch_size or self.batch_size
            object.__setattr__(self, "mesh", mesh)
            object.__setattr__(self, "micro_batch_size", micro)
        execution = dataclasses.replace(
            self.execution,
            **{
                name: getattr(layout, name)
                for name in slices.OF_EXECUTION
                if getattr(self.execution, name) is None
            },
            balanced=_balanced(self.execution.balanced, self.data.packing),
            adapter=self.adapter,
        )
        object.__setattr__(execution, "pairs_first", self.mesh.pairs_first)
        object.__setattr__(self, "execution", execution)
        to_ends = self.objective.head == SCORE
        if self.data.to_ends != to_ends:
            object.__setattr__(self, "data", dataclasses.replace(self.data, to_ends=to_ends))
        return []

    def _rules(self):
        for name in ("batch_size", "micro_batch_size", "num_steps", "num_epochs", "eval_every"):
            value = getattr(self, name)
            yield value is None or value > 0, f"{name} = {value}: expected a positive number"
        length = self.data.max_length
        if isinstance(length, int) and length <= loader.MOST_LENGTH:  # else that is told
            yield (
                self.batch_size * length <= validation.MOST,
                f"batch_size = {self.batch_size} rows of max_length = {length}: expected at most "
                f"{validation.MOST:,} positions an update, whose tokens are counted in int32",
            )
        yield validation.at_most("num_epochs", self.num_epochs or 0, MOST_EPOCHS)
        micro = self.micro_batch_size or self.batch_size
        yield (
            micro > 0 and self.batch_size % micro == 0,
            f"batch_size = {self.batch_size} is not a multiple of micro_batch_size = {micro}",
        )
        yield (
            (self.num_steps is None) != (self.num_epochs is None),
            f"num_steps = {self.num_steps} and num_epochs = {self.num_epochs}: give exactly one",
        )
        yield validation.one_of("param_dtype", self.param_dtype, DTYPES)
        yield from self.objective.problems(self)
        if self.adapter is not None:
            yield from self.adapter.problems(self.model.projections)
        yield (
            self.quant is None or self.adapter is not None,
            "quant is set and adapter is None: quantised weights do not train; set "
            "recipe.TrainConfig.adapter = @lora.LoRAConfig(), or remove quant",
        )
        yield (
            self.quant is None or self.execution.gather_dtype is None,
            f"execution.gather_dtype = {self.execution.gather_dtype!r} and quant is set: quantised "
            "weights are gathered as they are packed; remove gather_dtype",
        )
        yield (
            self.adapter_from is None or self.adapter is not None,
            f"adapter_from = {self.adapter_from!r} and adapter is None; set adapter, or remove it",
        )
        yield (
            self.execution.adapter in (None, self.adapter),
            "execution.adapter is set by the run; set recipe.TrainConfig.adapter instead",
        )

    @property
    def trained_model(self) -> LlamaConfig:
        """`model` below the head that the objective trains: what comes out of the run."""
        return self.model.with_head(self.objective.head)

    @property
    def stage(self) -> str:
        """That of the layouts it takes on a slice (`slices.Slice`)."""
        kind = "" if self.adapter is None else "lora_" if self.quant is None else "qlora_"
        return kind + self.objective.stage

    def mesh_on(self, num_devices: int) -> MeshConfig:
        """The mesh of the run on so many devices: `mesh`, or, where that says nothing, the one that
        divides the model and the rows. Raises `UsageError` if nothing does."""
        if self.mesh != MeshConfig():
            return self.mesh
        rows = {"batch": self.micro_batch_size or self.batch_size}
        rows["positions"] = self.data.max_length
        return slices.anywhere(num_devices, rows | self.axis_sizes)

    @property
    def axis_sizes(self) -> dict[str, int]:
        """The sizes that a mesh divides, by logical axis; of quantised weights, in blocks."""
        sizes = self.model.axis_sizes
        if self.quant is not None:
            sizes |= nf4.divisible(sizes, self.model.head_dim)
        return sizes

    @property
    def micro_batches(self) -> int:
        """Forwards per update."""
        return self.batch_size // (self.micro_batch_size or self.batch_size)

    def num_updates(self, rows_per_epoch: int) -> int:
        """Updates of the whole run: `num_steps`, or those that fit into the epochs, at least one.

        A batch may straddle two epochs, so only the last one loses rows.
        """
        if self.num_steps is not None:
            return self.num_steps
        return max(1, math.floor(self.num_epochs * rows_per_epoch / self.batch_size))
