"""Registers the preference sources and mixtures of them; docs/preference_data.md has the table.

Paths are relative to the data root: the files of a hub repository lie as they are there below
`preference_raw/<task>`. Counts are those of the cards of the
sets on the hub.
"""

import dataclasses
import functools

from tulu_jax.data.registry import Files, Filter, Mixture, MixtureRegistry, Task, TaskRegistry
from tulu_jax.data.sources import hh, pair_filters, rankings, ready_pairs, ultrafeedback

# The revision that Zephyr and TÜLU 2 were trained on; the hub serves the second by default.
H4_FIRST = "292c16329d921287c4166934cac1a6ad1e13a6c5"
HH_PARTS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
MIT = "MIT"
VERSION = "1"  # raised when what a converter or filter gives changes


def _add(name: str, **fields) -> Task:
    return TaskRegistry.add(Task(name=name, kind="preference", version=VERSION, **fields))


def _prefs(task: str, *, hub: str, revision: str | None = None) -> dict[str, Files]:
    """The two preference splits of an H4-style repository."""
    return {
        ours: Files(
            paths=(f"preference_raw/{task}/data/{theirs}-*.parquet",),
            hub=hub,
            hub_split=theirs,
            hub_revision=revision,
        )
        for ours, theirs in (("train", "train_prefs"), ("validation", "test_prefs"))
    }


# Ready-made pairs of UltraFeedback. The first revision keeps its ties, because TÜLU 2 trained on
# all 61,966; every other task drops them.
PAPERS = "ultrafeedback_h4_first"
_papers = _add(
    PAPERS,
    sources=_prefs(
        "ultrafeedback_h4_first",
        hub="HuggingFaceH4/ultrafeedback_binarized",
        revision=H4_FIRST,
    ),
    convert=functools.partial(
        ready_pairs.conversations, scores=("score_chosen", "score_rejected"), ties="keep"
    ),
    expected=61966,
    licence=MIT,
    origin=f"Hugging Face hub: HuggingFaceH4/ultrafeedback_binarized, revision {H4_FIRST}",
)
_add(
    "ultrafeedback_h4_second",
    sources=_prefs("ultrafeedback_h4_second", hub="HuggingFaceH4/ultrafeedback_binarized"),
    convert=functools.partial(
        ready_pairs.conversations, scores=("score_chosen", "score_rejected"), ties="drop"
    ),
    expected=61135,
    licence=MIT,
    origin="Hugging Face hub: HuggingFaceH4/ultrafeedback_binarized",
)
_add(
    "ultrafeedback_ai2_cleaned",
    sources=_prefs("ultrafeedback_ai2_cleaned", hub="allenai/ultrafeedback_binarized_cleaned"),
    convert=functools.partial(
        ready_pairs.conversations, scores=("score_chosen", "score_rejected"), ties="drop"
    ),
    expected=60829,
    licence=MIT,
    origin="Hugging Face hub: allenai/ultrafeedback_binarized_cleaned",
)
_add(
    "ultrafeedback_argilla_cleaned",
    sources={
        "train": Files(
            paths=("preference_raw/ultrafeedback_argilla_cleaned/data/train-*.parquet",),
            hub="argilla/ultrafeedback-binarized-preferences-cleaned",
        )
    },
    convert=functools.partial(
        ready_pairs.conversations, scores=("chosen-rating", "rejected-rating"), ties="drop"
    ),
    expected=60917,
    licence=MIT,
    origin="Hugging Face hub: argilla/ultrafeedback-binarized-preferences-cleaned",
)
_add(
    "ultrafeedback_binarized",
    sources={"train": "preference_raw/ultrafeedback/ultrafeedback_binarized.jsonl"},
    convert=ready_pairs.ultrafeedback_binarized,
    licence=MIT,
    origin="Hugging Face hub: trl-lib/ultrafeedback_binarized",
)

# The paper's pairs without those that an audit takes out, one rule each (`audit/`, studies).
AUDITED = {
    "lengths": Filter(name="answers of unequal length", keep=pair_filters.of_equal_length),
    "labels": Filter(name="scored against its label", keep=pair_filters.scored_as_labelled),
    "answers": Filter(name="answers nearly alike", keep=pair_filters.of_different_answers),
}
for _name, _filter in AUDITED.items():
    TaskRegistry.add(
        dataclasses.replace(_papers, name=f"{PAPERS}_audited_{_name}", filters=(_filter,))
    )

