"""The published runs: each complete file, on each slice it is sized for, has the paper's values."""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import gin
import pytest

from tulu_jax import cli, preflight
from tulu_jax.models import config as model_config
from tulu_jax.models import lora
from tulu_jax.objectives import dpo, ppo, reward, sft
from tulu_jax.parallel import mesh, slices
from tulu_jax.planning.cycles import schedule
from tulu_jax.quant import nf4
from tulu_jax.training import optim

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
TOKENIZER = "--gin.TOKENIZER='unused'"  # else the embedded default trains its own
RUNS = sorted(path.stem for path in CONFIGS.glob("*.gin") if "\nSLICE = " in path.read_text())
ADAPTERS = [run for run in RUNS if "lora" in run]
WHOLE = [run for run in RUNS if "lora" not in run]
REWARD = [run for run in RUNS if run.startswith("rm_")]
PPO = [run for run in RUNS if run.startswith("ppo_")]
ADAPTED_PPO = [run for run in RUNS if run.startswith("qlora_ppo_")]

# Facts of the data: rows and mean tokens (arXiv 2311.10702 §2), pairs, and pairs in a packed row
# of 8,192 as benchmarks/dpo_packing.py measures them.
V2_ROWS, V2_MEAN, PAIRS, PAIRS_A_ROW = 326_154, 1_097, 61_966, 10.6
CLEANED = 60_917  # pairs of UltraFeedback as Argilla cleaned them


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    yield
    gin.clear_config()


def load(run, *overrides, pod=None):
    return cli.load(f"{run}.gin", overrides, workdir=None, pod=pod)


def slices_of(run):
    """The slices that the run can take, but for those of the benchmarks."""
    return [name for name in slices.known(**laid_out(run)) if not name.endswith("_wide")]


def laid_out(run):
    """The stage and the size that a run's layouts are found by."""
    *kind, size = run.split("_")
    adapter = f"{kind[0]}_" if "lora" in kind[0] else ""
    return {"stage": adapter + ("dpo" if {"dpo", "rm"} & {*kind} else "sft"), "size": size}


def test_the_published_runs_are_there():
    sft_runs = ["sft_7b", "sft_13b", "sft_70b", "sft_code_7b", "sft_code_13b", "sft_code_34b"]
    ablations = ["sft_v1_7b", "sft_v1_13b", "sft_v1_70b", "sft_sharegpt_7b"]
    sizes = ("7b", "13b", "70b")
    assert set(REWARD) == {f"rm_ultrafeedback_{size}" for size in sizes}
    assert set(WHOLE) == {*sft_runs, "dpo_7b", "dpo_13b", "dpo_70b", *ablations, *REWARD, *PPO}
    assert set(PPO) == {f"ppo_{size}" for size in sizes}
    of_sft = {f"{kind}_{size}" for kind in ("lora", "qlora") for size in sizes}
    assert set(ADAPTERS) == of_sft | {"qlora_dpo_7b", "qlora_dpo_70b", "qlora_ppo_7b"}


@pytest.mark.parametrize("run", ADAPTED_PPO)
def test_recipe_values_of_ppo_with_adapters(run):
    """Ours, as the file says: prompts and iterations of the whole one, the paper's QLoRA without
    dropout."""
    config, whole = load(run), load(run.removeprefix("qlora_"))
    assert "ours, not the paper's" in (CONFIGS / f"{run}.gin").read_text()
    for name in ("model", "base", "data", "batch_size", "num_epochs"):
        assert getattr(config, name) == getattr(whole, name), name
    slots = {"slots": config.objective.slots}
    assert config.objective == dataclasses.replace(whole.objective, **slots)
    assert config.adapter == lora.LoRAConfig(rank=64, alpha=16.0, dropout=0.0, targets="all")
    assert config.quant == nf4.QuantConfig() and config.param_dtype == "bfloat16"


@pytest.mark.parametrize("run", [run for run in ADAPTERS if run not in ADAPTED_PPO])
def test_recipe_values_of_adapters(run):
    """arXiv 2311.10702, appendix B: QLoRA. DPO's are ours, as the file says."""
    config, (kind, *_, size) = load(run), run.split("_")
    assert config.model == model_config.named(f"llama2_{size}")
    assert config.adapter == lora.LoRAConfig(rank=64, alpha=16.0, dropout=0.1, targets="all")
    assert config.quant == (nf4.QuantConfig() if kind == "qlora" else None)
    assert (config.execution.compute_dtype, config.param_dtype) == ("bfloat16", "bfloat16")
    optimizer = config.optimizer
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay) == (0.9, 0.999, 0.0)
    assert optimizer.clip_norm >= 1e30 and config.data.max_length == 4096
    if "dpo" in run:
        assert "ours, not the paper's" in (CONFIGS / f"{run}.gin").read_text()
        assert isinstance(config.objective, dpo.DPOConfig) and config.data.train == "tulu_2_dpo"
        assert config.base == f"gs://YOUR-BUCKET/tulu/runs/sft_{size}"
    else:
        assert config.data.train == "tulu_v2_sft" and config.base == config.data.tokenizer
        assert (config.num_epochs, optimizer.warmup_ratio) == (5.0, 0.03)
        assert optimizer.learning_rate == 1e-4


