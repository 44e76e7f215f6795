"""What a user can get wrong ends an entry point with one line and status 2, never a traceback."""

import dataclasses
import pathlib
import re

import builders
import commands
import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tulu_jax import base, cli, gin_files, preflight, validation
from tulu_jax.data import registry
from tulu_jax.evals import held_out_prompts as benchmark
from tulu_jax.interop import hf
from tulu_jax.models import llama
from tulu_jax.training import agreement, checkpoint, metrics
from tulu_jax.training.state import TrainState

SMALL = ("--gin_file=tulu_tiny_sft.gin", "--gin.BATCH_SIZE=8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory whose trained tokenizer the tests of this file share."""
    return tmp_path_factory.mktemp("user_errors")


@pytest.fixture(autouse=True)
def here(monkeypatch, folder):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder / "home"))
    yield
    gin.clear_config()


def refused(capsys, name, *arguments):
    """What `python -m tulu_jax.NAME` says, which must end with status 2."""
    status = commands.run(name, *arguments)
    said = capsys.readouterr().err
    assert status == 2, said
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("name", ["generate", "convert", "evaluate"])
@pytest.mark.parametrize("workdir", ["missing", "empty", "foreign"])
def test_before_training(capsys, tmp_path, name, workdir):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign/checkpoints").mkdir(parents=True)
    (tmp_path / "foreign/checkpoints/notes.txt").write_text("not ours")
    said = refused(capsys, name, *SMALL, f"--workdir={tmp_path / workdir}")
    assert f"there is no checkpoint in {tmp_path / workdir}/checkpoints" in said
    assert "train first" in said


@pytest.mark.parametrize("name", ["train", "generate", "convert", "evaluate", "prepare"])
def test_a_workdir_that_is_a_file(capsys, tmp_path, name):
    (tmp_path / "file").write_text("")
    said = refused(capsys, name, *SMALL, f"--workdir={tmp_path}/file/run")
    assert f"{tmp_path}/file is a file; expected a folder" in said


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("generate", ["--step=-1"], "flag --step=-1"),
        ("generate", ["--max_new_tokens=0"], "flag --max_new_tokens=0"),
        ("evaluate", ["--initial", "--step=3"], "give one of --initial and --step"),
        ("train", ["--wrokdir=x"], "Did you mean: workdir"),
        ("train", ["surplus"], "unexpected arguments ['surplus']"),
        ("train", ["--gin.NUM_STEPS=1"], "found 1 update, 1 of them warm-up"),
        ("prepare", ["--html=rows.html"], "give --show=N"),
    ],
)
def test_arguments(capsys, name, arguments, message):
    assert message in refused(capsys, name, *SMALL, *arguments)


def test_report_before_training_names_every_workdir(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / metrics.FILE).write_text("")
    workdirs = f"--workdirs={tmp_path}/nowhere,{tmp_path}/empty"
    said = refused(capsys, "report", workdirs, f"--out={tmp_path}/page.html")
    assert f"{tmp_path}/nowhere/metrics.jsonl does not exist" in said
    assert f"{tmp_path}/empty/metrics.jsonl has no metric to show" in said
    assert "workdirs" in refused(capsys, "report")


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), validation.refusing():
        _ = 1 // 0
    with pytest.raises(ValueError, match="not enough values"), validation.refusing():
        _, _ = [1]


def test_what_the_system_says_of_a_path(capsys):
    with pytest.raises(SystemExit) as ended, validation.refusing():
        pathlib.Path("/nowhere/page.html").write_text("")
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert (
        said == "/nowhere/page.html: No such file or directory; mend that path, or give another\n"
    )


def test_files_of_users_are_refused_whatever_their_readers_raise(capsys):
    for error in (ValueError("row 3 is malformed"), OSError("the bucket is out of reach")):
        with pytest.raises(SystemExit), validation.refusing(), validation.reading():
            raise error
        assert str(error) in capsys.readouterr().err


# Settings: paths and types.


def load(name, *overrides, workdir=None):
    return cli.load(name, overrides, workdir=workdir)


def test_a_tilde_is_the_home_folder_in_every_setting(folder, tmp_path):
    home = str(folder / "home")
    config = load("dpo_7b.gin", '--gin.BUCKET="~/b"', '--gin.BASE="~/sft"', workdir="~/run")
    assert config.workdir == f"{home}/run" and config.base == f"{home}/sft"
    assert config.data.tokenizer == f"{home}/b/models/Llama-2-7b-hf"
    assert (config.data.data_root, config.data.cache_dir) == (f"{home}/b/data", f"{home}/b/cache")
    saved = tmp_path / "config.gin"
    saved.write_text(cli.operative_config())
    gin.clear_config()
    assert load(str(saved)) == config
    config = builders.train_config(pathlib.Path("~/x"), dpo_stage=True, reference_dir="~/r")
    assert config.workdir == f"{home}/x/run" and config.reference_dir == f"{home}/r"
    data = dataclasses.replace(config.data, tokenizer="~/t", data_root="~", cache_dir="~/c")
    assert (data.tokenizer, data.data_root, data.cache_dir) == (f"{home}/t", home, f"{home}/c")
    with pytest.raises(validation.UsageError, match="no such home folder"):
        dataclasses.replace(config, base="~nobody-of-that-name/x")


