"""Scores what a run trained on its benchmark, and keeps the scores in its workdir, by step.

There is one benchmark: the held-out prompts of tulu_tiny, for runs that train on rows of it.

Examples:
  python -m tulu_jax.evaluate --gin_file=tulu_tiny_sft.gin --initial   # before training
  python -m tulu_jax.evaluate --gin_file=tulu_tiny_sft.gin
  python -m tulu_jax.evaluate --gin_file=tulu_tiny_sft.gin --engine=openai --url=http://host:8000/v1
"""

import importlib.util

import jax
from absl import flags

from tulu_jax import cli, strict_json, validation

MOST_TOKENS = 32  # of a reply

_INITIAL = flags.DEFINE_bool("initial", False, "Score the parameters that training starts from.")
_STEP = flags.DEFINE_integer(
    "step", None, "Step of the checkpoint. Default: the latest.", lower_bound=0
)
_ENGINE = flags.DEFINE_enum(
    "engine", "own", ["own", "openai"], "What answers: our decoder, or the server at --url, which "
    "serves this step of this run.",
)  # fmt: skip
_URL = flags.DEFINE_string("url", None, "Address of an OpenAI-compatible server, up to its /v1.")
_MODEL = flags.DEFINE_string(
    "model", None, "The model's name at that server. Default: the one that it has."
)
_CONCURRENCY = flags.DEFINE_integer(
    "concurrency", 32, "Requests that are under way at that server.", lower_bound=1
)
flags.register_multi_flags_validator(
    ["initial", "step"],
    lambda given: not given["initial"] or given["step"] is None,
    message="--initial is before any step; give one of --initial and --step",
)


def main(config) -> None:
    """Runs the held-out prompts of tulu_tiny greedily; prints and saves the scores."""
    from tulu_jax.evals import held_out_prompts

    is_ours = _ENGINE.value == "own"
    cli.stop_if(_problems(is_ours))
    cli.stop_if(held_out_prompts.problems(config.data))
    from tulu_jax import preflight

    cli.check(config, preflight.to_read)
    from tulu_jax import trained

    if is_ours:
        model = trained.Generator(
            config, step=_STEP.value, initial=_INITIAL.value, max_new_tokens=MOST_TOKENS
        )
        step, respond = model.step, model.replies
    else:
        step = None if _INITIAL.value else trained.saved_step(config, _STEP.value)
        respond = _at_server(config)
    scores, replies = held_out_prompts.evaluate(respond)
    if jax.process_index() == 0:
        held_out_prompts.save(config.workdir, step, scores, replies)
    print(strict_json.dumps(scores))


def _problems(is_ours: bool):
    if is_ours and (_URL.value is not None or _MODEL.value is not None):
        yield "--url and --model are those of a server; give --engine=openai with them"
    if not is_ours and _URL.value is None:
        yield "--engine=openai is at an address; give --url, such as http://127.0.0.1:8000/v1"
    if not is_ours and importlib.util.find_spec("openai") is None:
        yield '--engine=openai needs the package openai; pip install "tulu_jax[eval]"'


def _at_server(config):
    """What answers conversations: the server at --url, with the tokenizer and template of a run."""
    from tulu_jax import trained
    from tulu_jax.data import chat as chat_lib
    from tulu_jax.decode.sampling import Sampling
    from tulu_jax.serving import engine as engine_lib
    from tulu_jax.serving import openai_engine

    with validation.reading():
        tokenizer = chat_lib.load_tokenizer(trained.tokenizer_path(config))
    engine = openai_engine.OpenAIEngine(
        _URL.value, model=_MODEL.value, concurrency=_CONCURRENCY.value, details=False
    )

    def respond(conversations):
        sampling = Sampling(max_new_tokens=MOST_TOKENS)
        return engine_lib.replies(engine, conversations, sampling, tokenizer, chat=config.data.chat)

    return respond


if __name__ == "__main__":
    cli.run(main)
