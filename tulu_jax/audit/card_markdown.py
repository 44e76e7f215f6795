"""The mixture card as a Markdown page."""

import re
from collections.abc import Iterable, Sequence

MATCHES_SHOWN, TEXT_SHOWN, IDS_SHOWN = 20, 120, 5
_NUMBER = re.compile(r"–|[-+]?[\d,.]*( ?%| points)?")


def render(card: dict, matches: list[dict] | None, *, pictures: Sequence[str]) -> str:
    """The page of `card.json`; `pictures` are files beside it, each shown where it belongs."""
    settings = ", ".join(f"{name} `{value}`" for name, value in card["settings"].items())
    parts = [
        f"# Mixture card: {card['mixture']}",
        f"{_noun(card).capitalize()}. {settings}.",
        *_rows(card),
        *_tokens(card),
        *_lengths(card),
        *_packing(card),
        *_names(card["name_filter"]),
        *(_audit(card["audit"]) if card["audit"] else ()),
        *(_overlaps(card["contamination"], matches) if card["contamination"] else ()),
        *_sources(card),
    ]
    shown = []
    for part in parts:
        if part.startswith("![") and part.partition("](")[2].rstrip(")") not in pictures:
            continue
        shown.append(part)
    return "\n\n".join(shown) + "\n"


def _noun(card: dict) -> str:
    return "conversations" if card["kind"] == "sft" else "pairs"


def _rows(card: dict) -> Iterable[str]:
    yield "## Rows"
    header = ("task", "split", "raw", "parts added", "not drawn", "left out", "kept", "of them cut")
    lines = [
        (t["task"], t["split"], t["raw_rows"], t["added_parts"], t["not_drawn"])
        + (sum(t["dropped"].values()), t["examples"], t["cut"], t["found"], *_expectation(t))
        for t in card["tasks"]
    ]
    lines = [(*line, *[""] * (11 - len(line))) for line in _with_sums(lines, columns=7)]
    yield _table((*header, "found", "expected", "difference"), lines)
    yield (
        "Raw and added = not drawn + left out + kept. `found` counts examples before any is left "
        "out; a dash: the source states no number."
    )
    repeated = [f"{t['repeated_ids']:,} of {t['task']}" for t in card["tasks"] if t["repeated_ids"]]
    if repeated:
        yield f"Kept with the upstream id of an earlier row: {', '.join(repeated)}."
    reasons = [
        (t["task"], t["split"], reason, count)
        for t in card["tasks"]
        for reason, count in t["dropped"].items()
    ]
    if reasons:
        yield _table(("task", "split", "left out because", "rows"), reasons)
    yield "![rows and tokens of each task](components.png)"


def _expectation(task: dict) -> tuple:
    if task["expected"] is None:
        return "–", "–"
    return task["expected"], f"{task['found'] - task['expected']:+,}"


def _with_sums(lines: list[tuple], *, columns: int) -> list[tuple]:
    """The lines, and for each split that has several the sums of the columns after task, split."""
    sums = []
    for split in dict.fromkeys(line[1] for line in lines):
        parts = [line[2 : 2 + columns] for line in lines if line[1] == split]
        if len(parts) > 1:
            sums.append(("all", split, *map(sum, zip(*parts, strict=True))))
    return lines + sums


def _tokens(card: dict) -> Iterable[str]:
    yield "## Tokens"
    keys = ("tokens_filtered", "tokens_over_length", "tokens", "trained_tokens")
    lines = [(t["task"], t["split"], *(t[key] for key in keys)) for t in card["tasks"]]
    lines = _with_sums(lines, columns=4)
    lines = [
        (task, split, filtered + over + kept, filtered, over, kept, trained)
        + (_percent(trained / kept if kept else None),)
        for task, split, filtered, over, kept, trained in lines
    ]
    header = ("task", "split", "before", "filtered", "over max_length", "kept", "trained", "share")
    yield _table(header, lines)
    train = [t for t in card["tasks"] if t["split"] == "train"]
    kept, trained = (sum(t[key] for t in train) for key in ("tokens", "trained_tokens"))
    both = "" if card["kind"] == "sft" else "; of a pair both sides, each with its prompt"
    yield (
        f"{_percent(trained / kept)} of the train tokens are trained on. Tokens are counted after "
        f"the shift{both}. Rows that a converter leaves out, or that are not drawn, have no tokens "
        "here."
    )


