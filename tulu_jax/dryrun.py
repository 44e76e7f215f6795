"""`python -m tulu_jax.dryrun --gin_file=dpo_70b.gin`: compiles the run for its slice without one.

Prints what fits, where the time goes and what the run will cost, and writes DIR/dryrun.json,
DIR/dryrun.png and DIR/step.hlo.txt, the optimized program. Exit status 1 means that the run does
not fit; the last lines say what to change. `--topologies=A,B,...` compares slices, each with this
run's mesh where that fills it, else with the one that the planner's estimate prefers; `--plan`
searches the mesh, the micro-batch, rematerialisation, the optimizer's dtype and attention's blocks
for one slice and writes what wins as DIR/slice.gin. `docs/pods.md` tells how the time is estimated.
"""

import sys

from absl import flags, logging
from etils import epath

from tulu_jax import atomic, cli, strict_json, validation
from tulu_jax.recipe import TrainConfig

_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Slice to compile for, e.g. v5p:4x8x8 or 2*v5e:16x16. Default: the pod's."
)
_TOPOLOGIES = flags.DEFINE_list("topologies", [], "Slices to compare for this run.")
_PLAN = flags.DEFINE_bool("plan", False, "Search the best mesh for the topology; writes slice.gin.")
_COMPILES = flags.DEFINE_integer("compiles", 6, "Compilations that --plan may spend.")
_OUT = flags.DEFINE_string("out", None, "Folder of dryrun.json and .png. Default: dryrun/<file>.")
_WHOLE_ROWS = flags.DEFINE_bool(
    "whole_rows", False, "Price attention as though each row were one document, as pre-training."
)


def main(config: TrainConfig) -> None:
    from tulu_jax.planning import plan, render, rows, topology

    held = rows.WHOLE if _WHOLE_ROWS.value else None
    out = epath.Path(validation.expanded(_OUT.value or f"dryrun/{epath.Path(cli.gin_file()).stem}"))
    names = _TOPOLOGIES.value or [_TOPOLOGY.value or config.mesh.topology]
    if names == [None]:
        raise validation.UsageError(
            "this config names no topology; give --topology, e.g. --topology=v5p:4x8x8"
        )
    slices = [topology.parse(name) for name in names]
    out.mkdir(parents=True, exist_ok=True)
    if _PLAN.value:
        results = plan.search(config, slices[0], compiles=_COMPILES.value, out=out)
    else:
        runs = [(plan.suited(config, s), s) for s in slices]
        cli.stop_if(problem for run in runs for problem in plan.problems(*run))
        results = [plan.price(*run, held=held) for run in runs]
    print(render.table(results))
    found = strict_json.dumps([r.as_dict() for r in results], indent=1)
    atomic.write_text(out / "dryrun.json", found)
    render.draw(results, out / "dryrun.png")
    if results[0].step:
        atomic.write_text(out / "step.hlo.txt", results[0].step.text)
    logging.info("Wrote %s/dryrun.json and dryrun.png", out)
    if not any(result.fits for result in results):
        sys.exit(1)


if __name__ == "__main__":
    from tulu_jax.planning import topology as topology_lib

    with validation.refusing():
        topology_lib.enter()
    cli.run(main)
