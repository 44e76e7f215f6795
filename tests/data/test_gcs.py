"""Raw rows and the encode cache in a bucket: real gcsfs against an emulator that runs beside."""

import dataclasses
import gzip
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import uuid

import builders
import fault_proxy
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_rows import chats, read_rows, write_jsonl

from tulu_jax import bucket_client, preflight, process_identity, validation
from tulu_jax.data import data_checks, encode, loader
from tulu_jax.data.sources import readers
from tulu_jax.interop import folder
from tulu_jax.training import lease, metrics

gcsfs = pytest.importorskip("gcsfs", reason="the extra 'gcs' is not installed")
pytest.importorskip("gcp_storage_emulator", reason="the extra 'test' is not installed")


@pytest.fixture(scope="module")
def emulator():
    with fault_proxy.emulator() as address:
        yield address


def fresh_client() -> None:
    """No client from before, which keeps its address."""
    from etils.epath import backend

    backend.fsspec_backend._get_filesystem.cache_clear()
    bucket_client.Client.clear_instance_cache()
    bucket_client._missed.clear()


@pytest.fixture
def client(monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")  # nobody is there
    fresh_client()
    yield
    fresh_client()
    readers._out_of_reach.clear()


@pytest.fixture
def bucket(emulator, client, monkeypatch) -> str:
    """`gs://` and the name of a new bucket."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator)
    name = f"rows-{uuid.uuid4().hex}"
    gcsfs.GCSFileSystem().mkdir(name)
    return f"gs://{name}"


@pytest.fixture
def config(tokenizer_dir, tmp_path, bucket, add_task) -> loader.DataConfig:
    """A task "a" of 40 rows, the same in the bucket and in `tmp_path`."""
    write_jsonl(tmp_path / "rows.jsonl", chats(40))
    upload(tmp_path / "rows.jsonl", f"{bucket}/data/rows.jsonl")
    add_task("a", {"train": "rows.jsonl"})
    return loader.DataConfig(
        train="a",
        tokenizer=tokenizer_dir,
        data_root=str(tmp_path),
        cache_dir=str(tmp_path / "cache"),
        max_length=64,
    )


def upload(file: pathlib.Path, target: str) -> None:
    readers.as_path(target).write_bytes(file.read_bytes())


def local(config) -> loader.Rows:
    return loader.prepare(config, split="train")


def in_bucket(config, bucket: str) -> loader.Rows:
    """Rows and cache in the bucket."""
    moved = dataclasses.replace(config, data_root=f"{bucket}/data", cache_dir=f"{bucket}/cache")
    return loader.prepare(moved, split="train")


def assert_same_rows(found: loader.Rows, expected: loader.Rows) -> None:
    assert found.fingerprint == expected.fingerprint and found.stats == expected.stats
    assert found.num_examples == expected.num_examples
    for index in range(expected.rows_per_epoch):
        ours, theirs = found.row(index), expected.row(index)
        assert all((ours[name] == theirs[name]).all() for name in theirs)
        assert found.example_ids(index) == expected.example_ids(index)


def test_rows_and_cache_in_a_bucket_equal_local_ones(config, bucket, monkeypatch):
    monkeypatch.setattr(encode, "SHARD_ROWS", 16)
    expected = local(config)
    assert_same_rows(in_bucket(config, bucket), expected)
    (folder,) = readers.as_path(f"{bucket}/cache").iterdir()
    twin = pathlib.Path(config.cache_dir) / folder.name
    names = sorted(file.name for file in twin.iterdir())
    assert sorted(file.name for file in folder.iterdir()) == names and len(names) == 5
    for name in names:
        assert (folder / name).read_bytes() == (twin / name).read_bytes()
    fresh_client()
    assert_same_rows(in_bucket(config, bucket), expected)  # from the cache


def test_a_shard_that_is_damaged_in_a_bucket_is_named(config, bucket, monkeypatch):
    monkeypatch.setattr(encode, "SHARD_ROWS", 16)
    shard = in_bucket(config, bucket).store.shards[1].file
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    with pytest.raises(ValueError, match=rf"{shard}: found digest .*; remove the folder gs://"):
        in_bucket(config, bucket)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard}: found no such file"):
        in_bucket(config, bucket)
    shard.write_bytes(whole)
    assert in_bucket(config, bucket).num_examples == 40


def test_every_kind_of_file_and_globs_in_a_bucket(config, bucket, tmp_path, add_task):
    rows = chats(6)
    (tmp_path / "list.json").write_text(json.dumps(rows))
    with gzip.open(tmp_path / "lines.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "part-0.parquet")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "part-1.parquet")
    (tmp_path / "fields.tsv").write_text("a\tb\n")
    for file in tmp_path.iterdir():
        if file.is_file():
            upload(file, f"{bucket}/kinds/{file.name}")
    assert read_rows(f"{bucket}/kinds/list.json") == rows
    assert read_rows(f"{bucket}/kinds/lines.jsonl.gz") == rows
    assert read_rows(f"{bucket}/kinds/fields.tsv") == [{"fields": ["a", "b"]}]
    found = readers.find(f"{bucket}/kinds/part-*.parquet")
    assert found == [f"{bucket}/kinds/part-{i}.parquet" for i in range(2)]
    assert [row for path in found for row in read_rows(path)] == rows + rows


ENCODE = """
import json, sys
from tulu_jax.data import encode, loader, registry
encode.SHARD_ROWS = 4
registry.TaskRegistry.add(
    registry.Task(
        name="a",
        kind="sft",
        sources={"train": "rows.jsonl"},
        convert=lambda row: row,
        licence="-",
        origin="-",
    )
)
rows = loader.prepare(loader.DataConfig(**json.loads(sys.argv[1])), split="train")
print(rows.fingerprint, rows.num_examples)
"""


def encode_in_a_process(config) -> subprocess.Popen:
    command = [sys.executable, "-c", ENCODE, json.dumps(dataclasses.asdict(config))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def shards_in(bucket: str) -> dict[str, str]:
    """When each shard below the bucket's cache was written, by its name."""
    files = gcsfs.GCSFileSystem(skip_instance_cache=True).find(f"{bucket}/cache", detail=True)
    return {name: file["updated"] for name, file in files.items() if name.endswith(".arrow")}


def test_own_rows_in_a_bucket(config, bucket):
    """By their whole path, and below the data root."""
    expected = local(dataclasses.replace(config, train=f"{config.data_root}/rows.jsonl"))
    for path in (f"{bucket}/data/rows.jsonl", f"{bucket}/data/row*.jsonl", "rows.jsonl"):
        found = in_bucket(dataclasses.replace(config, train=path), bucket)
        assert found.stats.tasks[0].task == path and found.num_examples == expected.num_examples
        assert (found.row(0)["tokens"] == expected.row(0)["tokens"]).all()
    with pytest.raises(ValueError, match=rf"no such file: looked for {bucket}/data/none\.jsonl"):
        local(dataclasses.replace(config, train=f"{bucket}/data/none.jsonl"))


def test_an_encoding_killed_between_shards_goes_on(config, bucket, tmp_path):
    """Real processes: the first is killed once some shards of 500 are in the bucket."""
    write_jsonl(tmp_path / "rows.jsonl", chats(2000))
    upload(tmp_path / "rows.jsonl", f"{bucket}/data/rows.jsonl")
    moved = dataclasses.replace(config, data_root=f"{bucket}/data", cache_dir=f"{bucket}/cache")
    process = encode_in_a_process(moved)
    while not shards_in(bucket) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    written = shards_in(bucket)
    assert 0 < len(written) < 500
    output, error = encode_in_a_process(moved).communicate()
    assert output.split()[1:] == [b"2000"], error.decode()
    shards = shards_in(bucket)
    assert len(shards) == 500 and shards.items() >= written.items()
    fresh = dataclasses.replace(config, cache_dir=str(tmp_path / "fresh"))
    assert encode_in_a_process(fresh).communicate()[0] == output
    for name in shards:
        twin = tmp_path / "fresh" / pathlib.Path(*pathlib.Path(name).parts[2:])
        assert readers.as_path(f"gs://{name}").read_bytes() == twin.read_bytes()


def test_a_truncated_gzip_in_a_bucket(config, bucket):
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in chats(500)).encode())
    readers.as_path(f"{bucket}/cut.jsonl.gz").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz, after line \d+: unreadable"):
        read_rows(f"{bucket}/cut.jsonl.gz")


