"""Talking to a model in a terminal."""

from collections.abc import Callable, Iterable

from tulu_jax import validation

Message = dict[str, str]


def converse(
    respond: Callable[[list[Message]], str],
    *,
    lines: Iterable[str],
    write: Callable[[str], None],
    system: str = "",
) -> list[Message]:
    """Answers each of `lines` until they end; returns the conversation.

    `respond` shows its answer itself, as it comes, and gives it back; what it refuses
    (`UsageError`), such as a conversation that has become too long, is told, and the line is taken
    back. `/system TEXT` starts a new conversation under that system message (none without TEXT),
    `/reset` starts anew under the same one, the first time `system`. `lines` may be
    `terminal_lines()`, `write` may be `print`.
    """
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
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
            asked = [*messages, {"role": "user", "content": line}]
            try:
                answer = respond(asked)
            except validation.UsageError as error:
                write(f"({error}; /reset starts anew)")
            else:
                messages = [*asked, {"role": "assistant", "content": answer}]
    return messages


def terminal_lines() -> Iterable[str]:
    """Lines typed at the terminal, until end of file (Ctrl-D) or an interrupt (Ctrl-C)."""
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            return
