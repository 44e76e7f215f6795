"""What the folders of checkpoints say by their names and small files."""

import re

from absl import logging
from etils import epath

from tulu_jax import strict_json, validation

FOLDER = "checkpoints"  # of a workdir
PARTS = ("_CHECKPOINT_METADATA", "about", "state")  # one of these makes a folder a checkpoint
_STEP = "0|[1-9][0-9]*"  # the name of a step's folder


def is_checkpoint(folder: epath.Path) -> bool:
    """Whether a folder that is called like a step is a checkpoint, and none of others."""
    return any((folder / part).exists() for part in PARTS)


def newest(workdir: str) -> str:
    """'step 40 in <folder>' of the newest checkpoint that is complete, or that there is none."""
    root = epath.Path(workdir)
    folder = (root if "://" in workdir else root.absolute()) / FOLDER
    found = [path for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []
    steps = [int(path.name) for path in found if is_checkpoint(path)]
    return f"step {max(steps)} in {folder}" if steps else f"none in {folder}"


def only_ours(ocp):
    """Orbax's names of steps, without the folders of others that are called like one: it would
    resume from these, count them, and delete them."""

    class Format(ocp.path.step.NameFormat):
        def __init__(self):
            self.all = ocp.path.step.standard_name_format()

        def build_name(self, step):
            return self.all.build_name(step)

        def find_step(self, base_path, step):
            return self.all.find_step(base_path, step)

        def find_all(self, base_path):
            """By a listing alone. Orbax's would ask the bucket what kind it is first, through a
            client of its own, which takes minutes to give up."""
            if not (base_path := epath.Path(base_path)).is_dir():
                return
            names = [path.name for path in base_path.iterdir()]
            for step in sorted(int(name) for name in names if re.fullmatch(_STEP, name)):
                try:
                    found = self.all.find_step(base_path, step)
                except ValueError:  # in a bucket, one that is being written
                    continue
                if is_checkpoint(found.path):
                    yield found
                else:
                    logging.warning("%s is left as it is: it holds no checkpoint", found.path)

    return Format()


def check_metrics(folder: epath.Path) -> None:
    """Raises `UsageError` for metrics that cannot be read: Orbax reads them at once."""
    problems = []
    for file in folder.glob("*/metrics/metrics"):
        if not file.parent.parent.name.isdigit():
            continue
        try:
            strict_json.loads(file.read_text())
        except ValueError as error:
            step = file.parent.parent
            problems.append(f"{file} is damaged ({error}); move {step} out of that folder")
    validation.raise_if(problems)
