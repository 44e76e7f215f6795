"""A recipe that is killed, damaged and cut off gives what an undisturbed one does.

    python benchmarks/soak.py [--kills 60] [--terms 20] [--flips 120] [--faults 200] [--seed 0]

Real processes train tulu_tiny with a tiny model: SFT, DPO from its checkpoint, and the Hugging Face
folder of that. Each is one try after another, ended by SIGKILL at drawn moments: as it starts, as
it encodes, computes the reference, updates, saves, or exports; then the same command goes on. Some
are ended by SIGTERM: with status 75, and nothing torn in their folder.

- On the same mesh all lines of metrics.jsonl must be equal bit for bit, the exports too; on another
  mesh at every try, to the rounding of float32. No line may be lost or doubled, and the folder must
  hold the files that the undisturbed one has, no others.
- One bit is flipped in a file of a checkpoint, of the encode cache or of the reference, and all of
  that is read. It is named if that is refused, harmless if what was read is the same, else silent.
- With its folder in a bucket, through a proxy that answers 429, 500 and 503, cuts bodies, resets
  connections, loses answers and flips a byte, the run must give the same lines.

`ratio` is the share of kills, flips and faults behind which all was right.
"""

import argparse
import collections
import contextlib
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fault_proxy  # noqa: E402

from tulu_jax import atomic, validation  # noqa: E402
from tulu_jax.training import checkpoint as checkpoint_lib  # noqa: E402
from tulu_jax.training import metrics as metrics_lib  # noqa: E402
from tulu_jax.training import reference as reference_lib  # noqa: E402

SMALL = """
from __gin__ import dynamic_registration
from tulu_jax.data import tulu_tiny
from tulu_jax.models import config
from tulu_jax.parallel import mesh
from tulu_jax.training import metrics
include 'tulu_tiny_{stage}.gin'

config.LlamaConfig.num_layers = 1
config.LlamaConfig.embed_dim = 32
config.LlamaConfig.mlp_dim = 64
config.LlamaConfig.head_dim = 8
config.LlamaConfig.num_heads = 4
config.LlamaConfig.num_kv_heads = 2
metrics.LoggingConfig.tensorboard = False
mesh.MeshConfig.data = {data}
mesh.MeshConfig.tensor = {tensor}
MAX_LENGTH = 64
BATCH_SIZE = 8
BASE = {base!r}
NUM_STEPS = 24
CHECKPOINT_EVERY = 4
EVAL_EVERY = 10
"""
MESHES = {"whole": (1, 1), "moved": (2, 2)}  # data, tensor
LOSSES = {"train/loss", "eval/loss"}  # an accuracy jumps where two sides are equal
STAGES = ("sft", "dpo", "convert")
TOLERANCE = dict(rtol=2e-4, atol=2e-5)  # as in tests/test_processes.py
LIMIT = 300  # seconds of one try
KINDS = ("kills", "terms", "flips", "faults")
AGAIN = 75  # the status that asks for the same command (docs/launch.md)
MOST = {"sft": 4, "dpo": 5, "convert": 2}  # signals to a stage before it is let run to its end
FAULTS = [(kind, "") for kind in ("429", "500", "503", "cut", "reset", "lost")]
FAULTS += [("flip", fault_proxy.CONTENT)]
SHARE = 0.01  # of the requests of each kind of fault
TRIES = 8  # in a bucket that fails, of one stage
# When a try is killed: how long after what has come to be in its folder.
MOMENTS = {
    "sft": ("start", "lease", "encode", "update", "save", "any"),
    "dpo": ("start", "lease", "encode", "reference", "update", "save", "any"),
    "convert": ("start", "export", "any"),
}
IMPORTS = ("start", "any")  # may come before the command's own code, when SIGTERM is Python's
# Of each moment the files that tell it, and the most seconds that the signal comes after one.
SOUGHT = {
    "start": (4.0, ()),
    "any": (12.0, ()),
    "lease": (0.5, ("{stage}/tulu_jax.lease",)),
    "encode": (0.6, ("cache/*/*.arrow", "cache/*/.*")),
    "reference": (0.4, ("dpo/reference_*/*",)),
    "update": (0.8, ("{stage}/metrics.jsonl",)),
    "save": (0.05, ("{stage}/checkpoints/*-tmp*",)),
    "export": (0.05, (".hf.*", "hf/*")),
}


