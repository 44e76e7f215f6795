"""Gin files -> one frozen `TrainConfig`, and back to text. The only file that imports gin.

Everything a user can misspell in them is refused here, and all at once: files, macros, fields,
types, and values that nothing reads.
"""

import ast
import dataclasses
import inspect
import pathlib
import re
import sys
from collections.abc import Sequence

import gin

from tulu_jax import validation
from tulu_jax.recipe import TrainConfig
from tulu_jax.validation import UsageError

_PACKAGE = pathlib.Path(__file__).resolve().parent
_MACRO = "gin.macro"
_GONE = {  # of files and saved configs of before
    "pods/": "slices are a table now (tulu_jax/parallel/slices.py): write SLICE = 'v5p_512' in the "
    "complete file instead",
    "recipe.under": "paths lie below recipe.TrainConfig.bucket and loader.DataConfig.bucket now: "
    "set both to %BUCKET, base, tokenizer, data_root and cache_dir to the paths, and remove the "
    "lines of recipe.under",
}
_NO_SLICE = (
    ", for --pod to set; a config that was saved with a mesh takes another slice without its "
    "mesh.MeshConfig lines, and with SLICE = 'any' and recipe.TrainConfig.slice = %SLICE"
)


def config_folders() -> list[pathlib.Path]:
    """Where gin files are looked for: here, ./configs, and the configs this package came with."""
    folders = [pathlib.Path.cwd(), pathlib.Path.cwd() / "configs"]
    folders += [_PACKAGE / "configs", _PACKAGE.parent / "configs"]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def find(name: str | None) -> pathlib.Path:
    """The complete gin file `name`. Raises `UsageError` with the nearest known name."""
    known = {
        path.name: path for folder in config_folders()[1:] for path in sorted(folder.glob("*.gin"))
    }
    if not name:
        raise UsageError(f"--gin_file is missing; complete files are {sorted(known)}")
    for folder in config_folders():
        if (folder / validation.expanded(name)).is_file():
            return folder / validation.expanded(name)
    raise UsageError(
        f"--gin_file={name} was not found in {[str(f) for f in config_folders()]}"
        f"{validation.nearest(name, known)}; complete files are {sorted(known)}"
    )


def load(name: str | None, overrides: Sequence[str] = (), *, workdir: str | None) -> TrainConfig:
    """The config of gin file `name` with `--gin.NAME=value` overrides, and `workdir` as the output
    folder instead of the file's or the default one.

    Raises `UsageError` that lists every problem of files, fields, types and rules.
    """
    path = find(name)
    with gin.unlock_config():
        lines, problems = _flatten(path)
        problems += _parse(lines)
        problems += _override(overrides)
        gin.parse_config(
            "from __gin__ import dynamic_registration\n"
            "from tulu_jax import recipe\n"
            "ROOT = @recipe.TrainConfig()\n"
        )
        bound = gin.config._CONFIG.get(("", "tulu_jax.recipe.TrainConfig"), {})
        if workdir or "workdir" not in bound:  # a saved config.gin names its own
            gin.bind_parameter("tulu_jax.recipe.TrainConfig.workdir", _workdir(workdir, path))
    with validation.collect() as invalid:
        config = _build(problems)
    problems += invalid
    if config is not None:
        problems += _unread()
    try:
        validation.raise_if(problems)
    except UsageError as error:
        raise UsageError(f"{path.name}: {error}") from None
    return config


def _workdir(given: str | None, path: pathlib.Path) -> str:
    """What --workdir says, from the working directory; or runs/<file name>, in the bucket if the
    file has one."""
    bucket = gin.config._CONFIG.get(("BUCKET", _MACRO), {}).get("value")
    if not given and isinstance(bucket, str):
        return f"runs/{path.stem}"
    found = validation.below(None, given or f"runs/{path.stem}")
    return found if found.startswith("/") or "://" in found else f"./{found}"


def operative_config() -> str:
    """The gin text of everything that was read; it rebuilds the run by itself."""
    return gin.operative_config_str()


@dataclasses.dataclass
class _Line:
    text: str
    origin: str  # "sft.gin, line 3"


def _flatten(path: pathlib.Path) -> tuple[list[_Line], list[str]]:
    """The lines of a file with its includes in their places, and the includes that do not exist.

    gin's own search would take a folder named `models` in the working directory for a package, and
    stop at the first problem of an included file.
    """
    lines, problems = [], []
    for number, text in enumerate(path.read_text().split("\n"), 1):
        origin = f"{path.name}, line {number}"
        found = re.fullmatch(r"include\s+(['\"])(.+)\1\s*(#.*)?", text)
        if not found:
            lines.append(_Line(text, origin))
            continue
        wanted = found.group(2)
        places = [folder / wanted for folder in [path.parent, *config_folders()]]
        included = next((place for place in places if place.is_file()), None)
        if included is None:
            known = {str(f.relative_to(d)) for d in config_folders()[1:] for f in d.rglob("*.gin")}
            hint = _gone(wanted) or validation.nearest(wanted, known)
            problems.append(f"{origin}: include {wanted!r} was not found{hint}")
            continue
        inner, missing = _flatten(included)
        for line in inner:
            if line.text.startswith("from __gin__"):
                line.text = ""
        lines += inner
        problems += missing
    return lines, problems


