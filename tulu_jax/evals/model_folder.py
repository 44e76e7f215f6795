"""A Hugging Face folder as an engine: its model on the devices that are here, its tokenizer."""

import functools

import jax
from etils import epath

from tulu_jax import base as base_lib
from tulu_jax import validation
from tulu_jax.data import chat as chat_lib
from tulu_jax.decode import decoder as decoder_lib
from tulu_jax.interop import config_file, hf
from tulu_jax.models import llama, paged_attention
from tulu_jax.models.config import ExecutionConfig
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.parallel import sharding, slices
from tulu_jax.quant import nf4
from tulu_jax.serving import engine as engine_lib

_PROBE = [
    {"role": "user", "content": "One"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]


def tokenizer_of(folder: str) -> chat_lib.ChatTokenizer:
    """The tokenizer in a folder. Raises `UsageError`."""
    with validation.reading():
        return chat_lib.load_tokenizer(folder)


def max_length_of(folder: str) -> int:
    """The positions of the model in a folder, from its `config.json`. Raises `UsageError`."""
    with validation.reading():
        return hf.read_config(folder).max_positions


def load(
    folder: str, tokenizer: chat_lib.ChatTokenizer, *, slots: int, weights: str | None = None
) -> engine_lib.OwnEngine:
    """Our decoder with the weights in a folder, in the dtype in which they are (of float16 in
    bfloat16), or rounded to `weights`, a kind of `nf4.KINDS`, as they are read. Raises `UsageError`
    for what cannot be read or is no Llama."""
    with validation.reading():
        config = hf.read_config(folder)
        dtype = hf.weights_dtype(folder, config)
    dtype = dtype if dtype in hf.DTYPES else "bfloat16"
    on_tpu = jax.default_backend() == "tpu"
    laid = slices.resident if on_tpu else slices.anywhere
    mesh = mesh_lib.make(laid(jax.device_count(), config.axis_sizes))
    abstract = llama.abstract_params(config, dtype)
    quant = None if weights is None else nf4.QuantConfig(kind=weights)
    if quant is not None:
        abstract = jax.eval_shape(functools.partial(nf4.quantise_params, config=quant), abstract)
    abstract = jax.tree.map(
        lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
        abstract,
        sharding.param_shardings(mesh, abstract),
    )
    with jax.set_mesh(mesh):
        params = base_lib.load(folder, config, abstract, quant)
    paged = {}
    if on_tpu:
        paged["page"] = paged_attention.page_for(config, tensor=mesh.shape["tensor"])
    decoder = decoder_lib.Decoder(
        config, ExecutionConfig(compute_dtype=dtype), slots=slots, **paged
    )
    return engine_lib.OwnEngine(decoder, llama.own(params), tokenizer, mesh=mesh)


def chat_problems(folder: str) -> list[str]:
    """Why a folder's model may be no model that chats in TÜLU's format, one line each: its
    tokenizer has no chat template, or one that writes something else."""
    name = f"the tokenizer in {folder}"
    advice = (
        "give --chat=none for a base model, --chat=llama2 for Llama-2-chat or Code Llama "
        "Instruct, or --chat=spec if this model was trained on TÜLU's format all the same"
    )
    if not _has_template(epath.Path(folder)):
        return [f"{name} has no chat template; expected TÜLU's; {advice}"]
    import transformers

    with validation.reading():
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
    try:
        said = theirs.apply_chat_template(_PROBE, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template raises whatever jinja does
        return [f"{name} has a chat template that fails ({error}); expected TÜLU's; {advice}"]
    text = chat_lib.render(_PROBE, chat="spec").text + "\n<|assistant|>"
    if said.removeprefix(chat_lib.BOS).strip() in (text, text.replace("</s>\n", "</s>")):
        return []
    return [f"{name} writes chats as {said[:80]!r}…; expected TÜLU's {text[:80]!r}…; {advice}"]


def _has_template(folder: epath.Path) -> bool:
    if (folder / "chat_template.jinja").exists():
        return True
    file = folder / "tokenizer_config.json"
    with validation.reading():
        return file.exists() and bool(config_file.read_object(file).get("chat_template"))
