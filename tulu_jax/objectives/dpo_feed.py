"""Batches of pairs with what DPO knows of each beside its tokens: the reference's log-probabilities
and whether it was cut; and groups of pairs."""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from tulu_jax.data import chat as chat_lib
from tulu_jax.data import loader
from tulu_jax.models import attention, llama
from tulu_jax.objectives import loader_feed
from tulu_jax.parallel import compiler
from tulu_jax.training import reference

SHARD_ROWS = 256  # rows of one shard of the reference: what a kill can lose
POSITIONS = 4096  # of a device in a forward of the reference's pass
GROUPED = ("loss", "rewards/margins", "rewards/accuracies")
QUANTILES = 4


class PairFeed:
    """The pairs of a run's mixture (`objective.Feed`), with `truncated` [*pairs] and, if the
    objective caches it, the reference's `ref_logps` [*pairs, 2]."""

    def __init__(self, objective, run):
        self._objective, self._run = objective, run
        self._pairs = loader_feed.LoaderFeed(run, self._attached)
        self._ref_logps: dict[str, np.ndarray] = {}

    @property
    def rows(self) -> loader.Rows:
        return self._pairs.rows

    def begin(self, initial: Callable[[], llama.Params], weights: str) -> None:
        """Computes the log-probabilities that are not cached, under the parameters that the run
        began with."""
        if self._objective.caches_reference:
            for split, rows in self._pairs.splits.items():
                cache = reference_cache(self._run.config, split, rows, weights)
                self._ref_logps[split] = self._computed(rows, cache, initial)

    def __call__(self, step: int, params) -> loader_feed.Batch:
        return self._pairs(step, params)

    def evaluation(self) -> Iterator[loader_feed.Batch] | None:
        return self._pairs.evaluation()

    def groups(self, examples: list[Mapping[str, Any]]) -> dict[str, float]:
        """`by_source/NAME/*`, if there is more than one, and `by_length/Q1..Q4/*`."""
        return group_means(self._pairs.splits["eval"], examples)

    def _attached(self, split: str, rows: loader.Rows, batch: loader_feed.Batch):
        return attached(rows, batch, self._ref_logps.get(split))

    def _computed(self, rows: loader.Rows, cache: reference.Cache, initial) -> np.ndarray:
        """float32 [examples, 2] of all pairs of `rows`; what `cache` has not is computed, in rows
        of one shape, over the ambient mesh and the processes."""
        run, names = self._run, [rows.store.name(i) for i in range(rows.num_examples)]
        done = 0
        while done < rows.rows_per_epoch and all(
            names[i] in cache for i in rows.examples_in_order(done)
        ):
            done += 1
        if done == rows.rows_per_epoch:
            return cache.gather(names)
        score = jax.jit(
            make_scores(run.config),
            out_shardings=jax.NamedSharding(run.mesh, jax.P()),
            compiler_options=compiler.options(run.mesh.devices.flat[0].device_kind),
        )
        few = self._pairs.eval_rows  # which divide over the mesh, as their multiples do
        size = pass_rows(run.config, run.mesh)
        size = min(size, -(-rows.rows_per_epoch // few) * few)
        batches, total = self._pairs.in_order(rows, batch_size=size, first_row=done)
        params, found = initial(), []
        for number, batch in enumerate(run.progress(batches, "reference", total=total), 1):
            example, logps = (np.asarray(x) for x in score(params, run.put(batch)))
            found += zip(example[example >= 0], logps[example >= 0], strict=True)
            if number == total or number % max(1, SHARD_ROWS // size) == 0:
                cache.add([names[i] for i, _ in found], np.stack([values for _, values in found]))
                found = []
        return cache.gather(names)


def make_scores(config) -> Callable[[llama.Params, loader_feed.Batch], tuple[Any, Any]]:
    """The pure function of one batch of the reference's pass of a `TrainConfig`, to be jitted:
    which pairs it has, and float32 [*pairs, 2] as `DPOConfig.response_logps`."""
    forward = llama.forward(config.model, config.execution)
    logps_of = config.objective.response_logps
    return lambda params, batch: (batch["example"], logps_of(forward, params, batch))


def pass_rows(config, mesh: jax.sharding.Mesh) -> int:
    """Rows of a forward of the reference's pass: those of a micro-batch, as often as a device has
    no more than POSITIONS positions of them, and attention takes them in one call.

    Weights are gathered once a forward, however many rows it has, and an update's rows are few. It
    keeps nothing of a layer, so it needs less memory with these than an update with its own.
    """
    length, sizes = config.data.max_length, mesh.shape
    rows = config.micro_batch_size or config.batch_size
    sides = 2 if config.data.packing == "none" else 1
    times = POSITIONS * mesh.size // (rows * sides * length)
    model, execution = config.model, config.execution
    heads = model.num_heads // sizes["tensor"], model.num_kv_heads // sizes["tensor"]
    most = attention.most_rows(
        mesh.devices.flat[0].device_kind,
        queries=length // sizes["context"],
        keys=length,
        heads=(*heads, model.head_dim),
        dtype=jnp.dtype(execution.compute_dtype),
        block=execution.attention_block,
        balanced=bool(execution.balanced),
    )
    if most is not None:
        times = min(times, most * sizes["data"] * sizes["fsdp"] // (rows * sides))
    return rows * max(1, times)


def attached(
    rows: loader.Rows, batch: loader_feed.Batch, ref_logps: np.ndarray | None
) -> loader_feed.Batch:
    """`batch` with `truncated` [*pairs], and `ref_logps` [*pairs, 2] from those of all pairs of
    `rows` [examples, 2], if they are known; False and zeros where there is no pair."""
    known = batch["example"] >= 0
    batch = {**batch, "truncated": known & rows.store.cut[batch["example"]]}
    if ref_logps is None:
        return batch
    logps = np.where(known[..., None], ref_logps[batch["example"]], 0.0)
    return {**batch, "ref_logps": logps.astype(np.float32)}


def reference_cache(config, split: str, rows: loader.Rows, weights: str) -> reference.Cache:
    """The cache of one split: in the run's workdir, or in `reference_dir` under its key's hash.

    `config` is a `TrainConfig`, `weights` the fingerprint of the reference's parameters.
    """
    key = {
        "model": json.dumps(dataclasses.asdict(config.model)),
        "weights": weights,
        "tokenizer": chat_lib.load_tokenizer(config.data.tokenizer).fingerprint,
        "template": config.data.chat,
        "max_length": str(config.data.max_length),
        "compute_dtype": config.execution.compute_dtype,
        "log_softmax_dtype": config.objective.log_softmax_dtype,
        "data": rows.fingerprint,
    }
    if config.execution.gather_dtype is not None:  # without it the key is what it always was
        key["gather_dtype"] = config.execution.gather_dtype
    if config.reference_dir is None:
        return reference.Cache(epath.Path(config.workdir) / f"reference_{split}", key)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return reference.Cache(epath.Path(config.reference_dir) / digest, key)


def group_means(rows: loader.Rows, examples: list[Mapping[str, Any]]) -> dict[str, float]:
    """Means by source and by quarter of the answers' length, over the pairs of one evaluation.

    `examples` are the metrics pair by pair, [*pairs], of each batch, with `example` beside them.
    """
    parts = collections.defaultdict(list)
    for batch in examples:
        real = batch["example"] >= 0
        for name, value in batch.items():
            parts[name].append(np.asarray(value)[real])
    values = {name: np.concatenate(found) for name, found in parts.items()}
    sources = np.array([_source(rows, int(i)) for i in values["example"]])
    lengths = (values["lengths/chosen"] + values["lengths/rejected"]) / 2
    edges = np.quantile(lengths, np.arange(1, QUANTILES) / QUANTILES)
    quarters = np.array([f"Q{q + 1}" for q in np.searchsorted(edges, lengths, side="left")])
    result = {}
    for kind, groups in (("by_source", sources), ("by_length", quarters)):
        names = np.unique(groups)
        for group in names if len(names) > 1 else ():
            for metric in GROUPED:
                mean = float(values[metric][groups == group].mean())
                result[f"{kind}/{group}/{metric}"] = mean
    return result


def _source(rows: loader.Rows, example: int) -> str:
    task = rows.stats.tasks[rows.store.task_of[example]].task
    return rows.store.about(example).get("source") or task
