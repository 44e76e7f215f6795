"""A gin file runs no code that nobody trusts, and one that is no gin file is refused at once."""

import sys
import time

import gin
import pytest

from tulu_jax import cli

START = "from __gin__ import dynamic_registration\nfrom tulu_jax import recipe\n"
END = "include 'tulu_tiny_sft.gin'\n"
EVIL = "import pathlib\npathlib.Path(__file__).with_name('ran').write_text('')\ndef run(): pass\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working directory with the tokenizer that tulu_tiny trains, which takes seconds."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        cli.load("tulu_tiny_sft.gin", workdir=None)
    return home


@pytest.fixture(autouse=True)
def folder(tmp_path, home, monkeypatch):
    """A folder with modules and a package that leave a trace once they are run."""
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil.py").write_text(EVIL)
    (tmp_path / "evil_package").mkdir()
    for name in ("__init__", "inner"):
        (tmp_path / "evil_package" / f"{name}.py").write_text(EVIL)
    yield tmp_path
    gin.clear_config()
    for name in [name for name in sys.modules if name.startswith("evil")]:
        del sys.modules[name]


def load(folder, text, *allowed):
    (folder / "mine.gin").write_text(text)
    return cli.load(str(folder / "mine.gin"), workdir="run", allow_import=allowed)


def refusal(folder, text, *allowed):
    started = time.perf_counter()
    with pytest.raises(cli.UsageError) as error:
        load(folder, text, *allowed)
    assert time.perf_counter() - started < 1.0
    return str(error.value)


def ran(folder):
    return [*folder.rglob("ran")]


@pytest.mark.parametrize(
    ("statement", "module"),
    [
        ("import evil", "evil"),
        ("import evil as recipe", "evil"),
        ("  import evil", "evil"),
        ("import \\\n  evil", "evil"),
        ("import evil_package.inner", "evil_package"),
        ("from evil_package import inner", "evil_package"),
        ("from evil_package import inner as tulu_jax", "evil_package"),
        ("import tulu_jax_evil", "tulu_jax_evil"),
        ("import os.path", "os"),
        ("A = [\n1,\n]; import evil", None),
        ("NUM_STEPS = = 3\nimport evil", "evil"),
        ("import evil\nNUM_STEPS = = 3", "evil"),
    ],
)
def test_an_import_that_is_not_allowed_is_refused_before_it_runs(folder, statement, module):
    for text in (START + statement + "\n" + END, statement + "\n" + START + END):
        said = refusal(folder, text)
        assert module is None or f"give --allow_import={module}" in said, said
    assert not ran(folder)


@pytest.mark.parametrize(
    "include", ["include 'other.gin'", "  include 'other.gin'", "include 'ot' 'her.gin'"]
)
def test_an_import_of_an_included_file_is_refused(folder, include):
    (folder / "other.gin").write_text("import evil\n")
    said = refusal(folder, START + include + "\n" + END)
    assert "other.gin, line 1: evil is no part of a config" in said or "line of its own" in said
    assert not ran(folder)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("cli.os.system", "os"),
        ("cli.distributed.socket.create_server", "socket"),
        ("cli.TrainConfig.__init__.__globals__.update", "builtins"),
        ("cli.run", "tulu_jax.cli"),
    ],
)
@pytest.mark.parametrize("form", ["MIXTURE = @{}()", "MIXTURE = [@a/{}]", "{}.command = 'x'"])
def test_a_name_leads_to_no_code_but_ours(folder, name, module, form):
    said = refusal(folder, f"{START}from tulu_jax import cli\n{END}{form.format(name)}\n")
    assert f"{name} leads out: {module} is no part of a config" in said


def test_what_is_allowed_is_imported_and_nothing_beside_it(folder):
    assert load(folder, f"{START}import evil\n{END}", "evil").workdir == "run"
    assert ran(folder) == [folder / "ran"]
    assert load(folder, f"{START}from evil_package import inner\n{END}", "evil_package").num_steps
    saved = cli.operative_config()
    assert load(folder, saved, "evil_package.inner").num_steps
    assert "give --allow_import=evil_package" in refusal(folder, saved)
    assert "give --allow_import=evil_package" in refusal(
        folder, saved, "evil", "evil_package.other"
    )
    assert "--allow_import=a-b: expected the name of a module" in refusal(folder, saved, "a-b")


