"""What the estimate takes to run beside what, held against programs that the compiler scheduled.

Each program is a loop of four layers over four devices, of two products or one and what moves for
them, compiled with the options of a run. What its schedule must say is worked out by hand from the
seconds of one product and of one transfer.
"""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from tulu_jax.models import layers
from tulu_jax.parallel import compiler, sharding
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.planning import aot, cost, hlo, topology
from tulu_jax.quant import in_transit

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='needs libtpu: pip install "jax[tpu]"'
)

LAYERS, DEVICES, ROWS, WIDTH = 4, 4, 2048, 4096
SLICES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
ACTIVATION, WEIGHT = 2.0 * ROWS * WIDTH, 2.0 * WIDTH * WIDTH  # bytes: of a device, and whole
RING = [(n, (n + 1) % DEVICES) for n in range(DEVICES)]
SHARD, WHOLE = jax.P("fsdp"), jax.P()
SHARDS = jax.P(None, "fsdp")


def gathers(x, a, b):
    """Two weights a layer, each gathered where it is used."""

    def layer(x, weights):
        for weight in weights:
            x = jnp.tanh(x @ sharding.gather(weight, 0, "embed"))
        return x, None

    return jax.lax.scan(layer, x, (a, b))[0]


def coded_gathers(x, a, b):
    """The same in codes (`layers.from_codes`)."""

    def layer(x, weights):
        for weight in weights:
            x = jnp.tanh(x @ layers.from_codes(weight, *in_transit.encode(weight)))
        return x, None

    return jax.lax.scan(layer, x, (a, b))[0]


def scatters(x, g):
    """Two gradients a layer, each summed over the devices and scattered."""

    def layer(x, g):
        pairs = ((x, g), (g, x))
        sums = [sharding.scatter_sum(jnp.einsum("bd,bf->df", *pair), 0, "embed") for pair in pairs]
        return jnp.tanh(x + g), sums

    return jax.lax.scan(layer, x, g)[1]


def sums(x, g):
    """A gradient a layer, summed whole."""

    def layer(x, g):
        return jnp.tanh(x + g), jax.lax.psum(jnp.einsum("bd,bf->df", x, g), "fsdp")

    return jax.lax.scan(layer, x, g)[1]


def permutes(x, a, b):
    """A permute that nothing needs before the second product."""

    def layer(x, weights):
        moved = jax.lax.ppermute(x, "fsdp", RING)
        return jnp.tanh(moved @ weights[1] + jnp.tanh(x @ weights[0])), None

    return jax.lax.scan(layer, x, (a, b))[0]


def rows_of_two_parts(x, a, b, *, pairs_first):
    """Two products a layer, of rows that `tensor` divides, in two parts (`layers.Block`)."""
    how = dict(pairs_first=pairs_first)

    def layer(x, weights):
        parts = jnp.split(x, 2, axis=1)
        gathered = [sharding.gather(part, 1, "tensor", **how) for part in parts]
        outs = [jnp.tanh(part @ weights[0]) @ weights[1] for part in gathered]
        own = [sharding.scatter_sum(out, 1, "tensor", **how) for out in outs]
        return jnp.concatenate([part + one for part, one in zip(parts, own, strict=True)], 1), None

    return jax.lax.scan(layer, x, (a, b))[0]


ROW, STACK, WEIGHTS = (
    (DEVICES * ROWS, WIDTH),
    (LAYERS, DEVICES * ROWS, WIDTH),
    (LAYERS, WIDTH, WIDTH),
)
PROGRAMS = {
    gathers: ([(ROW, SHARD), (WEIGHTS, SHARDS), (WEIGHTS, SHARDS)], SHARD),
    coded_gathers: ([(ROW, SHARD), (WEIGHTS, SHARDS), (WEIGHTS, SHARDS)], SHARD),
    scatters: ([(ROW, SHARD), (STACK, SHARDS)], [SHARDS, SHARDS]),
    sums: ([(ROW, SHARD), (STACK, SHARDS)], WHOLE),
    permutes: ([(ROW, SHARD), (WEIGHTS, WHOLE), (WEIGHTS, WHOLE)], SHARD),
}


