"""Evaluates a model: a run, a Hugging Face folder, or what a server serves.

Without --benchmarks a run that trained on rows of tulu_tiny is scored on its held-out prompts. With
them, on the paper's nine: answers go to a folder line by line, and the same command goes on where
it was stopped.

Examples:
  python -m tulu_jax.evaluate --gin_file=tulu_tiny_sft.gin --initial   # before training
  python -m tulu_jax.evaluate --gin_file=tulu_tiny_sft.gin
  python -m tulu_jax.evaluate --gin_file=tulu_tiny_sft.gin --engine=openai --url=http://host:8000/v1
  python -m tulu_jax.evaluate --gin_file=dpo_7b.gin --benchmarks=gsm8k,mmlu --eval_data=data/eval
  python -m tulu_jax.evaluate --model_folder=hf/tulu-2-7b --benchmarks=all --eval_data=data/eval
  python -m tulu_jax.evaluate --benchmarks=alpaca_eval --annotations=annotations.json
  python -m tulu_jax.evaluate --compare runs/sft_7b/evals/step_5096 runs/dpo_7b/evals/step_5808
"""

import importlib.util
import pathlib
import sys

import jax
from absl import flags
from etils import epath

from tulu_jax import cli, strict_json, validation

CHATS = ("spec", "paper", "open_instruct", "llama2", "none")

_INITIAL = flags.DEFINE_bool("initial", False, "Score the parameters that training starts from.")
_STEP = flags.DEFINE_integer(
    "step", None, "Step of the checkpoint. Default: the latest.", lower_bound=0
)
_MODEL_FOLDER = flags.DEFINE_string(
    "model_folder", None, "Hugging Face folder to evaluate, instead of a run."
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "Tokenizer of that folder, where it lies elsewhere."
)
_WEIGHTS = flags.DEFINE_enum(
    "weights", None, ["int8", "nf4"], "Round the weights of --model_folder as they are read. The "
    "paper's MMLU and TruthfulQA ran with 8 bits. Default: as they are.",
)  # fmt: skip
_ENGINE = flags.DEFINE_enum(
    "engine", "own", ["own", "openai"], "What answers: our decoder, or the server at --url, which "
    "serves this step of this run, or this folder.",
)  # fmt: skip
_URL = flags.DEFINE_string("url", None, "Address of an OpenAI-compatible server, up to its /v1.")
_MODEL = flags.DEFINE_string(
    "model", None, "The model's name at that server. Default: the one that it has."
)
_CONCURRENCY = flags.DEFINE_integer(
    "concurrency", 32, "Requests that are under way at that server.", lower_bound=1
)
_SLOTS = flags.DEFINE_integer(
    "slots", 16, "Continuations that our decoder makes at once.", lower_bound=1
)
_BENCHMARKS = flags.DEFINE_list(
    "benchmarks", None, "Benchmarks by name, with commas between; all: the paper's nine."
)
_SUBSET = flags.DEFINE_enum(
    "subset", "paper", ["paper", "full"], "The paper's items, or the whole sets."
)
_EVAL_DATA = flags.DEFINE_string(
    "eval_data", None, "Folder or bucket that has the benchmarks' data, each in its own folder."
)
_ALLOW_ALTERED = flags.DEFINE_bool(
    "allow_altered_data", False, "Take data that are not as upstream, and say so beside the scores."
)
_SET = flags.DEFINE_multi_string(
    "set", [], "A switch of a benchmark, such as truthfulqa.prefix_lost=false; may be repeated."
)
_CHAT = flags.DEFINE_enum(
    "chat", None, CHATS, "How chats are written; llama2: as Llama-2-chat and Code Llama Instruct "
    "have them; none: a base model, asked raw texts. Default: as the run has it, and spec for a "
    "folder that has TÜLU's template.",
)  # fmt: skip
_OUT = flags.DEFINE_string(
    "out", None, "Folder for answers and scores. Default: <workdir>/evals/step_N of a run, "
    "evals/<name> of a folder; of --compare, the second of the two.",
)  # fmt: skip
_PAPER_ROW = flags.DEFINE_string(
    "paper_row", None, 'Row of the paper to show beside, such as "Tulu 2 7B". Default: by name.'
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", None, "Of all answers that are generated. Default: as each benchmark has it.",
    lower_bound=0.0,
)  # fmt: skip
_REWARD_FROM = flags.DEFINE_string(
    "reward_from", None, "Reward model that scores the answers of a run: a workdir or a folder."
)
_BEST_OF = flags.DEFINE_integer(
    "best_of",
    None,
    "Of so many answers drawn to each prompt the one that --reward_from likes most.",
)
_GROUPS = flags.DEFINE_bool(
    "groups", False, "Also show each language, group, task and subject, and lengths of answers."
)
_COMPARE = flags.DEFINE_list(
    "compare", None, "Two folders of evaluations: which differences are more than chance."
)
_ANNOTATIONS = flags.DEFINE_string(
    "annotations", None, "Score what alpaca_eval wrote (annotations.json) or FastChat "
    "(gpt-4_single.jsonl), for the one benchmark of --benchmarks; no model is asked.",
)  # fmt: skip
_JUDGE_URL = flags.DEFINE_string(
    "judge_url", None, "Address of the judge of AlpacaEval and MT-Bench, up to its /v1; its key is "
    "OPENAI_API_KEY of the environment. Without a judge a score is pending.",
)  # fmt: skip
_JUDGE_MODEL = flags.DEFINE_string("judge_model", "gpt-4-0613", "The model's name there.")
_JUDGE_PRICE = flags.DEFINE_list(
    "judge_price", None, "US dollars for a million tokens that it reads, and writes: 30,60."
)
_TOXICITY_CLASSIFIER = flags.DEFINE_string(
    "toxicity_classifier", None, "Folder of ToxiGen's classifier."
)
_TRUTH_JUDGE = flags.DEFINE_string(
    "truth_judge", None, "Hugging Face folder of TruthfulQA's judge of truth."
)
_INFO_JUDGE = flags.DEFINE_string("info_judge", None, "That of its judge of information.")
flags.register_multi_flags_validator(
    ["initial", "step"],
    lambda given: not given["initial"] or given["step"] is None,
    message="--initial is before any step; give one of --initial and --step",
)


