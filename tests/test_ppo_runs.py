"""Runs of PPO: rollouts, resumed and killed, on a mesh, converted, and what is refused."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import builders
import jax
import numpy as np
import pytest
from etils import epath

from tulu_jax import base as base_lib
from tulu_jax import conversion, trained, trainer, validation
from tulu_jax.data import chat as chat_lib
from tulu_jax.data import loader, tulu_tiny
from tulu_jax.data.sources import tiny_instructions
from tulu_jax.models import llama
from tulu_jax.objectives import ppo, ppo_feed, ppo_rewards, reward, sft
from tulu_jax.objectives import rollouts as rollouts_lib
from tulu_jax.parallel.mesh import MeshConfig
from tulu_jax.training import agreement, checkpoint_digests, watch
from tulu_jax.training import checkpoint as checkpoint_lib
from tulu_jax.training import metrics as metrics_lib

SETTINGS = dict(prompts=16, response_length=12, slots=16, vocab_chunk=32, kl_coef=0.1)


@pytest.fixture(scope="module")
def home(tmp_path_factory, put_tokenizer):
    """A folder with a tokenizer, a base that makes answers which end, a reward model on it without
    training, and encoded rows that the tests of this file share."""
    folder = tmp_path_factory.mktemp("home")
    put_tokenizer(folder / "tokenizer")
    tokenizer = tulu_tiny.tokenizer(str(folder / "tokenizer"))
    options = dict(tokenizer=tokenizer, num_steps=40, mesh=MeshConfig(data=8))
    base = builders.train_config(folder, objective=sft.SFTConfig(vocab_chunk=32), **options)
    base = builders.replace(
        base, workdir=str(folder / "sft"), optimizer__learning_rate=1e-2, checkpoint__every=40
    )
    trainer.Run(base).train()
    scored = builders.train_config(
        folder, dpo_stage=True, objective=reward.RewardConfig(), **options
    )
    scored = builders.replace(
        scored,
        workdir=str(folder / "rm"),
        base=base.workdir,
        data__packing="best_fit",
        data__max_length=128,
    )
    trainer.Run(scored).save_initial()  # with a head that is drawn
    return folder


def run_config(home, folder, **changes):
    """Two iterations of two updates; `of_ppo` are settings of the objective."""
    of_ppo = SETTINGS | {"reward_from": str(home / "rm")} | changes.pop("of_ppo", {})
    config = builders.train_config(
        home,
        tokenizer=tulu_tiny.tokenizer(str(home / "tokenizer")),
        dpo_stage=True,
        objective=ppo.PPOConfig(**of_ppo),
        **{"base": str(home / "sft"), "num_steps": 4} | changes,
    )
    return builders.replace(
        config,
        workdir=str(folder / "run"),
        data__max_length=80,
        optimizer__warmup_ratio=0.0,
        checkpoint__every=2,
    )


@pytest.fixture(scope="module")
def config(home, tmp_path_factory):
    """A run that has ended, with a checkpoint of each update."""
    config = run_config(home, tmp_path_factory.mktemp("run"))
    config = builders.replace(config, checkpoint__every=1, checkpoint__keep=4)
    trainer.Run(config).train()
    return config


def lines_of(workdir):
    return [
        {name: value for name, value in line.items() if not name.startswith("perf/")}
        for line in metrics_lib.read(workdir)
    ]


def opened(config):
    """A run whose feed is ready, and its state."""
    run = trainer.Run(config)
    run.open()
    state, run.frozen = run._start()
    return run, state


@pytest.fixture(scope="module")
def begun(home, tmp_path_factory):
    """A run before its first update, its state, and its first rollouts. It measures at temperature
    1, as the decoder tells log-probabilities."""
    folder = tmp_path_factory.mktemp("begun")
    run, state = opened(run_config(home, folder, of_ppo={"logps_at": "one"}))
    with jax.set_mesh(run.mesh):
        return run, state, run.feed._made(0, state.params)


def test_the_ratio_is_one_at_the_first_inner_step(config):
    """Old log-probabilities are from the rollout, so the second update has moved, and the first of
    the next iteration has not."""
    first, second, third, _ = (line for line in lines_of(config.workdir) if "train/loss" in line)
    for line in (first, third):
        assert line["train/policy/ratio"] == pytest.approx(1, abs=1e-6)
        assert line["train/policy/clipped"] == 0 and line["train/policy/kl"] < 1e-9
        assert line["train/value/clipped"] == 0
    assert abs(second["train/policy/ratio"] - 1) > 1e-4 and second["train/policy/kl"] > 1e-4
    assert first["train/rollout/kl"] == pytest.approx(0, abs=1e-5)  # it begins as the reference
    assert third["train/rollout/kl"] > 1e-3
    assert 0 < first["train/rollout/ended"] <= 1 and 1 <= first["train/rollout/length"] <= 12
    assert first["batch/rollouts"] == 8


def test_rollouts_are_the_decoders_at_the_temperature(begun):
    """Drawn at 0.7, and what is measured of them is what the decoder tells."""
    run, state, made = begun
    with jax.set_mesh(run.mesh):
        examples = run.feed.rows.of_iteration(0)
        prompts = [run.feed.rows.prompt(i) for i in examples]
        key = jax.random.fold_in(jax.random.key(run.config.seed), ppo_feed.DRAWS)
        results = run.feed._decoder.generate(
            llama.own(state.params), prompts, run.feed._sampling, jax.random.fold_in(key, 0)
        )
    texts = set()
    for row, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        ids = made.tokens[row, : made.lengths[row]].tolist()
        assert ids == prompt + result.ids and made.ended[row] == (result.ended == "stop_id")
        np.testing.assert_allclose(made.logps[row, made.mask[row]], result.logps, atol=1e-4)
        texts.add(tuple(result.ids))
    assert len(texts) > 4
    np.testing.assert_allclose(made.kl(), 0, atol=1e-5)
    np.testing.assert_array_equal(made.scores[~made.ended], -10)


def test_prompts_are_those_that_generation_has(begun):
    feed, rows = begun[0].feed, tiny_instructions.preference_rows("train")
    for example in feed.rows.of_iteration(3)[:5]:
        row = rows[int(feed.rows.names(np.array([example]))[0].split("/")[1])]
        expected = chat_lib.generation_prompt(row["prompt"], feed._tokenizer, chat="spec")
        assert feed.rows.prompt(example) == expected
        texts = [feed._tokenizer.decode(ids) for ids in feed.rows.answers(example)]
        assert texts == [row[side][0]["content"] for side in ("chosen", "rejected")]
    epoch = np.concatenate([feed.rows.of_iteration(k) for k in range(feed.rows.per_epoch)])
    assert len(set(epoch)) == len(epoch) == feed.rows.num_examples // 16 * 16 > 1000
    assert feed.rows.example_ids(20) == feed.rows.names(feed.rows.of_iteration(1)[4:5])


def test_scores_are_those_of_the_scorer(home, config):
    """The reward model of `reward_from`, at each answer's end."""
    made = rollouts_lib.load(config.workdir, 1)
    scored = run_rm(home)
    rows = [made.tokens[i, : made.lengths[i]].tolist() for i in range(16)]
    expected = np.where(made.ended, scored.of_ids(rows), -10)
    np.testing.assert_allclose(made.scores, expected, atol=1e-5)
    assert made.ended.any()