class Tally:
    """What was done, by kind, and what was not right behind it."""

    def __init__(self):
        self.kills, self.terms, self.flips, self.faults = (collections.Counter() for _ in KINDS)
        self.wrong: list[str] = []


def make_home(folder: pathlib.Path, bucket: str | None = None) -> pathlib.Path:
    """A working directory with a gin file for each stage and mesh."""
    folder.mkdir(parents=True)
    for name, (data, tensor) in MESHES.items():
        for stage in STAGES[:2]:
            base = None if stage == "sft" else f"{bucket or '.'}/sft"
            text = SMALL.format(stage=stage, data=data, tensor=tensor, base=base)
            (folder / f"{stage}_{name}.gin").write_text(text)
    return folder


def start(
    home: pathlib.Path, stage: str, mesh: str, bucket=None, environment=()
) -> subprocess.Popen:
    """One try of a stage."""
    place = bucket or "."
    run = "dpo" if stage == "convert" else stage
    command = [sys.executable, "-m", f"tulu_jax.{'convert' if stage == 'convert' else 'train'}"]
    command += [f"--gin_file={run}_{mesh}.gin", f"--workdir={place}/{run}"]
    command += [f"--out={place}/hf", "--overwrite"] if stage == "convert" else []
    devices = f"--xla_force_host_platform_device_count={np.prod(MESHES[mesh])}"
    return subprocess.Popen(
        command,
        cwd=home,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices, "PYTHONPATH": str(ROOT)}
        | dict(environment),
        stdout=subprocess.DEVNULL,
        stderr=open(home / "said", "w"),
    )


def ended(process: subprocess.Popen, home: pathlib.Path) -> int:
    code = process.wait(LIMIT)
    if code:
        print((home / "said").read_text()[-3000:], file=sys.stderr)
    return code


def signalled(process, home, stage: str, moment: str, number: int, draw) -> int:
    """The exit status of a try that gets a signal."""
    delay, patterns = SOUGHT[moment]
    patterns = [pattern.format(stage=stage) for pattern in patterns]
    there = dict(found(home, patterns))
    while (
        patterns
        and process.poll() is None
        and not dict(found(home, patterns)).items() - there.items()
    ):
        time.sleep(0.002)
    time.sleep(draw.uniform(0, delay))
    process.send_signal(number)
    return process.wait(LIMIT)


def found(home: pathlib.Path, patterns: list[str]) -> Iterator[tuple[pathlib.Path, int]]:
    for pattern in patterns:
        with contextlib.suppress(FileNotFoundError):  # it is gone already
            for path in home.glob(pattern):
                yield path, path.stat().st_mtime_ns


def lines(workdir: str) -> list[dict]:
    """Every metric of every step but the timings."""
    return [
        {name: value for name, value in line.items() if not name.startswith("perf/")}
        for line in metrics_lib.read(workdir)
    ]


def names(home: pathlib.Path) -> set[str]:
    """The files of a home, without what their content gives to their names."""
    paths = (path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file())
    return {re.sub(r"[0-9a-f]{16,}", "*", path) for path in paths}


def differences(home: pathlib.Path, whole: pathlib.Path, *, exact: bool) -> Iterator[str]:
    """What a finished home has other than the undisturbed one, one text each."""
    for stage in [name for name in STAGES[:2] if (whole / name).exists()]:
        ours, theirs = lines(str(home / stage)), lines(str(whole / stage))
        steps = [[(line["step"], *sorted(line)) for line in each] for each in (ours, theirs)]
        if steps[0] != steps[1]:
            yield f"{stage}: lines lost or doubled"
            continue
        for a, b in zip(ours, theirs, strict=True):
            for n in a if exact else a.keys() & LOSSES:
                if a[n] != b[n] if exact else not np.allclose(a[n], b[n], **TOLERANCE):
                    yield f"{stage}: step {a['step']}, {n}: {a[n]} is not {b[n]}"
    for name in sorted(names(home) ^ names(whole)):
        yield f"{name}: {'left behind' if name in names(home) else 'lost'}"
    if exact and (whole / "hf").exists():
        for file in sorted((whole / "hf").iterdir()):
            if (home / "hf" / file.name).read_bytes() != file.read_bytes():
                yield f"hf/{file.name}: other content"


