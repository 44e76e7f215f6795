"""Best of n, and what is measured of answers: a reward and a KL divergence."""

import dataclasses
import math

import builders
import commands
import numpy as np
import pytest
import small_models
from etils import epath

from tulu_jax import trained, trainer, validation
from tulu_jax.data import tulu_tiny
from tulu_jax.decode.sampling import Sampling
from tulu_jax.evals import evaluation, held_out_prompts, measures, run, run_models, scores
from tulu_jax.objectives import dpo, reward
from tulu_jax.parallel.mesh import MeshConfig
from tulu_jax.serving import best_of

PROMPTS = [[1, 20, 30, 40], [1, 50], [1, 60, 61, 62, 63]]
DRAWN = Sampling(max_new_tokens=6, temperature=1.0)
SEEDS = [3, 4, 5]


@pytest.fixture(scope="module")
def engine(tokenizer):
    return small_models.own_engine(tokenizer)


def by_first_id(rows):
    """A reward that is no model: the id behind the prompt."""
    first = {tuple(prompt): len(prompt) for prompt in PROMPTS}
    return [
        float(next(row[n] for prompt, n in first.items() if tuple(row[:n]) == prompt))
        for row in rows
    ]


def test_of_n_answers_it_is_the_one_that_is_liked_most(engine):
    drawn = engine.generate(PROMPTS, dataclasses.replace(DRAWN, samples=4), seeds=SEEDS)
    told = {}
    chosen = best_of.BestOfEngine(engine, by_first_id, 4).generate(
        PROMPTS, DRAWN, seeds=SEEDS, done=lambda place, replies: told.update({place: replies})
    )
    assert told == dict(enumerate(chosen)) and chosen != [samples[:1] for samples in drawn]
    for samples, (best,) in zip(drawn, chosen, strict=True):
        whole = [r for r in samples if r.ended == "stop"] or samples
        assert best in whole and best.ids[0] == max(reply.ids[0] for reply in whole)
    (alone,) = zip(*engine.generate(PROMPTS, DRAWN, seeds=SEEDS), strict=True)
    first = best_of.BestOfEngine(engine, by_first_id, 1).generate(PROMPTS, DRAWN, seeds=SEEDS)
    assert [reply for (reply,) in first] == list(alone)


def test_one_that_came_to_no_end_is_taken_only_where_none_did(engine):
    """Whatever its score: with the end as likely as the rest, some answers end and some do not."""
    sampling = dataclasses.replace(DRAWN, temperature=4.0, stop_ids=tuple(range(100)), samples=8)
    drawn = engine.generate(PROMPTS, sampling, seeds=SEEDS)
    assert any(len({reply.ended for reply in samples}) == 2 for samples in drawn)

    def longest(rows):  # likes what did not end
        return [float(len(row)) for row in rows]

    one = dataclasses.replace(sampling, samples=1)
    chosen = best_of.BestOfEngine(engine, longest, 8).generate(PROMPTS, one, seeds=SEEDS)
    for samples, (best,) in zip(drawn, chosen, strict=True):
        assert (best.ended == "stop") == any(reply.ended == "stop" for reply in samples)


def test_what_cannot_be_chosen_is_refused(engine):
    with pytest.raises(validation.UsageError, match="best_of = 0: expected 1 or more"):
        best_of.BestOfEngine(engine, by_first_id, 0)
    greedy = Sampling(max_new_tokens=2)
    with pytest.raises(validation.UsageError, match="where all 4 answers are the same"):
        best_of.BestOfEngine(engine, by_first_id, 4).generate(PROMPTS, greedy, seeds=None)
    several = dataclasses.replace(DRAWN, samples=2)
    with pytest.raises(validation.UsageError, match="of a request for 2 samples"):
        best_of.BestOfEngine(engine, by_first_id, 4).generate(PROMPTS, several, seeds=SEEDS)


def test_the_budget_is_that_of_the_best_of_n():
    """As drawn: the divergence of the best of n among many equally likely answers."""
    assert best_of.kl_budget(1) == 0
    for n in (4, 16):
        rng, many = np.random.default_rng(0), 20_000
        # The best of n of `many` answers by rank r has the probability ((r + 1)^n − r^n) / many^n.
        rank = np.max(rng.integers(0, many, (200_000, n)), axis=1)
        log_ratio = np.log(((rank + 1) / many) ** n - (rank / many) ** n) + math.log(many)
        assert best_of.kl_budget(n) == pytest.approx(log_ratio.mean(), abs=0.01)


def test_a_log_ratio_is_that_of_both_models(engine, tokenizer):
    policy, other = engine, small_models.own_engine(tokenizer, seed=1)
    rows = [([1, 20, 30], [40, 50, 2]), ([1, 5], []), ([1, 7], [8])]
    found = measures.log_ratio(policy, other)(rows)
    assert found[1] == 0
    for place in (0, 2):
        prompt, answer = rows[place]
        (ours,), (theirs,) = (one.score([prompt], [answer]) for one in (policy, other))
        assert found[place] == pytest.approx(ours.logps - theirs.logps, abs=1e-4)
    assert measures.log_ratio(policy, policy)(rows) == [0, 0, 0]


