"""The processes of a run: how this one knows which it is, and how they come together.

Sources, the first that says anything: flags, `JAX_*` variables (a JobSet without TPUs sets these),
a TPU slice on GKE, a TPU VM, Slurm. Slices joined by Multislice are counted by `MEGASCALE_*`.
"""

import collections
import contextlib
import dataclasses
import glob
import hashlib
import importlib.metadata
import pathlib
import platform
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping

import jax
from absl import logging

from tulu_jax.parallel import lifeline

PORT = 8482  # jax's own choice on TPUs; JAX_COORDINATOR_PORT overrides it
GOOGLE = "0x1ae0"  # as a vendor of PCI devices
FLAGS = ("coordinator_address", "num_processes", "process_id")
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
MEGASCALE = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")
METADATA = "http://{host}/computeMetadata/v1/instance/attributes/{key}"

_lifeline: lifeline.Lifeline | None = None
_members: list[lifeline.Member] = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """Which process this one is. `source` says where that was found.

    `gpu` is the only one of its host's GPUs that it takes; None: all of them.
    """

    coordinator_address: str
    num_processes: int
    process_id: int
    source: str
    gpu: int | None = None


def find(
    flags: Mapping[str, str | int | None], environ: Mapping[str, str], *, on_tpu: bool
) -> Processes | None:
    """The processes of this run; None if this is the only one.

    `flags` has the names of FLAGS. A variable that is set but empty counts as absent. `on_tpu`:
    whether this host has TPU chips, so that the metadata server of a TPU VM is asked. Raises
    `ValueError` for what is incomplete or inconsistent.
    """
    environ = {name: value.strip() for name, value in environ.items() if value.strip()}
    gpus = environ.get("JAX_LOCAL_DEVICE_IDS", "0")  # jax reads it
    if not re.fullmatch(r"[0-9]+(,[0-9]+)*", gpus):
        raise ValueError(
            f"found JAX_LOCAL_DEVICE_IDS = {gpus!r}; expected numbers with commas between them"
        )
    if any(flags.get(name) is not None for name in FLAGS):
        return _from_flags(flags)
    if any(name in environ for name in VARIABLES):
        return _from_variables(environ)
    if "TPU_WORKER_HOSTNAMES" in environ or any(name in environ for name in MEGASCALE):
        named = environ.get("TPU_WORKER_HOSTNAMES", "localhost").split(",")
        hosts = [host.strip() for host in named if host.strip()]
        if not hosts:
            raise ValueError(
                f"found TPU_WORKER_HOSTNAMES = {environ['TPU_WORKER_HOSTNAMES']!r}; expected the "
                "names of all hosts of the slice, with commas between them"
            )
        return _from_slice(environ, hosts, environ.get("TPU_WORKER_ID"), source="GKE")
    if on_tpu and "TPU_SKIP_MDS_QUERY" not in environ:
        return _from_tpu_vm(environ)
    (tasks,) = _integers({"SLURM_NTASKS": environ.get("SLURM_NTASKS", "1")}, ["SLURM_NTASKS"])
    if tasks > 1:
        return _from_slurm(environ)
    return None


def has_tpu_chips() -> bool:
    """Whether this is a TPU host: PCI devices of Google, and files to use chips through."""
    nodes = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    vendors = glob.glob("/sys/bus/pci/devices/*/vendor")
    return bool(nodes) and any(pathlib.Path(v).read_text().strip() == GOOGLE for v in vendors)


def _from_flags(flags: Mapping[str, str | int | None]) -> Processes | None:
    if flags.get("num_processes") == 1 and flags.get("process_id") in (None, 0):
        return None
    missing = [f"--{name}" for name in FLAGS if flags.get(name) is None]
    if missing:
        given = [f"--{name}={flags[name]}" for name in FLAGS if flags.get(name) is not None]
        raise ValueError(
            f"found {' '.join(given)} without {' and '.join(missing)}; give all three, or none "
            "where the environment tells (TPU VM, GKE, Slurm)"
        )
    return _checked(*(flags[name] for name in FLAGS), source="flags")


def _from_variables(environ: Mapping[str, str]) -> Processes | None:
    values = {name: environ.get(name) for name in VARIABLES}
    if values["JAX_PROCESS_ID"] is None:  # an indexed Job of Kubernetes numbers its pods
        values["JAX_PROCESS_ID"] = environ.get("JOB_COMPLETION_INDEX")
    _require(values, "set all three (JOB_COMPLETION_INDEX serves as JAX_PROCESS_ID), or none")
    return _checked(
        values[VARIABLES[0]], *_integers(values, VARIABLES[1:]), source="JAX_* variables"
    )


def _from_slice(
    environ: Mapping[str, str], hosts: list[str], worker: str | None, *, source: str
) -> Processes | None:
    """One process a host; with Multislice, slice after slice."""
    slices, slice_id, first = 1, 0, hosts[0]
    if any(name in environ for name in MEGASCALE):
        values = {name: environ.get(name) for name in MEGASCALE}
        _require(values, "Multislice sets all three on every host: create the slices together")
        slices, slice_id = _integers(values, MEGASCALE[1:])
        first = values[MEGASCALE[0]].split(":")[0]
        if not 0 <= slice_id < slices:
            raise ValueError(
                f"found MEGASCALE_SLICE_ID = {slice_id} with MEGASCALE_NUM_SLICES = {slices}; "
                f"expected an id from 0 to {slices - 1}: create the slices together"
            )
    if slices * len(hosts) == 1:
        return None
    _require(
        {"TPU_WORKER_ID": worker},
        f"the slice has {len(hosts)} hosts ({', '.join(hosts)}): give each its number",
    )
    (worker_id,) = _integers({"TPU_WORKER_ID": worker}, ["TPU_WORKER_ID"])
    if not 0 <= worker_id < len(hosts):
        raise ValueError(
            f"found TPU_WORKER_ID = {worker_id} with {len(hosts)} hosts ({', '.join(hosts)}); "
            f"expected 0 to {len(hosts) - 1}: TPU_WORKER_HOSTNAMES must list all hosts of the slice"
        )
    return _checked(
        f"{first}:{_port(environ, PORT)}",
        slices * len(hosts),
        slice_id * len(hosts) + worker_id,
        source=f"{source}{f', slice {slice_id} of {slices}' if slices > 1 else ''}",
    )


