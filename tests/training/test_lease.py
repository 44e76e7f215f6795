"""One run in a workdir: who holds it is named, and a run resumes when its holder is gone."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tulu_jax import atomic, process_identity, validation
from tulu_jax.training import lease

HOLDER = """
import sys, time
from tulu_jax.training import lease
with lease.held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""
ELSEWHERE = process_identity.Process(host="far", machine="0" * 16, pid=7, started="1")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.05)
    monkeypatch.setattr(lease, "EXPIRY", 0.8)
    monkeypatch.setattr(lease, "POLL", 0.02)


def held_elsewhere(workdir):
    now = time.time()
    record = lease.Record(id="other", process=ELSEWHERE, since=now, beat=now)
    workdir.mkdir(exist_ok=True)
    atomic.write_bytes(workdir / lease.FILE, record.encode())


def test_a_workdir_that_is_held_is_refused_by_name(tmp_path):
    workdir = tmp_path / "run"
    me = process_identity.current()
    holder = rf"run is held by process {me.pid} on {me.host} since \d{{4}}-.* UTC, last heard 0 s"
    with lease.held(str(workdir)) as mine:
        with (
            pytest.raises(
                validation.UsageError, match=holder + ".*choose another folder .--workdir"
            ),
            lease.held(str(workdir)),
        ):
            pass
        mine.check()
        assert os.listdir(workdir) == [lease.FILE]
    assert not workdir.exists()  # as before
    workdir.mkdir()
    with pytest.raises(ZeroDivisionError), lease.held(str(workdir)):
        _ = 1 // 0
    assert os.listdir(workdir) == []


def test_a_killed_holder_is_followed_at_once(tmp_path):
    """By one of several that come together."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout.readline() == "held\n"
    with pytest.raises(validation.UsageError, match=f"held by process {process.pid} on"):
        lease.Lease(str(tmp_path)).acquire()
    process.send_signal(signal.SIGKILL)
    process.wait()
    holders, refused, together = [], [], threading.Barrier(6)

    def come():
        one = lease.Lease(str(tmp_path))
        together.wait()
        try:
            one.acquire()
            holders.append(one)
        except validation.UsageError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=come) for _ in range(6)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(holders) == 1 and len(refused) == 5
    assert time.monotonic() - started < 10 < lease.EXPIRY
    holders[0].release()
    assert os.listdir(tmp_path) == []


def test_a_holder_elsewhere_is_followed_after_its_last_sign(tmp_path, quick, caplog):
    held_elsewhere(tmp_path)
    started = time.monotonic()
    with caplog.at_level("INFO", logger="absl"), lease.held(str(tmp_path)):
        assert time.monotonic() - started >= lease.EXPIRY
    assert "held by process 7 on far since" in caplog.text
    assert "waiting up to 1 s for a sign of it" in caplog.text
    assert "it is gone, and this run goes on" in caplog.text


def test_a_holder_elsewhere_that_gives_a_sign_keeps_it(tmp_path, quick):
    held_elsewhere(tmp_path)
    beat = threading.Timer(0.2, held_elsewhere, [tmp_path])
    beat.start()
    with (
        pytest.raises(validation.UsageError, match="held by process 7 on far"),
        lease.held(str(tmp_path)),
    ):
        pass
    assert (tmp_path / lease.FILE).exists()


def test_a_lease_torn_by_a_kill_expires(tmp_path, quick):
    (tmp_path / lease.FILE).touch()
    with lease.held(str(tmp_path)) as mine:
        assert lease._decoded((tmp_path / lease.FILE).read_bytes()).process.pid == os.getpid()
        mine.check()


def test_a_holder_beats_and_notices_that_it_lost(tmp_path, quick):
    with lease.held(str(tmp_path)) as mine:
        file = tmp_path / lease.FILE
        first = lease._decoded(file.read_bytes())
        time.sleep(0.3)
        later = lease._decoded(file.read_bytes())
        assert later.beat > first.beat and dataclasses.replace(later, beat=first.beat) == first
        while not mine._lost:  # a beat may have been on its way
            held_elsewhere(tmp_path)
            time.sleep(0.1)
        with pytest.raises(validation.UsageError, match=r"process 7 on far .* it took over from"):
            mine.check()
    assert lease._decoded(file.read_bytes()).process == ELSEWHERE  # it is not removed


def test_what_a_killed_run_left_under_temporary_names_is_removed(tmp_path):
    me = process_identity.current()
    left = f".config.gin.{me.machine}-{me.pid}-1-0123abcd.tulu_jax_partial"
    for name in (left, ".config.gin.partial", "thesis.tex"):
        (tmp_path / name).touch()
    with lease.held(str(tmp_path)):
        pass
    assert sorted(os.listdir(tmp_path)) == [".config.gin.partial", "thesis.tex"]