def _lengths(card: dict) -> Iterable[str]:
    found = card["lengths"]
    what = "conversation" if card["kind"] == "sft" else "side of a pair, prompt and answer"
    yield "## Lengths"
    yield f"Tokens of a {what}, after the shift and the cut."
    yield "![lengths](lengths.png)"
    columns = ("count", "mean", "25 %", "50 %", "75 %", "max")
    lines = [("all", *(found[c] for c in columns))]
    lines += [(t["task"], *(t[c] for c in columns)) for t in found["by_task"]]
    yield _table(("task", *columns), lines if len(found["by_task"]) > 1 else lines[:1])
    paper = found["paper"]
    if paper is None:
        yield "The paper gives no lengths of its pairs."
        return
    lines = [
        (name, found[name], paper[name], f"{found[name] / paper[name] - 1:+.0%}")
        for name in ("25 %", "75 %", "mean")
    ]
    shares = found["over_2048"] / found["count"], paper["over_2048"] / paper["rows"]
    lines.append(("over 2,048 tokens", *map(_percent, shares), _points(*shares)))
    yield _table(("", "here", "paper", "difference"), lines)
    settings = card["settings"]
    yield (
        f"The paper's are of the {paper['rows']:,} rows of the V2 mixture with Llama's tokenizer "
        f"(arXiv 2311.10702, §2). Here they may differ because this is {card['mixture']} with "
        f"{found['count']:,} rows; because of the tokenizer, `{settings['tokenizer']}`; because "
        f"rows end at {settings['max_length']:,} tokens; and by one token, because a row is "
        "counted after the shift."
    )


def _packing(card: dict) -> Iterable[str]:
    noun = _noun(card)
    yield "## Packing and updates"
    yield _table(
        ("packing", "row length", "rows an epoch", "positions used", "too long"),
        [
            (p["packing"], p["row_length"], p["rows"], _percent(p["used"]), p["too_long"])
            for p in card["packings"]
        ],
    )
    yield (
        "`as the original`: each padded to 8,192, as the paper's trainer did. `too long` ones do "
        "not fit such a row as they are cut now, and are not counted in it."
    )
    yield _table(
        ("rows an update", "packing", "rows", "updates an epoch")
        + (f"{noun} expected", "spread (sd)", "fewest", "most"),
        [
            (u["why"], u["packing"], u["rows"], u["updates"], f"{u['expected']:.1f}")
            + tuple("–" if u[c] is None else round(u[c], 1) for c in ("std", "min", "max"))
            for u in card["updates"]
        ],
    )
    yield (
        f"Expected: mean {noun} of a row times rows. Spread, fewest and most are over the updates "
        "of epoch 0 as planned."
    )
    yield f"![{noun} an update](updates.png)"


def _names(found: dict | None) -> Iterable[str]:
    if found is None:
        return
    yield "## Name filter"
    yield (
        f"{found['rows']:,} train rows are left out because they name an assistant or its maker. "
        "A row counts for every name in it; `alone` are rows with no other."
    )
    yield _table(
        ("name", "rows", "alone"),
        [(name, c["rows"], c["alone"]) for name, c in found["names"].items()],
    )


