"""A whole iteration of PPO by the dry run: the real compiler, a small model, no TPU."""

import importlib.util
import json
import math

import builders
import commands
import pytest

from tulu_jax import cli
from tulu_jax import step as step_lib
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.parallel.mesh import MeshConfig
from tulu_jax.planning import (
    aot,
    calibration,
    cost,
    decoding_times,
    iteration,
    passes,
    plan,
    topology,
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='needs libtpu: pip install "jax[tpu]"'
)

SMALL = """from __gin__ import dynamic_registration
from tulu_jax.models import config
from tulu_jax.objectives import ppo
include 'tulu_tiny_ppo.gin'
MAX_LENGTH = 256
RESPONSE_LENGTH = 128
config.LlamaConfig.num_layers = 2
config.LlamaConfig.embed_dim = 256
config.LlamaConfig.num_heads = 4
config.LlamaConfig.num_kv_heads = 2
config.LlamaConfig.head_dim = 128
config.ExecutionConfig.compute_dtype = 'bfloat16'
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("iteration") / "small.gin"
    path.write_text(SMALL)
    return path


ADAPTED = """from __gin__ import dynamic_registration
from tulu_jax.models import lora
include 'small.gin'
include 'recipes/qlora.gin'
lora.LoRAConfig.dropout = 0.0
lora.LoRAConfig.rank = 16
"""


def test_one_base_is_counted_once(small):
    """Of three networks on one base: its bytes, those of both adapters, and their moments."""
    file = small.parent / "adapted.gin"
    file.write_text(ADAPTED)
    config = cli.load(str(file), workdir="unused")
    mesh = mesh_lib.make(MeshConfig(data=2, fsdp=4))
    kept = iteration._models(*step_lib.abstract_state(config, mesh))
    assert list(kept) == [
        "base of three models", "adapters of policy", "adapters and head of value model",
        "moments of both", "reward model",
    ]  # fmt: skip
    adapters, value = kept["adapters of policy"], kept["adapters and head of value model"]
    assert adapters < value < adapters + 4 * config.model.embed_dim + 1  # a float32 head
    assert kept["moments of both"] == pytest.approx(2 * (adapters + value), abs=64)
    weights = config.model.num_params / 4  # in four bits, but for the embedding and the head
    assert weights / 2 < kept["base of three models"] < 2 * weights
    assert kept["reward model"] < kept["base of three models"]


@pytest.mark.slow
def test_an_iteration_is_compiled_and_priced(small, capsys, absent_slices):
    out = small.parent / "out"
    status = commands.run("dryrun", f"--gin_file={small}", "--topology=v5e:2x2", f"--out={out}")
    said = capsys.readouterr()
    assert status == 0, said
    (found,) = json.loads((out / "iteration.json").read_text())
    assert found["fits"] and not found["refused"]
    assert (found["prompts"], found["updates"], found["iterations"]) == (128, 4, 24)
    always = found["bytes"]["always"]
    assert always["moments of both"] == pytest.approx(  # and two counts of updates
        2 * (always["policy"] + always["value model"]), abs=64
    )
    assert always["reference"] == always["policy"]
    assert always["reward model"] == always["value model"] < always["policy"]
    assert min(found["bytes"]["peaks"].values()) > sum(always.values())
    parts = found["seconds"]
    assert set(parts) == {"decoding", "prefill", "measuring", "updates"} and min(parts.values()) > 0
    assert found["seconds_of_all"] == pytest.approx(sum(parts.values()))
    assert found["decoding_share"] == pytest.approx(parts["decoding"] / sum(parts.values()))
    # 64 slots for 128 prompts: twice 128 tokens. One pass is of the 32 rows of a forward.
    assert parts["decoding"] == pytest.approx(2 * 128 * found["decode"]["step"]["seconds"])
    assert parts["measuring"] == pytest.approx(4 * found["measure"]["seconds"])
    (update,) = json.loads((out / "dryrun.json").read_text())
    assert parts["updates"] == pytest.approx(4 * update["seconds"]["step"])
    assert found["seconds_between"][0] < found["seconds_of_all"] < found["seconds_between"][1]
    assert "share of decoding" in said.out and "peak of rollout / HBM" in said.out


def made(config, *, cache: int, code: int, refused: dict[str, str]) -> iteration.Iteration:
    """Of 1 GiB of models on a v5e, with costs of whole seconds."""
    place = topology.parse("v5e:2x2")
    step = aot.Step(
        topology=place, mesh={}, cost=cost.Cost(matrix=3.0), model_flops=1.0, whole_flops=2.0,
        executed_flops=1.0, positions=6, examples=1.0, compile_seconds=0.0, faults=[], text="",
        memory=aot.Memory(
            params=0, frozen=0, moments=0, gradients=0, kept=0, temporaries=2**30, code=code,
            peak=0, hbm=place.hardware.hbm,
        ),
    )  # fmt: skip
    decode = decoding_times.Decoding(
        topology=place, model=config.model, asked=iteration._asked(config), mesh={"tensor": 4},
        rows=32, per_fill=16, weights=2**29, cache=cache, temporaries=2**29, code=code, relaid=0,
        step=cost.Cost(memory=0.25), least=0.2, most=0.5, limit=0.2, fill=cost.Cost(matrix=0.5),
        faults=[], compile_seconds=0.0, texts={},
    )  # fmt: skip
    measure = passes.Pass(
        rows=32, cost=cost.Cost(matrix=2.0), temporaries=2**28, code=code, compile_seconds=0.0
    )
    result = plan.Result(
        config=config, topology=place, step=None if "updates" in refused else step, updates=96
    )  # fmt: skip
    return iteration.Iteration(
        result=result, models={"policy": 2**30}, decode=decode, measure=measure, refused=refused
    )


def test_phases_add_up(small):
    config = cli.load(str(small), workdir="unused")
    found = made(config, cache=2**30, code=2**20, refused={})
    # 128 prompts, 32 at once, 128 tokens; 8 fills of 16; 4 passes of 32 rows; 4 updates.
    assert found.seconds == {
        "decoding": 4 * 128 * 0.25, "prefill": 8 * 0.5, "measuring": 4 * 2.0, "updates": 4 * 3.0,
    }  # fmt: skip
    assert found.total == 152 and found.share == pytest.approx(128 / 152)
    assert found.rates == {"rollout": 128 * 128 / 132, "updates": 2.0}
    off = calibration.band(cost.Cost(matrix=1.0))
    rest = 4.0 + 8.0 + 12.0  # decoding is read in other ways too
    assert found.between == pytest.approx((128 * 0.8 + off.low * rest, 128 * 2 + off.high * rest))
    assert found.iterations == 24 and found.hours == pytest.approx(24 * 152 / 3600)
    always = 2**30 + 3 * 2**20  # models and the code of all three programs
    assert found.peaks == {
        "rollout": always + 2**31, "measuring": always + 2**28, "updates": always + 2**30,
    }  # fmt: skip
    assert found.fits and "all of it fits" in iteration.table([found])


def test_old_values_of_each_update_are_measured_again(small):
    """Policy and value model alone: half of a pass of four."""
    config = cli.load(str(small), workdir="unused")
    config = builders.replace(config, objective__old_from="minibatch")
    found = made(config, cache=2**30, code=0, refused={})
    assert found.seconds["measuring"] == 4 * 2.0 + 4 * 2.0 / 2


def test_what_does_not_fit_is_told_by_phase(small):
    config = cli.load(str(small), workdir="unused")
    full = made(config, cache=16 * 2**30, code=0, refused={})
    assert not full.fits
    said = iteration.table([full])
    assert "v5e:2x2: rollout takes 2.00 GiB a device more than there is" in said
    assert "fewer ppo.PPOConfig.slots" in said
    refused = made(config, cache=2**30, code=0, refused={"updates": "Used 20G of 16G"})
    assert not refused.fits and math.isnan(refused.total)
    assert "updates does not fit: Used 20G of 16G" in iteration.table([refused])
    assert "seconds_of_all" not in refused.as_dict() and refused.as_dict()["bytes"]["always"]
