"""`python -m tulu_jax.dryrun --gin_file=dpo_70b.gin`: compiles the run for its slice without one.

Prints what fits, where the time goes and what the run will cost, and writes DIR/dryrun.json,
DIR/dryrun.png and DIR/step.hlo.txt, the optimized program. Exit status 1 means that the run does
not fit; the last lines say what to change. `--topologies=A,B,...` compares slices, each with this
run's mesh where that fills it, else with the one that the planner's estimate prefers; `--plan`
searches the mesh, the micro-batch, rematerialisation, the optimizer's dtype and attention's blocks
for one slice and writes what wins as DIR/slice.gin. `docs/pods.md` tells how the time is estimated.

`--decode --prompts=64 --prompt_length=1024 --new_tokens=256` compiles the decoder's programs in
place of the train step: prefill and decode tokens/s, HBM, and how far a step is from what HBM
allows (`docs/decoding.md`). `--suite` prices the paper's nine benchmarks with them.

A run of PPO has two more programs: after the update the decoder's, and the pass that measures its
rollouts, are compiled, and a second table and DIR/iteration.json have memory and time by phase of a
whole iteration (`docs/ppo.md`).
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
_DECODE = flags.DEFINE_bool("decode", False, "Compile generation, not training.")
_PROMPTS = flags.DEFINE_integer("prompts", 64, "With --decode: prompts.")
_PROMPT_LENGTH = flags.DEFINE_integer("prompt_length", 1024, "With --decode: ids of each.")
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 256, "With --decode: ids after each.")
_SUITE = flags.DEFINE_bool("suite", False, "Price the paper's nine benchmarks on the slice.")


def main(config: TrainConfig) -> None:
    from tulu_jax.planning import plan, render, rows, topology

    given = [f"--{flag.name}" for flag in (_PLAN, _DECODE, _SUITE) if flag.value]
    if len(given) > 1:
        raise validation.UsageError(f"{' and '.join(given)}: expected one of them")
    asked = _asked(config) if _DECODE.value else None
    held = rows.WHOLE if _WHOLE_ROWS.value else None
    out = epath.Path(validation.expanded(_OUT.value or f"dryrun/{epath.Path(cli.gin_file()).stem}"))
    names = _TOPOLOGIES.value or [_TOPOLOGY.value or config.mesh.topology]
    if names == [None]:
        raise validation.UsageError(
            "this config names no topology; give --topology, e.g. --topology=v5p:4x8x8"
        )
    slices = [topology.parse(name) for name in names]
    if asked is not None:
        _decode(config, slices, asked, out)
        return
    if _SUITE.value:
        _price_suite(config, slices, out)
        return
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
    fits = any(result.fits for result in results)
    if config.objective.reward_from is not None:
        fits = _iterations(results[: 1 if _PLAN.value else None], out)
    if not fits:
        sys.exit(1)


def _iterations(results, out: epath.Path) -> bool:
    """Prices whole iterations of PPO on the slices of `results`; whether one fits."""
    from tulu_jax.planning import iteration

    found = [iteration.price(result) for result in results]
    print(iteration.table(found))
    text = strict_json.dumps([one.as_dict() for one in found], indent=1)
    atomic.write_text(out / "iteration.json", text)
    logging.info("Wrote %s/iteration.json", out)
    return any(one.fits for one in found)


def _asked(config: TrainConfig):
    """What --decode is to price. Raises `UsageError` for what no decoder takes."""
    from tulu_jax.planning import decoding_times

    given = {
        "prompts": _PROMPTS,
        "prompt_length": _PROMPT_LENGTH,
        "new_tokens": _NEW_TOKENS,
    }
    sizes = {name: flag.value for name, flag in given.items()}
    problems = [
        f"--{name}={size}: expected a positive number" for name, size in sizes.items() if size < 1
    ]
    asked, most = decoding_times.Asked(**sizes), config.model.max_positions
    if asked.length > most:
        problems.append(
            f"--prompt_length={asked.prompt_length} and --new_tokens={asked.new_tokens} are longer "
            f"than the model's {most:,} positions; expected at most that together"
        )
    cli.stop_if(problems)
    return asked


def _decode(config: TrainConfig, slices, asked, out: epath.Path) -> None:
    from tulu_jax.planning import decoding, decoding_times

    results, refused = _priced(config, slices, lambda slice_: decoding.price(config, slice_, asked))
    out.mkdir(parents=True, exist_ok=True)
    if results:
        print(decoding_times.table(results))
        for name, text in results[0].texts.items():
            atomic.write_text(out / f"{name}.hlo.txt", text)
    _finish(results, refused, out / "decode.json")


def _price_suite(config: TrainConfig, slices, out: epath.Path) -> None:
    from tulu_jax.planning import suite

    longest, positions = suite.longest(), config.model.max_positions
    if longest > positions:
        raise validation.UsageError(
            f"--suite has requests of {longest:,} positions and the model {positions:,}; expected "
            "a model that holds them"
        )
    results, refused = _priced(config, slices, lambda slice_: suite.price(config, slice_))
    out.mkdir(parents=True, exist_ok=True)
    if results:
        print(suite.table(results))
    _finish(results, refused, out / "suite.json")


def _priced(config: TrainConfig, slices, price) -> tuple[list, list[str]]:
    """What `price` says of each slice, and of those that are too small why."""
    from tulu_jax.planning import aot, decoding

    for one in slices:  # before anything is compiled
        decoding.mesh_of(config, one)
    results, refused = [], []
    for one in slices:
        try:
            results.append(price(one))
        except aot.DoesNotFit as error:
            refused.append(f"{one.name} does not fit: {error}")
    return results, refused


def _finish(results, refused: list[str], path: epath.Path) -> None:
    """Writes what was found; status 1 where nothing fits."""
    print("\n".join(refused), end="\n" if refused else "")
    atomic.write_text(path, strict_json.dumps([r.as_dict() for r in results], indent=1))
    logging.info("Wrote %s", path)
    if not any(result.fits for result in results):
        sys.exit(1)


if __name__ == "__main__":
    from tulu_jax.planning import topology as topology_lib

    with validation.refusing():
        topology_lib.enter()
    cli.run(main)
