"""Rehearses a run of several hosts on this one: the same config, small, and one process killed.

Starts --processes processes on the CPU, as many hosts would, three times: undisturbed; with one of
them killed half-way; and again, to go on from the last checkpoint. Prints what held, PASS or FAIL.

`shrink` says what becomes smaller; all else is as in the gin file. Where its data is not at hand
(or with --embedded), the embedded tulu_tiny rows take its place.

Examples:
  bash launch/rehearse.sh --processes=4 --gin_file=tulu_tiny_sft.gin
  bash launch/rehearse.sh --processes=4 --gin_file=tulu_tiny_dpo.gin --workdir=/tmp/rehearsal
"""

import dataclasses
import math
import os
import pathlib
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from absl import flags

from tulu_jax import atomic, cli, strict_json, validation
from tulu_jax.data import data_checks
from tulu_jax.parallel import lifeline, wire
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.recipe import TrainConfig
from tulu_jax.training import metrics as metrics_lib

_PROCESSES = flags.DEFINE_integer("processes", 4, "Processes to rehearse with.", lower_bound=2)
_EMBEDDED = flags.DEFINE_bool("embedded", False, "Take the embedded rows even if others are there.")

STEPS, CHECKPOINT_EVERY, EVAL_EVERY = 24, 6, 12
LENGTH = 128
MARK = "rehearsal.txt"  # in the folder whose runs a rehearsal made
TOLERANCE = 1e-4  # of a loss; the same program, and sums whose order is not fixed


def shrink(config: TrainConfig, *, processes: int, embedded: bool) -> TrainConfig:
    """`config` for a rehearsal: a model of two layers with its ratio of query to key heads, float32
    and XLA attention; mesh axes of 2 where they were larger, and more `fsdp` if the processes are
    more; 24 updates of two rows a row shard at 128 tokens, from random weights; logs and
    encoded rows on this machine alone. With `embedded`, the rows and tokenizer of tulu_tiny. Raises
    `UsageError` for a run that needs a reward model."""
    if config.objective.reward_from is not None:
        raise validation.UsageError(
            f"reward_from = {config.objective.reward_from!r}: a rehearsal begins with random "
            "weights and has no reward model of their shape; rehearse SFT or DPO on these hosts"
        )
    mesh = {axis: 1 if getattr(config.mesh, axis) == 1 else 2 for axis in mesh_lib.AXES}
    mesh["fsdp"] *= processes // math.gcd(math.prod(mesh.values()), processes)
    data = dataclasses.replace(
        config.data, max_length=LENGTH, accept_counts=True, cache_dir="cache", workers=1
    )
    vocab_size = config.model.vocab_size
    if embedded:
        from tulu_jax.data import tulu_tiny

        data = dataclasses.replace(
            data,
            train=tulu_tiny.OF_KIND[config.objective.kind],
            validation=None,
            tokenizer=tulu_tiny.tokenizer(),
            data_root=None,
        )
        vocab_size = tulu_tiny.VOCAB_SIZE
    groups = min(4, config.model.num_heads // config.model.num_kv_heads)
    rows = mesh["data"] * mesh["fsdp"]
    batch_size = math.lcm(2 * rows, config.objective.row_multiple)
    wide = 1 if config.adapter is None else 4 * mesh["context"]  # blocks of 64 are whole
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model,
            vocab_size=-(-vocab_size // mesh["tensor"]) * mesh["tensor"],
            num_layers=2,
            embed_dim=16 * wide * mesh["fsdp"],
            mlp_dim=32 * wide * mesh["fsdp"] * mesh["tensor"],
            num_heads=2 * mesh["tensor"] * groups,
            num_kv_heads=2 * mesh["tensor"],
            head_dim=8 * wide,
        ),
        data=data,
        execution=dataclasses.replace(config.execution, compute_dtype="float32", attention="xla"),
        mesh=dataclasses.replace(config.mesh, topology=None, **mesh),
        checkpoint=dataclasses.replace(config.checkpoint, every=CHECKPOINT_EVERY),
        logging=dataclasses.replace(config.logging, every=1, tensorboard=False, wandb_project=None),
        base=None,
        batch_size=batch_size,
        micro_batch_size=batch_size // 2 if config.micro_batches > 1 else None,
        num_steps=STEPS,
        num_epochs=None,
        eval_every=EVAL_EVERY,
        param_dtype="float32",
    )


