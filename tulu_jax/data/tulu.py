"""Registers the instruction data of TÜLU V2 and V1: tasks, and mixtures of them.

Families of names; `docs/data.md` has what to download, where to put it, licences and counts:

    tulu_v2.<component>      rows of the published mixture, allenai/tulu-v2-sft-mixture
    tulu_v2_raw.<component>  the component rebuilt from its upstream files by V2's rules
    tulu_v1.<component>      rows of the published V1 mixture, allenai/tulu-v1-sft-mixture
    tulu_v1_raw.<component>  the component rebuilt from its upstream files by V1's rules
    lima, dolly, ...         whole upstream files, converted and neither sampled nor filtered

Mixtures: tulu_v2_sft (the published rows), tulu_v2_sft_raw, tulu_v1_sft, tulu_v1_sft_raw,
sharegpt_only, and tulu_v2_sft_without_<component> for each component.
Paths are relative to the data root. Rules and counts: arXiv 2311.10702 §2 and open-instruct's
`reformat_datasets.py` of November 2023.
"""

import functools
from collections.abc import Callable

from tulu_jax.data.registry import Files, Mixture, MixtureRegistry, Task, TaskRegistry
from tulu_jax.data.sources import (
    conversations,
    flan,
    hard_coded,
    instruct,
    name_filter,
    oasst,
    orca,
    published,
    science,
    sharegpt,
)

SEED = 42
VERSION = "1"  # raised when what a converter or filter gives changes
V2_COMPONENTS = (
    "flan_v2",
    "cot",
    "oasst1",
    "sharegpt",
    "gpt4_alpaca",
    "code_alpaca",
    "lima",
    "wizardlm",
    "open_orca",
    "science",
    "hard_coded",
)
V1_COMPONENTS = ("flan_v2", "cot", "oasst1", "dolly", "gpt4_alpaca", "code_alpaca", "sharegpt")

V2_ROWS, V2_RAW_ROWS = 326_154, 330_490  # after and before the name filter
V1_ROWS, V1_RAW_ROWS = 489_818, 490_445  # on the hub, and in the paper
# Rows of the published mixture as a public reader of it counts them; they sum to V2_ROWS, and those
# of cot, lima, hard_coded and science agree with open-instruct's `tulu2_7b_remix.yaml` and §2.
V2_PUBLISHED = {
    "flan_v2": 49_123,
    "cot": 49_747,
    "oasst1": 7_331,
    "sharegpt": 111_912,
    "gpt4_alpaca": 19_906,
    "code_alpaca": 20_016,
    "lima": 1_018,
    "wizardlm": 29_810,
    "open_orca": 29_683,
    "hard_coded": 140,
}
SCIENCE = {  # rows before and after the name filter; of SciERC's 700 before, the paper has the sum
    "evidence_inference": (1_678, 1_674),
    "qasper_truncated_4000": (2_255, 2_218),
    "scierc_ner": (350, 349),
    "scierc_relation": (350, 349),
    "scifact_json": (919, 919),
    "scitldr_aic": (1_992, 1_959),
}
# Share of each FLAN v2 submixture; V2 keeps few-shot templates only and drops dialog.
FLAN_V2_PORTIONS = {
    "flan_fsopt": 0.2,
    "flan_fsnoopt": 0.2,
    "t0_fsopt": 0.16,
    "t0_fsnoopt": 0.16,
    "niv2_fsopt": 0.23,
    "cot_fsopt": 0.05,
}
FLAN_V1_PORTIONS = {
    "flan_zsopt": 0.1,
    "flan_fsopt": 0.1,
    "flan_zsnoopt": 0.1,
    "flan_fsnoopt": 0.1,
    "t0_zsopt": 0.08,
    "t0_fsopt": 0.08,
    "t0_zsnoopt": 0.08,
    "t0_fsnoopt": 0.08,
    "niv2_zsopt": 0.1,
    "niv2_fsopt": 0.1,
    "cot_zsopt": 0.025,
    "cot_fsopt": 0.025,
    "dialog_zsopt": 0.015,
    "dialog_fsopt": 0.015,
}

