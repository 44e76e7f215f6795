"""Optimized TPU programs as text: their instructions, loops, groups of devices and bytes."""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    *("collective-permute", "ragged-all-to-all"),
)
_BYTES = {"pred": 1.0, "s4": 0.5, "u4": 0.5, "s64": 8.0, "u64": 8.0, "f64": 8.0, "c64": 8.0}


def _element_bytes(kind: str) -> float:
    if kind in _BYTES:
        return _BYTES[kind]
    digits = re.search(r"\d+", kind)
    return int(digits[0]) / 8 if digits else 0.0


def shape_bytes(shape: str, *, hbm: bool = False) -> list[float]:
    """Bytes of each array in an HLO shape; with `hbm` those in VMEM, `S(1)`, count as 0."""
    found = re.findall(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?", shape)
    return [
        0.0
        if hbm and "S(" in layout
        else _element_bytes(kind) * math.prod(int(n) for n in sizes.split(",") if n)
        for kind, sizes, layout in found
    ]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`text` is what follows the shape: operation, operands, attributes.

    TPUs scatter a sum by a fusion of an all-reduce and a slice, called all-reduce-scatter, which
    sends what a reduce-scatter does; the operation of that all-reduce is "all-reduce-scatter" here.
    """

    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    text: str

    @property
    def collective(self) -> str | None:
        """The collective that this is or starts."""
        base = self.operation.removesuffix("-start")
        base = "reduce-scatter" if base == "all-reduce-scatter" else base
        return base if base in COLLECTIVES else None

    @property
    def cycles(self) -> float:
        """The compiler's own estimate, 0 where it makes none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return float(found[1]) if found else 0.0

    @property
    def called(self) -> list[str]:
        """Computations that this instruction runs."""
        names = re.findall(r"(?:calls|to_apply|body|true_computation|false_computation)="
                           r"%([\w.\-]+)", self.text)  # fmt: skip
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.text)
        return names + (re.findall(r"%([\w.\-]+)", branches[1]) if branches else [])

    @property
    def cores(self) -> list[str]:
        """The SparseCores that run this instruction; none where it does not run on them."""
        found = self.attribute(r'"sparse_core_config":.*?"core_ids":\[([^\]]*)\]') or ""
        return re.findall(r"\d+", found)

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.text)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name, in schedule order, and the name of the entry computation."""

    computations: dict[str, list[Instruction]]
    entry: str

    def trip_count(self, loop: Instruction) -> int | None:
        """How often the body of `loop` runs; None where that depends on data."""
        known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
        if known:
            return int(known)
        condition = self.computations.get(loop.attribute(r"condition=%([\w.\-]+)") or "", [])
        constants = {
            i.name: int(value)
            for i in condition
            if (value := i.attribute(r"^\s*constant\((-?\d+)\)"))
        }
        for i in condition:  # loops of scan start at 0 and step by 1
            if i.operation == "compare":
                for operand in i.operands:
                    if operand in constants:
                        inclusive = i.attribute(r"direction=(\w+)") in ("LE", "GE")
                        return constants[operand] + inclusive
        return None

    def inside(self, instruction: Instruction) -> list[Instruction]:
        """All instructions of the computations that `instruction` calls, nested ones included."""
        seen, stack, found = set(), list(instruction.called), []
        while stack:
            name = stack.pop()
            if name not in seen:
                seen.add(name)
                body = self.computations.get(name, [])
                found += body
                stack += [called for i in body for called in i.called]
        return found


def parse(text: str) -> Module:
    """The module of a compiled program's text."""
    computations: dict[str, list[Instruction]] = {}
    entry = current = ""
    for line in text.splitlines():
        if not line.startswith(" "):
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
            if head:
                current = head[2]
                computations[current] = []
                entry = current if head[1] else entry
            continue
        found = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)", line)
        if not found or not current:
            continue
        shape, rest = _split_shape(found[2])
        operation = re.match(r"\s*([a-z][\w\-]*)\((.*)", rest)
        if operation:
            arguments = re.sub(r"/\*.*?\*/", "", operation[2].split(")")[0])
            operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
            kind = operation[1]
            if kind == "all-reduce" and current.startswith("all-reduce-scatter"):
                kind = "all-reduce-scatter"
            computations[current].append(Instruction(found[1], shape, kind, operands, rest.strip()))
    return Module(computations, entry)


