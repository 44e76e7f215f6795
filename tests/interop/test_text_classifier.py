"""A judge that is a classifier by its folder, against `transformers` on one text at a time."""

import pytest
import small_classifier

from tulu_jax import validation
from tulu_jax.evals import judges
from tulu_jax.evals.benchmark import Question


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> str:
    return small_classifier.save(str(tmp_path_factory.mktemp("classifier")))


def test_a_classifier_by_its_folder(classifier, tmp_path):
    """A text's probability is that of the text alone, whatever it is padded with; long texts are
    cut to what the model takes."""
    import torch
    import transformers

    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = [" ".join(letters[n % 26] for n in range(i, 2 * i + 1)) for i in range(70)]
    questions = [Question(id=f"t{n}", kind="toxicity", prompt=t) for n, t in enumerate(texts)]
    judge, said = judges.Toxicity(classifier), []
    options = dict(cache=tmp_path / "v.jsonl", say=said.append)
    found = judges.answer(questions, {"toxicity": judge}, **options)
    assert said == [f"the classifier in {classifier} reads 70 texts"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(classifier)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    chances = []
    for number, text in enumerate(texts):
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=32)
        with torch.no_grad():
            logits = model(**ids).logits[0]
        chances.append(torch.softmax(logits, -1)[1].item())
        assert float(found[f"t{number}"][0]) == pytest.approx(chances[-1], abs=1e-5)  # float32
    assert max(chances) - min(chances) > 0.1
    again = judges.answer(questions[3:5], {"toxicity": judge}, cache=tmp_path / "other.jsonl")
    for name, (verdict,) in again.items():
        assert float(verdict) == pytest.approx(float(found[name][0]), abs=1e-5)


def test_folders_that_hold_no_classifier(classifier, tmp_path):
    with pytest.raises(validation.UsageError, match="found no such folder"):
        judges.Toxicity(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(validation.UsageError):
        judges.Toxicity(tmp_path)