def _audit(audit: dict) -> Iterable[str]:
    length, similar, prompts = audit["length"], audit["similarity"], audit["prompts"]
    yield "## Audit of the pairs"
    yield "### Length"
    header = ("pairs of", "pairs", "chosen longer", "equal", "longer is chosen", "interval")
    lines = [("all", *_longer(length))]
    if len(length["by_task"]) > 1:
        lines += [(t["task"], *_longer(t)) for t in length["by_task"]]
    gaps = length["by_score_gap"]
    if not isinstance(gaps, str):
        lines += [(_gap(g), *_longer(g)) for g in gaps]
    yield _table((*header, "mean difference", "median"), lines)
    yield (
        f"Trained tokens of an answer: chosen {length['mean_chosen']:,.1f}, rejected "
        f"{length['mean_rejected']:,.1f} on average. `longer is chosen` is the share among pairs "
        "of unequal length, with its 95 % interval; 50 % is no bias."
        + (f" Score gaps: {gaps}." if isinstance(gaps, str) else "")
    )
    yield "![length of chosen and rejected](pair_lengths.png)"
    yield "### Scores, prompts, near-duplicates"
    yield _scores(audit["scores"])
    yield (
        f"Prompts: {prompts['distinct']:,} distinct; {prompts['repeated']:,} of several pairs "
        f"({prompts['pairs_of_repeated']:,} pairs, at most {prompts['most_pairs_of_one']:,} of one "
        f"prompt). In {prompts['contradicting']:,} of these, an answer is chosen in one pair and "
        f"rejected in another{_ids(i for group in prompts['such_pairs'] for i in group)}."
    )
    yield (
        f"Near-duplicates ({similar['method']}, {similar['threshold']} or more; across pairs found "
        f"by MinHash, then compared): the two answers of {similar['within_alike']:,} pairs"
        f"{_ids(similar['such_pairs'])}; across pairs {similar['across_answers']:,} answers in "
        f"{similar['across_groups']:,} groups, {similar['across_on_both_sides']:,} of them with "
        f"chosen and rejected answers. Mean similarity within a pair: {similar['within_mean']:.3f}."
    )
    if similar["largest_groups"]:
        yield _table(
            ("largest groups of alike answers", "answers", "of them chosen"),
            [
                (f"`{_cut(g['text'])}`", g["answers"], g["chosen"])
                for g in similar["largest_groups"]
            ],
        )
    yield "![similarity of the answers of a pair](pair_similarity.png)"
    yield "### Regularities"
    yield (
        "Of the pairs in which one side alone has the feature, how often that side is the chosen "
        "one, with a 95 % interval; a dash: no such pair. The first words are the most uneven of "
        "those that enough pairs have on one side alone: some leave 50 % out by chance."
    )
    yield "![regularities](pair_regularities.png)"
    named = [(r["feature"], r) for r in audit["regularities"]]
    named += [(f"first word “{r['word']}”", r) for r in audit["openings"]]
    yield _table(
        ("feature", "in chosen", "in rejected", "on one side", "of them chosen", "interval"),
        [(name, r["in_chosen"], r["in_rejected"], *_shares(r)) for name, r in named],
    )
    yield from _slots(audit["slots"])
    if isinstance(audit["models"], str):
        yield f"Whose the answers are: {audit['models']}."
    else:
        yield _table(
            ("model", "pairs with another", "of them chosen", "interval"),
            [(m["model"], *_shares(m)) for m in audit["models"]],
        )


def _gap(group: dict) -> str:
    values = dict.fromkeys((group["from"], group["to"]))
    return "score gap " + " to ".join(f"{value:g}" for value in values)


def _longer(found: dict) -> tuple:
    counts = found["pairs"], found["chosen_longer"], found["equal"]
    differences = f"{found['mean_difference']:+,.1f}", f"{found['median_difference']:+,.1f}"
    return (*counts, *_shares(found["longer_chosen"])[1:], *differences)


def _shares(share: dict) -> tuple:
    if not share["on_one_side"]:
        return 0, "–", "–"
    interval = f"{share['low']:.0%} to {share['high']:.0%}"
    return share["on_one_side"], _percent(share["chosen_share"]), interval


def _scores(scores: dict | str) -> str:
    if isinstance(scores, str):
        return f"Scores: {scores}."
    return (
        f"Scores of {scores['recorded']:,} pairs are recorded, the mean gap is "
        f"{scores['mean_gap']:.2f}. Ties kept: {scores['ties']:,} (those left out are above). "
        f"Chosen scored below rejected: {scores['chosen_below_rejected']:,}"
        f"{_ids(scores['such_pairs'])}."
    )


def _slots(slots: dict | str) -> Iterable[str]:
    if isinstance(slots, str):
        yield f"Places of the two sides among a record's completions: {slots}."
        return
    yield _table(
        ("place in the raw record", "chosen", "rejected"),
        [(i, *both) for i, both in enumerate(zip(slots["chosen"], slots["rejected"], strict=True))],
    )
    share, interval = _shares(slots["earlier_chosen"])[1:]
    yield f"The chosen side is the earlier one in {share} of the pairs ({interval})."


