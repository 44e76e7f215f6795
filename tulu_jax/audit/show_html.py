"""Shown rows as one self-contained HTML page: no script, no file beside it, nothing fetched."""

import html
from collections.abc import Iterable, Iterator, Mapping

from tulu_jax.audit import pieces
from tulu_jax.audit.show import Part, Piece, Segment, ShownRow

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1d2530; --soft: #69758a;
  --line: #e1e5eb; --quiet: #c9d1de; --trained: #cdeed4; --strong: #2f9e55; --tag: #6a48c8;
  --tagbg: #efeafc; --alarm: #c62f3b; --alarmbg: #fde4e4; --cut: #a8545c; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1a2029; --ink: #e3e8f0;
  --soft: #8d99ac; --line: #2c3542; --quiet: #465267; --trained: #1e4a2d; --strong: #46b46c;
  --tag: #b59cff; --tagbg: #2c2549; --alarm: #ff8088; --alarmbg: #55232a; --cut: #c9858b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 76rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, "Noto Sans", sans-serif; }
h1 { margin: 0 0 .75rem; font-size: 1.5rem; }
h2 { margin: 0; font-size: 1.05rem; }
h3 { margin: 0; font-size: .9rem; font-weight: 600; overflow-wrap: anywhere; }
small, dt { color: var(--soft); font-size: .85rem; font-weight: 400; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0 0 1rem; }
dd { margin: 0; overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; align-items: baseline; gap: .4rem 1.2rem;
  color: var(--soft); font-size: .85rem; }
.legend span span { margin-right: .35em; padding: .1em .35em; border-radius: .25em; }
.legend .read, .legend .trained { color: var(--ink); }
article { margin-top: 1.5rem; padding: 1.1rem 1.25rem 1.25rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .6rem; }
.strip { display: flex; height: .8rem; margin: .7rem 0 1rem; border-radius: .3rem;
  overflow: hidden; background: repeating-linear-gradient(135deg, transparent 0 4px,
  var(--line) 4px 6px); }
.strip i { background: var(--quiet); min-width: 0; }
.strip i.trained { background: var(--strong); }
.strip i.padding { background: none; }
.strip i.border { box-shadow: inset 2px 0 var(--card); }
section { margin-top: 1rem; padding-left: .9rem; border-left: 4px solid var(--hue); }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr));
  gap: 0 1.2rem; }
.part { margin-top: .1rem; min-width: 0; }
.sides .part { margin-top: .6rem; }
.part b { margin-right: .3rem; }
pre { margin: .35rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.65 ui-monospace, "DejaVu Sans Mono", "Noto Sans Mono", monospace; }
.trained { background: var(--trained); }
.tag { color: var(--tag); font-weight: 600; }
.special { color: var(--tag); font-weight: 700; background: var(--tagbg); border-radius: .25em; }
.special.trained { color: var(--ink); background: var(--trained); text-decoration: underline;
  text-decoration-color: var(--strong); text-decoration-thickness: 2px;
  text-underline-offset: 3px; }
.typed, .unknown { color: var(--alarm); background: var(--alarmbg); font-weight: 700;
  outline: 1px solid var(--alarm); border-radius: .2em; }
.lost { color: var(--alarm); text-decoration: underline wavy; }
.cut { color: var(--cut); text-decoration: line-through; opacity: .8; }
pre u { color: var(--soft); opacity: .55; text-decoration: none; font-weight: 400; }
#tokens { accent-color: var(--strong); }
body:has(#tokens:checked) pre span { box-shadow: inset 1px 0 var(--soft); }
"""
LEGEND = {
    "trained": "trained on",
    "read": "read, not trained on",
    "tag": "tag of the template",
    "special": "special token of the template",
    "typed": "special token that a message contains as text",
    "cut": "removed by truncation",
}


def page(facts: Mapping[str, str], rows: Iterable[ShownRow]) -> Iterator[str]:
    """Yields the page in pieces. It is well-formed XML too; every text in it is escaped."""
    title = facts["data"]
    yield (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width"/>'
        f"<title>{_escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{_escape(title)}</h1><dl>"
    )
    for name, value in facts.items():
        if name != "data":
            yield f"<dt>{_escape(name)}</dt><dd>{_escape(value)}</dd>"
    legend = "".join(
        f'<span><span class="{kind}">{"abc" if kind != "special" else "&lt;s&gt;"}</span> '
        f"{meaning}</span>"
        for kind, meaning in LEGEND.items()
    )
    yield (
        f'</dl><div class="legend">{legend}<label><input type="checkbox" id="tokens"/> '
        "token borders</label><span>ids and positions: rest on a token</span></div>"
    )
    for row in rows:
        yield from _row(row)
    yield "</body></html>\n"


def _row(row: ShownRow) -> Iterator[str]:
    name, _, rest = str(row).partition(" · ")
    yield f"<article><h2>{_escape(name)} <small>{_escape(rest)}</small></h2>"
    yield f'<div class="strip">{"".join(_strip(row))}</div>'
    for segment in row.segments:
        yield from _segment(segment)
    yield "</article>"


def _strip(row: ShownRow) -> Iterator[str]:
    """The row to scale: what is trained, read, and padding."""
    previous = (0, 0)
    for segment, branch, trained, length in row.runs:
        kinds = ["trained"] * trained + ["padding"] * (not segment)
        kinds += ["border"] * (bool(segment) and previous[0] > 0 and previous != (segment, branch))
        previous = (segment, branch)
        what = f"segment {segment}" if segment else "padding"
        yield (
            f'<i class="{" ".join(kinds)}" style="flex:{length}" '
            f'title="{what} · {length:,} positions"></i>'
        )


def _segment(segment: Segment) -> Iterator[str]:
    hue = segment.number * 137 % 360
    yield (
        f'<section style="--hue:hsl({hue} 60% 55%)">'
        f"<h3>{segment.number} · {_escape(segment.example)}</h3>"
    )
    shared = [part for part in segment.parts if part.name in ("", "prompt")]
    sides = [part for part in segment.parts if part.name not in ("", "prompt")]
    for part in shared:
        yield from _part(part)
    if sides:
        yield '<div class="sides">'
        for part in sides:
            yield from _part(part)
        yield "</div>"
    yield "</section>"


def _part(part: Part) -> Iterator[str]:
    about = str(part).removeprefix(f"{part.name} · ")
    name = f"<b>{part.name}</b>" if part.name else ""
    yield f'<div class="part">{name}<small>{_escape(about)}</small><pre>'
    yield from map(_piece, part.pieces)
    yield "</pre></div>"


def _piece(piece: Piece) -> str:
    kinds = [piece.kind] * (piece.kind != "text") + ["trained"] * piece.trained
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    ids = " ".join(map(str, piece.ids)) or "none"
    text = _escape(pieces.visible(piece.text) or "�").replace("↵\n", "<u>↵</u>\n")
    return f'<span{kind} title="id {ids} · position {piece.position}">{text}</span>'


def _escape(text: str) -> str:
    return html.escape(text)
