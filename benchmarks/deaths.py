"""How the death of one process ends the other: jax.distributed alone, and ours.

    python benchmarks/deaths.py [--timeout 10]

Two real processes on the CPU come together, and one of them dies, hangs, fails, never comes or has
another configuration. What is measured is the other: the seconds until it ends (after the death;
where somebody never comes or differs, after the start, imports included), its exit status, and how
what it prints names the process. `alone` is `jax.distributed.initialize`, with --timeout as its
three timeouts, and `multihost_utils.assert_equal` on the configuration; `ours` is
`distributed.connect`, with --timeout as its own two. `ratio` is the share of cases that
ours ends with the status of docs/launch.md, naming the process.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib

LIMIT = 30  # seconds after which a process is said to go on
RETRY, REFUSED, ERROR = 75, 2, 1  # the statuses of docs/launch.md
SIDES = ("alone", "ours")
# What happens to which process, and how ours shall end the other. All sleep when it happens, but in
# the two cases of collectives: gloo's see a connection close, while those of a TPU would wait.
CASES = {
    "1 is killed": ("kill", 1, RETRY),
    "0 is killed": ("kill", 0, RETRY),
    "1 is killed in collectives": ("kill", 1, RETRY),
    "0 is killed in collectives": ("kill", 0, RETRY),
    "1 hangs (SIGSTOP)": ("stop", 1, RETRY),
    "0 hangs (SIGSTOP)": ("stop", 0, RETRY),
    "1 raises an error": ("raise", 1, ERROR),
    "0 raises an error": ("raise", 0, ERROR),
    "1 never comes": ("absent", 1, REFUSED),
    "0 never comes": ("absent", 0, REFUSED),
    "1 has another configuration": ("differ", 1, REFUSED),
    "1 was told of 3 processes": ("count", 1, REFUSED),
}


@contextlib.contextmanager
def joined(side: str, config: str, count: int, process_id: int, address: str, timeout: int):
    """Around what a process does in a run."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    from tulu_jax import validation
    from tulu_jax.parallel import distributed

    if side == "alone":
        jax.distributed.initialize(
            address,
            count,
            process_id,
            cluster_detection_method="deactivate",
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=timeout,
        )
        multihost_utils.assert_equal(np.uint32(zlib.crc32(config.encode())), "configuration")
        yield
        return
    processes = distributed.Processes(
        coordinator_address=address, num_processes=count, process_id=process_id, source="flags"
    )
    with distributed.together(), validation.refusing():
        with validation.reading():
            distributed.connect(
                processes, config_text=config, start_timeout=timeout, peer_timeout=timeout
            )
        yield


def member(side: str, case: str, process_id: int, address: str, timeout: int) -> None:
    """One process of a try, which prints "joined" once it is in the run."""
    import numpy as np
    from jax.experimental import multihost_utils

    kind = CASES[case][0] if process_id == CASES[case][1] else None
    config = "NUM_STEPS = 7" if kind == "differ" else "NUM_STEPS = 6"
    with joined(side, config, 3 if kind == "count" else 2, process_id, address, timeout):
        multihost_utils.process_allgather(np.zeros(1))
        print("joined", flush=True)
        if kind == "raise":
            sys.stdin.readline()
            raise FloatingPointError("loss is not finite")
        while True:
            if case.endswith("in collectives"):
                multihost_utils.process_allgather(np.zeros(1))
            else:
                time.sleep(0.1)


def start(folder: str, process_id: int, *arguments: str) -> subprocess.Popen:
    """A process of a try; what it prints goes to a file in `folder`."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    with open(f"{folder}/{process_id}", "w") as file:
        return subprocess.Popen(
            [sys.executable, __file__, "--member", *arguments],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
            text=True,
        )


def said(folder: str, process_id: int) -> str:
    with open(f"{folder}/{process_id}") as file:
        return file.read()


def naming(text: str, victim: int) -> str:
    """How `text` names the process."""
    host = re.escape(socket.gethostname())
    if re.search(rf"process {victim} \({host}\)", text):
        return "number and host"
    numbers = (
        rf"processes \[{victim}\]|process {victim} at|heartbeats\):\n{victim}\n|Task {victim} "
    )
    if re.search(numbers, text):
        return "number"
    return '"the leader"' if victim == 0 and "leader task was" in text else "no"


def observe(side: str, case: str, timeout: int) -> dict:
    """Seconds and exit status of the process that nothing happened to, and how it names the other;
    both None if it goes on."""
    kind, victim, _ = CASES[case]
    other = 1 - victim
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    began, processes = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for i in [other] if kind == "absent" else [0, 1]:
                processes[i] = start(folder, i, side, case, str(i), address, str(timeout))
            if kind in ("kill", "stop", "raise"):
                while not all("joined" in said(folder, i) for i in processes):
                    assert all(p.poll() is None for p in processes.values()), said(folder, other)
                    time.sleep(0.05)
                time.sleep(1)
                began = time.monotonic()
            if kind in ("kill", "stop"):
                number = signal.SIGKILL if kind == "kill" else signal.SIGSTOP
                processes[victim].send_signal(number)
            elif kind == "raise":
                processes[victim].stdin.write("now\n")
                processes[victim].stdin.flush()
            with contextlib.suppress(subprocess.TimeoutExpired):
                processes[other].wait(LIMIT)
            seconds, status = time.monotonic() - began, processes[other].poll()
        finally:
            for process in processes.values():
                process.kill()
                process.communicate()
        found = {"seconds": round(seconds, 1), "status": status}
        if status is None:
            found["seconds"] = None
        return found | {"names": naming(said(folder, other), victim)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--timeout", type=int, default=10, help="seconds of silence, and to start")
    parser.add_argument("--member", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.member:
        side, case, process_id, address, timeout = arguments.member
        member(side, case, int(process_id), address, int(timeout))
        return
    print("| what happens | jax alone: ends after, status, names it | ours |\n|---|---|---|")
    cases, good = {}, 0
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for case, (*_, expected) in CASES.items():
            tries = [pool.submit(observe, side, case, arguments.timeout) for side in SIDES]
            found = dict(zip(SIDES, [one.result() for one in tries], strict=True))
            cases[case] = found
            good += found["ours"]["status"] == expected and found["ours"]["names"] != "no"
            print("|", case, "|", " | ".join(row(one) for one in found.values()), "|", flush=True)
    ratio = good / len(CASES)
    print(json.dumps(dict(name="deaths", ratio=ratio, target=1.0, ok=ratio == 1.0, cases=cases)))


def row(found: dict) -> str:
    if found["status"] is None:
        return f"goes on after {LIMIT} s"
    return f"{found['seconds']} s, {found['status']}, {found['names']}"


if __name__ == "__main__":
    main()
