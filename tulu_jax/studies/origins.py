"""What made the runs of a table, and in what they differ beyond what the study varies."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tulu_jax.studies import run_states
from tulu_jax.studies.declared import Design
from tulu_jax.studies.run_states import Placed, State


def row(placed: Placed, state: State) -> dict[str, str]:
    """What the table of runs says of one."""
    found = of_tries(state.tries)
    if state.card is not None:
        found["data"] = str(state.card.get("settings", {}).get("fingerprint", ""))[:12]
    step = "" if state.step is None else f"{state.step:,}"
    return {"run": placed.name, "state": state.kind, "step": step, **found}


def of_tries(tries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What is told of the tries of a run (`provenance.read`), the last one standing for all but
    their time."""
    last = tries[-1] if tries else {}
    hardware, git = last.get("hardware") or {}, last.get("git") or {}
    seconds = [one.get("seconds", 0.0) for one in tries]
    return {
        "wall time": f"{sum(seconds):,.0f} s" if tries else "",
        "tries": str(len(tries)) if tries else "",
        "hardware": _hardware(hardware),
        "revision": git.get("revision", "")[:10] + (" + changes" if git.get("changed") else ""),
        "versions": ", ".join(f"{k} {v}" for k, v in (last.get("versions") or {}).items()),
        "config": last.get("config") or "",
        "data": str(last.get("data") or "")[:12],
        "weights": str(last.get("weights") or "")[:12],
    }


def _is_changed(one: Mapping[str, Any]) -> bool:
    return bool((one.get("git") or {}).get("changed"))


def _hardware(found: Mapping[str, Any]) -> str:
    return f"{found['devices']} × {found['kind']} ({found['platform']})" if found else ""


def differences(
    placed: Sequence[Placed], states: Mapping[str, State], design: Design
) -> Iterator[str]:
    """A line for each way in which finished runs differ more than in what the study varies: fields
    of their configs, versions, revision, hardware, and rows of one name."""
    done = {
        one.name: states[one.name] for one in placed if states[one.name].kind == run_states.DONE
    }
    for field, values in run_states.varied(done).items():
        if not field.startswith(design.varies):
            yield f"config: {field} is {_by_value(values)}, which the study does not vary"
    made = {one.name for one in placed if one.run.initial is None}
    without = [n for n, its in done.items() if n in made and not its.tries and its.card is None]
    if without:
        yield f"provenance: there is none of {', '.join(without)}, so nobody knows what made them"
    tries = {name: state.tries for name, state in done.items() if state.tries}
    for what, of in _COMPARED.items():
        values = {name: " and ".join(dict.fromkeys(map(of, its))) for name, its in tries.items()}
        if len(set(values.values())) > 1:
            yield f"{what}: {_by_value(values)}"
    changed = [name for name, its in tries.items() if any(map(_is_changed, its))]
    if changed:
        yield f"revision: files were changed after it for {', '.join(changed)}"
    yield from _data(done, tries)


def _data(done: Mapping[str, State], tries: Mapping[str, Any]) -> Iterator[str]:
    """Runs whose configs name the same rows, and that had others."""
    groups: dict[str, dict[str, str]] = {}
    for name, its in tries.items():
        config = {
            field: value for field, value in done[name].config.items()
            if field.startswith("data.") and field != "data.seed"
        }  # fmt: skip
        groups.setdefault(repr(config), {})[name] = str(its[-1].get("data"))
    for found in groups.values():
        if len(set(found.values())) > 1:
            yield f"data: one config, and rows of other fingerprints: {_by_value(found)}"


def _by_value(values: Mapping[str, Any]) -> str:
    """'a for x, y; b for z'."""
    names: dict[str, list[str]] = {}
    for name, value in values.items():
        names.setdefault(str(value), []).append(name)
    return "; ".join(f"{value} for {_few(its)}" for value, its in names.items())


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


_COMPARED = {
    "versions": lambda one: ", ".join(f"{k} {v}" for k, v in (one.get("versions") or {}).items()),
    "revision": lambda one: str((one.get("git") or {}).get("revision")),
    "hardware": lambda one: _hardware(one.get("hardware") or {}),
}
