"""The last line of a benchmark that measures time: one JSON object, with who else used the machine.

Import it before the work: what the machine does is counted from then on.
"""

import json
import os
import pathlib
import time
from typing import Any

MOST_LOAD = 1.0  # of the machine at the start
MOST_OTHERS = 0.25  # cores that other processes used meanwhile


def _busy() -> float:
    """Seconds of all cores that were not idle since the machine started."""
    ticks = pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _, _, irq, softirq, _ = map(int, ticks)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    """Seconds of all cores of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


_LOAD, _BUSY, _OWN, _START = os.getloadavg()[0], _busy(), _own(), time.monotonic()


def tell(result: dict[str, Any]) -> None:
    """Prints `result` with `load`, at the start and now, `others`, the mean number of cores that
    other processes used meanwhile, and whether that `disturbed` the measurement."""
    others = (_busy() - _BUSY - (_own() - _OWN)) / (time.monotonic() - _START)
    machine = {"load": [round(_LOAD, 2), round(os.getloadavg()[0], 2)]}
    machine["others"] = round(max(0.0, others), 2)
    machine["disturbed"] = bool(_LOAD > MOST_LOAD or others > MOST_OTHERS)
    if machine["disturbed"]:
        print(f"DISTURBED: load {_LOAD:.1f} at the start, others used {others:.2f} cores")
    print(json.dumps(result | machine))
