"""What a study takes, before any of it is run: runs, slices, hours, and what is there."""

from collections.abc import Mapping, Sequence

from etils import epath

from tulu_jax import strict_json, validation
from tulu_jax.evals import scores
from tulu_jax.parallel import slices
from tulu_jax.studies import run_commands, run_states
from tulu_jax.studies.declared import Design
from tulu_jax.studies.run_states import Placed, State


def slice_of(placed: Placed) -> str:
    """The name of the slice that a run's config is for; 'any' where that says none."""
    topology = run_states.config(placed).mesh.topology
    names = [name for name, one in slices.SLICES.items() if one.topology == topology]
    return names[0] if topology and names else slices.ANY


def hours(folder: str, placed: Placed) -> tuple[float, float] | None:
    """(hours, chip-hours) that a dry run in `folder` predicted; None where there was none. Raises
    `UsageError` for a file that is none of a dry run's."""
    file = epath.Path(folder) / placed.run.name / "dryrun.json"
    if not file.exists():
        return None
    try:
        first = strict_json.loads(file.read_text())[0]
        return (first["hours"], first["chip_hours"]) if first["fits"] else None
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise validation.UsageError(
            f"{file} is no result of a dry run ({error}); run that again"
        ) from error


def lines(
    placed: Sequence[Placed], states: Mapping[str, State], design: Design, *,
    on_slices: bool, dry_runs: str,
) -> list[str]:  # fmt: skip
    """The table of runs, its sums, and the dry runs that are still to be made."""
    rows = [["run", "config", "slice", "hours", "chip-hours", "there"]]
    total, unknown = [0.0, 0.0], []
    for one in placed:
        state = states[one.name]
        cells = ["", ""]
        if on_slices and one.run.is_trained and (found := hours(dry_runs, one)):
            cells = [f"{value:.2f}" if value < 10 else f"{value:,.0f}" for value in found]
            total = [a + b for a, b in zip(total, found, strict=True)]
        elif on_slices and one.run.is_trained:
            cells = ["?", "?"]
            unknown.append(run_commands.dry_run(one, dry_runs))
        rows.append([
            one.name, one.gin_file, slice_of(one) if on_slices else "here", *cells,
            there(one, state, design),
        ])  # fmt: skip
    found = list(scores.columns(rows))
    if on_slices:
        found.append(f"Together {total[0]:,.1f} hours, {total[1]:,.0f} chip-hours, as predicted.")
    if unknown:
        found.append(f"Of {len(unknown)} runs no dry run is in {dry_runs}; these make them:")
        found += [f"  {command}" for command in dict.fromkeys(unknown)]
    return found


def there(placed: Placed, state: State, design: Design) -> str:
    """What there is of a run, in some words."""
    if state.kind != run_states.DONE:
        reached = f" at step {state.step:,}" if state.kind == run_states.UNFINISHED else ""
        return f"{state.kind}{reached}"
    lack = run_commands.lacking(placed, state, design)
    if not placed.run.is_trained:
        return f"not evaluated on {', '.join(lack)}" if lack else "evaluated"
    return f"trained, not evaluated on {', '.join(lack)}" if lack else "trained and evaluated"