@dataclasses.dataclass(frozen=True)
class Priced:
    """A compiled program and its cost; `product` and `moved` are seconds of one of each."""

    module: hlo.Module
    cost: cost.Cost
    product: float
    moved: float

    def loop(self) -> list[hlo.Instruction]:
        """The body of the loop over layers, in its schedule."""
        (loop,) = (i for i in self.module.computations[self.module.entry] if i.operation == "while")
        return self.module.computations[loop.attribute(r"body=%([\w.\-]+)")]

    @property
    def starts(self) -> list[hlo.Instruction]:
        """Of transfers of a megabyte or more that run beside what follows."""
        local = ("custom-call", "copy-start", "slice-start")
        return [
            i
            for i in self.loop()
            if cost._starts(i) and i.operation not in local and max(hlo.shape_bytes(i.shape)) > 1e6
        ]

    @property
    def beside(self) -> list[hlo.Instruction]:
        """The products that have a transfer begun before them and waited for behind them."""
        under_way, found, starts = 0, [], self.starts
        for i in self.loop():
            local = i.operation in ("custom-call", "copy-done", "slice-done")
            under_way += (i in starts) - (cost._ends(i) and not local)
            inner = (i, *self.module.inside(i))
            product = any(one.operation in ("dot", "convolution") for one in inner)
            found += [i] * (under_way > 0 and product)
        return found


def compiled(slice_, mesh, program, arguments, out) -> tuple[hlo.Module, cost.Cost]:
    with jax.set_mesh(mesh):
        run = jax.shard_map(
            program, in_specs=tuple(s for _, s in arguments), out_specs=out, check_vma=False
        )
        abstract = [
            jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec))
            for shape, spec in arguments
        ]
        lowered = jax.jit(run).trace(*abstract).lower(lowering_platforms=("tpu",))
        options = compiler.options(mesh.devices.flat[0].device_kind)
        made = aot.compiled_for(lowered, slice_, mesh, options)
    module, places = hlo.parse(made["hlo"]), aot.places(mesh, slice_)
    axes = cost.mesh_axes(dict(mesh.shape))
    found = cost.Estimator(module, slice_, places, axes, lambda name, text: None, 1.0).estimate()
    return module, found


def priced(chip, program, kind, size) -> Priced:
    slice_ = topology.parse(SLICES[chip])
    mesh = mesh_lib.make(mesh_lib.MeshConfig(fsdp=DEVICES), slice_.devices())
    module, found = compiled(slice_, mesh, program, *PROGRAMS[program])
    places = aot.places(mesh, slice_)
    seconds = [s / runs for s, runs, _, what in found.top if what == "matrix product"]
    if kind == "collective-permute":
        moved, _ = cost.permute_seconds(size, RING, places, slice_)
    else:
        moved, _ = cost.link_seconds(kind, size, range(DEVICES), places, slice_)
    return Priced(module, found, min(seconds), moved)


def of_chips(*fast, slow=()):
    return pytest.mark.parametrize(
        "chip", [*fast, *(pytest.param(chip, marks=pytest.mark.slow) for chip in slow)]
    )


@of_chips("v5e", slow=["v4"])
def test_a_gather_is_cut_into_the_product_before_its_own(absent_slices, chip):
    """Where no SparseCore moves data: of a layer's two gathers the first is waited for."""
    found = priced(chip, gathers, "all-gather", WEIGHT)
    assert any(map(cost._beside, found.beside))
    assert found.product > found.moved  # so it hides
    assert found.cost.interconnect == pytest.approx(LAYERS * found.moved, rel=0.02)
    assert found.cost.hidden == pytest.approx(LAYERS * found.moved, rel=0.02)


@of_chips(slow=["v6e"])
def test_sparse_cores_gather_beside_a_product(absent_slices, chip):
    """Both gathers of a layer start before its first product; on the same links they follow one
    another. So products hide what they take of the second."""
    found = priced(chip, gathers, "all-gather", WEIGHT)
    assert len(found.starts) == 2 and all(i.cores for i in found.starts) and found.beside
    total = 2 * LAYERS * found.moved
    assert found.cost.interconnect + found.cost.hidden == pytest.approx(total, rel=0.02)
    hides = LAYERS * found.product
    assert hides * 0.95 < found.cost.hidden < hides + found.cost.memory