def test_missing_objects_and_buckets(config, bucket):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file; place it there"):
        read_rows(f"{bucket}/none.jsonl")
    elsewhere = dataclasses.replace(config, data_root=f"{bucket}/elsewhere")
    with pytest.raises(FileNotFoundError, match=rf"found no {bucket}/elsewhere/rows\.jsonl"):
        local(elsewhere)
    with pytest.raises(FileNotFoundError, match=r"found no gs://no-such-bucket/rows\.jsonl"):
        local(dataclasses.replace(config, data_root="gs://no-such-bucket"))
    mistyped = dataclasses.replace(config, cache_dir="gs://no-such-bucket/cache")
    with pytest.raises(OSError, match="a train: could not be written to gs://no-such-bucket/cache"):
        local(mistyped)
    assert not gcsfs.GCSFileSystem().exists("no-such-bucket")


def test_a_bucket_out_of_reach_is_named_and_asked_once(config, client, monkeypatch):
    """Nobody listens; only the waits between the tries are left out."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    fresh_client()
    monkeypatch.setattr(bucket_client, "WAITS", (0.0, 0.0))
    away = dataclasses.replace(config, data_root="gs://out-of-reach/data")
    with pytest.raises(OSError) as raised:
        local(away)
    assert "gs://out-of-reach cannot be read or written (UnreachableError" in str(raised.value)
    assert "127.0.0.1:9 cannot be reached (Connection refused)" in str(raised.value)
    assert "the network and the credentials" in str(raised.value)
    with pytest.raises(OSError, match="gs://globs-out-of-reach cannot be read or written"):
        readers.find("gs://globs-out-of-reach/data/*.parquet")
    monkeypatch.setattr(bucket_client.socket, "create_connection", None)  # asked no more
    (problem,) = data_checks.problems(away, kind="sft")
    assert problem.startswith("a (train): gs://out-of-reach cannot be read")
    with pytest.raises(OSError, match="gs://cache-out-of-reach cannot be read or written"):
        local(dataclasses.replace(config, cache_dir="gs://cache-out-of-reach/cache"))


def test_our_client_is_used_with_and_without_tensorflow(bucket):
    assert os.environ["EPATH_USE_TF"] == "false"
    assert readers.as_path(bucket)._backend.fs(bucket).__class__ is bucket_client.Client


def test_metrics_in_a_bucket_survive_up_to_each_flush(bucket):
    """A killed run leaves what it flushed; a resumed one goes on behind its checkpoint."""
    config = metrics.LoggingConfig(tensorboard=True)
    first = metrics.Recorder(config, f"{bucket}/run", 0, {})
    for step in (1, 2, 3):
        first.write(step, {"train/loss": 1 / step})
    first.flush()
    first.write(4, {"train/loss": 0.0})  # and is killed
    assert [line["step"] for line in metrics.read(f"{bucket}/run")] == [1, 2, 3]
    resumed = metrics.Recorder(config, f"{bucket}/run", 2, {})
    resumed.write(3, {"train/loss": 5.0})
    resumed.close()
    lines = metrics.read(f"{bucket}/run")
    assert [(line["step"], line["train/loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 5.0)]
    events = list(readers.as_path(f"{bucket}/run/tensorboard").iterdir())
    assert events and all(len(event.read_bytes()) > 100 for event in events)


def test_metrics_are_written_again_at_most_every_half_minute(bucket, monkeypatch):
    recorder = metrics.Recorder(metrics.LoggingConfig(tensorboard=False), f"{bucket}/run", 0, {})
    recorder.write(1, {"loss": 1.0})
    assert not readers.as_path(f"{bucket}/run/{metrics.FILE}").exists()
    monkeypatch.setattr(metrics, "BUCKET_SECONDS", 0.0)
    recorder.write(2, {"loss": 1.0})
    assert len(metrics.read(f"{bucket}/run")) == 2


def test_a_run_in_a_bucket_has_it_alone(bucket):
    """What is written and read; a race of two is in tests/test_buckets.py, for the emulator ignores
    preconditions."""
    workdir = f"{bucket}/run"
    path = readers.as_path(f"{workdir}/{lease.FILE}")
    with lease.held(workdir) as mine:
        assert path.exists()
        with pytest.raises(validation.UsageError, match=f"{workdir} is held by process"):
            lease.Lease(workdir).acquire()
        mine.check()
    assert not path.exists()
    gone = dataclasses.replace(process_identity.current(), started="1")
    record = lease.Record(id="x", process=gone, since=time.time(), beat=time.time())
    path.write_bytes(record.encode())
    with lease.held(workdir):
        assert b'"id": "x"' not in path.read_bytes()
    assert gcsfs.GCSFileSystem().find(bucket) == []


def test_an_export_in_a_bucket_replaces_only_an_export(bucket):
    target = readers.as_path(f"{bucket}/models/out")
    for files in (["config.json", "a"], ["config.json", "b"]):
        assert folder.problems(target, overwrite=True, num_bytes=1) == []
        with folder.finished(target) as partial:
            for name in files:
                (partial / name).write_text(name)
        names = {path.name for path in target.iterdir()}
        assert names == {*files, folder.MANIFEST}
    assert len(gcsfs.GCSFileSystem().find(bucket)) == 3
    (target / "thesis.tex").write_text("x")
    (problem,) = folder.problems(target, overwrite=True, num_bytes=1)
    assert "holds thesis.tex, not listed" in problem


def bucket_problems(config, tmp_path, **changes):
    run = builders.replace(builders.train_config(tmp_path), data=config, **changes)
    return preflight.to_train(run, 8)


def test_buckets_that_cannot_be_written_are_named_before_a_run(config, bucket, tmp_path):
    assert bucket_problems(config, tmp_path, workdir=f"{bucket}/run") == []
    assert not list(readers.as_path(bucket).glob("run/*"))  # no probe is left
    (problem,) = bucket_problems(config, tmp_path, workdir="gs://no-such-bucket/run")
    assert problem.startswith("workdir = 'gs://no-such-bucket/run' on ")
    assert not gcsfs.GCSFileSystem().exists("no-such-bucket")


def test_a_bucket_out_of_reach_is_named_before_a_run(config, client, tmp_path, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    fresh_client()
    monkeypatch.setattr(bucket_client, "WAITS", (0.0,))
    (problem,) = bucket_problems(config, tmp_path, base="gs://away/llama")
    assert problem.startswith("base = 'gs://away/llama' on ")
    assert "gs://away cannot be read or written (UnreachableError: http://127.0.0.1:9" in problem
    assert "the network and the credentials" in problem