def main(config) -> None:
    """Compares, or evaluates on benchmarks, or runs the held-out prompts of tulu_tiny."""
    cli.stop_if(_problems(config))
    if _COMPARE.value is not None:
        _compare()
    elif _ANNOTATIONS.value is not None:
        _annotated()
    elif _BENCHMARKS.value is None:
        _held_out(config)
    else:
        _evaluate(config)


def _problems(config):
    is_ours = _ENGINE.value == "own"
    if _COMPARE.value is not None:
        if len(_COMPARE.value) != 2:
            yield f"--compare has {len(_COMPARE.value)} folders; give two of them"
        if cli.gin_file() or _MODEL_FOLDER.value or _BENCHMARKS.value:
            yield "--compare reads what was evaluated; give no model and no --benchmarks with it"
        return
    if _ANNOTATIONS.value is not None:
        if _BENCHMARKS.value not in (["alpaca_eval"], ["mt_bench"]):
            yield "--annotations are of one benchmark; give --benchmarks=alpaca_eval, or mt_bench"
        if cli.gin_file() or _MODEL_FOLDER.value:
            yield "--annotations were made of somebody's answers; give no model with them"
        return
    if is_ours and (_URL.value is not None or _MODEL.value is not None):
        yield "--url and --model are those of a server; give --engine=openai with them"
    if not is_ours and _URL.value is None:
        yield "--engine=openai is at an address; give --url, such as http://127.0.0.1:8000/v1"
    if not is_ours and importlib.util.find_spec("openai") is None:
        yield '--engine=openai needs the package openai; pip install "tulu_jax[eval]"'
    if _MODEL_FOLDER.value:
        if cli.gin_file():
            yield "--gin_file names a run and --model_folder a folder; give one of them"
        if _BENCHMARKS.value is None:
            yield "--model_folder is evaluated on --benchmarks; name some, or all"
        if _WEIGHTS.value and not is_ours:
            yield "--weights rounds what our decoder reads; a server has its own, leave it out"
        if _INITIAL.value or _STEP.value is not None:
            yield "--initial and --step are of a run; a --model_folder has no steps"
    elif _WEIGHTS.value:
        yield "--weights rounds those of --model_folder; `convert` a run, and give its folder"
    elif _TOKENIZER.value:
        yield "--tokenizer is that of --model_folder; a run has its own"
    if _BENCHMARKS.value is not None:
        yield from _benchmark_problems()
    yield from _reward_problems(is_ours)


