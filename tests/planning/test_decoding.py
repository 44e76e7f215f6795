"""`python -m tulu_jax.dryrun --decode` as typed: the real compiler, a small model, no TPU."""

import dataclasses
import importlib.util
import json

import commands
import jax
import jax.numpy as jnp
import pytest
from absent_slices import folder

from tulu_jax import chips, cli
from tulu_jax.models import streamed_layers
from tulu_jax.planning import compiled, decoding, decoding_faults, hlo, suite, topology
from tulu_jax.planning.cycles import decode_cycles, product_cycles, schedule

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='needs libtpu: pip install "jax[tpu]"'
)

# Heads as the kernel takes them; two of them on four chips leave an axis for the residual.
SMALL = """from __gin__ import dynamic_registration
from tulu_jax.models import config
include 'tulu_tiny_sft.gin'
config.LlamaConfig.num_layers = 2
config.LlamaConfig.embed_dim = 256
config.LlamaConfig.num_heads = 2
config.LlamaConfig.num_kv_heads = 2
config.LlamaConfig.head_dim = 128
config.ExecutionConfig.compute_dtype = 'bfloat16'
"""
ASKED = ("--decode", "--prompts=4", "--prompt_length=200", "--new_tokens=56")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("decoding") / "small.gin"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def priced(small):
    out = small.parent / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(compiled.FOLDER, str(folder()))
        for name, value in schedule.ENVIRONMENT.items():
            patch.setenv(name, value)
        status = commands.run(
            "dryrun", f"--gin_file={small}", "--topology=v5e:2x2", f"--out={out}", *ASKED
        )
    assert status == 0
    return out


def test_programs_are_compiled_and_priced(priced):
    (result,) = json.loads((priced / "decode.json").read_text())
    assert result["fits"] and result["rows"] == 4 and not result["faults"]
    assert result["mesh"] == {"data": 1, "fsdp": 1, "context": 2, "tensor": 2}
    assert result["step"]["attention"] > 0  # the kernel is there and known
    readings = ("step_by_traffic", "step_by_compiler")
    least, most = (result[name] for name in readings)
    assert result["hbm_limit"] < least <= result["step"]["seconds"] < most
    assert result["decode_tokens_per_second"] == pytest.approx(4 / result["step"]["seconds"])
    low, high = result["step_between"]
    assert low <= least < result["step"]["seconds"] < most <= high
    assert result["seconds_between"][0] < result["seconds"] < result["seconds_between"][1]
    assert 0 < result["decode_mfu"] < result["prefill_mfu"] < result["prefill_mfu_whole_attention"]
    text = (priced / "decode.hlo.txt").read_text()
    assert "decode_attention" in text
    # Of 2 rows a page of 256 each and nobody's; 2 layers, 1 head a device, keys and values.
    assert result["bytes"]["cache"] == 2 * 2 * 3 * 256 * 128 * 2


@pytest.mark.parametrize("kv_heads, mesh", [(4, dict(tensor=4)), (2, dict(tensor=2, group=2))])
def test_weights_stream_and_nothing_copies_them(small, kv_heads, mesh, absent_slices, monkeypatch):
    """With a key/value head for each device or for two the kernels take weights as they lie."""
    monkeypatch.setenv(compiled.FOLDER, str(folder()))
    config = cli.load(str(small), workdir="unused")
    heads = dict(num_heads=4, num_kv_heads=kv_heads)
    model = dataclasses.replace(config.model, **heads, embed_dim=512, mlp_dim=640)
    config = dataclasses.replace(config, model=model)
    asked = decoding.Asked(prompts=4, prompt_length=200, new_tokens=56)
    found = decoding.price(config, topology.parse("v5e:2x2"), asked)
    assert {name: size for name, size in found.mesh.items() if size > 1} == mesh
    assert not found.faults and not found.relaid
    assert not found.step.unknown
    text = found.texts["decode"]
    for kind in product_cycles.KINDS:
        assert f"%{streamed_layers.NAME}{kind}" in text
    kernels = [line for line in text.splitlines() if f"%{streamed_layers.NAME}" in line]
    assert kernels and not any("S(2)" in line for line in kernels)  # no semaphore leaves a kernel
    products = {
        name.removeprefix(streamed_layers.NAME).split(".")[0]: (runs, kind)
        for _, runs, name, kind in found.step.top
        if name.startswith(streamed_layers.NAME)
    }
    assert products == dict.fromkeys(product_cycles.KINDS, (2.0, "matrix kernel"))  # two layers


def test_no_weight_moves(priced):
    """What goes over the links in a step is activations, and nothing of a weight's size."""
    module = hlo.parse((priced / "decode.hlo.txt").read_text())
    moved = [
        sum(hlo.shape_bytes(i.shape))
        for body in module.computations.values()
        for i in body
        if i.collective
    ]
    assert moved and max(moved) <= 4 * 512 * 4  # logits of 4 rows


