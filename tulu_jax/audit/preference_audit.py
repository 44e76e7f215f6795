"""What pairs prefer besides quality: length, openings, layout, slots; and pairs that disagree.

A regularity is judged on the pairs in which exactly one side has it: the share of them in which
that side is the chosen one, with Wilson's 95 % interval. At 50 % it tells nothing about the label.
"""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tulu_jax.audit import near_duplicates, ngrams

ALIKE = 0.8  # Jaccard similarity from which two answers are near-duplicates
OPENING_PAIRS = 20  # an opening word is listed if so many pairs have it on one side alone
OPENINGS, MODELS, SHOWN = 12, 20, 5
GAP_GROUPS = 4
NOT_RECORDED = "not recorded"

_REFUSAL = re.compile(
    r"\b(i('m| am) (so |very |truly )?sorry|i apologi[sz]e|i (can't|cannot|can not)|as an ai\b|"
    r"i('m| am) (unable|not able|just an ai)|i (do not|don't) (have (access|the ability)|feel))"
)
_OPENING_SEEN = 200  # characters in which a refusal is looked for
_AGREEMENT = re.compile(r"(sure|certainly|of course|absolutely|yes|great|definitely)\b")
_LIST = re.compile(r"^\s*([-*•]|\d+[.)])\s", re.MULTILINE)
_LAYOUT = re.compile(r"\*\*\S|^#{1,6} ", re.MULTILINE)

