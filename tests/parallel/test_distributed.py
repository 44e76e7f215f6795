"""Which process this is, from each environment; and processes that do not come or do not agree."""

import concurrent.futures
import http.server
import itertools
import json
import signal
import socket
import subprocess
import sys
import threading

import jax
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tulu_jax.parallel import distributed, lifeline

FLAGS = dict.fromkeys(distributed.FLAGS)
SLICE = {"TPU_WORKER_HOSTNAMES": "h0,h1,h2,h3", "TPU_WORKER_ID": "2"}
SECOND = {
    "MEGASCALE_COORDINATOR_ADDRESS": "first:8080",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}
SLURM = {
    "SLURM_JOB_ID": "5",
    "SLURM_STEP_NODELIST": "tpu[007-9,12],b1",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
}
VARIABLES = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "1"}


def find(environ, **flags):
    found = distributed.find(FLAGS | flags, environ, on_tpu=False)
    return found and (found.coordinator_address, found.num_processes, found.process_id)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (VARIABLES, ("h:1", 3, 1)),
        (
            {k: v for k, v in VARIABLES.items() if "ID" not in k} | {"JOB_COMPLETION_INDEX": "2"},
            ("h:1", 3, 2),
        ),
        (SLICE, ("h0:8482", 4, 2)),
        (SLICE | {"JAX_COORDINATOR_PORT": "99"}, ("h0:99", 4, 2)),
        (SLICE | SECOND, ("first:8482", 8, 6)),
        (
            SECOND | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
            ("first:8482", 2, 1),
        ),
        (SLURM, ("tpu007:61445", 4, 3)),
        (SLURM | {"SLURM_STEP_NODELIST": "a9,b"}, ("a9:61445", 4, 3)),
        ({"SLURM_JOB_ID": "5", "SLURM_NTASKS": "1"}, None),
        (dict.fromkeys(SLURM | VARIABLES | SLICE | SECOND, ""), None),
        (
            SLURM | dict.fromkeys([*VARIABLES, *SLICE, *SECOND, "JAX_COORDINATOR_PORT"], " "),
            ("tpu007:61445", 4, 3),
        ),
        (VARIABLES | {"JAX_PROCESS_ID": "", "JOB_COMPLETION_INDEX": "2"}, ("h:1", 3, 2)),
        ({"TPU_WORKER_HOSTNAMES": "h0, h1,", "TPU_WORKER_ID": "1"}, ("h0:8482", 2, 1)),
    ],
)
def test_environments(environ, expected):
    assert find(environ) == expected


def test_flags_win():
    given = dict(coordinator_address="x:7", num_processes=2, process_id=0)
    assert find(SLICE, **given) == ("x:7", 2, 0)
    assert find(SLURM, num_processes=1) is None


def without(environ, name):
    return {k: v for k, v in environ.items() if k != name}


@pytest.mark.parametrize(
    ("environ", "flags", "message"),
    [
        ({}, {"process_id": 1}, "found --process_id=1 without --coordinator_address and --num_pro"),
        ({}, dict(coordinator_address="h", num_processes=2, process_id=0), "expected HOST:PORT"),
        (
            {},
            dict(coordinator_address="h:1", num_processes=2, process_id=2),
            "found process id = 2 w",
        ),
        (without(VARIABLES, "JAX_PROCESS_ID"), {}, "without JAX_PROCESS_ID; set all three"),
        (VARIABLES | {"JAX_NUM_PROCESSES": "two"}, {}, "JAX_NUM_PROCESSES = 'two'; expected a num"),
        (without(SLICE, "TPU_WORKER_ID"), {}, r"without TPU_WORKER_ID; the slice has 4 hosts"),
        (SLICE | {"TPU_WORKER_ID": "4"}, {}, "found TPU_WORKER_ID = 4 with 4 hosts"),
        (SLICE | without(SECOND, "MEGASCALE_SLICE_ID"), {}, "without MEGASCALE_SLICE_ID; Multisl"),
        (SLICE | SECOND | {"MEGASCALE_SLICE_ID": "2"}, {}, "expected an id from 0 to 1"),
        (without(SLURM, "SLURM_STEP_NODELIST"), {}, "SLURM_STEP_NODELIST; start with srun"),
        (SLURM | {"SLURM_STEP_NODELIST": "a[1-"}, {}, r"found SLURM_STEP_NODELIST = 'a\[1-'"),
        (SLURM | {"SLURM_LOCALID": "x"}, {}, "found SLURM_LOCALID = 'x'; expected a number"),
        ({"SLURM_NTASKS": "2(x3)"}, {}, r"SLURM_NTASKS = '2\(x3\)'; expected a number"),
        ({"JAX_PROCESS_ID": "1"}, {}, "without JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES"),
        ({"JAX_LOCAL_DEVICE_IDS": "all"}, {}, "found JAX_LOCAL_DEVICE_IDS = 'all'; expected num"),
        (SLICE | {"JAX_COORDINATOR_PORT": "a"}, {}, "JAX_COORDINATOR_PORT = 'a'; expected a num"),
        (SLICE | {"TPU_WORKER_ID": "-1"}, {}, "TPU_WORKER_ID = '-1'; expected a number"),
        (SLICE | {"TPU_WORKER_HOSTNAMES": ","}, {}, "found TPU_WORKER_HOSTNAMES = ','"),
        (SLICE | SECOND | {"MEGASCALE_NUM_SLICES": "two"}, {}, "MEGASCALE_NUM_SLICES = 'two'"),
    ],
)
def test_incomplete_environments_are_refused(environ, flags, message):
    with pytest.raises(ValueError, match=message):
        find(environ, **flags)


