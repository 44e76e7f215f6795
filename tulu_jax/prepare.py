"""Encodes the data of a run into its cache and says what became of every row.

Examples:
  python -m tulu_jax.prepare --gin_file=tulu_tiny_sft.gin
  python -m tulu_jax.prepare --gin_file=stories260k_sft.gin '--gin.DATA_ROOT="/data"'
"""

from tulu_jax import cli


def main(config) -> None:
    """Encodes both splits (or finds them encoded); their counts are logged."""
    from tulu_jax.data import loader

    cli.stop_if(loader.problems(config.data, kind=config.data.kind))
    for split in ("train", "validation"):
        loader.prepare(config.data, split=split)


if __name__ == "__main__":
    cli.run(main)
