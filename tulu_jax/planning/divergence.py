"""Two ways to run one model, compared place by place: which tensor differs by more than rounding.

Both sides get the same rows and weights. Each stage of side B gets what side A made before it, and
going backward A's gradient behind it, so a difference is of that stage alone: what one layer does
wrong is not seen in the layers after it, and rounding does not add up over depth. In the end the
whole forward and backward passes are compared too, scan and rematerialisation included.

What rounding explains: 4 eps of the coarser compute dtype, for the handful of roundings in a stage;
and 4 eps of float32 times √n, for sums over n numbers in another order, whose errors add up like a
random walk. Activations are compared position by position, each with the size of an average one;
gradients array by array. Of the whole passes it is that for each stage, added up.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tulu_jax import base as base_lib
from tulu_jax.data import loader
from tulu_jax.models import llama, stages
from tulu_jax.objectives import losses
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.parallel import sharding
from tulu_jax.recipe import TrainConfig

ROUNDINGS = 4  # of a stage
CHUNK = 512  # positions whose scores are made at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a tensor of B is from that of A, as a part of its size; `explained` by rounding."""

    place: str
    found: float
    explained: float

    @property
    def diverges(self) -> bool:
        return not self.found <= self.explained

    def __str__(self):
        mark = "  <- differs" if self.diverges else ""
        return f"{self.place:<64} {self.found:9.2e} {self.explained:9.2e}{mark}"