@pytest.mark.parametrize("run", REWARD)
def test_recipe_values_of_reward_models(run):
    """Tülu 2.5 (Ivison et al. 2024), appendix F.1, and its trainer's defaults. Model, workdir, base
    and slice are as of DPO."""
    config, size = load(run), run.split("_")[-1]
    dpo_run = load(f"dpo_{size}")
    for name in ("model", "base", "mesh", "execution", "param_dtype"):
        assert getattr(config, name) == getattr(dpo_run, name), name
    assert config.objective == reward.RewardConfig(margin=0.0)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.end_learning_rate) == (1e-5, 1e-6)
    assert (optimizer.b1, optimizer.b2, optimizer.clip_norm) == (0.9, 0.95, 1.0)
    assert (optimizer.weight_decay, optimizer.warmup_ratio, config.num_epochs) == (0.0, 0.03, 1.0)
    data = config.data
    assert (data.max_length, data.packing, data.truncation) == (4096, "best_fit", "drop")
    assert data.to_ends and data.train == "ultrafeedback_argilla_cleaned"
    assert config.batch_size * PAIRS_A_ROW / 2 == pytest.approx(512, rel=0.01)


@pytest.mark.parametrize("run", PPO)
def test_recipe_values_of_ppo(run):
    """Tülu 2.5's scripts, `ppo_13b_tpu.sh` and `ppo_70b_tpu.sh`. Model, workdir, base and tokenizer
    are as of DPO, the reward model is that of the same size."""
    config, size = load(run), run.split("_")[-1]
    dpo_run, reward_run = load(f"dpo_{size}"), load(f"rm_ultrafeedback_{size}")
    for name in ("model", "base", "param_dtype"):
        assert getattr(config, name) == getattr(dpo_run, name), name
    assert config.data.tokenizer == dpo_run.data.tokenizer
    objective, optimizer, data = config.objective, config.optimizer, config.data
    assert objective.reward_from == reward_run.workdir and data.train == reward_run.data.train
    rows = (32, 32) if size == "70b" else (512, 64)
    assert (objective.prompts, config.batch_size) == rows
    assert objective == ppo.PPOConfig(
        reward_from=reward_run.workdir, prompts=rows[0], slots=objective.slots
    )
    assert (objective.kl_coef, objective.temperature, objective.ppo_epochs) == (0.05, 0.7, 1)
    assert (objective.gamma, objective.lam, objective.clip) == (1.0, 0.95, 0.2)
    assert (objective.value_clip, objective.value_coef) == (0.2, 0.1)
    assert (objective.response_length, data.max_length - objective.response_length) == (1024, 1024)
    assert optimizer.learning_rate == optimizer.end_learning_rate == 1e-6
    assert optimizer.warmup_ratio == (0.0125 if size == "70b" else 0.1)
    assert (optimizer.b1, optimizer.b2, optimizer.clip_norm) == (0.9, 0.95, 1.0)
    assert (config.num_epochs, data.packing, data.truncation) == (1.0, "none", "cut")


