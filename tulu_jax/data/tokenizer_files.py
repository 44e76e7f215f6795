"""A `tokenizers.Tokenizer` from a folder or a file: which file counts, and what is added to it.

`tokenizer.json` counts before `tokenizer.model`; a folder in which they give some text different
ids is refused, and naming one of the two files chooses. Tokens that `tokenizer_config.json`,
`added_tokens.json` or `special_tokens_map.json` add are added, with the ids that they say, as
`transformers` does: each is found in the text as it stands, before anything else.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from absl import logging

from tulu_jax import strict_json, validation
from tulu_jax.data import sentencepiece_bpe
from tulu_jax.data.sources import readers

JSON, MODEL = "tokenizer.json", "tokenizer.model"
CONFIG, ADDED = "tokenizer_config.json", "added_tokens.json"
SPECIAL_MAP = "special_tokens_map.json"
SPECIAL = ("<s>", "</s>", "<unk>")  # Llama's special tokens
ORDER = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # in which tokens without an id get one
MOST_PROBED = 256

# Texts whose ids tell tokenizers apart: prefixes, newlines around special tokens, spaces, bytes.
PROBES = (
    "<|user|>\nHello world\n<|assistant|>\nYes</s>\n<|user|>\nAgain",
    "<|system|>\n\n<|user|>\n  two  spaces\tand a tab \n\n<|assistant|>\n",
    "naïve 東京 💡 \x00\r\n",
    "a</s></s>b <s> c",
)


def load(path: str):
    """The `tokenizers.Tokenizer` of a folder, a tokenizer.json or a SentencePiece tokenizer.model.

    Raises `FileNotFoundError` if there is none, `OSError` for a bucket out of reach, and
    `ValueError` that names the file for one that cannot be read or does not fit the others.
    """
    file = _find(path)
    backend = _from_json(file) if file.suffix == ".json" else _from_model(file)
    if file.suffix == ".model" and _object(file.with_name(CONFIG)).get("legacy") is False:
        logging.warning(
            "%s says legacy = False; text after a special token gets its leading space piece all "
            "the same, as the original's did",
            file.with_name(CONFIG),
        )
    _add_tokens(backend, file)
    backend.no_truncation()
    backend.no_padding()
    if file.suffix == ".json" and file != readers.as_path(path):
        _check_agreement(backend, file)
    return backend


def for_plain_text(backend, path: str):
    """`backend`, loaded from `path`, as it encodes plain text when it is asked for special tokens.

    A tokenizer.json says itself what it adds. Llama's tokenizer.model is read with `<s>` in front
    of a text and nothing after it, unless `tokenizer_config.json` beside it says otherwise.
    """
    import tokenizers
    from tokenizers import processors

    file = _find(path)
    if file.suffix == ".json":
        return backend
    config = _object(file.with_name(CONFIG))
    begin, end = SPECIAL[:2]
    first = [begin] if config.get("add_bos_token", True) else []
    last = [end] if config.get("add_eos_token", False) else []
    around = tokenizers.Tokenizer.from_str(backend.to_str())
    around.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *(f"{t}:1" for t in first), "$B:1", *(f"{t}:1" for t in last)],
        special_tokens=[(token, backend.token_to_id(token)) for token in first + last],
    )
    return around


def model_file(path: str):
    """The tokenizer.model that `path` is, holds, or lies beside; None if there is none."""
    given = readers.as_path(path)
    if given.suffix == ".model":
        return given
    model = given / MODEL if given.is_dir() else given.with_name(MODEL)
    return model if model.exists() else None


class Library:
    """Ids of the `sentencepiece` library for a model file, used as slow Llama tokenizers do: the
    text is split at the added tokens, and the library gets each stretch between them.

    `backend` says which tokens those are. A tokenizer.json may have pieces of the model among them;
    of these, only Llama's own and those that a file beside it names are split at.
    """

    def __init__(self, model, backend):
        import sentencepiece

        proto = sentencepiece_bpe.parse(_content(model), str(model))
        self._processor = sentencepiece.SentencePieceProcessor(
            model_proto=proto.SerializeToString()
        )
        self.defined = [p.piece for p in proto.pieces if p.type == sentencepiece_bpe.USER_DEFINED]
        named = {*SPECIAL, *(token.content for token in _tokens_beside(model))}
        self.added = {
            token.content: (id, token)
            for id, token in backend.get_added_tokens_decoder().items()
            if token.content in named or id >= len(proto.pieces)
        }
        longest_first = sorted(self.added, key=len, reverse=True)
        self._split = re.compile("|".join(map(re.escape, longest_first)))

    def encode(self, text: str) -> list[int]:
        ids, start = [], 0
        for match in self._split.finditer(text):
            id, token = self.added[match[0]]
            stretch = text[start : match.start()]
            ids += [*self._processor.encode(stretch.rstrip() if token.lstrip else stretch), id]
            behind = text[match.end() :]
            start = len(text) - len(behind.lstrip() if token.rstrip else behind)
        return ids + self._processor.encode(text[start:])


def probes(tokens: Sequence[str]) -> list[str]:
    """Texts in which each of the tokens stands in a word, between spaces and beside itself."""
    return [f"{t}a {t} b{t}{t}\n{t}" for t in tokens[:MOST_PROBED]]


def _find(path: str):
    with readers.reaching(path):
        given = readers.as_path(path)
        is_folder, is_there = given.is_dir(), given.exists()
        held = sorted(file.name for file in given.iterdir()) if is_folder else []
    if is_folder:
        name = next((name for name in (JSON, MODEL) if name in held), None)
        if name is None:
            raise FileNotFoundError(
                f"{path}: found no tokenizer; expected {JSON} or {MODEL} there{_listed(held)}. If "
                "transformers opens the folder, AutoTokenizer.from_pretrained(folder)"
                f".save_pretrained(folder) writes {JSON}"
            )
        return given / name
    if not is_there:
        is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", path)
        raise FileNotFoundError(
            f"{path}: found no tokenizer, as there is no such file or folder; expected {JSON} or "
            f"{MODEL} there" + _HUB.format(path) * bool(is_name)
        )
    if given.suffix not in (".json", ".model"):
        raise ValueError(
            f"{path}: expected a {JSON}, a SentencePiece file that ends with .model, or a folder"
        )
    return given


_HUB = (
    ". Is it a name on the hub? Download it, `hf download {} --include '*token*' "
    "--local-dir FOLDER`, and name FOLDER"
)


def _listed(names: Sequence[str]) -> str:
    if not names:
        return ", and it is empty"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f" (it has {', '.join(names[:8])}{more})"


def _from_json(file):
    import tokenizers

    text = _content(file)
    settings = _parsed(file, text)
    if not isinstance(settings, dict) or "model" not in settings:
        found = sorted(settings)[:6] if isinstance(settings, dict) else type(settings).__name__
        raise ValueError(f"{file}: found {found}, expected a {JSON}, which has a key 'model'")
    try:
        return tokenizers.Tokenizer.from_str(text.decode("utf-8-sig"))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"{file}: tokenizers {tokenizers.__version__} cannot read it ({error}); it is damaged, "
            "or of a newer format: install a newer tokenizers, or name the tokenizer.model instead"
        ) from error


def _content(file) -> bytes:
    with readers.reaching(file):
        found = b"" if (problem := validation.unreadable(file)) else file.read_bytes()
    if problem := problem or validation.stand_in(found):
        raise ValueError(f"{file}: {problem}")
    return found


def _from_model(file):
    proto = sentencepiece_bpe.parse(_content(file), str(file))
    return sentencepiece_bpe.convert(proto, str(file), special=SPECIAL)


def _parsed(file, text: bytes):
    try:
        return strict_json.loads(text)
    except ValueError as error:
        whole = "empty" if not text.strip() else f"not whole JSON ({error})"
        raise ValueError(f"{file}: is {whole}; download it again") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Beside:
    """A token that the file `origin` adds. With no `id`, it has that of its piece, or gets the next
    free one if it `may_be_new`."""

    content: str
    id: int | None
    flags: dict[str, bool]
    is_special: bool
    may_be_new: bool
    origin: Any  # a path


def _add_tokens(backend, file) -> None:
    """Adds the tokens of the files beside `file`. Raises `ValueError` for an id they cannot get."""
    import tokenizers

    has = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in _tokens_beside(file):
        is_known = backend.token_to_id(token.content) is not None
        if token.content not in has and (is_known or token.may_be_new):
            add = backend.add_special_tokens if token.is_special else backend.add_tokens
            add([tokenizers.AddedToken(token.content, normalized=False, **token.flags)])
        gets = backend.token_to_id(token.content)
        if token.id not in (None, gets):
            raise ValueError(
                f"{token.origin}: gives {token.content!r} the id {token.id}, but with {file.name} "
                f"it has {gets}; correct it, or put the two files of one tokenizer there"
            )


def _tokens_beside(file) -> list[_Beside]:
    """What the files beside `file` add: tokens with ids in their order, then special tokens of
    which only the name is given. `added_tokens_decoder`, where it is, replaces the older files.

    A name that only one class of tokenizers knows makes no new token: `fill_token` is "<FILL_ME>".
    """
    config = _object(file.with_name(CONFIG))
    listed = config.get("added_tokens_decoder")
    origin, older = file.with_name(CONFIG), {}
    if listed is None:
        origin, older = file.with_name(ADDED), _object(file.with_name(SPECIAL_MAP))
        listed = {str(id): content for content, id in _object(origin).items()}
    try:
        named = _named(config) | _named(older)
        own = _named_by_class(config) | _named_by_class(older)
        fields_of = own | named
        tokens = [
            _Beside(
                content=content,
                id=id,
                flags=_flags(fields or fields_of.get(content, {})),
                is_special=bool(fields.get("special", content in fields_of)),
                may_be_new=True,
                origin=origin,
            )
            for id, (content, fields) in sorted((int(i), _fields(t)) for i, t in listed.items())
        ]
        known = {token.content for token in tokens}
        return tokens + [
            _Beside(
                content=content,
                id=None,
                flags=_flags(fields),
                is_special=True,
                may_be_new=content in named,
                origin=origin,
            )
            for content, fields in (named | own).items()
            if content not in known
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{origin}: its added tokens are not readable ({error!r})") from error


def _named(settings: dict) -> dict[str, dict]:
    """The special tokens that settings name, in the order in which they get ids: their fields."""
    values = [settings.get(f"{name}_token") for name in ORDER]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key) or []
        values += more.values() if isinstance(more, dict) else more
    return dict(_fields(value) for value in values if value)


def _named_by_class(settings: dict) -> dict[str, dict]:
    """Those that only one class of tokenizers knows, as Code Llama's `prefix_token`."""
    usual = {f"{name}_token" for name in ORDER}
    return dict(
        _fields(value)
        for key, value in settings.items()
        if key.endswith("_token") and key not in usual and isinstance(value, str | dict) and value
    )