def through_signals(root, whole, signals: list[int], mesh, draw, tally: Tally, stages) -> None:
    """The recipe with these signals in their order, from the beginning as often as there are some
    left; each try on the mesh that `mesh` chooses of the names, or all on that of `whole`."""
    left = collections.deque(signals)
    while left:
        home = make_home(root / "again")
        for stage in stages:
            for _ in range(MOST[stage]):
                if not left or struck(home, stage, left[0], mesh, draw, tally) == 0:
                    break  # none is left, or the stage came to its end
                left.popleft()
            if code := ended(start(home, stage, mesh([*MESHES]) if mesh else "whole"), home):
                tally.wrong.append(f"{stage} ended with {code}")
        tally.wrong += differences(home, whole, exact=mesh is None)
        shutil.rmtree(home)


def struck(home, stage: str, number: int, mesh, draw: random.Random, tally: Tally) -> int:
    """The exit status of a try that gets a signal at a drawn moment."""
    term = number == signal.SIGTERM
    moment = draw.choice([m for m in MOMENTS[stage] if not (term and m in IMPORTS)])
    process = start(home, stage, mesh([*MESHES]) if mesh else "whole")
    code = signalled(process, home, stage, moment, number, draw)
    if code == (AGAIN if term else -signal.SIGKILL):
        (tally.terms if term else tally.kills)[f"{stage}, {moment}"] += 1
    elif code:
        tally.wrong.append(f"{stage}, {moment}: ended with {code}")
        print((home / "said").read_text()[-3000:], file=sys.stderr)
    if term:
        torn = sorted(filter(is_torn, names(home)))
        tally.wrong += [f"{stage}, {moment}: SIGTERM left {name}" for name in torn]
    return code


def is_torn(path: str) -> bool:
    """Whether a file is one that something half-written or half-finished leaves."""
    parts = path.split("/")
    return parts[-1] == "tulu_jax.lease" or ".tulu_jax_partial" in path or "-tmp" in path


class Reader:
    """Reads what the stages of a finished home left, as the commands do."""

    def __init__(self, home: pathlib.Path):
        import gin

        from tulu_jax import gin_files, trainer

        self.home = home
        gin.clear_config()
        with contextlib.chdir(home):
            self.config = gin_files.load("dpo_whole.gin", [], workdir=str(home / "dpo"))
            self.run = trainer.Run(self.config)
        self.key = json.loads((home / "dpo/reference_train" / reference_lib.KEY).read_text())
        self.ids = [name for name, _, _ in self.cache() if name != "-"]
        step = checkpoint_lib.Checkpoints(str(home / "dpo")).latest_step()
        self.kinds = {
            "checkpoint": (home / f"dpo/checkpoints/{step}", self.checkpoint),
            "cache": (home / self.folder, self.cache),
            "reference": (home / "dpo/reference_train", self.reference),
        }

    def checkpoint(self) -> list:
        import jax

        saved = checkpoint_lib.Checkpoints(str(self.home / "dpo"))
        step = saved.require(None)
        about, state = saved.about(step), saved.restore(step, self.run.abstract)
        arrays = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
        return [step, json.dumps(about), *arrays]

    def cache(self) -> list:
        """(id, ids, spans) of every pair that is trained on, then one that tells the whole."""
        from tulu_jax.data import loader

        with contextlib.chdir(self.home), validation.reading():
            rows = loader.prepare(self.config.data, split="train")
        store, (self.folder,) = rows.store, rows.folders
        sides = [[a.tobytes() for side in store.sides(i) for a in side] for i in range(len(store))]
        each = [(store.name(i), *map(b"".join, [s[::2], s[1::2]])) for i, s in enumerate(sides)]
        return [*each, ("-", rows.fingerprint, str(rows.stats))]

    def reference(self) -> bytes:
        from etils import epath

        folder = epath.Path(self.home / "dpo/reference_train")
        return reference_lib.Cache(folder, self.key).gather(self.ids).tobytes()