def _split_shape(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    return text, ""


def pairs(instruction: Instruction) -> list[tuple[int, int]]:
    """Positions in the mesh of who sends and who receives, of every pair of a permutation."""
    listed = instruction.attribute(r"source_target_pairs=\{((?:\{\d+,\d+\},?\s*)+)\}") or ""
    return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", listed)]


def group(instruction: Instruction, num_devices: int) -> Sequence[int]:
    """Positions in the mesh of the devices of the first group of a collective."""
    if instruction.collective == "collective-permute":
        pair = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", instruction.text)
        return [int(pair[1]), int(pair[2])] if pair else [0]
    listed = instruction.attribute(r"replica_groups=\{\{([\d,]*)\}")
    if listed:
        return [int(n) for n in listed.split(",")]
    tiled = re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", instruction.text
    )
    if tiled:
        ids = np.arange(num_devices).reshape([int(n) for n in tiled[3].split(",")])
        ids = ids.transpose([int(n) for n in tiled[4].split(",")]) if tiled[4] else ids
        return ids.reshape(int(tiled[1]), int(tiled[2]))[0].tolist()
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\]"
        r"(?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))?\s*\{([^}]*)\}",
        instruction.text,
    )
    if mesh:
        sizes = {k: int(n) for k, n in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        ids = np.arange(num_devices)
        if mesh[2]:
            ids = ids.reshape([int(n) for n in mesh[2].split(",")])
            ids = ids.transpose([int(n) for n in mesh[3].split(",")])
        ids = ids.reshape(tuple(sizes.values()))
        chosen = re.findall(r"'(\w+)'", mesh[4])
        index = tuple(slice(None) if name in chosen else 0 for name in sizes)
        return ids[index].reshape(-1).tolist()
    return list(range(num_devices))


def moved_bytes(module: Module, shapes: dict[str, str], instruction: Instruction) -> float:
    """HBM bytes that a fusion or a plain operation reads and writes; slices count as such."""

    def outside(shape: str) -> float:
        return sum(shape_bytes(shape, hbm=True))

    if instruction.operation != "fusion" or not instruction.called:
        return outside(instruction.shape) + sum(
            outside(shapes.get(name, "")) for name in instruction.operands
        )
    fused = instruction.called[0]
    result, written = outside(instruction.shape), _written(module, shapes, fused)
    total = result if written is None else min(result, written)
    for number, operand in enumerate(instruction.operands):
        whole = outside(shapes.get(operand, ""))
        sliced = _sliced(module, fused, number)
        total += whole if sliced is None else min(whole, sliced)
    return total


def _written(module: Module, shapes: dict[str, str], computation: str) -> float | None:
    """Bytes of what a fusion updates in place; None if it writes its whole result."""
    for i in module.computations.get(computation, []):
        if i.operation == "dynamic-update-slice" and len(i.operands) > 1:
            return sum(shape_bytes(shapes.get(i.operands[1], "")))
    return None


def _sliced(module: Module, computation: str, number: int) -> float | None:
    """Bytes that a computation reads of its parameter `number`, if it only slices it, or updates it
    in place; None if it reads all of it."""
    body = module.computations.get(computation, [])
    name = next((i.name for i in body if i.attribute(r"^parameter\((\d+)\)") == str(number)), None)
    total = 0.0
    for use in body:
        if name is None or name not in use.operands:
            continue
        if use.operation in ("dynamic-slice", "slice"):
            total += sum(shape_bytes(use.shape))
        elif use.operation == "dynamic-update-slice" and use.operands[0] == name:
            continue
        elif use.operation == "fusion" and use.called:
            inner = [
                _sliced(module, use.called[0], n) for n, x in enumerate(use.operands) if x == name
            ]
            if None in inner:
                return None
            total += sum(inner)
        else:
            return None
    return total
