"""Two real processes share the reading; process 0 writes."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import safetensors.numpy
from test_hf_export import save

REPO = pathlib.Path(__file__).resolve().parents[2]
ONE_PROCESS = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
address, rank, source, target = sys.argv[1:]
jax.distributed.initialize(address, 2, int(rank))
sys.path.insert(0, "tests/interop")
from test_hf_export import CONFIG, IDS
from hf_models import FLOAT32
from tulu_jax.decode import decoder
from tulu_jax.decode.sampling import Sampling
from tulu_jax.interop import hf, weight_files
from tulu_jax.models import llama
from tulu_jax.parallel import mesh as mesh_lib, sharding as sharding_lib

read = []
rows = weight_files.WeightFiles.rows
def counting(self, *arguments):
    read.append(rows(self, *arguments))
    return read[-1]
weight_files.WeightFiles.rows = counting

with jax.set_mesh(mesh_lib.make(mesh_lib.MeshConfig(fsdp=2, tensor=2))) as mesh:
    shardings = sharding_lib.param_shardings(
        jax.sharding.get_mesh(), llama.abstract_params(CONFIG, "float32")
    )
    params = hf.load(source, CONFIG, shardings=shardings, dtype="float32")
    assert 2 * sum(block.size for block in read) == CONFIG.num_params, read
    hf.save(target, params, CONFIG, dtype="float32", generation_config=IDS, write_tokenizer=None)
    assert os.path.exists(os.path.join(target, "config.json"))  # complete for both
    ours = decoder.Decoder(CONFIG, FLOAT32, page=8)
    sampling = Sampling(max_new_tokens=8, stop_ids=(2,))
    replies = ours.generate(params, [[1, 5, 9], [1, 7]], sampling, jax.random.key(0))
    scores = ours.score(params, [[1, 5, 9]], [[4, 8]])
print("replies", replies, scores)
"""


def test_two_processes_read_half_each_and_write_one_folder(tmp_path):
    save(tmp_path / "source")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_PROCESS, address, str(rank), tmp_path / "source",
             tmp_path / "out"],
            cwd=REPO,
            env=os.environ | {"PYTHONPATH": str(REPO)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    replies = {line for out, _ in outputs for line in out.splitlines() if "replies" in line}
    assert len(replies) == 1
    expected = safetensors.numpy.load_file(tmp_path / "source" / "model.safetensors")
    found = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_array_equal(found[name], weight)
