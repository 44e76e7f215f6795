"""Reference numbers that runs share, metrics against a table, groups of pairs, foreign bases."""

import builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tulu_jax import preflight, trainer
from tulu_jax.data import loader, registry
from tulu_jax.interop import hf
from tulu_jax.models import llama
from tulu_jax.objectives import dpo, dpo_feed
from tulu_jax.training.state import Frozen

TASKS = ("two_sources", "no_source")


def rows_of_a_task(part: str) -> list[dict]:
    """Pairs of growing length; of the first task, every second one tells another source."""

    def said(role, content):
        return [{"role": role, "content": content}]

    sources = [{"source": "books" if i % 2 else "web"} for i in range(6)]
    return [
        {
            "prompt": said("user", f"{part} {i}"),
            "chosen": said("assistant", "fox " * (i + 1)),
            "rejected": said("assistant", "hen " * (i + 1)),
            "about": sources[i] if part == TASKS[0] else {},
        }
        for i in range(6)
    ]


@pytest.fixture
def config(tmp_path, tokenizer_dir):
    """A packed DPO run on two tasks, which exist for this test."""
    for name in TASKS:
        registry.TaskRegistry.add(
            registry.Task(
                name=name,
                kind="preference",
                sources={"train": lambda name=name: rows_of_a_task(name)},
                convert=lambda row: row,
                licence="-",
                origin="-",
            )
        )
    mixture = registry.Mixture(name="both", tasks=dict.fromkeys(TASKS))
    made = builders.train_config(tmp_path, tokenizer=tokenizer_dir, dpo_stage=True)
    yield builders.replace(made, data__train=mixture, data__packing="best_fit")
    for name in TASKS:
        registry.TaskRegistry.remove(name)


