"""The package's commands as typed, in this process: without the seconds that starting one takes."""

import logging
import os
import runpy
import sys

import gin
import jax
from absl import flags

from tulu_jax import cli  # noqa: F401 (its flags stay when those of a command go)


def run(name: str, *arguments: str) -> int:
    """The exit status of `python -m tulu_jax.NAME ARGUMENTS`. What that changes in this process is
    put back: flags, gin's bindings, handlers of the log, the environment."""
    environment, platforms, argv = dict(os.environ), jax.config.jax_platforms, sys.argv
    handlers, level = logging.root.handlers[:], logging.root.level
    known, parsed = set(flags.FLAGS), flags.FLAGS.is_parsed()
    sys.argv = [f"{name}.py", *arguments]
    try:
        runpy.run_module(f"tulu_jax.{name}", run_name="__main__", alter_sys=True)
        return 0
    except SystemExit as end:
        return end.code or 0
    finally:
        _forget_flags(f"{name}.py", known, parsed)
        gin.clear_config()
        logging.root.handlers[:], logging.root.level = handlers, level
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
        jax.config.update("jax_platforms", platforms)


def _forget_flags(module: str, known: set[str], parsed: bool) -> None:
    own = {flag.name for flag in flags.FLAGS.flags_by_module_dict().get(module, ())}
    flags.FLAGS.remove_flag_values(own - known)
    for name in known:
        flags.FLAGS[name].unparse()
    flags.FLAGS.unparse_flags()
    if parsed:
        flags.FLAGS.mark_as_parsed()
