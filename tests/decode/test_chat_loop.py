"""The chat loop: what is asked of the model, and the commands."""

from tulu_jax import validation
from tulu_jax.decode import chat_loop


def talk(*lines, system=""):
    """What was written, the conversations the model saw, and the conversation at the end."""
    written, seen = [], []

    def respond(messages):
        seen.append(messages)
        if messages[-1]["content"] == "too long":
            raise validation.UsageError("no room")
        written.append(f"answer {len(seen)}")
        return written[-1]

    messages = chat_loop.converse(respond, lines=lines, write=written.append, system=system)
    return written, seen, messages


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def told(text):
    return {"role": "system", "content": text}


def test_turns_accumulate_and_blank_lines_are_skipped():
    written, seen, messages = talk("hello ", "", "and then?\n")
    assert written == ["answer 1", "answer 2"]
    assert seen == [[user("hello")], [user("hello"), assistant("answer 1"), user("and then?")]]
    assert messages == [*seen[1], assistant("answer 2")]


def test_reset_keeps_the_system_message():
    _, seen, messages = talk("/system Be brief. ", "a", "/reset", "b")
    assert seen == [[told("Be brief."), user("a")], [told("Be brief."), user("b")]]
    assert messages[-1] == assistant("answer 2")


def test_system_starts_anew_and_without_text_removes_it():
    _, seen, _ = talk("a", "/system One", "b", "/system", "c")
    assert seen == [[user("a")], [told("One"), user("b")], [user("c")]]


def test_an_unknown_command_is_not_sent_to_the_model():
    written, seen, messages = talk("/quit")
    assert written == ["/quit is unknown; there are /reset and /system TEXT"]
    assert seen == messages == []


def test_a_conversation_begins_under_a_system_message_which_reset_keeps():
    _, seen, _ = talk("a", "/reset", "b", system="Be brief.")
    assert seen == [[told("Be brief."), user("a")], [told("Be brief."), user("b")]]


def test_what_is_refused_is_told_and_taken_back():
    written, seen, messages = talk("a", "too long", "b")
    assert written[1] == "(no room; /reset starts anew)"
    assert seen[2] == [user("a"), assistant("answer 1"), user("b")]
    assert len(messages) == 4


def test_terminal_lines_end_with_the_input(monkeypatch):
    typed = iter(["one", "two"])

    def read(prompt):
        assert prompt == "> "
        for line in typed:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    assert list(chat_loop.terminal_lines()) == ["one", "two"]