def _benchmark_problems():
    from tulu_jax.evals import catalogue, paper_tables

    try:
        asked = catalogue.make(
            _BENCHMARKS.value, subset=_SUBSET.value, settings=_SET.value,
            allow_altered=_ALLOW_ALTERED.value,
        )  # fmt: skip
    except validation.UsageError as error:
        yield str(error)
    else:
        if _EVAL_DATA.value is None and {one.name for one in asked} & set(catalogue.PAPER):
            yield (
                "--eval_data is missing: the folder that has the data of the benchmarks, each in "
                "a folder of its own (docs/evaluations.md lists the files)"
            )
    if _JUDGE_PRICE.value is not None and not _is_price(_JUDGE_PRICE.value):
        yield f"--judge_price={','.join(_JUDGE_PRICE.value)}: expected two numbers, such as 30,60"
    if _PAPER_ROW.value is not None:
        try:
            paper_tables.require(_PAPER_ROW.value)
        except validation.UsageError as error:
            yield f"--paper_row: {error}"
    if _OUT.value and "://" in _OUT.value:
        yield f"--out={_OUT.value}: answers are added line by line; expected a local folder"


def _reward_problems(is_ours: bool):
    from tulu_jax.serving import best_of

    given = {"--reward_from": _REWARD_FROM, "--best_of": _BEST_OF, "--temperature": _TEMPERATURE}
    given = [name for name, flag in given.items() if flag.value is not None]
    if given and _BENCHMARKS.value is None:
        yield f"{given[0]} is of answers to --benchmarks; name some, such as tulu_tiny"
    if _REWARD_FROM.value and (_MODEL_FOLDER.value or not is_ours):
        yield "--reward_from scores answers of a run by our decoder; give --gin_file, and no server"
    if _BEST_OF.value is None:
        return
    if _REWARD_FROM.value is None:
        yield "--best_of chooses by a reward model; give --reward_from"
    if _TEMPERATURE.value is None:
        yield "--best_of draws answers; give the --temperature at which, such as 1"
    for problem in best_of.problems(_BEST_OF.value, _TEMPERATURE.value):
        yield f"--{problem}"


def _is_price(given: list[str]) -> bool:
    try:
        return len(given) == 2 and all(float(one) >= 0 for one in given)
    except ValueError:
        return False


def _evaluate(config) -> None:
    """Evaluates on --benchmarks; prints the table."""
    from tulu_jax.evals import catalogue, evaluation, judging

    if config is not None:
        from tulu_jax import preflight

        cli.check(config, preflight.to_read)
    if jax.process_count() > 1:
        raise validation.UsageError("--benchmarks are asked by one process; start one alone")
    subject, names, out = _of_folder() if config is None else _of_run(config)
    benchmarks = catalogue.make(
        _BENCHMARKS.value, subset=_SUBSET.value, settings=_SET.value,
        allow_altered=_ALLOW_ALTERED.value,
    )  # fmt: skip
    out = pathlib.Path(validation.expanded(_OUT.value) if _OUT.value else out)
    data = epath.Path(validation.expanded(_EVAL_DATA.value or "."))
    found = evaluation.evaluate(
        subject, benchmarks, data=data, out=out, judge=judging.judge(_judges(), benchmarks, out)
    )
    for line in evaluation.table(
        found, names=names, paper_row=_PAPER_ROW.value, groups=_GROUPS.value
    ):
        print(line)
    print(f"Answers and scores are in {out}")