def _fields(token: str | dict) -> tuple[str, dict]:
    return (token, {}) if isinstance(token, str) else (token["content"], token)


def _flags(fields: dict) -> dict[str, bool]:
    return {name: bool(fields.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}


def _object(path) -> dict:
    with readers.reaching(path):
        if not path.exists():
            return {}
    found = _parsed(path, _content(path))
    if not isinstance(found, dict):
        raise ValueError(f"{path}: found a {type(found).__name__}; expected an object")
    return found


def _check_agreement(backend, file) -> None:
    """Raises `ValueError` if the tokenizer.model beside a tokenizer.json gives other ids."""
    model = file.with_name(MODEL)
    with readers.reaching(model):
        if not model.exists():
            return
    by_json, by_model = (f"'--gin.TOKENIZER=\"{name}\"'" for name in (file, model))
    try:
        library = Library(model, backend)
    except ValueError as error:
        raise ValueError(f"{error}. To do without it, name the other file: {by_json}") from error
    for probe in [*PROBES, *probes([*library.defined, *library.added])]:
        ours, theirs = backend.encode(probe, add_special_tokens=False).ids, library.encode(probe)
        if ours != theirs:
            raise ValueError(
                f"{file} and {model.name} give different ids for {probe!r}: {ours} and {theirs}. "
                f"Name the one that the model was trained with, {by_json} or {by_model}: the "
                "tokenizer.model is the original; a tokenizer.json saved with legacy = False is not"
            )
