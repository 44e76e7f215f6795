"""Levanter's update for `peers_cpu.py`: `Trainer.train_step` with the losses of its `train_lm` and
`train_dpo`, on its Llama without rematerialisation."""

import haliax as hax
import jax
import numpy as np
import protocol
from haliax import Axis
from levanter import dpo
from levanter.data.text import DpoExample
from levanter.layers.attention import AttentionMask
from levanter.layers.rotary import DefaultRotaryEmbeddingsConfig
from levanter.models.llama import LlamaConfig
from levanter.models.lm_model import LmExample
from levanter.optim import AdamConfig
from levanter.tracker import NoopConfig
from levanter.trainer import Trainer, TrainerConfig
from levanter.utils.tree_utils import inference_mode

NUM_STEPS = 10**6


def examples(tokens: np.ndarray, first_target: int) -> LmExample:
    """Rows [B, T] whose targets, from the token `first_target` on, are trained."""
    axes = Axis("batch", tokens.shape[0]), Axis("position", tokens.shape[1])
    places = np.arange(tokens.shape[1])
    trained = (places >= first_target - 1) & (places < tokens.shape[1] - 1)
    return LmExample(
        tokens=hax.named(tokens, axes),
        loss_weight=hax.named(np.broadcast_to(trained.astype(np.float32), tokens.shape), axes),
        attn_mask=AttentionMask.causal(),
    )


def dpo_examples(size: protocol.Size) -> DpoExample:
    prompts, *answers = protocol.dpo_tokens(size)
    sides = [np.concatenate([prompts, answer], axis=1) for answer in answers]
    chosen, rejected = (examples(side, size.prompt) for side in sides)
    return DpoExample(chosen=chosen, rejected=rejected)


def sft_loss(model, example: LmExample, *, key=None):
    return model.compute_next_token_loss(example, key=key)


def dpo_loss(model: dpo.DpoModel, example: DpoExample, *, key=None):
    del key  # nothing is dropped
    reference = inference_mode(model.reference, True)
    return dpo.dpo_loss(model.policy, reference, example, beta=protocol.BETA)


def build(stage: str, size: protocol.Size):
    length = size.length if stage == "sft" else size.prompt + size.answer
    config = LlamaConfig(
        max_seq_len=length,
        hidden_dim=size.embed_dim,
        intermediate_dim=size.mlp_dim,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        num_kv_heads=size.num_heads,
        head_dim=size.head_dim,
        layer_norm_epsilon=protocol.NORM_EPS,
        rope=DefaultRotaryEmbeddingsConfig(theta=protocol.ROPE_THETA),
        gradient_checkpointing=False,
    )
    trainer_config = TrainerConfig(
        id="peers",
        tracker=NoopConfig(),
        train_batch_size=size.rows if stage == "sft" else size.pairs,
        num_train_steps=NUM_STEPS,
        load_checkpoint=False,
        require_accelerator=False,
        log_jaxprs=False,
        log_xla_hlo=False,
    )
    optimizer = AdamConfig(
        learning_rate=protocol.LEARNING_RATE,
        lr_schedule="constant",
        warmup=0.0,
        weight_decay=protocol.WEIGHT_DECAY,
        beta1=protocol.B1,
        beta2=protocol.B2,
        epsilon=protocol.EPS,
        max_grad_norm=protocol.CLIP_NORM,
    ).build(NUM_STEPS)
    vocab, key = Axis("vocab", size.vocab_size), jax.random.PRNGKey(0)

    def model():
        return config.build(vocab, key=key)

    def both():
        return dpo.DpoModel(policy=model(), reference=model())

    if stage == "sft":
        batch, loss, options = examples(protocol.sft_tokens(size), 1), sft_loss, {}
        make = model
    else:
        batch, loss, make = dpo_examples(size), dpo_loss, both
        options = {"is_trainable": dpo.DpoModel(policy=True, reference=False)}
    trainer = Trainer(trainer_config, optimizer, loss, add_default_hooks=False)
    with trainer:
        state = trainer.initial_state(key, model_init=make, **options)

    def update(number: int) -> float:
        nonlocal state
        with trainer:
            for _ in range(number):
                info = trainer.train_step(state, batch)
                state = info.state
            jax.block_until_ready(state)
        return float(info.loss)

    return update


if __name__ == "__main__":
    protocol.serve(build, ["marin-levanter"])