@pytest.mark.parametrize("run", sorted({*WHOLE} - {*REWARD, *PPO}))
def test_recipe_values(run):
    config = load(run)
    stage, *kind, size = run.split("_")
    family = "codellama" if kind == ["code"] else "llama2"
    assert config.model == model_config.named(f"{family}_{size}")
    assert (config.data.max_length, config.data.packing) == (8192, "best_fit")
    assert config.workdir == f"gs://YOUR-BUCKET/tulu/runs/{run}"
    folder = "CodeLlama" if kind == ["code"] else "Llama-2"
    assert config.data.tokenizer == f"gs://YOUR-BUCKET/tulu/models/{folder}-{size}-hf"
    optimizer = config.optimizer
    assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.95, 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0.0, 1.0)
    assert (config.execution.compute_dtype, config.param_dtype) == ("bfloat16", "float32")
    if stage == "sft":
        assert isinstance(config.objective, sft.SFTConfig)
        assert config.base == config.data.tokenizer
        assert optimizer.learning_rate == (1e-5 if size == "70b" else 2e-5)
        assert (config.num_epochs, optimizer.warmup_ratio) == (2.0, 0.03)
        mixture = {"v1": "tulu_v1_sft", "sharegpt": "sharegpt_only"}
        assert config.data.train == mixture.get("".join(kind), "tulu_v2_sft")
    else:
        assert isinstance(config.objective, dpo.DPOConfig)
        assert config.base == f"gs://YOUR-BUCKET/tulu/runs/sft_{size}"
        assert (config.objective.loss, config.objective.beta) == ("sigmoid", 0.1)
        assert optimizer.learning_rate == 5e-7
        assert (config.num_epochs, optimizer.warmup_ratio) == (3.0, 0.1)
        assert config.data.train == "tulu_2_dpo"


@pytest.mark.parametrize("run", RUNS)
def test_every_slice_divides_and_is_filled(run):
    """Each generation at least, and the paper's own slice among them; of adapters, few chips."""
    names = slices_of(run)
    if run in WHOLE:
        assert {name.split("_")[0] for name in names} == {"v3", "v4", "v5e", "v5p", "v6e"}
        assert "v3_256" in names and (not run.endswith("70b") or "v3_512" in names)
    else:
        assert "v5e_8" in names or "v6e_8" in names
    for name in names:
        config = load(run, pod=name)
        devices = mesh.slice_devices(config.mesh.topology)
        assert list(preflight.mesh_problems(config, devices)) == []
        generation, cores_or_chips = name.split("_")
        cores_a_device = 2 if generation in ("v4", "v5p") else 1
        assert devices == int(cores_or_chips) // cores_a_device


def test_every_layout_serves_a_run():
    """But for those of the benchmarks: one that no run takes is one that nobody has compiled."""
    used = {
        id(slices.SLICES[name].layout(**laid_out(run))) for run in RUNS for name in slices_of(run)
    }
    for name, slice_ in slices.SLICES.items():
        if not name.endswith("_wide"):
            assert {id(layout) for layout in slice_.layouts.values() if layout} <= used, name


@pytest.mark.parametrize(
    "run, devices, axes",
    [
        ("sft_7b", 8, dict(tensor=8)),
        ("sft_7b", 64, dict(context=2, tensor=32)),
        ("sft_13b", 32, dict(context=4, tensor=8)),
        ("sft_70b", 8, dict(tensor=8)),
        ("sft_70b", 16, dict(tensor=8, group=2)),
        ("sft_70b", 256, dict(context=4, tensor=8, group=8)),
        ("sft_70b", 4, dict(tensor=4)),
    ],
)
def test_where_a_decoder_has_its_weights(run, devices, axes):
    """A key/value head for each device along `tensor`; its query heads go to those along `group`,
    as far as heads, MLP and vocabulary divide."""
    laid = slices.resident(devices, load(run).axis_sizes)
    assert {name: n for name, n in laid.sizes(devices).items() if n > 1} == axes


def updates(config, rows_per_epoch):
    number = config.num_updates(rows_per_epoch)
    return number, optim.num_warmup(config.optimizer, number)


def test_updates_at_the_papers_own_batch():
    """Epochs x whole batches of an epoch, as EasyLM's `llama_train.py` counts: 5,096, with 153 of
    warm-up. For pairs 5,808 and 581 there, where the 14 pairs that do not fill a batch are dropped
    each epoch: ours go into the next one and make one update more."""
    config = load("sft_7b", "--gin.BATCH_SIZE=128")
    assert updates(config, V2_ROWS) == (5_096, 153)
    config = load("dpo_7b", "--gin.BATCH_SIZE=32")
    assert updates(config, PAIRS) == (5_809, 581)
    one_epoch = dataclasses.replace(config, num_epochs=1.0)
    assert 3 * one_epoch.num_updates(PAIRS) == 5_808


@pytest.mark.parametrize(
    "run", [run for run in RUNS if not re.search("v1|share|qlora_dpo|ppo", run)]
)
def test_a_file_states_what_its_packed_batch_holds(run):
    """The comment of a complete file against the facts of the data."""
    config, text = load(run), (CONFIGS / f"{run}.gin").read_text()
    stated = re.search(
        r"(\d+) rows hold ([\d.]+) (?:conversations|pairs) on average [^;]*;[\s#]*([\d,]+) updates",
        text,
    )
    rows, examples, number = (float(x.replace(",", "")) for x in stated.groups())
    total, a_row = V2_ROWS, config.data.max_length / V2_MEAN
    if run.startswith("dpo"):
        total, a_row = PAIRS, PAIRS_A_ROW
    if run in REWARD:  # rows of half the length; every hundredth row is held out
        total, a_row = CLEANED * 0.99, PAIRS_A_ROW / 2
    assert config.batch_size == rows
    assert examples == pytest.approx(rows * a_row, abs=0.05)
    assert number == pytest.approx(config.num_updates(math.ceil(total / a_row)), abs=1)


