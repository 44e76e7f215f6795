"""The pictures of a mixture card, drawn from `card.json` alone."""

import io
from collections.abc import Callable

import numpy as np

OURS, OTHER, PALE = "#1f77b4", "#d95f02", "#b8c4ce"


def draw(card: dict) -> dict[str, bytes]:
    """PNG pictures by file name."""
    pictures: dict[str, Callable] = {"components.png": _components, "lengths.png": _lengths}
    if _planned(card):
        pictures["updates.png"] = _updates
    if card["audit"]:
        pictures["pair_lengths.png"] = _pair_lengths
        pictures["pair_similarity.png"] = _pair_similarity
        pictures["pair_regularities.png"] = _pair_regularities
    return {name: _png(picture(card)) for name, picture in pictures.items()}


def _components(card: dict):
    """Rows kept, left out and not drawn, and tokens trained and not, of each train task."""
    tasks = [t for t in card["tasks"] if t["split"] == "train"][::-1]
    names = [t["task"] for t in tasks]
    figure, axes = _subplots(1, 2, figsize=(10, 1.6 + 0.35 * len(tasks)), sharey=True)
    rows = {
        "kept": [t["examples"] for t in tasks],
        "left out": [sum(t["dropped"].values()) for t in tasks],
        "not drawn": [t["not_drawn"] for t in tasks],
    }
    trained = [t["trained_tokens"] for t in tasks]
    tokens = {
        "trained": trained,
        "not trained": [t["tokens"] - n for t, n in zip(tasks, trained, strict=True)],
        "filtered or cut": [t["tokens_filtered"] + t["tokens_over_length"] for t in tasks],
    }
    for axis, parts, unit in ((axes[0], rows, "rows"), (axes[1], tokens, "tokens")):
        start = np.zeros(len(tasks))
        axis.use_sticky_edges = False
        for (label, values), colour in zip(parts.items(), (OURS, PALE, OTHER), strict=True):
            if any(values):
                axis.barh(names, values, left=start, label=label, color=colour, height=0.7)
            start = start + values
        axis.set_xlim(left=0)
        axis.set_xlabel(unit)
        axis.xaxis.set_major_formatter(_thousands())
        axis.xaxis.set_major_locator(_few_ticks())
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False, fontsize=9)
        axis.margins(y=0.02)
    return figure


def _lengths(card: dict):
    """Counts on a log axis over lengths on a log axis, quartiles and mean beside the paper's."""
    found, paper = card["lengths"], card["lengths"]["paper"]
    edges, counts = (np.array(found["histogram"][key]) for key in ("edges", "counts"))
    figure, axis = _subplots(1, 1, figsize=(9, 4.2))
    axis.stairs(counts, edges, fill=True, color=PALE)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(0.7, counts.max() * 2)
    marks = {"25 %": ":", "mean": "-", "75 %": "--"}
    for source, values, colour in (("here", found, OURS), ("paper", paper, OTHER)):
        for name, style in marks.items() if values else ():
            label = f"{name}, {source}: {values[name]:,.0f}"
            axis.axvline(values[name], color=colour, linestyle=style, linewidth=1.5, label=label)
    sides = "conversations" if card["kind"] == "sft" else "sides of pairs"
    axis.set_xlabel("tokens (log scale)")
    axis.xaxis.set_major_locator(_one_two_five())
    axis.xaxis.set_minor_formatter("")
    axis.set_ylabel(f"{sides} in the bin (log scale)")
    axis.xaxis.set_major_formatter(_thousands())
    axis.yaxis.set_major_formatter(_thousands())
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def _updates(card: dict):
    """How many examples the planned updates of an epoch hold."""
    noun = "conversations" if card["kind"] == "sft" else "pairs"
    planned = _planned(card)
    figure, axes = _subplots(1, len(planned), figsize=(4.8 * len(planned), 3.4), squeeze=False)
    for axis, update in zip(axes[0], planned, strict=True):
        values = np.array(update["all"])
        width = max(1, round((values.max() - values.min() + 1) / 30))
        edges = np.arange(values.min() - 0.5, values.max() + width + 0.5, width)
        axis.hist(values, edges, color=PALE)
        axis.axvline(update["expected"], color=OURS)
        axis.set_title(f"{update['why']}: {update['rows']:,} rows an update", fontsize=10)
        axis.set_xlabel(f"{noun} in an update (line: expected, {update['expected']:.1f})")
        axis.set_ylabel("updates of epoch 0")
        axis.yaxis.set_major_locator(_few_ticks())
        axis.xaxis.set_major_locator(_few_ticks())
    return figure


def _planned(card: dict) -> list[dict]:
    """The ways to update whose number of examples varies."""
    return [u for u in card["updates"] if u["updates"] and u["packing"] != "none"]


