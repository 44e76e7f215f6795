"""The configuration of a whole run: what `cli` builds from gin and everything else takes."""

import dataclasses
import math

from tulu_jax import validation
from tulu_jax.data import loader
from tulu_jax.models.config import DTYPES, ExecutionConfig, LlamaConfig
from tulu_jax.objectives.objective import Objective
from tulu_jax.parallel.mesh import MeshConfig
from tulu_jax.training.checkpoint import CheckpointConfig
from tulu_jax.training.metrics import LoggingConfig
from tulu_jax.training.optim import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run. Batch k depends on this and k alone.

    An update is `batch_size` rows, packed or of one conversation or pair each, in forwards of
    `micro_batch_size` (None: all at once). Its length is `num_steps` updates or `num_epochs` passes
    over the data; exactly one is given. `base` is where the parameters come from: a Hugging Face
    folder, the workdir of another run, or None for random ones. `eval_every` None evaluates only at
    the end. `reference_dir` is where runs share the cached reference of DPO, each under the
    fingerprint of what its numbers depend on; None keeps it in the workdir.
    """

    model: LlamaConfig
    data: loader.DataConfig
    objective: Objective
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    execution: ExecutionConfig = dataclasses.field(default_factory=ExecutionConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)
    workdir: str
    base: str | None
    reference_dir: str | None = None
    batch_size: int
    micro_batch_size: int | None = None
    num_steps: int | None = None
    num_epochs: float | None = None
    eval_every: int | None = None
    param_dtype: str = "float32"
    seed: int = 42

    def __post_init__(self):
        validation.check(self, self._rules, paths=("workdir", "base", "reference_dir"))

    def _rules(self):
        for name in ("batch_size", "micro_batch_size", "num_steps", "num_epochs", "eval_every"):
            value = getattr(self, name)
            yield value is None or value > 0, f"{name} = {value}: expected a positive number"
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


def under(root: str, path: str | None) -> str | None:
    """`root/path`, for gin files, which cannot join strings: real data lies below one root.

    A `path` that is whole (`/…`, `~/…`, `gs://…`) is itself, and None stays None. Raises
    `UsageError` for what is no path.
    """
    if path is None:
        return None
    for name, value in (("root", root), ("path", path)):
        if not isinstance(value, str) or not value:
            raise validation.UsageError(
                f"recipe.under.{name} = {value!r}: expected a path as a string; mend the macro "
                "that it is set to, such as BUCKET, DATA_ROOT or BASE."
            )
    path = validation.expanded(path)
    return path if path.startswith("/") or "://" in path else f"{root.rstrip('/')}/{path}"