def devices_of_a_process(config: TrainConfig, processes: int) -> int:
    """Devices that each process needs for the mesh of a shrunk `config`."""
    return math.prod(getattr(config.mesh, axis) for axis in mesh_lib.AXES) // processes


class Processes:
    """The processes of one try; their output goes to `folder/process-I.log`."""

    def __init__(self, arguments: list[str], folder: pathlib.Path, *, count: int, devices: int):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            wire.TOKEN: secrets.token_hex(32),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"process-{i}.log" for i in range(count)]
        self.all = []
        for i, log in enumerate(self.logs):
            flags_of_one = [
                f"--coordinator_address={address}",
                f"--num_processes={count}",
                f"--process_id={i}",
            ]
            command = [sys.executable, "-m", "tulu_jax.rehearse", *arguments, *flags_of_one]
            with log.open("w") as file:
                self.all.append(
                    subprocess.Popen(command, env=environment, stdout=file, stderr=file)
                )

    def wait(self, until: Callable[[], bool] = lambda: False) -> bool:
        """Returns True once `until()`, False once all have ended."""
        while any(process.poll() is None for process in self.all):
            if until():
                return True
            time.sleep(0.1)
        return False

    def codes(self) -> list[int]:
        return [process.returncode for process in self.all]

    def stop(self) -> None:
        for process in self.all:
            process.kill()
            process.wait()


def losses(workdir: pathlib.Path) -> dict[int, float]:
    """The training loss of each update that is in the metrics."""
    if not (workdir / metrics_lib.FILE).exists():
        return {}
    lines = metrics_lib.read(str(workdir))
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