def test_a_file_that_includes_itself(folder):
    (folder / "a.gin").write_text("include 'b.gin'\n")
    (folder / "b.gin").write_text("\ninclude 'a.gin'\n")
    said = refusal(folder, "include 'mine.gin'\n")
    assert said == (
        "mine.gin: mine.gin, line 1: a file includes itself (mine.gin -> mine.gin); remove this "
        "include"
    )
    assert "b.gin, line 2: a file includes itself (mine.gin -> a.gin -> b.gin -> a.gin)" in (
        refusal(folder, "include 'a.gin'\n")
    )


def test_a_file_that_is_no_gin_file(folder):
    started = time.perf_counter()
    (folder / "binary.gin").write_bytes(bytes(range(256)) * 100)
    (folder / "zeros.gin").write_bytes(bytes(1000))
    with (folder / "huge.gin").open("wb") as file:
        file.truncate(1 << 40)
    for name, said in (("binary", "no text"), ("zeros", "no text"), ("huge", "more than 65,536")):
        with pytest.raises(cli.UsageError, match=said) as error:
            cli.load(str(folder / f"{name}.gin"), workdir=None)
        assert "\n" not in str(error.value)
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("LEARNING_RATE = 1e999", "OptimizerConfig.learning_rate = inf: expected a finite number"),
        ("LEARNING_RATE = 1e39", "OptimizerConfig.learning_rate = 1e+39: expected a finite number"),
        ("MAX_LENGTH = 1099511627776", "DataConfig.max_length = 1099511627776: expected at most"),
        ("MAX_LENGTH = 100000000", "max_length = 100000000: expected at most 16,777,216"),
        ("BATCH_SIZE = 1000000000000", "TrainConfig.batch_size = 1000000000000: expected at most"),
        ("BATCH_SIZE = 1000000000", "rows of max_length = 256: expected at most 2,147,483,647 pos"),
        ("NUM_STEPS = 1" + "0" * 400, "expected at most 2,147,483,647"),
        ("NUM_STEPS = 1" + "0" * 5000, "4300 digits"),
        ("loader.DataConfig.workers = 1000000", "workers = 1000000: expected at most 1,024"),
        ("config.LlamaConfig.num_layers = 10000000", "num_layers = 10000000: expected at most 1,0"),
        ("config.LlamaConfig.vocab_size = 1099511627776", "LlamaConfig.vocab_size = 109951162777"),
        ("config.LlamaConfig.embed_dim = 10000000", "embed_dim = 10000000: expected at most 65,5"),
        ("config.LlamaConfig.num_heads = 10000000", "num_heads = 10000000: expected at most 1,02"),
        ("config.LlamaConfig.max_positions = 1099511627776", "max_positions = 1099511627776: exp"),
        ("mesh.MeshConfig.fsdp = 1099511627776", "MeshConfig.fsdp = 1099511627776: expected at m"),
    ],
)
def test_absurd_numbers(folder, setting, said):
    imports = "from tulu_jax.data import loader\nfrom tulu_jax.models import config\n"
    text = f"{START}{imports}from tulu_jax.parallel import mesh\n{END}{setting}\n"
    assert said in refusal(folder, text)


def test_a_file_that_would_take_long(folder):
    (folder / "f0.gin").write_text("")
    for i in range(40):  # each includes the one before twice: a thousand billion of the first
        (folder / f"f{i + 1}.gin").write_text(f"include 'f{i}.gin'\n" * 2)
    assert "or 100 includes by" in refusal(folder, "include 'f40.gin'\n")
    assert "mine.gin, line 1: " in refusal(folder, "x y\n" * 15_000)
    assert refusal(folder, "A = " + "[" * 100_000)
