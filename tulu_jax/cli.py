"""Flags and gin files -> one frozen `TrainConfig`. The only file that imports gin.

Everything a user can misspell is refused here, before any device work, and all at once: files,
macros, fields, types, values that nothing reads, and what `preflight` finds in the whole.
"""

import ast
import dataclasses
import inspect
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence

import gin
from absl import app, flags, logging

from tulu_jax import validation
from tulu_jax.parallel import distributed
from tulu_jax.recipe import TrainConfig, under
from tulu_jax.validation import UsageError

_GIN_FILE = flags.DEFINE_string(
    "gin_file", None, "Complete gin file: a path, or a name in configs/. Override macros with "
    "--gin.NAME=value; strings need inner quotes: '--gin.MIXTURE=\"tulu_tiny\"'.",
)  # fmt: skip
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Output folder. Default: runs/<gin file name>, below BUCKET if the file has one.",
)
_POD = flags.DEFINE_string(
    "pod", None, "Another TPU slice: a file of configs/pods/ instead of the one that the gin file "
    "includes, or the slice alone (--pod=v6e_256) for the same model and stage.",
)  # fmt: skip

_COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, where the environment does not tell it."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.", lower_bound=0)
_START_TIMEOUT = flags.DEFINE_float(
    "start_timeout", 300, "Seconds to wait for all processes.", lower_bound=1
)
_PEER_TIMEOUT = flags.DEFINE_float(
    "peer_timeout", 60, "Seconds of silence after which a process counts as dead.", lower_bound=5
)

_PACKAGE = pathlib.Path(__file__).resolve().parent
_MACRO = "gin.macro"
_PODS = "pods"


