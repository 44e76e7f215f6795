"""A byte-level BPE tokenizer, trained in seconds on the rows of a task, in Hugging Face layout."""

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable

from tulu_jax.data import chat, chat_templates, examples, registry

UNK = "<unk>"
SPECIAL = [UNK, chat.BOS, chat.EOS]  # ids 0, 1, 2, as in Llama


def train_tokenizer(
    name: str, directory: str, *, vocab_size: int, data_root: str | None = None
) -> chat.ChatTokenizer:
    """Trains on the train split of a mixture or task, writes `directory`, and loads it from there.

    The same rows and size give the same tokenizer. It may get fewer ids than `vocab_size` if no
    two tokens are left that occur together more than once.
    """
    texts = []
    for component in registry.components(name, data_root=data_root):
        drawing = examples.Drawing(
            split="train",
            amount=component.amount,
            seed=component.seed,
            holdout_every=None,
            data_root=data_root,
        )
        loaded = examples.load_examples(component.task, drawing)
        texts += [text for example in loaded.examples for text in _texts(example)]
    save_tokenizer(train_bpe(texts, vocab_size=vocab_size), directory, max_length=None, mode="spec")
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


def save_tokenizer(backend, directory: str, *, max_length: int | None, mode: str) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json, atomically.

    `transformers.AutoTokenizer` opens the folder; its chat template gives the ids of `chat.py` in
    `mode`.
    """
    special = {"bos_token": chat.BOS, "eos_token": chat.EOS, "unk_token": UNK}
    config = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_templates.TEMPLATES[mode],
    }
    if max_length is not None:
        config["model_max_length"] = max_length
    target = pathlib.Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    staging = pathlib.Path(tempfile.mkdtemp(prefix=".tokenizer-", dir=target))
    try:
        backend.save(str(staging / "tokenizer.json"))
        (staging / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
        (staging / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
        for file in sorted(staging.iterdir(), key=lambda f: f.name == "tokenizer.json"):
            os.replace(file, target / file.name)  # tokenizer.json last: it marks the whole
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _texts(example: dict) -> list[str]:
    """The text of an example without `</s>`, which must not become part of a merge."""
    if "messages" in example:
        conversations = [example["messages"]]
    else:
        conversations = [example["prompt"] + example[side] for side in ("chosen", "rejected")]
    rendered = [chat.render(messages, chat="spec").text for messages in conversations]
    return [text.replace(chat.EOS, "") for text in rendered]