class Side:
    """A run's model on its mesh, over the first devices, with its parameters."""

    def __init__(self, config: TrainConfig, num_devices: int):
        self.config = config
        self.mesh = mesh_lib.make(config.mesh_on(num_devices), jax.devices()[:num_devices])
        with jax.set_mesh(self.mesh):
            self.params = base_lib.initial_params(config, self.mesh)
        self.dtype = jnp.dtype(config.execution.compute_dtype)
        self._compiled = {}

    def placed(self, x: np.ndarray | None, *axes: str | None):
        """`x` on the mesh; activations in the compute dtype."""
        if x is None:
            return None
        x = x.astype(self.dtype) if np.issubdtype(x.dtype, np.floating) else x
        return jax.device_put(x, jax.NamedSharding(self.mesh, sharding.spec(*axes)))

    def rows(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return {name: self.placed(value, "batch", "length") for name, value in batch.items()}

    def stage(self, name: str, params, batch, x):
        """The array that a stage makes; the loss of `loss`."""
        if name == "loss":
            return _loss(llama.unembedding(params), x, batch)
        return stages.run(name, self.config.model, self.config.execution, params, batch, x)

    def run(
        self, name: str, params, batch, x: np.ndarray | None, cotangent: np.ndarray | None
    ) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray | None]:
        """What a stage makes of `x`, and for the `cotangent` of that (None: zeros) the gradients of
        its parameters, by path, if they have any, and of `x`; all in float32."""

        def both(params, batch, x, cotangent):
            out, pull = jax.vjp(lambda params, x: self.stage(name, params, batch, x), params, x)
            found = out, *pull(cotangent.astype(out.dtype))
            return jax.tree.map(sharding.replicate, found)

        if cotangent is None:
            shape = (*batch["tokens"].shape, self.config.model.embed_dim)
            cotangent = np.zeros(() if name == "loss" else shape, np.float32)
        axes = ("batch", "positions", None)
        out, grads, into = self._run(
            name,
            *(both, params, self.rows(batch), self.placed(x, *axes)),
            self.placed(cotangent, *axes[: cotangent.ndim]),
        )
        return out, {path: grad for path, grad in named(grads).items() if np.any(grad)}, into

    def whole(self, batch) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The loss and the gradients of all parameters, by path, as an update has them."""
        forward = llama.forward(self.config.model, self.config.execution)

        def run(params, batch):
            def loss(params):
                return _loss(llama.unembedding(params), forward(params, batch), batch)

            return jax.tree.map(sharding.replicate, jax.value_and_grad(loss)(params))

        value, grads = self._run("whole", run, self.params, self.rows(batch))
        return value, named(grads)

    def _run(self, name: str, function, *arguments):
        with jax.set_mesh(self.mesh):
            compiled = self._compiled.setdefault(name, jax.jit(function))
            found = jax.device_get(compiled(*arguments))
        return jax.tree.map(lambda x: np.asarray(x, np.float32), found)


def _loss(unembedding, hidden, batch) -> jax.Array:
    """The mean of -log p over the trained positions, float32 []."""
    logps = losses.token_logps(hidden, unembedding, batch["targets"], CHUNK)
    weights = batch["loss_mask"].astype(jnp.float32)
    return -jnp.sum(weights * logps) / jnp.maximum(jnp.sum(weights), 1.0)


def named(tree: Any) -> dict[str, np.ndarray]:
    """The leaves of a tree by path."""
    return {sharding.path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def first_rows(config: TrainConfig, count: int) -> dict[str, np.ndarray]:
    """The first `count` rows of the run's first update, [count, T] each; the two sides of a plain
    pair are two rows."""
    options = {"process_index": 0, "process_count": 1, "workers": 0}
    rows = loader.prepare(config.data, split="train")
    batch = next(loader.batches(rows, batch_size=count, start_step=0, num_steps=1, **options))
    wanted = (*stages.ROWS, "targets", "loss_mask")
    flat = {name: value.reshape(-1, value.shape[-1]) for name, value in batch.items()}
    return {name: flat[name][:count] for name in wanted if name in flat}


def compare(a: Side, b: Side, batch: dict[str, np.ndarray]) -> Iterator[Difference]:
    """Every tensor, in the order in which it is made: parameters, forward, backward, the whole."""
    rows, length = batch["tokens"].shape
    model, used = a.config.model, batch["segment_ids"] > 0
    eps = max(float(jnp.finfo(side.dtype).eps) for side in (a, b))
    longest = max(model.embed_dim, model.mlp_dim, length)

    def explained(sums: int) -> float:
        return ROUNDINGS * (eps + float(np.finfo(np.float32).eps) * math.sqrt(sums))

    yield from _parameters(a, b)
    names = [f"layers/{i}/{half}" for i in range(model.num_layers) for half in ("attention", "mlp")]
    places = ["embedding", *names, "norm", "loss"]
    inputs: dict[str, np.ndarray | None] = {}
    x = None
    for place in places:
        inputs[place] = x
        outs = [
            side.run(place.split("/")[-1], _of(side, place), batch, x, None)[0] for side in (a, b)
        ]
        yield Difference(
            place=f"{place} out", found=_apart(*outs, used), explained=explained(longest)
        )
        x = outs[0]
    cotangent = np.ones((), np.float32)
    for place in reversed(places):
        found = [
            side.run(place.split("/")[-1], _of(side, place), batch, inputs[place], cotangent)[1:]
            for side in (a, b)
        ]
        of_a, of_b = found[0][0], found[1][0]
        for path in of_a | of_b:
            grads = [grads.get(path, np.zeros(1)) for grads in (of_a, of_b)]
            yield Difference(
                place=f"{place} gradient of {path.removeprefix('model/').removeprefix('layers/')}",
                found=_apart(*grads),
                explained=explained(max(longest, rows * length)),
            )
        cotangent = found[0][1]
        if cotangent is not None:
            yield Difference(
                place=f"{place} gradient of its input",
                found=_apart(cotangent, found[1][1], used),
                explained=explained(longest),
            )
    depth = len(places)
    (loss_a, grads_a), (loss_b, grads_b) = a.whole(batch), b.whole(batch)
    of_whole = explained(max(longest, rows * length)) * depth
    yield Difference(place="whole loss", found=_apart(loss_a, loss_b), explained=of_whole)
    for path, grad in grads_a.items():
        yield Difference(
            place=f"whole gradient of {path}",
            found=_apart(grad, grads_b[path]),
            explained=of_whole,
        )


def _of(side: Side, place: str) -> llama.Params:
    """The parameters that a stage takes."""
    layer = int(place.split("/")[1]) if place.startswith("layers/") else 0
    return stages.one_layer(side.params, layer)


def _parameters(a: Side, b: Side) -> Iterator[Difference]:
    """The weights, layer by layer: the same ones, but for a cast."""
    dtypes = {jnp.dtype(side.config.param_dtype) for side in (a, b)}
    explained = max(float(jnp.finfo(dtype).eps) for dtype in dtypes) if len(dtypes) > 1 else 0.0
    of_a, of_b = (named(jax.device_get(side.params)) for side in (a, b))
    for path, one in of_a.items():
        stacked = path.startswith("model/layers/")
        pairs = zip(one, of_b[path], strict=True) if stacked else [(one, of_b[path])]
        for layer, (x, y) in enumerate(pairs):
            yield Difference(
                place=f"weights {path}{f' of layer {layer}' if stacked else ''}",
                found=_apart(np.float32(x), np.float32(y)),
                explained=explained,
            )


def _apart(a: np.ndarray, b: np.ndarray, used: np.ndarray | None = None) -> float:
    """|a - b| / |a|; with `used` [B, T], the largest over these positions, each against the root
    mean square of all of them. Infinite for what is not finite on one side alone."""
    a, b = np.float64(a), np.float64(b)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, a - b)
    if not np.isfinite(apart).all():
        return math.inf
    if used is not None and a.ndim == 3:
        apart, size = (np.linalg.norm(x[used], axis=-1) for x in (apart, np.where(same, b, a)))
        size = float(np.sqrt(np.mean(size**2)))
        apart = float(apart.max())
    else:
        apart, size = float(np.linalg.norm(apart)), float(np.linalg.norm(np.where(same, b, a)))
    return apart if apart == 0 else (apart / size if size else math.inf)
