"""One run in a workdir at a time: a lease, a file or an object that tells who holds it.

The holder writes it again every `BEAT` seconds. Who finds a lease asks for its process: on the same
machine it runs or is gone, at once; of another machine, or in another container, a lease that does
not change for `EXPIRY` seconds of one's own clock is of a holder that died. No two clocks are
compared.

What it guarantees. A lease is made only where there is none: by O_EXCL on a disk, in Cloud Storage
by a precondition on the object's generation; what was made is read back. One that expired is
replaced only by whoever makes the claim on it, an object beside it, in the same way. So of two that
start, one gets it. A holder that stood still for longer than `EXPIRY` and goes on finds at its next
beat that it lost the workdir, and stops after the update it is in: until then both may write. A
disk whose hosts do not see each other's new files for longer than `EXPIRY` protects nothing.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator

import jax
from absl import logging
from etils import epath

from tulu_jax import atomic, process_identity, strict_json
from tulu_jax.parallel import lifeline, preemption
from tulu_jax.process_identity import Process
from tulu_jax.validation import UsageError

FILE = "tulu_jax.lease"  # in the workdir
BEAT = 10.0  # seconds between two writes of the holder
EXPIRY = 60.0  # seconds without one, after which a holder on another host is gone
POLL = 1.0  # seconds between two looks at a lease that may have expired


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What a lease says: the holder, its start and its last beat, in seconds of its host's clock.
    `id` is that of one holding, so that no two are alike."""

    id: str
    process: Process
    since: float
    beat: float

    def __str__(self):
        start = datetime.datetime.fromtimestamp(self.since, datetime.UTC)
        ago = max(0.0, time.time() - self.beat)
        return f"{self.process} since {start:%Y-%m-%d %H:%M:%S} UTC, last heard {ago:.0f} s ago"

    def encode(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()


def _decoded(content: bytes) -> Record | None:
    """None for what was torn by a kill, in the moment between the file and its content."""
    try:
        fields = strict_json.loads(content)
        return Record(**fields | {"process": Process(**fields["process"])})
    except (ValueError, TypeError, KeyError):
        return None


@contextlib.contextmanager
def held(workdir: str) -> Iterator["Lease"]:
    """Holds the workdir of a run inside; process 0 of several does, for all. Removes what killed
    runs left there under temporary names.

    Raises `UsageError` that names the holder if another run has the workdir. It may first wait
    `EXPIRY` seconds, and says so, for a holder on another host.
    """
    lease = Lease(workdir)
    if jax.process_index() != 0:
        yield lease
        return
    lifeline.before_exit.append(lease.release)
    try:
        lease.acquire()
        atomic.sweep(lease.folder)
        yield lease
    finally:
        with preemption.later():
            lifeline.before_exit.remove(lease.release)
            lease.release()


class Lease:
    """The lease of one workdir; see the module. `held` is the usual way to one."""

    def __init__(self, workdir: str):
        self.folder = epath.Path(workdir)
        self.path = str(self.folder / FILE)
        self._files = atomic.file_system(self.path)
        self._id, self._since = uuid.uuid4().hex, time.time()
        self._made_folder, self._stop = False, threading.Event()
        self._beating: threading.Thread | None = None
        self._claimed: float | None = None  # when a claim of another was first seen
        self._lost: str | None = None

    def acquire(self) -> None:
        """Takes the lease and keeps it from then on. Raises `UsageError` if another holds it."""
        if "://" not in self.path and not self.folder.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._made_folder = True
        seen, looked = None, 0.0
        while True:
            found = self._read(self.path)
            if found is None:
                with preemption.later():
                    self._make(self.path)
                continue
            record = _decoded(found)
            if record and record.id == self._id:
                break
            runs = record.process.runs() if record else None
            if runs or (runs is None and seen not in (None, found)):
                raise self._refusal(record)
            if runs is None and seen is None:
                seen, looked = found, time.monotonic()
                logging.info("%s: waiting up to %.0f s for a sign of it", self._of(record), EXPIRY)
            if runs is None and time.monotonic() < looked + EXPIRY:
                time.sleep(POLL)
            elif self._replaced(found):
                logging.info("%s: it is gone, and this run goes on", self._of(record))
                break
        self._beating = threading.Thread(target=self._beat, daemon=True, name="lease")
        self._beating.start()

    def check(self) -> None:
        """Raises `UsageError` if another run has taken the workdir over."""
        if self._lost:
            raise UsageError(self._lost)

    def release(self) -> None:
        """Gives the lease up, if this run has it still; also the folder, if that was made for it
        and is empty."""
        self._stop.set()
        if self._beating:
            self._beating.join(BEAT)  # a bucket may keep it waiting
        try:
            record = _decoded(self._read(self.path) or b"")
            if record and record.id == self._id:
                self._remove(self.path)
        except Exception as error:  # what the run itself says matters more
            logging.warning("The lease %s could not be removed: %s", self.path, error)
        if self._made_folder:
            with contextlib.suppress(OSError):  # it has content now
                os.rmdir(self.folder)

    def _record(self) -> bytes:
        me = process_identity.current()
        return Record(id=self._id, process=me, since=self._since, beat=time.time()).encode()

    def _read(self, path: str) -> bytes | None:
        try:
            return self._files.cat_file(path)
        except FileNotFoundError:
            return None

    def _make(self, path: str) -> bool:
        """Whether the file or object was made, as there was none."""
        try:
            if "://" in path:
                self._files.pipe_file(path, self._record(), mode="create")
            else:
                with open(path, "xb") as file:
                    file.write(self._record())
        except FileExistsError:
            return False
        return True

    def _replaced(self, found: bytes) -> bool:
        with preemption.later():
            return self._take_over(found)

    def _take_over(self, found: bytes) -> bool:
        """Replaces the lease `found`, of a holder that is gone, unless another run does so."""
        claim = f"{self.path}.claim"
        if not self._make(claim):
            record = _decoded(self._read(claim) or b"")
            self._claimed = self._claimed or time.monotonic()
            gone = record is not None and record.process.runs() is False
            if gone or time.monotonic() > self._claimed + EXPIRY:
                self._remove(claim)
            time.sleep(POLL)
            return False
        try:
            if self._read(self.path) != found:
                return False
            atomic.write_bytes(self.path, self._record())
            return True
        finally:
            self._remove(claim)

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(path)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            try:
                found = self._read(self.path)
                if found is None:
                    self._make(self.path)
                    continue
                record = _decoded(found)
                if record is None or record.id != self._id:
                    self._lost = (
                        f"{self._of(record)}: it took over from this run, which gave no sign for "
                        f"{EXPIRY:.0f} s and stops. Look what held this one up, or end that one"
                    )
                    logging.error("%s", self._lost)
                    return
                atomic.write_bytes(self.path, self._record())
            except Exception as error:  # of a disk, gcsfs, aiohttp: the next beat may come through
                logging.warning("The lease %s could not be renewed: %s", self.path, error)

    def _of(self, record: Record | None) -> str:
        holder = record or "a run that was killed as it began"
        return f"{self.folder} is held by {holder}"

    def _refusal(self, record: Record | None) -> UsageError:
        return UsageError(
            f"{self._of(record)}; expected a workdir that no other run writes to. Wait for "
            "that run, end it, or choose another folder (--workdir, of evaluate --out)"
        )