def test_slices_that_are_not_there():
    with pytest.raises(cli.UsageError) as error:
        load("dpo_70b", pod="v5p_51")
    assert "slice = 'v5p_51' is not known; did you mean 'v5p_512'?" in str(error.value)
    assert "slices for 70b dpo are ['any', 'v3_256', 'v3_512', 'v4_512'" in str(error.value)
    with pytest.raises(cli.UsageError, match="slice = 'v5p_64' has no layout for 70b sft; slices"):
        load("sft_70b", pod="v5p_64")
    with pytest.raises(cli.UsageError, match=r"no layout for a model of 1,.*\['any'\]"):
        load("tulu_tiny_sft", TOKENIZER, pod="v5p_512")


def test_a_slice_gives_way_to_what_a_file_sets(tmp_path):
    mine = tmp_path / "mine.gin"
    text = (
        "from __gin__ import dynamic_registration\nfrom tulu_jax import recipe\n"
        "from tulu_jax.models import config\nfrom tulu_jax.parallel import mesh\n"
        "include 'sft_7b.gin'\nrecipe.TrainConfig.micro_batch_size = 4\n"
        "config.ExecutionConfig.remat_policy = 'save_gate'\n"
    )
    mine.write_text(text)
    config = cli.load(str(mine), workdir=None)
    assert (config.micro_batch_size, config.execution.remat_policy) == (4, "save_gate")
    assert config.mesh == load("sft_7b").mesh
    mine.write_text(text + "mesh.MeshConfig.fsdp = 4\nmesh.MeshConfig.tensor = 8\n")
    with pytest.raises(cli.UsageError, match=r"slice = 'v5p_64' and mesh\.MeshConfig .*'fsdp': 4"):
        cli.load(str(mine), workdir=None)
    mine.write_text(mine.read_text() + "SLICE = 'any'\n")
    config = cli.load(str(mine), workdir=None)
    assert config.mesh == config.mesh_on(32) == mesh.MeshConfig(fsdp=4, tensor=8)
    with pytest.raises(cli.UsageError, match=r"slice = 'v6e_64' and mesh\.MeshConfig has"):
        cli.load(str(mine), workdir=None, pod="v6e_64")


@pytest.mark.parametrize(
    "run", [*RUNS, "tulu_tiny_sft", "tulu_tiny_dpo", "tulu_tiny_rm", "tulu_tiny_ppo"]
)
def test_any_is_whatever_devices_there_are(run):
    config = load(run, *([TOKENIZER] if "tiny" in run else []), pod="any")
    for devices in (1, 2, 4, 8, 32, 256):
        assert math.prod(config.mesh_on(devices).sizes(devices).values()) == devices
        assert list(preflight.mesh_problems(config, devices)) == []
    (said,) = preflight.mesh_problems(config, 23)
    assert "23 devices divide no mesh over {'batch': " in said
    assert "expected one of [1, 2, " in said


def test_any_divides_rows_first_then_heads_then_the_sequence():
    assert load("sft_70b", pod="any").mesh_on(256) == mesh.MeshConfig(fsdp=16, context=2, tensor=8)
    assert load("dpo_70b", pod="any").mesh_on(512) == mesh.MeshConfig(fsdp=1, context=64, tensor=8)
    assert load("tulu_tiny_sft", TOKENIZER).mesh_on(8) == mesh.MeshConfig(fsdp=4, context=2)


@pytest.mark.parametrize(
    "run, override, message",
    [
        ("sft_70b", "BATCH_SIZE=6", "a multiple of 16, or data x fsdp of which 1 or 2 would"),
        ("dpo_70b", "MAX_LENGTH=6000", "context x tensor = 256; 1, 2, 4, 8 or 16 would"),
    ],
)
def test_what_does_not_divide_and_what_would(run, override, message):
    config = load(run, f"--gin.{override}", pod="v5p_512")
    devices = mesh.slice_devices(config.mesh.topology)
    assert message in "\n".join(preflight.mesh_problems(config, devices))