def test_the_pass_takes_rows_of_many_updates_and_loses_no_pair(tmp_path, tokenizer_dir):
    """The numbers are those of forwards of an update's rows, to the rounding of other shapes. What
    a kill left to be done is computed in the same shape, so bit for bit as it was."""
    config = builders.train_config(tmp_path, tokenizer=tokenizer_dir, dpo_stage=True)
    config = builders.replace(config, data__packing="best_fit", data__holdout_every=50)
    run, taken, put = trainer.Run(config), [], trainer.Run.put
    run.put = lambda batch: taken.append(len(batch["tokens"])) or put(run, batch)
    run.open()
    rows = run.feed.rows
    size = dpo_feed.pass_rows(config, run.mesh)
    assert size * config.data.max_length == dpo_feed.POSITIONS * run.mesh.size
    names = [rows.store.name(i) for i in range(rows.num_examples)]

    def computed():
        run.feed.begin(lambda: params, "w")
        return dpo_feed.reference_cache(config, "train", rows, "w").gather(names)

    with jax.set_mesh(run.mesh):
        params = jax.jit(lambda: llama.init_params(config.model, jax.random.key(0)))()
        score = jax.jit(dpo_feed.make_scores(config))
        whole, expected = {"process_index": 0, "process_count": 1}, {}
        for batch in loader.eval_batches(rows, batch_size=config.batch_size, **whole):
            example, logps = (np.asarray(x) for x in score(params, put(run, batch)))
            expected |= dict(zip(example[example >= 0].tolist(), logps[example >= 0], strict=True))
        found = computed()
        batches = -(-rows.rows_per_epoch // size)
        assert batches > 1 and rows.rows_per_epoch % size  # the last ends in empty rows
        of_eval = -(-run.feed._pairs.splits["eval"].rows_per_epoch // 8) * 8
        assert taken == [size] * batches + [of_eval] and of_eval < size
        expected = np.stack([expected[i] for i in range(rows.num_examples)])
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        *_, last = sorted((tmp_path / "run/reference_train").glob("*.npz"))
        last.unlink()
        np.testing.assert_array_equal(computed(), found)
        assert taken[batches + 1 :] == [size]


def test_runs_that_differ_in_beta_and_rate_share_a_reference(config, tmp_path):
    config = builders.replace(config, reference_dir=str(tmp_path / "shared"))
    rows = loader.prepare(config.data, split="train")
    names = [rows.store.name(i) for i in range(rows.num_examples)]
    logps = np.random.default_rng(0).normal(-50, 9, (len(names), 2)).astype(np.float32)
    dpo_feed.reference_cache(config, "train", rows, "w1").add(names, logps)
    other = builders.replace(config, objective__beta=0.3, optimizer__learning_rate=1e-6)
    other = builders.replace(other, workdir=str(tmp_path / "other"))
    run = trainer.Run(other)
    run.open()

    def gone():
        raise AssertionError("the reference was computed again")

    run.feed.begin(gone, "w1")
    batch = run.feed(1, None)
    real = batch["example"] >= 0
    np.testing.assert_array_equal(batch["ref_logps"][real], logps[batch["example"][real]])
    assert not batch["ref_logps"][~real].any()
    rounded = builders.replace(
        other, execution__compute_dtype="bfloat16", objective__log_softmax_dtype="bfloat16"
    )
    for stranger, weights in ((other, "w2"), (rounded, "w1")):
        assert names[0] not in dpo_feed.reference_cache(stranger, "train", rows, weights)
    own = builders.replace(config, reference_dir=None)
    assert names[0] not in dpo_feed.reference_cache(own, "train", rows, "w1")


def test_a_shared_reference_needs_a_cached_one(config):
    for changes in ({"objective__reference": "resident"}, {"objective__loss": "orpo"}):
        with pytest.raises(ValueError, match=r"reference_dir = 'x' is for DPO with reference ="):
            builders.replace(builders.replace(config, **changes), reference_dir="x")


def test_rounded_log_softmax_needs_a_rounded_model(config):
    with pytest.raises(ValueError, match=r"compute_dtype = 'float32'. Set both, or neither"):
        builders.replace(config, objective__log_softmax_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"log_softmax_dtype = 'float16'"):
        dpo.DPOConfig(log_softmax_dtype="float16")


def test_groups_by_source_and_by_quarter_of_the_length(config):
    """Batches of three pairs and an empty place; the task stands for a source that is not told."""
    rows = loader.prepare(config.data, split="train")
    examples, rng = [], np.random.default_rng(0)
    margins = rng.normal(size=12).astype(np.float32)
    lengths = rng.permutation(12).astype(np.float32) + 1
    for start in range(0, 12, 3):
        here = np.arange(start, start + 3)
        values = {
            "example": [*here, -1],
            "lengths/chosen": [*lengths[here] - 0.5, 1e6],
            "lengths/rejected": [*lengths[here] + 0.5, 1e6],
            "loss": [*-margins[here], np.nan],
            "rewards/margins": [*margins[here], np.nan],
            "rewards/accuracies": [*(margins[here] > 0), np.nan],
        }
        examples.append({name: np.asarray(value)[None] for name, value in values.items()})
    found = dpo_feed.group_means(rows, examples)
    told = [rows.store.about(i).get("source", TASKS[1]) for i in range(12)]
    quarters = [f"Q{int((length - 1) // 3) + 1}" for length in lengths]
    assert {told.count(name) for name in ("books", "web")} == {3}
    expected = {}
    for kind, group_of in (("by_source", told), ("by_length", quarters)):
        for group in sorted(set(group_of)):
            here = margins[[g == group for g in group_of]]
            expected[f"{kind}/{group}/loss"] = -here.mean()
            expected[f"{kind}/{group}/rewards/margins"] = here.mean()
            expected[f"{kind}/{group}/rewards/accuracies"] = (here > 0).mean()
    assert len(expected) == 3 * (3 + 4) and found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


def test_metrics_are_means_over_the_pairs():
    """Rewards, KL estimate, lengths and the share that was cut, from a table of log-probs."""
    made = builders.random_pairs(7, 48)
    batch = builders.packed_rows(made, 3, 144)
    objective = dpo.DPOConfig(beta=0.2, vocab_chunk=32)
    execution = builders.ExecutionConfig(compute_dtype="float32", attention="xla", remat=False)
    forward = llama.forward(builders.MODEL, execution)
    params = jax.jit(lambda: llama.init_params(builders.MODEL, jax.random.key(0)))()
    example = np.asarray(batch["example"])
    ref = np.random.default_rng(0).uniform(-60, -20, (7, 2)).astype(np.float32)
    batch["ref_logps"] = jnp.where((example >= 0)[..., None], ref[example], 0.0)
    compute = jax.jit(lambda b: objective.compute(forward, params, Frozen(), b))
    found = compute(objective.weigh(batch))
    shares, values = found.metrics, found.examples
    order = [np.argwhere(example == i)[0] for i in range(7)]
    sides = ("chosen", "rejected")
    logps = np.array([[values[f"logps/{side}"][tuple(o)] for side in sides] for o in order])
    lengths = np.array([[spans[0, 1] - spans[0, 0] for _, spans in pair] for pair in made])
    ratios = logps - ref
    margins = 0.2 * (ratios[:, 0] - ratios[:, 1])
    expected = {
        "loss": np.log1p(np.exp(-margins)).mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).mean(),
        "kl": ratios.mean(),
        "truncated": 3 / 7,  # pairs 0, 3 and 6
    }
    for number, side in enumerate(sides):
        expected[f"rewards/{side}"] = 0.2 * ratios[:, number].mean()
        expected[f"logps/{side}"] = logps[:, number].mean()
        expected[f"lengths/{side}"] = lengths[:, number].mean()
    assert expected.keys() == set(objective.metrics) == shares.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(shares[name], value, rtol=2e-5, err_msg=name)


def test_a_base_of_another_architecture_or_vocabulary_is_refused_before_device_work(
    config, tmp_path
):
    """The base is the reference: one of another shape never gives a log-probability."""
    params = jax.jit(lambda: llama.init_params(builders.MODEL, jax.random.key(0)))()
    folder = str(tmp_path / "hf")
    hf.save(
        folder,
        params,
        builders.MODEL,
        dtype="float32",
        generation_config={},
        write_tokenizer=None,
    )
    config = builders.replace(config, base=folder)
    assert preflight.to_train(config, 8) == []
    for changes, name in (
        ({"model__vocab_size": 520}, "embed_tokens.weight has shape [512, 32]; expected [520, 32]"),
        ({"model__mlp_dim": 96}, "up_proj"),
        ({"model__num_layers": 3}, "layers"),
    ):
        found = preflight.to_train(builders.replace(config, **changes), 8)
        assert all(line.startswith(f"base = '{folder}': ") for line in found), found
        assert any(name in line for line in found), (changes, found)
