"""Talks to what a run trained: answers --prompt, or chats in the terminal.

Examples:
  python -m tulu_jax.generate --gin_file=tulu_tiny_dpo.gin --prompt="Opposite of hot?"
  python -m tulu_jax.generate --gin_file=stories260k_sft.gin --temperature=0.7 --top_p=0.9
"""

from absl import flags

from tulu_jax import cli

_PROMPT = flags.DEFINE_multi_string("prompt", [], "User message to answer; may be repeated.")
_STEP = flags.DEFINE_integer(
    "step", None, "Step of the checkpoint. Default: the latest.", lower_bound=0
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 256, "Longest reply, in tokens.", lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the likeliest tokens of this probability.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the draws.")


def main(config) -> None:
    """Prints a reply to each prompt, or reads messages until end of file."""
    from tulu_jax import preflight

    cli.check(config, preflight.to_read)
    from tulu_jax import trained
    from tulu_jax.decode import chat_loop

    model = trained.Generator(
        config,
        step=_STEP.value,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_p=_TOP_P.value,
        seed=_SEED.value,
    )
    if not _PROMPT.value:
        chat_loop.converse(
            lambda m: model.replies([m])[0], lines=chat_loop.terminal_lines(), write=print
        )
        return
    conversations = [[{"role": "user", "content": text}] for text in _PROMPT.value]
    for text, reply in zip(_PROMPT.value, model.replies(conversations), strict=True):
        print(f"> {text}\n{reply}")


if __name__ == "__main__":
    cli.run(main)
