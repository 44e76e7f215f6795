"""The commands of a study's runs: carried out, one on each core, or written for slices."""

import dataclasses
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


def evaluate(
    placed: Placed, design: Design, benchmarks: Sequence[str], folder: pathlib.Path
) -> list[str]:
    """Evaluates the last step of a run, or goes on with that; the scores go to `folder`."""
    workdir = placed.workdir if placed.drawn_by is None else placed.drawn_by.workdir
    return [
        "tulu_jax.evaluate", f"--gin_file={placed.gin_file}", f"--workdir={workdir}",
        f"--benchmarks={','.join(benchmarks)}", *_asked(placed, design), *_scored(placed, ""),
        f"--out={folder}",
    ]  # fmt: skip


def _asked(placed: Placed, design: Design) -> tuple[str, ...]:
    """Flags that say what of a run is evaluated, and how it is asked."""
    chat = placed.run.initial
    return (*design.asked, *(() if chat is None else ("--initial", f"--chat={chat}")))


def _scored(placed: Placed, prefix: str) -> list[str]:
    """Flags of what scores the answers of a run, below `prefix`, and of what is chosen of them."""
    if placed.scored_by is None:
        return []
    flags = [f"--reward_from={prefix}{placed.scored_by}"]
    if placed.drawn_by is not None:
        flags.append(f"--best_of={placed.run.best_of}")
    return flags


def dry_run(placed: Placed, folder: str) -> str:
    """Prices a run on its slice."""
    command = ["python", "-m", "tulu_jax.dryrun", f"--gin_file={placed.gin_file}"]
    return shlex.join([*command, f"--out={folder}/{placed.run.name}"])


def lacking(placed: Placed, state: run_states.State, design: Design) -> list[str]:
    """The benchmarks that a trained run was not evaluated on."""
    there = {one.benchmark for one in state.scored}
    return [name for name in design.asked_of(placed.run) if name not in there]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Process:
    """A command of a run that is being carried out, on some cores, with its output in `log`."""

    of: Placed
    command: Sequence[str]
    process: subprocess.Popen
    log: pathlib.Path
    cores: Sequence[int]
    begin: float = dataclasses.field(default_factory=time.monotonic)


def run_all(
    placed: Sequence[Placed], design: Design, folder: pathlib.Path
) -> Iterator[tuple[Placed, str]]:
    """Trains and evaluates what is not there, each in a process of its own, whose output goes to
    `folder`; yields each run with what became of it: '', or what went wrong. As many run at once
    as this process has cores, one on each: a model of these sizes gains little from a second. A run
    that is ready alone has all of them. What starts from a run that failed is left out. A run that
    is stopped goes on when this is called again."""
    folder.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))
    waiting, running, failed = list(placed), list[_Process](), set[str]()
    ended: list[tuple[Placed, str]] = []
    try:
        while waiting or running:
            begun = [one.of for one in running]
            unfinished = {_key(one.workdir) for one in (*waiting, *begun)}
            ready = []
            for one in list(waiting):
                needs = {_key(w): name for w, name in one.needs.items()}
                if lost := [name for workdir, name in needs.items() if workdir in failed]:
                    waiting.remove(one)
                    ended.append((one, f"{one.name}: not started, since {lost[0]} failed"))
                elif not needs.keys() & unfinished:
                    ready.append(one)
            free = [core for core in cores if not any(core in one.cores for one in running)]
            alone = len(ready) == 1 and not running
            for one in ready[: len(free)]:
                waiting.remove(one)
                _go_on(one, design, folder, cores if alone else free[:1], running, ended)
                free = free[1:]
            if running and not ended:
                time.sleep(0.1)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                if problem := _said(one):
                    ended.append((one.of, problem))
                else:
                    _go_on(one.of, design, folder, one.cores, running, ended, one.command)
            for one, problem in ended:
                if problem:
                    failed.add(_key(one.workdir))
                yield one, problem
            ended.clear()
    finally:  # stopped: the runs save, and end before this does
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()


def _go_on(
    one: Placed, design: Design, folder: pathlib.Path, cores: Sequence[int],
    running: list[_Process], ended: list[tuple[Placed, str]], after: Sequence[str] = (),
) -> None:  # fmt: skip
    """Starts what is next of a run, or says in `ended` that it is done, or why it cannot be."""
    state = run_states.state(one)
    if state.kind == run_states.DONE:
        names = lacking(one, state, design)
        command = evaluate(one, design, names, state.folder) if names else ()
    else:
        command = train(one)
    stuck = one.drawn_by is not None and state.kind != run_states.DONE
    if stuck or state.kind == run_states.OTHER or (command and command == after):
        ended.append((one, state.says or f"{one.name}: {command[0]} left no scores"))
    elif not command:
        ended.append((one, ""))
    else:
        running.append(_start(command, one, folder, cores))


def _start(
    command: Sequence[str], one: Placed, folder: pathlib.Path, cores: Sequence[int]
) -> _Process:
    """Starts a module of this package with this interpreter."""
    log = folder / f"{pathlib.PurePath(one.workdir).name}.{command[0].rpartition('.')[2]}.log"
    print(f"{one.name}: python -m {shlex.join(command)}", flush=True)
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=file, stderr=subprocess.STDOUT,
            env=_environment(one),
        )  # fmt: skip
    os.sched_setaffinity(process.pid, cores)  # before it has made a thread
    return _Process(of=one, command=command, process=process, log=log, cores=cores)


def _said(one: _Process) -> str:
    """What went wrong with a command that has ended, or nothing."""
    code, name = one.process.returncode, one.command[0].rpartition(".")[2]
    print(f"{one.of.name}: {name}, {time.monotonic() - one.begin:.0f} s, status {code}", flush=True)
    if code == 0:
        return ""
    last = "\n    ".join(one.log.read_text(errors="replace").split("\n")[-LOG_LINES:]).rstrip()
    return (
        f"{one.of.name}: {one.command[0]} ended with status {code}; {one.log} ends with\n    {last}"
    )


def _key(workdir: str) -> str:
    return os.path.abspath(workdir) if workdir and "://" not in workdir else workdir


def _environment(one: Placed) -> Mapping[str, str]:
    """This process's, with a folder in which runs that compile the same program find it."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(_key(one.workdir)).parent / "compiled"),
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
        benchmarks = design.asked_of(one.run)
        asked = f'--benchmarks={",".join(benchmarks)} --eval_data="$EVAL_DATA"'
        flags = " ".join(map(shlex.quote, _asked(one, design)))
        flags += "".join(f' "{flag}"' for flag in _scored(one, "$BUCKET/"))
        if one.drawn_by is not None:
            flags += f" --out={shlex.quote(str(run_states.evals_folder(one, None)))}"
        lines += ["", f"# {one.name}"]
        if one.run.only_prepared:
            lines.append(f"python -m tulu_jax.prepare {config}")
            continue
        if one.run.is_trained:
            lines += [
                f'bash launch/tpu_vm.sh watch --name={label} --zone="$ZONE" --type={type_} \\',
                f'  --version="${{VERSION:-v2-alpha-tpuv5}}" --spot -- {config}',
            ]
        if benchmarks:
            lines += [
                f"python -m tulu_jax.evaluate {config} \\",
                f"  {asked} ${{JUDGE:-}} {flags}".rstrip(),
            ]
    return "\n".join(lines) + "\n"
