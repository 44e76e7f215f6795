"""The studies themselves, and the command: what it refuses, what it writes, one that runs."""

import contextlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys

import commands
import gin
import made_studies
import pytest

from tulu_jax import cli, validation
from tulu_jax.data import registry, tulu_tiny
from tulu_jax.data.sources import tiny_programs
from tulu_jax.evals import catalogue, paper_tables
from tulu_jax.studies import (
    declared,
    known_studies,
    origins,
    plan_table,
    run_commands,
    run_states,
)
from tulu_jax.studies.declared import Cell, Design, Run, Score

REPO = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, put_tokenizer):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    put_tokenizer(here / "cache/tulu_tiny_tokenizer")
    yield here
    gin.clear_config()


@pytest.mark.parametrize("name", known_studies.NAMES)
def test_every_run_of_every_study_is_a_config_that_builds(name, folder, request):
    if name == "small_model":  # whose tiny runs read a model from ../shared/data
        data = request.getfixturevalue("shared_data")
        (folder.parent / "shared").mkdir()
        (folder.parent / "shared/data").symlink_to(data.resolve())
    study = known_studies.get(name)
    assert study.name == name
    for scale in declared.SCALES:
        design = study.design(scale)
        assert not design.benchmarks or catalogue.names(design.benchmarks)
        placed = run_states.place(
            design, design.runs, configs=folder / scale, root="runs", below_bucket=scale == "paper"
        )
        for one in [p for p in placed if p.seed == p.run.tries[0]]:
            config = cli.load(one.gin_file, workdir=one.workdir)
            assert config.num_steps or config.num_epochs
            if scale == "tiny":
                assert one.seed is None or config.seed == config.data.seed == one.seed
                is_trained = one.run.is_trained
                base = pathlib.Path(config.base).name if one.run.base and is_trained else ""
                assert base.startswith((is_trained and one.run.base) or "")
        if scale == "tiny":
            assert design.expected


def test_tiny_studies_share_the_runs_of_one_name(folder):
    texts = {}
    for name in known_studies.NAMES:
        design = known_studies.get(name).tiny
        for run in design.runs if design else ():
            for seed in run.tries:
                text = run_states.gin_text(run, seed, run.base, run.reward)
                assert texts.setdefault((run.name, seed), text) == text, (name, run.name)


def test_cells_of_the_paper_are_those_of_its_tables():
    for number in "12356":
        found = next(n for n in known_studies.NAMES if n.startswith(f"table_{number}"))
        cells = known_studies.get(found).paper.cells
        for cell in cells:
            table, row, column = cell.paper
            assert table == number and column in (cell.score.benchmark, "output_length")
            assert paper_tables.cell(table, row, column) is not None
        assert len({cell.paper for cell in cells}) == len(cells)
    rows = {cell.paper[1] for cell in known_studies.get("table_2_mixtures").paper.cells}
    assert rows == set(paper_tables.tables()["2"].rows)


def test_declarations_that_cannot_be(folder):
    run, score = Run(name="a", gin_file="tulu_tiny_sft.gin"), Score(benchmark="tulu_tiny")

    def refused(match, **changes):
        with pytest.raises(validation.UsageError, match=match):
            Design(**(dict(runs=(run,), benchmarks=("tulu_tiny",), cells=()) | changes))

    refused("expected each name once", runs=(run, run))
    refused("no run is named b", cells=(Cell(run="a", minus="b", score=score),))
    both = [
        Run(name=name, gin_file="tulu_tiny_sft.gin", seeds=seeds, base=base)
        for name, seeds, base in (("d", (2, 1), None), ("e", (1, 2), "d"))
    ]
    refused(r"e: seeds = \(1, 2\), and \(2, 1\) of its base", runs=tuple(both))
    late = Run(name="b", gin_file="tulu_tiny_dpo.gin", base="c")
    last = Run(name="c", gin_file="tulu_tiny_sft.gin")
    refused("b: base = 'c' comes later", runs=(late, last))
    refused("the paper has no number", cells=(Cell(run="a", score=score, paper=("1", "x", "y")),))


def test_what_the_command_refuses(capsys):
    for flags, said in (
        (["--study=table_7"], "there is no such study; expected one of table_1_suite"),
        (["--study=table_3_dpo", "--only=dqo"], "no run is named 'dqo'; expected some of sft, dpo"),
        (["--study=table_3_dpo", "--plan", "--render"], "give one of --plan and --render"),
    ):
        assert commands.run("study", *flags) == 2
        assert said in capsys.readouterr().err


def test_a_study_of_one_scale_says_so():
    one = made_studies.study(made_studies.design())
    assert one.design("tiny") is one.tiny
    with pytest.raises(validation.UsageError, match="has no --scale=paper; expected --scale=tiny"):
        one.design("paper")


