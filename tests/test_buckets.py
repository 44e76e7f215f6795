"""The recipe with its folders in a bucket that fails: the real clients, the real emulator, and a
proxy between them that answers errors, cuts, resets, loses answers, stalls and flips bytes.

TensorStore reads address and times once in a process, so the tests of this file share one proxy.
"""

import asyncio
import concurrent.futures
import contextlib
import json
import math
import re
import shutil
import threading
import types
import uuid

import commands
import fault_proxy
import gin
import grain  # noqa: F401 -- its flags outlive the first command
import jax
import numpy as np
import pytest
import raw_rows
import safetensors.numpy
from fault_proxy import CONTENT, Fault

from tulu_jax import atomic, bucket_client, gin_files, validation
from tulu_jax import trained as trained_lib
from tulu_jax.data import loader
from tulu_jax.data.sources import readers
from tulu_jax.interop import weight_files
from tulu_jax.training import checkpoint as checkpoint_lib
from tulu_jax.training import lease
from tulu_jax.training import metrics as metrics_lib

gcsfs = pytest.importorskip("gcsfs", reason="the extra 'gcs' is not installed")
pytest.importorskip("gcp_storage_emulator", reason="the extra 'test' is not installed")

SMALL = """
from __gin__ import dynamic_registration
from tulu_jax.data import loader
from tulu_jax.models import config

include 'tulu_tiny_{stage}.gin'

config.LlamaConfig.num_layers = 1
config.LlamaConfig.embed_dim = 32
config.LlamaConfig.mlp_dim = 64
config.LlamaConfig.head_dim = 8
loader.DataConfig.cache_dir = '{place}/cache'
TOKENIZER = '{home}/tokenizer'
MIXTURE = '{place}/{stage} rows.jsonl'
VALIDATION = None
HOLDOUT_EVERY = 10
MAX_LENGTH = 64
BATCH_SIZE = 8
BASE = {base!r}
NUM_STEPS = 4
CHECKPOINT_EVERY = 2
EVAL_EVERY = 4
"""
FAULTS = ("429", "500", "503", "cut", "reset", "lost")


@pytest.fixture(scope="module")
def proxy():
    from orbax.checkpoint._src.serialization import tensorstore_utils

    with fault_proxy.emulator() as address, fault_proxy.Proxy(address) as found:
        times = {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "8"}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (found.environment() | times).items():
                patch.setenv(name, value)
            few = {"max_retries": 6, "initial_delay": "20ms", "max_delay": "200ms"}
            patch.setitem(tensorstore_utils._BASE_TS_CONTEXT, "gcs_request_retries", few)
            patch.setitem(tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT, "gcs_request_retries", few)
            yield found


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """The waits of gcsfs between its tries, a fiftieth as long."""
    wait = asyncio.sleep

    async def sleep(seconds):
        await wait(seconds / 50)

    shorter = types.SimpleNamespace(**{**vars(asyncio), "sleep": sleep})
    monkeypatch.setattr(gcsfs.retry, "asyncio", shorter)
    forget()
    yield
    forget()


def forget() -> None:
    """Clients keep the times that they were made with."""
    from etils.epath import backend

    backend.fsspec_backend._get_filesystem.cache_clear()
    bucket_client.Client.clear_instance_cache()
    readers._out_of_reach.clear()
    bucket_client._missed.clear()


@pytest.fixture
def bucket(proxy) -> str:
    proxy.faults, name = [], f"runs-{uuid.uuid4().hex}"
    proxy.done.clear()
    yield proxy.make_bucket(name)
    proxy.faults = []


@pytest.fixture(scope="module")
def home(tmp_path_factory, tokenizer_dir):
    """A working directory with a tokenizer."""
    folder = tmp_path_factory.mktemp("buckets")
    shutil.copytree(tokenizer_dir, folder / "tokenizer")
    return folder


