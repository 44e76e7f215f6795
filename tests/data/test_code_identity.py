"""What a converter does decides where its rows are kept: its code, what that imports and holds."""

import dataclasses
import functools
import importlib
import operator
import sys
import types

import pytest

from tulu_jax.data import code_identity

FIRST, SECOND = (lambda row: row), (lambda row: dict(row))


def identity(function):
    return code_identity.identity(function, with_code=True)


@pytest.fixture
def user(tmp_path, monkeypatch):
    """`user(files)` writes the modules of a package `mine` and gives `mine.tasks` as a new process
    would import it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def imported(**files: str) -> types.ModuleType:
        (tmp_path / "mine").mkdir(exist_ok=True)
        for name, text in {"__init__": "", **files}.items():
            (tmp_path / "mine" / f"{name}.py").write_text(text)
        forget()
        return importlib.import_module("mine.tasks")

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
            del sys.modules[name]
        importlib.invalidate_caches()
        code_identity._spec.cache_clear()

    yield imported
    forget()


USES = {
    "a name of it": "from mine.words import clean\ndef convert(row): return clean(row)\n",
    "a constant of it": "from mine.words import LIMIT\ndef convert(row): return LIMIT\n",
    "the module": "import mine.words\ndef convert(row): return mine.words.clean(row)\n",
    "a relative import": "from . import words\ndef convert(row): return words.clean(row)\n",
    "an import inside": "def convert(row):\n    from mine import words\n    return words.LIMIT\n",
    "a module between": "from mine import between\ndef convert(row): return between.clean(row)\n",
    "a class": "from mine.words import Clean\nconvert = Clean(3)\n",
}
WORDS = """
LIMIT = 1
def clean(row): return row
class Clean:
    def __init__(self, n): self.n = n
    def __call__(self, row): return row
"""


@pytest.mark.parametrize("use", USES)
def test_a_module_that_a_converter_imports_changes_it(user, use):
    between = "from .words import clean\n"
    files = {"tasks": USES[use], "between": between, "words": WORDS}
    first = identity(user(**files).convert)
    assert identity(user(**files).convert) == first
    changed = user(**{**files, "words": WORDS.replace("LIMIT = 1", "LIMIT = 2")})
    assert identity(changed.convert) != first
    said = WORDS.replace("def clean", "# Of a row.\n\n\ndef clean").replace(
        "return row", "return  row"
    )
    said = '"""Words."""\n' + said.replace("self.n = n", '"""n"""; self.n = n')
    assert identity(user(**{**files, "words": said}).convert) == first
    unread = user(**{**files, "unread": "LIMIT = 2\n"})
    assert identity(unread.convert) == first


def test_a_constant_that_the_environment_decides_changes_it(user, monkeypatch):
    text = "import os\nLIMIT = os.environ['LIMIT']\ndef convert(row): return LIMIT\n"
    found = []
    for limit in ("1", "2"):
        monkeypatch.setenv("LIMIT", limit)
        found.append(identity(user(tasks=text).convert))
    assert found[0] != found[1]


def decorated(limit):
    def decorate(function):
        @functools.wraps(function)
        def wrapper(row):
            return function(row)[:limit]

        return wrapper

    return decorate


def made(value):
    def convert(row, *, scale=value):
        return value, scale

    return convert


@dataclasses.dataclass
class Convert:
    limit: int

    def method(self, row):
        return row

    def __call__(self, row):
        return row


PAIRS = {
    "two functions on one line": (FIRST, SECOND),
    "default values": (lambda row, n=1: n, lambda row, n=2: n),
    "a decorator's argument": (decorated(1)(made), decorated(2)(made)),
    "a closure": (made(1), made(2)),
    "a set in a closure": (made({1, 2}), made({1, 3})),
    "a function in a closure": (made(FIRST), made(SECOND)),
    "arguments": (functools.partial(made, 1), functools.partial(made, 2)),
    "an argument's type": (functools.partial(made, 1), functools.partial(made, "1")),
    "a function as an argument": (functools.partial(made, FIRST), functools.partial(made, SECOND)),
    "objects": (Convert(1), Convert(2)),
    "methods": (Convert(1).method, Convert(2).method),
    "C functions": (operator.itemgetter("a"), operator.itemgetter("b")),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_what_a_converter_holds_changes_it(pair):
    one, other = map(identity, PAIRS[pair])
    assert one != other and one == identity(PAIRS[pair][0])


def test_functions_made_alike_are_alike():
    """No address of an object is part of it: every process finds the same."""
    assert identity(made([1, {"a": FIRST}])) == identity(made([1, {"a": FIRST}]))
    assert identity(Convert(1)) == identity(Convert(1))
    assert "0x" not in str([identity(one) for pair in PAIRS.values() for one in pair])


def test_a_function_that_calls_itself():
    def outer():
        def convert(row):
            return convert(row)

        return convert

    assert identity(outer()) == identity(outer())


def test_functions_of_a_prompt():
    def typed(text):
        names = {"__name__": "typed"}
        exec(text, names)
        return identity(names["convert"])

    upper = "def clean(text): return text.{}()\ndef convert(row): return [clean(t) for t in row]"
    assert typed(upper.format("upper")) == typed(upper.format("upper"))
    assert typed(upper.format("upper")) != typed(upper.format("lower"))
    limit = "LIMIT = {}\ndef convert(row): return row[:LIMIT]"
    assert typed(limit.format(1)) != typed(limit.format(2))


def test_comments_and_docstrings_do_not_change_a_converter(user):
    text = "def convert(row):\n    return row\nfirst, second = (lambda r: r), (lambda r: [r])\n"
    before = user(tasks=text)
    found = [identity(f) for f in (before.convert, before.first, before.second)]
    comment = text.replace("    return", '    """As it is."""\n    # Nothing to do.\n    return')
    after = user(tasks=f'"""My tasks."""\n\n{comment}')
    assert [identity(f) for f in (after.convert, after.first, after.second)] == found
    assert len(set(map(str, found))) == 3
    assert identity(user(tasks=text.replace("return row", "return [row]")).convert) != found[0]


def test_a_version_stands_for_the_code_and_not_for_what_is_bound():
    def declared(function):
        return code_identity.identity(function, with_code=False)

    assert declared(FIRST) == declared(SECOND)
    assert declared(made(1)) != declared(made(2))
