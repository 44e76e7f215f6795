"""On the published slices, whatever a host's chips hold, each row of a batch is loaded and once."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from tulu_jax.planning import topology
topology.enter()
import jax
from tulu_jax.parallel import mesh as mesh_lib

for name, hosts, data, context, tensor, parts in (
    ("v3:16x16", 64, 1, 64, 8, 1),
    ("v3:16x16", 64, 1, 16, 8, 4),
    ("v4:4x8x8", 64, 1, 8, 8, 2),
    ("v5p:4x8x8", 64, 1, 32, 8, 1),
    ("v5p:4x8x8", 64, 1, 8, 8, None),
    ("v5p:4x8x8", 64, 1, 1, 1, 64),
    ("v5p:2x4x4", 8, 1, 2, 4, None),
    ("v5e:16x16", 32, 1, 8, 8, None),
    ("v6e:16x16", 32, 4, 2, 2, None),
    ("2*v5e:16x16", 64, 2, 8, 8, None),
):
    devices = topology.parse(name).devices()
    config = mesh_lib.MeshConfig(data=data, context=context, tensor=tensor)
    mesh = mesh_lib.make(config, devices)
    rows = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    shares = {}
    for process in {device.process_index for device in devices}:
        jax.process_index = lambda process=process: process  # there is one process here
        shares[process] = mesh_lib.row_share(mesh)
    (count,) = {count for _, count in shares.values()}
    assert parts in (None, count), (name, count)
    loaded = [set() for _ in range(count)]  # the row shards that the hosts of each part hold
    for row, held_by in enumerate(rows):
        for device in held_by:
            loaded[shares[device.process_index][0]].add(row)
    assert sorted(row for part in loaded for row in part) == list(range(len(rows))), name
    assert {len(part) for part in loaded} == {len(rows) // count}, name
    print(name, count, flush=True)
"""


def test_every_row_is_loaded_by_one_part_of_the_hosts():
    pytest.importorskip("libtpu", reason="the extra 'tpu' is not installed")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 10
