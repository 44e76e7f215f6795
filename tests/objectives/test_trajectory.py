"""A few updates of whole runs: the losses of `trainer.Run` beside those of TRL's `DPOTrainer`."""

import pathlib
import sys

import builders
import jax
import numpy as np
import pytest

from tulu_jax.interop import hf
from tulu_jax.models import llama

pytest.importorskip("torch")
pytest.importorskip("trl")

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))


def test_losses_of_five_updates_are_those_of_trl(tmp_path, tokenizer_dir):
    """The same weights, ids, order, AdamW and schedule; each side has its own reference."""
    import dpo_step_cpu as benchmark

    config = builders.train_config(
        tmp_path,
        tokenizer=tokenizer_dir,
        dpo_stage=True,
        base=str(tmp_path / "hf"),
        num_steps=5,
    )
    config = builders.replace(
        config,
        data__packing="best_fit",
        data__max_length=128,
        optimizer__learning_rate=3e-3,
        optimizer__warmup_ratio=0.2,
    )
    params = jax.jit(lambda: llama.init_params(config.model, jax.random.key(3)))()
    params = jax.tree.map(lambda p: 5 * p if p.ndim > 2 else p, params)  # far from uniform
    hf.save(
        config.base,
        params,
        config.model,
        dtype="float32",
        generation_config={},
        write_tokenizer=None,
    )
    benchmark.save_tokenizer(config, config.base)
    ours, theirs, pairs = benchmark.both_losses(config, config.base, str(tmp_path / "trl"))
    assert len(ours) == len(theirs) == 5 and min(pairs) > 20
    assert max(ours[1:]) - min(ours[1:]) > 0.05  # it learns: this is no comparison of constants
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
