"""What a decoder gives back, and what it took."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A continuation: its ids, with the stop id or the tokens that completed a stop string; of each
    id the model's log-probability; its text, without those, if there was a `detokenize`; and how it
    ended: 'stop_id', 'stop' or 'length'."""

    prompt: int
    sample: int
    ids: list[int]
    logps: list[float]
    text: str | None
    ended: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """What came new of a continuation: ids with their log-probabilities, and text that stays;
    `ended` as `Result` has it, or None."""

    prompt: int
    sample: int
    ids: list[int]
    logps: list[float]
    text: str
    ended: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """Of each token of a continuation after its prompt the log-probability, and the likeliest id of
    its place with that of it; whether each token is the likeliest."""

    token_logps: list[float]
    likeliest: list[int] | None  # None: an engine that does not tell
    likeliest_logps: list[float]
    is_greedy: bool

    @property
    def logps(self) -> float:
        return sum(self.token_logps)


@dataclasses.dataclass(kw_only=True)
class Usage:
    """What the last call of `generate` computed: positions of decoding and how many of them came
    out, positions of packed rows and of prompts in them, positions of prompts that had been
    computed before, for others, and, added up over programs, positions of the pages that were held
    and of those how many were used."""

    decoded: int = 0
    useful: int = 0
    packed: int = 0
    prompts: int = 0
    shared: int = 0
    held: int = 0
    live: int = 0
