"""Ids of a `tokenizer.model` against the `sentencepiece` library's, over models trained here."""

import json

import hypothesis
import pytest
import sentencepiece
import tokenizers
from hypothesis import strategies as st
from sentencepiece_models import trained

from tulu_jax.data import chat, tokenizer_files
from tulu_jax.interop import tokenizer_export

SPECIAL = ("<s>", "</s>", "<unk>")
PARTS = [*"abcx> \n\t.é▁東💡", "  ", "<sep>", "<PRE>", " <PRE>", "<pad>", "[x]", "x.*"]
PARTS += ["<0x0A>", "<0x61>", "the", " the", "hello", "ab"]


MODELS = {
    "plain": {},
    "user-defined pieces": {"user_defined_symbols": ["<sep>", "\n", "▁<PRE>"]},
    "one within another": {"user_defined_symbols": ["ab", "abc", "bc", "▁a"]},
    "those that are patterns": {"user_defined_symbols": ["[x]", "x.*", "\n\n", "▁", "|"]},
    "control pieces": {"control_symbols": ["<pad>", "ab"]},
    "both": {"control_symbols": ["<pad>"], "user_defined_symbols": ["<sep>", "<PRE>"]},
    "no leading space": {"add_dummy_prefix": False, "user_defined_symbols": ["<sep>"]},
    "no leading space, plain": {"add_dummy_prefix": False},
    "no bytes": {"byte_fallback": False, "vocab_size": 40},
    "no bytes, user-defined": {
        "byte_fallback": False,
        "vocab_size": 40,
        "user_defined_symbols": ["<sep>", "\n"],
        "control_symbols": ["<pad>"],
    },
}


@pytest.fixture(scope="module", params=list(MODELS))
def both(request, tmp_path_factory):
    """(ours as it is exported, the library's) of one model."""
    content = trained(**MODELS[request.param])
    file = tmp_path_factory.mktemp("model") / "tokenizer.model"
    file.write_bytes(content)
    ours = tokenizers.Tokenizer.from_str(tokenizer_files.load(str(file)).to_str())
    return ours, sentencepiece.SentencePieceProcessor(model_proto=content)


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(st.lists(st.sampled_from(PARTS), max_size=10).map("".join))
def test_ids_of_any_text(both, text):
    ours, theirs = both
    assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text)


def test_every_piece_in_every_place(both):
    ours, theirs = both
    pieces = [theirs.id_to_piece(id) for id in range(theirs.get_piece_size())]
    for piece in pieces:
        for text in (piece, f"<sep>{piece}", f"a{piece}b {piece}\n{piece}<sep>{piece}<sep>"):
            if not any(special in text for special in SPECIAL):
                ids = ours.encode(text, add_special_tokens=False).ids
                assert ids == theirs.encode(text), text


def test_text_comes_back(both):
    ours, theirs = both
    for text in ("hello <sep>world", " ab\n<PRE> the", "<sep>", "abc <pad> x.*"):
        ids = theirs.encode(text)
        if theirs.unk_id() not in ids:
            assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids) == text


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "the normalizer 'nmt_nfkc'"),
        ({"remove_extra_whitespaces": True}, "removal of extra spaces"),
        ({"model_type": "unigram", "vocab_size": 300}, r"algorithm 1 \(expected 2, BPE\)"),
        ({"control_symbols": ["q"]}, "control pieces of one character"),
        ({"treat_whitespace_as_suffix": True}, "spaces as suffixes"),
    ],
)
def test_what_cannot_be_done_alike_is_refused_by_name(tmp_path, options, named):
    (tmp_path / "tokenizer.model").write_bytes(trained(**options))
    with pytest.raises(ValueError, match=rf"tokenizer.model: has .*{named}.*name a tokenizer.json"):
        tokenizer_files.load(str(tmp_path))


@pytest.mark.parametrize("pieces", [("xa", "ax"), ("▁<S", "▁<S>", "▁<P>")])
def test_pieces_added_by_hand_with_one_score(tmp_path, pieces):
    """The library merges the leftmost first, which matters where two of them can overlap."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(trained())
    known = {piece.piece for piece in proto.pieces}
    for piece in [*sorted(set("".join(pieces)) - known), *pieces]:
        proto.pieces.add(piece=piece, score=0.5, type=1)
    content = proto.SerializeToString()
    (tmp_path / "tokenizer.model").write_bytes(content)
    if pieces == ("xa", "ax"):
        with pytest.raises(ValueError, match="overlapping pieces of one score"):
            tokenizer_files.load(str(tmp_path))
        return
    theirs = sentencepiece.SentencePieceProcessor(model_proto=content)
    ours = tokenizer_files.load(str(tmp_path))
    for text in ("a <S> b <P><S", "<S><P>", " <S <S>"):
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text)


def test_a_tokenizer_json_that_does_not_find_user_defined_pieces_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(trained(**MODELS["user-defined pieces"]))
    content = json.loads(tokenizer_files.load(str(tmp_path)).to_str())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer_files.load(str(tmp_path))
    content["pre_tokenizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"give different ids for '<sep>a <sep> b"):
        tokenizer_files.load(str(tmp_path))


def test_the_export_of_user_defined_pieces_opens_with_the_same_ids(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.model").write_bytes(trained(**MODELS["user-defined pieces"]))
    ours = chat.load_tokenizer(str(tmp_path / "tokenizer.model"))
    tokenizer_export.save(ours.backend, str(tmp_path / "out"), max_length=None, mode="spec")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    for text in tokenizer_files.probes(["<sep>", "\n", "▁<PRE>", " <PRE>", "</s>"]):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    spelt = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]
    assert spelt["<sep>"] == 3
