"""`config.json` of a Hugging Face Llama: what `transformers` reads in it, as a `LlamaConfig`.

Absent fields take its defaults, and what our model does not compute is refused by name. Fields that
leave a Llama's numbers alone (`pretraining_tp`, which only cuts a product in parts) say nothing.
"""

from typing import Any

from etils import epath

from tulu_jax import strict_json, validation
from tulu_jax.models.config import LM_HEAD, SCORE, LlamaConfig

NAME = "config.json"
ARCHITECTURES = {LM_HEAD: "LlamaForCausalLM", SCORE: "LlamaForSequenceClassification"}
DEFAULT_ROPE_THETA, DEFAULT_NORM_EPS, DEFAULT_POSITIONS = 1e4, 1e-6, 2048

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_MAY_BE_NULL = ("num_key_value_heads", "head_dim")
_ALLOWED = {  # the first is what is expected; what is absent is None
    "model_type": ("llama",),
    "tie_word_embeddings": (False, True, None),
    "hidden_act": ("silu", "swish", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "sliding_window": (None,),
    "attention_chunk_size": (None,),
    "transformers_weights": (None,),  # names another file of weights
}
_FIELDS = {  # ours: theirs
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "embed_dim": "hidden_size",
    "mlp_dim": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "max_positions": "max_position_embeddings",
}


def read(folder: epath.Path) -> dict[str, Any]:
    """The fields of `config.json` in `folder`. Raises `ValueError` if it is no JSON object."""
    file = folder / NAME
    if not file.exists():
        raise ValueError(f"{file} does not exist; expected the folder of a Hugging Face checkpoint")
    return read_object(file)


def read_object(file: epath.Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises `ValueError` that names it if it holds none."""
    if found := validation.unreadable(file) or validation.stand_in(text := file.read_bytes()):
        raise ValueError(f"{file}: {found}")
    try:
        fields = strict_json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} holds a {type(fields).__name__}; expected a JSON object")
    return fields


def unsupported(fields: dict[str, Any]) -> list[str]:
    """Fields whose values this project does not compute, or that are absent, one line each."""
    problems = [f"{name} is missing" for name in _REQUIRED if fields.get(name) is None]
    whole = [name for name in (*_REQUIRED, *_MAY_BE_NULL) if fields.get(name) is not None]
    for name in (*whole, "max_position_embeddings"):
        value = fields.get(name, DEFAULT_POSITIONS)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            problems.append(f"{name} = {value!r}: expected a positive whole number")
    problems += _not_positive("rms_norm_eps", fields.get("rms_norm_eps", DEFAULT_NORM_EPS))
    problems += [
        f"{name} = {fields.get(name)!r}: expected {allowed[0]!r}"
        for name, allowed in _ALLOWED.items()
        if fields.get(name) not in allowed
    ]
    if any(kind != "full_attention" for kind in fields.get("layer_types") or ()):
        problems.append(
            f"layer_types = {fields['layer_types']!r}: expected 'full_attention' in every layer"
        )
    problems += _architecture_problems(fields)
    problems += _quantisation_problems(fields) + _rope_problems(fields)
    if not problems and fields["hidden_size"] % fields["num_attention_heads"]:
        problems.append(
            f"hidden_size = {fields['hidden_size']} is not a multiple of num_attention_heads = "
            f"{fields['num_attention_heads']}"
        )
    return problems


def head(fields: dict[str, Any]) -> str:
    """What is above the trunk of `fields`, of which `unsupported` has nothing to say."""
    scored = fields.get("architectures") == [ARCHITECTURES[SCORE]]
    return SCORE if scored else LM_HEAD


def parse(fields: dict[str, Any]) -> LlamaConfig:
    """The model of `fields`, of which `unsupported` has nothing to say, below an output projection;
    `head` tells which one it has. Raises `ValueError`."""
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    kv_heads, head_dim = (fields.get(name) for name in _MAY_BE_NULL)
    return LlamaConfig(
        vocab_size=fields["vocab_size"],
        num_layers=fields["num_hidden_layers"],
        embed_dim=width,
        mlp_dim=fields["intermediate_size"],
        num_heads=heads,
        num_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=width // heads if head_dim is None else head_dim,
        rope_theta=float(_rope_theta(fields)),
        norm_eps=float(fields.get("rms_norm_eps", DEFAULT_NORM_EPS)),
        tie_embeddings=bool(fields.get("tie_word_embeddings")),
        max_positions=fields.get("max_position_embeddings", DEFAULT_POSITIONS),
    )


def write_config(config: LlamaConfig) -> dict[str, Any]:
    """The fields of a `config.json`, readable by `transformers` 4 and 5 alike."""
    one_label = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return {
        "architectures": [ARCHITECTURES[config.head]],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()},
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "initializer_range": 0.02,
        "use_cache": True,
        **(one_label if config.head == SCORE else {}),
    }


def differences(found: LlamaConfig, expected: LlamaConfig) -> list[str]:
    """What `found`, of a `config.json`, computes otherwise than `expected`, one line a field."""
    return [
        f"{_FIELDS[name]} = {getattr(found, name)}; the run's model has {name} = "
        f"{getattr(expected, name)}. Take the model of that value in the gin file, or mend "
        f"{NAME} if it is wrong"
        for name in found.computed_otherwise(expected)
    ]


def _architecture_problems(fields: dict[str, Any]) -> list[str]:
    """Another class than those of ours, or more scores than one; absent it is a language model."""
    found, known = fields.get("architectures"), [[name] for name in ARCHITECTURES.values()]
    if found is not None and found not in known:
        return [f"architectures = {found!r}: expected one of {known}"]
    if head(fields) == SCORE:
        labels = fields.get("id2label")
        count = fields.get("num_labels", 2) if labels is None else len(labels)  # 2: its default
        if count != 1:
            return [f"id2label = {labels!r}: {count} labels; expected one, the score"]
    return []


def _rope(fields: dict[str, Any]) -> Any:
    """`transformers` 5 takes one of the two objects and completes it with the field beside it."""
    return fields.get("rope_scaling") or fields.get("rope_parameters") or {}


def _rope_theta(fields: dict[str, Any]) -> Any:
    return _rope(fields).get("rope_theta", fields.get("rope_theta", DEFAULT_ROPE_THETA))


def _rope_problems(fields: dict[str, Any]) -> list[str]:
    rope = _rope(fields)
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    if not isinstance(rope, dict):
        return [f"{name} = {rope!r}: expected null or an object"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    same = kind == "default" or (kind == "linear" and rope.get("factor") == 1)
    if not same or any(isinstance(value, dict) for value in rope.values()):
        return [f"{name} = {rope!r}: expected null or rope_type 'default'"]
    place = f"{name}.rope_theta" if "rope_theta" in rope else "rope_theta"
    problems = _not_positive(place, _rope_theta(fields))
    factor = rope.get("partial_rotary_factor")
    if factor not in (1, None):
        problems.append(f"{name}.partial_rotary_factor = {factor!r}: expected 1")
    return problems


def _quantisation_problems(fields: dict[str, Any]) -> list[str]:
    """4 bits of bitsandbytes are read, the weights say in which way; nothing else is."""
    found = fields.get("quantization_config")
    four = isinstance(found, dict) and found.get("load_in_4bit") is True
    if found is None or (four and found.get("quant_method") == "bitsandbytes"):
        return []
    return [
        f"quantization_config = {found!r}: expected null, or quant_method 'bitsandbytes' with "
        "load_in_4bit"
    ]


def _not_positive(name: str, value: Any) -> list[str]:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and 0 < value < 1e38:
        return []
    return [f"{name} = {value!r}: expected a positive number"]
