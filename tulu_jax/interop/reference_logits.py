"""Logits of `transformers`, with the weights of one layer in memory at a time.

`transformers` computes; here its layers are filled one after the other, in float32. It needs torch.
"""

import numpy as np

from tulu_jax import validation
from tulu_jax.interop import config_file, sources
from tulu_jax.models.config import SCORE, LlamaConfig


def logits(files: sources.Weights, config: LlamaConfig, tokens: np.ndarray) -> np.ndarray:
    """float32 [B, T, V] of int32 tokens [B, T], of the weights in `files`; with a score head V = 1.

    Raises `UsageError` if torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise validation.UsageError(
            "--verify compares with transformers on torch, which is not installed; pip install "
            "torch, or go without --verify"
        ) from error
    import transformers
    from transformers.models.llama import modeling_llama

    fields = config_file.write_config(config)
    theirs = transformers.LlamaConfig(**fields, attn_implementation="eager")

    def weight(name: str):
        return torch.from_numpy(files.rows(name, slice(None)).astype(np.float32))

    with torch.no_grad():
        ids = torch.from_numpy(tokens).long()
        hidden = weight("model.embed_tokens.weight")[ids]
        positions = torch.arange(tokens.shape[1])[None]
        angles = modeling_llama.LlamaRotaryEmbedding(theirs)(hidden, positions)
        hidden_from = torch.triu(torch.ones(tokens.shape[1], tokens.shape[1]), diagonal=1)
        mask = (hidden_from * torch.finfo(torch.float32).min)[None, None]
        for number in range(config.num_layers):
            with torch.device("meta"):
                layer = modeling_llama.LlamaDecoderLayer(theirs, number)
            names = list(layer.state_dict())
            state = {name: weight(f"model.layers.{number}.{name}") for name in names}
            layer.load_state_dict(state, assign=True)
            hidden = layer(
                hidden, attention_mask=mask, position_ids=positions, position_embeddings=angles
            )
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            del layer, state
        norm = modeling_llama.LlamaRMSNorm(config.embed_dim, eps=config.norm_eps)
        norm.load_state_dict({"weight": weight("model.norm.weight")})
        head = f"{config.head}.weight"
        if config.tie_embeddings and config.head != SCORE:
            head = "model.embed_tokens.weight"
        return (norm(hidden) @ weight(head).T).numpy()
