"""Talks to what a run trained: chats in the terminal, or answers --prompt, or the rows of a file.

Examples:
  python -m tulu_jax.generate --gin_file=tulu_tiny_dpo.gin --prompt="Opposite of hot?"
  python -m tulu_jax.generate --gin_file=stories260k_sft.gin --temperature=0.7 --top_p=0.9
  python -m tulu_jax.generate --gin_file=tulu_tiny_dpo.gin --input=asked.jsonl --output=said.jsonl
"""

import sys
import time

from absl import flags

from tulu_jax import cli, validation

_PROMPT = flags.DEFINE_multi_string("prompt", [], "User message to answer; may be repeated.")
_INPUT = flags.DEFINE_string(
    "input", None, 'File to answer, {"messages": […]} or {"prompt": "…"} on each line.'
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "File for its replies; rows that it has are not answered again."
)
_SYSTEM = flags.DEFINE_string("system", "", "System message of the chat, and of each --prompt.")
_STEP = flags.DEFINE_integer(
    "step", None, "Step of the checkpoint. Default: the latest.", lower_bound=0
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 256, "Longest reply, in tokens.", lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the likeliest tokens of this probability.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from so many likeliest tokens. 0: from all.")
_STOP = flags.DEFINE_multi_string("stop", [], "String that ends a reply; may be repeated.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the draws.")


def main(config) -> None:
    """Answers --input, or prints a reply to each prompt, or reads messages until end of file."""
    from tulu_jax import preflight

    cli.stop_if(_problems())
    cli.check(config, preflight.to_read)
    import jax

    from tulu_jax import trained

    if _INPUT.value and jax.process_count() > 1:
        raise validation.UsageError("--input is answered by one process; start one alone")
    rows = replies = None
    if _INPUT.value:
        from tulu_jax.decode import reply_file

        rows = reply_file.read_rows(_INPUT.value)
        replies = reply_file.ReplyFile(_OUTPUT.value, rows)
    model = trained.Generator(
        config,
        step=_STEP.value,
        seed=_SEED.value,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_p=_TOP_P.value,
        top_k=_TOP_K.value,
        stop=tuple(_STOP.value),
    )
    if replies is not None:
        _answer(model, rows, replies)
    elif _PROMPT.value:
        before = [{"role": "system", "content": _SYSTEM.value}] if _SYSTEM.value else []
        asked = [[*before, {"role": "user", "content": text}] for text in _PROMPT.value]
        for text, reply in zip(_PROMPT.value, model.replies(asked), strict=True):
            print(f"> {text}\n{reply}")
    else:
        _chat(model)


def _problems():
    if (_INPUT.value is None) != (_OUTPUT.value is None):
        yield "--input and --output go together; give both"
    if _INPUT.value and (_PROMPT.value or _SYSTEM.value):
        yield "--input has its own messages; leave out --prompt and --system"


def _chat(model) -> None:
    """Answers lines of the terminal, each word as it comes."""
    from tulu_jax.decode import chat_loop

    def show(piece):
        print(piece.text, end="", flush=True)

    def respond(messages):
        (reply,) = model.replies([messages], stream=show)
        print(flush=True)
        return reply

    chat_loop.converse(respond, lines=chat_loop.terminal_lines(), write=print, system=_SYSTEM.value)


def _answer(model, rows, replies) -> None:
    """Answers the rows that have no reply; each draws from a key of its own, so that a run which
    was stopped says the same."""
    import jax
    import numpy as np

    from tulu_jax.decode import reply_file

    left, started, texts, tokens = replies.left, time.monotonic(), {}, 0

    def note(piece):
        nonlocal tokens
        tokens += len(piece.ids)
        texts[piece.prompt] = texts.get(piece.prompt, "") + piece.text
        if piece.ended:
            replies.add(left[piece.prompt], texts.pop(piece.prompt).strip())
        done, rate = len(replies.answered), tokens / (time.monotonic() - started)
        bar = "#" * (30 * done // len(rows))
        end = "\n" if done == len(rows) else ""
        print(
            f"\r[{bar:30}] {done} of {len(rows)} rows, {rate:,.0f} tokens/s ",
            end=end, file=sys.stderr, flush=True,
        )  # fmt: skip

    try:
        if left:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(model.key, np.array(left))
            asked = [reply_file.messages(rows[number]) for number in left]
            with validation.reading():
                model.replies(asked, keys=keys, stream=note)
    finally:
        replies.close()


if __name__ == "__main__":
    cli.run(main)
