"""Flags -> one frozen `TrainConfig`, and the entry that every command shares.

What a user can mend is refused here, before any device work, and all at once: what `gin_files`
finds in the files, and `preflight` in the whole.
"""

import dataclasses
import os
import pathlib
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from absl import app, flags, logging

from tulu_jax import gin_files, validation
from tulu_jax.parallel import distributed, preemption
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.recipe import TrainConfig
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
    "pod", None, "The TPU slice, a name of tulu_jax/parallel/slices.py such as v6e_256, or 'any': "
    "the same as --gin.SLICE.",
)  # fmt: skip
_ALLOW_IMPORT = flags.DEFINE_multi_string(
    "allow_import", [], "A module of yours, with what lies in it, that the gin file may import: "
    "--allow_import=my_tasks. Several by commas, or by giving the flag again.",
)  # fmt: skip
_PRINT_CONFIG = flags.DEFINE_bool(
    "print_config", False, "Print the whole run as it is resolved, and end."
)

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
_WIDTH, _INDENT = 100, 12


def run(
    main: Callable[[TrainConfig | None], None], *, needs_config: Callable[[], bool] = lambda: True
) -> None:
    """Runs `main(config)` with absl's flags; `preemption` tells what SIGTERM does. Where the flags
    say that there is no run (`needs_config`), the config is None and no gin file is read.

    What a user can mend (`validation.refusing`) ends the process, and with several all of them,
    with its message and exit status 2.
    """
    overrides: list[str] = []

    def parse(argv: Sequence[str]) -> list[str]:
        overrides.extend(arg for arg in argv if arg.startswith("--gin."))
        return parse_flags([a for a in argv if not a.startswith("--gin.")])

    def start(argv: Sequence[str]) -> None:
        del argv
        with preemption.ending():
            started()

    def started() -> None:
        logging.use_absl_handler()
        verbosity = max(logging.get_verbosity(), logging.INFO)
        logging.set_verbosity(logging.FATAL)  # gin logs every place where an include is not
        with validation.refusing():
            config = None
            if needs_config():
                config = load(
                    *(_GIN_FILE.value, overrides),
                    workdir=_WORKDIR.value,
                    pod=_POD.value,
                    allow_import=allow_import(),
                )
        if _PRINT_CONFIG.value and config is not None:
            print(on_one_screen(config))
            return
        logging.set_verbosity(verbosity)
        handler = logging.get_absl_handler()
        handler.addFilter(ours_or_serious)  # Orbax and TensorStore tell every step of a save
        with distributed.together(), preemption.ending(), validation.refusing():
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


def joined(argv: Sequence[str], name: str) -> list[str]:
    """`NAME A B` as `NAME=A,B`, since a flag takes one value; all else as it is."""
    found = list(argv)
    for place, argument in enumerate(argv[:-2]):
        both = argv[place + 1 : place + 3]
        if argument == name and not any(one.startswith("-") for one in both):
            found[place : place + 3] = [f"{name}={','.join(both)}"]
    return found


def ours_or_serious(record) -> bool:
    """A filter of the log: whether a line is of this package, or serious."""
    if "orbax" in record.pathname:
        return record.levelno >= 40
    return record.levelno >= 30 or record.pathname.startswith(str(_PACKAGE))


def gin_file() -> str:
    """The value of --gin_file."""
    return _GIN_FILE.value


def allow_import() -> list[str]:
    """The modules that --allow_import names."""
    return [name for value in _ALLOW_IMPORT.value for name in value.split(",")]


def load(
    name: str | None,
    overrides: Sequence[str] = (),
    *,
    workdir: str | None,
    pod: str | None = None,
    allow_import: Sequence[str] = (),
) -> TrainConfig:
    """The config of gin file `name`, as `gin_files.load` has it, on the slice `pod`.

    Raises `UsageError` that lists every problem of files, fields, types and rules.
    """
    overrides = [*overrides, f"--gin.SLICE={pod!r}"] if pod else overrides
    return gin_files.load(name, overrides, workdir=workdir, allow_import=allow_import)


def operative_config() -> str:
    """The gin text of everything that was read; it rebuilds the run by itself."""
    return gin_files.operative_config()


def on_one_screen(config: TrainConfig) -> str:
    """Every field of a run, in lines of 100 columns; `*` marks what is not the default."""
    lines = []
    for name, part in [("run", config), *vars(config).items()]:
        if dataclasses.is_dataclass(part):
            values = " ".join(_fields(part))
            if name == "mesh":
                values += f" ({_resolved(config)})"
            lines += textwrap.wrap(
                f"{name:<{_INDENT}}{type(part).__name__}: {values}",
                _WIDTH,
                subsequent_indent=" " * _INDENT,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join([f"{_GIN_FILE.value}, resolved; * is not the default", *lines])


def _fields(part: Any) -> Iterator[str]:
    for field in dataclasses.fields(part):
        value, default = getattr(part, field.name), field.default
        if not (isinstance(part, TrainConfig) and dataclasses.is_dataclass(value)):
            mark = "*" if default not in (dataclasses.MISSING, value) else ""
            yield f"{mark}{field.name}={value!r}"


def _resolved(config: TrainConfig) -> str:
    """The mesh on the devices that it is for; on 1 and on 8 where it takes any."""
    mesh = config.mesh
    if mesh.topology is None and -1 not in (getattr(mesh, axis) for axis in mesh_lib.AXES):
        return "no topology"
    counts = [mesh_lib.slice_devices(mesh.topology)] if mesh.topology else [1, 8]
    found = []
    for count in counts:
        try:
            sizes = config.mesh_on(count).sizes(count)
            axes = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
            found.append(f"on {count}: {axes or 'whole'}")
        except UsageError:
            found.append(f"on {count}: none fits")
    return "; ".join(found)


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