@pytest.fixture(scope="module")
def home(tmp_path_factory, put_tokenizer):
    """A tokenizer, and a reward model without training, as a run of which step 0 is there."""
    folder = tmp_path_factory.mktemp("home")
    put_tokenizer(folder / "tokenizer")
    scored = config_of(folder, objective=reward.RewardConfig(), dpo_stage=True)
    scored = builders.replace(scored, workdir=str(folder / "rm"), data__packing="best_fit")
    trainer.Run(scored).save_initial()
    return folder


def config_of(home, **changes):
    tokenizer = tulu_tiny.tokenizer(str(home / "tokenizer"))
    return builders.train_config(home, tokenizer=tokenizer, mesh=MeshConfig(), **changes)


class Few(held_out_prompts.TuluTiny):
    """Some of the held-out prompts."""

    def requests(self, data, tokenizer, *, is_chat):
        few = super().requests(data, tokenizer, is_chat=is_chat)[:24]
        return [
            dataclasses.replace(one, sampling=dataclasses.replace(one.sampling, max_new_tokens=4))
            for one in few
        ]


def models_of(home, config, *, step, best_of=None):
    return run_models.RunModels(
        config=config, step=step, tokenizer=trained.chat_lib.load_tokenizer(config.data.tokenizer),
        slots=16, reward_from=str(home / "rm"), best_of=best_of, is_drawn=True,
    )  # fmt: skip


def evaluated(home, out, config, *, best_of=None, step=None):
    models = models_of(home, config, step=step, best_of=best_of)
    assert list(models.problems()) == []
    subject = evaluation.Subject(
        name="made", tokenizer=models.tokenizer, chat="spec", max_length=config.model.max_positions,
        engine=models.engine, temperature=1.0, measures=models.measures,
    )  # fmt: skip
    (found,) = evaluation.evaluate(
        subject, [Few()], data=epath.Path(out), out=out, judge=lambda questions: {}, shows=False
    )
    return found, {metric.name: metric for metric in found.metrics}


def test_an_evaluation_chooses_and_measures(home, tmp_path):
    """More answers, more reward, and the budget's divergence; what is there is not asked again."""
    config = config_of(home)
    one, four = (
        evaluated(home, tmp_path / str(n), config, best_of=n)[1] for n in (1, 4)
    )  # fmt: skip
    assert list(four) == ["exact_match", "polite", "terse", "reward", "kl"]
    assert one["kl"].value == 0 and four["kl"].value == pytest.approx(math.log(4) - 3 / 4)
    assert four["reward"].value > one["reward"].value
    assert not four["reward"].is_percent and four["reward"].standard_error > 0
    again, metrics = evaluated(home, tmp_path / "4", config, best_of=4)
    assert metrics == four and scores.load(tmp_path / "4")[1] == [again]
    rows = [
        dataclasses.asdict(row)
        for row in run.predictions_lib.read(tmp_path / "4/tulu_tiny.paper.jsonl")
    ]
    assert len(rows) == 24 and all(len(row["texts"]) == 1 for row in rows)


def test_a_run_of_preferences_is_measured_from_its_start(home, tmp_path):
    """Before its first update it is where it began."""
    config = config_of(home, dpo_stage=True, objective=dpo.DPOConfig())
    config = builders.replace(config, workdir=str(tmp_path / "run"))
    trainer.Run(config).save_initial()
    _, metrics = evaluated(home, tmp_path / "out", config, step=0)
    assert metrics["kl"].value == 0 and set(metrics) >= {"reward", "kl"}
    start = models_of(home, config, step=None)
    assert "kl" not in start.measures()


def test_a_reward_model_of_another_template_is_refused(home):
    config = builders.replace(config_of(home), data__chat="paper")
    (problem,) = models_of(home, config, step=None).problems()
    assert "chat = spec; this run has paper" in problem
    with pytest.raises(validation.UsageError, match="chat = spec; this run has paper"):
        trained.reward_model(config, str(home / "rm"))


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--best_of=4", "--temperature=1"], "--best_of chooses by a reward model; give --reward_"),
        (["--best_of=4", "--reward_from=rm"], "give the --temperature at which, such as 1"),
        (
            ["--best_of=4", "--reward_from=rm", "--temperature=0"],
            "--best_of = 4 at temperature 0, where all 4 answers are the same",
        ),
        (["--best_of=0", "--reward_from=rm", "--temperature=1"], "--best_of = 0: expected 1"),
        (["--reward_from=rm", "--engine=openai", "--url=http://x/v1"], "and no server"),
    ],
)
def test_flags_that_are_refused(flags, said, capsys, tmp_path, monkeypatch, put_tokenizer):
    monkeypatch.chdir(tmp_path)
    put_tokenizer(tmp_path / "cache/tulu_tiny_tokenizer")
    config = ["--gin_file=tulu_tiny_sft.gin", "--benchmarks=tulu_tiny"]
    assert commands.run("evaluate", *config, *flags) == 2
    assert said in capsys.readouterr().err


def test_flags_of_answers_want_benchmarks(capsys, tmp_path, monkeypatch, put_tokenizer):
    monkeypatch.chdir(tmp_path)
    put_tokenizer(tmp_path / "cache/tulu_tiny_tokenizer")
    assert commands.run("evaluate", "--gin_file=tulu_tiny_sft.gin", "--temperature=1") == 2
    assert "--temperature is of answers to --benchmarks" in capsys.readouterr().err
