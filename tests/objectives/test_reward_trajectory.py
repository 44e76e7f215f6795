"""Updates of whole runs: the losses of `trainer.Run` beside those of TRL's `RewardTrainer`."""

import builders
import jax
import numpy as np
import pytest

from tulu_jax import trainer
from tulu_jax.data import chat
from tulu_jax.interop import hf, tokenizer_export
from tulu_jax.models import llama
from tulu_jax.objectives import reward
from tulu_jax.training import metrics as metrics_lib

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")


class TRL(trl.RewardTrainer):
    """TRL's trainer on encoded pairs, in the order given; keeps the loss of each update."""

    def __init__(self, *arguments, updates: list[list[int]], **options):
        self.updates, self.losses = updates, []
        super().__init__(*arguments, **options)

    def _prepare_dataset(self, dataset, *arguments):
        return dataset  # the ids are those of our encoder

    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(
            self.train_dataset, batch_sampler=self.updates, collate_fn=self.data_collator
        )

    def compute_loss(self, *arguments, **options):
        loss = super().compute_loss(*arguments, **options)
        self.losses.append(loss.item())
        return loss


def losses_of_trl(config, rows, workdir) -> list[float]:
    """Those of the updates of `config` on the pairs of `rows`, from the folder `config.base`."""
    size, optimizer = config.batch_size, config.optimizer
    updates = [
        [int(i) for row in range(step * size, (step + 1) * size) for i in rows.examples(row)]
        for step in range(config.num_steps)
    ]
    examples = [
        {
            f"{name}_ids": ids.tolist()
            for name, (ids, _) in zip(("chosen", "rejected"), rows.store.sides(i), strict=True)
        }
        for i in range(rows.num_examples)
    ]
    arguments = trl.RewardConfig(
        output_dir=str(workdir),
        max_length=None,
        max_steps=config.num_steps,
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type="polynomial",
        lr_scheduler_kwargs={"lr_end": optimizer.end_learning_rate, "power": 1.0},
        warmup_steps=int(np.ceil(optimizer.warmup_ratio * config.num_steps)),
        adam_beta1=optimizer.b1,
        adam_beta2=optimizer.b2,
        adam_epsilon=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.clip_norm,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.base)
    tokenizer.pad_token = "<unk>"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        config.base, dtype=torch.float32
    )
    assert type(model) is transformers.LlamaForSequenceClassification
    theirs = TRL(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(examples),
        processing_class=tokenizer,
        updates=updates,
    )
    theirs.train()
    return theirs.losses


@pytest.mark.slow
@pytest.mark.parametrize("number", [5, 50])
def test_losses_of_updates_are_those_of_trl(tmp_path, tokenizer_dir, number):
    """The same weights and head, ids, order, AdamW, and a rate that falls to a tenth. The recipe's
    shape; on random weights a larger rate."""
    config = builders.train_config(
        tmp_path,
        tokenizer=tokenizer_dir,
        dpo_stage=True,
        objective=reward.RewardConfig(),
        base=str(tmp_path / "hf"),
        num_steps=number,
    )
    config = builders.replace(
        config,
        data__packing="best_fit",
        data__max_length=128,
        optimizer__learning_rate=3e-3 if number == 5 else 3e-4,
        optimizer__end_learning_rate=3e-4 if number == 5 else 3e-5,
        optimizer__warmup_ratio=0.2,
    )
    params = jax.jit(lambda: llama.init_params(config.trained_model, jax.random.key(3)))()
    hf.save(
        config.base,
        params,
        config.trained_model,
        dtype="float32",
        generation_config={"pad_token_id": 0},
        write_tokenizer=None,
    )
    backend = chat.load_tokenizer(config.data.tokenizer).backend
    tokenizer_export.save(backend, config.base, max_length=None, mode="spec")
    run = trainer.Run(config)
    run.train()
    lines = metrics_lib.read(config.workdir)
    ours = [line["train/loss"] for line in lines if "train/loss" in line]
    theirs = losses_of_trl(config, run.feed.rows, tmp_path / "trl")
    assert len(ours) == len(theirs) == number
    assert max(ours) - min(ours) > 0.05  # it learns: this is no comparison of constants
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    print(f"{number} updates: losses differ by {np.abs(np.subtract(ours, theirs)).max():.2g}")