def _of_run(config):
    """A run as the subject; names by which the paper may know it; the folder for its answers."""
    from tulu_jax import trained
    from tulu_jax.data import chat as chat_lib
    from tulu_jax.evals import evaluation, run_models

    step = None if _INITIAL.value else trained.saved_step(config, _STEP.value)
    run_name = pathlib.Path(config.workdir).name
    at = "initial" if step is None else f"step_{step}"
    with validation.reading():
        tokenizer = chat_lib.load_tokenizer(trained.tokenizer_path(config))

    chat = _CHAT.value or config.data.chat
    reward_from = _REWARD_FROM.value and validation.expanded(_REWARD_FROM.value)
    models = run_models.RunModels(
        config=config, step=step, tokenizer=tokenizer, slots=_SLOTS.value, reward_from=reward_from,
        best_of=_BEST_OF.value, is_drawn=_TEMPERATURE.value == 1,
    )  # fmt: skip
    cli.stop_if(models.problems())
    engine, max_length = _engine(models.engine, config.model.max_positions)
    chosen = "" if _BEST_OF.value is None else f", best of {_BEST_OF.value} by {_last(reward_from)}"
    subject = evaluation.Subject(
        name=f"{run_name}, {at}{chosen}", tokenizer=tokenizer, chat=chat, max_length=max_length,
        engine=engine, temperature=_TEMPERATURE.value,
        measures=models.measures if _ENGINE.value == "own" else dict,
    )  # fmt: skip
    parent = f"evals/{run_name}" if "://" in config.workdir else f"{config.workdir}/evals"
    at += "" if _BEST_OF.value is None else f"_best_of_{_BEST_OF.value}"
    return subject, (cli.gin_file(), run_name), f"{parent}/{at}"


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _of_folder():
    """The same of --model_folder."""
    from tulu_jax.evals import evaluation, model_folder

    folder = validation.expanded(_MODEL_FOLDER.value)
    tokenizer = model_folder.tokenizer_of(validation.expanded(_TOKENIZER.value or folder))
    if _CHAT.value is None:
        cli.stop_if(model_folder.chat_problems(_TOKENIZER.value or folder))

    def own():
        return model_folder.load(folder, tokenizer, slots=_SLOTS.value, weights=_WEIGHTS.value)

    name = _last(folder)
    kept = name if _WEIGHTS.value is None else f"{name}_{_WEIGHTS.value}"
    engine, max_length = _engine(own, model_folder.max_length_of(folder))
    subject = evaluation.Subject(
        name=kept, tokenizer=tokenizer, chat=_CHAT.value or "spec", max_length=max_length,
        engine=engine, temperature=_TEMPERATURE.value,
    )  # fmt: skip
    return subject, (name,), f"evals/{kept}"


def _engine(own, max_length: int):
    """What makes the engine, and the positions that it holds."""
    if _ENGINE.value == "own":
        return own, max_length
    engine = _server()
    engine.max_length = min(max_length, engine.max_length or max_length)
    return lambda: engine, engine.max_length


def _server():
    from tulu_jax.serving import openai_engine

    return openai_engine.OpenAIEngine(
        _URL.value, model=_MODEL.value, concurrency=_CONCURRENCY.value, details=False
    )  # fmt: skip


def _judges():
    """The judges that the flags name."""
    from tulu_jax.evals import judging

    folders = {
        name: flag.value and validation.expanded(flag.value)
        for name, flag in (
            ("toxicity", _TOXICITY_CLASSIFIER), ("truth", _TRUTH_JUDGE), ("info", _INFO_JUDGE)
        )
    }  # fmt: skip
    price = _JUDGE_PRICE.value and tuple(map(float, _JUDGE_PRICE.value))
    return judging.Named(
        url=_JUDGE_URL.value, model=_JUDGE_MODEL.value, price=price, slots=_SLOTS.value, **folders
    )