def write(home, place: str) -> None:
    """Rows in `place`, a folder or a bucket, and the gin files of a recipe there."""
    pairs = [raw_rows.pair(f"{i} and {i}?", f"{2 * i}", f"{i}") for i in range(80)]
    for stage, rows in (("sft", raw_rows.chats(120)), ("dpo", pairs)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        atomic.write_text(f"{place}/{stage} rows.jsonl", text)
        base = None if stage == "sft" else f"{place}/my runs/sft/"
        (home / f"{stage}.gin").write_text(
            SMALL.format(stage=stage, place=place, home=home, base=base)
        )


def run(name: str, stage: str, place: str, *flags: str) -> int:
    """The exit status of a command; its folder has a space, and is given with a slash behind it."""
    where = f"--workdir={place}/my runs/{stage}/"
    return commands.run(name, f"--gin_file={stage}.gin", where, *flags)


def lines(workdir: str) -> list[dict]:
    return [
        {name: value for name, value in line.items() if not name.startswith("perf/")}
        for line in metrics_lib.read(workdir)
    ]


def recipe(place: str) -> None:
    for name, stage in (("prepare", "sft"), ("train", "sft"), ("train", "dpo")):
        assert run(name, stage, place) == 0, (name, stage)
    assert run("convert", "dpo", place, f"--out={place}/my model/") == 0


def failing(share: float) -> list[Fault]:
    return [
        *(Fault(kind, share=share, times=math.inf) for kind in FAULTS),
        Fault("flip", CONTENT, share=share, times=math.inf),
    ]


@pytest.fixture(scope="module")
def local(home, tmp_path_factory) -> str:
    """A folder with the whole recipe."""
    place = str(tmp_path_factory.mktemp("local"))
    with contextlib.chdir(home):
        write(home, place)
        recipe(place)
    return place


@pytest.mark.slow
def test_the_recipe_in_a_bucket_that_fails_equals_the_local_one(
    home, local, bucket, proxy, monkeypatch
):
    monkeypatch.chdir(home)
    write(home, bucket)
    proxy.faults = failing(0.004)
    for kind in FAULTS:  # each for certain, as the arrays of a checkpoint are written and read
        proxy.faults += [Fault(kind, rf"(POST|PUT) .*checkpoints/{step}/state") for step in (2, 4)]
        proxy.faults += [Fault(kind, r"GET .*sft/checkpoints/4/state/.*alt=media")]
    recipe(bucket)
    assert set(proxy.done) == {*FAULTS, "flip"} or proxy.done.total() > 20, proxy.done
    proxy.faults = []
    for stage in ("sft", "dpo"):
        assert lines(f"{bucket}/my runs/{stage}") == lines(f"{local}/my runs/{stage}")
    ours, theirs = ({f.name: f for f in readers.as_path(f"{place}/my model").iterdir()}
                    for place in (bucket, local))  # fmt: skip
    assert ours.keys() == theirs.keys() and "model.safetensors" in ours
    for name, file in theirs.items():
        found = ours[name].read_bytes().replace(bucket.encode(), local.encode())  # in the card
        assert found == file.read_bytes(), name
    names = atomic.file_system(bucket).find(bucket)
    assert not [n for n in names if atomic.is_temporary(n.split("/")[-1]) or lease.FILE in n]
    assert not [n for n in names if "my model" in n and n.split("/")[1] != "my model"]
    assert commands.run("checkpoints", f"--workdir={bucket}/my runs/dpo/") == 0
    assert (
        commands.run("report", f"--workdirs={bucket}/my runs/dpo/", f"--out={bucket}/r.html") == 0
    )


@pytest.fixture(scope="module")
def whole(home, proxy) -> str:
    """A bucket with the SFT run."""
    place = proxy.make_bucket(f"whole-{uuid.uuid4().hex}")
    with contextlib.chdir(home):
        write(home, place)
        assert run("train", "sft", place) == 0
    return place


@pytest.fixture
def trained(home, whole, bucket, monkeypatch) -> str:
    """That bucket, to be read; its gin file in the working directory."""
    monkeypatch.chdir(home)
    write(home, whole)
    return whole


def read(place: str, what: str):
    """Parameters of the run's last checkpoint, or its rows."""
    gin.clear_config()
    config = gin_files.load("sft.gin", [], workdir=f"{place}/my runs/sft")
    forget()
    if what == "rows":
        return loader.prepare(config.data, split="train").fingerprint
    params = trained_lib.load(config, step=4)[1]
    return [leaf.tobytes() for leaf in jax.tree.leaves(jax.device_get(params))]


@pytest.mark.parametrize(
    ("where", "what", "named"),
    [
        pytest.param(
            r"checkpoints/4/state/.*/d/",
            "params",
            r"step 4 .*array .* was saved as .*step 2 is whole",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            r"checkpoints/4/about/metadata",
            "params",
            r"step 4 .*gs://.*/about/metadata",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            r"checkpoints/4/digests\.json",
            "params",
            r"step 4 .*gs://.*/4/digests\.json",
            marks=pytest.mark.slow,
        ),
        (r"cache/.*\.arrow", "rows", r"gs://.*\.arrow"),
        (r"cache/.*manifest", "rows", r"gs://.*manifest"),
    ],
)
def test_flipped_bytes_are_read_again_or_named(where, what, named, trained, proxy):
    """Once on its way, then at every read."""
    expected = read(trained, what)
    proxy.faults = [Fault("flip", rf"GET .*{where}.*alt=media")]
    assert read(trained, what) == expected
    assert proxy.done["flip"] == 1
    proxy.faults = [Fault("flip", rf"GET .*{where}.*alt=media", times=math.inf)]
    with pytest.raises((validation.UsageError, OSError), match=named):
        read(trained, what)


def test_a_part_of_a_file_of_weights_that_is_flipped_is_read_again(
    bucket, proxy, home, monkeypatch
):
    weights = {"w": np.arange(4000, dtype=np.float32).reshape(100, 40)}
    place = readers.as_path(f"{bucket}/base")
    (place / weight_files.SINGLE).write_bytes(safetensors.numpy.save(weights))
    files = weight_files.WeightFiles(place)
    proxy.faults = [Fault("flip", r"GET .*safetensors.*alt=media")]
    np.testing.assert_array_equal(files.rows("w", slice(10, 90)), weights["w"][10:90])
    assert proxy.done["flip"] == 1
    proxy.faults = [Fault("flip", r"GET .*safetensors.*alt=media", times=math.inf)]
    with pytest.raises(ValueError, match=rf"{place}/model.safetensors: bytes .* differ at each"):
        files.rows("w", slice(10, 90))


@pytest.mark.slow
def test_an_export_that_reads_a_flipped_byte_is_made_again(trained, bucket, proxy):
    """In each of the files that hold the parameters or an index of them."""
    first = len(proxy.requests)
    assert run("convert", "sft", trained, f"--out={bucket}/whole/") == 0
    of_state = re.compile(r"GET .*checkpoints(/|%2F)4(/|%2F)state.*alt=media")
    asked = {one.split("?")[0] for one in proxy.requests[first:] if of_state.match(one)}
    assert len(asked) > 2
    for number, one in enumerate(sorted(asked)):
        proxy.faults = [Fault("flip", rf"{re.escape(one)}\?.*alt=media")]
        assert run("convert", "sft", trained, f"--out={bucket}/again {number}/") == 0, one
        assert proxy.done["flip"] == number + 1
        whole, again = (
            (readers.as_path(f"{bucket}/{name}") / weight_files.SINGLE).read_bytes()
            for name in ("whole", f"again {number}")
        )
        assert again == whole


@pytest.mark.parametrize("kind", ["lost", "reset", "503"])
def test_a_removal_whose_answer_is_lost_is_done(kind, bucket, proxy):
    """Of one object, and of a folder with all in it."""
    folder = readers.as_path(f"{bucket}/removed/folder")
    for name in ("one", "two", "three"):
        (folder / name).write_text(name)
    proxy.faults = [Fault(kind, "DELETE .*one")]
    (folder / "one").unlink()
    assert proxy.done == {kind: 1}
    assert sorted(path.name for path in folder.iterdir()) == ["three", "two"]
    proxy.faults = [Fault(kind, "(DELETE|POST) ")]
    folder.rmtree()
    assert proxy.done == {kind: 2} and not folder.exists()


@pytest.mark.slow
def test_what_does_not_answer_is_given_up_and_asked_again(trained, proxy, monkeypatch):
    """By TensorStore and by gcsfs."""
    monkeypatch.setattr(bucket_client, "STALLED", 5.0)
    expected = read(trained, "params")
    proxy.faults = [
        Fault("stall", r"GET .*checkpoints/4/state/.*/d/.*alt=media"),
        Fault("stall", r"GET .*checkpoints/4/digests.json.*alt=media"),
    ]
    assert read(trained, "params") == expected
    assert proxy.done["stall"] == 2


@pytest.mark.slow
def test_a_bucket_that_stays_away_ends_the_run_and_the_next_goes_on(
    home, local, bucket, proxy, monkeypatch
):
    """As a checkpoint is written: its object is named, and the one before it restores."""
    monkeypatch.chdir(home)
    write(home, bucket)
    proxy.faults = [Fault("503", r"(POST|PUT) .*checkpoints/4", times=math.inf)]
    named = r"gs://.*checkpoints/4/(.|\n)*Last good checkpoint: step 2 in gs://"
    with pytest.raises(checkpoint_lib.CheckpointError, match=named):
        run("train", "sft", bucket)
    proxy.faults = []
    assert run("train", "sft", bucket) == 0
    assert lines(f"{bucket}/my runs/sft") == lines(f"{local}/my runs/sft")


def test_of_many_that_start_in_a_bucket_one_gets_it(bucket, proxy):
    """The answer to the first that makes the lease is lost on its way."""
    proxy.faults = [Fault("lost", "POST .*ifGenerationMatch=0")]
    found = [lease.Lease(f"{bucket}/run") for _ in range(4)]

    def acquired(one: lease.Lease) -> bool:
        try:
            one.acquire()
            return True
        except validation.UsageError as error:
            assert "is held by process" in str(error)
            return False

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        got = list(pool.map(acquired, found))
    assert got.count(True) == 1
    assert proxy.done["lost"] == 1
    found[got.index(True)].release()
    assert atomic.file_system(bucket).find(bucket) == []


WITH_PATHS = (
    ("train", "--gin_file=sft.gin", "--workdir=gs://away/run"),
    ("prepare", "--gin_file=sft.gin", "--gin.MIXTURE='gs://away/rows.jsonl'"),
    ("convert", "--gin_file=sft.gin", "--workdir=gs://away/run"),
    ("evaluate", "--gin_file=tulu_tiny_sft.gin", "--workdir=gs://away/run"),
    ("generate", "--gin_file=sft.gin", "--workdir=gs://away/run", "--prompt=x"),
    ("checkpoints", "--workdir=gs://away/run"),
    ("report", "--workdirs=gs://away/run"),
)


@pytest.mark.parametrize("command", WITH_PATHS, ids=lambda command: command[0])
def test_no_network_is_said_by_every_command(command, home, tmp_path, monkeypatch, capfd):
    """At an address where nobody listens."""
    monkeypatch.chdir(home)
    write(home, str(tmp_path))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setattr(bucket_client, "WAITS", (0.0, 0.1))
    forget()
    assert commands.run(*command) == 2
    said = capfd.readouterr().err
    assert "http://127.0.0.1:9 cannot be reached (Connection refused)" in said
    assert "Traceback" not in said


def test_a_name_that_is_never_resolved_is_given_up(monkeypatch):
    """The system asks on in a thread; nobody waits for it."""
    monkeypatch.setattr(bucket_client, "SOON", 0.2)
    ended = threading.Event()

    def resolving(*arguments, **options):
        ended.wait(20)
        raise TimeoutError

    monkeypatch.setattr(bucket_client.socket, "create_connection", resolving)
    with pytest.raises(validation.UnreachableError, match=r"gs\.example cannot .*no answer in 0 s"):
        bucket_client.require_network("https://gs.example")
    ended.set()


def test_a_bucket_without_permission_is_named(trained, proxy, capfd):
    for command in (
        ("train", "--gin_file=sft.gin", f"--workdir={trained}/my runs/sft"),
        ("convert", "--gin_file=sft.gin", f"--workdir={trained}/my runs/sft", "--out=hf"),
        ("checkpoints", f"--workdir={trained}/my runs/sft"),
        ("report", f"--workdirs={trained}/my runs/sft"),
    ):
        proxy.faults = [Fault("403", "my runs", times=math.inf)]
        forget()
        capfd.readouterr()
        assert commands.run(*command) == 2, command
        said = capfd.readouterr().err
        assert trained in said and "is not permitted" in said and "Traceback" not in said
