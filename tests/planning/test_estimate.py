"""The dry run's arithmetic: slices by name, programs as text, links, rows and candidates."""
# ruff: noqa: E501 (a program's text)

import collections
import dataclasses

import numpy as np
import pytest

from tulu_jax import cli, step
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.parallel import slices
from tulu_jax.planning import aot, cost, hlo, plan, ranking, rows, topology

PROGRAM = """HloModule jit_step

%body (p: (s32[], bf16[4,128])) -> (s32[], bf16[4,128]) {
  %p = (s32[], bf16[4,128]{1,0}) parameter(0)
  %x = bf16[4,128]{1,0} get-tuple-element(%p), index=1
  %start = (bf16[4,128]{1,0}, bf16[16,128]{1,0}) all-gather-start(%x), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  %work = bf16[4,128]{1,0} fusion(%x), kind=kOutput, calls=%product, backend_config={"window_config":{"estimated_cycles":"150000"}}
  %done = bf16[16,128]{1,0} all-gather-done(%start)
  ROOT %out = (s32[], bf16[4,128]{1,0}) tuple(%p, %work)
}

%product (a: bf16[4,128]) -> bf16[4,128] {
  %a = bf16[4,128]{1,0} parameter(0)
  ROOT %d = bf16[4,128]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

ENTRY %main (x: bf16[4,128]) -> bf16[4,128] {
  %x.1 = bf16[4,128]{1,0} parameter(0)
  %loop = (s32[], bf16[4,128]{1,0}) while(%x.1), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  ROOT %sum = bf16[4,128]{1,0} all-reduce(%x.1), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add
}
"""


# How a TPU scatters a sum over four devices: each keeps a quarter.
SCATTERED = """HloModule jit_step

%all-reduce-scatter.3 (input: bf16[4096,8192]) -> bf16[1024,8192] {
  %input = bf16[4096,8192]{1,0} parameter(0)
  %whole = bf16[4096,8192]{1,0} all-reduce(%input), channel_id=5, replica_groups={{0,1,2,3}}, to_apply=%add
  %id = u32[] partition-id()
  ROOT %cut = bf16[1024,8192]{1,0} dynamic-slice(%whole, %id), dynamic_slice_sizes={1024,8192}
}

ENTRY %main (x: bf16[4096,8192]) -> bf16[1024,8192] {
  %x = bf16[4096,8192]{1,0} parameter(0)
  ROOT %sum = bf16[1024,8192]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
}
"""


def line(n):
    """n devices along one torus axis of a v5e slice."""
    return np.array([[0, i, 0] for i in range(n)])


def test_a_program_is_priced_by_its_schedule():
    slice_ = topology.parse("v5e:4x1")
    module = hlo.parse(PROGRAM)
    result = cost.Estimator(
        module,
        slice_,
        line(4),
        cost.mesh_axes({"fsdp": 2, "tensor": 2}),
        lambda name, text: None,
        dynamic_trips=1.0,
    ).estimate()
    assert result.matrix == pytest.approx(10 * 150_000 / 1.5e9)
    gather, sent = cost.link_seconds("all-gather", 16 * 128 * 2.0, range(4), line(4), slice_)
    assert sent == 16 * 128 * 2 * 3 / 4
    assert result.hidden == pytest.approx(10 * gather)  # shorter than the product beside it
    reduce, _ = cost.link_seconds("all-reduce", 4 * 128 * 2.0, [0, 1], line(4), slice_)
    assert result.interconnect == pytest.approx(reduce)
    assert set(result.wire) == {("all-gather", "fsdp x tensor"), ("all-reduce", "tensor")}


# Two gathers over different torus axes.
TWO_GATHERS = """HloModule jit_step

%gather_rows (a: bf16[4096,1024]) -> bf16[8192,1024] {
  %a = bf16[4096,1024]{1,0} parameter(0)
  ROOT %rows = bf16[8192,1024]{1,0} all-gather(%a), channel_id=1, replica_groups={{0,1}}, dimensions={0}
}

%gather_columns (b: bf16[4096,1024]) -> bf16[8192,1024] {
  %b = bf16[4096,1024]{1,0} parameter(0)
  ROOT %columns = bf16[8192,1024]{1,0} all-gather(%b), channel_id=2, replica_groups={{0,2}}, dimensions={0}
}

ENTRY %main (x: bf16[4096,1024]) -> bf16[8192,1024] {
  %x = bf16[4096,1024]{1,0} parameter(0)
  %one = ((bf16[4096,1024]{1,0}), bf16[8192,1024]{1,0}) call-start(%x), to_apply=%gather_rows, backend_config={"sparse_core_config":{"core_type":"CORE_TYPE_SC","core_ids":["0"]}}
  %two = ((bf16[4096,1024]{1,0}), bf16[8192,1024]{1,0}) call-start(%x), to_apply=%gather_columns, backend_config={"sparse_core_config":{"core_type":"CORE_TYPE_SC","core_ids":["1"]}}
  %first = bf16[8192,1024]{1,0} call-done(%one)
  ROOT %second = bf16[8192,1024]{1,0} call-done(%two)
}
"""