FEATURES: dict[str, Callable[[str], bool]] = {
    "refuses or apologises": lambda a: bool(
        _REFUSAL.search(a[:_OPENING_SEEN].lower().replace("’", "'"))
    ),
    "opens with agreement (Sure, Yes, …)": lambda a: bool(_AGREEMENT.match(a.lower())),
    "opens in lower case": lambda a: a[:1].islower(),
    "has a list": lambda a: bool(_LIST.search(a)),
    "has bold text or headings": lambda a: bool(_LAYOUT.search(a)),
    "has a code block": lambda a: "```" in a,
    "has an exclamation mark": lambda a: "!" in a,
    "has several paragraphs": lambda a: "\n\n" in a,
    "ends with a question": lambda a: a.endswith("?"),
    "ends in mid-sentence": lambda a: a[-1:].isalnum() or a.endswith((",", ";")),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pairs as they are trained on; `chosen_tokens`, `rejected_tokens` [pairs] count the trained
    tokens of the two answers."""

    ids: Sequence[str]
    examples: Sequence[dict]
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray

    def answers(self, side: str) -> list[str]:
        return [example[side][-1]["content"].strip() for example in self.examples]

    def about(self, name: str) -> np.ndarray | None:
        """A number that converters record of each pair, float64 [pairs]; NaN where they do not,
        None if nowhere."""
        found = [example.get("about", {}).get(name) for example in self.examples]
        values = np.array([v if isinstance(v, int | float) else math.nan for v in found], float)
        return None if np.isnan(values).all() else values


def audit(pairs: Pairs) -> dict:
    """All findings as plain numbers, texts and lists."""
    return {
        "pairs": len(pairs.ids),
        "length": length_bias(pairs),
        "scores": scores(pairs),
        "prompts": repeated_prompts(pairs),
        "similarity": similarity(pairs),
        "regularities": regularities(pairs),
        "openings": openings(pairs),
        "slots": slots(pairs),
        "models": models(pairs),
    }


def length_bias(pairs: Pairs) -> dict:
    """How much longer the chosen answers are, in tokens: in all, by task and by score gap."""
    differences = pairs.chosen_tokens - pairs.rejected_tokens
    gaps = _gaps(pairs)
    by_gap: str | list = NOT_RECORDED
    if gaps is not None:
        by_gap = [
            {"from": low, "to": high, **_longer(differences[(gaps >= low) & (gaps <= high)])}
            for low, high in _groups(gaps[~np.isnan(gaps)])
        ]
    tasks = np.array([name.rpartition("/")[0] for name in pairs.ids])
    reach = max(1, math.ceil(np.percentile(np.abs(differences), 99))) if len(differences) else 1
    counts, edges = np.histogram(np.clip(differences, -reach, reach), 61, (-reach, reach))
    return {
        **_longer(differences),
        "mean_chosen": float(np.mean(pairs.chosen_tokens)),
        "mean_rejected": float(np.mean(pairs.rejected_tokens)),
        "by_score_gap": by_gap,
        "by_task": [
            {"task": str(task), **_longer(differences[tasks == task])}
            for task in dict.fromkeys(tasks.tolist())
        ],
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def scores(pairs: Pairs) -> dict | str:
    """Ties and disagreements of scores with labels, or that no scores are recorded."""
    gaps = _gaps(pairs)
    if gaps is None:
        return NOT_RECORDED
    recorded = gaps[~np.isnan(gaps)]
    against = np.flatnonzero(gaps < 0)
    return {
        "recorded": len(recorded),
        "mean_gap": float(recorded.mean()),
        "ties": int((recorded == 0).sum()),
        "chosen_below_rejected": len(against),
        "such_pairs": [pairs.ids[i] for i in against],
    }


def repeated_prompts(pairs: Pairs) -> dict:
    """Prompts of several pairs, and those whose pairs contradict each other: an answer that is
    chosen in one of them and rejected in another."""
    groups = collections.defaultdict(list)
    for index, example in enumerate(pairs.examples):
        key = [(m["role"], m["content"].strip()) for m in example["prompt"]]
        groups[json.dumps(key)].append(index)
    repeated = [group for group in groups.values() if len(group) > 1]
    chosen, rejected = pairs.answers("chosen"), pairs.answers("rejected")
    contradicting = [
        group for group in repeated if {chosen[i] for i in group} & {rejected[i] for i in group}
    ]
    return {
        "distinct": len(groups),
        "repeated": len(repeated),
        "pairs_of_repeated": sum(map(len, repeated)),
        "most_pairs_of_one": max(map(len, groups.values()), default=0),
        "contradicting": len(contradicting),
        "such_pairs": [[pairs.ids[i] for i in group] for group in contradicting],
    }


def similarity(pairs: Pairs) -> dict:
    """Near-duplicates: the two answers of a pair, and answers of different pairs."""
    texts = [*zip(pairs.answers("chosen"), pairs.answers("rejected"), strict=True)]
    sets = [near_duplicates.shingles(text) for both in texts for text in both]
    within = np.array([near_duplicates.jaccard(*sets[i : i + 2]) for i in range(0, len(sets), 2)])
    groups = [
        group
        for group in near_duplicates.clusters(sets, threshold=ALIKE)
        if len({answer // 2 for answer in group}) > 1
    ]
    mixed = [group for group in groups if len({answer % 2 for answer in group}) > 1]
    counts, edges = np.histogram(within, 20, (0, 1))
    alike = np.flatnonzero(within >= ALIKE)
    return {
        "method": f"Jaccard similarity of sets of word {near_duplicates.SHINGLE_WORDS}-grams",
        "threshold": ALIKE,
        "within_mean": float(within.mean()),
        "within_alike": len(alike),
        "such_pairs": [pairs.ids[i] for i in alike],
        "across_answers": sum(map(len, groups)),
        "across_groups": len(groups),
        "across_on_both_sides": len(mixed),
        "largest_groups": [
            {"answers": len(g), "chosen": sum(a % 2 == 0 for a in g), "text": _of(texts, g[0])}
            for g in groups[:SHOWN]
        ],
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def regularities(pairs: Pairs) -> list[dict]:
    """For each feature: how many chosen and rejected answers have it, and which side it is on."""
    chosen, rejected = pairs.answers("chosen"), pairs.answers("rejected")
    return [
        {"feature": name, **_one_sided(map(has, chosen), map(has, rejected))}
        for name, has in FEATURES.items()
    ]


def openings(pairs: Pairs) -> list[dict]:
    """The first words that stand most unevenly: those furthest from 50 % in standard errors."""
    first = [
        [next(iter(ngrams.words(answer[:_OPENING_SEEN])), "") for answer in pairs.answers(side)]
        for side in ("chosen", "rejected")
    ]
    one_sided: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for words in zip(*first, strict=True):
        for side, word in enumerate(words):
            one_sided[word][side] += words[0] != words[1]
    frequent = [word for word, both in one_sided.items() if word and sum(both) >= OPENING_PAIRS]
    frequent.sort(key=lambda w: (-_deviation(*one_sided[w]), w))
    return [
        {"word": word, **_one_sided(*([w == word for w in side] for side in first))}
        for word in frequent[:OPENINGS]
    ]


def slots(pairs: Pairs) -> dict | str:
    """Which places of the raw row the two sides come from, where converters record it."""
    chosen, rejected = pairs.about("slot_chosen"), pairs.about("slot_rejected")
    if chosen is None or rejected is None:
        return NOT_RECORDED
    known = ~np.isnan(chosen) & ~np.isnan(rejected)
    chosen, rejected = chosen[known].astype(int), rejected[known].astype(int)
    places = range(int(max(chosen.max(), rejected.max())) + 1)
    return {
        "chosen": [int((chosen == place).sum()) for place in places],
        "rejected": [int((rejected == place).sum()) for place in places],
        "earlier_chosen": _share(int((chosen < rejected).sum()), int((chosen != rejected).sum())),
    }


def models(pairs: Pairs) -> list[dict] | str:
    """How often the answers of each model are chosen, where converters record whose they are."""
    counts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for example in pairs.examples:
        names = [example.get("about", {}).get(f"model_{side}") for side in ("chosen", "rejected")]
        for side, name in enumerate(names):
            if name is not None and names[0] != names[1]:
                counts[name][side] += 1
    if not counts:
        return NOT_RECORDED
    most = sorted(counts, key=lambda name: (-sum(counts[name]), name))[:MODELS]
    return [{"model": m, **_share(counts[m][0], sum(counts[m]))} for m in most]


def _gaps(pairs: Pairs) -> np.ndarray | None:
    chosen, rejected = pairs.about("score_chosen"), pairs.about("score_rejected")
    return None if chosen is None or rejected is None else chosen - rejected


def _groups(gaps: np.ndarray) -> list[tuple[float, float]]:
    """Ranges of gaps, both ends in, with about as many pairs in each as their values allow."""
    values = np.unique(gaps)
    cuts = np.unique(np.quantile(gaps, np.linspace(0, 1, GAP_GROUPS + 1), method="higher")[1:-1])
    parts = np.split(values, np.searchsorted(values, cuts, side="right"))
    return [(float(part[0]), float(part[-1])) for part in parts if part.size]


def _longer(differences: np.ndarray) -> dict:
    count = len(differences)
    longer, shorter = int((differences > 0).sum()), int((differences < 0).sum())
    return {
        "pairs": count,
        "chosen_longer": longer,
        "equal": count - longer - shorter,
        "longer_chosen": _share(longer, longer + shorter),
        "mean_difference": float(differences.mean()) if count else math.nan,
        "median_difference": float(np.median(differences)) if count else math.nan,
    }


def _one_sided(chosen: Iterable[bool], rejected: Iterable[bool]) -> dict:
    both = np.array([*zip(chosen, rejected, strict=True)], bool).reshape(-1, 2)
    one = both[both[:, 0] != both[:, 1]]
    return {
        "in_chosen": int(both[:, 0].sum()),
        "in_rejected": int(both[:, 1].sum()),
        **_share(int(one[:, 0].sum()), len(one)),
    }


def _share(chosen: int, of: int) -> dict:
    """The share and its 95 % interval (Wilson 1927); of nothing, None."""
    if not of:
        return {"on_one_side": 0, "chosen_share": None, "low": None, "high": None}
    z, share = 1.96, chosen / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return {
        "on_one_side": of,
        "chosen_share": share,
        "low": max(0.0, min(share, middle - half)),  # at 0 and 1, the share up to rounding
        "high": min(1.0, max(share, middle + half)),
    }


def _deviation(chosen: int, rejected: int) -> float:
    return abs(chosen - rejected) / math.sqrt(chosen + rejected)


def _of(texts: list[tuple[str, str]], answer: int) -> str:
    return " ".join(texts[answer // 2][answer % 2].split())[:100]