def test_what_a_step_should_not_have_is_found():
    devices = jax.sharding.AbstractMesh(
        (1, 1, 1, 4), ("data", "fsdp", "context", "tensor"),
        axis_types=(jax.sharding.AxisType.Auto,) * 4,
    )  # fmt: skip

    def placed(*shape, spec):
        return jax.ShapeDtypeStruct(
            shape, jnp.bfloat16, sharding=jax.NamedSharding(devices, jax.P(*spec))
        )

    weights = {"model": {"layers": {"w": placed(2, 64, 128, spec=(None, None, "tensor"))}}}
    cache = {"k": placed(2, 9, 4, 16, 128, spec=(None, None, "tensor"))}
    module = hlo.parse(
        """ENTRY %main (p: bf16[2,64,32], c: bf16[2,9,1,16,128]) -> bf16[64,128] {
  %p = bf16[2,64,32] parameter(0)
  %c = bf16[2,9,1,16,128] parameter(1)
  %moved = bf16[2,9,1,16,128] copy(%c)
  %big = f32[4096,8192] all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %whole = bf16[64,128] all-gather(%p), replica_groups={{0,1,2,3}}
}
"""
    )
    sizes = dict(zip(devices.axis_names, devices.axis_sizes, strict=True))
    assert decoding_faults.faults(module, sizes, weights, cache) == [
        "moved copies k [2,9,1,16,128]",
        "big moves 134 MB over tensor",
        "whole holds model/layers/w [64,128] whole",
    ]


def test_a_suite_is_its_benchmarks_and_compiles_once(priced, monkeypatch):
    config = cli.load(str(priced.parent / "small.gin"), workdir="unused")
    made = []
    compile_ = decoding.compiled

    def compiled_once(*arguments):
        made.append(compile_(*arguments))
        return made[-1]

    monkeypatch.setenv(compiled.FOLDER, str(folder()))
    monkeypatch.setattr(decoding, "compiled", compiled_once)
    loads = [
        suite.Load(name="scored", requests=100, prompt_length=200, new_tokens=0),
        suite.Load(name="said", requests=10, prompt_length=150, new_tokens=100, samples=3),
    ]
    found = suite.price(config, topology.parse("v5e:2x2"), loads)
    assert len(made) == 1 and made[0].rows >= 30
    scored, said = (found.of[load.name] for load in loads)
    assert found.hours == pytest.approx((scored.seconds + said.seconds) / 3600)
    assert found.hours_between[0] < found.hours < found.hours_between[1]
    fills = -(-100 // scored.per_fill)
    assert scored.seconds == pytest.approx(fills * scored.fill.seconds)
    # All 30 answers are made at once, each prompt is computed once.
    steps = said.seconds - -(-10 // said.per_fill) * said.fill.seconds
    assert steps == pytest.approx(100 * said.step.seconds)
    assert "hours in all" in suite.table([found]) and found.as_dict()["benchmarks"]["said"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--prompts=0"], "--prompts=0: expected a positive number"),
        (["--new_tokens=500"], "longer than the model's 512 positions"),
        (["--plan"], "--plan and --decode: expected one of them"),
        (["--nodecode", "--suite"], "requests of 1,211 positions and the model 512"),
        (["--topology=v5e:3x5"], "15 devices cannot hold the weights"),
    ],
)
def test_misuse_is_status_2(small, capsys, arguments, said):
    command = (f"--gin_file={small}", "--topology=v5e:2x2", *ASKED, *arguments)
    assert commands.run("dryrun", *command) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("chip", decode_cycles.COUNTED)
def test_the_kernel_takes_the_cycles_that_are_expected(chip):
    """Llama 7B and 70B over 8 devices, on all cores of a device, and one row on each core."""
    cores = chips.CHIPS[chip].cores
    shapes = [
        decode_cycles.Shape(rows=64, heads=4, kv_heads=4, page=128, table=16),
        decode_cycles.Shape(rows=64, heads=8, kv_heads=1, page=256, table=5),
        decode_cycles.Shape(rows=cores, heads=4, kv_heads=4, page=128, table=16),
    ]
    programs = schedule.compile_for(chip, [*map(decode_cycles.request, shapes)], timeout=1200)
    for shape, program in zip(shapes, programs, strict=True):
        assert program.error is None, program.error
        (kernel,) = program.kernels.values()
        assert not kernel.primary_core_only
        of = decode_cycles.COUNTED[chip][min(4, shape.rows // cores)]
        found, expected = (
            decode_cycles.cycle_seconds(chip, shape, cycles, seen=1152, ours=True)
            for cycles in (decode_cycles.counted(kernel), of)
        )
        assert found == pytest.approx(expected, rel=0.05)  # as registers fall


@pytest.mark.slow
@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("chip", product_cycles.COUNTED)
def test_products_take_no_more_cycles_than_expected(chip, rows):
    """Of Llama 70B over 8 devices; the expected ones are those of the slowest shape."""
    cores = chips.CHIPS[chip].cores
    shape = product_cycles.Shape(rows=rows, embed=8192, heads=8, kv_heads=1, mlp=3584)
    requests = [product_cycles.request(kind, shape, cores) for kind in product_cycles.KINDS]
    programs = schedule.compile_for(chip, requests, timeout=1200)
    for kind, program in zip(product_cycles.KINDS, programs, strict=True):
        assert program.error is None, program.error
        (kernel,) = program.kernels.values()
        assert not kernel.primary_core_only
        found = product_cycles.cycles(kernel, shape.ring(kind, cores)) / chips.CHIPS[chip].clock
        assert found < 1.05 * product_cycles.call(chip, kind, shape).compute
