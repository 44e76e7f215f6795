"""The processes of a run: how this one knows which it is, and how they come together.

Sources, the first that says anything: flags, `JAX_*` variables (a JobSet without TPUs sets these),
a TPU slice on GKE, a TPU VM, Slurm. Slices joined by Multislice are counted by `MEGASCALE_*`.
"""

import contextlib
import dataclasses
import glob
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import re
import socket
import urllib.request
from collections.abc import Iterator, Mapping, Sequence

import jax
from absl import logging

from tulu_jax.parallel import lifeline, preemption, wire

PORT = 8482  # jax's own choice on TPUs; JAX_COORDINATOR_PORT overrides it
GOOGLE = "0x1ae0"  # as a vendor of PCI devices
FLAGS = ("coordinator_address", "num_processes", "process_id")
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
MEGASCALE = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")
SLURM = ("SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID")
TEXTS = ("--coordinator_address", VARIABLES[0], MEGASCALE[0], SLURM[0])  # the others are numbers
METADATA = "http://{host}/computeMetadata/v1/instance/attributes/{key}"

_lifeline: lifeline.Lifeline | None = None
_members: list[lifeline.Member] = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """Which process this one is. `source` says where that was found.

    `gpu` is the only one of its host's GPUs that it takes; None: all of them. Raises `ValueError`
    for an address without a port and for a process that is none of them.
    """

    coordinator_address: str
    num_processes: int
    process_id: int
    source: str
    gpu: int | None = None

    def __post_init__(self):
        if not re.fullmatch(r".+:\d+", self.coordinator_address):
            raise ValueError(
                f"found the coordinator address {self.coordinator_address!r} ({self.source}); "
                f"expected HOST:PORT of process 0, with a free port such as {PORT}"
            )
        _below("process id", self.process_id, self.num_processes, f"processes ({self.source})")


def find(
    flags: Mapping[str, str | int | None], environ: Mapping[str, str], *, on_tpu: bool
) -> Processes | None:
    """The processes of this run; None if this is the only one.

    `flags` has the names of FLAGS. A variable that is set but empty counts as absent. `on_tpu`:
    whether this host has TPU chips, so that the metadata server of a TPU VM is asked. Raises
    `ValueError` for what is incomplete or inconsistent.

    jax finds processes too, but only while it connects, when none can be refused any more; it reads
    no JAX_NUM_PROCESSES, and takes rack1 for the first host of rack[1-2]n[01-04].
    """
    environ = {name: value.strip() for name, value in environ.items() if value.strip()}
    given = {f"--{name}": str(flags[name]) for name in FLAGS if flags.get(name) is not None}
    gpus, found = environ.get("JAX_LOCAL_DEVICE_IDS", "0"), None  # jax reads it
    if not re.fullmatch(r"[0-9]+(,[0-9]+)*", gpus):
        raise ValueError(
            f"found JAX_LOCAL_DEVICE_IDS = {gpus!r}; expected numbers with commas between them"
        )
    if given:
        if given.get("--num_processes") == "1":
            given = {"--coordinator_address": f"localhost:{PORT}", "--process_id": "0"} | given
        fix = "give all three, or none where the environment tells (TPU VM, GKE, Slurm)"
        found = _processes(*_values(given, [f"--{name}" for name in FLAGS], fix), "flags")
    elif any(name in environ for name in VARIABLES):
        if "JOB_COMPLETION_INDEX" in environ:  # an indexed Job of Kubernetes numbers its pods
            environ = {"JAX_PROCESS_ID": environ["JOB_COMPLETION_INDEX"]} | environ
        fix = "set all three (JOB_COMPLETION_INDEX serves as JAX_PROCESS_ID), or none"
        found = _processes(*_values(environ, VARIABLES, fix), "JAX_* variables")
    elif "TPU_WORKER_HOSTNAMES" in environ or any(name in environ for name in MEGASCALE):
        found = _of_slice(environ, "GKE")
    elif on_tpu and "TPU_SKIP_MDS_QUERY" not in environ:
        found = _of_slice(_with_metadata(environ), "TPU VM")
    elif environ.get("SLURM_NTASKS", "1") != "1":
        found = _of_slurm(environ)
    return found if found and found.num_processes > 1 else None