@pytest.mark.parametrize("core, times", [("1", 1), ("0", 2)])
def test_a_sparse_core_moves_one_thing_after_the_other(core, times):
    slice_ = topology.parse("v6e:2x2")
    places = np.array([[0, x, y] for x in (0, 1) for y in (0, 1)])
    result = cost.Estimator(
        hlo.parse(TWO_GATHERS.replace('"core_ids":["1"]', f'"core_ids":["{core}"]')),
        slice_,
        places,
        cost.mesh_axes({"fsdp": 2, "tensor": 2}),
        lambda name, text: None,
        dynamic_trips=1.0,
    ).estimate()
    gather, _ = cost.link_seconds("all-gather", 8192 * 1024 * 2.0, [0, 1], places, slice_)
    assert result.interconnect == pytest.approx(times * gather)


@pytest.mark.parametrize("compute, seconds", [(4e-6, 9.5e-6), (12e-6, 15e-6)])
def test_a_kernel_computes_beside_what_hbm_brings(compute, seconds):
    """9 us of traffic and the last piece's products behind it, or all products behind the first
    piece; and a wait for the first bytes."""
    call = cost.Call(kind="matrix", first=3e-6, compute=compute, last=5e-7, traffic=9e-6)
    assert call.seconds - cost.FETCH == pytest.approx(seconds)


def test_all_to_all_is_bound_by_the_middle_of_a_line():
    """Of 8 devices 4 send half of what they hold to the other side, over one link each way."""
    size = 1e9
    seconds, _ = cost.link_seconds("all-to-all", size, range(8), line(8), topology.parse("v5e:8x8"))
    assert seconds == pytest.approx(4 * size / 2 / 45e9, rel=1e-3)


FOLDED = [0, 2, 4, 6, 7, 5, 3, 1]  # a ring laid over a line: out on even places, back on odd ones


@pytest.mark.parametrize(
    "slice_, pairs, load",
    [
        pytest.param("v5e:16x16", [(n, (n + 1) % 16) for n in range(16)], 1, id="ring"),
        # Half of them go either way round.
        pytest.param("v5e:16x16", [(n, (n + 8) % 16) for n in range(16)], 4, id="across a ring"),
        pytest.param("v5e:8x8", [(n, (n + 4) % 8) for n in range(8)], 4, id="across a line"),
        pytest.param("v5e:8x8", [(n, (n + 1) % 8) for n in range(8)], 1, id="ring on a line"),
        pytest.param(
            "v5e:8x8", [*zip(FOLDED, FOLDED[1:] + FOLDED[:1], strict=True)], 1, id="folded ring"
        ),
        pytest.param("v5e:8x8", [(0, 7), (1, 6)], 2, id="two on one way"),
    ],
)
def test_a_permute_loads_every_link_on_its_way(slice_, pairs, load):
    slice_ = topology.parse(slice_)
    seconds, sent = cost.permute_seconds(1e9, pairs, line(slice_.shape[0]), slice_)
    assert sent == 1e9
    assert seconds == pytest.approx(load * 1e9 / 45e9, rel=1e-3)


def test_the_devices_of_a_chip_share_its_links():
    slice_ = topology.parse("v3:4x1")
    places = np.array([[0, chip, 0] for chip in range(4) for _ in range(2)])
    both, _ = cost.permute_seconds(1e9, [(0, 2), (1, 3)], places, slice_)
    one, _ = cost.permute_seconds(1e9, [(0, 2)], places, slice_)
    assert both == pytest.approx(2 * one, rel=1e-3) == pytest.approx(1e9 / 50e9, rel=1e-3)


