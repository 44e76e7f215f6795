"""Compares two ways to run one model, and names the first tensor that differs beyond rounding.

Examples:
  python -m tulu_jax.compare --gin_file=tulu_tiny_sft.gin --a=fsdp=1 --b=fsdp=2,context=2
  python -m tulu_jax.compare --gin_file=tulu_tiny_sft.gin --b=context=4,attention=blockwise
  python -m tulu_jax.compare --gin_file=tulu_tiny_sft.gin --b=compute_dtype=bfloat16,context=2
  python -m tulu_jax.compare --gin_file=tulu_tiny_sft.gin --a=base=runs/one --b=base=runs/other

A side is the run with other values of these fields: the axes of the mesh (1 where it names none)
and its pairs_first, those of config.ExecutionConfig, rope_theta and norm_eps of
config.LlamaConfig, base and param_dtype. The rows are the first ones of the run. On a CPU there are
as many devices as the larger mesh takes. --all prints every tensor. Exit status 1 means that
something differs.
"""

import ast
import contextlib
import dataclasses
import math
import sys
from typing import Any

import jax
from absl import flags

from tulu_jax import cli, preflight, validation
from tulu_jax.models.config import ExecutionConfig
from tulu_jax.parallel.mesh import AXES, MeshConfig
from tulu_jax.recipe import TrainConfig

_A = flags.DEFINE_string("a", "", "One side, such as fsdp=4,compute_dtype=bfloat16.")
_B = flags.DEFINE_string("b", "", "The other side.")
_ALL = flags.DEFINE_bool("all", False, "Print every tensor that is compared.")

_OF_MODEL = ("rope_theta", "norm_eps")
_OF_RUN = ("base", "param_dtype")
_OF_MESH = (*AXES, "pairs_first")
_BY_THE_RUN = ("adapter", "pairs_first")  # fields that a run sets, whatever they are given
_OF_EXECUTION = tuple(
    field.name for field in dataclasses.fields(ExecutionConfig) if field.name not in _BY_THE_RUN
)
_SHOWN = 10  # tensors that differ


def side(config: TrainConfig, text: str) -> TrainConfig:
    """`config` with the fields that `text` names, 'name=value,...', on the mesh that it says.

    Raises `UsageError` for other names, and for values that these fields do not take.
    """
    values: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        known = (*_OF_MESH, *_OF_EXECUTION, *_OF_MODEL, *_OF_RUN)
        if not equals or name not in known or name in values:
            raise validation.UsageError(
                f"found {part!r} in {text!r}; expected name=value, each name once, of "
                f"{', '.join(known)}{validation.nearest(name, known)}"
            )
        try:
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[name] = value
        if name in _OF_MODEL and isinstance(values[name], int):
            values[name] = float(values[name])

    def taken(names):
        return {name: values[name] for name in names if name in values}

    return dataclasses.replace(
        config,
        mesh=MeshConfig(**{"fsdp": 1} | taken(_OF_MESH)),
        execution=dataclasses.replace(config.execution, **taken(_OF_EXECUTION)),
        model=dataclasses.replace(config.model, **taken(_OF_MODEL)),
        **taken(_OF_RUN),
    )


def devices_of(config: TrainConfig) -> int:
    """How many devices its mesh takes. Raises `UsageError` for an axis that is left open."""
    sizes = {name: getattr(config.mesh, name) for name in AXES}
    if -1 in sizes.values():
        raise validation.UsageError(f"found {sizes}; expected a number for each axis of a side")
    return math.prod(sizes.values())


def _provide(count: int) -> None:
    """Makes `count` devices of a CPU, where no backend has begun. Raises `UsageError` if there are
    fewer."""
    with contextlib.suppress(RuntimeError):  # one has begun, with what it has
        jax.config.update("jax_num_cpu_devices", count)
    if len(jax.devices()) < count:
        raise validation.UsageError(
            f"a mesh takes {count} devices, and there are {len(jax.devices())}; expected a smaller "
            "mesh, or JAX_PLATFORMS=cpu, which makes as many as it takes"
        )


def main(config: TrainConfig) -> None:
    """Prints what differs, and the first of it in the order of the model."""
    from tulu_jax.planning import divergence

    configs = [side(config, text) for text in (_A.value, _B.value)]
    counts = [devices_of(each) for each in configs]
    _provide(max(counts))
    for each, count in zip(configs, counts, strict=True):
        cli.stop_if([*preflight.mesh_problems(each, count), *preflight.base_lib.problems(each)])
    rows = math.lcm(*(each.mesh.data * each.mesh.fsdp for each in configs))
    batch = divergence.first_rows(config, rows)
    sides = [divergence.Side(*pair) for pair in zip(configs, counts, strict=True)]
    found = []
    for difference in divergence.compare(*sides, batch):
        found.append(difference)
        if _ALL.value:
            print(difference, flush=True)
    differ = [difference for difference in found if difference.diverges]
    nearest = max(found, key=lambda one: one.found / one.explained if one.explained else 0.0)
    print(f"{len(found)} tensors of {rows} rows compared, {len(differ)} differ beyond rounding.")
    if not differ:
        print(f"Nearest to it (difference, and what rounding explains):\n  {nearest}")
        return
    print(f"The first is {differ[0].place}. Difference, and what rounding explains:")
    for one in differ[:_SHOWN]:
        print(f"  {one}")
    if len(differ) > _SHOWN:
        print(f"  and {len(differ) - _SHOWN} more")
    sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
