"""EasyDeL's update for `peers_cpu.py`: the step of `SFTTrainer` and of `DPOTrainer` with what their
loops do to a batch before it, on its Llama without rematerialisation."""

import functools
import os
import tempfile

os.environ["ENABLE_DISTRIBUTED_INIT"] = "0"

import datasets
import easydel
import numpy as np
import protocol
import tokenizers
import transformers
from flax import nnx
from jax import numpy as jnp


def make_model(size: protocol.Size):
    config = easydel.LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.embed_dim,
        intermediate_size=size.mlp_dim,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        head_dim=size.head_dim,
        max_position_embeddings=max(size.length, size.prompt + size.answer),
        rms_norm_eps=protocol.NORM_EPS,
        rope_theta=protocol.ROPE_THETA,
        tie_word_embeddings=False,
        attn_mechanism="vanilla",
    )
    return easydel.LlamaForCausalLM.sequential_init(
        config=config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)
    )


def tokenizer(size: protocol.Size) -> transformers.PreTrainedTokenizerFast:
    """The trainers want one, and never use it on rows of ids."""
    words = {f"w{i}": i for i in range(size.vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="w0", bos_token="w1", eos_token="w2"
    )


def arguments(stage: str, size: protocol.Size, folder: str):
    options = dict(
        save_directory=folder,
        total_batch_size=size.rows,
        num_train_epochs=1,
        max_training_steps=10**6,
        max_length=size.length,
        learning_rate=protocol.LEARNING_RATE,
        scheduler="none",
        weight_decay=protocol.WEIGHT_DECAY,
        clip_grad=protocol.CLIP_NORM,
        extra_optimizer_kwargs={"b1": protocol.B1, "b2": protocol.B2, "eps": protocol.EPS},
        use_wandb=False,
        do_last_save=False,
        save_steps=None,
    )
    if stage == "sft":
        return easydel.SFTConfig(**options)
    options |= dict(
        total_batch_size=size.pairs,
        max_length=size.prompt + size.answer,
        max_prompt_length=size.prompt,
        max_completion_length=size.answer,
    )
    return easydel.DPOConfig(beta=protocol.BETA, **options)


def masked(**fields: np.ndarray) -> dict[str, np.ndarray]:
    """`NAME_input_ids` and `NAME_attention_mask` for each array of ids."""
    batch = {f"{name}_input_ids": ids for name, ids in fields.items()}
    return batch | {f"{name}_attention_mask": np.ones_like(ids) for name, ids in fields.items()}


def build(folder: str, stage: str, size: protocol.Size):
    if stage == "sft":
        tokens = protocol.sft_tokens(size)
        batch = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "labels": tokens}
        make = easydel.SFTTrainer
    else:
        prompts, chosen, rejected = protocol.dpo_tokens(size)
        batch = masked(prompt=prompts, chosen=chosen, rejected=rejected)
        make = easydel.DPOTrainer
    trainer = make(
        arguments=arguments(stage, size, folder),
        model=make_model(size),
        processing_class=tokenizer(size),
        train_dataset=datasets.Dataset.from_dict({k: v.tolist() for k, v in batch.items()}),
    )
    state = trainer.model_state

    def update(number: int) -> float:
        nonlocal state
        with trainer.mesh:
            for _ in range(number):
                state, metrics, error = trainer._execute_train_step(state, dict(batch))
                if error is not None:
                    raise error
        return float(metrics.loss)

    return update


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        protocol.serve(functools.partial(build, folder), ["easydel"])