def test_every_pair_of_a_permute_is_read():
    text = "collective-permute(%x), channel_id=3, source_target_pairs={{0,1},{1,0}, {2,3}}, a={}"
    instruction = hlo.Instruction("p", "f32[8]", "collective-permute", ("x",), text)
    assert hlo.pairs(instruction) == [(0, 1), (1, 0), (2, 3)]


def test_a_scattered_sum_is_no_sum_of_the_whole():
    slice_ = topology.parse("v5e:4x1")
    module, mesh = hlo.parse(SCATTERED), {"fsdp": 4}
    result = cost.Estimator(
        module, slice_, line(4), cost.mesh_axes(mesh), lambda name, text: None, dynamic_trips=1.0
    ).estimate()
    assert result.wire == {("reduce-scatter", "fsdp"): 4096 * 8192 * 2 * 3 / 4}
    assert aot.faults(module, mesh, {}) == []
    summed = SCATTERED.replace("all-reduce-scatter.3", "fused_computation.3")
    assert aot.faults(hlo.parse(summed), mesh, {}) == ["whole sums 67 MB whole over fsdp"]


@pytest.mark.parametrize(
    "text, members",
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a'}", [0, 4, 1, 5]),
    ],
)
def test_groups_are_read_in_every_form(text, members):
    instruction = hlo.Instruction("r", "f32[8]", "all-reduce", ("x",), f"all-reduce(%x), {text}")
    assert list(hlo.group(instruction, 8)) == members


