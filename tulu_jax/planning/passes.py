"""A forward pass over rows, compiled for a slice that is not there: the reference's before DPO,
what PPO measures of its rollouts."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from tulu_jax import step as step_lib
from tulu_jax.data.fields import Fields
from tulu_jax.parallel import compiler
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.planning import aot, cost, hlo
from tulu_jax.planning.topology import Topology
from tulu_jax.recipe import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """A forward of `rows` rows, compiled; bytes are those of a device."""

    rows: int
    cost: cost.Cost
    temporaries: int
    code: int
    compile_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """JSON: rows, seconds and bytes of one forward."""
        return {
            "rows": self.rows,
            "seconds": self.cost.seconds,
            "binding": self.cost.binding,
            "temporaries": self.temporaries,
            "compile_seconds": self.compile_seconds,
        }


def compile_pass(
    config: TrainConfig,
    topology: Topology,
    mesh: jax.sharding.Mesh,
    function: Callable,
    *models: Any,
    fields: Fields,
) -> Pass:
    """`function(*models, batch)` as a feed jits it, priced for the rows of the recipe. `models` are
    abstract and lie on `mesh`, that of the run on devices of `topology`; `fields` are those of the
    batch.

    Raises `aot.DoesNotFit` where the compiler finds no room.
    """
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        batch = step_lib.abstract_arrays(fields, mesh)
        jitted = jax.jit(function, out_shardings=jax.NamedSharding(mesh, jax.P()))
        lowered = jitted.trace(*models, batch).lower(lowering_platforms=("tpu",))
        options = compiler.options(mesh.devices.flat[0].device_kind)
        made = aot.compiled_for(lowered, topology, mesh, options)
    held = aot.documents(config)
    return Pass(
        rows=fields["tokens"].shape[0],
        cost=aot.estimated(hlo.parse(made["hlo"]), config, topology, mesh, held),
        temporaries=made["temporaries"],
        code=made["code"],
        compile_seconds=time.perf_counter() - start,
    )


def first(config: TrainConfig, topology: Topology) -> Pass | None:
    """The pass of `objective.first_pass`; None if there is none."""
    mesh = mesh_lib.make(config.mesh, topology.devices())
    found = config.objective.first_pass(config, mesh)
    if found is None:
        return None
    function, rows = found
    state, frozen = step_lib.abstract_state(config, mesh)
    fields = config.objective.fields(
        rows=rows,
        length=config.data.max_length,
        packing=config.data.packing,
        places=aot.PAIRS_PER_ROW,
    )
    params = frozen.whole(state.params)
    return compile_pass(config, topology, mesh, function, params, fields=fields)
