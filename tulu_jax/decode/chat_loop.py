"""Talking to a model: a conversation's next reply, and the terminal loop around it."""

from collections.abc import Callable, Iterable

Message = dict[str, str]


def reply(
    messages: list[Message],
    *,
    encode: Callable[[list[Message]], list[int]],
    generate: Callable[[list[int]], list[int]],
    decode: Callable[[list[int]], str],
) -> str:
    """The assistant's next turn: `encode` renders a prompt, `decode` drops the end marker."""
    return decode(generate(encode(messages))).strip()


def converse(
    respond: Callable[[list[Message]], str],
    *,
    lines: Iterable[str],
    write: Callable[[str], None],
) -> list[Message]:
    """Answers each of `lines` until they end; returns the conversation.

    `/system TEXT` starts a new conversation under that system message (none without TEXT), `/reset`
    starts anew under the same one. `lines` may be `terminal_lines()`, `write` may be `print`.
    """
    messages: list[Message] = []
    for line in map(str.strip, lines):
        command, _, rest = line.partition(" ")
        if command == "/reset":
            messages = [message for message in messages if message["role"] == "system"]
            write("(new conversation)")
        elif command == "/system":
            text = rest.strip()
            messages = [{"role": "system", "content": text}] if text else []
            write("(new conversation, with this system message)" if text else "(new conversation)")
        elif command.startswith("/"):
            write(f"{command} is unknown; there are /reset and /system TEXT")
        elif line:
            messages = [*messages, {"role": "user", "content": line}]
            answer = respond(messages)
            messages = [*messages, {"role": "assistant", "content": answer}]
            write(answer)
    return messages


def terminal_lines() -> Iterable[str]:
    """Lines typed at the terminal, until end of file (Ctrl-D) or an interrupt (Ctrl-C)."""
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            return
