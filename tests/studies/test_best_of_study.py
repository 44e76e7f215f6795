"""A run of a study that is only evaluated: the best of n of another, and the page of its cost."""

import json
import pathlib

import gin
import made_studies
import pytest

from tulu_jax import validation
from tulu_jax.evals import scores
from tulu_jax.evals.benchmark import Metric
from tulu_jax.studies import known_studies, run_commands, run_states, study_page
from tulu_jax.studies.declared import TRAINING, Against, Cell, Design, Run, Score

KL = Score(benchmark="tulu_tiny", metric="kl")
SEEDS = (1, 2)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, put_tokenizer):
    monkeypatch.chdir(tmp_path)
    put_tokenizer(tmp_path / "cache/tulu_tiny_tokenizer")
    yield tmp_path
    gin.clear_config()


def design() -> Design:
    small = dict(overrides=made_studies.SMALL, seeds=SEEDS)
    sft = Run(name="sft", gin_file="tulu_tiny_sft.gin", is_evaluated=False, **small)
    rm = Run(name="rm", gin_file="tulu_tiny_rm.gin", base="sft", is_evaluated=False, **small)
    best = Run(
        name="best_of_4", gin_file=sft.gin_file, seeds=SEEDS, base="sft", scored_by="rm", best_of=4
    )
    return made_studies.design(
        runs=(sft, rm, best),
        cells=(Cell(run="best_of_4", score=made_studies.EXACT),),
        expected=(),
        against=(
            Against(
                title="Costs",
                runs=("best_of_4",),
                x=KL,
                ys=(made_studies.EXACT, Score(benchmark=TRAINING, metric="train/loss")),
            ),
        ),
        asked=("--temperature=1",),
    )  # fmt: skip


def leave_scores(one, right: int, kl: float) -> None:
    """The scores that `evaluate` leaves of the best of n."""
    made_studies.evaluate(one, right)
    _, (found,) = scores.load(run_states.evals_folder(one, None))
    items = dict.fromkeys(found.metrics[0].items, kl)
    found.metrics.append(
        Metric(name="kl", value=kl, standard_error=0.0, items=items, groups={}, is_percent=False)
    )
    scores.save(run_states.evals_folder(one, None), one.name, [found])


def test_the_best_of_n_is_evaluated_and_not_trained(folder):
    of = design()
    placed = made_studies.placed(of, folder)
    by_name = {one.name: one for one in placed}
    best, sft, rm = (by_name[f"{name}, seed 2"] for name in ("best_of_4", "sft", "rm"))
    assert best.drawn_by == sft and best.gin_file == sft.gin_file
    assert run_states.state(best).kind == run_states.MISSING
    assert "best_of_4, seed 2: of sft, seed 2: no checkpoint" in run_states.state(best).says
    folder_of = run_states.evals_folder(best, None)
    command = run_commands.evaluate(best, of, ["tulu_tiny"], folder_of)
    assert f"--workdir={sft.workdir}" in command and f"--out={best.workdir}/evals" in command
    # What a design asks for lies apart from what others ask of the same run.
    assert str(run_states.evals_folder(sft, 4)).endswith("evals/step_4,temperature=1")
    assert "--best_of=4" in command and "--temperature=1" in command
    assert f"--reward_from={rm.workdir}" in command
    made_studies.train(sft)
    state = run_states.state(best)
    assert state.kind == run_states.DONE
    assert run_commands.lacking(best, state, of) == ["tulu_tiny"]
    assert run_commands.lacking(sft, run_states.state(sft), of) == []
    leave_scores(best, 30, 0.6)
    assert run_commands.lacking(best, run_states.state(best), of) == []


def test_the_page_has_scores_against_the_divergence(folder):
    of = design()
    placed = made_studies.placed(of, folder)
    for one in placed:
        if one.drawn_by is not None:
            leave_scores(one, 30 + one.seed, 0.636)
        elif one.run.name == "sft":
            made_studies.train(one)
    states = {one.name: run_states.state(one) for one in placed}
    study_page.write(made_studies.study(of), "tiny", placed, states, folder / "page")
    content = json.loads((folder / "page/study.json").read_text())
    (table,) = content["against"]
    assert table["header"][:3] == ["run", "tulu_tiny, kl", "tulu_tiny, exact_match"]
    ((run, kl, exact, loss),) = table["rows"]
    assert loss == "—"  # it has not trained
    assert run == "best_of_4" and kl == "0.64 ± 0.00" and exact.startswith("78.8 ± ")
    assert "## Costs" in (folder / "page/study.md").read_text()
    assert (folder / "page/study.html").read_text().count("data:image/png;base64") == 3


def test_what_starts_from_a_reward_model_that_failed_is_left_out(folder):
    of = design()
    placed = [one for one in made_studies.placed(of, folder) if one.seed == 1]
    for one in placed:
        if one.run.name == "sft":
            made_studies.train(one)
    rm = next(one for one in placed if one.run.name == "rm")
    pathlib.Path(rm.gin_file).write_text("no gin\n")
    found = {one.run.name: said for one, said in run_commands.run_all(placed, of, folder / "logs")}
    assert found["sft"] == "" and found["rm"] != ""
    assert found["best_of_4"] == "best_of_4, seed 1: not started, since rm failed"


def test_declarations_that_cannot_be():
    run = Run(name="a", gin_file="tulu_tiny_sft.gin")
    for changes, said in (
        (dict(best_of=4, base="a"), "expected base and scored_by, and no overrides"),
        (dict(best_of=4, base="a", scored_by="a", overrides={"X": 1}), "and no overrides"),
        (dict(scored_by="c"), "scored_by = 'c' comes later"),
    ):
        later = Run(name="b", gin_file="tulu_tiny_sft.gin", **changes)
        last = Run(name="c", gin_file="tulu_tiny_sft.gin")
        with pytest.raises(validation.UsageError, match=said):
            Design(runs=(run, later, last), benchmarks=("tulu_tiny",), cells=())


def test_the_third_arm_of_the_study():
    """The same start and the same reward model as the two others, for each seed."""
    of = known_studies.get("dpo_vs_ppo").tiny
    chosen = [run for run in of.runs if run.best_of is not None]
    assert [run.best_of for run in chosen] == [1, 4, 16]
    for run in chosen:
        assert run.base == of.run("dpo").base == of.run("ppo").base == "sft"
        assert run.scored_by == of.run("ppo").reward == "rm" and run.tries == of.run("ppo").tries
    scored = {run.name for run in of.runs if run.scored_by}
    assert all(set(one.runs) <= scored for one in of.against)
