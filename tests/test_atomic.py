"""Files are whole after a kill at any moment, and only what we left is removed."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from tulu_jax import atomic, process_identity

WRITER = """
import sys
from tulu_jax import atomic
print("ready", flush=True)
while True:
    for letter in "ab":
        atomic.write_text(sys.argv[1], letter * 3_000_000)
"""


def test_a_kill_leaves_the_former_content_or_the_new(tmp_path):
    file = tmp_path / "curve"
    (tmp_path / ".curve.partial").write_text("not ours")
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(file)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        while not file.exists():
            time.sleep(0.001)
        time.sleep(random.SystemRandom().uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        text = file.read_text()
        assert text in ("a" * 3_000_000, "b" * 3_000_000)
        assert len(list(tmp_path.iterdir())) <= 3
        atomic.sweep(epath.Path(tmp_path))
        assert sorted(os.listdir(tmp_path)) == [".curve.partial", "curve"]


def named(target, *, machine=None, pid=None, started=""):
    me = process_identity.current()
    return f".{target}.{machine or me.machine}-{pid or me.pid}-{started}-0123abcd.tulu_jax_partial"


def test_what_may_be_in_use_stays(tmp_path):
    """Of this process, and of another machine until it has not changed for a day."""
    me = process_identity.current()
    mine, gone = named("x", started=me.started), named("x", started="1")
    far, forgotten = named("far", machine="0" * 16), named("forgotten", machine="f" * 16)
    for name in (mine, gone, far, forgotten):
        (tmp_path / name).touch()
    day = time.time() - atomic.FORGOTTEN - 60
    os.utime(tmp_path / forgotten, (day, day))
    atomic.sweep(epath.Path(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted([mine, far])
    assert atomic.is_temporary(atomic.temporary_name("x")) and not atomic.is_temporary(".x.partial")
    assert atomic.temporary_name("x") != atomic.temporary_name("x")


def test_a_process_is_told_from_others():
    me = process_identity.current()
    assert me.runs() is True
    ended = subprocess.Popen(["sleep", "60"])
    started = process_identity._started(ended.pid)
    other = process_identity.Process(
        host=me.host, machine=me.machine, pid=ended.pid, started=started
    )
    assert other.runs() is True
    ended.kill()
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert other.runs() is False  # nobody has waited for it: it is a zombie
    ended.wait()
    assert other.runs() is False


def test_a_link_stays_and_a_pipe_is_written_to(tmp_path):
    (tmp_path / "link").symlink_to("file")
    atomic.write_text(tmp_path / "link", "é")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == "é".encode()
    code = "from tulu_jax import atomic; atomic.write_text('/dev/stdout', 'said')"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert said.stdout == b"said" and pathlib.Path("/dev/stdout").is_symlink()


def test_errors_name_the_file_that_was_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        atomic.write_text(tmp_path / "none" / "file", "x")
    assert error.value.filename == str(tmp_path / "none/file")
    with pytest.raises(ZeroDivisionError), atomic.writing(tmp_path / "file"):
        _ = 1 // 0
    assert os.listdir(tmp_path) == []
