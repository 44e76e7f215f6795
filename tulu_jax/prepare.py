"""Encodes the data of a run into its cache and says what became of every row.

Prints a mixture card and leaves it, as Markdown, JSON and pictures, in `<workdir>/data`.
With --show, prints rows as the model sees them; with --check, compares our ids with those of
`transformers` and `sentencepiece`.

Examples:
  python -m tulu_jax.prepare --gin_file=tulu_tiny_sft.gin
  python -m tulu_jax.prepare --gin_file=stories260k_sft.gin '--gin.DATA_ROOT="/data"'
  python -m tulu_jax.prepare --gin_file=stories260k_dpo.gin --eval_data=/data/eval
  python -m tulu_jax.prepare --gin_file=tulu_tiny_sft.gin --show=3 --html=/tmp/rows.html
  python -m tulu_jax.prepare --gin_file=tulu_tiny_sft.gin --check
  python -m tulu_jax.prepare --gin_file=tulu_tiny_sft.gin '--gin.MIXTURE="my.jsonl"'
"""

import os
import sys

from absl import flags

from tulu_jax import atomic, cli, validation

_EVAL_DATA = flags.DEFINE_string(
    "eval_data", None, "Folder of evaluation data; the card lists its prompts in the train rows."
)
_SHOW = flags.DEFINE_integer("show", None, "Print this many rows, from --row on.", lower_bound=1)
_ROW = flags.DEFINE_integer("row", 0, "The first row to --show.", lower_bound=0)
_SPLIT = flags.DEFINE_enum("split", "train", ["train", "validation"], "The split to --show.")
_HTML = flags.DEFINE_string("html", None, "Write the rows to --show as a page to this file too.")
_CHECK = flags.DEFINE_bool("check", False, "Compare our ids with those of other libraries.")
flags.register_multi_flags_validator(
    ["show", "html"],
    lambda given: given["show"] or not given["html"],
    message="--html writes the rows to --show; give --show=N",
)


def main(config) -> None:
    """Encodes both splits (or finds them encoded) and writes their card; or shows, or checks."""
    from tulu_jax import preflight
    from tulu_jax.data import data_checks

    with validation.reading():  # rows of one's own tell their kind
        kind = config.data.kind
    cli.stop_if([*preflight.not_writable(config), *data_checks.problems(config.data, kind=kind)])
    if _CHECK.value:
        sys.exit(_check(config.data))
    if _SHOW.value:
        _show(config.data)
        return
    _card(config)


def _card(config) -> None:
    from etils import epath

    from tulu_jax.audit import benchmarks, card
    from tulu_jax.data import loader, registry

    prompts = None
    if _EVAL_DATA.value:
        try:
            prompts = benchmarks.read_prompts(validation.expanded(_EVAL_DATA.value))
        except (OSError, ValueError) as error:
            cli.stop_if([f"--eval_data: {error}"])
    with validation.reading():
        prepared = {split: loader.prepare(config.data, split=split) for split in registry.SPLITS}
    splits = {split: rows for split, rows in prepared.items() if rows is not None}
    built = card.build(config.data, splits, batch_size=config.batch_size, prompts=prompts)
    folder = epath.Path(config.workdir) / "data"
    sys.stdout.reconfigure(errors="backslashreplace")
    print(card.write(built, folder))
    print(f"Wrote {folder}/card.md")


def _check(data) -> int:
    from tulu_jax.audit import check

    with validation.reading():
        outcomes = check.check(data)
    print(check.report(outcomes, data))
    return int(any(outcome.difference for outcome in outcomes))


def _show(data) -> None:
    from tulu_jax.audit import show, show_html, show_text
    from tulu_jax.data import loader

    with validation.reading():
        rows = loader.prepare(data, split=_SPLIT.value)
    cli.stop_if(show.problems(rows, first=_ROW.value, split=_SPLIT.value))
    shown = list(show.shown_rows(rows, first=_ROW.value, count=_SHOW.value, split=_SPLIT.value))
    facts = show.facts(rows, split=_SPLIT.value)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    sys.stdout.reconfigure(errors="backslashreplace")
    for lines in show_text.listing(facts, shown, colour=colour):
        print(lines)
    if _HTML.value:
        page = show_html.page(facts, shown)
        atomic.write_text(validation.expanded(_HTML.value), page)


if __name__ == "__main__":
    cli.run(main)