def test_a_slurm_task_takes_its_gpu():
    one = SLURM | {"SLURM_LOCALID": "2"}
    assert distributed.find(FLAGS, one, on_tpu=False).gpu == 2
    assert distributed.find(FLAGS, SLURM | {"SLURM_LOCALID": ""}, on_tpu=False).gpu is None
    named = one | {"JAX_LOCAL_DEVICE_IDS": "0,1"}
    assert distributed.find(FLAGS, named, on_tpu=False).gpu is None


def numbers():
    """Numbers in brackets as Slurm writes them, with what they stand for."""

    def written(low, more, width):
        names = [str(n).zfill(width) for n in range(low, low + more + 1)]
        return (names[0] if not more else f"{names[0]}-{names[-1]}", names)

    return st.builds(written, st.integers(0, 120), st.integers(0, 12), st.integers(1, 4))


def grouped(ranges):
    return (f"[{','.join(text for text, _ in ranges)}]", [n for _, names in ranges for n in names])


PLAIN = st.from_regex(r"[a-z][a-z0-9.-]{0,5}", fullmatch=True).map(lambda text: (text, [text]))
GROUP = st.lists(numbers(), min_size=1, max_size=3).map(grouped)
NAME = st.tuples(PLAIN, st.lists(st.one_of(PLAIN, GROUP), max_size=4)).map(lambda x: [x[0], *x[1]])


@given(st.lists(NAME, min_size=1, max_size=3))
@example([[("rack", ["rack"]), ("[1-2]", ["1", "2"]), ("n", ["n"]), ("[01-04]", ["01", "02"])]])
def test_the_first_host_of_a_slurm_list(names):
    """Against the whole expansion: every combination, the last group running fastest."""
    text = ",".join("".join(part for part, _ in name) for name in names)
    expanded = [
        "".join(parts)
        for name in names
        for parts in itertools.product(*(stands_for for _, stands_for in name))
    ]
    assert distributed.first_host(text) == expanded[0]


@pytest.mark.parametrize("nodes", ["", ",a", "a,,b", "a[]", "a[1", "a]1", "a[1-]", "a[x]", "a b"])
def test_what_is_no_slurm_list_is_refused(nodes):
    with pytest.raises(ValueError, match="expected a host list of Slurm"):
        distributed.first_host(nodes)


ATTRIBUTES = {
    "worker-network-endpoints": "a:1:10.0.0.1,b:2:10.0.0.2",
    "agent-worker-number": "1",
    "tpu-env": "ZONE: 'z'\nMEGASCALE_COORDINATOR_ADDRESS: 'c:8080'\n"
    "MEGASCALE_NUM_SLICES: '3'\nMEGASCALE_SLICE_ID: '2'\n",
}


