"""Shown rows as one self-contained HTML page: no script, no file beside it, nothing fetched."""

from collections.abc import Iterable, Iterator, Mapping

import jinja2

from tulu_jax.audit import pieces
from tulu_jax.audit.show import ShownRow

LEGEND = {
    "trained": "trained on",
    "read": "read, not trained on",
    "tag": "tag of the template",
    "special": "special token of the template",
    "typed": "special token that a message contains as text",
    "cut": "removed by truncation",
}


def page(facts: Mapping[str, str], rows: Iterable[ShownRow]) -> str:
    """The page. It is well-formed XML too; every text in it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tulu_jax.audit", ""),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    template = environment.get_template("show.html")
    return template.render(
        facts=facts, rows=rows, legend=LEGEND, strip=_strip, visible=pieces.visible
    )


def _strip(row: ShownRow) -> Iterator[tuple[str, int, str]]:
    """(classes, positions, name) of stretches of the row: what is trained, read, and padding."""
    previous = (0, 0)
    for segment, branch, trained, length in row.runs:
        kinds = ["trained"] * trained + ["padding"] * (not segment)
        kinds += ["border"] * (bool(segment) and previous[0] > 0 and previous != (segment, branch))
        previous = (segment, branch)
        yield " ".join(kinds), length, f"segment {segment}" if segment else "padding"