# UltraFeedback from its raw records. TruthfulQA's prompts are evaluated on; the first public
# binarization has them, so "first" has them too.
for _name, _rejected, _score, _tens in (
    ("ultrafeedback_first", "first", "overall", "keep"),
    ("ultrafeedback_random", "random", "overall", "repair"),
    ("ultrafeedback_lowest", "lowest", "overall", "repair"),
    ("ultrafeedback_aspects_random", "random", "aspects", "keep"),
    ("ultrafeedback_aspects_lowest", "lowest", "aspects", "keep"),
):
    _add(
        _name,
        sources={
            "train": Files(
                paths=("preference_raw/ultrafeedback_raw/*.jsonl",), hub="openbmb/UltraFeedback"
            )
        },
        convert=functools.partial(
            ultrafeedback.binarize, rejected=_rejected, score=_score, tens=_tens
        ),
        filters=()
        if _rejected == "first"
        else (Filter(name="TruthfulQA prompt", keep=ultrafeedback.not_truthfulqa),),
        expected=63967,
        licence=MIT,
        origin="Hugging Face hub: openbmb/UltraFeedback",
    )

_add(
    "hh_rlhf",
    sources={
        ours: Files(
            paths=tuple(f"preference_raw/hh_rlhf/{part}/{theirs}.jsonl.gz" for part in HH_PARTS),
            hub="Anthropic/hh-rlhf",
            hub_split=theirs,
        )
        for ours, theirs in (("train", "train"), ("validation", "test"))
    },
    convert=hh.hh_rlhf,
    expected=160800,
    licence=MIT,
    origin="Hugging Face hub: Anthropic/hh-rlhf",
)
for _rule in rankings.RULES:
    _add(
        "nectar" if _rule == "best_vs_random" else f"nectar_{_rule}",
        sources={
            "train": Files(
                paths=("preference_raw/nectar/data/*.parquet",), hub="berkeley-nest/Nectar"
            )
        },
        convert=functools.partial(rankings.nectar, rule=_rule),
        licence="Apache-2.0, if not used to compete with OpenAI",
        origin="Hugging Face hub: berkeley-nest/Nectar",
    )
_add(
    "orca_dpo_pairs",
    sources={
        "train": Files(
            paths=("preference_raw/orca_dpo_pairs/orca_rlhf.jsonl",), hub="Intel/orca_dpo_pairs"
        )
    },
    convert=ready_pairs.orca,
    expected=12859,
    licence="Apache-2.0",
    origin="Hugging Face hub: Intel/orca_dpo_pairs",
)
_add(
    "stack_exchange_paired",
    sources={"train": "preference_raw/stack_exchange_paired/data/reward/*.parquet"},
    convert=ready_pairs.stack_exchange,
    licence="CC BY-SA 4.0",
    origin="Hugging Face hub: lvwerra/stack-exchange-paired, folder data/reward",
)

# Samples of upstream layouts.
_add(
    "hh_rlhf_sample",
    sources={"train": "preference_raw/hh_rlhf/harmless-base_test.jsonl.gz"},
    convert=hh.hh_rlhf,
    licence=MIT,
    origin="GitHub: anthropics/hh-rlhf, harmless-base/test.jsonl.gz",
)
_add(
    "orca_dpo_pairs_sample",
    sources={"train": "preference_raw/orca_dpo_pairs/validation.jsonl"},
    convert=ready_pairs.openai,
    licence=MIT,
    origin="GitHub: jayesh-tanna/fine-tuning, Sample_Datasets",
)
_add(
    "stack_exchange_sample",
    sources={"train": "preference_raw/stack_exchange_paired/stack_exchange_paired_tiny.json"},
    convert=ready_pairs.stack_exchange,
    licence="CC BY-SA 4.0",
    origin="GitHub: pytorch/torchtune, tests/assets",
)
_add(
    "sharegpt_pairs_sample",
    sources={"train": "preference_raw/sharegpt_pairs/dpo_en_demo.json"},
    convert=ready_pairs.sharegpt,
    licence="Apache-2.0",
    origin="GitHub: hiyouga/LLaMA-Factory, data/dpo_en_demo.json",
)
_add(
    "alpaca_pairs_sample",
    sources={"train": "preference_raw/llms_from_scratch/instruction-data-with-preference.json"},
    convert=ready_pairs.alpaca,
    licence="Apache-2.0",
    origin="GitHub: rasbt/LLMs-from-scratch, ch07/04_preference-tuning-with-dpo",
)

MixtureRegistry.add(Mixture(name="tulu_2_dpo", tasks={PAPERS: None}, expected=61966))
MixtureRegistry.add(Mixture(name="real_small_dpo", tasks={"ultrafeedback_binarized": None}))
MixtureRegistry.add(
    Mixture(
        name="real_mixed_dpo",
        tasks={
            "ultrafeedback_binarized": None,
            "hh_rlhf_sample": None,
            "orca_dpo_pairs_sample": None,
            "stack_exchange_sample": None,
            "sharegpt_pairs_sample": None,
            "alpaca_pairs_sample": None,
        },
    )
)
