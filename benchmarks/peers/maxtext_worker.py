"""MaxText's update for `peers_cpu.py`: the trainers that `train_sft` and `train_dpo` make, on given
batches instead of its pipeline's, without checkpoints and logs. Layers keep what MaxText's fastest
policy of rematerialisation keeps."""

import dataclasses
import os
import tempfile

os.environ["DECOUPLE_GCLOUD"] = "TRUE"

import jax
import maxtext
import numpy as np
import optax
import protocol
import tunix_worker
from flax import nnx
from flax.linen import partitioning
from maxtext.configs import pyconfig
from maxtext.optimizers import optimizers
from maxtext.trainers.post_train.dpo import train_dpo
from maxtext.trainers.post_train.sft import train_sft
from maxtext.utils import maxtext_utils, model_creation_utils
from tunix.sft.dpo import dpo_trainer

# the adapter to Tunix takes no other name; its sizes are overridden
MODEL = {"sft": "default", "dpo": "llama3.1-8b"}


def configured(stage: str, size: protocol.Size, folder: str):
    settings = dict(
        run_name="peers",
        base_output_directory=folder,
        model_name=MODEL[stage],
        override_model_config=True,
        hardware="cpu",
        skip_jax_distributed_system=True,
        enable_checkpointing=False,
        dataset_type="synthetic",
        attention="dot_product",
        dtype="float32",
        weight_dtype="float32",
        remat_policy="minimal_with_context",
        base_num_decoder_layers=size.num_layers,
        base_emb_dim=size.embed_dim,
        base_mlp_dim=size.mlp_dim,
        base_num_query_heads=size.num_heads,
        base_num_kv_heads=size.num_heads,
        head_dim=size.head_dim,
        vocab_size=size.vocab_size,
        logits_via_embedding=False,
        rope_type="default",
        rope_max_timescale=int(protocol.ROPE_THETA),
        normalization_layer_epsilon=protocol.NORM_EPS,
        per_device_batch_size=size.rows,
        max_target_length=size.length,
        packing=False,
        steps=10**6,
        eval_interval=-1,
        learning_rate=protocol.LEARNING_RATE,
        warmup_steps_fraction=0.0,
        gradient_clipping_threshold=protocol.CLIP_NORM,
        adam_b1=protocol.B1,
        adam_b2=protocol.B2,
        adam_eps=protocol.EPS,
        adam_weight_decay=protocol.WEIGHT_DECAY,
    )
    if stage == "dpo":
        settings["dpo.dpo_beta"] = protocol.BETA
    path = os.path.join(os.path.dirname(maxtext.__file__), "configs", "post_train", f"{stage}.yml")
    return pyconfig.initialize_pydantic(["", path, *(f"{k}={v}" for k, v in settings.items())])


def optimizer(config, model) -> optax.GradientTransformation:
    """As `setup_trainer_state` of both trainers chains it."""
    schedule = maxtext_utils.create_learning_rate_schedule(config)
    adamw = optimizers.get_optimizer(config, schedule, model)
    return optax.chain(optax.clip_by_global_norm(config.gradient_clipping_threshold), adamw)


def quiet(config):
    """A trainer's config that writes nothing."""
    return dataclasses.replace(
        config,
        checkpoint_root_directory=None,
        checkpointing_options=None,
        metrics_logging_options=None,
    )


def sft_batch(size: protocol.Size) -> dict[str, np.ndarray]:
    tokens = protocol.sft_tokens(size)
    positions = np.broadcast_to(np.arange(size.length, dtype=np.int32), tokens.shape)
    trained = np.broadcast_to(np.arange(size.length) < size.length - 1, tokens.shape)
    return {
        "inputs": tokens,
        "inputs_position": positions,
        "inputs_segmentation": np.ones_like(tokens),
        "targets": np.roll(tokens, -1, axis=1),
        "targets_position": positions,
        "targets_segmentation": trained.astype(np.int32),
    }


def sft_trainer(config):
    model, mesh = model_creation_utils.from_pretrained(config)
    with jax.set_mesh(mesh), partitioning.axis_rules(config.logical_axis_rules):
        nnx.pop(model, nnx.Intermediate)
        trainer_config = quiet(train_sft.get_tunix_config(config))
        trainer = train_sft.MaxTextPeftTrainer(model, optimizer(config, model), trainer_config)
        return train_sft.use_maxtext_loss_function(trainer, config), mesh


def new_dpo_trainer(config):
    model, mesh = model_creation_utils.from_pretrained(
        config, wrap_with_tunix_adapter=True, tokenizer_pad_id=0
    )
    with partitioning.axis_rules(config.logical_axis_rules):
        trainer = dpo_trainer.DPOTrainer(
            model=model,
            ref_model=nnx.clone(model),
            optimizer=optimizer(config, model),
            training_config=quiet(train_dpo.get_tunix_config(config)),
        )
    return trainer, mesh


def build(stage: str, size: protocol.Size):
    with tempfile.TemporaryDirectory() as folder:
        config = configured(stage, size, folder)
        if stage == "sft":
            (trainer, mesh), batch = sft_trainer(config), sft_batch(size)
        else:
            (trainer, mesh), batch = new_dpo_trainer(config), tunix_worker.dpo_batch(size)
    updates = tunix_worker.updater(trainer, batch)

    def update(number: int) -> float:
        with jax.set_mesh(mesh), partitioning.axis_rules(config.logical_axis_rules):
            return updates(number)

    return update


if __name__ == "__main__":
    protocol.serve(build, ["maxtext", "google-tunix"])
