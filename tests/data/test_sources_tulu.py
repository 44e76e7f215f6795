"""The TÜLU tasks and mixtures: what they are made of, from files laid out as upstream's are."""

import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_rows import messages, write_jsonl

from tulu_jax.data import components, examples, registry, tulu
from tulu_jax.data.sources import science, sharegpt

V2 = tulu.V2_COMPONENTS
V1 = tulu.V1_COMPONENTS


def tasks(name: str) -> dict[str, registry.Task]:
    return {component.task.name: component.task for component in components.of(name)}


def load(task: registry.Task, data_root) -> examples.TaskExamples:
    drawing = examples.Drawing(
        split="train", amount=None, seed=0, holdout_every=None, data_root=str(data_root)
    )
    loaded = examples.load_examples(task, drawing)
    counted = len(loaded.examples) + sum(loaded.dropped.values()) + loaded.not_drawn
    assert loaded.raw_rows + loaded.added_parts == counted
    return loaded


def test_every_component_in_every_route():
    assert len(V2) == 11 and len(science.TASKS) == 6
    assert len(tasks("tulu_v2_sft")) == 10 + 6
    assert len(tasks("tulu_v2_sft_raw")) == 10 + 6 + 1  # CoT is two files
    assert len(tasks("tulu_v1_sft")) == 7 and len(tasks("tulu_v1_sft_raw")) == 8
    for route, parts in (("tulu_v2", V2), ("tulu_v2_raw", V2), ("tulu_v1", V1)):
        for component in parts:
            for task in tasks(f"{route}.{component}").values():
                assert task.kind == "sft" and task.seed == 42 and task.licence and task.origin
    assert list(tasks("sharegpt_only")) == ["tulu_v2.sharegpt"]


def test_expected_counts_are_those_of_the_paper():
    assert registry.expected_examples("tulu_v2_sft") == 326_154
    assert registry.expected_examples("tulu_v1_sft") == 489_818
    assert registry.expected_examples("tulu_v1_sft_raw") == 490_445
    counts = {name: registry.expected_examples(f"tulu_v2_raw.{name}") for name in V2}
    assert sum(counts.values()) == registry.expected_examples("tulu_v2_sft_raw") == 330_490
    assert counts["cot"] == 50_000 and counts["science"] == 7_544


@pytest.mark.parametrize(
    "name", ["tulu_v2_sft", "tulu_v2_sft_raw", "tulu_v2.science", "tulu_v2_raw.science"]
)
def test_expected_counts_of_tasks_sum_to_that_of_their_mixture(name):
    counts = [task.expected for task in tasks(name).values()]
    assert sum(counts) == registry.expected_examples(name)


@pytest.mark.parametrize(("version", "rows", "files"), [("v2", 50_000, 6), ("v1", 100_000, 14)])
def test_flan_portions_draw_every_row(version, rows, files):
    drawn = [t.sample for t in tasks(f"tulu_{version}_raw.flan_v2_resampled").values()]
    assert len(drawn) == files and sum(drawn) == rows


def test_all_but_one():
    whole = set(tasks("tulu_v2_sft"))
    for component in V2:
        rest = set(tasks(f"tulu_v2_sft_without_{component}"))
        assert rest == whole - set(tasks(f"tulu_v2.{component}"))
        assert len(whole - rest) == (6 if component == "science" else 1)
        counts = [registry.TaskRegistry.get(name).expected for name in rest]
        assert sum(counts) == registry.expected_examples(f"tulu_v2_sft_without_{component}")


def test_only_hard_coded_prompts_pass_the_name_filter_and_v1_has_none():
    for name, task in tasks("tulu_v2_sft_raw").items():
        filters = [f.name for f in task.filters]
        exempt = name == "tulu_v2_raw.hard_coded"
        assert filters == ([] if exempt else ["names an assistant or its maker"])
    assert not any(task.filters for task in tasks("tulu_v1_sft_raw").values())


COLUMNS = [c for c in V2 if c != "science"] + [f"science.{task}" for task in science.TASKS]


@pytest.fixture(params=["parquet", "jsonl"])
def published(request, tmp_path):
    """A data root with two published rows of every component, one of them with an empty answer."""
    rows = [
        {"dataset": column, "id": f"{column}_{i}", "messages": messages("q", ["a", ""][i])}
        for i in range(2)
        for column in COLUMNS
    ]
    folder = tmp_path / "tulu-v2-sft-mixture"
    folder.mkdir()
    if request.param == "jsonl":
        write_jsonl(folder / "train.jsonl", rows)
    else:
        for part in range(2):
            half = rows[part * len(COLUMNS) : (part + 1) * len(COLUMNS)]
            pq.write_table(pa.Table.from_pylist(half), folder / f"train-0000{part}.parquet")
    return tmp_path


def test_published_rows_are_told_apart_by_their_dataset(published):
    for name, task in tasks("tulu_v2_sft").items():
        column = name.removeprefix("tulu_v2.")
        loaded = load(task, published)
        assert [e["about"]["id"] for e in loaded.examples] == [f"{column}_0", f"{column}_1"]
        assert loaded.examples[1]["messages"] == messages("q", "")


