"""The paper's tables: every average and difference is recomputed, and what does not come out is
exactly what is marked."""

import decimal

import pytest

from tulu_jax import validation
from tulu_jax.evals import paper_tables


def rounded(value: float, digits: int) -> float:
    """Half up, as a person does it; binary halves such as 7.535 are no halves."""
    exact = decimal.Decimal(repr(round(value, 9)))
    return float(exact.quantize(decimal.Decimal(1).scaleb(-digits), decimal.ROUND_HALF_UP))


def contradicted_averages() -> set[tuple[str, str, str, float]]:
    """Printed averages that are not those of their columns, with what these give."""
    found = set()
    for name, table in paper_tables.tables().items():
        column = table.columns[-1]
        if not column.startswith("average") or name == "3":
            continue
        columns, digits = table.columns[:-1], 2 if name == "8" else 1
        for model, values in table.rows.items():
            if None not in values:
                of = dict(zip(columns, values, strict=False))
                ours = rounded(paper_tables.average(of, columns), digits)
                if ours != values[-1]:
                    found.add((name, model, column, ours))
    return found


def contradicted_differences() -> set[tuple[str, str, str, float]]:
    """Cells of table 3 that are not DPO minus SFT of table 1, with marked cells mended."""
    found, columns = set(), paper_tables.tables()["3"].columns
    for model in paper_tables.tables()["3"].rows:
        for column in columns:
            sides = [paper_tables.cell("1", m, column) for m in (model, model.replace("+DPO", ""))]
            dpo, sft = (
                side.inconsistent.expected if side.inconsistent else side.value for side in sides
            )
            ours = rounded(dpo - sft, 1)
            if ours != paper_tables.cell("3", model, column).value:
                found.add(("3", model, column, ours))
    return found


def contradicted_copies() -> set[tuple[str, str, str, float]]:
    """Cells that differ from the same number in an earlier table of the paper."""
    found, seen = set(), {}
    for name in ("1", "2", "5", "6", "4"):
        for model in paper_tables.tables()[name].rows:
            for column in paper_tables.tables()[name].columns:
                there = paper_tables.cell(name, model, column)
                if there is None:
                    continue
                first = seen.setdefault((model, column), there.value)
                if first != there.value:
                    found.add((name, model, column, first))
    return found


def test_what_does_not_come_out_is_what_is_marked():
    found = contradicted_averages() | contradicted_differences() | contradicted_copies()
    marked = {
        (mark.table, mark.model, mark.column, mark.expected)
        for mark in paper_tables.inconsistent()
        if mark.expected is not None
    }
    assert found == marked
    for mark in paper_tables.inconsistent():
        assert paper_tables.cell(mark.table, mark.model, mark.column).value == mark.printed


def test_mt_bench_of_table_4_is_the_average_of_table_8():
    for model in paper_tables.tables()["4"].rows:
        four = paper_tables.cell("4", model, "mt_bench").value
        assert four == paper_tables.cell("8", model, "average").value


def test_the_scores_of_a_model_leave_out_what_is_contradicted():
    found = paper_tables.scores("Tulu 2 7B")
    assert (found["truthfulqa"].value, found["truthfulqa"].table) == (50.2, "2")
    assert (found["average_7"].value, found["average_8"].value) == (54.7, 54.2)
    assert found["mt_bench"].value == 6.30 and found["output_length"].value == 1248
    dpo = paper_tables.scores("Tulu 2+DPO 7B")
    assert dpo["average_7"].inconsistent.expected == 57.1 and "average_8" not in dpo
    assert paper_tables.later("Tulu 2 7B")["OLMo 4"]["truthfulqa"] == 51.7
    assert paper_tables.later("Tulu 2 13B") == {}


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("sft_7b.gin", "Tulu 2 7B"),
        ("configs/dpo_70b.gin", "Tulu 2+DPO 70B"),
        ("sft_code_34b.gin", "Code Tulu 2 34B"),
        ("sft_v1_13b.gin", "Tulu V1 mix 13B"),
        ("sft_sharegpt_7b.gin", "ShareGPT 7B"),
        ("qlora_70b", "Tulu 2 QLoRA 70B"),
        ("/models/tulu-2-dpo-13b/", "Tulu 2+DPO 13B"),
        ("Llama-2-7b-chat-hf", "Llama-2-Chat 7B"),
        ("CodeLlama-34b-Instruct-hf", "Code Llama Instruct 34B"),
        ("tulu_tiny_sft.gin", None),
        ("sft_34b.gin", None),
        ("qlora_dpo_7b.gin", None),
    ],
)
def test_the_row_of_a_name(name, model):
    assert paper_tables.model_of(name) == model


def test_a_row_that_is_not_there_is_named():
    with pytest.raises(validation.UsageError, match=r"no row 'Tulu 2 7'.*did you mean 'Tulu 2 7B'"):
        paper_tables.scores("Tulu 2 7")
