"""Seconds of an SFT and of a DPO update on the CPU: ours against other JAX trainers.

    python benchmarks/peers_cpu.py --peer tunix=envs/tunix/bin/python --peer levanter=...

Each peer runs in an environment of its own (docs/benchmarks.md says how to make them), by
`benchmarks/peers/NAME_worker.py`. All sides: a Llama of 4 layers of 256 with a vocabulary of 32,000
and random weights, float32, AdamW with clip 1.0, the same tokens, the same trained tokens, the same
cores. SFT: 4 rows of 512. DPO: 4 pairs of a prompt of 256 and two answers of 256, the reference
scored in each update; one row more is ours with the reference cached. The workers of a stage wait
while one of them runs; they take turns. Ratios are a peer's time over ours: above 1 ours is faster.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import select
import statistics
import subprocess
import sys
import tempfile

import outcome

OURS, CACHED = "tulu_jax", "tulu_jax, cached reference"
WORKERS = pathlib.Path(__file__).parent / "peers"
TARGET = 1.0  # below the ratio to each peer
UPDATES = 2  # of a worker's turn
START_SECONDS, TURN_SECONDS = 1800, 600
NOT_OURS = ("XLA_FLAGS", "NPROC")  # of the environment: each side divides the cores as it does


class Failed(Exception):
    """A worker cannot go on; the message is what it said last."""


class Worker:
    """A process that makes updates when it is told to (`peers/protocol.py`), and its first answer:
    `versions` and `first_loss`."""

    def __init__(self, name: str, python: str, stage: str, *, tiny: bool):
        environment = {k: v for k, v in os.environ.items() if k not in NOT_OURS}
        environment["JAX_PLATFORMS"] = "cpu"
        if name != "ours":
            environment.pop("PYTHONPATH", None)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- `close` does
        self._process = subprocess.Popen(
            [python, str(WORKERS / f"{name}_worker.py"), stage, *["--tiny"] * tiny],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, bufsize=0,
            env=environment,
        )  # fmt: skip
        try:
            self.first = self._answer(START_SECONDS)
        except Failed:
            self.close()
            raise

    def seconds(self, updates: int) -> float:
        """Of one of so many updates."""
        try:
            self._process.stdin.write(f"{updates}\n".encode())
        except BrokenPipeError as error:
            raise Failed(self._last_words()) from error
        return self._answer(updates * TURN_SECONDS)["seconds"]

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _answer(self, timeout: float) -> dict:
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        if not ready:
            self._process.kill()
            raise Failed(f"no answer in {timeout} s")
        while line := self._process.stdout.readline():
            if line.startswith(b"{"):  # others are what a peer prints as it is imported
                return json.loads(line)
        self._process.wait()
        raise Failed(self._last_words())

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return lines[-1] if lines else f"ended with status {self._process.returncode}"


@dataclasses.dataclass(frozen=True)
class Stage:
    """What was measured, by the names of rows: `seconds` of an update in each turn, the `first`
    answers, and why a row is `absent`."""

    seconds: dict[str, list[float]]
    first: dict[str, dict]
    absent: dict[str, str]

    def ratio(self, name: str) -> float | None:
        """The median time of `name` over ours, if both were measured."""
        if name in self.absent or OURS in self.absent:
            return None
        return statistics.median(self.seconds[name]) / statistics.median(self.seconds[OURS])


def measure(sides: dict[str, tuple[str, str, str]], rounds: int, *, tiny: bool) -> Stage:
    """`sides` are (worker, python, stage) by the names of rows. Workers start one after the other,
    for they compile on all cores; then they take turns."""
    workers, stage = {}, Stage(seconds={}, first={}, absent={})

    def drop(name: str, error: Failed) -> None:
        stage.absent[name] = str(error)
        print(f"{name}: not measured, {error}", flush=True)

    try:
        for name, side in sides.items():
            try:
                workers[name] = Worker(*side, tiny=tiny)
            except Failed as error:
                drop(name, error)
        stage.first.update({name: worker.first for name, worker in workers.items()})
        stage.seconds.update({name: [] for name in workers})
        for _ in range(rounds):
            for name in [name for name in workers if name not in stage.absent]:
                try:
                    stage.seconds[name].append(workers[name].seconds(UPDATES))
                except Failed as error:
                    drop(name, error)
    finally:
        for worker in workers.values():
            worker.close()
    return stage


def cells(stage: Stage, name: str) -> str:
    """Seconds, ratio and the loss of the first update, of one row in one stage."""
    if name in stage.absent or name not in stage.seconds:
        return f"{'-':>8} {'-':>6} {'-':>8}"
    seconds, ratio = statistics.median(stage.seconds[name]), stage.ratio(name)
    shown = "-" if ratio is None else f"{ratio:.2f}"
    return f"{seconds:8.3f} {shown:>6} {stage.first[name]['first_loss']:8.4f}"


def table(stages: dict[str, Stage]) -> str:
    """One line for each row, with the cells of both stages."""
    lines = [
        f"{'':27} {'SFT':>24} {'DPO':>24}",
        f"{'':27} " + f"{'s/update':>9}{'ratio':>7}{'loss':>8} " * 2 + " versions",
    ]
    for name in dict.fromkeys(name for s in stages.values() for name in (*s.seconds, *s.absent)):
        first = next((s.first[name] for s in stages.values() if name in s.first), None)
        versions = ", ".join(f"{k} {v}" for k, v in first["versions"].items()) if first else "-"
        columns = " ".join(cells(stage, name) for stage in stages.values())
        lines.append(f"{name:27} {columns}  {versions}")
    return "\n".join(lines)


def summary(stages: dict[str, Stage], peers: list[str]) -> dict:
    """The result for `outcome.tell`: `ratio` is the smallest; what was not measured is no win."""
    ratios = {
        stage: {name: ratio for name in peers if (ratio := found.ratio(name)) is not None}
        for stage, found in stages.items()
    }
    every = [ratio for found in ratios.values() for ratio in found.values()]
    won = sum(ratio > TARGET for ratio in every)
    return {
        "name": "peers_cpu",
        "ratio": min(every, default=0.0),
        "target": TARGET,
        "ok": won == len(stages) * len(peers),
        "won": won,
        "of": len(stages) * len(peers),
        "ratios": ratios,
        "seconds": {stage: found.seconds for stage, found in stages.items()},
        "absent": {stage: found.absent for stage, found in stages.items()},
    }


def peer(text: str) -> tuple[str, str]:
    """'NAME=PYTHON' as a pair."""
    name, _, python = text.partition("=")
    known = sorted(path.name.removesuffix("_worker.py") for path in WORKERS.glob("*_worker.py"))
    if name not in known:
        raise argparse.ArgumentTypeError(f"{name!r} is unknown; expected NAME=PYTHON, of {known}")
    if not os.access(python, os.X_OK) or os.path.isdir(python):
        raise argparse.ArgumentTypeError(f"{python!r} is no interpreter; give that of {name}")
    return name, python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer", type=peer, action="append", required=True, metavar="NAME=PYTHON")
    parser.add_argument("--rounds", type=int, default=5, help=f"turns of {UPDATES} updates")
    parser.add_argument("--tiny", action="store_true", help="whether it works, not how fast it is")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds={arguments.rounds}: expected a positive number")
    peers, ours = dict(arguments.peer), ("ours", sys.executable)
    stages = {}
    for stage in ("sft", "dpo"):
        sides = {OURS: (*ours, stage)}
        if stage == "dpo":
            sides[CACHED] = (*ours, "dpo_cached")
        sides |= {name: (name, python, stage) for name, python in peers.items()}
        stages[stage] = measure(sides, arguments.rounds, tiny=arguments.tiny)
    print(
        f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}, medians of "
        f"{arguments.rounds} turns of {UPDATES} updates{', tiny sizes' * arguments.tiny}"
    )
    print(table(stages))
    outcome.tell(summary(stages, list(peers)))


if __name__ == "__main__":
    main()
