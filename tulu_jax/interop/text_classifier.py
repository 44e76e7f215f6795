"""A Hugging Face sequence classifier by its folder, such as ToxiGen's RoBERTa."""

import os
from collections.abc import Iterator, Sequence

from tulu_jax import validation

BATCH_SIZE = 32


class TextClassifier:
    """The classifier in `folder`, by `transformers` and torch, in float32, on a GPU if torch has
    one. Raises `UsageError` where these are missing, or the folder holds no classifier with two
    labels."""

    def __init__(self, folder: str | os.PathLike[str]):
        try:
            import torch
            import transformers
        except ImportError as error:
            raise validation.UsageError(
                f"the classifier in {folder} needs torch ({error}); pip install torch"
            ) from error
        folder = validation.expanded(os.fspath(folder))
        if not os.path.isdir(folder):
            raise validation.UsageError(
                f"{folder}: found no such folder; expected one with a classifier as "
                "`save_pretrained` of transformers writes it; download it, or name another"
            )
        with validation.reading():
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True
            )
            self.model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
            )
        if report["missing_keys"] or self.model.config.num_labels != 2:
            missing = sorted(report["missing_keys"])[:3]
            raise validation.UsageError(
                f"{folder}: found {self.model.config.num_labels} labels, and no weights for "
                f"{missing}; expected a trained classifier with two labels; name its folder"
            )
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.to(self.device).eval()

    def probabilities(self, texts: Sequence[str]) -> Iterator[tuple[int, float]]:
        """(place, probability of label 1) of each text, cut to what the model takes. Texts of like
        length are computed together; padding is masked, so a text's batch does not matter beyond
        rounding."""
        import torch

        most = self.tokenizer.model_max_length
        positions = getattr(self.model.config, "max_position_embeddings", most)
        if self.model.config.model_type in ("roberta", "xlm-roberta", "camembert"):
            positions -= self.model.config.pad_token_id + 1  # its positions begin behind padding
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        for start in range(0, len(order), BATCH_SIZE):
            places = order[start : start + BATCH_SIZE]
            batch = self.tokenizer(
                [texts[place] for place in places],
                padding=True,
                truncation=True,
                max_length=min(most, positions),
                return_tensors="pt",
            ).to(self.device)
            with torch.no_grad():
                logits = self.model(**batch).logits.float()
            chances = torch.softmax(logits, dim=-1)[:, 1].tolist()
            yield from zip(places, chances, strict=True)