LICENCES = {
    "flan_v2": "Apache-2.0",
    "cot": "Apache-2.0",
    "oasst1": "Apache-2.0",
    "sharegpt": "Apache-2.0 as its mirror states; conversations of users of ChatGPT",
    "gpt4_alpaca": "CC BY-NC 4.0",
    "code_alpaca": "CC BY-NC 4.0",
    "stanford_alpaca": "CC BY-NC 4.0",
    "lima": "CC BY-NC-SA, or stricter as its sources",
    "wizardlm": "CC BY-NC 4.0",
    "open_orca": "MIT",
    "science": "as its sources; ODC-BY as published",
    "hard_coded": "ODC-BY as published",
    "dolly": "CC BY-SA 3.0",
}
ORIGINS = {
    "flan_v2": "Hugging Face hub: hamishivi/tulu_mix_store",
    "cot": "Hugging Face hub: hamishivi/tulu_mix_store",
    "oasst1": "Hugging Face hub: OpenAssistant/oasst1, 2023-04-12_oasst_ready.trees.jsonl.gz",
    "sharegpt": "Hugging Face hub: anon8231489123/ShareGPT_Vicuna_unfiltered, "
    "folder HTML_cleaned_raw_dataset",
    "gpt4_alpaca": "GitHub: Instruction-Tuning-with-GPT-4/GPT-4-LLM, data/alpaca_gpt4_data.json",
    "code_alpaca": "GitHub: sahil280114/codealpaca, data/code_alpaca_20k.json",
    "stanford_alpaca": "GitHub: tatsu-lab/stanford_alpaca, alpaca_data.json",
    "lima": "Hugging Face hub: GAIR/lima, train.jsonl (on request)",
    "wizardlm": "Hugging Face hub: ai2-adapt-dev/wizardlm-backup (the original, "
    "WizardLM/WizardLM_evol_instruct_V2_196k, lacks its file since)",
    "open_orca": "Hugging Face hub: Open-Orca/OpenOrca, 1M-GPT4-Augmented.parquet",
    "science": "Hugging Face hub: hamishivi/tulu_mix_store, science_train.jsonl",
    "hard_coded": "Hugging Face hub: hamishivi/tulu_mix_store, hard_coded_examples.xlsx, "
    "saved as JSON lines; or prompts of your own",
    "dolly": "Hugging Face hub: databricks/databricks-dolly-15k",
}

alpaca = functools.partial(instruct.alpaca, seed=SEED)
dolly = functools.partial(instruct.dolly, seed=SEED)
ten_times = functools.partial(hard_coded.hard_coded, repeat=10)


def _add(name: str, component: str, source: Files | str, convert: Callable, **rules) -> str:
    """Registers a supervised task of a component; gives back its name."""
    TaskRegistry.add(
        Task(
            name=name,
            kind="sft",
            sources={"train": source},
            convert=convert,
            seed=SEED,
            version=VERSION,
            licence=LICENCES[component],
            origin=rules.pop("origin", ORIGINS[component]),
            **rules,
        )
    )
    return name


def _mix(name: str, tasks: list[str], expected: int | None = None) -> None:
    MixtureRegistry.add(
        Mixture(name=name, tasks=dict.fromkeys(tasks), seed=SEED, expected=expected)
    )


def _published(version: str, component: str, column: str, expected: int | None) -> str:
    hub = f"allenai/tulu-{version}-sft-mixture"
    rows = Files(
        paths=(f"tulu-{version}-sft-mixture/train*",),  # the hub's Parquet files, or train.jsonl
        where={"dataset": column},
        hub=hub,
    )
    return _add(
        f"tulu_{version}.{column}",
        component,
        rows,
        published.published,
        expected=expected,
        origin=f"Hugging Face hub: {hub}, data/train-*.parquet",
    )


