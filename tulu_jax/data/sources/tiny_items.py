"""Items of tulu_tiny that are one question and its answer: how they are split, and as rows."""

import dataclasses
import itertools
import random
from collections.abc import Mapping

Item = tuple[str, str, str]  # group, question, answer


@dataclasses.dataclass(frozen=True)
class Items:
    """Items to train on, of which those of a small family come again, and held-out ones, whose
    questions no train item has."""

    train: list[Item]
    held: list[Item]

    def rows(self, split: str) -> list[dict]:
        """Rows `{"messages"}` of a split, all answers terse."""
        return [
            {"messages": [*_asked(question), {"role": "assistant", "content": answer}]}
            for _, question, answer in (self.held if split == "validation" else self.train)
        ]

    def held_out(self) -> list[tuple[str, list[dict], str]]:
        """(group, prompt messages, right answer) of each held-out item."""
        return [(group, _asked(question), answer) for group, question, answer in self.held]


def split(
    families: Mapping[str, list[Item]], *, seed: int, train: int, held: int, share: float = 1.0
) -> Items:
    """So many items to train on, each family as many; of each at most `held` are held out, and no
    more than `share` of it. The same ones for one `seed`."""
    rng, learnt, kept = random.Random(seed), [], []
    for its in families.values():
        items = list(its)
        rng.shuffle(items)
        out = min(held, int(len(items) * share))
        kept += items[:out]
        learnt += itertools.islice(itertools.cycle(items[out:]), train // len(families))
    rng.shuffle(learnt)
    rng.shuffle(kept)
    return Items(learnt, kept)


def _asked(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]
