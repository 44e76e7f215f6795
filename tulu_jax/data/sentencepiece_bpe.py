"""A bare SentencePiece BPE model (`tokenizer.model`) as a `tokenizers.Tokenizer` with the same ids.

The result is the classic Llama-2 fast tokenizer: every stretch of text between special tokens gets
a leading space piece, so `</s>` LF encodes as 2, 29871, 13. `transformers` 5 no longer converts
such a file by itself, and importing it takes seconds; the protobuf schema comes with sentencepiece.
"""

BPE = 2  # TrainerSpec.ModelType
CONTROL = 3  # SentencePiece.Type
USER_DEFINED = 4


def convert(content: bytes, source: str):
    """The `tokenizers.Tokenizer` of a serialized SentencePiece BPE model.

    Raises `ValueError` naming `source` for a file that is no such model or needs what a Llama
    tokenizer does not have (another algorithm, a normalizer).
    """
    import tokenizers
    from google.protobuf import message
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import decoders, models, normalizers

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(content)
    except message.DecodeError as error:
        raise ValueError(f"{source}: not a SentencePiece model ({error})") from error
    _refuse_unlike_llama(proto, source)
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces}
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab,
            _merges(vocab, scores),
            unk_token=proto.pieces[proto.trainer_spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    unknown = proto.pieces[proto.trainer_spec.unk_id].piece
    special = [unknown] + [p.piece for p in proto.pieces if p.type == CONTROL]
    defined = [p.piece for p in proto.pieces if p.type == USER_DEFINED]
    backend.add_special_tokens(
        [tokenizers.AddedToken(t, normalized=False, special=True) for t in special]
    )
    backend.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in defined])
    return backend


def _refuse_unlike_llama(proto, source: str) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    unlike = {
        f"algorithm {trainer.model_type} (expected {BPE}, BPE)": trainer.model_type != BPE,
        "a normalizer": bool(normalizer.precompiled_charsmap),
        "no leading space piece": not normalizer.add_dummy_prefix,
        "removal of extra spaces": normalizer.remove_extra_whitespaces,
    }
    found = [name for name, is_so in unlike.items() if is_so]
    if found:
        raise ValueError(
            f"{source}: has {', '.join(found)}, unlike the Llama tokenizers this converts; "
            "give a tokenizer.json instead"
        )


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
