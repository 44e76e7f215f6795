"""What does not come in time ends the process, with where its threads stand; of several, all."""

import json
import signal
import socket
import subprocess
import sys
import time

import pytest

SCRIPT = """
import json, re, sys, threading, time
from tulu_jax.parallel import distributed, lifeline, stall

def waits_for_a_disk():
    threading.Event().wait(100)

def never_lets_go_of_the_lock():
    re.match("(a+)+b", "a" * 64)

def works():
    for number in range(8):
        watchdog.expect(f"train {number}")
        time.sleep(0.5)

def ends():
    watchdog.close()
    with stall.watching(1.0) as other:
        other.expect("train 1")
    time.sleep(3)

stall.LAST_RESORT = 3.0
watchdog = stall.Watchdog(None if sys.argv[1] == "forever" else 2.0)
watchdog.expect("train 12")
if sys.argv[1] == "forever":
    time.sleep(3)
else:
    globals()[sys.argv[1]]()
watchdog.close()
print("done", flush=True)
"""


def run(action):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, action], capture_output=True, text=True, timeout=90
    )


def test_a_hang_is_said_with_the_stacks_of_all_threads():
    done = run("waits_for_a_disk")
    assert done.returncode == 75 and done.stdout == ""
    assert "in waits_for_a_disk" in done.stderr and "(most recent call first)" in done.stderr
    assert done.stderr.endswith(
        "The run stops: train 12 did not end within 2 s. Start the same command again to go on "
        "from the last checkpoint.\n"
    )


def test_a_hang_that_holds_the_interpreter_ends_too():
    done = run("never_lets_go_of_the_lock")
    assert done.returncode == 1 and done.stdout == ""
    assert "Timeout (0:00:05)!" in done.stderr and "in never_lets_go_of_the_lock" in done.stderr


@pytest.mark.parametrize("action", ["works", "ends", "forever"])
def test_what_goes_on_is_let_be(action):
    done = run(action)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


MEMBER = """
import json, sys, threading, time
from tulu_jax.parallel import distributed, lifeline, stall
me, address, seconds = lifeline.Member(**json.loads(sys.argv[1])), sys.argv[2], float(sys.argv[3])
_, distributed._lifeline = lifeline.join(
    me, address, token=b"x" * 32, start_timeout=60.0, peer_timeout=30.0
)
distributed._lifeline.watch()
watchdog = stall.Watchdog(seconds)
watchdog.expect("train 7")
print("joined", flush=True)

def reads_rows():
    threading.Event().wait(100)

def waits_for_the_others():
    time.sleep(100)

reads_rows() if me.process_id == 1 else waits_for_the_others()
"""


@pytest.mark.parametrize("first", [0, 1, 2])
def test_of_several_processes_each_tells_where_it_stands(first):
    """Whoever notices first: the stacks tell the one that hangs from those that wait for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    members = [
        {"process_id": i, "num_processes": 3, "host": f"host{i}", "facts": {"config": ""}}
        for i in range(3)
    ]
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", MEMBER, json.dumps(members[i]), address),
                "2" if i == first else "60",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(3)
    ]
    try:
        assert all(process.stdout.readline() == "joined\n" for process in processes)
        joined = time.monotonic()
        for i, process in enumerate(processes):
            error = process.communicate(timeout=40)[1]
            assert process.returncode == 75
            assert f"in {'reads_rows' if i == 1 else 'waits_for_the_others'}" in error
            assert f"process {i} (host{i}) stops: train 7 did not end within 2 s" in error
        assert time.monotonic() - joined < 30  # the others would have waited a minute
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()