class Rehearsal:
    """The three tries and what was found."""

    def __init__(self, config: TrainConfig, root: pathlib.Path, arguments: list[str], count: int):
        self.config, self.root, self.arguments, self.count = config, root, arguments, count
        self.found: list[tuple[bool, str]] = []

    def check(self, holds: bool, what: str) -> bool:
        self.found.append((holds, what))
        print(f"{'ok  ' if holds else 'FAIL'}  {what}", flush=True)
        return holds

    def start(self, name: str, folder: str) -> tuple[Processes, pathlib.Path]:
        workdir = self.root / folder
        arguments = [*self.arguments, f"--workdir={workdir}"]
        devices = devices_of_a_process(self.config, self.count)
        return Processes(arguments, self.root / name, count=self.count, devices=devices), workdir

    def finish(self, name: str, folder: str) -> bool:
        """Whether a whole run, or the rest of one, ends well."""
        processes, workdir = self.start(name, folder)
        try:
            _with_bar(name, workdir, processes)
        finally:
            processes.stop()
        codes = processes.codes()
        done = codes == [0] * self.count and max(losses(workdir), default=0) == STEPS
        where = "" if done else f" (exit codes {codes}; see {processes.logs[0].parent})"
        self.check(done, f"{name}: {self.count} processes trained to update {STEPS}{where}")
        if not done:
            print(_last(processes.logs[0]))
        return done

    def kill_one(self, victim: int, step: int) -> bool:
        """Whether all others stop, naming the process that is killed after update `step`."""
        processes, workdir = self.start("killed", "disturbed")
        try:
            reached = _with_bar("killed", workdir, processes, until=step)
            if not self.check(reached, f"killed: {self.count} processes came to update {step}"):
                print(f"      see {processes.logs[0].parent}: {_last(processes.logs[0])}")
                return False
            processes.all[victim].send_signal(signal.SIGKILL)
            died = time.monotonic()
            limit = cli.peer_timeout() + 15
            processes.wait(lambda: time.monotonic() - died > limit)
            seconds = time.monotonic() - died
        finally:
            processes.stop()
        others = [i for i in range(self.count) if i != victim]
        stopped = all(processes.codes()[i] == lifeline.TRY_AGAIN for i in others)
        named = all(f"process {victim} (" in _last(processes.logs[i]) for i in others)
        self.check(stopped, f"killed: the others stopped {seconds:.1f} s after process {victim}")
        return self.check(named, f"killed: each said that process {victim} died") and stopped

    def compare(self) -> None:
        whole, resumed = losses(self.root / "undisturbed"), losses(self.root / "disturbed")
        log = (self.root / "restarted/process-0.log").read_text()
        self.check("Resuming from step" in log, "restarted: it went on from a checkpoint")
        same = whole.keys() == resumed.keys()
        worst = max((abs(whole[s] - resumed[s]) for s in whole), default=math.inf) if same else None
        self.check(
            same and worst <= TOLERANCE,
            f"losses: {len(resumed)} of {len(whole)} updates, largest difference {worst} "
            f"(at most {TOLERANCE})",
        )

    def run(self) -> bool:
        going = self.finish("undisturbed", "undisturbed")
        going = going and self.kill_one(self.count - 1, STEPS // 2)
        if going and self.finish("restarted", "disturbed"):
            self.compare()
        return all(holds for holds, _ in self.found)


def _without(arguments: list[str], *names: str) -> list[str]:
    """`arguments` without these flags, each `--name=value` or `--name value`."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument.split("=")[0] not in names:
            kept.append(argument)
        skip = argument in names
    return kept


def clear(root: pathlib.Path) -> None:
    """Removes the runs of an earlier rehearsal in `root`, and marks it as a rehearsal's. Raises
    `UsageError` for folders of these names that no rehearsal made."""
    there = [root / name for name in ("undisturbed", "disturbed") if (root / name).exists()]
    if there and not (root / MARK).exists():
        raise validation.UsageError(
            f"{there[0]} would be removed, and no rehearsal made it; move it away, or choose "
            "another --workdir"
        )
    for folder in there:
        shutil.rmtree(folder)
    root.mkdir(parents=True, exist_ok=True)
    atomic.write_text(root / MARK, "The runs of python -m tulu_jax.rehearse are removed by it.\n")


def _last(log: pathlib.Path) -> str:
    return " ".join(log.read_text(errors="replace").split("\n")[-3:])


def _with_bar(
    name: str, workdir: pathlib.Path, processes: Processes, *, until: int | None = None
) -> bool:
    """Shows the updates of a try until its end, or until one is reached, which it returns."""
    import tqdm

    with tqdm.tqdm(total=STEPS, desc=name, unit="update", mininterval=2.0) as bar:

        def look() -> bool:
            bar.update(max(losses(workdir), default=0) - bar.n)
            return until is not None and bar.n >= until

        reached = processes.wait(look)
        look()
    return reached


def main(config: TrainConfig) -> None:
    """One process of a try, if it is told which; else the whole rehearsal."""
    count = cli.num_processes()
    embedded = _EMBEDDED.value
    if count is not None:
        config = shrink(config, processes=count, embedded=embedded)
        from tulu_jax import preflight

        cli.check(config, preflight.to_train)
        from tulu_jax import trainer

        print(strict_json.dumps(trainer.Run(config).train()))
        return
    missing = list(data_checks.problems(config.data, kind=config.objective.kind))
    arguments = _without(sys.argv[1:], "--processes", "--workdir")
    if missing and not embedded:
        print(f"Embedded rows take the place of the config's, for {missing[0]}")
        arguments.append("--embedded")
    small = shrink(config, processes=_PROCESSES.value, embedded=embedded or bool(missing))
    print(f"{_PROCESSES.value} processes, mesh {small.mesh}, {small.model}")
    name = config.workdir.rstrip("/").split("/")[-1]
    root = pathlib.Path(cli.workdir() or f"runs/{name}_rehearsal").absolute()
    clear(root)
    passed = Rehearsal(small, root, arguments, _PROCESSES.value).run()
    print("PASS" if passed else f"FAIL; the output of every process lies in {root}")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    cli.run(main)
