"""A study's page from folders of runs: numbers, verdicts, and every kind of hole by its name."""

import dataclasses
import json
import pathlib

import gin
import made_studies as made
import pytest

from tulu_jax import report, validation
from tulu_jax.studies import plan_table, run_states, study_page
from tulu_jax.studies.declared import CHARACTERS, Cell, Design, Score


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, put_tokenizer):
    monkeypatch.chdir(tmp_path)
    put_tokenizer(tmp_path / "cache/tulu_tiny_tokenizer")
    yield tmp_path
    gin.clear_config()


def written(of: Design, folder: pathlib.Path, only=()):
    placed = made.placed(of, folder, only)
    states = {one.name: run_states.state(one) for one in placed}
    return study_page.write(made.study(of), "tiny", placed, states, folder / "page")


def test_a_whole_study(folder):
    length = Score(benchmark="tulu_tiny", metric=CHARACTERS)
    of = made.design(cells=(*made.design().cells, Cell(run="sft", score=length)))
    for number, one in enumerate(made.placed(of, folder)):
        made.train(one)
        made.evaluate(one, right=(10, 20, 12, 30)[number])
    found = written(of, folder)
    assert found["holes"] == [] and found["differences"] == []
    sft, apart, characters = (cell["numbers"] for cell in found["cells"])
    assert sft["by_seed"] == {"1": 25.0, "2": 30.0} and sft["ours"] == 27.5
    assert sft["difference"] == pytest.approx(27.5 - 11.2)
    assert apart["by_seed"] == {"1": 25.0, "2": 45.0} and apart["ours"] == 35.0
    assert characters["ours"] == pytest.approx((made.ITEMS + 1) / 2)
    (held,) = found["expected"]
    assert (held["holds"], held["seeds"]) == (2, 2)
    page = (folder / "page/study.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "<made>" not in page
    assert "A &lt;made&gt; study" in page and 'src="' not in page and "http" not in page
    text = (folder / "page/study.md").read_text()
    assert "| dpo − sft | tulu_tiny, exact_match |" in text and "it rises" in text
    assert json.loads((folder / "page/study.json").read_text()) == found
    assert found["varied"]["batch_size"] == {"sft": "4", "dpo": "8"}


def test_verdicts_tell_noise_from_a_difference(folder):
    of = made.design(runs=made.design().runs[:1], cells=made.design().cells[:1], expected=())
    for right, verdict in ((5, "within noise"), (38, "differs")):
        for one in made.placed(of, folder / verdict):
            made.train(one)
            made.evaluate(one, right=right)  # the cell of the paper is 11.2
        (cell,) = written(of, folder / verdict)["cells"]
        assert cell["verdict"] == verdict and cell["paper"] == "11.2"


def test_every_hole_is_named(folder):
    of = made.design()
    sft_1, dpo_1, sft_2, _ = made.placed(of, folder)
    made.train(sft_1)
    made.evaluate(sft_1, right=20)
    made.train(sft_2, step=2)
    made.train(dpo_1)
    found = written(of, folder)
    holes = "\n".join(found["holes"])
    assert "sft, seed 2: unfinished, at step 2 of 4" in holes
    assert "dpo, seed 1: evaluation pending on tulu_tiny" in holes
    assert "dpo, seed 2: no checkpoint in " in holes
    assert "seeds unequal: sft, tulu_tiny, exact_match: of seeds 1, 2 only 1" in holes
    assert "dpo − sft, tulu_tiny, exact_match has no value: dpo, seed 1: not evaluated" in holes
    assert "“it rises” cannot be told" in holes
    assert [cell["ours"] for cell in found["cells"]][1] == "—"
    assert found["cells"][1]["verdict"] == "no value"
    made.evaluate(dpo_1, right=3, pending=True)
    assert "tulu_tiny waits for a judge" in "\n".join(written(of, folder)["holes"])


def test_a_run_of_another_config_is_a_hole_with_its_fields(folder):
    of = made.design(runs=made.design().runs[:1], cells=made.design().cells[:1], expected=())
    one, *_ = made.placed(of, folder)
    made.train(one)
    made.evaluate(one, right=20)
    changed = dict(made.SMALL, LEARNING_RATE=0.5)
    other = made.design(
        runs=(dataclasses.replace(of.runs[0], overrides=changed),), cells=of.cells, expected=()
    )
    found = written(other, folder)
    assert found["holes"][0] == (
        "sft, seed 1: optimizer.learning_rate = 0.0015, expected 0.5; train it again elsewhere "
        "(--out), or move it away"
    )
    assert found["cells"][0]["ours"] == "—"


def test_runs_that_differ_beyond_the_study_are_told(folder):
    of = made.design(varies=("objective", "data.", "batch_size", "eval_every"))
    for number, one in enumerate(made.placed(of, folder)):
        made.train(one, git="ab"[number % 2] * 40)
        made.evaluate(one, right=20)
    pathlib.Path(one.workdir, "provenance.json").unlink()
    said = "\n".join(written(of, folder)["differences"])
    assert "config: optimizer.learning_rate is 0.0015 for sft, seed 1, sft, seed 2; 7e-05" in said
    assert "provenance: there is none of dpo, seed 2" in said
    assert f"revision: {'a' * 40} for sft, seed 1, sft, seed 2; {'b' * 40} for dpo, seed 1" in said
    assert "config: objective" not in said


def test_a_report_has_runs_side_by_side(folder):
    of = made.design()
    placed = made.placed(of, folder)
    for one in placed[:3]:
        made.train(one)
        made.evaluate(one, right=20)
    (pathlib.Path(placed[2].workdir) / "config.gin").write_text("x = 1\n")
    page = report.page([one.workdir for one in placed[:3]])
    assert page.count("data:image/png;base64,") == 4 and "Side by side" in page
    assert "<td>batch_size</td><td>4</td><td>8</td>" in page
    assert "<td>data.max_length</td>" not in page  # which is the same in both
    assert "<td>sft.seed_2</td><td>config.gin: " in page and "Configs that cannot be read" in page
    assert "<td>tulu_tiny.paper</td><td>exact_match</td><td>50.0 ± 15.5</td>" in page
    assert "3 s</td>" in page and "1 × cpu (cpu)" in page
    alone = report.page([placed[0].workdir])
    assert "Side by side" not in alone


def test_a_plan_names_hours_or_the_dry_run_that_finds_them(folder):
    of = made.design()
    placed = made.placed(of, folder)
    states = {one.name: run_states.state(one) for one in placed}
    dry = folder / "dry"
    (dry / "sft").mkdir(parents=True)
    (dry / "sft/dryrun.json").write_text('[{"fits": true, "hours": 2.0, "chip_hours": 64.0}]')
    options = dict(on_slices=True, dry_runs=str(dry))
    said = "\n".join(plan_table.lines(placed, states, of, **options))
    assert "Together 4.0 hours, 128 chip-hours" in said and "missing" in said
    assert f"python -m tulu_jax.dryrun --gin_file={placed[1].gin_file} --out={dry}/dpo" in said
    (dry / "sft/dryrun.json").write_text("[]")
    with pytest.raises(validation.UsageError, match="is no result of a dry run"):
        plan_table.lines(placed, states, of, **options)
