"""What `convert` writes of a run: the dtype and the plain text of its base, and what it refuses."""

import dataclasses
import json
import logging
import shutil

import builders
import jax.numpy as jnp
import pytest
import sentencepiece
from hf_models import one_device

from tulu_jax import base, conversion, validation
from tulu_jax.interop import hf
from tulu_jax.training import agreement, checkpoint
from tulu_jax.training.state import TrainState

TEXT = "Once upon a time, there was a  little\ngirl."


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def run(tmp_path_factory, shared_data, request):
    """A config whose base has weights of that dtype, with a checkpoint of step 4 in its workdir."""
    folder = tmp_path_factory.mktemp(f"run_{request.param}")
    model = hf.read_config(shared_data / "models/stories260K-hf")
    params = hf.load(
        shared_data / "models/stories260K-hf", model, shardings=one_device(), dtype="float32"
    )
    hf.save(
        folder / "base",
        params,
        model,
        dtype=request.param,
        generation_config={},
        write_tokenizer=None,
    )
    # As other tools leave it: hf.save leaves such an id out.
    (folder / "base/generation_config.json").write_text('{"pad_token_id": 512, "top_k": 7}')
    config = builders.train_config(
        folder,
        tokenizer=shared_data / "models/stories260K/tok512.model",
        model=model,
        base=str(folder / "base"),
    )
    about = {
        "params": agreement.param_shapes(params),
        "weights": "w",
        **base.about(config),
        "must_match": {
            "model": dataclasses.asdict(model),
            "objective": config.objective.identity(),
        },
    }
    saved = checkpoint.Checkpoints(config.workdir, checkpoint.CheckpointConfig(every=4))
    saved.save(4, TrainState(step=jnp.int32(4), params=params, opt_state={}), about, {})
    saved.close()
    return request.param, config


def export(config, out, **options):
    conversion.export(config, str(out), **(dict(step=None, dtype=None, overwrite=False) | options))
    return out


def test_the_dtype_is_that_of_the_base_and_is_said(run, tmp_path, caplog):
    dtype, config = run
    with caplog.at_level(logging.INFO, logger="absl"):
        out = export(config, tmp_path / "out")
    assert hf.weights_dtype(out, config.model) == dtype
    assert f"Weights are written in {dtype}" in caplog.text
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    exported = export(config, tmp_path / "other", dtype=other)
    assert hf.weights_dtype(exported, config.model) == other


def test_plain_text_and_chats_have_the_ids_of_the_base(run, tmp_path, shared_data):
    transformers = pytest.importorskip("transformers")
    _, config = run
    tokenizer = transformers.AutoTokenizer.from_pretrained(export(config, tmp_path / "out"))
    model = shared_data / "models/stories260K/tok512.model"
    ids = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(TEXT)
    assert tokenizer(TEXT).input_ids == [1, *ids]
    assert tokenizer(TEXT, add_special_tokens=False).input_ids == ids
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["top_k"] == 7
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # with no pad id of 512

    def chat(content):
        return tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)

    parts = [{"type": "text", "text": "Once upon"}, {"type": "text", "text": " a time"}]
    assert chat(parts) == chat("Once upon a time")
    for content in ([{"type": "image", "url": "x"}], {"text": "x"}, None, [7]):
        with pytest.raises(Exception, match="is no text"):  # of jinja2
            chat(content)


def test_text_without_bos_where_the_base_adds_none(run, tmp_path, shared_data):
    transformers = pytest.importorskip("transformers")
    _, config = run
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(shared_data / "models/stories260K/tok512.model", folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": false, "add_eos_token": true}')
    config = builders.replace(config, data__tokenizer=str(folder))
    tokenizer = transformers.AutoTokenizer.from_pretrained(export(config, tmp_path / "out"))
    assert tokenizer(TEXT).input_ids == [*tokenizer(TEXT, add_special_tokens=False).input_ids, 2]


def test_what_cannot_be_written_is_told_before_parameters_are_read(run, tmp_path, monkeypatch):
    _, config = run
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("{}")
    monkeypatch.setattr(
        conversion, "StoredSource", None
    )  # reading them would be an error of another type
    with pytest.raises(validation.UsageError, match=r"out exists; .* replace it with --overwrite"):
        export(config, tmp_path / "out")
    with pytest.raises(validation.UsageError, match=r"no checkpoint of step 5 .* steps \[4\]"):
        export(config, tmp_path / "new", step=5)
    empty = builders.replace(config, workdir=str(tmp_path / "nothing"))
    with pytest.raises(validation.UsageError, match="found none at all: train first"):
        export(empty, tmp_path / "new")
    assert not (tmp_path / "new").exists()
