"""The package's commands as typed, in this process: without the seconds that starting one takes."""

import contextlib
import logging
import os
import runpy
import sys
from collections.abc import Iterator

import gin
import jax
from absl import flags
from absl import logging as absl_logging

from tulu_jax import cli

PACKAGE = cli.__name__.partition(".")[0]


def run(name: str, *arguments: str) -> int:
    """The exit status of `python -m tulu_jax.NAME ARGUMENTS`. What that changes in this process is
    put back: flags, gin's bindings, handlers of the log, the environment."""
    environment, platforms, argv = dict(os.environ), jax.config.jax_platforms, sys.argv
    handlers, level = logging.root.handlers[:], logging.root.level
    filters, verbosity = absl_logging.get_absl_handler().filters[:], absl_logging.get_verbosity()
    sys.argv = [f"{name}.py", *arguments]
    # runpy would keep what jaxtyping's import hook made of the module as its plain bytecode, which
    # processes without the hook take for theirs.
    sys.dont_write_bytecode, writes_none = True, sys.dont_write_bytecode
    try:
        with _flags_of_one_command():
            runpy.run_module(f"{PACKAGE}.{name}", run_name="__main__", alter_sys=True)
        return 0
    except SystemExit as end:
        return end.code or 0
    finally:
        gin.clear_config()
        absl_logging.get_absl_handler().filters[:] = filters
        absl_logging.set_verbosity(verbosity)
        logging.root.handlers[:], logging.root.level = handlers, level
        sys.argv, sys.dont_write_bytecode = argv, writes_none
        os.environ.clear()
        os.environ.update(environment)
        jax.config.update("jax_platforms", platforms)


@contextlib.contextmanager
def _flags_of_one_command() -> Iterator[None]:
    """Inside, no flag of an entry point is defined or parsed; behind it, all are as before."""
    defined, parsed = flags.FLAGS.flags_by_module_dict(), flags.FLAGS.is_parsed()
    others = [
        (module, flag)
        for module, its in defined.items()
        if module.startswith(f"{PACKAGE}.") and module != cli.__name__
        for flag in its
    ]
    for _, flag in others:
        delattr(flags.FLAGS, flag.name)
    known = set(flags.FLAGS)
    try:
        yield
    finally:
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)
        for name in known:
            flags.FLAGS[name].unparse()
        flags.FLAGS.unparse_flags()
        for module, flag in others:
            flags.FLAGS[flag.name] = flag
            flags.FLAGS.register_flag_by_module(module, flag)
        if parsed:
            flags.FLAGS.mark_as_parsed()