def _overlaps(found: dict, matches: list[dict]) -> Iterable[str]:
    yield "## Overlap with benchmarks"
    yield (
        f"Benchmark prompts in {found['rows']:,} train rows, every message searched (in "
        f"{found['seconds']:.1f} s); {found['rows_with_a_match']:,} rows have a match. Method: a "
        "common n-gram of words, letter case and punctuation aside, with n the 5th percentile of a "
        "benchmark's prompt lengths between 8 and 13 (GPT-3, Brown et al. 2020, appendix C); "
        "shorter prompts must be there whole, those under 5 words as a whole message. `whole`: "
        "the prompt word for word; `most`: half of its words or more in such n-grams; `part`: "
        "less, often a stock phrase."
    )
    grades = ("whole", "most", "part")
    yield _table(
        ("benchmark", "prompts", "n")
        + tuple(f"prompts, {g}" for g in grades)
        + tuple(f"rows, {g}" for g in grades),
        [
            (b["benchmark"], b["prompts"], b["n"])
            + tuple(b["prompts_found"][g] for g in grades)
            + tuple(b["rows"][g] for g in grades)
            for b in found["benchmarks"]
        ],
    )
    if not matches:
        return
    yield _table(
        ("task", "rows with a match, by benchmark"),
        [
            (task, ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items())))
            for task, counts in found["by_task"].items()
        ],
    )
    shown = _some_of_each(matches)
    yield f"{len(shown)} of {len(matches):,} matches; all are in `contamination.jsonl`."
    yield _table(
        ("row", "place", "benchmark", "item", "grade", "words", "longest stretch in common"),
        [
            (m["row"], m["place"], m["benchmark"], m["item"], m["grade"])
            + (f"{m['words']} of {m['of']}", f"`{_cut(m['text'])}`")
            for m in shown
        ],
    )


def _some_of_each(matches: list[dict]) -> list[dict]:
    """The fullest matches of each benchmark in turn, MATCHES_SHOWN in all, benchmarks together."""
    rank: dict[str, int] = {}
    keyed = []
    for match in matches:
        rank[match["benchmark"]] = rank.get(match["benchmark"], 0) + 1
        keyed.append((rank[match["benchmark"]], match))
    chosen = sorted(keyed, key=lambda pair: pair[0])[:MATCHES_SHOWN]
    return [m for _, m in sorted(chosen, key=lambda pair: (pair[1]["benchmark"], pair[0]))]


def _sources(card: dict) -> Iterable[str]:
    yield "## Sources"
    yield _table(
        ("task", "split", "licence", "origin", "rows left out, with reasons"),
        [
            (t["task"], t["split"], t["licence"], t["origin"], f"`{t['aside']}`")
            for t in card["tasks"]
        ],
    )


def _ids(found: Iterable[str]) -> str:
    names = list(found)
    if not names:
        return ""
    more = ", …" if len(names) > IDS_SHOWN else ""
    return f" ({', '.join(names[:IDS_SHOWN])}{more})"


def _cut(text: str) -> str:
    text = text.replace("`", "'")
    return text if len(text) <= TEXT_SHOWN else text[: TEXT_SHOWN - 1] + "…"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _points(ours: float, theirs: float) -> str:
    return f"{100 * (ours - theirs):+.1f} points"


def _table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Numbers on the right, with thousands apart; columns as wide as their cells."""
    cells = [[_cell(value) for value in row] for row in (header, *rows)]
    right = [all(_NUMBER.fullmatch(row[i]) for row in cells[1:]) for i in range(len(header))]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    rule = [
        "-" * (width - 1) + (":" if is_right else "-")
        for width, is_right in zip(widths, right, strict=True)
    ]
    lines = [cells[0], rule, *cells[1:]]
    return "\n".join(
        "| "
        + " | ".join(
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(line, widths, right, strict=True)
        )
        + " |"
        for line in lines
    )


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}"
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text.replace("|", "\\|")