@of_chips("v5e", slow=["v6e"])
def test_codes_are_priced_by_their_bytes(absent_slices, chip):
    """Gathers of codes are of int8 in the compiled program, and what is sent is a byte a weight and
    the scales."""
    found = priced(chip, coded_gathers, "all-gather", WEIGHT)
    inside = [i for body in found.module.computations.values() for i in body]
    assert any(i.collective == "all-gather" and "s8[" in i.shape for i in inside)
    sent = 2 * LAYERS * WIDTH * (WIDTH + 2) * (DEVICES - 1) / DEVICES
    assert sum(found.cost.wire.values()) == pytest.approx(sent, rel=1e-6)


@of_chips("v5e", slow=["v4"])
def test_a_scattered_sum_stops_compute(absent_slices, chip):
    """Where no SparseCore moves data."""
    found = priced(chip, scatters, "reduce-scatter", WEIGHT)
    assert not found.starts
    assert found.cost.interconnect == pytest.approx(2 * LAYERS * found.moved, rel=0.02)


@of_chips(slow=["v5p", "v6e"])
def test_sparse_cores_scatter_beside_the_next_product(absent_slices, chip):
    found = priced(chip, scatters, "reduce-scatter", WEIGHT)
    assert len(found.starts) == 2 and all(i.cores for i in found.starts) and found.beside
    total = 2 * LAYERS * found.moved
    assert found.cost.interconnect + found.cost.hidden == pytest.approx(total, rel=0.05)
    assert found.cost.hidden > 0.9 * LAYERS * min(found.product, found.moved)


@of_chips("v5e", slow=["v4", "v5p", "v6e"])
def test_a_sum_that_stays_whole_stops_compute(absent_slices, chip):
    found = priced(chip, sums, "all-reduce", WEIGHT)
    assert not found.starts
    assert found.cost.interconnect == pytest.approx(LAYERS * found.moved, rel=0.02)
    assert found.cost.hidden == 0


@of_chips("v5e", slow=["v4", "v5p", "v6e"])
def test_a_permute_runs_beside_a_product(absent_slices, chip):
    """What it takes longer than the product is waited for."""
    found = priced(chip, permutes, "collective-permute", ACTIVATION)
    assert found.starts and found.beside
    assert found.cost.interconnect + found.cost.hidden == pytest.approx(
        LAYERS * found.moved, rel=0.02
    )
    over = max(0.0, found.moved - found.product)
    assert found.cost.interconnect == pytest.approx(LAYERS * over, abs=0.05 * LAYERS * found.moved)


def test_over_a_line_of_two_and_a_ring_rows_move_beside_products_between_pairs_first(
    absent_slices,
):
    """Over both at once the compiler gathers nothing beside compute."""
    slice_ = topology.parse("v5p:2x4x1")
    rows = ((1, DEVICES * ROWS, WIDTH), jax.P(None, "tensor"))
    up = ((LAYERS, WIDTH, 4 * WIDTH), jax.P(None, None, "tensor"))
    down = ((LAYERS, 4 * WIDTH, WIDTH), jax.P(None, "tensor"))
    found = {}
    for pairs_first in (False, True):
        config = mesh_lib.MeshConfig(data=1, fsdp=1, tensor=8, pairs_first=pairs_first)
        mesh = mesh_lib.make(config, slice_.devices())
        program = functools.partial(rows_of_two_parts, pairs_first=pairs_first)
        _, found[pairs_first] = compiled(slice_, mesh, program, [rows, up, down], rows[1])
    assert found[True].hidden > 2 * found[False].hidden
    assert found[True].interconnect < 0.75 * found[False].interconnect
    sent = {kind for kind, _ in found[True].wire}
    assert sent == {"all-gather", "reduce-scatter", "collective-permute"}
