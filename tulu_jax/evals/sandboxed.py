"""What runs inside a sandbox, in two processes: a solution, and the checks that call it.

The solution is untrusted. It answers calls of one function with plain values, and has nothing else
to say: no verdict is in its process, and no check. The checks are the benchmark's own code. They
call the function through a pipe and give the verdict. `sandbox` starts both, each in a sandbox of
its own, with this file as their source; so only the standard library is imported here.
"""

import builtins
import decimal
import fractions
import json
import os
import resource
import sys

LONGEST = 1 << 24  # bytes of one call or answer


class EndedError(Exception):
    """The process of the solution is gone, or says what no answer is."""


def main(role: str, settings: dict) -> None:
    """Runs one of the two processes; `settings` come from `sandbox`."""
    os.chmod("/tmp", 0o1777)
    os.chdir("/tmp")
    os.environ.clear()  # of what Python and a sandbox put there
    for name, value in settings["limits"].items():
        hard = value + (name == "RLIMIT_CPU")  # SIGXCPU tells, a second before SIGKILL
        resource.setrlimit(getattr(resource, name), (value, hard))
    if settings["uid"] is not None:
        os.setgroups([])
        os.setgid(settings["uid"])
        os.setuid(settings["uid"])
    asked, told = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    if role == "solution":
        solution(asked, told)
    else:
        answers = os.fdopen(settings["answers"], "rb")
        calls = os.fdopen(settings["calls"], "wb")
        checks(asked, told, answers, calls)


def solution(asked, told) -> None:
    """Executes a source, then answers calls of the function it defined."""
    _send(told, {"ready": True})
    job, scope = _received(asked), {}
    _send(told, _tried(lambda: exec(compile(job["solution"], "<solution>", "exec"), scope)))
    while True:
        call = _received(asked)
        if call is None:
            return
        args, kwargs = decoded(call["args"]), decoded(call["kwargs"])
        _send(told, _tried(lambda a=args, k=kwargs: scope[job["entry_point"]](*a, **k)))


def checks(asked, told, answers, calls) -> None:
    """Sends a solution to the other process, executes what checks it, and gives the verdict."""
    if _received(answers) is None:
        return
    _send(told, {"ready": True})
    job = _received(asked)

    def ask(message):
        try:
            _send(calls, message)
            answer = _received(answers)
        except (OSError, ValueError) as error:
            raise EndedError(f"the program answers nonsense: {error}") from error
        if not isinstance(answer, dict) or not {"value", "error"} & set(answer):
            raise EndedError("the program ended before its checks did")
        if "error" in answer:
            raise _error(*answer["error"])
        return decoded(answer["value"])

    def function(*args, **kwargs):
        return ask({"args": encoded(args), "kwargs": encoded(kwargs)})

    try:
        ask({"solution": job["solution"], "entry_point": job["entry_point"]})
        scope = {}
        exec(compile(job["setup"], "<setup>", "exec"), scope)
        if job["entry_point"]:
            scope[job["entry_point"]] = function
        exec(compile(job["checks"], "<checks>", "exec"), scope)
        verdict = {"passed": True}
    except EndedError as error:
        verdict = {"passed": False, "why": str(error), "is_ended": True}
    except BaseException as error:
        verdict = {"passed": False, "why": str(error)[:1000]}
    _send(told, verdict)


class Opaque:
    """Stands for a returned object that is no plain value: true or false, equal to nothing else."""

    def __init__(self, name: str, truth: bool):
        self.name, self.truth = name, truth

    def __bool__(self) -> bool:
        return self.truth

    def __repr__(self) -> str:
        return f"<an object of {self.name}>"


def encoded(value):
    """A value of plain types as JSON has it. Subclasses become their plain type, so that no value
    brings its own idea of being equal; iterators stay iterators; other objects become `Opaque`."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < 2**53 else ["int", hex(value)]
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, bytes | bytearray):
        return ["bytes", bytes(value).hex()]
    if isinstance(value, dict):
        return ["dict", *[[encoded(k), encoded(v)] for k, v in value.items()]]
    if isinstance(value, range):
        return ["range", value.start, value.stop, value.step]
    if isinstance(value, decimal.Decimal | fractions.Fraction):
        return [type(value).__name__.lower(), str(value)]
    views = {"dict_keys": "set", "dict_items": "set"}
    kinds = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    for name, kind in kinds.items():
        if isinstance(value, kind) or views.get(type(value).__name__) == name:
            return [name, *map(encoded, value)]
    if hasattr(type(value), "__next__"):
        return ["iterator", *map(encoded, value)]
    return ["object", type(value).__name__, bool(value)]


def decoded(value):
    """What `encoded` made. Raises `ValueError` for anything else."""
    if not isinstance(value, list):
        if isinstance(value, dict):
            raise ValueError("found an object in JSON; expected a list with a tag")
        return value
    tag, *items = value
    makers = {
        "list": lambda: [decoded(item) for item in items],
        "tuple": lambda: tuple(decoded(item) for item in items),
        "set": lambda: {decoded(item) for item in items},
        "frozenset": lambda: frozenset(decoded(item) for item in items),
        "iterator": lambda: iter([decoded(item) for item in items]),
        "dict": lambda: {decoded(k): decoded(v) for k, v in items},
        "int": lambda: int(items[0], 16),
        "complex": lambda: complex(*items),
        "bytes": lambda: bytes.fromhex(items[0]),
        "range": lambda: range(*items),
        "decimal": lambda: decimal.Decimal(items[0]),
        "fraction": lambda: fractions.Fraction(items[0]),
        "object": lambda: Opaque(str(items[0]), bool(items[1])),
    }
    if tag not in makers:
        raise ValueError(f"found the tag {str(tag)[:20]!r}; expected one of {sorted(makers)}")
    return makers[tag]()


def _tried(call) -> dict:
    """The answer that `call` gives: its value, or what was raised."""
    try:
        return {"value": encoded(call())}
    except BaseException as error:
        return {"error": [type(error).__name__, str(error)[:1000]]}


def _error(name: str, text: str) -> Exception:
    """What the solution raised, of the same built-in type where there is one."""
    kind = getattr(builtins, str(name), None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:  # such as UnicodeDecodeError, which is made of five values
            pass
    return RuntimeError(text)


def _send(file, message) -> None:
    file.write(json.dumps(message).encode() + b"\n")
    file.flush()


def _received(file):
    """The next message; None at the end. Raises `ValueError` for what is none."""
    line = file.readline(LONGEST)
    if not line:
        return None
    if not line.endswith(b"\n"):
        raise ValueError(f"found a message of over {LONGEST:,} bytes; expected a smaller one")
    return json.loads(line)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