def run(main: Callable[[TrainConfig], None]) -> None:
    """Runs `main(config)` with absl's flags.

    What a user can mend (`validation.refusing`) ends the process, and with several all of them,
    with its message and exit status 2.
    """
    overrides: list[str] = []

    def parse(argv: Sequence[str]) -> list[str]:
        overrides.extend(arg for arg in argv if arg.startswith("--gin."))
        return parse_flags([a for a in argv if not a.startswith("--gin.")])

    def start(argv: Sequence[str]) -> None:
        del argv
        logging.use_absl_handler()
        verbosity = max(logging.get_verbosity(), logging.INFO)
        logging.set_verbosity(logging.FATAL)  # gin logs every place where an include is not
        with validation.refusing():
            config = load(_GIN_FILE.value, overrides, workdir=_WORKDIR.value, pod=_POD.value)
        logging.set_verbosity(verbosity)
        handler = logging.get_absl_handler()
        handler.addFilter(_ours_or_serious)  # Orbax and TensorStore tell every step of a save
        with distributed.together(), validation.refusing():
            main(config)

    app.run(start, flags_parser=parse)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses flags for `app.run`; a wrong one ends the process with code 2."""
    with validation.refusing():
        try:
            rest = flags.FLAGS(argv)
        except flags.Error as error:
            raise UsageError(f"{str(error).rstrip('. ')}\n--help lists the options") from error
        if len(rest) > 1:
            raise UsageError(f"unexpected arguments {rest[1:]}; options start with --")
    return rest


def _ours_or_serious(record) -> bool:
    if "orbax" in record.pathname:
        return record.levelno >= 40
    return record.levelno >= 30 or record.pathname.startswith(str(_PACKAGE))


def gin_file() -> str:
    """The value of --gin_file."""
    return _GIN_FILE.value


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


def load(
    name: str | None,
    overrides: Sequence[str] = (),
    *,
    workdir: str | None,
    pod: str | None = None,
) -> TrainConfig:
    """The config of gin file `name` with `--gin.NAME=value` overrides.

    `workdir` is the output folder instead of the file's or the default one, `pod` a fragment of
    pods/ instead of the one that the file includes: its name, or its slice alone. Raises
    `UsageError` that lists every problem of files, fields, types and rules.
    """
    path = find(name)
    with gin.unlock_config():
        lines, problems = _flatten(path, pod)
        if pod and all(line.folder != _PODS for line in lines):
            problems.append(f"--pod={pod}: {path.name} includes no fragment of {_PODS}/ to replace")
        problems += _parse(lines)
        problems += _override(overrides)
        gin.parse_config(
            "from __gin__ import dynamic_registration\n"
            "from tulu_jax import recipe\n"
            "ROOT = @recipe.TrainConfig()\n"
        )
        bound = gin.config._CONFIG.get(("", "tulu_jax.recipe.TrainConfig"), {})
        if workdir or "workdir" not in bound:  # a saved config.gin names its own
            workdir = workdir or _default_workdir(path)
            gin.bind_parameter("tulu_jax.recipe.TrainConfig.workdir", workdir)
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


def _default_workdir(path: pathlib.Path) -> str:
    bucket = gin.config._CONFIG.get(("BUCKET", _MACRO), {}).get("value")
    run = f"runs/{path.stem}"
    return under(bucket, run) if isinstance(bucket, str) else run


def check(config: TrainConfig, needs: Callable[[TrainConfig, int], Iterable[str]]) -> None:
    """Joins the processes of the run. Raises `UsageError` with the problems that `needs`, one of
    `preflight`, finds in the run on so many devices."""
    import jax

    try:
        _join()
    except ValueError as error:
        stop_if(str(error).split("\n"))
    stop_if(distributed.device_problems(jax.devices()))
    stop_if(needs(config, jax.device_count()))


def _join() -> None:
    """Joins the processes of the run. Raises `ValueError` if they do not come or do not agree."""
    processes = distributed.find(
        {
            "coordinator_address": _COORDINATOR_ADDRESS.value,
            "num_processes": _NUM_PROCESSES.value,
            "process_id": _PROCESS_ID.value,
        },
        os.environ,
        on_tpu=distributed.has_tpu_chips(),
    )
    distributed.connect(
        processes,
        config_text=operative_config(),
        start_timeout=_START_TIMEOUT.value,
        peer_timeout=_PEER_TIMEOUT.value,
    )


def num_processes() -> int | None:
    """What --num_processes says."""
    return _NUM_PROCESSES.value


def peer_timeout() -> float:
    """What --peer_timeout says, in seconds."""
    return _PEER_TIMEOUT.value


def workdir() -> str | None:
    """What --workdir says, with a leading `~` expanded."""
    return _WORKDIR.value and validation.expanded(_WORKDIR.value)


def stop_if(problems: Iterable[str]) -> None:
    """Raises one `UsageError` that lists `problems`, if there are any."""
    validation.raise_if(problems)


def operative_config() -> str:
    """The gin text of everything that was read; it rebuilds the run by itself."""
    return gin.operative_config_str()


@dataclasses.dataclass
class _Line:
    text: str
    origin: str  # "sft.gin, line 3"
    folder: str


def _flatten(path: pathlib.Path, pod: str | None) -> tuple[list[_Line], list[str]]:
    """The lines of a file with its includes in their places, and the includes that do not exist.

    An include of pods/ gives way to that of `pod`, if there is one.
    gin's own search would take a folder named `models` in the working directory for a package, and
    stop at the first problem of an included file.
    """
    lines, problems = [], []
    for number, text in enumerate(path.read_text().split("\n"), 1):
        origin = f"{path.name}, line {number}"
        found = re.fullmatch(r"include\s+(['\"])(.+)\1\s*(#.*)?", text)
        if not found:
            lines.append(_Line(text, origin, path.parent.name))
            continue
        wanted = found.group(2)
        if pod and wanted.startswith(f"{_PODS}/"):
            wanted, unknown = _pod_fragment(wanted, pod)
            problems += unknown
        places = [folder / wanted for folder in [path.parent, *config_folders()]]
        included = next((place for place in places if place.is_file()), None)
        if included is None:
            known = {str(f.relative_to(d)) for d in config_folders()[1:] for f in d.rglob("*.gin")}
            hint = validation.nearest(wanted, known)
            problems.append(f"{origin}: include {wanted!r} was not found{hint}")
            continue
        inner, missing = _flatten(included, pod)
        for line in inner:
            if line.text.startswith("from __gin__"):
                line.text = ""
        lines += inner
        problems += missing
    return lines, problems


def _pod_fragment(included: str, pod: str) -> tuple[str, list[str]]:
    """The fragment that `pod` names instead of `included`, or `included` and why there is none."""
    known = {f.stem for folder in config_folders() for f in (folder / _PODS).glob("*.gin")}
    run = "_".join(pathlib.Path(included).stem.split("_")[-2:])  # v5p_512_70b_sft -> 70b_sft
    for name in (pod, f"{pod}_{run}"):
        if name in known:
            return f"{_PODS}/{name}.gin", []
    slices = sorted(name.removesuffix(f"_{run}") for name in known if name.endswith(f"_{run}"))
    hint = validation.nearest(pod, [*slices, *known])
    problem = f"--pod={pod}: {_PODS}/ has no such fragment{hint}; slices for {run} are {slices}"
    return included, [problem]


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
            problems.append(f"{lines[number - 1].origin}: {_tidy(said)}")
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
            problems.append(
                f"--gin.{name}: no such macro{validation.nearest(name, known)}; this "
                f"configuration has {sorted(known)}"
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
