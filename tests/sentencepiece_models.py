"""Small SentencePiece models, trained in a moment."""

import io
import random

import sentencepiece


def trained(**options) -> bytes:
    """A small BPE model; by default with no normalizer and all spaces, as Llama's."""
    draw = random.Random(0)
    words = ["the", "hello", "world", "ab", "abc", "cab", "bab", "<sep>", "x", ">>"]
    lines = [" ".join(draw.choices(words, k=9)) for _ in range(200)]
    settings = {
        "model_type": "bpe",
        "vocab_size": 340,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "num_threads": 1,
        "minloglevel": 4,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **(settings | options)
    )
    return model.getvalue()
