"""Our engines as a model of lm-eval (EleutherAI's harness, 0.4.13): its tasks on our decoder.

    from lm_eval import evaluator, tasks
    lm = harness.EngineLM(engine, tokenizer, chat="spec")
    evaluator.simple_evaluate(lm, tasks=["mine"], task_manager=tasks.TaskManager(include_path="."))

Texts become ids as lm-eval's own back ends make them, BOS first, so that the same weights give the
same numbers through either.
"""

import collections
from collections.abc import Sequence
from typing import Any

import tqdm
import xxhash
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from tulu_jax import validation
from tulu_jax.data import chat as chat_lib
from tulu_jax.decode.sampling import Sampling
from tulu_jax.serving.engine import Engine

MAX_NEW_TOKENS = 256  # where a task names none, as lm-eval has it
SCORED_AT_ONCE = 256
_IGNORED = ("do_sample", "until", "max_gen_toks", "temperature")  # have been looked at
_OF_SAMPLING = ("top_p", "top_k")


class EngineLM(TemplateLM):
    """An engine and its tokenizer. `chat` is how `--apply_chat_template` writes conversations. What
    is longer than the model is cut on its left, as lm-eval does everywhere."""

    def __init__(self, engine: Engine, tokenizer: chat_lib.ChatTokenizer, *, chat: str = "spec"):
        super().__init__()
        if engine.max_length is None:
            raise validation.UsageError(
                "the engine does not tell the positions of its model; expected a number to cut "
                "prompts to; give max_length to OpenAIEngine"
            )
        self.engine, self.tokens, self.chat = engine, tokenizer, chat
        self.max_length: int = engine.max_length

    @property
    def eot_token_id(self) -> int:
        return self.tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokens.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokens.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **others: Any
    ) -> list[int]:
        """Ids of a text, BOS first unless it is not wanted or the text has it."""
        del others
        ids = self.tokens.encode(string)
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(chat_lib.BOS)
        return [self.tokens.bos_id, *ids] if add_special_tokens else ids

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What says in lm-eval's results which template it was."""
        return f"tulu_jax {self.chat}" if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text, without BOS; the assistant's turn begins, or its last one goes
        on."""
        text = chat_lib.render(chat_history, chat=self.chat).text
        if add_generation_prompt:
            return f"{text}\n<|assistant|>\n"
        return text.removesuffix(chat_lib.EOS)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        """Of each (…, context, continuation) the summed log-probability, and whether every token is
        the likeliest."""
        found = []
        hidden = bool(options.get("disable_tqdm"))
        for first in tqdm.trange(0, len(requests), SCORED_AT_ONCE, desc="score", disable=hidden):
            prompts, continuations = [], []
            for _, context, continuation in requests[first : first + SCORED_AT_ONCE]:
                ids = (context + continuation)[-(self.max_length + 1) :]
                at = max(1, len(ids) - len(continuation))
                prompts.append(ids[:at])
                continuations.append(ids[at:])
            for score in self.engine.score(prompts, continuations):
                found.append((score.logps, score.is_greedy))
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text behind BOS; of one that is longer than the model,
        in windows that do not overlap."""
        windows, places = [], []
        for place, (text,) in enumerate(request.args for request in requests):
            pairs = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            for pair in pairs:
                windows.append((None, *utils.make_disjoint_window(pair)))
                places.append(place)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for place, (logps, _) in zip(places, scores, strict=True):
            totals[place] += logps
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """What follows each text, up to the first of its stop strings. Raises `UsageError` for
        settings that we do not have."""
        groups = collections.defaultdict(list)
        for place, request in enumerate(requests):
            groups[_sampling(request.args[1])].append(place)
        found = [""] * len(requests)
        with tqdm.tqdm(total=len(requests), desc="generate", disable=disable_tqdm) as bar:
            for sampling, places in groups.items():
                room = self.max_length - sampling.max_new_tokens
                if room < 1:
                    raise validation.UsageError(
                        f"a task asks for {sampling.max_new_tokens:,} new tokens; expected fewer "
                        f"than the model's {self.max_length:,} positions; set max_gen_toks"
                    )
                texts = [requests[place].args[0] for place in places]
                prompts = [self.tok_encode(text)[-room:] for text in texts]

                def done(number, replies, places=places):
                    found[places[number]] = replies[0].text
                    bar.update()

                self.engine.generate(prompts, sampling, seeds=_seeds(texts), done=done)
        return found


def _sampling(asked: dict[str, Any]) -> Sampling:
    """The settings of a task as ours."""
    settings = normalize_gen_kwargs(asked, MAX_NEW_TOKENS)
    unknown = {
        name: value
        for name, value in settings.items()
        if name not in (*_IGNORED, *_OF_SAMPLING) and value is not None
    }
    if unknown:
        raise validation.UsageError(
            f"a task asks for generation with {unknown}; expected only until, max_gen_toks, "
            f"do_sample, temperature, {' and '.join(_OF_SAMPLING)}"
        )
    temperature = settings.get("temperature", 0.0)  # absent where nothing is drawn
    drawn = {name: settings[name] for name in _OF_SAMPLING if temperature and name in settings}
    return Sampling(
        max_new_tokens=settings["max_gen_toks"],
        temperature=temperature,
        stop=tuple(text for text in settings["until"] if text),
        **drawn,
    )


def _seeds(texts: Sequence[str]) -> list[int]:
    """Of each text, and of how often it came before: the order of others does not matter."""
    count: collections.Counter[str] = collections.Counter()
    seeds = []
    for text in texts:
        seeds.append(xxhash.xxh3_64_intdigest(f"{count[text]}/{text}".encode()) & 0xFFFFFFFF)
        count[text] += 1
    return seeds