def _flan_resampled(version: str, portions: dict[str, float], rows: int, filters: tuple) -> None:
    """FLAN v2 drawn anew from its submixtures, in the portions of open-instruct's
    `resample_flan_v2.py`; the drawing AI2 trained on is the file of `<version>_raw.flan_v2`."""
    drawn = [
        _add(
            f"tulu_{version}_raw.flan_v2.{file}",
            "flan_v2",
            f"instruct_raw/flan_v2/{file}/{file}.jsonl",
            flan.flan,
            filters=filters,
            sample=int(portion * rows),
            expected=int(portion * rows),
        )
        for file, portion in portions.items()
    ]
    _mix(f"tulu_{version}_raw.flan_v2_resampled", drawn, expected=rows)


def _cot(version: str, rows_of_each: int, filters: tuple) -> None:
    drawn = [
        _add(
            f"tulu_{version}_raw.{file}",
            "cot",
            f"instruct_raw/cot/{file}.jsonl",
            flan.flan,
            filters=filters,
            sample=rows_of_each,
            expected=rows_of_each,
        )
        for file in ("cot_zsopt", "cot_fsopt")
    ]
    _mix(f"tulu_{version}_raw.cot", drawn, expected=2 * rows_of_each)


OASST_FILE = "instruct_raw/oasst1/2023-04-12_oasst_ready.trees.jsonl*"  # plain or .gz
SHAREGPT = Files(paths=("instruct_raw/sharegpt/sg_90k_part?_html_cleaned.json",))
GPT4_ALPACA_FILE = "instruct_raw/gpt4_alpaca/alpaca_gpt4_data.json"
CODE_ALPACA_FILE = "instruct_raw/code_alpaca/code_alpaca_20k.json"
LIMA_FILE = "instruct_raw/lima/train.jsonl"
WIZARDLM_FILE = "instruct_raw/wizardlm/WizardLM_evol_instruct_V2_143k.*"  # .json, .parquet
SCIENCE_FILE = "instruct_raw/science/science_train.jsonl"

V2_RAW = (  # component, source, converter, rows drawn from the source, examples before the filter
    ("flan_v2", "instruct_raw/flan_v2/tulu_v2_resampled_flan_50k.jsonl", flan.flan, None, 50_000),
    ("oasst1", OASST_FILE, oasst.best_path, None, 7_708),
    ("sharegpt", SHAREGPT, sharegpt.split_v2, None, 114_046),
    ("gpt4_alpaca", GPT4_ALPACA_FILE, alpaca, 20_000, 20_000),
    ("code_alpaca", CODE_ALPACA_FILE, alpaca, None, 20_022),
    ("lima", LIMA_FILE, conversations.lima, None, 1_030),
    ("wizardlm", WIZARDLM_FILE, conversations.wizardlm, 30_000, 30_000),
    (
        "open_orca",
        "instruct_raw/open_orca/1M-GPT4-Augmented.parquet",
        orca.open_orca,
        30_000,
        30_000,
    ),
    ("hard_coded", "instruct_raw/hard_coded/hard_coded_examples.jsonl", ten_times, None, 140),
)
V1_RAW = (  # as above; V1 has no name filter
    ("flan_v2", "instruct_raw/flan_v2/tulu_v1_resampled_flan_100k.jsonl", flan.flan, 100_000),
    ("oasst1", OASST_FILE, oasst.leaf_paths, None),
    ("dolly", "instruct_raw/dolly/databricks-dolly-15k.jsonl", dolly, 15_011),
    ("gpt4_alpaca", GPT4_ALPACA_FILE, alpaca, 52_002),
    ("code_alpaca", CODE_ALPACA_FILE, alpaca, 20_022),
    ("sharegpt", SHAREGPT, sharegpt.split_v1, None),
)


