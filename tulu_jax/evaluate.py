"""Scores what a run trained on a benchmark, and keeps the scores in its workdir.

Examples:
  python -m tulu_jax.evaluate --gin_file=tulu_tiny_sft.gin --initial   # before training
  python -m tulu_jax.evaluate --gin_file=tulu_tiny_sft.gin
"""

import json

import jax
from absl import flags
from etils import epath

from tulu_jax import cli

_INITIAL = flags.DEFINE_bool("initial", False, "Score the parameters that training starts from.")
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint. Default: the latest.")


def main(config) -> None:
    """Runs the held-out prompts of tulu_tiny greedily; prints and saves the scores."""
    cli.check(config)
    from tulu_jax import trained
    from tulu_jax.evals import tulu_tiny

    model = trained.Generator(config, step=_STEP.value, initial=_INITIAL.value, max_new_tokens=32)
    scores, replies = tulu_tiny.evaluate(model.replies)
    name = "initial" if _INITIAL.value else "final"
    if jax.process_index() == 0:
        epath.Path(config.workdir).mkdir(parents=True, exist_ok=True)
        (epath.Path(config.workdir) / f"tulu_tiny_{name}.json").write_text(
            json.dumps({"scores": scores, "replies": replies}, indent=1)
        )
    print(json.dumps(scores))


if __name__ == "__main__":
    cli.run(main)
