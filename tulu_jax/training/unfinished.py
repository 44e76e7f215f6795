"""What a conversion that was killed had written of its checkpoint, for the next one to go on with.

Orbax fills a folder under a temporary name, and removes one that was left. So before Orbax looks,
the arrays are taken out of it (`Unfinished`), and they are put under the next temporary name before
anything is written (`put_back`). A line for each piece, with its digest, lies beside them: a piece
that is not as its line says is made again.

On local disks alone: in a bucket nothing can be renamed, and a conversion begins anew.
"""

import json
import shutil
from collections.abc import Callable

from absl import logging
from etils import epath

from tulu_jax import strict_json

VERSION = 1  # of how the arrays are laid out
FOLDER = ".step_0.tulu_jax_unfinished"  # of a workdir
_ARRAYS = "ocdbt.process_0"  # Orbax's name for the arrays that one process writes
_LINES = "written.jsonl"


class Unfinished:
    """The pieces that are written, by the name of their array and their layer. What was left in
    `unnamed`, the folder that Orbax filled, is kept if it was `made_of` the same and `opens`."""

    def __init__(
        self,
        workdir: epath.Path,
        unnamed: epath.Path,
        made_of: str,
        opens: Callable[[epath.Path], bool],
    ):
        self._folder, self._digests = workdir / FOLDER, {}
        arrays = self._folder / _ARRAYS
        header, lines = {"version": VERSION, "made_of": made_of}, self._lines()
        if lines and lines[0] == header:
            for left in unnamed.glob(f"state*/{_ARRAYS}"):
                if not arrays.exists():
                    left.rename(arrays)
            if opens(arrays):
                self._digests = {
                    (line["array"], line["layer"]): tuple(line["digest"]) for line in lines[1:]
                }
                logging.info("%d pieces of step 0 were written before", len(self._digests))
        if not self._digests:
            remove(workdir)
            self._folder.mkdir(parents=True)
        self._file = (self._folder / _LINES).open("w")
        self._say(header)
        for (array, layer), digest in self._digests.items():
            self._say({"array": array, "layer": layer, "digest": digest})

    def put_back(self, folder: epath.Path) -> None:
        """Moves the arrays to where Orbax writes those of a state."""
        if (arrays := self._folder / _ARRAYS).exists():
            arrays.rename(folder / _ARRAYS)

    def digest(self, array: str, layer: int) -> tuple[int, int] | None:
        """That of a piece which was written, or None."""
        return self._digests.get((array, layer))

    def add(self, array: str, layer: int, digest: tuple[int, int]) -> None:
        """Notes a piece that is written."""
        self._say({"array": array, "layer": layer, "digest": digest})

    def remove(self) -> None:
        """Removes the notes: the checkpoint is there."""
        self._file.close()
        remove(self._folder.parent)

    def _lines(self) -> list[dict]:
        """Those that are whole: a kill may have cut the last one."""
        try:
            texts = (self._folder / _LINES).read_text().split("\n")[:-1]
            return [strict_json.loads(text) for text in texts]
        except (OSError, ValueError):
            return []

    def _say(self, line: dict) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def remove(workdir: epath.Path) -> None:
    """Removes what a killed conversion left in a workdir on a disk, beside the arrays, which Orbax
    removes."""
    if "://" not in str(workdir):
        shutil.rmtree(workdir / FOLDER, ignore_errors=True)
