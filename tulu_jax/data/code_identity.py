"""What identifies the behaviour of a function: the code that it runs, and what it is bound to.

Code is that of its module and of every module of its user that this one imports, at the top or
inside a function, however deep, as parsed: comments, docstrings and layout are not in it. Other
installed packages and the standard library are taken as they are, and so is this project outside
`data/sources`.
"""

import ast
import functools
import hashlib
import importlib.machinery
import json
import pathlib
import pickle
import sys
import types
from collections.abc import Iterator

PROJECT = "tulu_jax"
CONVERTERS = "tulu_jax.data.sources."
INSTALLED = {"site-packages", "dist-packages"}
PLAIN = (str, bytes, int, float, complex, bool, type(None))


def identity(function, *, with_code: bool) -> list | str:
    """Texts in lists that differ where the behaviour of `function` may differ.

    They are the same in every process. Without code, only its name and what it is bound to.
    """
    return _Walk(with_code).value(function)


class _Walk:
    """Over functions and what they are bound to, which may lead back to them."""

    def __init__(self, with_code: bool):
        self._with_code, self._above = with_code, set()

    def value(self, value) -> list | str:
        if isinstance(value, PLAIN):
            return repr(value)
        if id(value) in self._above:
            return "itself"
        self._above.add(id(value))
        try:
            return self._inner(value)
        finally:
            self._above.remove(id(value))

    def _inner(self, value) -> list | str:
        if isinstance(value, list | tuple):
            return [type(value).__name__, *map(self.value, value)]
        if isinstance(value, set | frozenset):
            return [type(value).__name__, *sorted(json.dumps(self.value(v)) for v in value)]
        if isinstance(value, dict):
            return ["dict", *([self.value(k), self.value(v)] for k, v in value.items())]
        if isinstance(value, types.ModuleType):
            return value.__name__
        if isinstance(value, functools.partial):
            return ["partial", *map(self.value, (value.func, value.args, value.keywords))]
        if isinstance(value, types.MethodType):
            return ["method", self.value(value.__func__), self.value(value.__self__)]
        wrapped = getattr(value, "__wrapped__", None)
        if wrapped is not None and _is_of_a_library(value):
            return self.value(wrapped)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        return self._object(value)

    def _function(self, function: types.FunctionType) -> list:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        bound = [function.__defaults__, function.__kwdefaults__, cells]
        found = [function.__qualname__, self.value(bound)]
        if self._with_code:
            found += [_number(function), _digest(function)]
        return found

    def _object(self, value) -> list:
        kind = value if isinstance(value, type) else type(value)
        found = [f"{kind.__module__}.{kind.__qualname__}"]
        if self._with_code and not _is_known(kind.__module__):
            found.append(_digest(kind))
        if isinstance(value, type):
            return found
        try:
            return [*found, hashlib.sha256(pickle.dumps(value, protocol=4)).hexdigest()]
        except Exception:  # of the object's own, for it holds a lambda, a lock, an open file
            state = getattr(value, "__dict__", None)
            return [*found, repr(value) if state is None else self.value(state)]


def _is_of_a_library(wrapper) -> bool:
    """Whether a wrapper comes from an installed package (gin, a type checker) or from Python."""
    code = getattr(wrapper, "__code__", None)
    return (
        code is None or code.co_filename.startswith("<@beartype") or _is_installed(code.co_filename)
    )


def _number(function: types.FunctionType) -> str:
    """Which function of its module this is, in order: two on a line differ in it."""
    code, module = function.__code__, sys.modules.get(function.__module__)
    ends = [(line, column) for _, line, _, column in code.co_positions() if line and column]
    place = max(ends, default=(code.co_firstlineno, 0))
    functions = [
        node
        for node in ast.walk(_parsed(_text(getattr(module, "__file__", None))))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    ]
    return str(sum((node.lineno, node.col_offset) <= place for node in functions))


def _digest(defined) -> str:
    """Hash of the modules that a function or class runs, and of the constants of its own."""
    module, sources, constants = sys.modules.get(defined.__module__), {}, []
    if module is not None:
        _add_modules(module.__name__, _text(getattr(module, "__file__", None)), sources)
        constants = [
            [name, repr(value)]
            for name, value in sorted(vars(module).items())
            if name.isupper() and isinstance(value, (*PLAIN, tuple))  # the environment's, maybe
        ]
    if not any(sources.values()):  # defined at a prompt
        code = getattr(defined, "__code__", None)
        sources = {"": repr(_instructions(code, defined.__globals__) if code else defined)}
    return hashlib.sha256(json.dumps([sorted(sources.items()), constants]).encode()).hexdigest()


def _instructions(code: types.CodeType, known: dict, above: tuple[str, ...] = ()) -> list:
    """What a function without source does, and what it takes from the prompt."""
    inner = [
        _instructions(value, known, above) if isinstance(value, types.CodeType) else repr(value)
        for value in code.co_consts
    ]
    taken = []
    for name in code.co_names:
        value = known.get(name)
        if isinstance(value, types.FunctionType) and name not in above:
            taken.append([name, _instructions(value.__code__, known, (*above, name))])
        elif name in known and isinstance(value, PLAIN):
            taken.append([name, repr(value)])
    return [code.co_code.hex(), code.co_names, code.co_varnames, inner, taken]


def _add_modules(name: str, text: str, found: dict[str, str]) -> None:
    """`found` with the code of a module and, deeper and deeper, of those that it imports."""
    found[name] = ast.dump(_parsed(text)) if text else ""
    for imported in _imports(name, text):
        if imported in found or _is_known(imported):
            continue
        file = _file_of(imported)
        its_own = imported.startswith(CONVERTERS) or _root(imported) == _root(name)
        if file and (its_own or not _is_installed(file)):
            _add_modules(imported, _text(file), found)


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> ast.Module:
    """The syntax tree of a module without docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return tree


@functools.lru_cache(maxsize=1024)
def _imports(name: str, text: str) -> tuple[str, ...]:
    """Names of what may be modules in the import statements of a module."""
    package = getattr(sys.modules.get(name), "__package__", None) or name.rpartition(".")[0]
    found = {}
    for node in ast.walk(_parsed(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= dict.fromkeys(part for full in names for part in _with_parents(full))
    return tuple(found)


def _with_parents(name: str) -> Iterator[str]:
    """a, a.b and a.b.c of a.b.c: importing it runs all of them."""
    parts = name.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def _root(name: str) -> str:
    return name.partition(".")[0]


def _is_known(name: str) -> bool:
    """Whether a module is Python's, or this project's and no converter."""
    if _root(name) == PROJECT:
        return not name.startswith(CONVERTERS)
    return _root(name) in sys.stdlib_module_names


@functools.cache
def _spec(name: str) -> importlib.machinery.ModuleSpec | None:
    """Where a module would be imported from, without importing anything."""
    parent = name.rpartition(".")[0]
    if not parent:
        return importlib.machinery.PathFinder.find_spec(name)
    above = _spec(parent)
    places = above.submodule_search_locations if above else None
    return importlib.machinery.PathFinder.find_spec(name, list(places)) if places else None


def _file_of(name: str) -> str | None:
    loaded = getattr(sys.modules.get(name), "__file__", None)
    spec = None if loaded else _spec(name)
    return loaded or (spec.origin if spec else None)


def _is_installed(file: str) -> bool:
    return not INSTALLED.isdisjoint(pathlib.PurePath(file).parts)


def _text(file: str | None) -> str:
    if not file or not file.endswith(".py") or not pathlib.Path(file).is_file():
        return ""
    return pathlib.Path(file).read_text(encoding="utf-8")
