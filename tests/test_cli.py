"""What a user can get wrong on the command line is refused with what was found and expected."""

import dataclasses
import json
import pathlib

import commands
import gin
import pytest

from tulu_jax import cli, preflight
from tulu_jax.data import components, data_checks, examples
from tulu_jax.recipe import TrainConfig

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
COMPLETE = sorted(path.name for path in CONFIGS.glob("*.gin"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory whose trained tokenizer the tests of this file share."""
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(autouse=True)
def clean(monkeypatch, folder):
    monkeypatch.chdir(folder)
    yield
    gin.clear_config()


def write(tmp_path, text):
    path = tmp_path / "mine.gin"
    path.write_text(
        "from __gin__ import dynamic_registration\n"
        "from tulu_jax import recipe\n"
        "from tulu_jax.models import config\n"
        "from tulu_jax.training import optim\n"
        "include 'tulu_tiny_sft.gin'\n" + text
    )
    return str(path)


def refusal(name, *overrides):
    with pytest.raises(cli.UsageError) as error:
        cli.load(name, overrides, workdir=None)
    return str(error.value)


@pytest.mark.parametrize("name", COMPLETE)
def test_every_complete_config_builds(name, shared_data):
    overrides = [f'--gin.DATA_ROOT="{shared_data}"'] if "stories260k" in name else []
    config = cli.load(name, overrides, workdir=None)
    assert isinstance(config, TrainConfig)
    run = f"runs/{name.removesuffix('.gin')}"
    assert config.workdir in (run, f"gs://YOUR-BUCKET/tulu/{run}")


def test_overrides_and_workdir():
    config = cli.load("tulu_tiny_sft.gin", ["--gin.NUM_STEPS=7"], workdir="/somewhere/else")
    assert config.num_steps == 7 and config.workdir == "/somewhere/else"


MIXTURE = """
from tulu_jax.data import registry
MIXTURE = @registry.Mixture()
registry.Mixture.name = 'mine'
registry.Mixture.tasks = {'tulu_v2.lima': None, 'tulu_v2.science': 0.5, 'tulu_tiny': 2000}
registry.Mixture.seed = 7
"""


def test_a_mixture_written_in_gin(tmp_path):
    config = cli.load(write(tmp_path, MIXTURE), workdir="out/here")
    mixture = config.data.train
    assert (mixture.name, mixture.seed, mixture.tasks["tulu_v2.science"]) == ("mine", 7, 0.5)
    found = {c.task.name: c.amount for c in components.of(mixture)}
    assert found["tulu_v2.lima"] is None and found["tulu_tiny"] == 2000
    assert found["tulu_v2.science.scierc_ner"] == 0.5 and len(found) == 8
    saved = tmp_path / "config.gin"
    saved.write_text(cli.operative_config())
    assert cli.load(str(saved), workdir=None).data == config.data
    said = refusal(write(tmp_path, MIXTURE.replace("tulu_v2.lima", "tulu_v2.limo")))
    assert "no mixture or task is named 'tulu_v2.limo'; did you mean 'tulu_v2.lima'" in said
    said = refusal(write(tmp_path, MIXTURE.replace("0.5", "1.5")))
    assert "mine: 1.5 of 'tulu_v2.science'; expected None (all), a positive number of rows" in said


TASK = """
from tulu_jax.data import registry
from tulu_jax.data.sources import conversations
MIXTURE = @registry.Task()
registry.Task.name = 'mine'
registry.Task.sources = {'train': 'my.jsonl'}
"""


@pytest.fixture
def my_rows(folder):
    path = folder / "my.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}) + "\n")
    yield path
    path.unlink()


def test_a_task_of_own_rows_written_in_gin(tmp_path, my_rows):
    config = cli.load(write(tmp_path, TASK), workdir="out/here")
    assert (config.data.train.name, config.data.kind) == ("mine", "sft")
    assert config.data.train.licence == "not stated"
    saved = tmp_path / "config.gin"
    saved.write_text(cli.operative_config())
    assert cli.load(str(saved), workdir=None).data == config.data


def test_a_task_with_a_converter_written_in_gin(tmp_path, my_rows):
    my_rows.write_text(json.dumps({"conversations": ["q", "a"]}) + "\n")
    more = "registry.Task.convert = @conversations.lima\nregistry.Task.kind = 'sft'\n"
    data = cli.load(write(tmp_path, TASK + more), workdir=None).data
    task = dataclasses.replace(data.train, sources={"train": str(my_rows)})
    drawing = data.drawing(components.of(task)[0], "train")
    (example,) = examples.load_examples(task, drawing).examples
    assert [message["content"] for message in example["messages"]] == ["q", "a"]
    saved = tmp_path / "config.gin"
    saved.write_text(cli.operative_config())
    assert cli.load(str(saved), workdir=None).data == data
    said = refusal(write(tmp_path, TASK + more.split("\n")[0]))
    assert "mine: kind is missing; with a converter, expected one of ('sft', 'preference')" in said


def test_files_of_own_rows_by_macros(my_rows):
    overrides = [
        '--gin.MIXTURE="my.jsonl"',
        "--gin.HOLDOUT_EVERY=3",
        f'--gin.VALIDATION="{my_rows}"',
    ]
    data = cli.load("tulu_tiny_sft.gin", overrides, workdir=None).data
    assert (data.train, data.validation, data.holdout_every) == ("my.jsonl", str(my_rows), 3)
    absent = cli.load("tulu_tiny_sft.gin", ['--gin.MIXTURE="mine.jsonl"'], workdir=None).data
    (said,) = data_checks.problems(absent, kind="sft")  # whoever needs the rows says it
    assert "train: no mixture or task is named 'mine.jsonl'" in said
    assert "there is no such file: looked for " in said and "did you mean 'my.jsonl'?" in said


@pytest.mark.parametrize("text", [MIXTURE, TASK])
def test_a_mixture_on_the_command_line_stands_before_the_files(tmp_path, my_rows, text):
    for wanted in ("tulu_tiny", "my.jsonl"):
        config = cli.load(write(tmp_path, text), [f'--gin.MIXTURE="{wanted}"'], workdir=None)
        assert config.data.train == wanted
    cli.load(write(tmp_path, text), workdir="out/here")
    saved = tmp_path / "config.gin"
    saved.write_text(cli.operative_config())
    override = ['--gin.MIXTURE="tulu_tiny"']
    assert cli.load(str(saved), override, workdir=None).data.train == "tulu_tiny"


def test_what_an_override_replaces_is_not_missed_and_what_else_is_unread_is(tmp_path):
    text = MIXTURE.replace("2000", "%ROWS") + "ROWS = 2000\nFORGOTTEN = 3\n"
    override = '--gin.MIXTURE="tulu_tiny"'
    assert "1 problem in" in (said := refusal(write(tmp_path, text), override))
    assert "macro FORGOTTEN = 3 is set but nothing reads it" in said
    text = text.replace("FORGOTTEN = 3", "")
    assert cli.load(write(tmp_path, text), [override], workdir=None).data.train == "tulu_tiny"
    said = refusal(write(tmp_path, text), "--gin.ROWS=7", override)
    assert "macro ROWS = 7 is set but nothing reads it" in said


def test_operative_config_rebuilds_the_run(tmp_path):
    config = cli.load("tulu_tiny_sft.gin", ["--gin.LEARNING_RATE=1e-4"], workdir="out/here")
    text = cli.operative_config()
    (tmp_path / "config.gin").write_text(text)
    again = cli.load(str(tmp_path / "config.gin"), workdir=None)
    assert again == config
    assert cli.operative_config() == text


SAVED = pathlib.Path(__file__).with_name("saved_config.gin")  # of before runs named a slice


def test_a_config_saved_before_slices_rebuilds_its_run():
    config = cli.load(str(SAVED), workdir=None)
    overrides = ["--gin.NUM_STEPS=4"]
    assert config == cli.load("tulu_tiny_sft.gin", overrides, workdir="runs/x")
    said = refusal(str(SAVED), "--gin.SLICE='v5p_512'")
    assert "--gin.SLICE: no such macro, for --pod to set; a config that was saved" in said


UNDER = """
BUCKET = 'gs://b'
base/recipe.under.root = %BUCKET
base/recipe.under.path = %BASE
recipe.TrainConfig.base = @base/recipe.under()
include 'pods/v5p_64_7b_sft.gin'
"""


def test_what_files_of_before_had_is_refused_with_what_to_write_instead(tmp_path):
    said = refusal(write(tmp_path, UNDER))
    assert "mine.gin, line 8" in said and "'include" not in said
    assert "paths lie below recipe.TrainConfig.bucket and loader.DataConfig.bucket now" in said
    assert "include 'pods/v5p_64_7b_sft.gin' was not found; slices are a table now" in said


@pytest.mark.parametrize("name", ["sft_70b.gin", "dpo_70b.gin", "tulu_tiny_sft.gin"])
def test_a_run_is_printed_on_one_screen(name, capsys):
    command = (f"--gin_file={name}", "--pod=any", "--print_config", "--workdir=w")
    assert commands.run("train", *command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 100
    text = " ".join(" ".join(lines).split())
    config = cli.load(name, workdir="w", pod="any")
    for part in (config, *(getattr(config, name) for name in ("model", "data", "mesh"))):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            assert dataclasses.is_dataclass(value) or f"{field.name}={value!r}" in text
    assert " *num_" in text and " param_dtype='float32'" in text and "*param_dtype" not in text
    assert " on 8: " in text


def test_the_mesh_of_a_slice_is_printed(capsys):
    assert commands.run("train", "--gin_file=dpo_70b.gin", "--pod=v6e_256", "--print_config") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "*topology='v6e:16x16' (on 256: context 32 x tensor 8)" in text


def test_misspelt_file_names_the_nearest():
    message = refusal("tulu_tiny_stf.gin")
    assert "did you mean 'tulu_tiny_sft.gin'?" in message and "tulu_tiny_dpo.gin" in message


def test_missing_file_flag_lists_the_files():
    assert "tulu_tiny_sft.gin" in refusal(None)


def test_misspelt_macro():
    message = refusal("tulu_tiny_sft.gin", "--gin.NUM_STEPZ=3")
    assert "--gin.NUM_STEPZ: no such macro; did you mean 'NUM_STEPS'?" in message


def test_string_without_inner_quotes():
    message = refusal("tulu_tiny_sft.gin", "--gin.MIXTURE=tulu_tiny")
    assert "a string needs inner quotes: '--gin.MIXTURE=\"tulu_tiny\"'" in message


def test_misspelt_field_names_line_and_nearest(tmp_path):
    message = refusal(write(tmp_path, "recipe.TrainConfig.batch_sise = 3\n"))
    assert "batch_sise" in message and "did you mean 'batch_size'?" in message
    assert "mine.gin, line 6" in message


def test_missing_include_and_misspelt_field_in_an_included_file(tmp_path):
    (tmp_path / "models").mkdir()  # gin would take this folder for a package
    (tmp_path / "inner.gin").write_text("recipe.TrainConfig.sead = 1\n")
    message = refusal(write(tmp_path, "include 'inner.gin'\ninclude 'recipes/stf.gin'\n"))
    assert "inner.gin, line 1" in message and "did you mean 'seed'?" in message
    assert "mine.gin, line 7: include 'recipes/stf.gin' was not found" in message
    assert "did you mean 'recipes/sft.gin'?" in message


def test_values_nothing_reads(tmp_path):
    message = refusal(write(tmp_path, "FORGOTTEN = 3\nconfig.named.name = 'llama2_7b'\n"))
    assert "macro FORGOTTEN = 3 is set but nothing reads it" in message
    assert "config.named.name = 'llama2_7b' is set but nothing reads it" in message


def test_unknown_macro_and_missing_value(tmp_path):
    message = refusal(write(tmp_path, "recipe.TrainConfig.seed = %NOWHERE\n"))
    assert "NOWHERE" in message


def test_all_problems_of_a_config_are_listed_at_once(tmp_path):
    path = write(
        tmp_path,
        "optim.OptimizerConfig.b2 = 1.5\n"
        "config.ExecutionConfig.attention = 'blokwise'\n"
        "recipe.TrainConfig.param_dtype = 'float16'\n"
        "optim.OptimizerConfig.epsilon = 1e-8\n",
    )
    message = refusal(path, "--gin.BATCHSIZE=3")
    for part in (
        "5 problems",
        "b2 = 1.5: not in [0, 1)",
        "did you mean 'blockwise'?",
        "param_dtype = 'float16': expected one of ['bfloat16', 'float32']",
        "epsilon",
        "did you mean 'BATCH_SIZE'?",
    ):
        assert part in message


def test_paper_norm_needs_unpacked_rows(tmp_path):
    path = write(tmp_path, "")
    with open(path, "a") as file:
        file.write(
            "from tulu_jax.objectives import sft\nsft.SFTConfig.loss_norm = 'paper'\n"
            "sft.SFTConfig.loss_norm_rows = 5\n"
        )
    message = refusal(path)
    assert "set packing = 'none'" in message and "not a multiple" in message


def problems(overrides=(), devices=8, name="tulu_tiny_sft.gin"):
    config = cli.load(name, overrides, workdir=None)
    return "\n".join(preflight.to_train(config, devices))


def test_preflight_finds_nothing_wrong_with_the_default():
    assert problems(devices=1) == ""


def test_preflight_lists_what_is_wrong_with_the_whole(tmp_path):
    path = write(
        tmp_path,
        "from tulu_jax.parallel import mesh\n"
        "mesh.MeshConfig.fsdp = 2\nmesh.MeshConfig.tensor = 4\n"
        "config.LlamaConfig.vocab_size = 300\n",
    )
    found = problems(["--gin.BATCH_SIZE=7", '--gin.BASE="nowhere/at/all"'], name=path)
    for part in (
        "micro_batch_size = 7 rows cannot be divided over data x fsdp = 2",
        "kv_heads of size 3",
        "mesh axes tensor = 4",
        "has 512 ids; the model's vocabulary has 300",
        "base = 'nowhere/at/all': it does not exist",
    ):
        assert part in found


def test_preflight_mesh_that_does_not_fill_the_devices(tmp_path):
    path = write(tmp_path, "from tulu_jax.parallel import mesh\nmesh.MeshConfig.fsdp = 3\n")
    assert "does not fill 8 devices" in problems(name=path)


def test_preflight_data_and_objective_of_different_kinds():
    found = problems(name="tulu_tiny_dpo.gin")
    assert "neither" in found or "does not exist" in found  # no SFT run here yet
    config = cli.load("tulu_tiny_sft.gin", workdir=None)
    import builders

    wrong = builders.replace(config, data__packing="none", data__train="tulu_tiny_preference")
    assert any("preference" in line for line in preflight.to_train(wrong, 1))


def test_preflight_disk_space(monkeypatch):
    import collections
    import shutil

    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**6, 10**6))
    assert "0.0 GB free" in problems(devices=1)


def test_preflight_asks_no_space_for_checkpoints_that_are_there(tmp_path, monkeypatch):
    import shutil

    import builders
    import jax.numpy as jnp

    from tulu_jax.training import checkpoint
    from tulu_jax.training.state import TrainState

    config = builders.replace(builders.train_config(tmp_path), checkpoint__keep=2)
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1, 1))

    def asked():
        return [line.split("; ")[1][:20] for line in preflight._disk(config)]

    assert asked() == ["3 more checkpoints o"]
    checkpoints = checkpoint.Checkpoints(config.workdir, config.checkpoint)
    state = TrainState(step=jnp.int32(1), params={"a": jnp.zeros(1)}, opt_state={})
    for step, left in ((1, "2"), (2, "1"), (3, "1")):
        checkpoints.save(step, state, {}, {})
        checkpoints.wait()
        assert asked() == [f"{left} more checkpoints o"]
    checkpoints.save(config.num_steps, state, {}, {})
    checkpoints.close()
    assert asked() == []  # the run is at its end
