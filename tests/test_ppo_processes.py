"""PPO by two real processes, over gloo: the curve of one, through a death within an iteration."""

import pytest
from test_processes import CONFIG, assert_same_curve, finish, killed, start

from tulu_jax.objectives import rollouts
from tulu_jax.training import checkpoint as checkpoint_lib

OF_PPO = """
BASE = 'sft'
REWARD = 'rm'
RESPONSE_LENGTH = 12
PROMPTS = 32
NUM_STEPS = 8
CHECKPOINT_EVERY = 3
EVAL_EVERY = None
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory, put_tokenizer):
    """A folder with gin files, the base and the reward model, each of a few updates, and the
    workdir `one` of the run that two processes are compared with."""
    folder = tmp_path_factory.mktemp("processes")
    for stage, more in (("tulu_tiny_sft", ""), ("tulu_tiny_rm", ""), ("tulu_tiny_ppo", OF_PPO)):
        text = CONFIG.format(stage=stage).replace("mesh.MeshConfig.data = 2\n", "")
        (folder / f"{stage}_small.gin").write_text(text + more)
    put_tokenizer(folder / "cache/tulu_tiny_tokenizer")
    finish(start(folder, "sft", count=1, devices=4, options=["--gin.NUM_STEPS=40"]))
    run = dict(count=1, devices=4)
    finish(start(folder, "rm", stage="tulu_tiny_rm", options=["--gin.BASE='sft'"], **run))
    finish(start(folder, folder / "one", stage="tulu_tiny_ppo", **run))
    return folder


@pytest.mark.slow
def test_two_processes_through_a_death_within_an_iteration(home, tmp_path):
    """Each decodes its share of the answers; the rollouts are those of one process, and one that
    resumes in the middle of an iteration reads them."""
    run = dict(stage="tulu_tiny_ppo", devices=4)
    finish(start(home, tmp_path / "two", count=2, **run))
    assert_same_curve(tmp_path / "two", home / "one")
    killed(home, tmp_path / "killed", 1, step=6, count=2, **run)
    (saved,) = checkpoint_lib.Checkpoints(str(tmp_path / "killed")).steps()[-1:]
    assert saved % 4, "the checkpoint is not from the middle of an iteration"
    assert rollouts.load(str(tmp_path / "killed"), saved // 4).scores is not None
    errors = finish(start(home, tmp_path / "killed", count=2, **run))
    assert f"Resuming from step {saved}" in errors[0]
    assert_same_curve(tmp_path / "killed", home / "one")
    names = [
        sorted(f.name for f in (d / "rollouts").iterdir())
        for d in (tmp_path / "two", tmp_path / "killed")
    ]
    assert names[0] == names[1]