def has_tpu_chips() -> bool:
    """Whether this is a TPU host: PCI devices of Google, and files to use chips through."""
    nodes = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    vendors = glob.glob("/sys/bus/pci/devices/*/vendor")
    return bool(nodes) and any(pathlib.Path(v).read_text().strip() == GOOGLE for v in vendors)


def _of_slice(environ: Mapping[str, str], source: str) -> Processes:
    """One process a host; with Multislice, slice after slice."""
    named = environ.get("TPU_WORKER_HOSTNAMES", "localhost")
    hosts = [host.strip() for host in named.split(",") if host.strip()]
    if not hosts:
        raise ValueError(
            f"found TPU_WORKER_HOSTNAMES = {named!r}; expected all hosts of the slice, with commas "
            "between their names"
        )
    first, slices, slice_id = hosts[0], 1, 0
    if any(name in environ for name in MEGASCALE):
        fix = "Multislice sets all three on every host: create the slices together"
        first, slices, slice_id = _values(environ, MEGASCALE, fix)
    if slices > 1:
        source += f", slice {slice_id} of {slices}"
    if len(hosts) == 1:
        environ = {"TPU_WORKER_ID": "0"} | environ
    said = f"hosts ({', '.join(hosts)})"
    fix = f"the slice has {len(hosts)} {said}: give each its number"
    (worker,) = _values(environ, ["TPU_WORKER_ID"], fix)
    _below("TPU_WORKER_ID", worker, len(hosts), said)
    _below("MEGASCALE_SLICE_ID", slice_id, slices, "slices")
    address = _address(first.split(":")[0], environ, PORT)
    return _processes(address, slices * len(hosts), slice_id * len(hosts) + worker, source)


