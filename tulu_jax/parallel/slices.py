"""TPU slices by name: their chips, and the mesh that a run of a stage and size takes on them.

A run names its slice in one line, `SLICE = 'v5p_512'`, or `--pod=v5p_512`; 'any' is whatever
devices there are (`anywhere`). Slices are called as Google calls them, by cores on v3, v4 and v5p,
by chips on v5e and v6e. One more slice, or one more size or stage on it, is a line here; a run may
also set a mesh itself, as `python -m tulu_jax.dryrun --plan` writes it.
"""

import dataclasses
import math
from collections.abc import Mapping

from tulu_jax import validation
from tulu_jax.parallel import sharding
from tulu_jax.parallel.mesh import AXES, DecodingMesh, MeshConfig

ANY = "any"
SIZES = {"7b": 6.74e9, "13b": 13.0e9, "34b": 33.7e9, "70b": 69.0e9}  # parameters
NEAR = 1.5  # times the parameters of a size, or a part of them, are laid out as it is
# Fields of a layout that a run takes unless it sets them.
OF_EXECUTION = ("remat_policy", "row_parts", "products_apart")
ALL, SMALL, LARGEST = tuple(SIZES), ("7b", "13b"), ("70b",)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Mesh axes besides `data`, rows of a forward (None: the whole batch), what a layer keeps and
    how it takes its rows (OF_EXECUTION: `config.ExecutionConfig`), and how the mesh is laid
    (`mesh.MeshConfig`)."""

    fsdp: int
    context: int
    tensor: int
    micro_batch_size: int | None = None
    remat_policy: str = "save_projections"
    row_parts: int = 1
    products_apart: bool = False
    context_first: bool = False
    pairs_first: bool = False


@dataclasses.dataclass(frozen=True)
class Slice:
    """A topology, the sizes that fit on it, and layouts by stage; one for a stage and size, such as
    'dpo_7b', stands before that of the stage. Stages are 'sft', 'dpo', and these after 'lora_' and
    'qlora_'."""

    topology: str
    sizes: tuple[str, ...]
    layouts: Mapping[str, Layout | None]

    def layout(self, stage: str, size: str | None) -> Layout | None:
        """The layout of a run of `stage`, such as 'sft', and `size`; None where there is none."""
        if size not in self.sizes:
            return None
        return self.layouts.get(f"{stage}_{size}", self.layouts.get(stage))


def _apart(layout: Layout) -> Layout:
    return dataclasses.replace(layout, products_apart=True)


def _rows_kept(layout: Layout) -> Layout:
    """What was gathered over `tensor` is kept for the backward pass."""
    return dataclasses.replace(layout, remat_policy="save_gathered")


def _weights_kept(layout: Layout) -> Layout:
    """Weights are kept as they were gathered."""
    return dataclasses.replace(layout, remat_policy="save_kernels")


def _both_kept(layout: Layout) -> Layout:
    return dataclasses.replace(layout, remat_policy="save_all_gathered")


# 16 rows of SFT divide over fsdp; 3 of DPO over nothing, so that each device has a piece of every
# row. Heads bound tensor: 32 at 7B, 40 at 13B, 8 key/value heads at 34B and 70B.
_SFT, _DPO, _DPO_7B = Layout(16, 2, 8, row_parts=2), Layout(1, 32, 8), Layout(1, 16, 16)
# Nobody has compiled 34B DPO.
_256 = {"dpo_34b": None, "sft": _SFT, "dpo": _both_kept(_DPO), "dpo_7b": _both_kept(_DPO_7B)}
# On 32 chips of v5p `tensor` 8 lies over a line of two and a ring.
_SFT_32 = Layout(16, 1, 2, row_parts=2)
_DPO_32 = _rows_kept(Layout(1, 4, 8, row_parts=2, pairs_first=True))
_SFT_64 = Layout(16, 1, 4, row_parts=2)
_WIDER = {"sft_7b": _rows_kept(Layout(16, 1, 16, row_parts=2)), "sft_13b": _rows_kept(_SFT)}


def _few(chips: int) -> Layout:
    """A row a chip, of which all divide the weights."""
    return Layout(chips, 1, 1, micro_batch_size=chips, remat_policy="nothing_saveable")


_ALONE, _8 = _few(1), _few(8)
_OF_8 = {f"{kind}_{stage}": _8 for kind in ("lora", "qlora") for stage in ("sft", "dpo")}
# A row a chip leaves 13 GiB of inputs of 80 layers on each; of rows in four pieces it is 3.
_PIECES = dataclasses.replace(_8, fsdp=2, context=4, micro_batch_size=2)

SLICES = {
    "v3_256": Slice(
        "v3:8x16", ALL,
        _256 | {"sft_70b": dataclasses.replace(_SFT, remat_policy="save_gate")}
        | {"dpo_7b": _DPO_7B, "dpo_13b": _rows_kept(_DPO)}
        | {"dpo_70b": _rows_kept(Layout(1, 32, 8, context_first=True))},
    ),
    "v3_512": Slice(
        "v3:16x16", LARGEST,
        {"sft": Layout(16, 4, 8), "dpo": _rows_kept(Layout(1, 64, 8, context_first=True))},
    ),
    "v4_512": Slice(
        "v4:4x8x8", ALL,
        _256 | {"sft": _apart(_SFT), "sft_34b": _SFT, "sft_13b": _apart(_weights_kept(_SFT))}
        | {"dpo_7b": _rows_kept(_DPO_7B), "dpo_13b": _rows_kept(_DPO)}
        | {"dpo_70b": _apart(_both_kept(_DPO))},
    ),
    "v5e_256": Slice("v5e:16x16", ALL, _256 | _WIDER | {"dpo_70b": _DPO}),
    "v5p_64": Slice(
        "v5p:2x4x4", ALL,
        {"sft_34b": None, "sft_70b": None, "dpo_34b": None}
        | {"sft": _apart(_weights_kept(_SFT_32)), "sft_7b": _apart(_both_kept(_SFT_32))}
        | {"dpo": _DPO_32, "dpo_70b": _apart(_DPO_32)},
    ),
    "v5p_128": Slice(
        "v5p:4x4x4", LARGEST,
        {"sft": _apart(Layout(16, 1, 4, row_parts=2)), "dpo": _apart(_both_kept(Layout(1, 16, 4)))},
    ),
    "v5p_512": Slice(
        "v5p:4x8x8", ALL,
        _256 | {"sft": _apart(_weights_kept(_SFT)), "sft_7b": _weights_kept(_SFT)}
        | {"dpo": _apart(_both_kept(_DPO)), "dpo_7b": _apart(_both_kept(_DPO_7B))},
    ),
    "v6e_64": Slice(
        "v6e:8x8", SMALL,
        {"sft": _SFT_64, "sft_7b": _both_kept(_SFT_64)}
        | {"dpo": _both_kept(Layout(1, 8, 8)), "dpo_7b": _both_kept(Layout(1, 4, 16))},
    ),
    "v6e_256": Slice("v6e:16x16", ALL, _256 | _WIDER),
    # Adapters: rows of 4,096 one by one, on few chips.
    "v4_2": Slice("v4:1x1x1", SMALL, {"qlora_sft": _ALONE, "lora_sft_7b": _ALONE}),
    "v5e_1": Slice("v5e:1x1", ("7b",), {"qlora_sft": _ALONE, "qlora_dpo": _ALONE}),
    "v5e_8": Slice(
        "v5e:2x4", ALL, _OF_8 | {"qlora_sft_70b": _PIECES, "qlora_dpo_70b": _PIECES}
    ),
    "v5p_2": Slice("v5p:1x1x1", ALL, {"qlora_sft": _ALONE, "lora_sft_7b": _ALONE}),
    "v6e_1": Slice("v6e:1x1", SMALL, {"qlora_sft": _ALONE, "lora_sft_7b": _ALONE}),
    "v6e_4": Slice("v6e:2x2", ALL, {"qlora_sft": _few(4), "qlora_dpo": _few(4)}),
    "v6e_8": Slice("v6e:2x4", ALL, _OF_8),
    # For many rows an update, as the benchmarks have: weights are gathered ring by ring. On v5p
    # products bind then, and halves of them are 1.4 % slower.
    "v5p_512_wide": Slice(
        "v5p:4x8x8", LARGEST,
        {"sft": _apart(Layout(64, 2, 2, micro_batch_size=128))},
    ),
    "v6e_256_wide": Slice(
        "v6e:16x16", LARGEST,
        {"sft": _apart(Layout(16, 8, 2, 256, "nothing_saveable", row_parts=2))},
    ),
}  # fmt: skip


def size_of(num_params: int) -> str | None:
    """The size in SIZES that a model is laid out as; None where it is near none."""
    apart = {size: abs(math.log(max(num_params, 1) / known)) for size, known in SIZES.items()}
    nearest = min(apart, key=apart.get)
    return nearest if apart[nearest] <= math.log(NEAR) else None


def known(*, stage: str, size: str | None) -> list[str]:
    """The names of the slices that have a layout for `stage` and `size`."""
    return [name for name, slice_ in SLICES.items() if slice_.layout(stage, size)]


def find(name: str, *, num_params: int, stage: str) -> tuple[MeshConfig, Layout]:
    """The mesh and the layout of a run of `stage`, such as 'sft', on the slice `name`.

    Raises `UsageError` with the nearest name, and the slices of such a run.
    """
    size, slice_ = size_of(num_params), SLICES.get(str(name))
    layout = slice_.layout(stage, size) if slice_ else None
    if layout is not None:
        axes = dict(fsdp=layout.fsdp, context=layout.context, tensor=layout.tensor)
        laid = dict(context_first=layout.context_first, pairs_first=layout.pairs_first)
        return MeshConfig(topology=slice_.topology, **axes, **laid), layout
    what = f"{size} {stage}" if size else f"a model of {num_params:,} parameters"
    found = f"has no layout for {what}" if slice_ else "is not known"
    near = "" if slice_ else validation.nearest(str(name), [ANY, *SLICES])
    raise validation.UsageError(
        f"slice = {name!r} {found}{near}; slices for {what} are "
        f"{[ANY, *known(stage=stage, size=size)]}, and `dryrun --plan` finds a mesh for another"
    )


def anywhere(num_devices: int, sizes: Mapping[str, int]) -> MeshConfig:
    """The mesh of `num_devices` that divides `sizes`, by logical axis as in `sharding.AXIS_RULES`.

    Of all that do it has most `fsdp`, of these most `tensor`, then most `context`; `data` takes
    what is left. Raises `UsageError` with the sizes, and numbers of devices that divide them.
    """
    found = _divided(num_devices, sizes)
    if found is None:
        fewer = [n for n in range(1, num_devices) if _divided(n, sizes)]
        raise validation.UsageError(
            f"{num_devices} devices divide no mesh over {dict(sizes)}; expected one of {fewer} "
            "devices, or other sizes"
        )
    return MeshConfig(**found)


def resident(num_devices: int, sizes: Mapping[str, int]) -> MeshConfig:
    """The mesh of `num_devices` on which a decoder's weights stay where they are: each device
    multiplies its part of every weight, and only activations move.

    `tensor` is the most that divides heads and the MLP. Where a device has one key/value head then,
    `group` divides the query heads that share it. `context` is the rest, over which the residual
    is divided. Sizes as those of `anywhere`; raises `UsageError` where they do not divide.
    """
    divisors = [n for n in range(num_devices, 0, -1) if num_devices % n == 0]
    for tensor in divisors:
        for group in divisors if tensor == sizes["kv_heads"] else [1]:
            context, rest = divmod(num_devices, tensor * group)
            axes = dict(data=1, fsdp=1, context=context, tensor=tensor)
            axes |= {sharding.GROUP: group} if group > 1 else {}
            if rest == 0 and all(
                size % sharding.shards(axis, axes)[1] == 0 for axis, size in sizes.items()
            ):
                return DecodingMesh(**axes) if group > 1 else MeshConfig(**axes)
    raise validation.UsageError(
        f"{num_devices} devices cannot hold the weights of sizes {dict(sizes)} in equal parts; "
        "expected a number of devices that divides them"
    )


def _divided(num_devices: int, sizes: Mapping[str, int]) -> dict[str, int] | None:
    """The axes of `anywhere`, or None."""
    divisors = [n for n in range(num_devices, 0, -1) if num_devices % n == 0]
    for fsdp in divisors:
        for tensor in divisors:
            for context in divisors:
                data, rest = divmod(num_devices, fsdp * tensor * context)
                axes = dict(zip(AXES, (data, fsdp, context, tensor), strict=True))
                parts = {axis: sharding.shards(axis, axes)[1] for axis in sizes}
                if rest == 0 and all(size % parts[axis] == 0 for axis, size in sizes.items()):
                    return axes
    return None
