"""One conversation as the packer gets it: shifted, with its mask."""

import dataclasses

from tulu_jax.data import chat as chat_lib


def encode_conversation(
    messages: list[dict], tokenizer, *, chat: str, max_length: int | None = None, name: str = "?"
):
    """A `chat.Encoded`: every assistant turn trained, with the `</s>` that ends it."""
    (ids,) = chat_lib.tokenize([messages], tokenizer=tokenizer, chat=chat, names=[name])
    whole = chat_lib.shift(ids)
    cut = {f.name: getattr(whole, f.name)[:max_length] for f in dataclasses.fields(whole)}
    return chat_lib.Encoded(**cut)