def test_only_brings_what_a_run_starts_from():
    design = known_studies.get("table_3_dpo").tiny
    assert [run.name for run in design.chosen(["dpo"])] == ["sft", "dpo"]
    assert [run.name for run in design.chosen(["sft"])] == ["sft"]


def test_at_paper_scale_launch_commands_are_written(folder, capsys):
    assert commands.run("study", "--study=table_5_qlora", "--scale=paper", "--only=qlora_7b") == 0
    script = folder / "studies/table_5_qlora_paper/launch.sh"
    text = script.read_text()
    assert "--type=v5litepod-8" in text and "--gin_file=qlora_7b.gin" in text
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    stand_in = folder / "launch"
    stand_in.mkdir()
    (stand_in / "tpu_vm.sh").write_text('printf "%s\\n" "$@"\n')
    (folder / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (folder / "python").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}", "BUCKET": "gs://b/tulu", "ZONE": "z",
        "EVAL_DATA": "/eval data",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", script], env=environment, capture_output=True, text=True, check=True
    )
    given = done.stdout.split("\n")
    assert given.count("--gin.BUCKET='gs://b/tulu'") == 2
    assert given.count("--workdir=gs://b/tulu/runs/qlora_7b") == 2
    assert "--eval_data=/eval data" in given and "watch" in given
    page = (folder / "studies/table_5_qlora_paper/study.md").read_text()
    assert "qlora_7b: no checkpoint in runs/qlora_7b" in page and "left out by --only" in page


def test_launch_scripts_ask_for_no_more_than_a_study_wants(folder):
    for name, only in (("figure_1_lengths", []), ("dpo_stability", ["--only=sft_7b"])):
        assert commands.run("study", f"--study={name}", "--scale=paper", *only) == 0
        text = (folder / f"studies/{name}_paper/launch.sh").read_text()
        assert "tulu_jax.evaluate" not in text
        assert ("tulu_jax.prepare" in text) == (name == "figure_1_lengths")
        assert ("tpu_vm.sh watch" in text) == (name == "dpo_stability")


def test_families_and_languages_of_tulu_tiny():
    whole = {
        tuple(m["content"] for m in row["messages"])
        for row in registry.TaskRegistry.get("tulu_tiny").sources["train"]()
    }
    parts = [
        registry.TaskRegistry.get(f"tulu_tiny.{name}").sources["train"]()
        for name in tulu_tiny.FAMILIES
    ]
    texts = [{tuple(m["content"] for m in row["messages"]) for row in rows} for rows in parts]
    assert set().union(*texts) == whole and sum(map(len, texts)) == len(whole)
    german = registry.TaskRegistry.get(tulu_tiny.GERMAN)
    held = {row["messages"][0]["content"] for row in german.sources["validation"]()}
    assert held and not held & {row["messages"][0]["content"] for row in german.sources["train"]()}
    polite, terse = (
        registry.TaskRegistry.get(name).sources["train"]()
        for name in ("tulu_tiny_preference", tulu_tiny.TERSE_PREFERENCE)
    )
    for one, other in zip(polite, terse, strict=True):
        assert (one["chosen"], one["rejected"]) == (other["rejected"], other["chosen"])
    (asked,) = catalogue.make(["tulu_tiny_german"], subset="paper", settings=[], allow_altered=True)
    groups = {request.group for request in asked.requests(None, None, is_chat=True)}
    assert groups == {"erstes", "letztes", "gegenteil", "mixed"}


def test_programs_print_what_their_rows_say():
    rows = [
        row["messages"]
        for split in registry.SPLITS
        for row in registry.TaskRegistry.get(tulu_tiny.PROGRAMS).sources[split]()
    ]
    for asked, said in {(a["content"], s["content"]) for a, s in rows}:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(asked, {})
        assert printed.getvalue() == f"{said}\n", asked
    sources = registry.TaskRegistry.get(tulu_tiny.PROGRAMS).sources
    train, held = (
        {row["messages"][0]["content"] for row in sources[split]()}
        for split in ("train", "validation")
    )
    assert train and held and not train & held
    (asked,) = catalogue.make([tulu_tiny.PROGRAMS], subset="paper", settings=[], allow_altered=True)
    requests = asked.requests(None, None, is_chat=True)
    assert {request.prompt[0]["content"] for request in requests} == held
    assert {request.group for request in requests} == set(tiny_programs.FAMILIES)


