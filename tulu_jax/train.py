"""Trains what a gin file describes: SFT or DPO, from the latest checkpoint of its workdir.

Examples:
  python -m tulu_jax.train --gin_file=tulu_tiny_sft.gin
  python -m tulu_jax.train --gin_file=tulu_tiny_dpo.gin --gin.NUM_STEPS=20 --workdir=/tmp/dpo
  python -m tulu_jax.train --gin_file=stories260k_sft.gin '--gin.DATA_ROOT="/data"'
  python -m tulu_jax.train --gin_file=runs/tulu_tiny_sft/config.gin   # exactly that run again

Exit status 75 means that nothing is wrong with the run: a host was preempted or
died, and the same command goes on from the last checkpoint.
"""

from absl import flags

from tulu_jax import cli, strict_json
from tulu_jax.training import checkpoint

_ON_DAMAGE = flags.DEFINE_enum(
    "on_damage",
    checkpoint.ON_DAMAGE[0],
    checkpoint.ON_DAMAGE,
    "What to do about a damaged checkpoint: name it and stop, or set it aside and go on from the "
    "newest one that is whole.",
)


def main(config) -> None:
    """Checks the run as a whole, trains it, and prints the last evaluation as JSON."""
    from tulu_jax import preflight

    cli.check(config, preflight.to_train)
    from tulu_jax import trainer

    run = trainer.Run(config, cli.operative_config(), on_damage=_ON_DAMAGE.value)
    print(strict_json.dumps(run.train()))


if __name__ == "__main__":
    cli.run(main)