def _gone(text: str) -> str:
    """What to write instead of what files of before said; nothing for other text."""
    return next((f"; {instead}" for was, instead in _GONE.items() if was in text), "")


def _parse(lines: list[_Line]) -> list[str]:
    """Parses `lines`; a statement that gin refuses is noted, blanked, and the rest is parsed."""
    problems = []
    for _ in range(len(lines)):
        gin.clear_config()
        try:
            gin.parse_config("\n".join(line.text for line in lines))
            break
        except Exception as error:  # gin raises every kind, a SyntaxError or ImportError among them
            message = str(error)
            found = re.search(r"In bindings string line (\d+)", message)
            number = int(found.group(1)) if found else getattr(error, "lineno", None)
            if number is None or not lines[number - 1].text:
                problems.append(message)
                break
            said = message[: found.start()] if found else error.args[0]
            text = lines[number - 1].text
            problems.append(f"{lines[number - 1].origin}: {_tidy(said)}{_gone(text)}")
            lines[number - 1].text = ""
            while number < len(lines) and lines[number].text[:1].isspace():
                lines[number].text = ""
                number += 1
    return problems


def _tidy(message: str) -> str:
    """A gin error on one line, with the nearest field where one was misspelt."""
    text = " ".join(message.split())
    found = re.search(r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", text)
    return text + validation.nearest(found.group(2), _parameters(found.group(1))) if found else text


def _parameters(selector: str) -> list[str]:
    """Parameter names of what gin calls e.g. 'recipe.TrainConfig'."""
    module, _, name = selector.rpartition(".")
    for loaded in list(sys.modules):
        if loaded.startswith("tulu_jax.") and loaded.endswith(module):
            target = getattr(sys.modules[loaded], name, None)
            if callable(target):
                return list(inspect.signature(target).parameters)
    return []


def _macros() -> list[str]:
    return [scope for scope, selector in gin.config._CONFIG if selector == _MACRO]


def _override(overrides: Sequence[str]) -> list[str]:
    """Applies `--gin.NAME=value`; NAME is a macro of the files."""
    problems, known, replaced, given = [], _macros(), [], set()
    for override in overrides:
        name, separator, value = override.removeprefix("--gin.").partition("=")
        try:
            ast.literal_eval(value) if not value.startswith(("@", "%")) else None
        except (ValueError, SyntaxError):
            problems.append(
                f"--gin.{name}={value}: not a Python literal; a string needs inner quotes: "
                f"'--gin.{name}=\"{value}\"'"
            )
            continue
        if not separator or name not in known:
            hint = _NO_SLICE if name == "SLICE" else validation.nearest(name, known)
            problems.append(
                f"--gin.{name}: no such macro{hint}; this configuration has {sorted(known)}"
            )
            continue
        replaced.append(gin.config._CONFIG[(name, _MACRO)]["value"])
        replaced += [] if value.startswith(("@", "%")) else _of_macro(name)
        given.add((name, _MACRO))
        gin.parse_config(f"{name} = {value}")
    _forget(replaced, given)
    return problems


def _of_macro(name: str) -> list:
    """The values that a saved config has under the scope of a macro, which are taken out."""
    config = gin.config._CONFIG
    scoped = [key for key in config if key[1] != _MACRO and key[0].split("/")[0] == name]
    return [value for key in scoped for value in config.pop(key).values()]


def _forget(replaced: list, given: set[tuple[str, str]]) -> None:
    """Drops what only the values that overrides have `replaced` refer to, but for what is `given`:
    a mixture of the file, say, where the command line names another."""
    config = gin.config._CONFIG
    for key in _references(replaced) - given:
        others = [list(bindings.values()) for other, bindings in config.items() if other != key]
        if key in config and key not in _references(others):
            _forget(list(config.pop(key).values()), given)


def _references(value) -> set[tuple[str, str]]:
    """(scope, name) of the configurables, macros among them, that a bound value refers to."""
    if isinstance(value, gin.config.ConfigurableReference):
        return {value.config_key}
    inner = list(value.values()) if isinstance(value, dict) else value
    if isinstance(inner, list | tuple):
        return set().union(*map(_references, inner))
    return set()


def _build(problems: list[str]) -> TrainConfig | None:
    """The config, or None after adding to `problems` why it cannot be built."""
    try:
        return gin.query_parameter("%ROOT").scoped_configurable_fn()
    except Exception as error:  # a missing field is a TypeError, an unknown macro a ValueError
        if not problems:  # else it is the echo of a statement that was refused
            problems.append(" ".join(re.sub(r"\(<[^>]*>\)", "", str(error)).split()))
        return None


def _unread() -> list[str]:
    """What was set and never read: gin accepts it, a user meant something by it."""
    operative, problems = gin.config._OPERATIVE_CONFIG, []
    for (scope, selector), bindings in gin.config._CONFIG.items():
        if scope == "ROOT":
            continue
        if selector == _MACRO and (scope, selector) not in operative:
            problems.append(f"macro {scope} = {bindings['value']!r} is set but nothing reads it")
        elif selector != _MACRO:
            read = set()  # a binding without a scope also serves every scope
            for (read_scope, read_selector), names in operative.items():
                if read_selector == selector and scope in ("", read_scope):
                    read |= set(names)
            problems += [
                f"{selector}.{name} = {value!r} is set but nothing reads it"
                for name, value in bindings.items()
                if name not in read
            ]
    return problems
