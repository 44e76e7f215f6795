"""Scores what a run trained on its benchmark, and keeps the scores in its workdir, by step.

There is one benchmark: the held-out prompts of tulu_tiny, for runs that train on rows of it.

Examples:
  python -m tulu_jax.evaluate --gin_file=tulu_tiny_sft.gin --initial   # before training
  python -m tulu_jax.evaluate --gin_file=tulu_tiny_sft.gin
"""

import jax
from absl import flags

from tulu_jax import cli, strict_json

_INITIAL = flags.DEFINE_bool("initial", False, "Score the parameters that training starts from.")
_STEP = flags.DEFINE_integer(
    "step", None, "Step of the checkpoint. Default: the latest.", lower_bound=0
)
flags.register_multi_flags_validator(
    ["initial", "step"],
    lambda given: not given["initial"] or given["step"] is None,
    message="--initial is before any step; give one of --initial and --step",
)


def main(config) -> None:
    """Runs the held-out prompts of tulu_tiny greedily; prints and saves the scores."""
    from tulu_jax.evals import held_out_prompts

    cli.stop_if(held_out_prompts.problems(config.data))
    from tulu_jax import preflight

    cli.check(config, preflight.to_read)
    from tulu_jax import trained

    model = trained.Generator(config, step=_STEP.value, initial=_INITIAL.value, max_new_tokens=32)
    scores, replies = held_out_prompts.evaluate(model.replies)
    if jax.process_index() == 0:
        held_out_prompts.save(config.workdir, model.step, scores, replies)
    print(strict_json.dumps(scores))


if __name__ == "__main__":
    cli.run(main)
