"""A run by two real processes of four devices each gives the curve of one process of eight."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from tulu_jax.data import tulu_tiny
from tulu_jax.training import metrics as metrics_lib

CONFIG = """
from __gin__ import dynamic_registration
from tulu_jax.data import tulu_tiny
from tulu_jax.models import config
from tulu_jax.parallel import mesh

include '{stage}.gin'

config.LlamaConfig.num_layers = 1
config.LlamaConfig.embed_dim = 32
config.LlamaConfig.mlp_dim = 64
config.LlamaConfig.head_dim = 8
config.LlamaConfig.num_heads = 4
config.LlamaConfig.num_kv_heads = 2
mesh.MeshConfig.data = 2
mesh.MeshConfig.fsdp = 2
mesh.MeshConfig.tensor = 2
MAX_LENGTH = 64
BATCH_SIZE = 8
BASE = None
NUM_STEPS = 6
CHECKPOINT_EVERY = 3
EVAL_EVERY = 1000
"""


def start(folder, stage, name, devices, **variables):
    environment = os.environ | variables
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "tulu_jax.train", f"--gin_file={stage}_small.gin"),
            f"--workdir={folder / name}",
        ],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes):
    for process in processes:
        error = process.communicate(timeout=400)[1]
        assert process.returncode == 0, error[-3000:]


@pytest.mark.parametrize("stage", ["tulu_tiny_sft", "tulu_tiny_dpo"])
def test_two_processes_give_the_curve_of_one(tmp_path, stage):
    (tmp_path / f"{stage}_small.gin").write_text(CONFIG.format(stage=stage))
    tulu_tiny.tokenizer(str(tmp_path / "cache/tulu_tiny_tokenizer"))
    finish([start(tmp_path, stage, "one", 8)])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    finish(
        [
            start(
                tmp_path,
                stage,
                "two",
                4,
                JAX_COORDINATOR_ADDRESS=address,
                JAX_NUM_PROCESSES="2",
                JAX_PROCESS_ID=str(process),
            )
            for process in range(2)
        ]
    )
    one, two = (metrics_lib.read(str(tmp_path / name)) for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {n for n in a if n.startswith("perf/")}:
            # the same numbers in another order of reduction
            np.testing.assert_allclose(a[name], b[name], rtol=2e-4, atol=2e-5, err_msg=name)