def test_heads_that_do_not_divide():
    config = load("sft_70b")
    wide = mesh.MeshConfig(fsdp=4, context=4, tensor=16)
    found = list(preflight.mesh_problems(dataclasses.replace(config, mesh=wide), 256))
    assert len(found) == 1
    assert "kv_heads of size 8" in found[0] and "tensor = 16; 1, 2, 4 or 8 would" in found[0]


def test_a_mesh_that_does_not_fill_its_topology():
    with pytest.raises(ValueError, match=r"\(it is meant for v5p:4x8x8\) does not fill 256"):
        mesh.MeshConfig(fsdp=4, tensor=8, topology="v5p:4x8x8")
    with pytest.raises(ValueError, match="expected generation:chips"):
        mesh.MeshConfig(topology="v5p-512")


def test_a_bucket_that_nobody_named():
    found = "\n".join(preflight.to_train(load("sft_7b"), 32))
    assert "is in no bucket yet; name yours: '--gin.BUCKET=" in found and "1. " not in found


def test_workdir_and_bucket():
    config = load("dpo_70b", '--gin.BUCKET="gs://mine/x/"', '--gin.BASE="/local/sft"')
    assert (config.workdir, config.base) == ("gs://mine/x/runs/dpo_70b", "/local/sft")
    config = cli.load("dpo_70b.gin", workdir="here")
    assert config.workdir == "here"


def test_a_tokenizer_of_ones_own(shared_data):
    """Whole, or below the root that the file's other paths are below."""
    roots = {
        "sft_7b": ("BUCKET", "gs://b/x"),
        "dpo_7b": ("BUCKET", "gs://b/x"),
        "stories260k_dpo": ("DATA_ROOT", str(shared_data)),
    }
    for run, (macro, root) in roots.items():
        for path, found in (("/mine/tok", "/mine/tok"), ("mine/tok", f"{root}/mine/tok")):
            config = load(run, f'--gin.{macro}="{root}"', f'--gin.TOKENIZER="{path}"')
            assert config.data.tokenizer == found


def test_weights_tokenizer_rows_and_cache_need_not_lie_under_one_root():
    places = {"BASE": "gs://a/base", "TOKENIZER": "/tok", "DATA_ROOT": "gs://d", "CACHE": "./here"}
    overrides = [f"--gin.{macro}={path!r}" for macro, path in places.items()]
    config = load("sft_7b", *overrides, "--gin.BUCKET='gs://b'")
    data = config.data
    assert (config.base, config.workdir) == ("gs://a/base", "gs://b/runs/sft_7b")
    assert (data.tokenizer, data.data_root, data.cache_dir) == ("/tok", "gs://d", "here")
    config = cli.load("sft_7b.gin", ["--gin.BUCKET='gs://b'"], workdir="mine")
    assert (config.workdir, config.base) == ("mine", "gs://b/models/Llama-2-7b-hf")
    assert dataclasses.replace(config, seed=1).base == config.base  # placed once
    config = load("sft_7b", "--gin.BUCKET='near'")
    assert dataclasses.replace(config, seed=1).data == config.data
    assert (config.workdir, config.data.data_root) == ("near/runs/sft_7b", "near/data")


PLACE = """
import json, sys
from tulu_jax.parallel import mesh
from tulu_jax.planning import topology

for name, configs in json.load(sys.stdin).items():
    found = topology.parse(name).devices()
    for config in configs:
        kind = mesh.DecodingMesh if "group" in config else mesh.MeshConfig
        made = mesh.make(kind(**config), list(found))
        assert len(set(made.devices.flat)) == made.size
        assert dict(made.shape).items() <= config.items()
    print(name, len(found))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_meshes_are_placed_on_the_devices_of_the_compiler():
    """Every slice's meshes on its topology, as libtpu describes it: a run's and its decoder's."""
    meshes = {}
    for run in RUNS:
        for pod in slices_of(run):
            config = load(run, pod=pod)
            known = meshes.setdefault(config.mesh.topology, [])
            devices = mesh.slice_devices(config.mesh.topology)
            for found in (config.mesh, slices.resident(devices, config.axis_sizes)):
                known += [c] if (c := dataclasses.asdict(found)) not in known else []
    environment = os.environ | schedule.ENVIRONMENT
    done = subprocess.run(
        [sys.executable, "-c", PLACE],
        env=environment,
        input=json.dumps(meshes),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    devices = dict(line.split() for line in done.stdout.split("\n")[:-1])
    assert devices == {name: str(mesh.slice_devices(name)) for name in meshes}
    assert set(devices) == {slice_.topology for slice_ in slices.SLICES.values()}