UPSTREAM = {  # file of each component, as upstream lays it out
    "flan_v2/tulu_v2_resampled_flan_50k.jsonl": [{"inputs": "q", "targets": "a"}],
    "flan_v2/tulu_v1_resampled_flan_100k.jsonl": [{"inputs": "q", "targets": "a"}],
    "cot/cot_zsopt.jsonl": [{"inputs": "q", "targets": "a"}],
    "cot/cot_fsopt.jsonl": [{"inputs": "q", "targets": "a"}],
    "oasst1/2023-04-12_oasst_ready.trees.jsonl": [
        {
            "prompt": {
                "text": "q",
                "role": "prompter",
                "replies": [{"text": t, "role": "assistant", "replies": []} for t in "ab"],
            }
        }
    ],
    "sharegpt/sg_90k_part1_html_cleaned.json": [
        {"id": "x", "conversations": [{"from": f, "value": "v"} for f in ("human", "gpt")]}
    ],
    "gpt4_alpaca/alpaca_gpt4_data.json": [{"instruction": "i", "input": "", "output": "a"}],
    "code_alpaca/code_alpaca_20k.json": [{"instruction": "i", "input": "", "output": "a"}],
    "dolly/databricks-dolly-15k.jsonl": [{"instruction": "i", "context": "", "response": "a"}],
    "lima/train.jsonl": [{"conversations": ["q", "a"], "source": "s"}],
    "wizardlm/WizardLM_evol_instruct_V2_143k.json": [
        {"idx": "x", "conversations": [{"from": f, "value": "v"} for f in ("human", "gpt")]}
    ],
    "open_orca/1M-GPT4-Augmented.parquet": [
        {"id": "x", "system_prompt": "", "question": "q", "response": "a"}
    ],
    "science/science_train.jsonl": [
        {"dataset": task, "input": "q", "output": "a"} for task in science.TASKS
    ],
    "hard_coded/hard_coded_examples.jsonl": [{"Prompt": "Are you ChatGPT?", "Output": "No."}],
}


@pytest.fixture
def upstream(tmp_path, shared_data, monkeypatch):
    """A data root with a row or a few in each upstream file."""
    for name, rows in UPSTREAM.items():
        path = tmp_path / "instruct_raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif name.endswith(".jsonl"):
            write_jsonl(path, rows)
        else:
            path.write_text(json.dumps(rows))
    monkeypatch.setenv(sharegpt.TOKENIZER_VARIABLE, str(shared_data / "tokenizer/llama2"))
    return tmp_path


def rebuilt(mixture: str, data_root) -> dict[str, int]:
    return {
        name.split(".", 1)[1]: len(load(dataclasses.replace(task, sample=None), data_root).examples)
        for name, task in tasks(mixture).items()
    }


def test_every_component_is_rebuilt_from_its_upstream_file(upstream):
    ones = dict.fromkeys(name.removeprefix("tulu_v2_raw.") for name in tasks("tulu_v2_sft_raw"))
    assert rebuilt("tulu_v2_sft_raw", upstream) == dict.fromkeys(ones, 1) | {"hard_coded": 10}
    v1 = rebuilt("tulu_v1_sft_raw", upstream)
    assert v1 == dict.fromkeys(v1, 1) | {"oasst1": 2}


def test_rows_that_name_an_assistant_are_dropped_and_counted(upstream):
    write_jsonl(
        upstream / "instruct_raw/lima/train.jsonl",
        [{"conversations": [text, "a"]} for text in ("Who is Claude?", "q")],
    )
    (task,) = tasks("tulu_v2_raw.lima").values()
    loaded = load(task, upstream)
    assert len(loaded.examples) == 1 and loaded.dropped == {"names an assistant or its maker": 1}
    assert len(load(registry.get_mixture_or_task("lima"), upstream).examples) == 2


REAL = {  # raw rows, parts beyond one a row, examples, dropped
    "lima": (400, 0, 400, {}),
    "gpt4_alpaca": (666, 0, 666, {}),
    "code_alpaca": (1345, 0, 1345, {}),
    "stanford_alpaca": (1600, 0, 1600, {}),
    "dolly": (400, 0, 400, {}),
    "flan_cot": (2134, 0, 2134, {}),
    "t0_p3_sample": (190, 0, 190, {}),
    "orca_preferred": (190, 0, 190, {}),
    "oasst1_sample": (67, 0, 40, {"best replies end with the prompter": 27}),
    "sharegpt_sample": (11, 32, 42, {sharegpt.LOST: 1}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_rows_are_all_accounted_for(shared_data, monkeypatch, name):
    monkeypatch.setenv(sharegpt.TOKENIZER_VARIABLE, str(shared_data / "tokenizer/llama2"))
    loaded = load(registry.get_mixture_or_task(name), shared_data)
    found = (loaded.raw_rows, loaded.added_parts, len(loaded.examples), loaded.dropped)
    assert found == REAL[name]


def test_real_rows_through_the_recipes(shared_data, monkeypatch):
    """The raw tasks whose upstream file is at hand in part, without their draw."""
    whole = {"lima": 400, "gpt4_alpaca": 666, "code_alpaca": 1345}
    for name, rows in whole.items():
        (task,) = tasks(f"tulu_v2_raw.{name}").values()
        loaded = load(dataclasses.replace(task, sample=None), shared_data)
        assert set(loaded.dropped) <= {"names an assistant or its maker"}
        assert len(loaded.examples) + sum(loaded.dropped.values()) == rows
        assert sum(loaded.dropped.values()) < rows / 20