def through_flips(home: pathlib.Path, count: int, draw: random.Random, tally: Tally) -> None:
    """Flips `count` bits in the files of a finished home, one at a time."""
    reader = Reader(home)
    whole = {kind: read() for kind, (_, read) in reader.kinds.items()}
    for number in range(count):
        kind = list(reader.kinds)[number % len(reader.kinds)]
        folder, read = reader.kinds[kind]
        files = sorted(f for f in folder.rglob("*") if f.is_file() and f.stat().st_size)
        file = draw.choice(files)
        content = file.read_bytes()
        place, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
        file.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        try:
            outcome = "harmless" if read() == whole[kind] else "silent"
        except validation.UsageError:
            outcome = "named"
        except Exception as error:
            outcome = f"unnamed ({type(error).__name__})"
        file.write_bytes(content)
        tally.flips[f"{kind}, {outcome}"] += 1
        if outcome not in ("harmless", "named"):
            tally.wrong.append(f"{outcome}: {file.relative_to(home)}, byte {place}, bit {bit}")


def through_faults(folder, whole, count: int, draw: random.Random, tally: Tally) -> None:
    """The recipe in a bucket that fails, until there were `count` faults."""
    with fault_proxy.emulator() as address, fault_proxy.Proxy(address, seed=draw.random()) as proxy:
        while tally.faults.total() < count:
            bucket = proxy.make_bucket(f"soak-{tally.faults.total()}")
            home = make_home(folder / bucket.removeprefix("gs://"), bucket)
            for stage in STAGES:
                proxy.faults = [fault_proxy.Fault(*fault, math.inf, SHARE) for fault in FAULTS]
                tries = 1
                while code := ended(start(home, stage, "whole", bucket, proxy.environment()), home):
                    tries += 1
                    if tries > TRIES:
                        tally.wrong.append(f"{stage} in a bucket ended with {code}")
                        break
            proxy.faults = []
            os.environ.update(proxy.environment())
            tally.faults += proxy.done
            proxy.done.clear()
            for stage in STAGES[:2]:
                if lines(f"{bucket}/{stage}") != lines(str(whole / stage)):
                    tally.wrong.append(f"{stage} in a bucket differs")
            torn = filter(is_torn, atomic.file_system(bucket).find(bucket))
            tally.wrong += [f"left in the bucket: {name}" for name in torn]


def soak(*, kills: int, terms: int, flips: int, faults: int, seed: int, stages=STAGES) -> Tally:
    """All of it in a temporary folder. Where there are enough, a third of the kills goes to a run
    on another mesh at every try."""
    draw, tally = random.Random(seed), Tally()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "compiled"))
        whole = make_home(root / "whole")
        for stage in stages:
            assert ended(start(whole, stage, "whole"), whole) == 0, f"the undisturbed {stage}"
        moved = kills // 3 if kills > 20 else 0
        signals = [signal.SIGKILL] * (kills - moved) + [signal.SIGTERM] * terms
        draw.shuffle(signals)
        through_signals(root, whole, signals, None, draw, tally, stages)
        through_signals(root, whole, [signal.SIGKILL] * moved, draw.choice, draw, tally, stages)
        if flips:
            shutil.copytree(whole, root / "flipped")
            through_flips(root / "flipped", flips, draw, tally)
        if faults:
            through_faults(root, whole, faults, draw, tally)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, count in (("kills", 60), ("terms", 20), ("flips", 120), ("faults", 200), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=count)
    arguments = parser.parse_args()
    began = time.monotonic()
    tally = soak(**vars(arguments))
    print("| what | how often |\n|---|---|")
    for name in KINDS:
        for what, count in sorted(getattr(tally, name).items()):
            print(f"| {name}: {what} | {count} |")
    print("\n".join(tally.wrong), file=sys.stderr)
    counts = {n: getattr(tally, n).total() for n in KINDS}
    done, silent = sum(counts.values()), sum("silent" in what for what in tally.wrong)
    found = dict(
        name="soak",
        ratio=round(1 - min(len(tally.wrong), done) / max(done, 1), 4),
        target=1.0,
        ok=not tally.wrong and counts["kills"] >= arguments.kills,
        **counts,
        silent=silent,
        wrong=len(tally.wrong),
        seconds=round(time.monotonic() - began),
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