def test_a_closed_ring_has_twice_the_links_of_a_line():
    ring, part = topology.parse("v5e:16x16"), topology.parse("v5e:8x8")
    size = 1e9
    closed, _ = cost.link_seconds("all-gather", size, range(16), line(16), ring)
    open_, _ = cost.link_seconds("all-gather", size, range(8), line(8), part)
    assert closed == pytest.approx(size * 15 / 16 / 90e9 + 15e-6)
    assert open_ == pytest.approx(size * 7 / 8 / 45e9 + 7e-6)
    places = np.array([[i // 2, i % 2, 0] for i in range(4)])  # two slices
    across, sent = cost.link_seconds(
        "all-reduce", size, [0, 2], places, topology.parse("2*v5e:2x1")
    )
    assert sent == size and across == pytest.approx(size / part.hardware.dcn)


@pytest.mark.parametrize(
    "places, shape, wraps, links",
    [
        ([(x, 3) for x in range(16)], (16, 16), 16, 2),  # a ring
        ([(x, 3) for x in range(8)], (16, 16), 16, 1),  # a line
        ([(x, 3) for x in range(0, 16, 2)], (16, 16), 16, 1),  # one of two rings that interleave
        ([(0, 0), (8, 0)], (16, 16), 16, 1 / 4),
        ([(0, 0), (1, 0)], (16, 16), 16, 1),
        ([(x, y) for x in range(2) for y in range(16)], (16, 16), 16, 1 + 2),
        ([(x, 0) for x in range(8)], (8, 8), 16, 1),  # the axis does not close
        ([(0, 0), (0, 0)], (8, 8), 4, 0),  # two devices of a chip
    ],
)
def test_the_links_of_a_group(places, shape, wraps, links):
    assert mesh_lib.links(np.array(places), shape, wraps) == links


@pytest.mark.parametrize(
    "name, sizes, context, tensor",
    [
        ("v5e:16x16", (16, 2, 8), 1, 1),  # neighbours of a line, and a ring of every other chip
        ("v6e:16x16", (1, 32, 8), 2 + 1, 1),
        ("v6e:16x16", (16, 8, 2), 1, 1),  # two of every eighth chip would have a quarter
        ("v5p:4x8x8", (16, 2, 8), 1, 2),
        ("2*v5e:16x16", (16, 2, 8), 1, 1),
        ("v3:16x16", (1, 64, 8), 1 / 2 + 1 / 2, 1 + 1),  # every other chip; a square of four
        ("v3:16x16", (1, 64, 8, True), 1 + 1, 1 / 2),  # two whole rows; every other chip of a line
    ],
)
def test_context_has_the_neighbours_where_tensor_loses_no_link_or_it_is_first(
    absent_slices, name, sizes, context, tensor
):
    slice_ = topology.parse(name)
    axes = dict(zip((*mesh_lib.AXES[1:], "context_first"), sizes, strict=False))
    devices = mesh_lib.make(mesh_lib.MeshConfig(data=-1, **axes), slice_.devices()).devices
    assert len(set(devices.flat)) == slice_.num_devices
    groups = devices[0, 0, :, 0], devices[0, 0, 0, :]
    places = (np.array([d.coords[: len(slice_.shape)] for d in group]) for group in groups)
    found = [mesh_lib.links(p, slice_.shape, slice_.hardware.wraps) for p in places]
    assert found == [context, tensor]


@pytest.mark.parametrize(
    "name, sizes, line",
    [
        ("v5p:2x4x4", (1, 4, 8), 0),
        ("v6e:8x8", (1, 4, 16), 1),  # two places of an axis of eight
        ("v5p:4x8x8", (16, 2, 8), None),  # a ring of eight
        ("v5p:2x4x4", (8, 2, 2), None),  # two alone are no pairs of anything
    ],
)
def test_neighbours_along_tensor_are_the_chips_of_a_line_of_two(absent_slices, name, sizes, line):
    devices, axes = topology.parse(name).devices(), dict(zip(mesh_lib.AXES[1:], sizes, strict=True))
    usual, paired = (
        mesh_lib.make(mesh_lib.MeshConfig(data=-1, **axes, pairs_first=first), devices).devices
        for first in (False, True)
    )
    if line is None:
        assert (usual == paired).all()
        return
    groups = zip(usual.reshape(-1, sizes[-1]), paired.reshape(-1, sizes[-1]), strict=True)
    assert all(set(before) == set(after) for before, after in groups)
    for one, other in paired.reshape(-1, 2):
        (differs,) = np.flatnonzero(np.subtract(one.coords, other.coords))
        assert differs == line
    rest = [np.delete(device.coords, line).tolist() for device in paired.reshape(-1, sizes[-1])[0]]
    assert all(
        len({tuple(place) for place in rest[first::2]}) == sizes[-1] // 2 for first in (0, 1)
    )


def test_rows_count_pairs_of_blocks():
    assert rows.WHOLE.pairs(8192, block=512, shards=1) == 16 * 17 / 2
    assert rows.WHOLE.pairs(8192, block=512, shards=8) == 15 + 16  # the last shard's
    assert rows.CONVERSATIONS.pairs(8192, block=512, shards=1) < 16 * 17 / 2
    assert rows.PAIRS.examples(8192) == pytest.approx(10.6, abs=0.01)
    assert rows.WHOLE.visible(8192) == 8192**2


@pytest.mark.parametrize(
    "name, said",
    [
        ("v5x:4x4", "known are ['v3', 'v4', 'v5e', 'v5p', 'v6e']"),
        ("v5p:4x4", "a v5p slice has 3 axes, found 2"),
        ("v5p-512", "expected e.g. 'v5p:4x8x8'"),
        ("v5e:0x4", "at least 1"),
    ],
)
def test_unknown_slices_are_refused(name, said):
    with pytest.raises(ValueError, match="topology") as refused:
        topology.parse(name)
    assert said in str(refused.value)


def test_slices_are_counted_in_devices_and_named_as_the_cloud_does():
    assert topology.parse("v3:16x16").num_devices == 512
    assert topology.parse("2*v5e:16x16").num_devices == 512
    names = {
        "v3:16x16": "v3-512",
        "v4:4x8x8": "v4-512",
        "v5p:4x8x8": "v5p-512",
        "v6e:8x8": "v6e-64",
    }
    assert {name: topology.parse(name).accelerator_type for name in names} == names


def test_the_search_is_the_same_twice_and_divides(absent_slices):
    config = cli.load("sft_7b.gin", workdir=None)
    slice_ = topology.parse("v5e:8x8")
    first, second = ranking.ranked(config, slice_), ranking.ranked(config, slice_)
    assert first == second
    best = first[0]
    assert not list(plan.problems(best, slice_))
    seconds = [ranking.guess(candidate, slice_)[0] for candidate in first]
    assert seconds == sorted(seconds)


def test_the_search_knows_rings_and_keeps_what_fits(absent_slices):
    config = cli.load("sft_70b.gin", workdir=None)
    slice_ = topology.parse("v5e:16x16")
    found = ranking.ranked(config, slice_)
    meshes = [(c.mesh.fsdp, c.mesh.context, c.mesh.tensor) for c in found]
    assert meshes.index((16, 2, 8)) < meshes.index((4, 8, 8))  # the rows' axis closes a ring
    kept = {mesh: c.execution.remat_policy for mesh, c in zip(meshes, found, strict=True)}
    assert kept[16, 2, 8] == "save_projections"
    # Four times as many rows leave no room for products.
    rows_ = dataclasses.replace(config, batch_size=64, micro_batch_size=64)
    full = {c.mesh.sizes(256)["context"]: c for c in ranking.ranked(rows_, slice_)
            if c.mesh.tensor == 8 and c.micro_batch_size == 64}  # fmt: skip
    assert full[2].execution.remat_policy == "nothing_saveable"
    assert all(c.optimizer.mu_dtype == "float32" for c in found)


def test_the_search_lays_context_first_where_that_is_another_mesh(absent_slices):
    slice_ = topology.parse("v3:16x16")
    found = ranking.ranked(cli.load("dpo_70b.gin", workdir=None), slice_)
    by_axes = collections.defaultdict(list)
    for place, candidate in enumerate(found):
        axes = tuple(candidate.mesh.sizes(512).values())
        by_axes[*axes, candidate.micro_batch_size].append((place, candidate.mesh.context_first))
    for (_, _, context, tensor, _), ways in by_axes.items():
        assert len(ways) == len({first for _, first in ways})
        assert len(ways) == 1 or min(context, tensor) > 1
    # Weights are most of what moves: `context` has the links, and so has the table's line.
    assert next(first for _, first in by_axes[1, 1, 64, 8, 3]) is True
    assert slices.SLICES["v3_512"].layout("dpo", "70b").context_first


@pytest.mark.parametrize("policy, told", [("save_gathered", True), ("save_all_gathered", False)])
def test_weights_kept_as_they_were_gathered_are_no_copies_of_others(absent_slices, policy, told):
    """A device's part of o_proj has the shape of all of k_proj there, 64 heads over 8 devices."""
    config = cli.load("dpo_70b.gin", pod="v5p_512", workdir=None)
    execution = dataclasses.replace(config.execution, remat_policy=policy)
    config = dataclasses.replace(config, execution=execution)
    mesh = mesh_lib.make(config.mesh, topology.parse("v5p:4x8x8").devices())
    divided = aot._divided(config, mesh, *step.abstract_state(config, mesh))
    of_attention = {f"model/layers/self_attn/{name}_proj/kernel" for name in "qkvo"}
    of_mlp = {f"model/layers/mlp/{name}_proj/kernel" for name in ("gate", "up", "down")}
    assert of_mlp | {f"model/layers/self_attn/{name}_proj/kernel" for name in "qo"} <= set(divided)
    assert (of_attention <= set(divided)) is told


def test_forms_of_a_layer_that_the_search_compiles(absent_slices):
    config = cli.load("dpo_70b.gin", workdir=None)  # gathered between pairs first, kept, apart
    slice_ = topology.parse("v5p:2x4x4")

    def forms(config, slice_):
        made = (change(config, slice_) for change in ranking.FORMS)
        return [
            (one.mesh.pairs_first, one.execution.row_parts, one.execution.products_apart,
             one.execution.remat_policy)
            for one in made if one is not None
        ]  # fmt: skip

    assert forms(config, slice_) == [
        (True, 2, False, "save_gathered"),
        (True, 2, True, "save_projections"),
        (True, 2, True, "save_kernels"),
        (True, 2, True, "save_all_gathered"),
    ]
    mesh = dataclasses.replace(config.mesh, pairs_first=False)
    execution = dataclasses.replace(config.execution, row_parts=1, remat_policy="nothing_saveable")
    config = dataclasses.replace(config, mesh=mesh, execution=execution)
    # What recomputes for room keeps doing so.
    assert forms(config, slice_) == [
        (False, 1, False, "nothing_saveable"), (True, 2, True, "nothing_saveable")
    ]  # fmt: skip
    # A ring of eight has no pairs, and nothing is gathered where nothing divides.
    eight = dataclasses.replace(mesh, context=32, topology="v5p:4x8x8")
    assert len(forms(dataclasses.replace(config, mesh=eight), topology.parse("v5p:4x8x8"))) == 1
    alone = dataclasses.replace(mesh, context=32, tensor=1)
    execution = dataclasses.replace(config.execution, remat_policy="save_projections")
    config = dataclasses.replace(config, mesh=alone, execution=execution)
    assert [form[-1] for form in forms(config, slice_)] == ["save_projections", "save_kernels"]


def test_nothing_fits_a_slice_that_is_too_small(absent_slices):
    config = cli.load("sft_70b.gin", workdir=None)
    with pytest.raises(ValueError, match="larger slice"):
        ranking.ranked(config, topology.parse("v5e:2x2"))
