"""The rollouts of an iteration, and the file of the workdir that a resumed run reads them from.

An iteration begins with rollouts of the parameters as they then are. A checkpoint from its middle
has others, so the rollouts are written, whole and with a digest, before the first update.
"""

import dataclasses
import io
import re

import jax
import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int

from tulu_jax import atomic, digests, validation
from tulu_jax.data import fields as fields_lib

FOLDER = "rollouts"  # in the workdir
NAME = re.compile(r"(\d{6,})-([0-9a-f]{16})\.npz")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Prompts with their answers, one a row, and what the models said before the first update.

    The first `prompt_lengths` of a row's `lengths` tokens are the prompt's; behind them is padding.
    Positions of the float32 [B, T] are those of inputs: the log-probability at t is of token t + 1,
    the value is of what was there up to t. `ended` tells whether an answer has its end token.
    """

    tokens: Int[np.ndarray, "B T"]
    prompt_lengths: Int[np.ndarray, "B"]
    lengths: Int[np.ndarray, "B"]
    ended: Bool[np.ndarray, "B"]
    scores: Float[np.ndarray, "B"] | None = None
    logps: Float[np.ndarray, "B T"] | None = None
    ref_logps: Float[np.ndarray, "B T"] | None = None
    values: Float[np.ndarray, "B T"] | None = None

    @classmethod
    def of(cls, prompts, answers, *, end: int, length: int) -> "Rollouts":
        """Rows of `length` positions from ids; an answer has `ended` if its last id is `end`."""
        tokens = np.zeros((len(prompts), length), np.int32)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            tokens[row, : len(prompt) + len(answer)] = [*prompt, *answer]
        prompt_lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        return cls(
            tokens=tokens,
            prompt_lengths=prompt_lengths,
            lengths=prompt_lengths + np.array([len(answer) for answer in answers], np.int32),
            ended=np.array([answer[-1] == end for answer in answers]),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> "Rollouts":
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Rollouts(**{name: v if v is None else v[rows] for name, v in fields.items()})

    @property
    def mask(self) -> Bool[np.ndarray, "B T"]:
        """The positions whose target is a token of the answer."""
        place = np.arange(self.tokens.shape[1])
        return (place >= self.prompt_lengths[:, None] - 1) & (place < self.lengths[:, None] - 1)

    @property
    def last(self) -> Int[np.ndarray, "B"]:
        """The position whose target is the last token of the answer."""
        return self.lengths - 2

    def rows(self) -> dict[str, np.ndarray]:
        """The fields by position (`fields.BY_POSITION`). The last token is an input too, without a
        target: it is what a reward model reads."""
        place = np.broadcast_to(np.arange(self.tokens.shape[1]), self.tokens.shape)
        inside = place < self.lengths[:, None]
        found = {
            "tokens": self.tokens,
            "targets": np.where(self.mask, np.roll(self.tokens, -1, axis=1), 0),
            "loss_mask": self.mask,
            "segment_ids": inside,
            "positions": np.where(inside, place, 0),
        }
        return {name: found[name].astype(dtype) for name, dtype in fields_lib.BY_POSITION.items()}

    def kl(self) -> Float[np.ndarray, "B T"]:
        """log π − log π_ref of each token of the answers, 0 elsewhere: an estimate of the KL
        divergence from the reference."""
        return np.where(self.mask, self.logps - self.ref_logps, 0.0)


def save(workdir: str, iteration: int, rollouts: Rollouts) -> None:
    """Writes the rollouts of `iteration` in place of those of it that are there; by process 0."""
    if jax.process_index() != 0:
        return
    folder, stream = epath.Path(workdir) / FOLDER, io.BytesIO()
    folder.mkdir(parents=True, exist_ok=True)
    before = _files(folder, iteration)
    np.savez_compressed(stream, **dataclasses.asdict(rollouts))
    content = stream.getvalue()
    file = folder / f"{iteration:06d}-{digests.of_bytes(content)}.npz"
    for other in before:  # first: two would leave it open which the updates had
        if other != file:
            atomic.remove(other)
    atomic.write_bytes(file, content)


def load(workdir: str, iteration: int) -> Rollouts:
    """The rollouts of `iteration`. Raises `UsageError` if they are not there or were damaged."""
    folder = epath.Path(workdir) / FOLDER
    files = _files(folder, iteration)
    advice = "go back to a checkpoint from an iteration's end, or start anew in another --workdir"
    if len(files) != 1:
        raise validation.UsageError(
            f"{folder} has {len(files)} files of the rollouts of iteration {iteration}, in which "
            f"the checkpoint was made; expected one. Restore it, {advice}"
        )
    content = files[0].read_bytes()
    found, expected = digests.of_bytes(content), NAME.fullmatch(files[0].name)[2]
    if found != expected:
        raise validation.UsageError(
            f"{files[0]}: found digest {found}, expected {expected}. Restore that file, {advice}"
        )
    with np.load(io.BytesIO(content)) as arrays:
        return Rollouts(**dict(arrays))


def sweep(workdir: str, needed: set[int]) -> None:
    """Removes the files of other iterations than those `needed`; by process 0."""
    folder = epath.Path(workdir) / FOLDER
    if jax.process_index() != 0 or not folder.exists():
        return
    atomic.sweep(folder)
    for file in folder.iterdir():
        named = NAME.fullmatch(file.name)
        if named and int(named[1]) not in needed:
            atomic.remove(file)


def _files(folder: epath.Path, iteration: int) -> list[epath.Path]:
    found = folder.iterdir() if folder.exists() else ()
    named = ((file, NAME.fullmatch(file.name)) for file in found)
    return [file for file, name in named if name and int(name[1]) == iteration]