def _with_metadata(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` with what the metadata server of a TPU VM tells of its peers, its number and its
    slice, under the names that GKE gives them."""

    def ask(key: str) -> str:
        host = environ.get("GCE_METADATA_IP", "metadata.google.internal")
        url = METADATA.format(host=host, key=key)
        try:
            request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.read().decode().strip()
        except OSError as error:
            raise ValueError(
                f"this host has TPU chips, and its metadata server {host} does not tell {key!r} "
                f"({error}); start again in a minute, or give --coordinator_address, "
                "--num_processes and --process_id (--num_processes=1 for this host alone)"
            ) from error

    endpoints = ask("worker-network-endpoints").split(",")  # each a name, or name:id:address
    told = dict(re.findall(r"^(MEGASCALE_\w+): '([^']+)'$", ask("tpu-env"), re.MULTILINE))
    hosts = ",".join(endpoint.split(":")[-1] for endpoint in endpoints)
    own = {"TPU_WORKER_HOSTNAMES": hosts, "TPU_WORKER_ID": ask("agent-worker-number")}
    return {name: told[name] for name in MEGASCALE if name in told} | environ | own


def _of_slurm(environ: Mapping[str, str]) -> Processes:
    fix = "start with srun, or give --num_processes=1 for this process alone"
    nodes, job, count, process = _values(environ, SLURM, fix)
    address = _address(first_host(nodes), environ, 61440 + job % 4096)  # one for each job on a node
    found = _processes(address, count, process, "Slurm")
    if "SLURM_LOCALID" not in environ or "JAX_LOCAL_DEVICE_IDS" in environ:
        return found
    return dataclasses.replace(found, gpu=_values(environ, ["SLURM_LOCALID"], "")[0])


def first_host(nodes: str) -> str:
    """The first name of a Slurm host list: 'rack1n01' of 'rack[1-2]n[01-04,7],login'.

    A name may hold several groups in brackets, each of numbers and ranges whose zeros count. Raises
    `ValueError` for what is no such list.
    """
    group = r"\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\]"
    name = rf"(?:[^\s,\[\]]|{group})+"
    if not re.fullmatch(f"{name}(?:,{name})*", nodes):
        raise ValueError(
            f"found SLURM_STEP_NODELIST = {nodes!r}; expected a host list of Slurm such as "
            "rack[1-2]n[01-04],login: start with srun, which sets it"
        )
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", re.match(name, nodes).group())


def _address(host: str, environ: Mapping[str, str], usual: int) -> str:
    """Of process 0, at `JAX_COORDINATOR_PORT` or the usual port."""
    name = "JAX_COORDINATOR_PORT"
    return f"{host}:{_values({name: str(usual)} | environ, [name], '')[0]}"


def _values(environ: Mapping[str, str], names: Sequence[str], fix: str) -> list:
    """The values of `names`: str for TEXTS, else int. `fix` is what to do if one is missing."""
    for name in names:
        if name not in TEXTS and not re.fullmatch(r"[0-9]+", environ.get(name, "0")):
            raise ValueError(f"found {name} = {environ[name]!r}; expected a number from 0 on")
    missing = [name for name in names if name not in environ]
    if missing:
        found = " ".join(f"{n}={environ[n]}" for n in names if n in environ) or "nothing"
        raise ValueError(f"found {found} without {' and '.join(missing)}; {fix}")
    return [environ[name] if name in TEXTS else int(environ[name]) for name in names]


def _below(name: str, found: int, count: int, what: str) -> None:
    if found >= count:
        raise ValueError(
            f"found {name} = {found} with {count} {what}; expected an id from 0 to {count - 1}, "
            "each once"
        )


def _processes(address: str, count: int, process: int, source: str) -> Processes:
    return Processes(
        coordinator_address=address, num_processes=count, process_id=process, source=source
    )


def versions() -> dict[str, str]:
    """What must be the same on every host; `tulu_jax` is a hash of its files."""
    package, digest = pathlib.Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    found = {"python": platform.python_version(), "tulu_jax": digest.hexdigest()[:12]}
    for name in ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def connect(
    processes: Processes | None, *, config_text: str, start_timeout: float, peer_timeout: float
) -> None:
    """Joins the processes of the run; does nothing for a single one.

    The environment's `wire.TOKEN` tells them from strangers. Raises `ValueError` if one does not
    come within `start_timeout` seconds, if versions, configurations or the number of processes
    differ, or for a token that is too short. From then on this process ends when another
    fails, dies, or is silent for `peer_timeout` seconds.
    """
    global _lifeline, _members
    if processes is None or jax.distributed.is_initialized():
        return
    me = lifeline.Member(
        process_id=processes.process_id,
        num_processes=processes.num_processes,
        host=socket.gethostname(),
        facts=versions() | {lifeline.CONFIG: config_text},
    )
    logging.info(
        "%s of %d, from %s; process 0 is at %s",
        *(me, processes.num_processes, processes.source, processes.coordinator_address),
    )
    _members, _lifeline = lifeline.join(
        me,
        processes.coordinator_address,
        token=wire.token_of(os.environ),
        start_timeout=start_timeout,
        peer_timeout=peer_timeout,
    )
    _lifeline.watch()
    preemption.leave_to_us()
    jax.distributed.initialize(
        processes.coordinator_address,
        processes.num_processes,
        processes.process_id,
        local_device_ids=processes.gpu,
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=int(peer_timeout) + 30,  # the lifeline tells more, and earlier
    )


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around all that a process does: if it fails, the others end too, with its name and reason."""
    try:
        yield
    except BaseException as error:
        if _lifeline is None:
            raise
        if isinstance(error, SystemExit) and _all_stop(error):
            _lifeline.done()
            raise
        _lifeline.fail(error)
    if _lifeline is not None:
        _lifeline.done()


def hung(reason: str) -> None:
    """Ends all processes of the run because this one hangs; each says where its threads stand."""
    if _lifeline is not None:
        _lifeline.hung(reason)
    again = "Start the same command again to go on from the last checkpoint."
    lifeline.leave(f"The run stops: {reason}. {again}", lifeline.TRY_AGAIN, stacks=True)


def _all_stop(end: SystemExit) -> bool:
    """Whether every process of the run ends so, by itself."""
    stopped = end.__cause__
    return stopped.together if isinstance(stopped, preemption.Preempted) else not end.code


def device_problems(devices: list[jax.Device]) -> list[str]:
    """Hosts whose number or kind of devices is not that of most, one line for each."""
    kinds = [
        [device.device_kind for device in devices if device.process_index == member.process_id]
        for member in _members
    ]
    found = [" ".join([str(len(of_one)), *of_one[:1], "devices"]) for of_one in kinds]
    return [
        f"{_members[i]} has {said}; most have {usual}. Give every process the same devices"
        for i, said, usual in lifeline.unusual(found)
    ]