def _register_v2() -> None:
    for component in V2_COMPONENTS:
        if component != "science":
            _published("v2", component, component, V2_PUBLISHED[component])
    science_parts = [
        _published("v2", "science", f"science.{task}", after)
        for task, (_, after) in SCIENCE.items()
    ]
    _mix("tulu_v2.science", science_parts, expected=7_468)
    named = (name_filter.NAME_FILTER,)
    for component, source, convert, sample, expected in V2_RAW:
        _add(
            f"tulu_v2_raw.{component}",
            component,
            source,
            convert,
            filters=() if component == "hard_coded" else named,
            sample=sample,
            expected=expected,
        )
    _cot("v2", 25_000, named)
    _mix(
        "tulu_v2_raw.science",
        [
            _add(
                f"tulu_v2_raw.science.{task}",
                "science",
                Files(paths=(SCIENCE_FILE,), where={"dataset": task}),
                science.science,
                filters=named,
                expected=before,
            )
            for task, (before, _) in SCIENCE.items()
        ],
        expected=7_544,
    )
    _flan_resampled("v2", FLAN_V2_PORTIONS, 50_000, named)
    _add(
        "tulu_v2_raw.sharegpt_whole",
        "sharegpt",
        SHAREGPT,
        sharegpt.split_v2_whole,
        filters=named,
    )
    _mix("tulu_v2_sft", [f"tulu_v2.{c}" for c in V2_COMPONENTS], expected=V2_ROWS)
    _mix("tulu_v2_sft_raw", [f"tulu_v2_raw.{c}" for c in V2_COMPONENTS], expected=V2_RAW_ROWS)
    _mix("sharegpt_only", ["tulu_v2.sharegpt"], expected=V2_PUBLISHED["sharegpt"])
    for left_out in V2_COMPONENTS:
        rest = [f"tulu_v2.{c}" for c in V2_COMPONENTS if c != left_out]
        _mix(
            f"tulu_v2_sft_without_{left_out}",
            rest,
            expected=V2_ROWS - V2_PUBLISHED.get(left_out, 7_468),
        )


def _register_v1() -> None:
    for component in V1_COMPONENTS:
        _published("v1", component, component, None)
    for component, source, convert, expected in V1_RAW:
        _add(f"tulu_v1_raw.{component}", component, source, convert, expected=expected)
    _cot("v1", 50_000, ())
    _flan_resampled("v1", FLAN_V1_PORTIONS, 100_000, ())
    _mix("tulu_v1_sft", [f"tulu_v1.{c}" for c in V1_COMPONENTS], expected=V1_ROWS)
    _mix("tulu_v1_sft_raw", [f"tulu_v1_raw.{c}" for c in V1_COMPONENTS], expected=V1_RAW_ROWS)


def _register_files() -> None:
    """Upstream files as they are: no sample, no filter, and the parts of them at hand for tests."""
    _add("lima", "lima", LIMA_FILE, conversations.lima, expected=1_030)
    _add("gpt4_alpaca", "gpt4_alpaca", GPT4_ALPACA_FILE, alpaca)
    _add("code_alpaca", "code_alpaca", CODE_ALPACA_FILE, alpaca, expected=20_022)
    _add(
        "stanford_alpaca",
        "stanford_alpaca",
        "instruct_raw/stanford_alpaca/alpaca_data.json",
        alpaca,
    )
    _add("dolly", "dolly", "instruct_raw/dolly/dolly_3k.json", alpaca)
    _add("flan_cot", "cot", "instruct_raw/cot/*.tsv", flan.cot_fields)
    _add("t0_p3_sample", "flan_v2", "instruct_raw/flan_v2/t0_p3_sample.jsonl", flan.p3)
    _add(
        "oasst1_sample",
        "oasst1",
        "instruct_raw/oasst1/en_100_tree.jsonl",
        oasst.best_path,
        origin="GitHub: LAION-AI/Open-Assistant, sample trees without labels",
    )
    _add(
        "orca_preferred",
        "open_orca",
        "preference_raw/orca_dpo_pairs/validation.jsonl",
        orca.preferred,
        origin="GitHub: jayesh-tanna/fine-tuning, orca_dpo_pairs",
    )
    _add(
        "sharegpt_sample",
        "sharegpt",
        "instruct_raw/sharegpt/vicuna_sample_230629.json",
        sharegpt.split_v2,
        origin="GitHub: pany8125/ShareGPTQAExtractor-mnbvc, sample_file",
    )
    _mix("real_small_sft", ["lima", "gpt4_alpaca", "code_alpaca", "dolly", "oasst1_sample"])


_register_v2()
_register_v1()
_register_files()
