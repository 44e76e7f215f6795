"""A SentencePiece BPE model (`tokenizer.model`) as a `tokenizers.Tokenizer` with the same ids.

The result is the classic Llama-2 fast tokenizer: every stretch of text between special tokens gets
a leading space piece, so `</s>` LF encodes as 2, 29871, 13. `transformers` 5 no longer converts
such a file with these ids; the protobuf schema comes with sentencepiece.

Only `<s>`, `</s>` and `<unk>` are special tokens: the library finds no other control piece in text.
User-defined pieces it does find, whole and before any merge, in the text with its spaces marked. So
they are split off after the normalizer, and the model takes a part that is a piece for that piece.
A part that is a piece which merges do not reach (a byte, a control piece) is split first, where its
merges end, and is no piece any more.
"""

import re

BPE = 2  # TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # SentencePiece.Type
SPACE = "▁"


def parse(content: bytes, source: str):
    """The `ModelProto` of a serialized model; raises `ValueError` naming `source` if it is none."""
    import sentencepiece
    from google.protobuf import message
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(content)
        if not proto.pieces:
            raise RuntimeError("no pieces")
        sentencepiece.SentencePieceProcessor(model_proto=content)
    except (message.DecodeError, RuntimeError) as error:
        reason = f"{source}: not a SentencePiece model ({error}); download it again"
        raise ValueError(reason) from error
    return proto


def convert(proto, source: str, *, special: tuple[str, ...]):
    """The `tokenizers.Tokenizer` of a model; the texts `special` become its ids, where it has them.

    Raises `ValueError` naming `source` for a model with what it cannot do as the library does
    (another algorithm, a normalizer).
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers

    _refuse(proto, source)
    unknown = proto.pieces[proto.trainer_spec.unk_id].piece
    defined = [p.piece for p in proto.pieces if p.type == USER_DEFINED]
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    settings = {
        "vocab": vocab,
        "merges": _merges(vocab, {p.piece: p.score for p in proto.pieces if p.type == NORMAL}),
        "unk_token": unknown,
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
    }
    backend = tokenizers.Tokenizer(models.BPE(**settings))
    if defined:
        backend.pre_tokenizer = _defined_apart(
            defined, vocab, backend, special=special, source=source
        )
        backend.model = models.BPE(**settings, ignore_merges=True)
    has_prefix = proto.normalizer_spec.add_dummy_prefix
    marked = normalizers.Replace(" ", SPACE)
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), marked]) if has_prefix else marked
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(content=" ", left=1)] if has_prefix else []
    backend.decoder = decoders.Sequence(steps)
    reserved = [p.piece for p in proto.pieces if p.type in (UNKNOWN, CONTROL)]
    backend.add_special_tokens(
        [
            tokenizers.AddedToken(piece, normalized=False, special=True)
            for piece in reserved
            if piece in special
        ]
    )
    return backend


def _refuse(proto, source: str) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    pieces = {piece.piece for piece in proto.pieces}
    normal = [piece for piece in proto.pieces if piece.type == NORMAL]
    same_score: dict[float, set[str]] = {}
    for piece in normal:
        if len(piece.piece) > 1:
            same_score.setdefault(piece.score, set()).add(piece.piece)
    unlike = {
        f"algorithm {trainer.model_type} (expected {BPE}, BPE)": trainer.model_type != BPE,
        f"the normalizer {normalizer.name!r}": bool(normalizer.precompiled_charsmap),
        "removal of extra spaces": normalizer.remove_extra_whitespaces,
        "spaces that are not marked": not normalizer.escape_whitespaces,
        "spaces as suffixes": trainer.treat_whitespace_as_suffix,
        "control pieces of one character": any(
            piece.type == CONTROL and len(piece.piece) == 1 for piece in proto.pieces
        ),
        "unused pieces": any(piece.type == UNUSED for piece in proto.pieces),
        "pieces of characters that are none": any(
            not pieces.issuperset(piece.piece) for piece in normal
        ),
        "overlapping pieces of one score": any(map(_overlap, same_score.values())),
    }
    found = [name for name, is_so in unlike.items() if is_so]
    if found:
        raise ValueError(
            f"{source}: has {', '.join(found)}, which this reader does not do as sentencepiece "
            "does. Train it with --model_type=bpe --normalization_rule_name=identity "
            "--remove_extra_whitespaces=false, or name a tokenizer.json that transformers saved "
            "from it"
        )


def _overlap(pieces: set[str]) -> bool:
    """Whether one of several pieces ends as another begins: then it matters which of two merges of
    one score is first. Runs of one character, as Llama's of spaces, grow from the left either way.
    """
    if len(pieces) == 1 or len(set("".join(pieces))) == 1:
        return False
    cuts = [(piece, cut) for piece in pieces for cut in range(1, len(piece))]
    return not {p[:cut] for p, cut in cuts}.isdisjoint(p[cut:] for p, cut in cuts)


def _merges(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every split of a piece into two, best score first: the order SentencePiece merges in."""
    found = []
    for piece, score in scores.items():
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in splits if left in vocab and right in vocab]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found += [(score, len(left), len(right), left, right) for left, right in known]
    found.sort(key=lambda entry: entry[:3], reverse=True)
    return [(left, right) for *_, left, right in found]


def _defined_apart(defined, vocab: dict[str, int], backend, *, special, source: str):
    """A pre-tokenizer that splits off the user-defined pieces, the longest first, and splits a rest
    that is a piece by name but not by merges. `backend` is the model without normalizer."""
    from tokenizers import Regex, pre_tokenizers

    longest_first = sorted(defined, key=len, reverse=True)
    steps = [pre_tokenizers.Split(Regex("|".join(map(_escaped, longest_first))), "isolated")]
    apart = {*defined, *special}  # these are not in the text that the model gets
    names = [piece for piece in vocab if len(piece) > 1 and piece not in apart]
    encodings = zip(names, backend.encode_batch(names), strict=True)
    unmerged = {name: e for name, e in encodings if e.ids != [vocab[name]]}
    rules = []
    for name, encoding in unmerged.items():
        stop = next(stop for _, stop in encoding.offsets if stop)
        first, rest = name[:stop], name[stop:]
        if not rest or not unmerged.keys().isdisjoint((first, rest)):
            raise ValueError(
                f"{source}: has user-defined pieces and the piece {name!r}, which text that spells "
                "it would become; name a tokenizer.json that transformers saved from it"
            )
        rules.append(rf"\A{_escaped(first)}(?={_escaped(rest)}\z)")
    if rules:
        steps.append(pre_tokenizers.Split(Regex("|".join(rules)), "isolated"))
    return pre_tokenizers.Sequence(steps)


def _escaped(text: str) -> str:
    return re.sub(r"[\\^$.|?*+()\[\]{}]", r"\\\g<0>", text)
