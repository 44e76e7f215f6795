"""How long one run of a compiled program takes on a slice that is not there.

The program is walked in its schedule. Compute: a matrix product takes the compiler's own estimate
of cycles or the time of its HBM traffic, whichever is longer; anything else the time of its
traffic; an attention kernel its counted cycles for the pairs of blocks that documents need, and a
product with NF4 weights what follows from counted cycles of its steps.
Interconnect: a collective takes its bytes over the torus links that its group has. A synchronous
collective stops compute; an asynchronous one runs beside it, after those on the same torus axes and
the same SparseCore, and its end waits for what is left. Not in it: contention between hosts,
stragglers, throttling, the input pipeline, and compute and transfers that contend for HBM.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from tulu_jax.parallel import mesh
from tulu_jax.planning import hlo
from tulu_jax.planning.topology import Topology

LATENCY = 1e-6  # seconds of a hop
FETCH = 1e-6  # seconds until the first bytes of a kernel's copy from HBM come
FLAG = 64  # bytes: what is no larger in a copy's shape is its semaphore


@dataclasses.dataclass(kw_only=True)
class Cost:
    """Seconds of one run, by what the device does: `matrix` units, `attention` kernels, `memory`
    traffic, `interconnect` that compute waits for, and `hidden` interconnect beside it (not part
    of the total). `wire` is bytes a device sends by (collective, mesh axes), `top` the largest
    items as (seconds, runs, name, kind)."""

    matrix: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    interconnect: float = 0.0
    hidden: float = 0.0
    wire: dict[tuple[str, str], float] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(float)
    )
    top: list[tuple[float, float, str, str]] = dataclasses.field(default_factory=list)
    unknown: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.matrix + self.attention + self.memory + self.interconnect

    @property
    def binding(self) -> str:
        """What takes the largest part of the time."""
        parts = {
            "matrix units": self.matrix,
            "attention": self.attention,
            "HBM": self.memory,
            "interconnect": self.interconnect,
        }
        return max(parts, key=parts.get)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """Seconds of one call of a kernel: `traffic` of HBM, `first` of it before there is something to
    compute with, `compute`, and `last` of that after the last bytes came."""

    kind: str
    first: float
    compute: float
    last: float
    traffic: float

    @property
    def seconds(self) -> float:
        return FETCH + max(self.first + self.compute, self.traffic + self.last)


def link_seconds(
    kind: str, size: float, members: Sequence[int], places: np.ndarray, topology: Topology
) -> tuple[float, float]:
    """Seconds and bytes sent a device of one collective over the devices `members`.

    `size` is the bytes of the whole buffer. `places` int [devices, 1 + torus axes] is the slice and
    the coordinates of each position of the mesh. The group has the links of `mesh.links`.
    """
    n, hardware = len(members), topology.hardware
    if n == 1:
        return 0.0, 0.0
    spots = places[list(members)]
    if len(np.unique(spots[:, 0])) > 1:  # over the data centre's network
        slices = len(np.unique(spots[:, 0]))
        share = (slices - 1) / slices
        sent = size * share * (2 if kind == "all-reduce" else 1)
        return sent / hardware.dcn, sent
    bandwidth = hardware.link * mesh.links(spots[:, 1:], topology.shape, hardware.wraps)
    hops = sum(len(np.unique(places)) - 1 for places in spots[:, 1:].T)
    if not bandwidth:  # the two cores of a chip
        return size / hardware.bandwidth, 0.0
    share = (n - 1) / n
    if kind == "all-to-all":
        return size * max(share, n / 4) / bandwidth + LATENCY * hops, size * share
    sent = size * share * (2 if kind == "all-reduce" else 1)
    return sent / bandwidth + LATENCY * hops, sent


def permute_seconds(
    size: float, pairs: Sequence[tuple[int, int]], places: np.ndarray, topology: Topology
) -> tuple[float, float]:
    """Seconds and bytes sent a device where the first of each of `pairs` sends `size` bytes to the
    second. Each goes the shorter way along one torus axis after the other, half of it either way
    where both are as long, and the directed link that most pass over binds."""
    hardware, load, hops = topology.hardware, collections.Counter(), 0
    for source, target in pairs:
        here, there = places[source].tolist(), places[target].tolist()
        if here[0] != there[0]:  # over the data centre's network
            return size / hardware.dcn, size
        here, there, far = here[1:], there[1:], 0
        for axis, length in enumerate(topology.shape):
            ahead = there[axis] - here[axis]
            ways = {ahead: 1.0}
            if length % hardware.wraps == 0:
                around = ahead % length
                ways = {around: 1.0} if 2 * around < length else {around - length: 1.0}
                ways = {around: 0.5, -around: 0.5} if 2 * around == length else ways
            for way, part in ways.items():
                step = 1 if way > 0 else -1
                for hop in range(0, way, step):
                    spot = (*here[:axis], (here[axis] + hop) % length, *here[axis + 1 :])
                    load[axis, step, spot] += part
            far += abs(min(ways, key=abs))
            here[axis] = there[axis]
        hops = max(hops, far)
    if not load:  # the two cores of a chip
        return size / hardware.bandwidth, 0.0
    link = hardware.link * hardware.devices  # that of a chip, over which all its devices pass
    return float(size * max(load.values()) / link + LATENCY * hops), size


def _beside(i: hlo.Instruction) -> bool:
    """A fusion that computes while a transfer goes on."""
    return any(name.startswith("async_collective_fusion") for name in i.called)


def _starts(i: hlo.Instruction) -> bool:
    return i.operation.endswith("-start") or "-start" in i.name


def _ends(i: hlo.Instruction) -> bool:
    return i.operation.endswith("-done") or i.name.startswith("async-collective-done")


@dataclasses.dataclass
class Estimator:
    """Costs of the parts of one module.

    `kernel_seconds` gives, of one call of the Mosaic kernel of a name and text, what it is
    ("attention" or "matrix") and its time, or None if that is not known. `dynamic_trips` is how
    often a loop runs whose count depends on data. Of a conditional the longer branch counts, with
    `shorter` the other: greedy decoding takes the one that draws nothing. With `prefetches` what a
    program copies beside its compute into VMEM takes the time of its traffic, as if nothing were
    beside it: where HBM binds that is so. `believed` says of what the compiler's own estimate of
    cycles counts where it is longer than the traffic: of "products", of "all" (for the smallest
    operation it is more than a microsecond), or of "none".
    """

    module: hlo.Module
    topology: Topology
    places: np.ndarray
    axes: Callable[[Sequence[int]], str]
    kernel_seconds: Callable[[str, str], tuple[str, float] | None]
    dynamic_trips: float
    shorter: bool = False
    prefetches: bool = False
    believed: str = "products"

    def __post_init__(self):
        self.shapes = {i.name: i.shape for body in self.module.computations.values() for i in body}
        self.cost = Cost()

    def estimate(self) -> Cost:
        """The cost of the entry computation."""
        self._run(self.module.entry, 1.0)
        self.cost.top.sort(reverse=True)
        return self.cost

    def _run(self, name: str, times: float) -> float:
        """Adds `times` runs of a computation; the seconds of one."""
        now, free = 0.0, collections.Counter()  # when a torus axis or a SparseCore is free again
        ends: dict[str, float] = {}  # when what was started ends, by every name that carries it
        for i in self.module.computations.get(name, []):
            transfers = self._transfers(i)
            carried = max((ends.get(operand, 0.0) for operand in i.operands), default=0.0)
            if carried and i.operation in ("get-tuple-element", "tuple", "bitcast"):
                ends[i.name] = carried
            elif _ends(i):
                waited = max(0.0, carried - now)
                self.cost.interconnect += waited * times
                self.cost.hidden -= waited * times
                now += waited
            elif transfers and not _beside(i):
                end, spent = now, 0.0
                for inner in transfers:
                    seconds, taken = self._transfer(i, inner, times)
                    spent += seconds
                    end = max([end, *(free[one] for one in taken)]) + seconds
                    free |= dict.fromkeys(taken, end)
                if _starts(i):
                    ends[i.name] = end
                    self.cost.hidden += spent * times
                else:
                    self.cost.interconnect += (end - now) * times
                    now = end
            elif transfers:
                ends[i.name] = carried
                now += self._compute(i, times)
            elif i.operation == "while":
                body = i.attribute(r"body=%([\w.\-]+)")
                trips = self.module.trip_count(i)
                trips = self.dynamic_trips if trips is None else trips
                now += trips * self._run(body, times * trips)
            elif i.operation == "conditional":
                now += self._run(self._usual(i), times)
            elif i.operation == "call":
                now += sum(self._run(called, times) for called in i.called)
            else:
                now += self._compute(i, times)
        return now

    def _usual(self, conditional: hlo.Instruction) -> str:
        """The branch taken: the one without a kernel (the other is the guard's), or the longest."""
        branches = [
            (
                any(i.operation == "custom-call" for i in self.module.computations[name]),
                len(self.module.computations[name]) * (1 if self.shorter else -1),
                name,
            )
            for name in conditional.called
        ]
        return min(branches)[2]

    def _transfers(self, i: hlo.Instruction) -> list[hlo.Instruction]:
        """The collectives that `i` is, starts or holds."""
        if i.collective:
            return [i]
        if i.operation not in ("fusion", "async-start", "call-start"):
            return []
        found = {}
        for inner in self.module.inside(i):
            if inner.collective:
                found.setdefault((inner.collective, inner.attribute(r"channel_id=(\d+)")), inner)
        return list(found.values())

    def _transfer(self, outer, i: hlo.Instruction, times: float) -> tuple[float, list[str]]:
        """Seconds of a collective, and what only one at a time may have: the links of torus axes,
        the SparseCore that runs it."""
        members = hlo.group(i, len(self.places))
        sizes = hlo.shape_bytes(i.shape)
        if i.operation.endswith("-start"):  # its shape holds what goes in beside what comes out
            size = max(sizes, default=0.0)
        else:
            size = sum(sizes) * (len(members) if i.operation == "reduce-scatter" else 1)
        pairs = hlo.pairs(i) if i.collective == "collective-permute" else []
        if pairs:
            seconds, sent = permute_seconds(size, pairs, self.places, self.topology)
        else:
            seconds, sent = link_seconds(i.collective, size, members, self.places, self.topology)
        axes = self.axes(members)
        self.cost.wire[i.collective, axes] += sent * times
        self.cost.top.append((seconds * times, times, outer.name, f"{i.collective} over {axes}"))
        differ = (
            np.diff(self.places[np.array(group)], axis=0).any(0) for group in pairs or [members]
        )
        taken = [f"axis {n}" for n, moves in enumerate(np.any(list(differ), axis=0)) if moves]
        return seconds, taken + [f"core {n}" for n in outer.cores]

    def _compute(self, i: hlo.Instruction, times: float) -> float:
        hardware = self.topology.hardware
        if i.operation == "custom-call":
            target = i.attribute(r'custom_call_target="([^"]*)"')
            if target != "tpu_custom_call":
                return 0.0
            known = self.kernel_seconds(i.name, i.text)
            if known is None:
                self.cost.unknown[i.name] = times
                return 0.0
            kind, seconds = known
            if kind == "matrix":
                self.cost.matrix += seconds * times
            else:
                self.cost.attention += seconds * times
            self.cost.top.append((seconds * times, times, i.name, f"{kind} kernel"))
            return seconds
        if self.prefetches and i.operation in ("copy-start", "slice-start", "async-start"):
            # The shape holds what is copied, and beside it what it is of: that, or more.
            sizes = [size for size in hlo.shape_bytes(i.shape) if size > FLAG]
            seconds = min(sizes, default=0.0) / hardware.bandwidth
            self.cost.memory += seconds * times
            self.cost.top.append((seconds * times, times, i.name, "memory, fetched ahead"))
            return seconds
        cycles = i.cycles
        if not cycles:
            return 0.0
        traffic = hlo.moved_bytes(self.module, self.shapes, i) / hardware.bandwidth
        product = i.operation in ("dot", "convolution") or any(
            inner.operation in ("dot", "convolution") for inner in self.module.inside(i)
        )
        if self.believed == "all" and not product:
            traffic = max(traffic, cycles / hardware.clock)
        if product and self.believed != "none" and cycles / hardware.clock > traffic:
            self.cost.matrix += cycles / hardware.clock * times
            seconds, kind = cycles / hardware.clock, "matrix product"
        else:
            self.cost.memory += traffic * times
            seconds, kind = traffic, "memory"
        self.cost.top.append((seconds * times, times, i.name, kind))
        return seconds


def mesh_axes(sizes: dict[str, int]) -> Callable[[Sequence[int]], str]:
    """Names of the mesh axes along which the devices of a group differ, e.g. 'fsdp x context'."""
    shape = tuple(sizes.values())

    def axes(members: Sequence[int]) -> str:
        index = np.array(np.unravel_index(np.asarray(members), shape))
        differ = [name for name, row in zip(sizes, index, strict=True) if len(np.unique(row)) > 1]
        return " x ".join(differ) or "itself"

    return axes


def ideal_seconds(flops: float, topology: Topology) -> float:
    """Seconds of `flops` at the peak of all devices."""
    return flops / (topology.hardware.peak * topology.num_devices)
