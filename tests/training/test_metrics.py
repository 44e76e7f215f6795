"""What a run writes of its metrics: JSON that every reader takes, and one run at W&B."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import types

import pytest

from tulu_jax import report, strict_json, validation
from tulu_jax.evals import held_out_prompts
from tulu_jax.training import metrics


def refuse(token):
    raise AssertionError(f"{token} is not JSON")


def record(workdir, start_step=0, **settings):
    config = metrics.LoggingConfig(tensorboard=False, **settings)
    return metrics.Recorder(config, str(workdir), start_step, {"seed": 1})


def test_what_is_not_finite_is_null_and_no_point_of_a_curve(tmp_path):
    recorder = record(tmp_path)
    recorder.write(0, {"eval/loss": float("nan"), "eval/kl": float("-inf")})
    recorder.write(1, {"eval/loss": 2.5})
    recorder.close()
    for line in (tmp_path / metrics.FILE).read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    record(tmp_path, start_step=1).close()  # a resumed run writes its lines again
    lines = metrics.read(str(tmp_path))
    assert lines[0] == {"step": 0, "eval/loss": None, "eval/kl": None}
    assert report.series(lines, "eval/loss") == ([1], [2.5])
    assert report.matching(lines, ("eval/*",)) == ["eval/loss"]


RESUMER = """
import sys
from tulu_jax.training import metrics
config = metrics.LoggingConfig(tensorboard=False)
print("ready", flush=True)
while True:
    recorder = metrics.Recorder(config, sys.argv[1], 1000, {})
    for step in range(1001, 1050):
        recorder.write(step, {"train/loss": 1.0})
    recorder.close()
"""


def test_a_kill_while_a_run_resumes_loses_no_line(tmp_path):
    """Runs that do nothing but resume from step 1000 and write some lines, each killed."""
    recorder = record(tmp_path)
    for step in range(1001):
        recorder.write(step, {"train/loss": 1 / (step + 1)})
    recorder.close()
    before = metrics.read(str(tmp_path))
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", RESUMER, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        assert process.stdout.readline() == "ready\n"
        time.sleep(random.SystemRandom().uniform(0.1, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        after = metrics.read(str(tmp_path))
        assert after[:1001] == before
        assert [line["step"] for line in after] == list(range(len(after)))


def test_a_run_that_begins_again_has_step_0_once(tmp_path):
    for _ in range(2):
        recorder = record(tmp_path)
        recorder.write(0, {"eval/loss": 2.0})
        recorder.close()
    assert metrics.read(str(tmp_path)) == [{"step": 0, "eval/loss": 2.0}]


@pytest.mark.parametrize("text", ["my notes", "[1, 2]\n", '{"a": 1}\n', "1.5,2\n"])
def test_a_file_of_that_name_that_no_run_wrote_stays(tmp_path, text):
    (tmp_path / metrics.FILE).write_text(text)
    with pytest.raises(validation.UsageError, match=r"metrics\.jsonl has a line"):
        record(tmp_path)
    assert (tmp_path / metrics.FILE).read_text() == text


def test_the_page_of_a_run_escapes_what_it_shows(tmp_path):
    recorder = record(workdir := tmp_path / "run & <1>")
    recorder.write(1, {"train/loss": 2.5})
    recorder.close()
    reply = [{"prompt": "a<b", "answer": "red", "reply": "<script>"}]
    held_out_prompts.save(str(workdir), 1, {"exact_match": 0.5}, reply)
    page = report.page([str(workdir)])
    assert "<h2>run &amp; &lt;1&gt;</h2>" in page and page.count("data:image/png;base64,iVBOR") == 1
    rows = re.findall(r"<tr>(.*)</tr>", page)
    assert rows == [
        "<th>metric</th><th>first</th><th>last</th>",
        "<td>train/loss</td><td>2.5000</td><td>2.5000</td>",
        "<th>held-out prompts of tulu_tiny, at update 1</th><th>share</th>",
        "<td>exact_match</td><td>0.500</td>",
        "<th>prompt</th><th>right answer</th><th>reply</th>",
        "<td>a&lt;b</td><td>red</td><td>&lt;script&gt;</td>",
    ]


def test_nested_numbers_that_are_not_finite():
    text = strict_json.dumps({"a": [1.5, float("nan"), (float("inf"), "x")], "b": None})
    assert json.loads(text, parse_constant=refuse) == {"a": [1.5, None, [None, "x"]], "b": None}


@pytest.fixture
def wandb(monkeypatch):
    """Stands in for the package, which is not a requirement; `calls` are those of `init`."""
    calls = []

    def init(**arguments):
        calls.append(arguments)
        return types.SimpleNamespace(log=lambda *a, **k: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return calls


def test_every_try_of_a_workdir_is_one_run_at_wandb(tmp_path, wandb):
    for workdir, start_step in (("a", 0), ("a", 5), ("b", 0)):
        record(tmp_path / workdir, start_step, wandb_project="tulu").close()
    first, again, other = wandb
    assert first["id"] == again["id"] != other["id"]
    assert {call["resume"] for call in wandb} == {"allow"}
    assert (first["project"], first["name"]) == ("tulu", "a")


def test_wandb_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(validation.UsageError, match="pip install wandb"):
        record(tmp_path, wandb_project="tulu")


def test_a_workdir_without_metrics_and_a_broken_line(tmp_path):
    with pytest.raises(
        validation.UsageError, match="does not exist; expected the workdir of a run"
    ):
        metrics.read(str(tmp_path))
    (tmp_path / metrics.FILE).write_text('{"step": 1}\n{"step": \n')
    with pytest.raises(validation.UsageError, match="a line that is not JSON"):
        metrics.read(str(tmp_path))


def test_tensorboard_does_not_bring_torch():
    """Which would be most of a start."""
    code = "import sys; from tulu_jax.training import metrics; metrics._tensorboard();"
    code += "print([name for name in ('torch', 'tensorboardX') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['tensorboardX']"
