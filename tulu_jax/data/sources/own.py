"""Converters of own rows: conversations and preference pairs in the layouts that most people have.

Supervised: `messages` of `{"role", "content"}`, or ShareGPT's `conversations` of `{"from",
"value"}`. Preferences: `chosen` and `rejected`, each a text, a message, a list of messages or the
whole conversation; the `prompt` a text or messages, or under `conversations`; absent where both
sides are whole conversations. These are TRL's formats. Other columns are left out, but for the
names and scores that audits show.
"""

from collections.abc import Callable, Iterable

from tulu_jax.data.sources import messages

ROLES = ("system", "user", "assistant")
SENDERS = {"human": "user", "gpt": "assistant"}  # of ShareGPT; others are roles already
CONVERSATIONS = ("messages", "conversations")
SIDES = ("chosen", "rejected")
NOTED = ("id", "dataset", "source", "score_chosen", "score_rejected")
LOST = ("tool_calls", "function_call", "weight")  # keys of a message that change what is trained


def kind_of(row: dict) -> str:
    """`"sft"` or `"preference"`, by the columns. Raises `ValueError` for neither."""
    columns = _columns(row)
    if columns >= set(SIDES):
        return "preference"
    if columns & set(CONVERSATIONS):
        return "sft"
    raise ValueError(
        f"found columns {sorted(row)}; expected 'messages' or 'conversations' for supervised "
        "fine-tuning, or 'chosen' and 'rejected', with 'prompt' or as whole conversations, for "
        "preferences"
    )


def conversation(row: dict) -> dict:
    """The example of `messages` or `conversations`."""
    return messages.conversation(_conversation(row), messages.noted(row, *NOTED))


def pair(row: dict) -> dict:
    """The example of `chosen` and `rejected`, after the prompt where it is not in both."""
    prompt = _prompt(row)
    sides = [_messages(messages.present(row, side), side, "assistant") for side in SIDES]
    whole = [side[0]["role"] != "assistant" for side in sides]
    if whole[0] != whole[1]:
        raise ValueError(
            f"chosen begins with role {sides[0][0]['role']!r}, rejected with "
            f"{sides[1][0]['role']!r}; expected answers or whole conversations on both sides"
        )
    if not whole[0]:
        if not prompt:
            raise ValueError(
                f"no prompt, and the sides begin with an answer; found columns {sorted(row)}, "
                "expected 'prompt', or whole conversations on both sides"
            )
        sides = [prompt + side for side in sides]
    example = messages.shared_prompt(*sides)
    if whole[0] and not _is_in(prompt, example["prompt"]):
        raise ValueError("the prompt is not part of the conversations of chosen and rejected")
    about = messages.noted(row, *NOTED)
    return example | ({"about": about} if about else {})


CONVERTERS: dict[str, Callable[[dict], dict]] = {"sft": conversation, "preference": pair}


def _columns(row: dict) -> set[str]:
    return {name for name, value in row.items() if value is not None}  # null where others have one


def _conversation(row: dict) -> list[dict]:
    given = sorted(_columns(row) & set(CONVERSATIONS))
    if len(given) != 1:
        raise ValueError(f"found columns {sorted(row)}; expected one of {CONVERSATIONS}")
    return _messages(row[given[0]], given[0], None)


def _prompt(row: dict) -> list[dict]:
    columns = _columns(row)
    if "prompt" in columns:
        return _messages(row["prompt"], "prompt", "user") if row["prompt"] else []
    if "conversations" in columns:
        return _messages(row["conversations"], "conversations", None)
    return []


def _messages(value, name: str, role: str | None) -> list[dict]:
    """One or more messages; a text is that of `role`, where there is one."""
    if isinstance(value, str) and role:
        return [messages.message(role, messages.text(value, name))]
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list) or not items:
        kinds = "a text, a message or messages" if role else "a list of messages"
        raise ValueError(f"{name} is {value!r:.60}; expected {kinds}")
    return [_message(item, f"{name}, message {index}") for index, item in enumerate(items)]


def _message(item, name: str) -> dict:
    if not isinstance(item, dict):
        raise ValueError(f"{name}: is {item!r:.60}; expected 'role' and 'content'")
    lost = [key for key in LOST if item.get(key) not in (None, 1, [])]
    if lost:
        raise ValueError(
            f"{name}: found {lost}, which would be lost; expected 'role' and 'content' alone"
        )
    keys = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    for key in keys:
        if not isinstance(item.get(key), str):
            raise ValueError(f"{name}: {key} is {item.get(key)!r:.60}; expected a string")
    role, content = (messages.text(item[key], f"{name}: {key}") for key in keys)
    role = SENDERS.get(role, role) if keys[0] == "from" else role
    if role not in ROLES:
        raise ValueError(f"{name}: unknown role {role!r:.60}; expected one of {ROLES}")
    return messages.message(role, content)


def _is_in(prompt: Iterable[dict], said: list[dict]) -> bool:
    contents = [message["content"] for message in said]
    return all(message["content"] in contents for message in prompt)