def _pair_lengths(card: dict):
    """Chosen minus rejected tokens, and how often the longer is chosen, by score gap."""
    length = card["audit"]["length"]
    edges, counts = (np.array(length["histogram"][key]) for key in ("edges", "counts"))
    groups = [("all", length["longer_chosen"])]
    if len(length["by_task"]) > 1:
        groups += [(t["task"], t["longer_chosen"]) for t in length["by_task"]]
    if not isinstance(length["by_score_gap"], str):
        groups += [(_gap(g), g["longer_chosen"]) for g in length["by_score_gap"]]
    height = max(3.8, 1.2 + 0.3 * len(groups))
    figure, axes = _subplots(1, 2, figsize=(10, height), width_ratios=(1, 1))
    axes[0].stairs(counts, edges, fill=True, color=PALE)
    axes[0].axvline(0, color="black", linewidth=0.8)
    mean = length["mean_difference"]
    axes[0].axvline(mean, color=OURS, label=f"mean {mean:+,.1f}")
    axes[0].set_xlabel("chosen − rejected, tokens (the outermost 1 % at the ends)")
    axes[0].set_ylabel("pairs")
    axes[0].yaxis.set_major_formatter(_thousands())
    axes[0].legend(frameon=False)
    _shares(axes[1], groups, "longer answer is chosen")
    return figure


def _gap(group: dict) -> str:
    values = dict.fromkeys((group["from"], group["to"]))
    return "score gap " + "–".join(f"{value:g}" for value in values)


def _pair_similarity(card: dict):
    """How alike the two answers of a pair are."""
    similar = card["audit"]["similarity"]
    edges, counts = (np.array(similar["histogram"][key]) for key in ("edges", "counts"))
    figure, axis = _subplots(1, 1, figsize=(7, 3.4))
    axis.stairs(counts, edges, fill=True, color=PALE)
    axis.set_yscale("log")
    axis.set_ylim(0.7, counts.max() * 2)
    axis.set_xlim(0, 1)
    label = f"near-duplicates from {similar['threshold']}: {similar['within_alike']:,} pairs"
    axis.axvline(similar["threshold"], color=OTHER, linestyle="--", label=label)
    axis.set_xlabel(f"chosen and rejected: {similar['method']}")
    axis.set_ylabel("pairs (log scale)")
    axis.yaxis.set_major_formatter(_thousands())
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def _pair_regularities(card: dict):
    """Which side has a feature that one side alone has."""
    audit = card["audit"]
    groups = [(r["feature"], r) for r in audit["regularities"]]
    groups += [(f"first word “{r['word']}”", r) for r in audit["openings"]]
    if not isinstance(audit["slots"], str):
        groups.append(("earlier in the raw record", audit["slots"]["earlier_chosen"]))
    figure, axis = _subplots(1, 1, figsize=(9, 1.2 + 0.3 * len(groups)))
    _shares(axis, groups, "of pairs where one side alone has it, that side is chosen")
    return figure


def _shares(axis, groups: list[tuple[str, dict]], label: str) -> None:
    """Shares with their 95 % intervals, one a line, the first on top; 50 % is marked."""
    known = [(name, share) for name, share in groups if share["on_one_side"]][::-1]
    for place, (_, share) in enumerate(known):
        middle = 100 * share["chosen_share"]
        reach = [[middle - 100 * share["low"]], [100 * share["high"] - middle]]
        clear = not share["low"] <= 0.5 <= share["high"]
        colour = OTHER if clear else OURS
        axis.errorbar(middle, place, xerr=reach, fmt="o", color=colour, markersize=5, capsize=2)
    axis.axvline(50, color="black", linewidth=0.8)
    names = [f"{name}  (n = {share['on_one_side']:,})" for name, share in known]
    axis.set_yticks(range(len(known)), names)
    axis.set_ylim(-0.6, len(known) - 0.4)
    axis.set_xlim(-3, 103)
    axis.set_xticks(range(0, 101, 20))
    axis.set_xlabel(f"{label}, %\n95 % interval; orange where it leaves 50 % out", fontsize=9)
    axis.grid(axis="x", alpha=0.3)


def _subplots(rows: int, columns: int, **options):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, layout="constrained", **options)
    for axis in np.ravel(axes):
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _thousands():
    from matplotlib import ticker

    return ticker.StrMethodFormatter("{x:,.0f}")


def _few_ticks():
    from matplotlib import ticker

    return ticker.MaxNLocator(5, integer=True)


def _one_two_five():
    from matplotlib import ticker

    return ticker.LogLocator(subs=(1, 2, 5))


def _png(figure) -> bytes:
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()
