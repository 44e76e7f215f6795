"""Tunix's update for `peers_cpu.py`: `PeftTrainer.train` and `DPOTrainer.train` over given batches,
on its Llama 3 model. Logits and one-hot targets are whole: it has no chunked loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import protocol
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.rl import common
from tunix.sft import peft_trainer
from tunix.sft.dpo import dpo_trainer


def make_model(size: protocol.Size, seed: int) -> nnx.Module:
    config = llama3.ModelConfig(
        num_layers=size.num_layers,
        vocab_size=size.vocab_size,
        embed_dim=size.embed_dim,
        hidden_dim=size.mlp_dim,
        num_heads=size.num_heads,
        head_dim=size.head_dim,
        num_kv_heads=size.num_heads,
        rope_theta=int(protocol.ROPE_THETA),
        norm_eps=protocol.NORM_EPS,
        weight_tying=False,
    )
    return llama3.Llama3(config, rngs=nnx.Rngs(seed))


def optimizer() -> optax.GradientTransformation:
    adamw = optax.adamw(
        protocol.LEARNING_RATE,
        b1=protocol.B1,
        b2=protocol.B2,
        eps=protocol.EPS,
        weight_decay=protocol.WEIGHT_DECAY,
    )
    return optax.chain(optax.clip_by_global_norm(protocol.CLIP_NORM), adamw)


def sft_trainer(size: protocol.Size):
    """The trainer and its batch."""
    config = peft_trainer.TrainingConfig(eval_every_n_steps=10**9)
    trainer = peft_trainer.PeftTrainer(make_model(size, 0), optimizer(), config)

    def model_input(batch):
        mask = batch.input_mask > 0
        return {
            "input_tokens": batch.input_tokens,
            "input_mask": mask,
            "positions": common.build_positions_from_mask(mask),
            "attention_mask": common.make_causal_attn_mask(mask),
        }

    tokens = protocol.sft_tokens(size)
    batch = peft_trainer.TrainingInput(input_tokens=tokens, input_mask=np.ones_like(tokens))
    return trainer.with_gen_model_input_fn(model_input), batch


def dpo_batch(size: protocol.Size) -> dpo_trainer.TrainingInput:
    prompts, chosen, rejected = (jnp.asarray(ids) for ids in protocol.dpo_tokens(size))
    return dpo_trainer.TrainingInput(
        prompt_ids=prompts,
        prompt_mask=jnp.ones_like(prompts),
        chosen_ids=chosen,
        chosen_mask=jnp.ones_like(chosen),
        rejected_ids=rejected,
        rejected_mask=jnp.ones_like(rejected),
    )


def updater(trainer, batch):
    """Updates by the trainer's own loop, `train`, as often as it is asked for."""
    trainer.is_managed_externally = True  # `train` neither skips batches nor closes the trainer

    def update(number: int) -> float:
        trainer.train([batch] * number)
        jax.block_until_ready(nnx.state(trainer.model))
        return float(trainer._prev_buffered_train_metrics.loss)  # of the last; nobody else tells

    return update


def build(stage: str, size: protocol.Size):
    if stage == "sft":
        return updater(*sft_trainer(size))
    config = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=10**9, beta=protocol.BETA)
    # the reference is a second model with the same weights
    models = make_model(size, 0), make_model(size, 0)
    return updater(dpo_trainer.DPOTrainer(*models, optimizer(), config), dpo_batch(size))


if __name__ == "__main__":
    protocol.serve(build, ["google-tunix"])
