"""What of the data of a run cannot be served: found before encoding, from the first rows."""

from collections.abc import Iterator

from tulu_jax.data import chat as chat_lib
from tulu_jax.data import examples, loader, registry


def vocab_size(config: loader.DataConfig) -> int | None:
    """The number of ids of the tokenizer; None if it does not load, which `problems` explains."""
    try:
        return chat_lib.load_tokenizer(config.tokenizer).vocab_size
    except (OSError, ValueError):
        return None


def problems(config: loader.DataConfig, *, kind: str) -> Iterator[str]:
    """What would keep `prepare` from serving `kind` ("sft" or "preference"): one line for each.

    Loads the tokenizer, and reads and converts the first raw row of each task and split.
    """
    unfit = loader.kind_problems(config, read=True)
    if unfit:
        yield from unfit
        return
    found = {split: loader.split_components(config, split) for split in registry.SPLITS}
    if config.kind != kind:
        names = ", ".join(c.task.name for c in found["train"])
        yield (
            f"the objective trains on {kind} data; {registry.name_of(config.train)!r} is "
            f"{config.kind} data ({names})"
        )
    try:
        chat_lib.load_tokenizer(config.tokenizer)
    except (OSError, ValueError) as error:
        yield f"tokenizer: {error}"
    tasks_with: dict[str, list[str]] = {}
    for split, components in found.items():
        for component in components:
            task = component.task
            try:
                examples.check_first_row(task, split=split, data_root=config.data_root)
            except (OSError, ValueError) as error:
                tasks_with.setdefault(str(error), []).append(f"{task.name} ({split})")
    for error, tasks in tasks_with.items():
        yield f"{', '.join(tasks)}: {error}"
    if not tasks_with:
        yield from _validation_problems(config, found["validation"])
        yield from _trained_and_validated(config, found)


def _validation_problems(config: loader.DataConfig, components: list) -> Iterator[str]:
    """Why the validation split would turn out empty, if so."""
    if not components and config.validation is not None:
        yield (
            f"validation = {registry.name_of(config.validation)!r} has no validation split: its "
            "tasks have none of their own, and holdout_every is None; set holdout_every, or name a "
            "file of rows as validation"
        )
    every, counts = config.holdout_every, {}
    for task in (component.task for component in components):
        if "validation" in task.sources:
            return
        counts[task.name] = examples.num_rows_up_to(task, every, data_root=config.data_root)
        if counts[task.name] == every:
            return
    if counts:
        yield (
            f"holdout_every = {every} holds nothing out of {counts} rows; expected a smaller one, "
            "or None"
        )


def _trained_and_validated(config: loader.DataConfig, found: dict) -> Iterator[str]:
    """Files of which all rows are in both splits."""
    files = {
        split: {
            key: component.task.name
            for component in components
            if split in component.task.sources
            for key in examples.files_of(component.task, split, config.data_root)
        }
        for split, components in found.items()
    }
    for key in files["train"].keys() & files["validation"].keys():
        yield (
            f"{key[0]} is trained on ({files['train'][key]}) and is the validation split, too "
            f"({files['validation'][key]}); name another file, or leave validation = None and set "
            "holdout_every"
        )