def test_a_base_of_none_is_random_parameters():
    assert load("sft_7b.gin", "--gin.BASE=None").base is None
    gin.clear_config()
    assert load("dpo_7b.gin", "--gin.BASE=None").base is None


PYTHON_SAYS = re.compile(
    r"object has no attribute|not supported between|unsupported operand|object is not|0x[0-9a-f]{6}"
    r"|must be str|required positional|argument should be"
)


@pytest.mark.parametrize("name", ["tulu_tiny_sft", "tulu_tiny_dpo", "stories260k_sft", "sft_7b"])
def test_a_macro_of_another_type_is_refused_in_words(name, shared_data):
    """Every macro of a file, with what it cannot be."""
    overrides = [f'--gin.DATA_ROOT="{shared_data}"'] if "stories" in name else []
    load(f"{name}.gin", *overrides)
    for macro in gin_files._macros():
        for value in ("None", "-3", "1.5", "True", "'a b'", "['x']", "{'a': 1}", "''"):
            gin.clear_config()
            try:
                load(f"{name}.gin", *overrides, f"--gin.{macro}={value}")
                assert value not in ("-3", "True", "['x']", "{'a': 1}"), f"{macro}={value}"
            except validation.UsageError as error:
                assert not PYTHON_SAYS.search(str(error)), f"{macro}={value}: {error}"


# The run as a whole.


@pytest.fixture
def tokenizer(folder):
    return load("tulu_tiny_sft.gin").data.tokenizer


def test_preflight_lists_places_and_the_rest_together(tmp_path, tokenizer):
    (tmp_path / "file").write_text("")
    config = builders.train_config(tmp_path, tokenizer=tokenizer, num_steps=1)
    config = builders.replace(
        config,
        workdir=f"{tmp_path}/file",
        data__cache_dir=f"{tmp_path}/file/cache",
        checkpoint__best="eval/los",
    )
    found = "\n".join(preflight.to_train(config, 8))
    assert "workdir = " in found and "data.cache_dir = " in found
    assert "found 1 update, 1 of them warm-up" in found
    assert "checkpoint.best = 'eval/los' is no metric" in found and "'eval/loss'?" in found


def params_with(value):
    """Zeros, but for one `value` in layer 1 and one in a norm."""
    params = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype),
        llama.abstract_params(builders.MODEL, "float32"),
    )
    params["model"]["layers"]["mlp"]["up_proj"]["kernel"][1, 2, 3] = value
    params["model"]["norm"]["scale"][0] = value
    return params


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["hugging_face", "workdir"])
def test_a_base_that_is_not_finite_is_named(tmp_path, kind, value):
    params = params_with(value)
    if kind == "hugging_face":
        hf.save(
            tmp_path / "base",
            params,
            builders.MODEL,
            dtype="float32",
            generation_config={},
            write_tokenizer=None,
        )
        wanted = ("model.layers.1.mlp.up_proj.weight in model.safetensors", "model.norm.weight in")
    else:
        checkpoints = checkpoint.Checkpoints(
            str(tmp_path / "base"), checkpoint.CheckpointConfig(every=1)
        )
        model = {"model": dataclasses.asdict(builders.MODEL)}
        about = {
            "params": agreement.param_shapes(params), "weights": "w", "must_match": model,
        }  # fmt: skip
        checkpoints.save(1, TrainState(step=jnp.int32(1), params=params, opt_state={}), about, {})
        checkpoints.close()
        wanted = ("model/layers/mlp/up_proj/kernel (layers [1])", "model/norm/scale")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), params
    )
    with pytest.raises(validation.UsageError, match="weights that are not finite") as error:
        base.load(str(tmp_path / "base"), builders.MODEL, abstract)
    assert all(name in str(error.value) for name in wanted)
    assert "layers.0" not in str(error.value)


# Scores belong to the benchmark's data and to a step.


def test_only_runs_on_rows_of_tulu_tiny_are_scored(capsys, shared_data):
    said = refused(
        capsys,
        "evaluate",
        "--gin_file=stories260k_sft.gin",
        f'--gin.DATA_ROOT="{shared_data}"',
    )
    assert "this run trains on 'real_small_sft'" in said
    assert "expected a run on tulu_tiny or tulu_tiny_preference" in said
    data = builders.train_config(pathlib.Path("x")).data
    mixture = registry.Mixture(name="mine", tasks={"tulu_tiny": 100})
    for train in ("tulu_tiny", "tulu_tiny_preference", mixture):
        assert not list(benchmark.problems(dataclasses.replace(data, train=train)))


def test_scores_of_each_step_are_kept(tmp_path):
    reply = [{"prompt": "p", "answer": "a", "reply": "r"}]
    for step, share in ((20, 0.5), (None, 0.0), (3, float("nan"))):
        benchmark.save(str(tmp_path), step, {"exact_match": share}, reply)
    found = benchmark.saved(str(tmp_path))
    assert [scores["step"] for scores in found] == [None, 3, 20]
    assert [scores["scores"]["exact_match"] for scores in found] == [0.0, None, 0.5]
    (tmp_path / "tulu_tiny_step_3.json").write_text("{")
    with pytest.raises(validation.UsageError, match=r"step_3\.json is not JSON"):
        benchmark.saved(str(tmp_path))
