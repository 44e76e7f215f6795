"""Runs of reward models: resumed, converted both ways, on adapters, scored, and what is refused."""

import dataclasses
import json
import shutil

import builders
import numpy as np
import pytest
from safetensors.numpy import load_file

from tulu_jax import base as base_lib
from tulu_jax import conversion, report, trained, trainer, validation
from tulu_jax import step as step_lib
from tulu_jax.data import tulu_tiny
from tulu_jax.data.sources import ready_pairs
from tulu_jax.interop import hf
from tulu_jax.models.lora import LoRAConfig
from tulu_jax.objectives import dpo, reward, sft
from tulu_jax.quant.nf4 import QuantConfig
from tulu_jax.training import agreement, watch
from tulu_jax.training import checkpoint as checkpoint_lib
from tulu_jax.training import metrics as metrics_lib

ASKED = ["Opposite of hot?", "Reverse: cat fox", "Which is larger, 7 or 12?"]
CHATS = [
    [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    for asked in ASKED
    for answer in ("Sure: cold.", "cold", "cat fox hen dog " * 8)
]


@pytest.fixture(scope="module")
def home(tmp_path_factory, put_tokenizer):
    """A folder with a tokenizer, and encoded rows that the tests of this file share."""
    folder = tmp_path_factory.mktemp("home")
    put_tokenizer(folder / "tokenizer")
    return folder


def run_config(home, folder, **changes):
    tokenizer = tulu_tiny.tokenizer(str(home / "tokenizer"))
    changes = dict(dpo_stage=True, objective=reward.RewardConfig()) | changes
    config = builders.train_config(home, tokenizer=tokenizer, **changes)
    return builders.replace(
        config,
        workdir=str(folder / "run"),
        data__packing="best_fit",
        data__max_length=128,
    )


@pytest.fixture(scope="module")
def config(home, tmp_path_factory):
    """A run of eight updates that has ended."""
    config = run_config(home, tmp_path_factory.mktemp("run"))
    trainer.Run(config).train()
    return config


@pytest.fixture(scope="module")
def scorer(config):
    return trained.Scorer(config)


@pytest.fixture(scope="module")
def scores(scorer):
    return scorer.scores(CHATS)


@pytest.fixture(scope="module")
def exported(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("hf") / "out"
    conversion.export(config, str(out), step=None, dtype="float32", overwrite=False)
    return out


def of_transformers(folder, conversations) -> np.ndarray:
    """Scores of conversations, padded to one batch as transformers' own tokenizer does."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(model) is transformers.LlamaForSequenceClassification
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token_id = model.config.pad_token_id
    batch = tokenizer.apply_chat_template(
        conversations, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        return model(**batch).logits[:, 0].numpy()


def lines_of(workdir):
    return [
        {name: value for name, value in line.items() if not name.startswith("perf/")}
        for line in metrics_lib.read(workdir)
    ]


def test_a_resumed_run_is_the_same_bit_for_bit(config):
    whole = lines_of(config.workdir)
    shutil.rmtree(f"{config.workdir}/checkpoints/8")
    trainer.Run(config).train()
    assert lines_of(config.workdir) == whole
    about = checkpoint_lib.Checkpoints(config.workdir).about(8)
    assert about["params"]["score/kernel"] == [32, 1] and "lm_head/kernel" not in about["params"]
    first, *_, last = (line for line in whole if "eval/loss" in line)
    assert last["eval/loss"] < first["eval/loss"] and last["eval/rewards/accuracies"] > 0.9
    assert sum(last[f"eval/calibration/{n}/pairs"] for n in range(10)) == 207
    assert "eval/by_length/Q1/rewards/margins" in last


def test_another_template_is_refused(config):
    other = builders.replace(config, data__chat="open_instruct")
    with pytest.raises(validation.UsageError, match="made with chat = spec; this run has open_ins"):
        trainer.Run(other).train()
    with pytest.raises(validation.UsageError, match="chat = spec; this config has open_instruct"):
        trained.Scorer(other)


def test_scores_are_those_of_transformers(scorer, scores, exported):
    assert scorer.step == 8 and np.std(scores) > 0.01
    np.testing.assert_allclose(scores, of_transformers(exported, CHATS), atol=1e-5)


def test_a_score_does_not_depend_on_its_batch(scorer, scores):
    assert [scorer.scores([chat])[0] for chat in CHATS[::-1]] == scores[::-1]
    assert scorer.scores(CHATS[4:] * 2) == scores[4:] * 2


def test_the_folder_is_as_transformers_writes_it(config, exported, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(exported)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, found = (load_file(f / "model.safetensors") for f in (exported, tmp_path / "theirs"))
    assert ours.keys() == found.keys() and "score.weight" in ours and "lm_head.weight" not in ours
    assert ours["score.weight"].shape == (1, 32)
    for name, weight in ours.items():
        np.testing.assert_array_equal(weight, found[name], err_msg=name)
    said, expected = (
        json.loads((f / "config.json").read_text()) for f in (exported, tmp_path / "theirs")
    )
    for name in ("architectures", "id2label", "label2id", "pad_token_id", "eos_token_id"):
        assert said[name] == expected[name], name
    assert said["architectures"] == ["LlamaForSequenceClassification"]
    assert said["pad_token_id"] not in (None, said["eos_token_id"])
    assert theirs.config.num_labels == 1
    assert not (exported / "generation_config.json").exists()
    assert "pipeline_tag: text-classification" in (exported / "README.md").read_text()
    conversion.verify(config, str(exported), step=8)


def test_a_folder_with_a_score_head_is_a_base(config, exported, scores, tmp_path):
    """Inward with the very head; and the run of a reward model is one as well."""
    onto = builders.replace(config, base=str(exported), workdir=str(tmp_path / "onto"))
    assert base_lib.problems(onto) == []
    conversion.write_first_step(onto, "")
    assert trained.Scorer(onto).scores(CHATS) == scores
    conversion.verify(onto, str(exported), step=0)
    second = builders.replace(config, base=config.workdir, workdir=str(tmp_path / "second"))
    assert base_lib.problems(second) == []
    assert trained.Scorer(second, initial=True).scores(CHATS) == scores


def test_a_base_of_another_architecture_is_refused_by_name(home, config, exported, tmp_path):
    dpo_run = run_config(home, tmp_path, objective=dpo.DPOConfig(), base=str(exported))
    found = "\n".join(base_lib.problems(dpo_run))
    assert (
        "architectures = ['LlamaForSequenceClassification']; expected 'LlamaForCausalLM'" in found
    )
    onto_run = builders.replace(dpo_run, base=config.workdir)
    assert "score/kernel, unknown to the model" in "\n".join(base_lib.problems(onto_run))
    folder = tmp_path / "other"
    shutil.copytree(exported, folder)
    fields = json.loads((folder / "config.json").read_text())
    onto = builders.replace(config, base=str(folder))
    for changes, said in (
        ({"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification"),
        ({"id2label": {"0": "a", "1": "b"}}, "2 labels; expected one, the score"),
        ({"id2label": None}, "2 labels; expected one, the score"),
    ):
        (folder / "config.json").write_text(json.dumps(fields | changes))
        assert said in "\n".join(base_lib.problems(onto))
        with pytest.raises(ValueError, match=said):
            hf.read_config(folder)
    (folder / "config.json").write_text(json.dumps(fields | {"architectures": None}))
    assert "score.weight of shape [1, 32] is not a weight" in "\n".join(base_lib.problems(onto))


def test_what_gives_text_and_what_gives_scores(home, config, scorer, tmp_path):
    with pytest.raises(validation.UsageError, match="which gives scores and no text"):
        trained.Generator(config)
    with pytest.raises(validation.UsageError, match="is no run of a reward model"):
        trained.Scorer(run_config(home, tmp_path, dpo_stage=False, objective=sft.SFTConfig()))
    with pytest.raises(validation.UsageError, match="base = None has no score head"):
        trained.Scorer(config, initial=True)
    with pytest.raises(validation.UsageError, match="conversation 1 ends with user; expected"):
        scorer.scores([CHATS[0], CHATS[0][:1]])


def test_settings_that_do_not_go_with_a_reward_model(home, tmp_path):
    with pytest.raises(validation.UsageError, match="a reward model has no reference"):
        run_config(home, tmp_path, reference_dir="x")
    with pytest.raises(validation.UsageError, match="a PEFT folder of ours has no score head"):
        run_config(home, tmp_path, adapter=LoRAConfig(rank=4), adapter_from="x")
    with pytest.raises(validation.UsageError, match=r"margin = -1\.0: expected 0 or more"):
        reward.RewardConfig(margin=-1.0)
    assert run_config(home, tmp_path).data.to_ends
    assert not run_config(home, tmp_path, objective=dpo.DPOConfig()).data.to_ends


@pytest.mark.slow
def test_a_run_whose_scores_are_not_finite_names_its_pairs(config, tmp_path):
    wild = builders.replace(config, workdir=str(tmp_path / "run"), optimizer__learning_rate=1e15)
    run = trainer.Run(builders.replace(wild, optimizer__warmup_ratio=0.0))
    with pytest.raises(watch.UnstableError, match="Examples whose rewards/margins is not") as error:
        run.train()
    step = int(str(error.value).split()[1].rstrip(":"))
    rows = [i for row in range((step - 1) * 8, step * 8) for i in run.feed.rows.example_ids(row)]
    assert all(row in str(error.value) for row in rows)


def test_scores_that_are_not_finite_are_named(scorer, monkeypatch):
    model = scorer.model
    head = {"kernel": model.params["score"]["kernel"] * np.float32(np.inf)}
    monkeypatch.setattr(model, "params", {**model.params, "score": head})
    with pytest.raises(validation.UsageError, match=r"scores of rows \[0, 1\] are not finite"):
        scorer.scores(CHATS[:2])


def test_the_page_has_a_calibration_plot_and_the_workdir_its_numbers(config):
    assert report.page([config.workdir]).count("data:image/png;base64") == 2
    report.keep_calibration(config.workdir)
    folder = config.workdir
    with open(f"{folder}/calibration.json") as file:
        found = json.load(file)
    last = lines_of(folder)[-1]
    assert found["step"] == 8 and found["error"] == last["eval/calibration/error"]
    assert sum(one["pairs"] for one in found["bins"]) == 207
    assert all(0.5 <= one["sure"] <= 1 and 0 <= one["won"] <= 1 for one in found["bins"])
    with open(f"{folder}/calibration.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def adapted(home, folder, quant):
    model = dataclasses.replace(
        builders.MODEL, embed_dim=64, mlp_dim=64, num_heads=2, num_kv_heads=2, head_dim=32
    )
    changes = dict(model=model, adapter=LoRAConfig(rank=4, dropout=0.1), quant=quant, num_steps=4)
    return builders.replace(run_config(home, folder, **changes), checkpoint__every=2)


@pytest.mark.parametrize("quant", [None, QuantConfig()], ids=["lora", "qlora"])
def test_a_head_trains_beside_an_adapter_on_a_frozen_base(home, tmp_path, quant):
    trains, frozen = step_lib.abstract_split(adapted(home, tmp_path, quant))
    names = agreement.param_shapes(trains)
    assert len(names) == 15 and names["score/kernel"] == [64, 1]
    assert all(name == "score/kernel" or "lora_" in name for name in names)
    assert frozen.base.keys() == {"model"}


@pytest.mark.slow
@pytest.mark.parametrize("quant", [None, QuantConfig()], ids=["lora", "qlora"])
def test_a_run_of_a_head_beside_an_adapter(home, tmp_path, quant):
    """Resumed bit for bit; a merge is what transformers reads. QLoRA's merge is into the
    dequantised base: only rounding parts it from what was trained."""
    config = adapted(home, tmp_path, quant)
    trainer.Run(config).train()
    whole = lines_of(config.workdir)
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    trainer.Run(config).train()
    assert lines_of(config.workdir) == whole
    out = dict(step=4, dtype="float32", overwrite=False)
    with pytest.raises(validation.UsageError, match="has no score head, which trained beside"):
        conversion.export(config, str(tmp_path / "peft"), **out)
    conversion.export(config, str(tmp_path / "hf"), merge="dequantised", **out)
    ours = np.array(trained.Scorer(config).scores(CHATS))
    assert ours.std() > 1e-3
    np.testing.assert_allclose(ours, of_transformers(tmp_path / "hf", CHATS), atol=1e-5)


def test_real_rows_on_real_weights_score_as_in_transformers(tmp_path, shared_data):
    """stories260K, whose embeddings are tied, with a new head; UltraFeedback's chosen answers."""
    folder = shared_data / "models/stories260K-hf"
    config = builders.train_config(
        tmp_path,
        tokenizer=shared_data / "models/stories260K/tok512.model",
        dpo_stage=True,
        objective=reward.RewardConfig(),
        model=hf.read_config(folder),
        base=str(folder),
    )
    trainer.Run(config).save_initial()
    file = shared_data / "preference_raw/ultrafeedback/ultrafeedback_binarized.jsonl"
    with open(file) as lines:
        pairs = [ready_pairs.ultrafeedback_binarized(json.loads(line)) for line in lines]
    chats = [pair["prompt"] + pair["chosen"] for pair in pairs if isinstance(pair, dict)]
    chats = [chat for chat in chats if sum(len(turn["content"]) for turn in chat) < 700][:6]
    assert len(chats) == 6
    ours = np.array(trained.Scorer(config).scores(chats))
    conversion.export(config, str(tmp_path / "hf"), step=0, dtype="float32", overwrite=False)
    theirs = of_transformers(tmp_path / "hf", chats)
    assert ours.std() > 1e-2
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