class Metadata(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        assert self.headers["Metadata-Flavor"] == "Google"
        value = ATTRIBUTES.get(self.path.split("/")[-1])
        self.send_response(404 if value is None else 200)
        self.end_headers()
        self.wfile.write((value or "").encode())

    def log_message(self, *args):
        pass


def test_tpu_vm_asks_its_metadata_server(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environ = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
        found = distributed.find(FLAGS, environ, on_tpu=True)
        assert found.coordinator_address == "c:8482" and found.source == "TPU VM, slice 2 of 3"
        assert (found.num_processes, found.process_id) == (6, 5)
        monkeypatch.setitem(ATTRIBUTES, "tpu-env", "")
        found = distributed.find(FLAGS, environ, on_tpu=True)
        assert (found.coordinator_address, found.num_processes) == ("10.0.0.1:8482", 2)
        monkeypatch.delitem(ATTRIBUTES, "agent-worker-number")
        with pytest.raises(ValueError, match="does not tell 'agent-worker-number'"):
            distributed.find(FLAGS, environ, on_tpu=True)
        server.shutdown()


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def join(members, *, address=None, timeout=5.0, token=None):
    """What each member gets from `lifeline.join`: process ids, or the error."""
    address = address or free_address()

    def one(member):
        try:
            found, _ = lifeline.join(
                member, address, token=token, start_timeout=timeout, peer_timeout=60.0
            )
            return [m.process_id for m in found]
        except ValueError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(one, members))


def member(process_id, count=3, **facts):
    facts = {"jax": "1.0", "config": "a = 1\nb = 2"} | facts
    return lifeline.Member(
        process_id=process_id, num_processes=count, host=f"host{process_id}", facts=facts
    )


def test_all_come_and_agree():
    assert join([member(2), member(0), member(1)]) == [[0, 1, 2]] * 3


@pytest.mark.parametrize(
    ("members", "messages"),
    [
        (
            [member(0), member(1)],
            ["2 of 3 processes came (process 0 (host0), process 1 (host1))", "[2] did not"],
        ),
        (
            [member(0), member(1), member(2, jax="1.1")],
            ["process 2 (host2) has jax 1.1; most have 1.0"],
        ),
        (
            [member(0), member(1, config="a = 1\nb = 3"), member(2)],
            ["process 1 (host1) has another", "found ['b = 3'], expected ['b = 2']"],
        ),
        (
            [member(0), member(1, 4)],
            ["process 1 (host1) was told of 4 processes, process 0 (host0) of 3"],
        ),
        ([member(0), member(1), member(1)], ["process 1 of 3, and so does host1"]),
    ],
)
def test_everyone_is_told_what_is_wrong(members, messages):
    for answer in join(members, timeout=2.0):
        assert isinstance(answer, str) and all(message in answer for message in messages), answer


def test_no_process_zero_and_a_port_in_use():
    (answer,) = join([member(1)], timeout=1.0)
    assert "process 1 (host1) cannot reach process 0 at 127.0.0.1:" in answer
    assert "Connection refused" in answer
    with socket.create_server(("", 0)) as taken:
        (answer,) = join([member(0)], address=f"127.0.0.1:{taken.getsockname()[1]}")
    assert "process 0 cannot listen on port" in answer and "Address already in use" in answer


PULSE = """
import json, sys, time
from tulu_jax import validation
from tulu_jax.parallel import distributed, lifeline
me, address = lifeline.Member(**json.loads(sys.argv[1])), sys.argv[2]
_, line = lifeline.join(me, address, token=b"x" * 32, start_timeout=60.0, peer_timeout=5.0)
line.watch()
print("joined", flush=True)
action = sys.argv[3] if me.process_id == 1 else None
if action == "raise":
    time.sleep(1)
    line.fail(FloatingPointError("loss is not finite"))
if sys.argv[3] == "echo" and me.process_id != 1:
    sys.stdin.readline()
    line.fail(ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"))
if action == "refuse":
    distributed._lifeline = line
    with distributed.together(), validation.refusing():
        raise validation.UsageError("row 7 is malformed")
time.sleep(100)
"""


@pytest.mark.parametrize(
    ("action", "code", "reason"),
    [
        ("stop", 75, "process 1 (host1) has been silent for"),
        ("echo", 75, "process 1 (host1) died: its connection closed"),
        ("abort", 75, "process 1 (host1) died: its connection closed"),
        ("raise", 1, "process 1 (host1) failed: FloatingPointError: loss is not finite"),
        ("refuse", 2, "process 1 (host1) failed: UsageError: row 7 is malformed. Correct that"),
    ],
)
def test_a_silent_or_failed_process_ends_the_others(action, code, reason):
    """SIGSTOP is what a host looks like that went away without closing its connections.

    Where the others get a failed collective or an abort of jax's client first, as they may when a
    process dies, that is not their last word.
    """
    address = free_address()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PULSE, json.dumps(vars(member(i))), address, action],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(3)
    ]
    try:
        assert all(process.stdout.readline() == "joined\n" for process in processes)
        if action == "stop":
            processes[1].send_signal(signal.SIGSTOP)
        for i in (0, 2):
            if action == "echo":
                processes[i].stdin.write("\n")
                processes[i].stdin.flush()
            if action == "abort":
                processes[i].send_signal(signal.SIGABRT)
        if action in ("echo", "abort"):
            processes[1].kill()
        for i in (0, 2):
            error = processes[i].communicate(timeout=60)[1]
            assert processes[i].returncode == code
            assert f"process {i} (host{i}) stops: {reason}" in error
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_unequal_devices_name_the_host(monkeypatch):
    monkeypatch.setattr(distributed, "_members", [member(0, 2), member(1, 2)])
    (problem,) = distributed.device_problems(jax.devices())
    assert problem.startswith("process 1 (host1) has 0 devices; most have 8 cpu devices")
