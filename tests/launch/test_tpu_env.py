"""Every libtpu flag of launch/tpu_env.sh is one that the installed libtpu knows."""

import os
import pathlib
import subprocess
import sys

import pytest

from tulu_jax.parallel import compiler

TPU_ENV = pathlib.Path(__file__).resolve().parents[2] / "launch/tpu_env.sh"
COMPILE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
mesh = jax.sharding.Mesh(topology.devices, ("x",), axis_types=(jax.sharding.AxisType.Auto,))
x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P("x")))
jax.jit(lambda a, b: a @ b).lower(x, x).compile()
print("compiled")
"""


def compile_with(arguments):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": arguments,
    }
    return subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )


def sourced(slices):
    """LIBTPU_INIT_ARGS after sourcing, with a flag of the user's own before."""
    done = subprocess.run(
        ["bash", "-c", f'set -eu; . "{TPU_ENV}"; echo "$LIBTPU_INIT_ARGS"'],
        env=os.environ | {"LIBTPU_INIT_ARGS": "--xla_tpu_mine=1", "SLICES": slices},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_libtpu_knows_the_flags():
    pytest.importorskip("libtpu", reason="the extra 'tpu' is not installed")
    assert sourced("1") == ["--xla_tpu_mine=1"]
    *ours, mine = sourced("2")
    assert ours and mine == "--xla_tpu_mine=1"
    options = {f"--{name}" for named in compiler.OPTIONS.values() for name in named}
    assert not options & {flag.split("=")[0] for flag in ours}  # each in one place
    done = compile_with(" ".join(ours))
    assert done.stdout == "compiled\n", done.stderr
    refused = compile_with("--xla_tpu_no_such_flag=true")  # so that the line above says something
    assert refused.returncode != 0 and "no_such_flag" in refused.stderr
