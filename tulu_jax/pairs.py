"""What a DPO run knows of its pairs beside their tokens: reference, cuts, and groups of them."""

import collections
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable

import jax
import numpy as np
from etils import epath

from tulu_jax.data import chat as chat_lib
from tulu_jax.data import loader
from tulu_jax.objectives import dpo
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.recipe import TrainConfig
from tulu_jax.training import reference

SHARD_ROWS = 256  # rows of one shard of the reference: what a kill can lose
GROUPED = ("loss", "rewards/margins", "rewards/accuracies")
QUANTILES = 4


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows of one split and, for DPO with a cached reference, its log-probs [examples, 2]."""

    rows: loader.Rows
    ref_logps: np.ndarray | None = None

    def attach(self, batch: dict) -> dict:
        """`batch` with `truncated` [*pairs] and the cached `ref_logps` [*pairs, 2] of its pairs
        (False and zeros where there is no pair); SFT batches as they are."""
        if "example" not in batch:
            return batch
        known = batch["example"] >= 0
        batch = {**batch, "truncated": known & self.rows.store.cut[batch["example"]]}
        if self.ref_logps is None:
            return batch
        logps = np.where(known[..., None], self.ref_logps[batch["example"]], 0.0)
        return {**batch, "ref_logps": logps.astype(np.float32)}


def reference_key(config: TrainConfig, rows: loader.Rows, weights: str) -> dict[str, str]:
    """What the reference log-probabilities of `rows` depend on, by name."""
    data = config.data
    return {
        "model": json.dumps(dataclasses.asdict(config.model)),
        "weights": weights,
        "tokenizer": chat_lib.load_tokenizer(data.tokenizer).fingerprint,
        "template": data.chat,
        "max_length": str(data.max_length),
        "compute_dtype": config.execution.compute_dtype,
        "log_softmax_dtype": config.objective.log_softmax_dtype,
        "data": rows.fingerprint,
    }


def reference_logps(
    config: TrainConfig,
    rows: loader.Rows,
    cache: reference.Cache,
    *,
    params: Callable[[], dict],
    put: Callable[[dict], dict],
    progress: Callable[..., Iterable],
) -> np.ndarray:
    """float32 [examples, 2] of all pairs of `rows`; what `cache` has not is computed, row by row.

    Rows are sharded over the ambient mesh, and over the processes, by `put`.
    """
    names = [rows.store.name(i) for i in range(rows.num_examples)]
    whole = jax.NamedSharding(jax.sharding.get_mesh(), jax.P())
    done = 0
    while done < rows.rows_per_epoch and all(
        names[i] in cache for i in rows.examples_in_order(done)
    ):
        done += 1
    if done == rows.rows_per_epoch:
        return cache.gather(names)
    logps_of = functools.partial(
        dpo.response_logps,
        config=config.objective,
        model=config.model,
        execution=config.execution,
    )
    score = jax.jit(lambda p, batch: (batch["example"], logps_of(p, batch)), out_shardings=whole)
    size = config.micro_batch_size or config.batch_size
    part, parts = mesh_lib.row_share(jax.sharding.get_mesh())
    batches = loader.eval_batches(
        rows,
        batch_size=size,
        process_index=part,
        process_count=parts,
        first_row=done,
    )
    total = loader.num_eval_batches(rows, batch_size=size, first_row=done)
    params, found = params(), []
    for number, batch in enumerate(progress(batches, "reference", total=total), 1):
        example, logps = (np.asarray(x) for x in score(params, put(batch)))
        found += zip(example[example >= 0], logps[example >= 0], strict=True)
        if number == total or number % max(1, SHARD_ROWS // size) == 0:
            cache.add([names[i] for i, _ in found], np.stack([values for _, values in found]))
            found = []
    return cache.gather(names)


def reference_cache(config: TrainConfig, split: str, rows: loader.Rows, weights: str):
    """The cache of one split: in the run's workdir, or in `reference_dir` under its key's hash."""
    key = reference_key(config, rows, weights)
    if config.reference_dir is None:
        return reference.Cache(epath.Path(config.workdir) / f"reference_{split}", key)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return reference.Cache(epath.Path(config.reference_dir) / digest, key)


class Groups:
    """Means by source and by quarter of the answers' length, over the pairs of one evaluation."""

    def __init__(self, rows: loader.Rows):
        self.rows = rows
        self.values: dict[str, list[np.ndarray]] = collections.defaultdict(list)

    def add(self, values: dict[str, np.ndarray]) -> None:
        """The metrics of one batch, [*pairs] each, and `example` beside them; {} for SFT."""
        if not values:
            return
        real = values["example"] >= 0
        for name, value in values.items():
            self.values[name].append(np.asarray(value)[real])

    def means(self) -> dict[str, float]:
        """`by_source/NAME/*`, if there is more than one, and `by_length/Q1..Q4/*`; {} for SFT."""
        if not self.values:
            return {}
        values = {name: np.concatenate(parts) for name, parts in self.values.items()}
        sources = np.array([self._source(int(i)) for i in values["example"]])
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

    def _source(self, example: int) -> str:
        store = self.rows.store
        task = self.rows.stats.tasks[store.task_of[example]].task
        return store.about(example).get("source") or task
