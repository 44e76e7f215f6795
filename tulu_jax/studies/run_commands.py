"""The commands of a study's runs: carried out one after the other, or written for slices."""

import os
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from tulu_jax.studies import run_states
from tulu_jax.studies.declared import Design
from tulu_jax.studies.run_states import Placed

LOG_LINES = 12  # of a run that failed, shown
_TYPES = {"v5e": "v5litepod"}  # as the launcher names what the project calls otherwise


def train(placed: Placed) -> list[str]:
    """Trains a run, or goes on with it; or prepares its rows."""
    module = "tulu_jax.prepare" if placed.run.only_prepared else "tulu_jax.train"
    return [module, f"--gin_file={placed.gin_file}", f"--workdir={placed.workdir}"]


def evaluate(placed: Placed, design: Design, benchmarks: Sequence[str]) -> list[str]:
    """Evaluates the last step of a run, or goes on with that."""
    workdir = placed.workdir if placed.drawn_by is None else placed.drawn_by.workdir
    return [
        "tulu_jax.evaluate", f"--gin_file={placed.gin_file}", f"--workdir={workdir}",
        f"--benchmarks={','.join(benchmarks)}", *design.asked, *_scored(placed, ""),
    ]  # fmt: skip


def _scored(placed: Placed, prefix: str) -> list[str]:
    """Flags of what scores the answers of a run, below `prefix`, and of what is chosen of them."""
    if placed.scored_by is None:
        return []
    flags = [f"--reward_from={prefix}{placed.scored_by}"]
    if placed.drawn_by is not None:
        out = run_states.evals_folder(placed, None)
        flags += [f"--best_of={placed.run.best_of}", f"--out={out}"]
    return flags


def dry_run(placed: Placed, folder: str) -> str:
    """Prices a run on its slice."""
    command = ["python", "-m", "tulu_jax.dryrun", f"--gin_file={placed.gin_file}"]
    return shlex.join([*command, f"--out={folder}/{placed.run.name}"])


def lacking(placed: Placed, state: run_states.State, design: Design) -> list[str]:
    """The benchmarks that a trained run was not evaluated on."""
    if state.card is not None or not placed.run.is_evaluated:
        return []
    there = {one.benchmark for one in state.scored}
    return [name for name in design.benchmarks if name not in there]


def run_all(
    placed: Sequence[Placed], design: Design, folder: pathlib.Path
) -> Iterator[tuple[Placed, str]]:
    """Trains and evaluates what is not there, each in a process of its own, whose output goes to
    `folder`; yields each run with what became of it: '', or what went wrong. What starts from a run
    that failed is left out. A run that is stopped goes on when this is called again."""
    folder.mkdir(parents=True, exist_ok=True)
    failed: set[str] = set()
    for one in placed:
        needs = {one.base: one.run.base, one.reward: one.run.reward}
        needs[one.scored_by] = one.run.scored_by
        if name := next((name for workdir, name in needs.items() if workdir in failed), None):
            failed.add(os.path.abspath(one.workdir))
            yield one, f"{one.name}: not started, since {name} failed"
            continue
        problem = _carry_out(one, design, folder)
        if problem:
            failed.add(os.path.abspath(one.workdir))
        yield one, problem


def _carry_out(one: Placed, design: Design, folder: pathlib.Path) -> str:
    state = run_states.state(one)
    if state.kind == run_states.OTHER:
        return state.says
    if state.kind != run_states.DONE:
        if one.drawn_by is not None:
            return state.says
        if problem := _run(train(one), one, folder):
            return problem
        state = run_states.state(one)
        if state.kind != run_states.DONE:
            return state.says
    if names := lacking(one, state, design):
        return _run(evaluate(one, design, names), one, folder)
    return ""


def _run(command: Sequence[str], one: Placed, folder: pathlib.Path) -> str:
    """Runs a module of this package with this interpreter; what went wrong, or nothing."""
    log = folder / f"{pathlib.PurePath(one.workdir).name}.{command[0].rpartition('.')[2]}.log"
    begin = time.monotonic()
    print(f"{one.name}: python -m {shlex.join(command)}", flush=True)
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=file, stderr=subprocess.STDOUT,
            env=_environment(folder),
        )  # fmt: skip
        try:
            code = process.wait()
        except BaseException:  # stopped: the run saves, and ends before this does
            process.terminate()
            process.wait()
            raise
    print(f"  {time.monotonic() - begin:.0f} s, status {code}", flush=True)
    if code == 0:
        return ""
    last = "\n    ".join(log.read_text(errors="replace").split("\n")[-LOG_LINES:]).rstrip()
    return f"{one.name}: {command[0]} ended with status {code}; {log} ends with\n    {last}"


def _environment(folder: pathlib.Path) -> Mapping[str, str]:
    """This process's, with a folder in which runs that compile the same program find it."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str((folder / "compiled").absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    } | os.environ


def launch_script(placed: Sequence[Placed], slices: Mapping[str, str], design: Design) -> str:
    """A shell script that trains the runs on TPU slices, one after the other, and evaluates each;
    `slices` are their slices by name. BUCKET, ZONE and EVAL_DATA come from the environment."""
    lines = [
        "#!/usr/bin/env bash",
        "# Written by tulu_jax.study. Give BUCKET, ZONE and EVAL_DATA (docs/evaluations.md), and",
        "# JUDGE to answer what judges are asked for, such as JUDGE='--judge_url=URL'.",
        "set -euo pipefail",
        ': "${BUCKET:?}" "${ZONE:?}" "${EVAL_DATA:?}"',
        "BUCKET_FLAG=\"--gin.BUCKET='$BUCKET'\"",
    ]
    for one in placed:
        slice_ = slices[one.name]
        chip, _, count = slice_.partition("_")
        type_ = f"{_TYPES.get(chip, chip)}-{count}"
        stem = pathlib.PurePath((one.drawn_by or one).workdir).name
        label = stem.replace("_", "-").replace(".", "-")
        workdir = f'"--workdir=$BUCKET/runs/{stem}"'
        config = f'--gin_file={shlex.quote(one.gin_file)} "$BUCKET_FLAG" {workdir}'
        asked = f'--benchmarks={",".join(design.benchmarks)} --eval_data="$EVAL_DATA"'
        flags = " ".join(map(shlex.quote, design.asked))
        flags += "".join(f' "{flag}"' for flag in _scored(one, "$BUCKET/"))
        lines += ["", f"# {one.name}"]
        if one.run.only_prepared:
            lines.append(f"python -m tulu_jax.prepare {config}")
            continue
        if one.drawn_by is None:
            lines += [
                f'bash launch/tpu_vm.sh watch --name={label} --zone="$ZONE" --type={type_} \\',
                f'  --version="${{VERSION:-v2-alpha-tpuv5}}" --spot -- {config}',
            ]
        if design.benchmarks and one.run.is_evaluated:
            lines += [
                f"python -m tulu_jax.evaluate {config} \\",
                f"  {asked} ${{JUDGE:-}} {flags}".rstrip(),
            ]
    return "\n".join(lines) + "\n"
