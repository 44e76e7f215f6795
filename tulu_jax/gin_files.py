"""Gin files -> one frozen `TrainConfig`, and back to text. The only file that imports gin.

Everything a user can misspell in them is refused here, and all at once: macros, fields, types, and
values that nothing reads. And, before gin runs any of it, what reaches code that nobody trusts.
"""

import ast
import inspect
import pathlib
import re
import sys
import types
from collections.abc import Iterator, Sequence

import gin
from gin import config_parser

from tulu_jax import gin_text, validation
from tulu_jax.recipe import TrainConfig
from tulu_jax.validation import UsageError

_MACRO = "gin.macro"
_OURS = __name__.partition(".")[0]
_NAMED = tuple(  # what configs are made of; the rest of us starts processes, runs and removes files
    f"{_OURS}.{part}"
    for part in (
        "recipe",
        "data",
        "models",
        "objectives",
        "training",
        "interop.hf",
        "parallel",
        "quant",
    )
)
_MOST_PROBLEMS = 20  # each is one more pass over the file
_NO_SLICE = (
    ", for --pod to set; a config that was saved with a mesh takes another slice without its "
    "mesh.MeshConfig lines, and with SLICE = 'any' and recipe.TrainConfig.slice = %SLICE"
)


def load(
    name: str | None,
    overrides: Sequence[str] = (),
    *,
    workdir: str | None,
    allow_import: Sequence[str] = (),
) -> TrainConfig:
    """The config of gin file `name` with `--gin.NAME=value` overrides, and `workdir` as the output
    folder instead of the file's or the default one.

    The file may import and name what lies in this package and in the modules `allow_import`; other
    code is refused before gin runs any. Raises `UsageError` that lists every problem of files,
    fields, types and rules.
    """
    path = gin_text.find(name)
    try:
        return _load(path, overrides, workdir=workdir, trusted=_trusted(allow_import))
    except UsageError as error:
        raise UsageError(f"{path.name}: {error}") from None


def _trusted(allow_import: Sequence[str]) -> tuple[str, ...]:
    for name in allow_import:
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):
            raise UsageError(
                f"--allow_import={name}: expected the name of a module, such as my_tasks or "
                "my_package.tasks"
            )
    return (_OURS, *allow_import)


def _load(
    path: pathlib.Path, overrides: Sequence[str], *, workdir: str | None, trusted: tuple[str, ...]
) -> TrainConfig:
    with gin.unlock_config():
        lines, problems = gin_text.flatten(path)
        problems += _parse(lines, trusted)
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
    validation.raise_if(problems)
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


class _References(config_parser.ParserDelegate):
    """The names of the references (`@name`) that a parser has come by."""

    def __init__(self):
        self.names: list[str] = []

    def configurable_reference(self, scoped_configurable_name, evaluate):
        del evaluate
        self.names.append(scoped_configurable_name.rpartition("/")[2])

    def macro(self, macro_name):
        del macro_name


def _untrusted(text: str, trusted: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, why it is refused) of what leads gin to code that is not `trusted`: an import, an
    include that `gin_text.flatten` did not take, or a name such as `cli.os.system`.

    gin's own parser tells statements, and gin carries out none. It stops where gin will stop, at
    the first statement that is none; of that, gin tells.
    """
    seen, modules = _References(), {}
    try:
        for statement in config_parser.ConfigParser(text, seen):
            line, names = statement.location.line_num, seen.names
            seen.names = []
            if isinstance(statement, config_parser.IncludeStatement):
                yield line, "expected include 'FILE' at the beginning of a line of its own"
            elif not isinstance(statement, config_parser.ImportStatement):
                names.append(statement.selector)
            elif not statement.module.startswith("__gin__."):
                if not _within(statement.module, trusted):
                    yield line, _not_allowed(statement.module)
                    continue
                try:
                    fromlist = [""] if statement.is_from or statement.alias else None
                    module = __import__(statement.module, fromlist=fromlist)
                except Exception:  # gin meets it too
                    continue
                modules[statement.bound_name()] = module
            for name in names:
                if (home := _reached(name, modules, trusted)) is not None:
                    yield line, f"{name} leads out: {_not_allowed(home)}"
    except Exception:  # a SyntaxError, or one of the tokenizer, which gin raises again
        return


def _not_allowed(module: str) -> str:
    return (
        f"{module} is no part of a config; expected parts of {_OURS} or what you allow; if you "
        f"trust that code, give --allow_import={module.partition('.')[0]}"
    )


def _within(module: str, trusted: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(f"{name}.") for name in trusted)


def _reached(
    name: str, modules: dict[str, types.ModuleType], trusted: tuple[str, ...]
) -> str | None:
    """The module that a dotted name leads into, if that is neither `_NAMED` nor, but for our
    package, `trusted`; else None. Of `import a.b` the name begins with the package a."""
    first, *attributes = name.split(".")
    found = modules.get(first)
    for attribute in attributes:
        found = getattr(found, attribute, None)
        if isinstance(found, types.ModuleType):
            its_name = found.__name__
            if not (_within(its_name, trusted) or any(_within(t, (its_name,)) for t in trusted)):
                return its_name
    if found is None or isinstance(found, types.ModuleType):
        return None
    home = getattr(found, "__module__", None) or type(found).__module__
    return None if _within(home, (*_NAMED, *trusted[1:])) else home


def _parse(lines: list[gin_text.Line], trusted: tuple[str, ...]) -> list[str]:
    """Parses `lines`; a statement that gin refuses is noted, blanked, and the rest is parsed.

    Raises `UsageError` before gin parses anything that is `_untrusted`.
    """
    problems = []
    while len(problems) < _MOST_PROBLEMS:
        gin.clear_config()
        text = "\n".join(line.text for line in lines)
        refused = dict(_untrusted(text, trusted))
        if refused:
            found = [f"{lines[at - 1].origin}: {why}" for at, why in refused.items()]
            validation.raise_if([*problems, *found])
        try:
            gin.parse_config(text)
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
            problems.append(f"{lines[number - 1].origin}: {_tidy(said)}{gin_text.gone(text)}")
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