def _from_tpu_vm(environ: Mapping[str, str]) -> Processes | None:
    """From the metadata server, which a TPU VM has: its peers, its number, its slice."""

    def metadata(key: str) -> str:
        host = environ.get("GCE_METADATA_IP", "metadata.google.internal")
        request = urllib.request.Request(
            METADATA.format(host=host, key=key), headers={"Metadata-Flavor": "Google"}
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.read().decode()
        except (OSError, urllib.error.URLError) as error:
            raise ValueError(
                f"this host has TPU chips, and its metadata server {host} does not tell {key!r} "
                f"({error}); start again in a minute, or give --coordinator_address, "
                "--num_processes and --process_id (--num_processes=1 for this host alone)"
            ) from error

    endpoints = metadata("worker-network-endpoints").strip().split(",")
    hosts = [endpoint.split(":")[-1] for endpoint in endpoints]  # name, or name:id:address
    told = dict(re.findall(r"^(MEGASCALE_\w+): '([^']*)'$", metadata("tpu-env"), re.MULTILINE))
    told = {name: told[name] for name in MEGASCALE if told.get(name)}
    worker = metadata("agent-worker-number").strip()
    return _from_slice({**told, **environ}, hosts, worker, source="TPU VM")


def _from_slurm(environ: Mapping[str, str]) -> Processes | None:
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")
    values = {name: environ.get(name) for name in names}
    _require(values, "start with srun, or give --num_processes=1 for this process alone")
    job, count, process = _integers(values, (names[0], *names[2:]))
    host = first_host(values["SLURM_STEP_NODELIST"])
    port = _port(environ, 61440 + job % 4096)  # one for each job on a node
    found = _checked(f"{host}:{port}", count, process, source="Slurm")
    if "SLURM_LOCALID" not in environ or "JAX_LOCAL_DEVICE_IDS" in environ:
        return found
    return dataclasses.replace(found, gpu=_integers(environ, ["SLURM_LOCALID"])[0])


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
    first = re.match(name, nodes).group()
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)


def _port(environ: Mapping[str, str], usual: int) -> int:
    """Of process 0: `JAX_COORDINATOR_PORT`, else the usual one."""
    name = "JAX_COORDINATOR_PORT"
    (port,) = _integers({name: environ.get(name, str(usual))}, [name])
    return port


def _require(values: Mapping[str, str | None], fix: str) -> None:
    missing = [name for name, value in values.items() if not value]
    if missing:
        found = ", ".join(f"{n} = {v}" for n, v in values.items() if v) or "nothing"
        raise ValueError(f"found {found} without {' and '.join(missing)}; {fix}")


def _integers(values: Mapping[str, str | None], names) -> list[int]:
    for name in names:
        if not re.fullmatch(r"[0-9]+", str(values[name])):
            raise ValueError(f"found {name} = {values[name]!r}; expected a number from 0 on")
    return [int(values[name]) for name in names]


def _checked(address: str, count: int, process: int, *, source: str) -> Processes | None:
    if count == 1 and process == 0:
        return None
    if not re.fullmatch(r".+:\d+", address):
        raise ValueError(
            f"found the coordinator address {address!r} ({source}); expected HOST:PORT of process "
            f"0, with a free port such as {PORT}"
        )
    if not 0 <= process < count:
        raise ValueError(
            f"found process id {process} of {count} processes ({source}); expected 0 to "
            f"{count - 1}, each once"
        )
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

    Raises `ValueError` if one does not come within `start_timeout` seconds, or if versions,
    configurations or the number of processes differ. From then on this process ends when another
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
        start_timeout=start_timeout,
        peer_timeout=peer_timeout,
    )
    _lifeline.watch()
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
        if isinstance(error, SystemExit) and error.code in (None, 0, lifeline.TRY_AGAIN):
            _lifeline.done()
            raise
        _lifeline.fail(error)
    if _lifeline is not None:
        _lifeline.done()


def device_problems(devices: list[jax.Device]) -> list[str]:
    """Hosts whose number or kind of devices is not that of most, one line for each."""
    names = {member.process_id: str(member) for member in _members}
    by_process = collections.defaultdict(list)
    for device in devices:
        by_process[device.process_index].append(device.device_kind)
    for process in names:
        by_process.setdefault(process, [])
    found = {
        process: f"{len(kinds)} {kinds[0] if kinds else ''} devices".replace("  ", " ")
        for process, kinds in sorted(by_process.items())
    }
    usual = collections.Counter(found.values()).most_common(1)[0][0]
    return [
        f"{names.get(process, f'process {process}')} has {said}; most have {usual}. Give every "
        "process the same devices"
        for process, said in found.items()
        if said != usual
    ]
