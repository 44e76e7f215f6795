"""From a configuration to batches; batch k is a function of (fingerprint, seed, k) alone.

    registry -> convert -> chat -> encode cache -> plan(seed, epoch) -> rows of T -> batches

The planned rows form one infinite stream, epoch after epoch; batch k of size B is rows k·B to
(k + 1)·B of it, and each process takes a contiguous slice. Resuming needs the step number alone.
"""

import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging

from tulu_jax import validation
from tulu_jax.data import chat as chat_lib
from tulu_jax.data import components, encode, examples, packing, registry, stats, store, truncation

CHOSEN, REJECTED = 0, 1
NO_EXAMPLE = -1
PLANS_KEPT = 3
MOST_LENGTH = 2**24  # positions of a row become float32 in the rotary angles, which is exact so far
MOST_WORKERS = 1024  # threads

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on and how it becomes rows.

    `train` and `validation` are a mixture or task, the name of one, or a file of own rows
    (`own_rows`). With `validation = None` the validation split is that of `train`: the tasks' own,
    or every `holdout_every`-th raw row of those that have none; without either there is no
    validation. Of another `validation` it is likewise its tasks' split, of a file all rows; nothing
    is then held out of the other tasks of `train`. `tokenizer` is a file or its
    folder. `data_root` is the folder, or `gs://` prefix, below which tasks find their files, and
    `cache_dir` where encoded rows are kept, a folder or a bucket. `max_length` is T, in tokens
    after the shift; what becomes of longer examples is the rule `truncation`, one of
    `truncation.RULES`, and counted. `packing` is "best_fit" (of pairs: prompt once, answers as
    branches) or "none" (one example a row; of a pair, two rows). A mixture whose counts are not as
    expected is refused unless `accept_counts`. `workers` threads build batches ahead. `to_ends`
    rows are not shifted and hold the last id of each example too; the run sets it, as its objective
    asks (`recipe.TrainConfig`). Relative
    `tokenizer`, `data_root` and `cache_dir` lie below `bucket`, and `data_root` None is the bucket.
    """

    train: str | registry.Mixture | registry.Task
    validation: str | registry.Mixture | registry.Task | None = None
    tokenizer: str
    data_root: str | None = None
    max_length: int
    packing: str = "best_fit"
    truncation: str = "cut"
    chat: str = "spec"
    holdout_every: int | None = None
    accept_counts: bool = False
    cache_dir: str = "cache"
    seed: int = 0
    workers: int = 2
    to_ends: bool = False
    bucket: dataclasses.InitVar[str | None] = None

    def __post_init__(self, bucket):
        paths = {"train": None, "validation": None, "tokenizer": bucket, "cache_dir": bucket}
        paths["data_root"] = bucket if self.data_root is not None else None
        if self.data_root is None:
            object.__setattr__(self, "data_root", bucket)
        validation.check(self, self._rules, paths=paths)

    def _rules(self):
        yield validation.one_of("packing", self.packing, packing.PACKINGS)
        yield validation.one_of("truncation", self.truncation, truncation.RULES)
        yield validation.one_of("chat", self.chat, chat_lib.MODES)
        yield self.max_length >= 2, f"max_length = {self.max_length}: expected 2 or more"
        yield validation.at_most("max_length", self.max_length, MOST_LENGTH)
        yield validation.at_most("workers", self.workers, MOST_WORKERS)
        yield self.seed >= 0, f"seed = {self.seed}: expected 0 or more"
        yield self.workers >= 0, f"workers = {self.workers}: expected 0 or more"
        every = self.holdout_every
        yield every is None or every >= 2, f"holdout_every = {every}: expected None, or 2 or more"
        yield from ((False, problem) for problem in kind_problems(self, read=False))

    @property
    def kind(self) -> str:
        """`"sft"` or `"preference"`, as the tasks of `train` are."""
        return components.kind_of(self.train, data_root=self.data_root)

    @property
    def one_row(self) -> bool:
        """Whether a pair lies in one row, its prompt once and its answers as branches."""
        return self.kind == "preference" and self.packing == "best_fit"

    def drawing(self, component: components.Component, split: str) -> examples.Drawing:
        """Which examples of one task of the mixture `split` takes.

        Of a train split, rows are held out only for the validation split that they go to.
        """
        read = self.validation is None or component.task.name in {
            other.task.name for other in split_components(self, "validation")
        }
        return examples.Drawing(
            split=split,
            amount=component.amount,
            seed=component.seed,
            holdout_every=self.holdout_every if read else None,
            data_root=self.data_root,
        )


def kind_problems(config: DataConfig, *, read: bool) -> list[str]:
    """What is wrong with the tasks that are named, and with their kinds; with `read`, files of own
    rows are looked at as well."""
    found, kinds = [], {}
    for field in ("train", "validation"):
        wanted = getattr(config, field)
        if wanted is not None:
            try:
                tasks = components.of(wanted, data_root=config.data_root, read=read)
                kinds[field] = tasks[0].task.kind
            except ValueError as error:
                found.append(f"{field}: {error}")
    if len({*kinds.values()} - {None}) > 1:
        found.append(f"train and validation are of different kinds: {kinds}")
    if "preference" in kinds.values() and config.truncation == "split":
        found.append(
            "truncation = 'split' with pairs, which cannot be split; expected 'cut' or 'drop'"
        )
    return found


def split_components(config: DataConfig, split: str) -> list[components.Component]:
    """The tasks that give rows to `split`; `[]` for a validation split that the run has not.

    Raises `ValueError` for a split that is none of `registry.SPLITS`.
    """
    registry.check_split(split)
    own = split == "train" or config.validation is None
    found = components.of(
        config.train if own else config.validation,
        data_root=config.data_root,
        split="train" if own else split,
    )
    if split == "train":
        return found
    every = config.holdout_every
    return [c for c in found if examples.has_validation(c.task, holdout_every=every)]


def prepare(config: DataConfig, *, split: str) -> "Rows | None":
    """Encodes the split ("train" or "validation") unless that is cached, and opens it as rows.

    None for a validation split that the run has not. Raises `ValueError` for another split, if no
    example is left, and if the numbers of examples are not as expected, unless
    `config.accept_counts`.
    """
    found = split_components(config, split)
    if not found:
        logging.info("%s has no validation split", registry.name_of(config.train))
        return None
    if config.holdout_every is not None and config.validation is not None and split == "train":
        logging.info(
            "validation is %r: of other tasks, holdout_every = %d holds nothing out",
            registry.name_of(config.validation),
            config.holdout_every,
        )
    encoding = encode.Encoding(
        tokenizer=chat_lib.load_tokenizer(config.tokenizer),
        chat=config.chat,
        max_length=config.max_length - config.to_ends,
        truncation=config.truncation,
        one_row=config.one_row,
    )
    encoded = [
        encode.encode_task(
            component.task,
            config.drawing(component, split),
            encoding=encoding,
            cache_dir=config.cache_dir,
        )
        for component in found
    ]
    folders, counts = zip(*encoded, strict=True)
    wanted = config.validation if split == "validation" and config.validation else config.train
    name = registry.name_of(wanted)
    if not sum(c.examples for c in counts):
        raise ValueError(
            f"{name!r} has no examples in its {split} split; rows went to:\n{stats.table(counts)}"
        )
    if split == "train":
        _check_counts(config, counts, name)
    rows = Rows(folders, counts, config=config, kind=config.kind)
    logging.info("%s, %s split:\n%s", name, split, rows.stats)
    return rows


def _check_counts(config: DataConfig, counts: Sequence[encode.TaskCounts], name: str) -> None:
    expected = registry.expected_examples(config.train)
    wrong = stats.count_problems(counts, expected=expected, name=name)
    if not wrong:
        return
    listed = "\n".join(f"  {line}" for line in wrong)
    if not config.accept_counts:
        raise ValueError(
            f"{name!r} is not what was published:\n{listed}\nMend the files below data_root, or "
            "set accept_counts = True to train on what is there; what is encoded is kept"
        )
    logging.warning("%s is not what was published; going on as told:\n%s", name, listed)


class Rows:
    """The planned rows of one split. Planned row i lies in epoch `i // rows_per_epoch`.

    A row is a dict of numpy arrays: `tokens, targets` int32, `loss_mask` bool, `segment_ids,
    positions` int32, each [T]. Pairs that are not packed have [2, T] (CHOSEN, REJECTED) and
    `example` int32 [], their index in the encoded set. Packed pairs have `branches` int32 [T]
    (0 prompt, 1 chosen, 2 rejected) and `example` int32 [P], the pair of segment s at s - 1, −1
    after the last; P is the most pairs that a row can hold.
    """

    def __init__(self, folders, counts, *, config: DataConfig, kind: str):
        self.config, self.kind, self.folders = config, kind, folders
        self.one_row = config.one_row
        self.store = store.ExampleStore(folders, kind=kind, one_row=self.one_row)
        identity = [[f.name for f in folders], config.max_length, config.packing]
        identity += ["to_ends"] * config.to_ends
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
        self._plans, self._lock = {}, threading.Lock()
        self.lengths = self.store.lengths + config.to_ends  # positions of a row that each takes
        self._ordered = packing.ordered_plan(
            self.lengths, capacity=config.max_length, packing=config.packing
        )
        self.rows_per_epoch = self._ordered.num_rows
        self.num_examples = len(self.store)
        self.pairs_per_row = config.max_length // max(1, int(self.lengths.min()))
        self.num_tokens = sum(c.tokens for c in counts)
        self.num_trained_tokens = sum(c.trained_tokens for c in counts)
        two_rows = kind == "preference" and not self.one_row
        self.stats = stats.Stats(
            tasks=counts,
            rows_per_epoch=self.rows_per_epoch,
            positions_per_row=config.max_length * (2 if two_rows else 1),
            positions=self.num_tokens if two_rows else int(self.lengths.sum()),
        )

    def row(self, index: int) -> Batch:
        """Planned row `index` of the infinite stream of epochs."""
        return self._filled(self.examples(index))

    def examples(self, index: int) -> np.ndarray:
        """The examples in planned row `index`, as indices in the encoded set, in their order."""
        epoch, place = divmod(index, self.rows_per_epoch)
        return self._plan(epoch).row(place)

    def example_ids(self, index: int) -> list[str]:
        """The ids, "task/rownumber", of the examples in planned row `index`, for messages."""
        return [self.store.name(int(i)) for i in self.examples(index)]

    def in_order(self, index: int) -> Batch:
        """Row `index`, below `rows_per_epoch`, of the fixed order used for evaluation.

        With packing "none" it holds example `index`.
        """
        return self._filled(self.examples_in_order(index))

    def examples_in_order(self, index: int) -> np.ndarray:
        """The examples in row `index` of the fixed order, as indices in the encoded set."""
        return self._ordered.row(index)

    def empty(self) -> Batch:
        """A row of padding: nothing to attend to, nothing trained, `example` -1."""
        return self._filled(np.zeros(0, int))

    def _plan(self, epoch: int) -> packing.Plan:
        """The plan of an epoch; the few used last are kept, for a batch may straddle two."""
        with self._lock:
            plan = self._plans.pop(epoch, None) or packing.epoch_plan(
                self.lengths,
                capacity=self.config.max_length,
                packing=self.config.packing,
                seed=self.config.seed,
                epoch=epoch,
            )
            self._plans[epoch] = plan
            if len(self._plans) > PLANS_KEPT:
                del self._plans[next(iter(self._plans))]
            return plan

    def _filled(self, indices: np.ndarray) -> Batch:
        sides = [self.store.sides(int(i)) for i in indices]
        to_ends, capacity = self.config.to_ends, self.config.max_length
        fill_row = packing.fill_row_to_ends if to_ends else packing.fill_row
        if self.one_row:
            fill_pairs = packing.fill_pair_row_to_ends if to_ends else packing.fill_pair_row
            row = fill_pairs(sides, capacity=capacity)
            row["example"] = np.full(self.pairs_per_row, NO_EXAMPLE, np.int32)
            row["example"][: len(indices)] = indices
            return row
        if self.kind == "sft":
            return fill_row([side for (side,) in sides], capacity=capacity)
        halves = [
            fill_row([pair[side] for pair in sides], capacity=capacity)
            for side in (CHOSEN, REJECTED)
        ]
        row = {key: np.stack([half[key] for half in halves]) for key in halves[0]}
        row["example"] = np.array(indices[0] if len(indices) else NO_EXAMPLE, np.int32)
        return row


def batches(
    rows: Rows,
    *,
    batch_size: int,
    start_step: int,
    num_steps: int,
    process_index: int,
    process_count: int,
    workers: int,
) -> Iterator[Batch]:
    """This process's slice of the global batches from `start_step` up to `num_steps`, in order.

    A run of `num_steps` updates that resumes after k of them passes `start_step = k`. Batch k is
    planned rows [k·B, (k + 1)·B). `workers` threads build ahead (0: none); an exception in one of
    them is raised here. Raises `ValueError` if B does not divide over the processes.
    """
    import grain

    first, local = _slice(batch_size, process_index, process_count)

    def batch(step: int) -> Batch:
        start = step * batch_size + first
        return _stack([rows.row(i) for i in range(start, start + local)])

    steps = grain.MapDataset.range(start_step, num_steps)
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
    return iter(steps.map(batch).to_iter_dataset(options))


def eval_batches(
    rows: Rows, *, batch_size: int, process_index: int, process_count: int, first_row: int = 0
) -> Iterator[Batch]:
    """This process's slice of one pass in the fixed order, from `first_row` on; the last batch ends
    in empty rows."""
    first, local = _slice(batch_size, process_index, process_count)
    for start in range(first + first_row, rows.rows_per_epoch + first, batch_size):
        indices = range(start, start + local)
        yield _stack(
            [rows.in_order(i) if i < rows.rows_per_epoch else rows.empty() for i in indices]
        )


def num_eval_batches(rows: Rows, *, batch_size: int, first_row: int = 0) -> int:
    return -(-(rows.rows_per_epoch - first_row) // batch_size)


def _slice(batch_size: int, process_index: int, process_count: int) -> tuple[int, int]:
    if batch_size % process_count or not 0 <= process_index < process_count:
        raise ValueError(
            f"batch_size = {batch_size}, process {process_index} of {process_count}: expected a "
            "batch size that is a multiple of the number of processes, and an index below it"
        )
    local = batch_size // process_count
    return process_index * local, local


def _stack(rows: list[Batch]) -> Batch:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
