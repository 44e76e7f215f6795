"""The chat loop: what is asked of the model, and the commands."""

from tulu_jax.decode import chat_loop


def talk(*lines):
    """What was written, the conversations the model saw, and the conversation at the end."""
    written, seen = [], []

    def respond(messages):
        seen.append(messages)
        return f"answer {len(seen)}"

    messages = chat_loop.converse(respond, lines=lines, write=written.append)
    return written, seen, messages


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def test_turns_accumulate_and_blank_lines_are_skipped():
    written, seen, messages = talk("hello ", "", "and then?\n")
    assert written == ["answer 1", "answer 2"]
    assert seen == [[user("hello")], [user("hello"), assistant("answer 1"), user("and then?")]]
    assert messages == [*seen[1], assistant("answer 2")]


def test_reset_keeps_the_system_message():
    _, seen, messages = talk("/system Be brief. ", "a", "/reset", "b")
    assert seen == [[system("Be brief."), user("a")], [system("Be brief."), user("b")]]
    assert messages[-1] == assistant("answer 2")


def test_system_starts_anew_and_without_text_removes_it():
    _, seen, _ = talk("a", "/system One", "b", "/system", "c")
    assert seen == [[user("a")], [system("One"), user("b")], [user("c")]]


def test_an_unknown_command_is_not_sent_to_the_model():
    written, seen, messages = talk("/quit")
    assert written == ["/quit is unknown; there are /reset and /system TEXT"]
    assert seen == messages == []


def test_reply_encodes_generates_and_decodes():
    calls = []

    def encode(messages):
        calls.append(messages)
        return [1, 2]

    answer = chat_loop.reply(
        [user("hi")],
        encode=encode,
        generate=lambda prompt: [*prompt, 3],
        decode=lambda ids: f" {ids}\n",
    )
    assert (answer, calls) == ("[1, 2, 3]", [[user("hi")]])


def test_terminal_lines_end_with_the_input(monkeypatch):
    typed = iter(["one", "two"])

    def read(prompt):
        assert prompt == "> "
        for line in typed:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    assert list(chat_loop.terminal_lines()) == ["one", "two"]
