"""The benchmarks by name, and their switches as the command line has them."""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from tulu_jax import strict_json, validation
from tulu_jax.evals.benchmark import Benchmark

# Name: module and class, imported when asked for. The paper's nine, in the order of its columns.
PAPER = {
    "mmlu": ("mmlu", "MMLU"),
    "gsm8k": ("gsm8k", "GSM8K"),
    "bbh": ("bbh", "BBH"),
    "tydiqa": ("tydiqa", "TyDiQA"),
    "codex_eval": ("codex_eval", "CodexEval"),
    "alpaca_eval": ("alpaca_eval", "AlpacaEval"),
    "toxigen": ("toxigen", "ToxiGen"),
    "truthfulqa": ("truthfulqa", "TruthfulQA"),
    "mt_bench": ("mt_bench", "MTBench"),
}
KNOWN = {
    **PAPER,
    "tulu_tiny": ("held_out_prompts", "TuluTiny"),
    "tulu_tiny_german": ("held_out_prompts", "TuluTinyGerman"),
    "tulu_tiny_programs": ("held_out_prompts", "TuluTinyPrograms"),
}
ALL = "all"  # the paper's nine
ALTERED = "allow_altered"  # the field of benchmarks that read data
SUBSETS = ("paper", "full")
CAPPED = ("alpaca_eval",)  # whose max_new_tokens is the most that an answer may have, if it fits


def names(asked: Sequence[str]) -> list[str]:
    """The benchmarks that a list names, each once. Raises `UsageError` for unknown ones."""
    unknown = [name for name in asked if name not in (ALL, *KNOWN)]
    if unknown or not asked:
        near = "".join(validation.nearest(name, KNOWN) for name in unknown[:1])
        raise validation.UsageError(
            f"--benchmarks has {', '.join(map(repr, unknown)) or 'nothing'}; expected some of "
            f"{', '.join(KNOWN)}, or {ALL} for the paper's nine{near}"
        )
    found = [name for one in asked for name in (PAPER if one == ALL else (one,))]
    return list(dict.fromkeys(found))


def class_of(name: str) -> type[Benchmark]:
    """The class of a benchmark."""
    module, class_name = KNOWN[name]
    return vars(importlib.import_module(f"tulu_jax.evals.{module}"))[class_name]


def make(
    asked: Sequence[str], *, subset: str, settings: Sequence[str], allow_altered: bool
) -> list[Benchmark]:
    """The benchmarks `asked`, with switches set by `settings` such as `gsm8k.shots=4`; those that
    read data are told whether these may be other than upstream. Raises `UsageError` with all that
    is wrong in them."""
    found = {name: class_of(name) for name in names(asked)}
    fields: dict[str, dict[str, Any]] = {name: {"subset": subset} for name in found}
    for name, class_ in found.items():
        if ALTERED in {field.name for field in dataclasses.fields(class_)}:
            fields[name][ALTERED] = allow_altered
    problems = []
    for setting in settings:
        place, equals, text = setting.partition("=")
        name, dot, field = place.partition(".")
        if not (equals and dot):
            problems.append(f"--set={setting}: expected BENCHMARK.SWITCH=VALUE")
        elif name not in found:
            problems.append(f"--set={setting}: {name} is not asked for; expected {list(found)}")
        else:
            try:
                fields[name][field] = _value(setting, found[name], field, text)
            except validation.UsageError as error:
                problems.append(str(error))
    if problems:
        raise validation.UsageError("; ".join(problems))
    return [found[name](**fields[name]) for name in found]


def switches(benchmark: Benchmark) -> dict[str, Any]:
    """The fields of a benchmark, as they are set."""
    return dataclasses.asdict(benchmark)


def _value(setting: str, class_: type, name: str, text: str) -> Any:
    known = {field.name: field.default for field in dataclasses.fields(class_)}
    for name_of_a_flag in ("subset", ALTERED):
        known.pop(name_of_a_flag, None)
    if name not in known:
        listed = _listed(known) or "no switches"
        raise validation.UsageError(
            f"--set={setting}: {name!r} is no switch; there are {listed}"
            f"{validation.nearest(name, known)}"
        )
    default = known[name]
    try:
        value = strict_json.loads(text)
    except ValueError:
        value = text
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if default is not None and type(value) is not type(default):
        raise validation.UsageError(
            f"--set={setting}: found {value!r}, a {type(value).__name__}; expected a "
            f"{type(default).__name__}, such as {name}={strict_json.dumps(default)}"
        )
    return value


def _listed(known: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={strict_json.dumps(value)}" for name, value in known.items())
