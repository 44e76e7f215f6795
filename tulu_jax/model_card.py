"""README.md of an export: base, data with its licences, recipe, and scores where there are any."""

import dataclasses
import json
from collections.abc import Iterator

from etils import epath

from tulu_jax import strict_json
from tulu_jax.data import components, registry
from tulu_jax.models.config import SCORE
from tulu_jax.recipe import TrainConfig
from tulu_jax.training import metrics

PAPER = "https://arxiv.org/abs/2311.10702"


def text(config: TrainConfig, about: dict, *, step: int, dtype: str) -> str:
    """The card of the checkpoint of `step` that says `about` of itself, as Markdown. Rows, base and
    evaluations are not read again: the card says what the config and the workdir say."""
    lines = [
        *_front_matter(config),
        f"# {epath.Path(config.workdir).name}, step {step}",
        "",
        f"A Llama of {config.model.num_params:,} parameters in {dtype}, trained with tulu_jax, "
        f"which has the recipe of TÜLU 2 ({PAPER}).",
        "",
        "## Base",
        "",
        f"`{config.base}`" if config.base else f"None: random parameters, seed {config.seed}.",
        f"Fingerprint of the weights that it began with: `{about['weights']}`.",
        "",
        "## Data",
        "",
        *_data(config),
        "",
        "## Recipe",
        "",
        *_recipe(config, about),
        "",
        "## Scores",
        "",
        *_scores(config, step),
    ]
    return "\n".join(lines) + "\n"


def _front_matter(config: TrainConfig) -> Iterator[str]:
    yield "---"
    yield "library_name: transformers"
    scored = config.objective.head == SCORE
    yield f"pipeline_tag: text-{'classification' if scored else 'generation'}"
    yield f"tags: [tulu, {config.objective.kind}]"
    if config.base and "://" not in config.base and not config.base.startswith("/"):
        yield f"base_model: {json.dumps(config.base)}"
    yield "---"


def _data(config: TrainConfig) -> Iterator[str]:
    """The tasks of the train split, which need not be there."""
    try:
        found = components.of(config.data.train, data_root=config.data.data_root, read=False)
    except ValueError as error:  # a module with tasks that is not here
        yield f"`{registry.name_of(config.data.train)}` ({error})"
        return
    yield "| task | rows | licence | origin |"
    yield "|---|---|---|---|"
    for component in found:
        amount = "all" if component.amount is None else f"{component.amount:g}"
        cells = (component.task.name, amount, component.task.licence, component.task.origin)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""
    yield (
        "The terms of the base and of every row apply to these weights. Rows that another model "
        "wrote may be bound by the terms of its maker."
    )


def _recipe(config: TrainConfig, about: dict) -> Iterator[str]:
    length = "num_steps" if config.num_steps is not None else "num_epochs"
    fields = {
        "objective": type(config.objective).__name__,
        **config.objective.identity(),
        **dataclasses.asdict(config.optimizer),
        "batch_size": f"{config.batch_size} rows of {config.data.max_length} positions",
        length: about["must_match"].get("num_steps", getattr(config, length)),
        "parameters": config.param_dtype,
        "compute": config.execution.compute_dtype,
        "chat template": config.data.chat,
        "seed": config.seed,
    }
    yield "| field | value |"
    yield "|---|---|"
    yield from (f"| {name} | {value} |" for name, value in fields.items())


def _scores(config: TrainConfig, step: int) -> Iterator[str]:
    """The evaluation of the step in the curves, and the scores of its benchmarks."""
    found = {}
    file = epath.Path(config.workdir) / metrics.FILE
    if file.exists():
        for line in file.read_text().splitlines():
            fields = _object(line)
            if fields.get("step") == step:
                found |= {n: v for n, v in fields.items() if n.startswith("eval/")}
    for path in sorted(epath.Path(config.workdir).glob(f"*_step_{step}.json")):
        scores = _object(path.read_text()).get("scores")
        name = path.name.removesuffix(f"_step_{step}.json")
        found |= {f"{name} {n}": v for n, v in scores.items()} if isinstance(scores, dict) else {}
    if not found:
        yield "None were measured."
        return
    yield "| measure | value |"
    yield "|---|---|"
    for name, value in sorted(found.items()):
        yield f"| {name} | {f'{value:.4g}' if isinstance(value, float) else value} |"


def _object(line: str) -> dict:
    try:
        fields = strict_json.loads(line)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}
