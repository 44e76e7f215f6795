"""Adapters as PEFT's folders: `adapter_config.json` and `adapter_model.safetensors`.

PEFT keeps A as [r, in] and B as [out, r] of each layer, in float32 or as trained; ours are stacked
over layers and turned. Where tulu_jax wrote the file, its header says which base the adapter is of.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from tulu_jax import atomic, strict_json
from tulu_jax.models import lora
from tulu_jax.models.config import LlamaConfig
from tulu_jax.validation import UsageError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OF_BASE = "tulu_jax_base"  # in the header: `state.fingerprint` of the base
_NAME = re.compile(
    r"base_model\.model\.model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.(lora_A|lora_B)\.weight"
)
_OURS = {"lora_A": lora.A, "lora_B": lora.B}
# What of PEFT's settings we do not compute, and the value that leaves it out.
_WITHOUT = {
    "bias": "none", "fan_in_fan_out": False, "modules_to_save": None, "use_dora": False,
    "lora_bias": False, "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": None,
    "layer_replication": None, "trainable_token_indices": None, "alora_invocation_tokens": None,
    "use_qalora": False, "target_parameters": None, "megatron_config": None,
}  # fmt: skip


def save(
    folder: epath.Path, adapters: dict, config: lora.LoRAConfig, *, base: str | None, weights: str
) -> None:
    """Writes `adapters` of a base at `base` with the fingerprint `weights` as a PEFT folder."""
    tensors = {}
    for part, projections in adapters["model"]["layers"].items():
        for name, leaves in projections.items():
            for theirs, ours in _OURS.items():
                stack = np.asarray(jax.device_get(leaves[ours]))
                for layer, matrix in enumerate(stack):
                    path = f"base_model.model.model.layers.{layer}.{part}.{name}.{theirs}.weight"
                    tensors[path] = np.ascontiguousarray(matrix.T)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or "",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rank_stabilised,
        "target_modules": sorted(config.names),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt", OF_BASE: weights}
    atomic.write_bytes(folder / WEIGHTS, safetensors.numpy.save(tensors, metadata=header))
    atomic.write_text(folder / CONFIG, strict_json.dumps(fields, indent=2) + "\n")


def read_config(folder: epath.Path) -> lora.LoRAConfig:
    """The settings of the adapter in a PEFT folder. Raises `UsageError` for what is no LoRA of
    linear layers, with each setting that is not computed here."""
    file = folder / CONFIG
    try:
        fields = strict_json.loads(file.read_text())
    except FileNotFoundError:
        raise UsageError(f"{folder} has no {CONFIG}; expected a folder that PEFT wrote") from None
    except ValueError as error:
        raise UsageError(f"{file} is not JSON ({error}); expected what PEFT wrote") from None
    if not isinstance(fields, dict) or fields.get("peft_type") != "LORA":
        kind = fields.get("peft_type") if isinstance(fields, dict) else fields
        raise UsageError(f"{file}: peft_type = {kind!r}; expected 'LORA'")
    problems = [
        f"{file}: {name} = {fields[name]!r} is not computed here; expected {left_out!r}"
        for name, left_out in _WITHOUT.items()
        if fields.get(name, left_out) not in (left_out, None, False, {}, [])
    ]
    if problems:
        raise UsageError("\n".join(problems))
    targets = fields.get("target_modules")
    if targets == "all-linear":
        targets = list(lora.TARGETS["all"])
    if not isinstance(targets, list):
        raise UsageError(f"{file}: target_modules = {targets!r}; expected a list of names")
    everything = set(targets) == set(lora.TARGETS["all"])
    return lora.LoRAConfig(
        rank=fields["r"],
        alpha=float(fields["lora_alpha"]),
        dropout=float(fields.get("lora_dropout", 0.0)),
        targets="all" if everything else ",".join(sorted(targets)),
        rank_stabilised=bool(fields.get("use_rslora", False)),
    )


def load(folder: epath.Path, config: lora.LoRAConfig, model: LlamaConfig) -> dict:
    """The adapters of a PEFT folder as `lora.init` has them, numpy arrays in `config.dtype`.

    Raises `UsageError` that lists what is missing, unknown or of another shape.
    """
    content = (folder / WEIGHTS).read_bytes()
    tensors = safetensors.numpy.load(content)
    abstract = jax.eval_shape(
        lambda: lora.init(config, model.projections, model.num_layers, jax.random.key(0))
    )
    found, problems = _stacks(tensors, folder / WEIGHTS)

    def leaf(path, expected):
        part, name, ours = (step.key for step in path[2:])
        layers = found.pop((part, name, ours), {})
        what = f"{folder / WEIGHTS}: {part}.{name}.{ours}"
        if sorted(layers) != list(range(model.num_layers)):
            missing = sorted(set(range(model.num_layers)) - set(layers))
            problems.append(
                f"{what} of layers {missing or sorted(layers)[-1:]}: expected all of "
                f"{model.num_layers} layers and no more"
            )
            return None
        shape = tuple(expected.shape[1:][::-1])
        bad = [layer for layer, matrix in layers.items() if matrix.shape != shape]
        if bad:
            problems.append(
                f"{what} of layer {bad[0]} has shape {list(layers[bad[0]].shape)}; "
                f"expected {list(shape)}"
            )
            return None
        stack = np.stack([layers[layer].T for layer in range(model.num_layers)])
        return stack.astype(expected.dtype)

    adapters = jax.tree.map_with_path(leaf, abstract)
    problems += [
        f"{folder / WEIGHTS}: {'.'.join(names)} is no adapter of {', '.join(config.names)}"
        for names in found
    ]
    if problems:
        raise UsageError("\n".join(problems))
    return adapters


def of_base(folder: epath.Path) -> str | None:
    """The fingerprint of the base that an adapter is of; None where another program wrote it."""
    file = folder / WEIGHTS
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header: Mapping[str, Any] = strict_json.loads(file.read_bytes()[8 : 8 + size])
    return header.get("__metadata__", {}).get(OF_BASE)


def _stacks(tensors, file):
    """{(part, projection, leaf): {layer: matrix}}, and what has another name."""
    found: dict = {}
    problems = []
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            problems.append(f"{file}: {name} is not known; expected LoRA of linear layers")
            continue
        layer, part, projection, leaf = match.groups()
        found.setdefault((part, projection, _OURS[leaf]), {})[int(layer)] = tensor
    return found, problems
