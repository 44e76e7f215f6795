"""Torch archives, Meta's folders and EasyLM's files are read as what `transformers` has of them."""

import collections
import json
import os
import pickle
import zipfile

import builders
import flax.serialization
import jax
import msgpack
import numpy as np
import pytest
from hf_models import VARIANTS, assert_equal_trees, one_device, random_llama

from tulu_jax import conversion
from tulu_jax.interop import hf, sources
from tulu_jax.training import checkpoint

torch = pytest.importorskip("torch")


@pytest.fixture(params=["untied", "grouped"])
def model(request, tmp_path):
    """A random Llama, its config, and its parameters as safetensors give them."""
    theirs = random_llama(**VARIANTS[request.param])
    theirs.save_pretrained(tmp_path / "hf")
    config = hf.read_config(tmp_path / "hf")
    params = hf.load(tmp_path / "hf", config, shardings=one_device(), dtype="float32")
    return theirs, config, params


def load(path, config):
    assert sources.is_published(path)
    return hf.load(path, config, shardings=one_device(), dtype="float32")


def pairs(weight, config):
    """Rows of q or k as Meta has them, whose rotary pairs are neighbours."""
    heads = weight.reshape(-1, 2, config.head_dim // 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape).contiguous()


META = {
    "self_attn.q_proj": ("attention.wq", 0), "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0), "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0), "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0), "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None), "model.embed_tokens": ("tok_embeddings", 1),
    "model.norm": ("norm", None), "lm_head": ("output", 0),
}  # fmt: skip


def meta_weights(theirs, config):
    """{Meta's name: (weight, axis along which it is cut)}."""
    found = {}
    for name, weight in theirs.state_dict().items():
        (module,) = (m for m in META if name.endswith(f"{m}.weight"))
        if module.endswith(("q_proj", "k_proj")):
            weight = pairs(weight, config)
        meta, axis = META[module]
        layer = f"layers.{name.split('.')[2]}." if ".layers." in name else ""
        found[f"{layer}{meta}.weight"] = (weight, axis)
    return found


def save_meta(folder, theirs, config, ranks):
    folder.mkdir()
    for rank in range(ranks):
        cut = {
            name: (weight if axis is None else weight.chunk(ranks, axis)[rank]).clone()
            for name, (weight, axis) in meta_weights(theirs, config).items()
        }
        cut["rope.freqs"] = torch.zeros(2)
        torch.save(cut, folder / f"consolidated.{rank:02d}.pth")
    fields = {"dim": config.embed_dim, "n_layers": config.num_layers, "n_heads": config.num_heads}
    fields |= {"norm_eps": config.norm_eps, "vocab_size": -1, "multiple_of": 8}
    fields |= {"n_kv_heads": config.num_kv_heads} if config.num_kv_heads < config.num_heads else {}
    (folder / "params.json").write_text(json.dumps(fields))


@pytest.mark.parametrize("ranks", [1, 2])
def test_metas_folder(model, tmp_path, ranks):
    theirs, config, params = model
    save_meta(tmp_path / "meta", theirs, config, ranks)
    assert hf.check_weights(tmp_path / "meta", config) == []
    assert_equal_trees(load(tmp_path / "meta", config), params)
    other = builders.replace(config, rope_theta=1e6, norm_eps=1e-6)
    eps, theta = hf.check_weights(tmp_path / "meta", other)
    assert "says norm_eps = 1e-05; the run's model has 1e-06" in eps and "rope_theta" in theta


