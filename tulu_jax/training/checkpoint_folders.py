"""What the folders of checkpoints say by their names and small files, without Orbax."""

from etils import epath

from tulu_jax import strict_json, validation

FOLDER = "checkpoints"  # of a workdir
PARTS = ("_CHECKPOINT_METADATA", "about", "state")  # one of these makes a folder a checkpoint


def is_checkpoint(folder: epath.Path) -> bool:
    """Whether a folder that is called like a step is a checkpoint, and none of others."""
    return any((folder / part).exists() for part in PARTS)


def newest(workdir: str) -> str:
    """'step 40 in <folder>' of the newest checkpoint that is complete, or that there is none."""
    folder = epath.Path(workdir).absolute() / FOLDER
    found = [path for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []
    steps = [int(path.name) for path in found if is_checkpoint(path)]
    return f"step {max(steps)} in {folder}" if steps else f"none in {folder}"


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
