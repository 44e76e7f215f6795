"""lm-eval itself on our decoder, and the same weights through its own Hugging Face back end.

What asks for whole tasks is slow: lm-eval, torch and their imports take most of it.
"""

import json
import os
import shutil

import pytest

from tulu_jax import validation
from tulu_jax.data import chat
from tulu_jax.decode.sampling import Sampling
from tulu_jax.evals import model_folder

TASKS = {
    "choices": """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/mmlu.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list: [{metric: acc}]
""",
    "texts": """
task: texts
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/stories.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
""",
    "answers": """
task: answers
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/gsm.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["Question:", "\\n\\n"], do_sample: false, max_gen_toks: 24}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def offline():
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    yield pytest.importorskip("lm_eval")
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module")
def stories(shared_data, tmp_path_factory):
    """stories260K as a folder with its tokenizer, as an export has it."""
    from tulu_jax.data import tokenizer_files
    from tulu_jax.interop import tokenizer_export

    folder = tmp_path_factory.mktemp("stories")
    shutil.copytree(shared_data / "models" / "stories260K-hf", folder, dirs_exist_ok=True)
    path = str(shared_data / "models" / "stories260K" / "tok512.model")
    backend = tokenizer_files.for_plain_text(chat.load_tokenizer(path).backend, path)
    tokenizer_export.save(backend, str(folder), max_length=None, mode="spec")
    return str(folder)


@pytest.fixture(scope="module")
def ours(offline, stories):
    from tulu_jax.evals import harness

    tokenizer = chat.load_tokenizer(stories)
    return harness.EngineLM(model_folder.load(stories, tokenizer, slots=8), tokenizer)


@pytest.fixture(scope="module")
def tasks(shared_data, tmp_path_factory):
    """The YAML tasks, over a few rows of the real data."""
    folder = tmp_path_factory.mktemp("tasks")
    with (shared_data / "eval" / "gsm" / "test.jsonl").open() as file:
        rows = [json.loads(next(file)) for _ in range(3)]
    short = [{"question": row["question"][:80], "answer": row["answer"]} for row in rows]
    text = json.loads((shared_data / "reference_vectors" / "stories260K_text.json").read_text())
    texts = [{"text": str(next(iter(text.values())) if isinstance(text, dict) else text)}]
    texts += [{"text": row["question"]} for row in rows]
    letters = [{"question": row["question"][:80], "answer": n} for n, row in enumerate(rows)]
    for name, found in (("gsm", short), ("stories", texts), ("mmlu", letters)):
        lines = "".join(json.dumps(row) + "\n" for row in found)
        (folder / f"{name}.jsonl").write_text(lines)
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    return str(folder)


def results(lm, folder: str) -> dict:
    """What lm-eval makes of all tasks: metrics, and what was said to each document."""
    from lm_eval import evaluator
    from lm_eval import tasks as lm_tasks

    manager = lm_tasks.TaskManager(include_path=folder, include_defaults=False)
    found = evaluator.simple_evaluate(
        lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, cache_requests=False
    )
    said = {
        name: [sample["filtered_resps"] for sample in samples]
        for name, samples in found["samples"].items()
    }
    return {"results": found["results"], "said": said}


@pytest.mark.slow
def test_the_real_library_runs_its_tasks_on_our_decoder(ours, tasks, stories):
    """The same numbers as through its own back end on torch, in float32."""
    torch = pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(
        pretrained=stories, dtype="float32", device="cpu", batch_size=1, add_bos_token=True
    )
    assert theirs.model.dtype == torch.float32 and theirs.max_length == ours.max_length
    text = "Once upon a time, there was"
    assert theirs.tok_encode(text) == ours.tok_encode(text)
    found, expected = results(ours, tasks), results(theirs, tasks)
    assert found["said"]["answers"] == expected["said"]["answers"]
    assert any(reply[0].strip() for reply in found["said"]["answers"])
    for mine, other in zip(found["said"]["choices"], expected["said"]["choices"], strict=True):
        for (logps, greedy), (their_logps, their_greedy) in zip(mine, other, strict=True):
            assert logps == pytest.approx(float(their_logps), abs=1e-4)
            assert greedy == bool(their_greedy)
    for mine, other in zip(found["said"]["texts"], expected["said"]["texts"], strict=True):
        assert mine[0] == pytest.approx(float(other[0]), rel=1e-5)
    assert found["results"]["choices"]["acc,none"] == expected["results"]["choices"]["acc,none"]
    perplexities = [one["results"]["texts"]["word_perplexity,none"] for one in (found, expected)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-4)


class Instance:
    def __init__(self, *args):
        self.args = args


@pytest.mark.slow
def test_what_is_longer_than_the_model_is_cut_on_its_left(ours):
    long = "Once upon a time there was a cow. " * 200
    (whole,) = ours.generate_until([Instance(long, {"max_gen_toks": 8})], disable_tqdm=True)
    ids = ours.tok_encode(long)[-(ours.max_length - 8) :]
    sampling = Sampling(max_new_tokens=8)
    ((reply,),) = ours.engine.generate([ids], sampling, seeds=None)
    assert whole == reply.text
    rolled = ours.loglikelihood_rolling([Instance(long)], disable_tqdm=True)
    assert rolled[0] < ours.loglikelihood_rolling([Instance(long[:500])], disable_tqdm=True)[0] < 0


def test_a_continuation_has_the_score_that_the_engine_gives(ours):
    context, text = "Once upon a time", " there was a little girl"
    ((logps, greedy),) = ours.loglikelihood([Instance(context, text)], disable_tqdm=True)
    ids = ours.tok_encode(context)
    whole = ours.tok_encode(context + text)
    assert whole[: len(ids)] == ids and ids[0] == ours.tokens.bos_id
    (score,) = ours.engine.score([ids], [whole[len(ids) :]])
    assert (logps, greedy) == (score.logps, score.is_greedy) and -20 < logps < 0


def test_settings_that_we_do_not_have_are_named(ours):
    with pytest.raises(validation.UsageError, match=r"generation with \{'repetition_penalty'"):
        ours.generate_until([Instance("a", {"repetition_penalty": 1.2})], disable_tqdm=True)
    with pytest.raises(validation.UsageError, match="asks for 4,096 new tokens"):
        ours.generate_until([Instance("a", {"max_gen_toks": 4096})], disable_tqdm=True)


def test_a_chat_is_written_as_training_has_it(ours):
    messages = [{"role": "user", "content": "Hi "}]
    ids = ours.tok_encode(ours.apply_chat_template(messages))
    assert ids == chat.generation_prompt(messages, ours.tokens, chat="spec")


def test_an_engine_that_does_not_tell_its_length_is_refused(offline, ours):
    from tulu_jax.evals import harness

    class Untold:
        max_length = None

    with pytest.raises(validation.UsageError, match="does not tell the positions"):
        harness.EngineLM(Untold(), ours.tokens)