def _annotated() -> None:
    """Prints the score of annotations that another tool made."""
    from tulu_jax.evals import scores

    path = epath.Path(validation.expanded(_ANNOTATIONS.value))
    if _BENCHMARKS.value == ["alpaca_eval"]:
        from tulu_jax.evals import alpaca_eval

        metrics = alpaca_eval.score_annotations(alpaca_eval.annotations(path))
    else:
        from tulu_jax.evals import mt_bench

        metrics = mt_bench.score_judgments(mt_bench.judgments(path))
    for line in scores.columns([[m.name, scores.interval(m)] for m in metrics]):
        print(line)


def _compare() -> None:
    """Prints what differs between two evaluations, and writes every item that does."""
    from tulu_jax.evals import compare_runs, scores

    folders = [pathlib.Path(validation.expanded(folder)) for folder in _COMPARE.value]
    pairs, alone = compare_runs.compare(folders)
    print(f"A: {folders[0]}\nB: {folders[1]}")
    for line in compare_runs.lines(pairs):
        print(line)
    if _GROUPS.value:
        for pair in pairs:
            for line in scores.group_lines(pair, ["A", "B"]):
                print(line)
    for word in alone:
        print(word)
    out = pathlib.Path(validation.expanded(_OUT.value)) if _OUT.value else folders[1]
    out.mkdir(parents=True, exist_ok=True)
    file = out / compare_runs.FILE
    print(f"{compare_runs.write_differences(pairs, folders, file):,} differences are in {file}")


def _held_out(config) -> None:
    """Runs the held-out prompts of tulu_tiny greedily; prints and saves the scores."""
    from tulu_jax.evals import held_out_prompts
    from tulu_jax.evals.benchmark import Answer

    cli.stop_if(held_out_prompts.problems(config.data))
    from tulu_jax import preflight

    cli.check(config, preflight.to_read)
    from tulu_jax import trained

    if _ENGINE.value == "own":
        most = held_out_prompts.MOST_TOKENS
        model = trained.Generator(
            config, step=_STEP.value, initial=_INITIAL.value, max_new_tokens=most
        )
        step, tokenizer, respond = model.step, model.tokenizer, model.replies
    else:
        step = None if _INITIAL.value else trained.saved_step(config, _STEP.value)
        tokenizer, respond = _at_server(config)
    requests = held_out_prompts.TuluTiny().requests(None, tokenizer, is_chat=True)
    said = respond([request.prompt for request in requests])
    answers = [
        Answer(id=request.id, prompt_hash="", texts=[text])
        for request, text in zip(requests, said, strict=True)
    ]
    found, replies = held_out_prompts.summary(requests, answers)
    if jax.process_index() == 0:
        held_out_prompts.save(config.workdir, step, found, replies)
    print(strict_json.dumps(found))


def _at_server(config):
    """The tokenizer of a run, and what answers conversations with its template: the server."""
    from tulu_jax import trained
    from tulu_jax.data import chat as chat_lib
    from tulu_jax.decode.sampling import Sampling
    from tulu_jax.evals import held_out_prompts
    from tulu_jax.serving import engine as engine_lib

    with validation.reading():
        tokenizer = chat_lib.load_tokenizer(trained.tokenizer_path(config))
    engine = _server()

    def respond(conversations):
        sampling = Sampling(max_new_tokens=held_out_prompts.MOST_TOKENS)
        return engine_lib.replies(engine, conversations, sampling, tokenizer, chat=config.data.chat)

    return tokenizer, respond


def _needs_config() -> bool:
    return not (_COMPARE.value or _MODEL_FOLDER.value or _ANNOTATIONS.value)


if __name__ == "__main__":
    sys.argv[:] = cli.joined(sys.argv, "--compare")
    cli.run(main, needs_config=_needs_config)
