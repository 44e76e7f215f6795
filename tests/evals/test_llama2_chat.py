"""The format of Llama-2's own chat models: its texts, its ids, and what it is not."""

import pytest

from tulu_jax import validation
from tulu_jax.data import chat
from tulu_jax.decode.sampling import Sampling
from tulu_jax.evals import llama2_chat, run
from tulu_jax.evals.benchmark import Request

SYSTEM = {"role": "system", "content": "Be brief."}
HI = {"role": "user", "content": " Hi\n"}
YES = {"role": "assistant", "content": "Yes"}
AND = {"role": "user", "content": "And?"}


class Texts:
    """A tokenizer whose ids are characters."""

    bos_id = -1

    def encode(self, text):
        return [text]


@pytest.mark.parametrize(
    "messages, prefix, text",
    [
        ([HI], "", "[INST] Hi [/INST]"),
        ([HI], "Answer:", "[INST] Hi [/INST] Answer:"),
        ([HI], "\nAnswer:", "[INST] Hi [/INST]\nAnswer:"),
        ([HI, YES, AND], "", "[INST] Hi [/INST] Yes </s><s>[INST] And? [/INST]"),
        ([SYSTEM, HI], "", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Hi [/INST]"),
    ],
)
def test_texts(messages, prefix, text):
    assert llama2_chat.generation_prompt(messages, Texts(), prefix=prefix) == [-1, text]


@pytest.mark.parametrize("messages", [[], [SYSTEM], [HI, AND], [HI, YES], [YES], [HI, SYSTEM, HI]])
def test_what_is_no_chat_of_llama2_is_refused(messages):
    with pytest.raises(validation.UsageError, match="are no chat of Llama-2; expected an optional"):
        llama2_chat.generation_prompt(messages, Texts())


def test_ids_of_the_published_tokenizer(shared_data):
    tokenizer = chat.load_tokenizer(str(shared_data / "tokenizer/llama2"))
    ids = llama2_chat.generation_prompt([HI, YES, AND], tokenizer)
    inst, end = [518, 25580, 29962], [518, 29914, 25580, 29962]
    first = [1, *inst, 6324, *end, 3869, 29871, 2]
    assert ids == [*first, 1, *inst, 1126, 29973, *end]


def test_a_benchmark_is_asked_in_it(tokenizer):
    request = Request(
        id="0", group="a", prompt=[HI], prefix="Answer:", sampling=Sampling(max_new_tokens=2),
        then=("And?",),
    )  # fmt: skip
    raw = Request(id="1", group="a", prompt="Raw", sampling=Sampling(max_new_tokens=2))
    of = run.encode("x", [request, raw], tokenizer, chat=llama2_chat.NAME, is_cap=False)
    said, also = (tokenizer.decode(one.prompt) for one in of.asked)
    assert said.endswith("[INST] Hi [/INST] Answer:") and also.endswith("Raw")
    assert of.asked[0].prompt.count(tokenizer.bos_id) == 1
