"""The chat format of Llama-2-chat and Code Llama Instruct, to evaluate these beside ours.

    <s>[INST] <<SYS>>\\n…\\n<</SYS>>\\n\\n… [/INST] … </s><s>[INST] … [/INST]

Source: Llama 2 (arXiv 2307.09288) and its published `generation.py`; open-instruct of November 2023
asked the paper's baselines so, without a system prompt. What a user says is stripped. An answer
that is begun for the model comes behind a space.
"""

from collections.abc import Mapping, Sequence

from tulu_jax import validation
from tulu_jax.data import chat as chat_lib

NAME = "llama2"


def generation_prompt(
    messages: Sequence[Mapping[str, str]], tokenizer: chat_lib.ChatTokenizer, *, prefix: str = ""
) -> list[int]:
    """Ids from which the assistant goes on, its answer beginning with `prefix`; BOS first. Raises
    `UsageError` for messages that the format does not have."""
    space = " " if prefix and not prefix[0].isspace() else ""
    whole = f"{_text(messages)}{space}{prefix}"
    return [tokenizer.bos_id, *tokenizer.encode(whole.removeprefix(chat_lib.BOS))]


def _text(messages: Sequence[Mapping[str, str]]) -> str:
    """Turns up to that of a user who waits for an answer."""
    system, rest, text = "", list(messages), ""
    if rest and rest[0]["role"] == "system":
        system = f"<<SYS>>\n{rest.pop(0)['content']}\n<</SYS>>\n\n"
    roles = [message["role"] for message in rest]
    if not rest or roles != ["user", "assistant"] * (len(rest) // 2) + ["user"]:
        raise validation.UsageError(
            f"the turns {', '.join(m['role'] for m in messages) or 'none'} are no chat of Llama-2; "
            "expected an optional system turn, then user and assistant in turn, a user last"
        )
    for role, message in zip(roles, rest, strict=True):
        if role == "user":
            text += f"{chat_lib.BOS}[INST] {(system + message['content']).strip()} [/INST]"
            system = ""
        else:
            text += f" {message['content']} {chat_lib.EOS}"
    return text