def test_a_base_is_evaluated_as_its_file_starts_from(folder):
    runs = (
        Run(name="base", gin_file="tulu_tiny_sft.gin", initial="none"),
        Run(name="sft", gin_file="tulu_tiny_sft.gin"),
    )
    design = Design(
        runs=runs, benchmarks=("tulu_tiny", "tulu_tiny_german"),
        cells=(Cell(run="base", score=Score(benchmark="tulu_tiny")),),
    )  # fmt: skip
    base, sft = run_states.place(
        design, design.runs, configs=folder / "configs", root="runs", below_bucket=True
    )
    state = run_states.state(base)
    assert state.kind == run_states.DONE and run_states.state(sft).kind == run_states.MISSING
    # What no cell wants of a base is not asked of it.
    assert run_commands.lacking(base, state, design) == ["tulu_tiny"]
    assert plan_table.there(base, state, design) == "not evaluated on tulu_tiny"
    command = run_commands.evaluate(base, design, ["tulu_tiny"], state.folder)
    assert {"--initial", "--chat=none"} < set(command)
    assert state.folder == pathlib.Path("runs/base/evals/initial")
    text = run_commands.launch_script([base, sft], {"base": "v5e_8", "sft": "v5e_8"}, design)
    assert text.count("tpu_vm.sh watch") == 1 and text.count("--initial --chat=none") == 1
    assert not list(origins.differences([base], {"base": state}, design))
    for wrong in (dict(base="sft"), dict(only_prepared=True)):
        with pytest.raises(validation.UsageError, match="initial is what its file starts from"):
            run = Run(name="b", gin_file="tulu_tiny_sft.gin", initial="none", **wrong)
            Design(runs=(runs[1], run), benchmarks=(), cells=())


def test_a_study_takes_no_chips_from_its_runs(folder):
    """What looks at checkpoints asks for no device but a CPU, whatever the environment has."""
    design = known_studies.get("table_3_dpo").tiny
    placed = run_states.place(
        design, design.runs[:1], configs=folder / "studies/table_3_dpo_tiny/configs",
        root="studies/runs", below_bucket=False,
    )  # fmt: skip
    made_studies.train(placed[0])
    done = subprocess.run(
        [sys.executable, "-m", "tulu_jax.study", "--study=table_3_dpo", "--only=sft", "--plan"],
        env=os.environ | {"PYTHONPATH": str(REPO), "JAX_PLATFORMS": "none_such"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "unfinished" in done.stdout or "trained" in done.stdout


def test_a_run_that_fails_is_named_and_what_starts_from_it_is_left_out(folder):
    runs = (
        Run(name="a", gin_file="no_such.gin", seeds=(1,)),
        Run(name="b", gin_file="tulu_tiny_dpo.gin", seeds=(1,), base="a"),
    )
    design = Design(runs=runs, benchmarks=(), cells=())
    placed = run_states.place(
        design, design.runs, configs=folder / "configs", root="runs", below_bucket=False
    )
    (a, b) = (problem for _, problem in run_commands.run_all(placed, design, folder / "logs"))
    assert a.startswith("a, seed 1: tulu_jax.train ended with status 2; ")
    assert "include 'no_such.gin' was not found" in a
    assert b == "b, seed 1: not started, since a failed"


def test_as_many_runs_as_cores_are_started_and_none_is_left_when_it_stops(folder):
    design = Design(
        runs=tuple(Run(name=n, gin_file="tulu_tiny_sft.gin", seeds=(1,)) for n in "abcdefgh"),
        benchmarks=(), cells=(),
    )  # fmt: skip
    placed = run_states.place(
        design, design.runs, configs=folder / "configs", root="runs", below_bucket=False
    )

    def stop(*_):
        raise InterruptedError

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(2)
    try:
        with pytest.raises(InterruptedError):
            next(run_commands.run_all(placed, design, folder / "logs"))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    cores = len(os.sched_getaffinity(0))
    logs = sorted(path.name for path in (folder / "logs").iterdir())
    assert logs == [f"{one.run.name}.seed_1.train.log" for one in placed[:cores]]
    left = [
        path for path in pathlib.Path("/proc").glob("[0-9]*/cmdline")
        if str(folder).encode() in path.read_bytes()
    ]  # fmt: skip
    assert not left


@pytest.mark.slow  # processes of train and evaluate
def test_a_study_runs_and_goes_on_run_by_run(folder):
    def study(*flags):
        return subprocess.run(
            [sys.executable, "-m", "tulu_jax.study", "--study=table_3_dpo", "--only=sft", *flags],
            env=os.environ | {"PYTHONPATH": str(REPO), "XLA_FLAGS": ""},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    out, runs = folder / "studies/table_3_dpo_tiny", folder / "studies/runs"
    first = study()
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.count("tulu_jax.train") == 3 == first.stdout.count("tulu_jax.evaluate")
    assert sorted(path.name for path in runs.glob("sft.*")) == [f"sft.seed_{n}" for n in (1, 2, 3)]
    again = study()
    assert again.returncode == 0 and "tulu_jax.train" not in again.stdout
    content = json.loads((out / "study.json").read_text())
    assert [row["state"] for row in content["runs"]] == ["done"] * 3
    assert all(row["wall time"] and row["data"] and row["versions"] for row in content["runs"])
    assert content["cells"][0]["numbers"]["ours"] > 5
