"""A byte-level BPE tokenizer, trained in seconds on the rows of a task."""

import pathlib
from collections.abc import Iterable

from tulu_jax import atomic
from tulu_jax.data import chat, components, examples

SPECIAL = [chat.UNK, chat.BOS, chat.EOS]  # ids 0, 1, 2, as in Llama


def train_tokenizer(name: str, directory: str, *, vocab_size: int) -> chat.ChatTokenizer:
    """Trains on the train split of a mixture or task, writes `directory`/tokenizer.json, whole or
    not at all, and loads it from there.

    The same rows and size give the same tokenizer. It may get fewer ids than `vocab_size` if no
    two tokens are left that occur together more than once.
    """
    texts = []
    for component in components.of(name):
        drawing = examples.Drawing(
            split="train",
            amount=component.amount,
            seed=component.seed,
            holdout_every=None,
            data_root=None,
        )
        loaded = examples.load_examples(component.task, drawing)
        texts += [text for example in loaded.examples for text in _texts(example)]
    file = pathlib.Path(directory) / "tokenizer.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(file, train_bpe(texts, vocab_size=vocab_size).to_str(pretty=True))
    return chat.load_tokenizer(directory)


def train_bpe(texts: Iterable[str], *, vocab_size: int):
    """A byte-level BPE `tokenizers.Tokenizer` that adds BOS as Llama's does when asked to."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend = tokenizers.Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{chat.BOS} $A",
        pair=f"{chat.BOS} $A {chat.BOS}:1 $B:1",
        special_tokens=[(chat.BOS, backend.token_to_id(chat.BOS))],
    )
    return backend


def _texts(example: dict) -> list[str]:
    """The text of an example without `</s>`, which must not become part of a merge."""
    if "messages" in example:
        conversations = [example["messages"]]
    else:
        conversations = [example["prompt"] + example[side] for side in ("chosen", "rejected")]
    rendered = [chat.render(messages, chat="spec").text for messages in conversations]
    return [text.replace(chat.EOS, "") for text in rendered]