def save_easylm(file, theirs, config, *, whole_state):
    """As `StreamingCheckpointer.save_train_state_to_file` does (EasyLM, checkpoint.py)."""
    packer = msgpack.Packer()
    with file.open("wb") as out:

        def put(key, value):
            out.write(packer.pack((key, flax.serialization.to_bytes(value))))

        before = ("params", "params") if whole_state else ()
        if whole_state:
            put(("step",), np.asarray(3, np.int32))
            put(("opt_state", "0", "mu", "lm_head", "kernel"), np.zeros((4, 4), np.float32))
        for name, (weight, _) in meta_weights(theirs, config).items():
            *layer, module = name.removesuffix(".weight").removeprefix("layers.").split(".", 1)
            easylm = {"tok_embeddings": "wte", "norm": "ln_f", "output": "lm_head"}.get(
                module, module
            )
            path = ("transformer", "h", layer[0]) if layer else ("transformer",)
            path = () if easylm == "lm_head" else path
            leaf = "embedding" if easylm == "wte" else "kernel"
            value = weight.numpy()
            if leaf == "kernel" and value.ndim == 2:
                value = np.ascontiguousarray(value.T)
            put((*before, *path, *easylm.split("."), leaf), value)


@pytest.mark.parametrize("whole_state", [True, False])
def test_a_streamed_file_of_the_original_trainer(model, tmp_path, whole_state):
    theirs, config, params = model
    file = tmp_path / "streaming_params"
    save_easylm(file, theirs, config, whole_state=whole_state)
    assert hf.check_weights(file, config) == []
    assert_equal_trees(load(file, config), params)
    content = file.read_bytes()
    file.write_bytes(content[:-9])
    assert any("ends in the middle of an array" in p for p in hf.check_weights(file, config))
    file.write_bytes(b"\x85" + content)
    assert "found 0x85 at byte 0; expected an array" in hf.check_weights(file, config)[0]


@pytest.mark.parametrize("split", [False, True])
def test_torch_archives(model, tmp_path, split):
    theirs, config, params = model
    place = tmp_path / "bin"
    place.mkdir()
    theirs.config.save_pretrained(place)
    weights = {name: weight.clone() for name, weight in theirs.state_dict().items()}
    if split:
        names = sorted(weights)
        halves = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
        for file, part in halves.items():
            torch.save({name: weights[name] for name in part}, place / file)
        index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
        (place / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(collections.OrderedDict(weights), place / "pytorch_model.bin")
    assert_equal_trees(load(place, config), params)


class Evil:
    def __init__(self, ran):
        self.ran = ran

    def __reduce__(self):
        return os.mkdir, (self.ran,)


def archive(file, content):
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("archive/data.pkl", content)


def problem(place, content, config):
    archive(place / "pytorch_model.bin", content)
    return hf.check_weights(place, config)[0]


def test_a_pickle_that_asks_for_anything_else_is_refused_by_name(tmp_path):
    config = builders.MODEL
    ran = str(tmp_path / "ran")
    said = problem(tmp_path, pickle.dumps({"w": Evil(ran)}, protocol=2), config)
    assert "its pickle asks for posix.mkdir" in said and "nothing of it was run" in said
    assert not os.path.exists(ran)
    for content, words in (
        (b"", "cannot be read"),
        (b"cos\nsystem\n(S'true'\ntR.", "asks for os.system"),
        (pickle.dumps([1]), "holds a list"),
        (pickle.dumps(bytearray(b"x"), protocol=2), "bytearray; expected tensors alone"),
        (b"\x80\x02Q.", "cannot be read"),
        (b"]" * 9 + b".", "holds a list"),
    ):
        assert words in problem(tmp_path, content, config), content
    torch.save({"w": torch.zeros(3, 4).T}, tmp_path / "pytorch_model.bin")
    assert "save it contiguous" in hf.check_weights(tmp_path, config)[0]
    torch.save({"w": torch.zeros(3)}, tmp_path / "pytorch_model.bin",
               _use_new_zipfile_serialization=False)  # fmt: skip
    assert "found no zip archive" in hf.check_weights(tmp_path, config)[0]


def test_metas_folder_becomes_the_first_step_of_a_run(model, tmp_path, tokenizer_dir):
    theirs, config, params = model
    save_meta(tmp_path / "meta", theirs, config, 2)
    run = builders.train_config(
        tmp_path, tokenizer=tokenizer_dir, model=config, base=str(tmp_path / "meta")
    )
    conversion.write_first_step(run, "")
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one_device()), params
    )
    assert_equal_trees(checkpoint.load_params(run.workdir, config, abstract), params)
