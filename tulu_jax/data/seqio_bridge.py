"""Every task and mixture of this project in seqio's own registries, for T5X and its kin.

    seqio_bridge.register(tokenizer="llama2/tokenizer.model", max_length=2048, data_root="data")
    seqio.get_mixture_or_task("lima").get_dataset(sequence_length=None, split="train")

An example is what the loader packs, row for row: `tokens`, `targets` int32 [n] and `loss_mask`
bool [n], already shifted; of a pair, these six with `chosen_` and `rejected_` before the name.

A mixture is one seqio Task that gives every row once an epoch, in our order: seqio's Mixture draws
by rate, with replacement of whole tasks, and cannot promise that. `<mixture>.by_rate` is the
Mixture, at rates of the numbers of rows. This module alone imports seqio, thus TensorFlow.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import numpy as np
import seqio
import tensorflow as tf

from tulu_jax.data import chat as chat_lib
from tulu_jax.data import components, loader, registry

PREFIXES = {"sft": ("",), "preference": ("chosen_", "rejected_")}
FIELDS = {"tokens": tf.int32, "targets": tf.int32, "loss_mask": tf.bool}
BY_RATE = ".by_rate"
BLOCK_ROWS = 256

_added: dict[str, tuple[seqio.Task, loader.DataConfig]] = {}


class ChatVocabulary(seqio.Vocabulary):
    """A chat tokenizer for seqio. As seqio has it, `decode` stops after the first `</s>`."""

    def __init__(self, tokenizer: chat_lib.ChatTokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    @property
    def bos_id(self) -> int:
        return self.tokenizer.bos_id

    @property
    def eos_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def unk_id(self) -> int | None:
        return self.tokenizer.backend.token_to_id(chat_lib.UNK)

    @property
    def _base_vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def _encode(self, s):
        return self.tokenizer.encode(s)

    def _decode(self, ids):
        return self.tokenizer.decode([int(i) for i in ids])

    def _encode_tf(self, s):
        def encode(text):  # bytes, or outside of a graph an array of one str
            text = text.decode() if isinstance(text, bytes) else str(text)
            return np.array(self.tokenizer.encode(text), np.int32)

        return tf.ensure_shape(tf.numpy_function(encode, [s], tf.int32), [None])

    def _decode_tf(self, ids):
        def decode(rows):
            flat = rows.reshape(-1, rows.shape[-1])
            texts = [self.tokenizer.decode(row).encode() for row in flat]
            return np.array(texts, object).reshape(rows.shape[:-1])

        return tf.ensure_shape(tf.numpy_function(decode, [ids], tf.string), ids.shape[:-1])


class ChatFeatureConverter(seqio.FeatureConverter):
    """What a decoder-only T5X model takes, from `tokens`, `targets` and `loss_mask`, packed or not.

    seqio takes zeros for padding when it packs; here id 0 and an untrained position are none. So
    all values are raised by one before, and lowered after.
    """

    TASK_FEATURES: Mapping = {
        name: seqio.FeatureConverter.FeatureSpec(dtype=dtype) for name, dtype in FIELDS.items()
    }
    MODEL_FEATURES: Mapping = {
        f"decoder_{name}": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32)
        for name in ("input_tokens", "target_tokens", "loss_weights")
    }
    PACKING_FEATURE_DTYPES: Mapping = {
        "decoder_segment_ids": tf.int32,
        "decoder_positions": tf.int32,
    }

    def get_model_feature_lengths(self, task_feature_lengths):
        if len(set(task_feature_lengths.values())) > 1:
            raise ValueError(f"found {dict(task_feature_lengths)}; expected one length for all")
        names = [*self.MODEL_FEATURES, *(self.PACKING_FEATURE_DTYPES if self.pack else ())]
        return dict.fromkeys(names, task_feature_lengths["tokens"])

    def _convert_features(self, ds, task_feature_lengths):
        raised = ds.map(lambda row: {name: tf.cast(row[name], tf.int32) + 1 for name in FIELDS})
        return self._pack_or_pad(raised, task_feature_lengths).map(self._renamed)

    def _renamed(self, row):
        renamed = {
            model: tf.maximum(row[field] - 1, 0)
            for model, field in zip(self.MODEL_FEATURES, FIELDS, strict=True)
        }
        if self.pack:
            renamed["decoder_segment_ids"] = row["tokens_segment_ids"]
            renamed["decoder_positions"] = row["tokens_positions"]
        return renamed


def register(
    *,
    tokenizer: str,
    max_length: int,
    data_root: str | None = None,
    chat: str = "spec",
    truncation: str = "cut",
    holdout_every: int | None = None,
    accept_counts: bool = False,
    cache_dir: str = "cache",
) -> None:
    """Adds every task and mixture to seqio's registries; the arguments are `DataConfig`'s.

    Nothing is read or encoded before a dataset is asked for. Registering again with the same
    arguments adds what is new. Raises `ValueError` for other arguments than before, and for names
    that are taken in seqio.
    """
    template = loader.DataConfig(
        train="tulu_tiny",
        tokenizer=tokenizer,
        max_length=max_length,
        packing="none",
        data_root=data_root,
        chat=chat,
        truncation=truncation,
        holdout_every=holdout_every,
        accept_counts=accept_counts,
        cache_dir=cache_dir,
    )
    registered = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    ours = {name for name in registered & _added.keys() if _is_ours(name)}
    names = registry.all_names()
    _check_unchanged(template, ours)
    if taken := sorted((registered - ours) & set(names)):
        raise ValueError(f"seqio has other tasks or mixtures named {', '.join(taken)}")
    vocabulary = ChatVocabulary(chat_lib.load_tokenizer(tokenizer))
    new = [name for name in names if name not in ours]
    for name in new:
        _add_task(name, template, vocabulary)
    for name in new:
        if name in registry.MixtureRegistry:
            _add_by_rate(name, template)


def _is_ours(name: str) -> bool:
    return name in seqio.TaskRegistry.names() and seqio.TaskRegistry.get(name) is _added[name][0]


def _check_unchanged(template: loader.DataConfig, ours: set[str]) -> None:
    for name in ours:
        before = dataclasses.asdict(_added[name][1])
        now = dataclasses.asdict(template)
        changed = [f"{k} = {now[k]!r}, before {before[k]!r}" for k in now if now[k] != before[k]]
        if changed:
            raise ValueError(
                f"the tasks are in seqio's registries already with other arguments: "
                f"{'; '.join(changed)}. seqio keeps one task a name: register once in a program"
            )


def _add_task(name: str, template: loader.DataConfig, vocabulary: ChatVocabulary) -> None:
    mask = seqio.PassThroughVocabulary(size=2)
    prefixes = PREFIXES[components.kind_of(name)]
    features = {
        prefix + field: seqio.Feature(
            mask if dtype == tf.bool else vocabulary, add_eos=False, dtype=dtype
        )
        for prefix in prefixes
        for field, dtype in FIELDS.items()
    }
    source = seqio.FunctionDataSource(
        dataset_fn=functools.partial(_dataset, name=name, template=template),
        splits=_splits(name, template),
    )
    task = seqio.TaskRegistry.add(name, source=source, preprocessors=[], output_features=features)
    _added[name] = (task, template)


def _splits(name: str, template: loader.DataConfig) -> tuple[str, ...]:
    config = dataclasses.replace(template, train=name, truncation="cut")
    return tuple(split for split in registry.SPLITS if loader.split_components(config, split))


def _add_by_rate(name: str, template: loader.DataConfig) -> None:
    if name + BY_RATE in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.remove(name + BY_RATE)
    parts = [component.task.name for component in components.of(name)]
    rate = functools.partial(_num_examples, mixture=name, template=template)
    seqio.MixtureRegistry.add(name + BY_RATE, [(part, rate) for part in parts])


def _num_examples(task: seqio.Task, *, mixture: str, template: loader.DataConfig) -> float:
    """How many train examples of `task` the mixture takes."""
    rows = loader.prepare(dataclasses.replace(template, train=mixture), split="train")
    (count,) = [counts.examples for counts in rows.stats.tasks if counts.task == task.name]
    return float(count)


def _dataset(split, shuffle_files, seed=None, *, name: str, template: loader.DataConfig):
    """The examples of a split in our order, whatever `shuffle_files` and `seed`: seqio shuffles
    what it is given.

    Raises `ValueError` for a split that there is not; seqio itself passes on any text.
    """
    del shuffle_files, seed
    if split not in (known := _splits(name, template)):
        raise ValueError(f"{name!r} has no split {split!r}; expected one of {known}, whole")
    rows = loader.prepare(dataclasses.replace(template, train=name), split=split)
    blocks = tf.data.Dataset.from_generator(
        functools.partial(_blocks, rows),
        output_signature={
            name: tf.TensorSpec([None], dtype)
            for prefix in PREFIXES[rows.kind]
            for name, dtype in _columns(prefix).items()
        },
    )
    return blocks.flat_map(functools.partial(_rows_of, prefixes=PREFIXES[rows.kind]))


def _columns(prefix: str) -> dict[str, tf.DType]:
    """What a block has of one side: each field of its rows end to end, and where each row starts
    and the last ends."""
    fields = {prefix + field: dtype for field, dtype in FIELDS.items()}
    return {**fields, f"{prefix}starts": tf.int32}


def _blocks(rows: loader.Rows) -> Iterator[dict[str, np.ndarray]]:
    """The examples in order, some at a time: what TensorFlow takes from Python is slow to pass."""
    for first in range(0, rows.num_examples, BLOCK_ROWS):
        indices = range(first, min(first + BLOCK_ROWS, rows.num_examples))
        block = {}
        for side, prefix in enumerate(PREFIXES[rows.kind]):
            encoded = [_shifted(*rows.store.sides(index)[side]) for index in indices]
            for field in FIELDS:
                block[prefix + field] = np.concatenate([getattr(e, field) for e in encoded])
            lengths = [len(e.tokens) for e in encoded]
            block[f"{prefix}starts"] = np.cumsum([0, *lengths]).astype(np.int32)
        yield block


def _shifted(ids: np.ndarray, spans: np.ndarray) -> chat_lib.Encoded:
    return chat_lib.shift(chat_lib.TokenIds(ids=ids.astype(np.int32), spans=spans))


def _rows_of(block, *, prefixes: tuple[str, ...]):
    """The rows of a block, one by one."""

    def row(index):
        return {
            prefix + field: block[prefix + field][
                block[f"{prefix}starts"][index] : block[f"{prefix}starts"][index + 1]
            ]
            for prefix in prefixes
            for field in FIELDS
        }

    count = tf.size(block[f"{prefixes[0]}starts"], tf.int64) - 1
    return tf.data.Dataset.range(count).map(row)
