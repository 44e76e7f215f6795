"""Preference rows in every upstream layout, and examples made of rows."""

import functools

from raw_rows import messages

from tulu_jax.data import examples, registry
from tulu_jax.data.sources import hh, own, rankings, ready_pairs, ultrafeedback

h4 = functools.partial(
    ready_pairs.conversations, scores=("score_chosen", "score_rejected"), ties="drop"
)
argilla = functools.partial(
    ready_pairs.conversations, scores=("chosen-rating", "rejected-rating"), ties="drop"
)


def completion(response: str, overall: float, ratings: tuple = ("3",), **more) -> dict:
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    rated = {name: {"Rating": rating} for name, rating in zip(aspects, ratings, strict=False)}
    row = {"model": f"m-{response}", "response": response, "overall_score": overall}
    return row | {"annotations": rated} | more


def record(*completions: dict, instruction: str = "p", source: str = "flan") -> dict:
    return {"instruction": instruction, "source": source, "completions": list(completions)}


def ranked(*ranks: float) -> dict:
    answers = [{"answer": f"a{i}", "model": f"m{i}", "rank": r} for i, r in enumerate(ranks)]
    return {"prompt": "\n\nHuman: q \n\nAssistant: ", "answers": answers}


def sharegpt_turn(sender: str, value: str) -> dict:
    return {"from": sender, "value": value}


LAYOUTS = {  # converter, a row in its layout
    "trl": (
        ready_pairs.ultrafeedback_binarized,
        {
            "prompt": "p",
            "chosen": "good",
            "rejected": "bad",
            "metadata": {"score_chosen": 9.0, "score_rejected": 8.0},
        },
    ),
    "h4": (
        h4,
        {
            "prompt": "p",
            "prompt_id": "id",
            "chosen": messages("p", "good"),
            "rejected": messages("p", "bad"),
            "messages": messages("p", "good"),
            "score_chosen": 9.0,
            "score_rejected": 8.0,
        },
    ),
    "own": (own.pair, {"chosen": messages("p", "good"), "rejected": messages("p", "bad")}),
    "own_text": (own.pair, {"prompt": "p", "chosen": "good", "rejected": "bad"}),
    "argilla": (
        argilla,
        {
            "source": "flan_v2_cot",
            "prompt": "p",
            "chosen": messages("p", "good"),
            "chosen-rating": 4.75,
            "chosen-model": "gpt-4",
            "rejected": messages("p", "bad"),
            "rejected-rating": 2,
            "rejected-model": "alpaca-7b",
        },
    ),
    "orca": (
        ready_pairs.orca,
        {"system": "", "question": "p", "chosen": "good", "rejected": "bad"},
    ),
    "openai": (
        ready_pairs.openai,
        {
            "input": {"messages": messages("p"), "tools": []},
            "preferred_output": [{"role": "assistant", "content": "good", "weight": 1}],
            "non_preferred_output": [{"role": "assistant", "content": "bad"}],
        },
    ),
    "stack_exchange": (
        ready_pairs.stack_exchange,
        {"qid": 1, "question": "p", "response_j": "good", "response_k": "bad"},
    ),
    "sharegpt": (
        ready_pairs.sharegpt,
        {
            "conversations": [sharegpt_turn("human", "p")],
            "chosen": sharegpt_turn("gpt", "good"),
            "rejected": sharegpt_turn("gpt", "bad"),
        },
    ),
    "alpaca": (
        ready_pairs.alpaca,
        {"instruction": "p ", "input": "", "output": "x", "chosen": "good", "rejected": "bad"},
    ),
    "hh": (
        hh.hh_rlhf,
        {
            "chosen": "\n\nHuman: p\n\nAssistant: good",
            "rejected": "\n\nHuman: p\n\nAssistant: bad",
        },
    ),
    "nectar": (
        functools.partial(rankings.nectar, rule="best_vs_worst"),
        {
            "prompt": "\n\nHuman: p\n\nAssistant: ",
            "answers": [
                {"answer": "bad", "model": "b", "rank": 2.0},
                {"answer": "good", "model": "a", "rank": 1.0},
            ],
            "turns": 1,
        },
    ),
    "ultrafeedback": (
        functools.partial(
            ultrafeedback.binarize, rejected="lowest", score="overall", tens="repair"
        ),
        record(completion("bad", 3.0), completion("good", 10, ("5", "4", "5", "N/A"))),
    ),
    "ultrafeedback_aspects": (
        functools.partial(ultrafeedback.binarize, rejected="random", score="aspects", tens="keep"),
        record(completion("bad", 9.0, ("1", "N/A")), completion("good", 5.0, ("2", "1"))),
    ),
}


def of_rows(convert, rows: list[dict]) -> examples.TaskExamples:
    task = registry.Task(
        name="t",
        kind="preference",
        sources={"train": lambda: rows},
        convert=convert,
        licence="-",
        origin="-",
    )
    return examples.load_examples(task, drawing())


def drawing(**changes) -> examples.Drawing:
    whole = {"split": "train", "amount": None, "seed": 0, "holdout_every": None, "data_root": None}
    return examples.Drawing(**(whole | changes))
