"""A table of the paper by one command: its runs trained and evaluated, ours beside the paper's.

Each run is a process of `train`, and then of `evaluate`; the same command goes on run by run where
it was stopped. At paper scale no run is started here: the launch commands are written instead.

Examples:
  python -m tulu_jax.study --study=table_5_qlora                          # on this machine, minutes
  python -m tulu_jax.study --study=all                                    # every tiny one
  python -m tulu_jax.study --study=table_3_dpo --only=sft,dpo
  python -m tulu_jax.study --study=table_1_suite --scale=paper --plan     # runs, slices, hours
  python -m tulu_jax.study --study=table_1_suite --scale=paper            # writes launch.sh
  python -m tulu_jax.study --study=table_1_suite --scale=paper --render --runs=gs://bucket/tulu/runs
"""

import pathlib
import sys

import jax
from absl import app, flags, logging

from tulu_jax import atomic, cli, validation
from tulu_jax.parallel import preemption
from tulu_jax.studies import (
    declared,
    known_studies,
    plan_table,
    run_commands,
    run_states,
    study_page,
)

_STUDY = flags.DEFINE_string(
    "study", None, f"The study: {', '.join(known_studies.NAMES)}; or 'all' that have this scale.",
    required=True,
)  # fmt: skip
_ONLY = flags.DEFINE_list(
    "only", [], "Names of runs; what they start from comes with them. Default: all."
)
_SCALE = flags.DEFINE_enum(
    "scale", "tiny", declared.SCALES, "On the embedded task, or the paper's runs."
)
_PLAN = flags.DEFINE_bool("plan", False, "Print what there is to do, and what it takes; and end.")
_RENDER = flags.DEFINE_bool("render", False, "Write the page of what is there; train nothing.")
_OUT = flags.DEFINE_string("out", None, "Folder of the study. Default: studies/NAME_SCALE.")
_RUNS = flags.DEFINE_string(
    "runs",
    None,
    "Folder or bucket of the workdirs. Default: ./runs at paper scale; OUT/runs with "
    "--out; else studies/runs, where studies share the runs that they have in common.",
)
_DRY_RUNS = flags.DEFINE_string("dry_runs", "dryrun", "Folder of the results of dry runs.")
flags.register_multi_flags_validator(
    ["plan", "render"], lambda given: not (given["plan"] and given["render"]),
    message="give one of --plan and --render",
)  # fmt: skip


def main(argv: list[str]) -> None:
    """Plans, runs or renders; status 1 if a run failed."""
    del argv
    logging.get_absl_handler().addFilter(cli.ours_or_serious)
    jax.config.update("jax_platforms", "cpu")  # the runs, which are other processes, have the chips
    with preemption.ending(), validation.refusing():
        sys.exit(_main())


def _main() -> int:
    if _STUDY.value != known_studies.ALL:
        return _carry_out(known_studies.get(_STUDY.value))
    if _ONLY.value or _OUT.value:
        raise validation.UsageError("--study=all takes neither --only nor --out; name one study")
    studies = [known_studies.get(name) for name in known_studies.NAMES]
    found = [one for one in studies if getattr(one, _SCALE.value) is not None]
    return max([_carry_out(study) for study in found])


def _carry_out(study: declared.Study) -> int:
    """Plans, runs or renders one study; 1 if a run failed."""
    scale = _SCALE.value
    design, on_slices = study.design(scale), scale == "paper"
    out = pathlib.Path(validation.expanded(_OUT.value or f"studies/{study.name}_{scale}"))
    root = _RUNS.value or (
        "runs" if on_slices else str(out / "runs") if _OUT.value else "studies/runs"
    )
    placed = run_states.place(
        design, design.chosen(_ONLY.value), configs=out / "configs",
        root=validation.expanded(root), below_bucket=on_slices,
    )  # fmt: skip
    if _PLAN.value:
        states = {one.name: run_states.state(one) for one in placed}
        print(f"{study.title}: {study.question}")
        for line in plan_table.lines(
            placed, states, design, on_slices=on_slices, dry_runs=_DRY_RUNS.value
        ):
            print(line)
        return 0
    failed = False
    if on_slices and not _RENDER.value:
        slices = {one.name: plan_table.slice_of(one) for one in placed}
        script = out / "launch.sh"
        out.mkdir(parents=True, exist_ok=True)
        atomic.write_text(script, run_commands.launch_script(placed, slices, design))
        print(f"Wrote {script}, which trains and evaluates {len(placed)} runs; then --render")
    elif not _RENDER.value:
        for _, problem in run_commands.run_all(placed, design, out / "logs"):
            failed |= bool(problem)
            print(problem, end="\n" if problem else "", flush=True)
    states = {one.name: run_states.state(one) for one in placed}
    content = study_page.write(study, scale, placed, states, out)
    for one in content["expected"]:
        print(f"{one['says']}: holds in {one['holds']} of {one['seeds']} seeds ({one['values']})")
    print(f"Wrote {', '.join(str(out / name) for name in study_page.NAMES)}")
    print(f"{len(content['holes'])} holes, {len(content['differences'])} differences in origin")
    return int(failed)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
