"""What a checkpoint says of the run that made it, compared with a run that would use it."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from tulu_jax.models.config import LlamaConfig


def model_problems(
    about: dict[str, Any], folder: epath.Path, model: LlamaConfig, abstract_params: dict
) -> list[str]:
    """Why the parameters of a checkpoint that says `about` of itself are not of `model`, one line
    each."""
    recorded = about["must_match"].get("model", {})
    expected = {field.name for field in dataclasses.fields(LlamaConfig)}
    if recorded.keys() != expected:
        return [
            f"the checkpoint in {folder} records a model of {sorted(recorded) or 'no fields'}; "
            f"expected {sorted(expected)}: another version wrote it. Export it to Hugging Face "
            "with that version, and take the export"
        ]
    frozen = about.get("frozen", {})
    if frozen.keys() & param_shapes(abstract_params).keys():
        return [
            f"the checkpoint in {folder} holds what trained beside {len(frozen)} frozen parameters "
            "of its base, and not these; expected all of them. Export that run to Hugging Face "
            "(python -m tulu_jax.convert), and take the export"
        ]
    trained = LlamaConfig(**recorded)
    return [
        f"the checkpoint in {folder} was trained with {name} = "
        f"{getattr(trained, name)}; this run's model has {getattr(model, name)}. Restore it in the "
        "gin file, or take another checkpoint"
        for name in trained.computed_otherwise(model)
    ] + param_problems(about["params"], abstract_params)


def adapter_problems(
    about: dict[str, Any], folder: epath.Path, adapter: Any, quant: Any
) -> list[str]:
    """Why the adapters of a checkpoint that says `about` of itself are not of these settings,
    dataclasses or None, one line each: with another scale or base they are another model."""
    settings = {"adapter": adapter, "quant": quant}
    settings = {name: value and dataclasses.asdict(value) for name, value in settings.items()}
    recorded = {name: about["must_match"].get(name) for name in settings}
    return [
        f"the checkpoint in {folder} was made with {name} = {before}; this config has {now}. Give "
        "the gin file of that run, or its config.gin"
        for name, before, now in differences(recorded, settings)
    ]


def param_shapes(params: dict) -> dict[str, list[int]]:
    """{parameter path: shape}, JSON-serialisable, as saved beside each checkpoint."""
    leaves = jax.tree.leaves_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape)
        for path, leaf in leaves
    }


def param_problems(
    found: dict[str, list[int]], abstract_params: dict, noun: str = "parameter"
) -> list[str]:
    """How the shapes of a checkpoint differ from those the model expects, one line each."""
    expected = param_shapes(abstract_params)
    problems = [
        f"checkpoint {noun} {name} has shape {found[name]}; the model expects {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems += [f"checkpoint lacks {noun} {name}" for name in expected if name not in found]
    problems += [
        f"checkpoint has {noun} {name}, unknown to the model"
        for name in found
        if name not in expected
    ]
    return problems


def differences(before: dict, now: dict, inside: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, value before, value now) of what differs, nested ones as "outer.inner"; what a
    checkpoint does not record at all is free."""
    for name in (name for name in now if inside or name in before):
        was, value = before.get(name), now[name]
        if isinstance(was, dict) and isinstance(value, dict):
            yield from differences(was, value, f"{inside}{name}.")
        elif was != value:
            yield f"{inside}{name}", was, value