def run_rm(home):
    config = builders.train_config(
        home, tokenizer=tulu_tiny.tokenizer(str(home / "tokenizer")), dpo_stage=True,
        objective=reward.RewardConfig(),
    )  # fmt: skip
    return trained.Scorer(builders.replace(config, workdir=str(home / "rm")))


def test_a_value_model_starts_as_the_reward_model_and_the_rest_is_frozen(begun):
    run, state, _ = begun
    reference = run.frozen.reference
    jax.tree.map(np.testing.assert_array_equal, state.params["value"], reference["reward"])
    policy = {name: state.params[name] for name in ("model", "lm_head")}
    jax.tree.map(np.testing.assert_array_equal, policy, {name: reference[name] for name in policy})
    names = agreement.param_shapes(state.params)
    assert names["value/score/kernel"] == [32, 1] and "score/kernel" not in names


def stopped(config, folder, step):
    """A copy of the run that has come no further than `step`."""
    mine = builders.replace(config, workdir=str(folder / f"run_{step}"))
    shutil.copytree(config.workdir, mine.workdir)
    for later in range(step + 1, 5):
        shutil.rmtree(f"{mine.workdir}/checkpoints/{later}")
    return mine


@pytest.mark.parametrize("step", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_same_bit_for_bit(config, tmp_path, step):
    """From the middle of an iteration, where its rollouts are read, and from its end."""
    mine = stopped(config, tmp_path, step)
    if step == 2:  # what an iteration begins with is made again
        (file,) = pathlib.Path(mine.workdir, "rollouts").glob("000001-*.npz")
        file.unlink()
    trainer.Run(mine).train()
    assert lines_of(mine.workdir) == lines_of(config.workdir)
    assert digests_of(mine.workdir) == digests_of(config.workdir)
    names = [
        sorted(f.name for f in pathlib.Path(c.workdir, "rollouts").iterdir())
        for c in (mine, config)
    ]
    assert names[0] == names[1]


def digests_of(workdir):
    """The digests of all arrays of step 4."""
    return checkpoint_digests.load(epath.Path(workdir) / "checkpoints/4")["arrays"]


def test_rollouts_that_are_needed_and_gone_or_damaged(config, tmp_path):
    mine = stopped(config, tmp_path, 3)
    (file,) = pathlib.Path(mine.workdir, "rollouts").glob("000001-*.npz")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(validation.UsageError, match=r"found digest .*Restore that file, go back"):
        trainer.Run(mine).train()
    file.unlink()
    with pytest.raises(validation.UsageError, match="has 0 files of the rollouts of iteration 1"):
        trainer.Run(mine).train()


def test_files_of_rollouts_stay_while_a_checkpoint_needs_them(tmp_path, config):
    made = rollouts_lib.load(config.workdir, 0)
    for iteration in (0, 3, 4, 5):
        rollouts_lib.save(str(tmp_path), iteration, made)
    rollouts_lib.save(str(tmp_path), 5, made[:8])  # in place of the one before
    rollouts_lib.sweep(str(tmp_path), {0, 4, 5})
    assert [f.name[:6] for f in sorted((tmp_path / "rollouts").iterdir())] == [
        "000000", "000004", "000005",
    ]  # fmt: skip
    assert len(rollouts_lib.load(str(tmp_path), 5)) == 8
    np.testing.assert_array_equal(rollouts_lib.load(str(tmp_path), 4).logps, made.logps)


KILLED = """
import os, pathlib, pickle, signal, sys
with open(sys.argv[1], "rb") as file:
    config, where = pickle.load(file)
from tulu_jax import trainer
from tulu_jax.objectives import ppo_feed, rollouts

def die():
    os.kill(os.getpid(), signal.SIGKILL)

run = trainer.Run(config)
if where == "rollout":  # after some tokens of the second iteration
    generate = ppo_feed.Decoder.generate
    def then(self, *arguments, **options):
        calls.append(1)
        run.checkpoints.wait()
        return generate(self, *arguments, stream=(lambda piece: die()) if len(calls) == 2 else None)
    calls = []
    ppo_feed.Decoder.generate = then
else:  # before update `where`
    feed = ppo_feed.PPOFeed.__call__
    def then(self, step, params):
        if step == where:
            self._run.checkpoints.wait()
            die()
        return feed(self, step, params)
    ppo_feed.PPOFeed.__call__ = then
run.train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["rollout", 2, 4])
def test_a_killed_run_goes_on_bit_for_bit(config, tmp_path, where):
    """SIGKILL while the second iteration decodes, and in the middle of each iteration, with a
    checkpoint from the middle of the first (every 1) or without."""
    import pickle

    mine = builders.replace(config, workdir=str(tmp_path / "run"), checkpoint__every=1)
    (tmp_path / "config").write_bytes(pickle.dumps((mine, where)))
    (tmp_path / "killed.py").write_text(KILLED)
    done = subprocess.run(
        [sys.executable, "killed.py", "config"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(trainer.__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    saved = 2 if where == "rollout" else where - 1
    assert checkpoint_lib.Checkpoints(mine.workdir).steps()[-1] == saved
    trainer.Run(mine).train()
    assert lines_of(mine.workdir)[-4:] == lines_of(config.workdir)[-4:]
    assert digests_of(mine.workdir) == digests_of(config.workdir)


@pytest.mark.slow
def test_what_comes_out_is_the_policy(home, config, tmp_path):
    """`convert` and `generate` see it alone, and another run starts from the folder."""
    out = tmp_path / "hf"
    conversion.export(config, str(out), step=None, dtype="float32", overwrite=False)
    about = json.loads((out / "config.json").read_text())
    assert about["architectures"] == ["LlamaForCausalLM"]
    names = json.dumps(sorted(p.name for p in out.iterdir()))
    assert "model.safetensors" in names
    generator = trained.Generator(config, max_new_tokens=8)
    assert generator.params.keys() == {"model", "lm_head"}
    question = [{"role": "user", "content": "Opposite of hot?"}]
    (reply,) = generator.replies([question])
    onto = builders.train_config(
        home, tokenizer=config.data.tokenizer, base=str(out), objective=sft.SFTConfig()
    )
    onto = builders.replace(onto, workdir=str(tmp_path / "onto"))
    assert base_lib.problems(onto) == []
    conversion.write_first_step(onto, "")
    (same,) = trained.Generator(onto, max_new_tokens=8).replies([question])
    assert same == reply
    before = trained.Generator(config, initial=True, max_new_tokens=8)
    assert before.params.keys() == {"model", "lm_head"}


@pytest.mark.slow
def test_on_a_mesh_the_first_update_is_the_same(home, config, tmp_path):
    """Sharded rows, heads and both networks; tokens are drawn alike, sums differ by rounding."""
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    mine = run_config(home, tmp_path, mesh=mesh, num_steps=2)
    trainer.Run(builders.replace(mine, micro_batch_size=4)).train()
    (ours, *_), (theirs, *_) = (
        [line for line in lines_of(c.workdir) if "train/loss" in line] for c in (mine, config)
    )
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.slow
def test_as_the_original_did_it(home, tmp_path):
    """Recomputed old values: never clipped, in the second pass over the prompts either; no `<s>`;
    an end token behind each answer that is not full."""
    of_ppo = dict(mode="easylm", log_softmax_dtype="float32", ppo_epochs=2)
    config = run_config(home, tmp_path, of_ppo=of_ppo, num_steps=4)
    run, state = opened(config)
    with jax.set_mesh(run.mesh):
        run.feed(1, state.params)
    made = run.feed._rollouts
    bos, end = run.feed._tokenizer.bos_id, run.feed._tokenizer.eos_id
    assert not (made.tokens == bos).any()
    for row in range(len(made)):
        answer = made.tokens[row, made.prompt_lengths[row] : made.lengths[row]]
        assert (answer[-1] == end) == made.ended[row] == (len(answer) < 12 or answer[-1] == end)
    trainer.Run(config).train()
    for line in lines_of(config.workdir):
        if "train/loss" in line:
            assert line["train/policy/ratio"] == pytest.approx(1, abs=1e-5)
            assert line["train/policy/clipped"] == line["train/value/clipped"] == 0


def test_the_end_is_written_as_the_original_did_it(begun):
    feed, end = begun[0].feed, begun[0].feed._tokenizer.eos_id
    assert feed._end_written([5, 6, end]) == [5, 6, end]
    assert feed._end_written([5, 0, 0]) == [5, end]
    assert feed._end_written([end]) == [end]
    assert feed._end_written(list(range(20, 32))) == list(range(20, 32))


@pytest.mark.slow
def test_a_second_pass_is_clipped_in_the_correct_mode(home, tmp_path):
    config = run_config(home, tmp_path, of_ppo=dict(ppo_epochs=4), num_steps=8)
    trainer.Run(builders.replace(config, optimizer__learning_rate=1e-2)).train()
    clipped = [x["train/policy/clipped"] for x in lines_of(config.workdir) if "train/loss" in x]
    assert clipped[0] == 0 and max(clipped) > 0.1


def refused(config) -> str:
    return "\n".join(trained.reward_problems(config))


def test_a_reward_model_of_another_tokenizer_or_template(home, tmp_path, put_tokenizer, config):
    """Of a run, by its checkpoint; of an exported folder, by what lies in it."""
    assert trained.reward_problems(config) == []
    other = builders.replace(config, data__chat="paper", workdir=str(tmp_path / "other"))
    assert "was trained with chat = spec; this run has paper" in refused(other)
    with pytest.raises(validation.UsageError, match="was trained with chat = spec"):
        trainer.Run(other).train()
    folder = pathlib.Path(shutil.copytree(config.data.tokenizer, tmp_path / "tokenizer"))
    tokens = json.loads((folder / "tokenizer.json").read_text())
    tokens["model"]["merges"] = tokens["model"]["merges"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    assert "was trained with tokenizer = " in refused(
        builders.replace(config, data__tokenizer=str(folder))
    )
    scored = run_rm(home).config
    conversion.export(scored, str(tmp_path / "rm_hf"), step=None, dtype=None, overwrite=False)
    folder_config = builders.replace(config, objective__reward_from=str(tmp_path / "rm_hf"))
    assert refused(folder_config) == ""
    assert "has the chat template of 'spec'; this run has 'paper'" in refused(
        builders.replace(folder_config, data__chat="paper")
    )
    assert "another tokenizer" in refused(
        builders.replace(folder_config, data__tokenizer=str(folder))
    )


def template_in(folder, text):
    """Puts a chat template into a folder, None for none."""
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": text}
        )
    )


def test_a_folder_is_judged_by_what_its_template_writes(home, tmp_path, config):
    """One that is not ours by its text; none at all is refused."""
    out = tmp_path / "rm_hf"
    conversion.export(run_rm(home).config, str(out), step=None, dtype=None, overwrite=False)
    onto = builders.replace(config, objective__reward_from=str(out))
    theirs = (  # as the released folders have it
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    template_in(out, theirs)
    assert refused(onto) == ""
    template_in(out, theirs.replace("<|", "[["))
    assert "its chat template writes '[[user|>" in refused(onto)
    template_in(out, "{{ raise_exception('never') }}")
    assert "its chat template fails (never)" in refused(onto)
    template_in(out, None)
    assert "it has no chat template, so nobody knows what text it was taught" in refused(onto)


def test_a_reward_model_that_was_converted_says_what_it_reads(home, tmp_path, config):
    """Step 0 of a folder with a score head, streamed; and the run of one."""
    out, scored = tmp_path / "rm_hf", run_rm(home).config
    conversion.export(scored, str(out), step=None, dtype=None, overwrite=False)
    for base in (str(out), scored.workdir):
        inward = builders.replace(scored, base=base, workdir=str(tmp_path / f"of_{len(base)}"))
        other = builders.replace(inward, data__chat="paper")
        with pytest.raises(validation.UsageError, match=r"spec.*this run has .?paper"):
            conversion.write_first_step(other, "")
        conversion.write_first_step(inward, "")
        recorded = checkpoint_lib.Checkpoints(inward.workdir).about(0)["must_match"]
        assert recorded["chat"] == "spec"
        assert recorded["tokenizer"] == trained.tokenizer_digest(config.data.tokenizer)
        onto = builders.replace(config, objective__reward_from=inward.workdir)
        assert refused(onto) == ""
        assert "was trained with chat = spec" in refused(builders.replace(onto, data__chat="paper"))


def test_a_reward_model_that_does_not_say_what_it_reads(home, tmp_path, config):
    """As checkpoints of step 0 were before."""
    scored = builders.replace(run_rm(home).config, workdir=str(tmp_path / "rm"))
    run = trainer.Run(scored)
    with jax.set_mesh(run.mesh):
        state, _ = run._start()
        told = run._about()
        for name in ("chat", "tokenizer"):
            del told["must_match"][name]
        run.checkpoints.save(0, state, told, {})
        run.checkpoints.close()
    onto = builders.replace(config, objective__reward_from=scored.workdir)
    assert "of step 0 does not record its chat and tokenizer" in refused(onto)


def test_what_is_no_reward_model(home, config, tmp_path):
    def of(path):
        return refused(builders.replace(config, objective__reward_from=str(path)))

    assert "does not exist" in of(tmp_path / "nowhere")
    assert "has neither config.json nor params.json nor a checkpoint" in of(tmp_path)
    assert "lacks parameter score/kernel" in of(home / "sft")


def test_settings_that_do_not_go_with_ppo(home, tmp_path):
    for changes, said in (
        ({"reference_dir": "x"}, "answers are new in each iteration"),
        ({"eval_every": 2}, "PPO has no evaluation within a run"),
        ({"batch_size": 5, "mesh": MeshConfig()}, "are not a multiple of batch_size = 5"),
        ({"num_steps": 3}, "num_steps = 3 is not a multiple of the 2 updates of an iteration"),
        ({"of_ppo": {"response_length": 80}}, "leaves no room for a prompt"),
        ({"of_ppo": {"mode": "easylm"}}, "takes the logits of a model that computes in bfloat16"),
    ):
        with pytest.raises(validation.UsageError, match=said):
            run_config(home, tmp_path, **changes)
    config = run_config(home, tmp_path)
    with pytest.raises(validation.UsageError, match="expected 'none' and 'cut'"):
        builders.replace(config, data__packing="best_fit")


def test_prompts_beyond_their_budget_are_left_out_and_named(home, tmp_path, caplog):
    config = run_config(home, tmp_path)
    config = builders.replace(config, data__max_length=42)  # prompts of at most 30 ids
    rows = loader.prepare(config.data, split="train")
    with caplog.at_level("WARNING"):
        found = ppo_feed.Prompts(rows, longest=30, count=16, epochs=1)
    assert 0 < found.num_left_out < rows.num_examples
    assert found.num_examples == rows.num_examples - found.num_left_out
    assert (
        f"{found.num_left_out} of {rows.num_examples} prompts are left out, longer" in caplog.text
    )
    assert "tulu_tiny_preference/" in caplog.text
    assert all(len(found.prompt(i)) <= 30 for i in found.of_iteration(0))
    with pytest.raises(validation.UsageError, match="there are 0 prompts of at most 3 ids"):
        ppo_feed.Prompts(rows, longest=3, count=16, epochs=1)


def test_a_reward_that_is_not_finite_stops_with_the_iteration_and_the_rows(begun, monkeypatch):
    run, state, _ = begun
    head = run.frozen.reference["reward"]["score"]
    monkeypatch.setitem(head, "kernel", head["kernel"] * np.float32(np.inf))
    with jax.set_mesh(run.mesh), pytest.raises(watch.UnstableError) as error:
        run.feed(1, state.params)
    said = str(error.value)
    assert "iteration 0: the reward of" in said and "answers is not finite" in said
    assert "tulu_tiny_preference/" in said and "Last good checkpoint: none" in said


def test_a_kl_that_explodes_is_told_with_its_rows(begun, monkeypatch):
    """Of a policy that is three times as sure as the reference."""
    run, state, _ = begun
    objective = dataclasses.replace(run.feed._objective, most_kl=0.01)
    monkeypatch.setattr(run.feed, "_objective", objective)
    surer = {**state.params, "lm_head": jax.tree.map(lambda x: 3 * x, state.params["lm_head"])}
    with jax.set_mesh(run.mesh), pytest.raises(watch.UnstableError) as error:
        run.feed(1, surer)
    said = str(error.value)
    assert "iteration 0: the KL divergence from the reference is" in said
    assert "expected at most most_kl = 0.01" in said and "Rows: tulu_tiny_preference/" in said


@pytest.mark.slow
def test_a_kl_that_explodes_stops_with_the_iteration_and_the_rows(home, tmp_path):
    config = run_config(home, tmp_path, of_ppo={"most_kl": 0.5})
    config = builders.replace(config, optimizer__learning_rate=0.05)
    with pytest.raises(watch.UnstableError) as error:
        trainer.Run(config).train()
    said = str(error.value)
    assert "iteration 1: the KL divergence from the reference is" in said
    assert "expected at most most_kl = 0.5" in said and "Rows: tulu_tiny_preference/" in said
    assert "Last good checkpoint: step 2" in said
    assert "most_kl" not in config.objective.identity()  # it may be raised, and the run goes on


def test_answers_that_are_empty(begun, monkeypatch):
    """All of them: the policy has collapsed. Some: they are trained on, and counted."""
    run, state, made = begun
    end = run.feed._tokenizer.eos_id
    generate = run.feed._decoder.generate

    def some(*arguments):
        results = generate(*arguments)
        return [r if n % 2 else type(r)(**{**vars(r), "ids": [end]}) for n, r in enumerate(results)]

    def all_of_them(*arguments):
        return [type(r)(**{**vars(r), "ids": [end]}) for r in generate(*arguments)]

    empty = made.ended & (made.lengths - made.prompt_lengths == 1)
    assert not empty.all()
    with jax.set_mesh(run.mesh):
        monkeypatch.setattr(run.feed._decoder, "generate", some)
        batch = run.feed(1, state.params)
        assert 0.5 <= batch["empty"].mean() < 1 and np.isfinite(batch["advantages"]).all()
        monkeypatch.setattr(run.feed._decoder, "generate", all_of_them)
        with pytest.raises(watch.UnstableError, match="every answer is empty") as error:
            run.feed(1, state.params)
    assert "The policy has collapsed" in str(error.value)


@pytest.mark.slow
def test_answers_without_an_end_score_what_the_config_says(home, tmp_path):
    config = run_config(home, tmp_path, of_ppo={"response_length": 1, "missing_end_score": -3.0})
    run, state = opened(config)
    with jax.set_mesh(run.mesh):
        batch = run.feed(1, state.params)
    assert not batch["ended"].all()
    np.testing.assert_array_equal(batch["score"][batch["ended"] == 0], -3)
    np.testing.assert_array_equal(batch["length"], 1)


def test_a_program_as_reward(begun, monkeypatch):
    run, state, _ = begun
    objective = dataclasses.replace(run.feed._objective, reward="right_or_long")
    monkeypatch.setattr(run.feed, "_objective", objective)
    with jax.set_mesh(run.mesh):
        made = run.feed._made(0, state.params)
    examples, decode = run.feed.rows.of_iteration(0), run.feed._tokenizer.decode
    for row in np.flatnonzero(made.ended):
        reply = decode(made.tokens[row, made.prompt_lengths[row] : made.lengths[row]])
        both = [decode(ids) for ids in run.feed.rows.answers(examples[row])]
        expected = ppo_rewards.right_or_long(reply, *both)
        assert made.scores[row] == pytest.approx(expected)
