"""Registers the instruction and preference sources of TÜLU 2, and small mixtures of them.

Paths are relative to the data root. Counts and licences: arXiv 2311.10702 §2 and the sources.
"""

from tulu_jax.data.registry import Mixture, MixtureRegistry, Task, TaskRegistry
from tulu_jax.data.sources import instruct, preference

TaskRegistry.add(
    Task(
        name="lima",
        kind="sft",
        sources={"train": "instruct_raw/lima/train.jsonl"},
        convert=instruct.lima,
        expected=1030,
        licence="CC BY-NC-SA, or stricter as its sources",
        origin="Hugging Face hub: GAIR/lima",
    )
)
TaskRegistry.add(
    Task(
        name="gpt4_alpaca",
        kind="sft",
        sources={"train": "instruct_raw/gpt4_alpaca/alpaca_gpt4_data.json"},
        convert=instruct.alpaca,
        licence="CC BY-NC 4.0",
        origin="GitHub: Instruction-Tuning-with-GPT-4/GPT-4-LLM",
    )
)
TaskRegistry.add(
    Task(
        name="code_alpaca",
        kind="sft",
        sources={"train": "instruct_raw/code_alpaca/code_alpaca_20k.json"},
        convert=instruct.alpaca,
        expected=20022,
        licence="CC BY-NC 4.0",
        origin="GitHub: sahil280114/codealpaca",
    )
)
TaskRegistry.add(
    Task(
        name="stanford_alpaca",
        kind="sft",
        sources={"train": "instruct_raw/stanford_alpaca/alpaca_data.json"},
        convert=instruct.alpaca,
        licence="CC BY-NC 4.0",
        origin="GitHub: tatsu-lab/stanford_alpaca",
    )
)
TaskRegistry.add(
    Task(
        name="dolly",
        kind="sft",
        sources={"train": "instruct_raw/dolly/dolly_3k.json"},
        convert=instruct.alpaca,
        licence="CC BY-SA 3.0",
        origin="Hugging Face hub: databricks/databricks-dolly-15k",
    )
)
TaskRegistry.add(
    Task(
        name="oasst1_sample",
        kind="sft",
        sources={"train": "instruct_raw/oasst1/en_100_tree.jsonl"},
        convert=instruct.oasst_tree,
        licence="Apache-2.0",
        origin="GitHub: LAION-AI/Open-Assistant, sample trees without labels",
    )
)
TaskRegistry.add(
    Task(
        name="ultrafeedback_binarized",
        kind="preference",
        sources={"train": "preference_raw/ultrafeedback/ultrafeedback_binarized.jsonl"},
        convert=preference.ultrafeedback_binarized,
        holdout_every=5,  # of 500 rows at hand, enough pairs to measure a margin on
        licence="MIT",
        origin="Hugging Face hub: trl-lib/ultrafeedback_binarized",
    )
)

MixtureRegistry.add(
    Mixture(
        name="real_small_sft",
        tasks={
            "lima": None,
            "gpt4_alpaca": None,
            "code_alpaca": None,
            "dolly": None,
            "oasst1_sample": None,
        },
    )
)
MixtureRegistry.add(Mixture(name="real_small_dpo", tasks={"ultrafeedback_binarized": None}))
