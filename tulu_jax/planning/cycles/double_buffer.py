"""How long a pipelined kernel waits for HBM: its grid steps played through a double buffer.

While a step computes, what the next one reads is on its way; what a step wrote leaves while the
next ones compute, and must have left before a later step's result may leave. Transfers share one
path in the order in which they start, and each lands a latency after its last byte was sent. That
is what Pallas makes of windows on TPUs; counted cycles (`schedule.py`) know of none of it.
"""

import numpy as np
from jaxtyping import Float


def seconds(
    compute: Float[np.ndarray, " steps"],
    loads: Float[np.ndarray, " steps"],
    stores: Float[np.ndarray, " steps"],
    *,
    bandwidth: float,
    latency: float,
) -> float:
    """From the start of the first load to the end of the last store.

    Of each step: seconds of `compute`, bytes of the windows that change before it (`loads`) and
    after it (`stores`). `bandwidth` in bytes/s, `latency` in seconds.
    """
    free = 0.0  # when the path has sent all that was started

    def send(start: float, size: float) -> float:
        """When `size` bytes have landed; nothing to send has landed already."""
        nonlocal free
        if not size:
            return 0.0
        free = max(free, start) + size / bandwidth
        return free + latency

    now, stored = 0.0, 0.0
    landed = send(now, loads[0])
    for t, work in enumerate(compute):
        following = send(now, loads[t + 1]) if t + 1 < len(compute) else 0.0
        now = max(now, landed) + work
        landed = following
        if stores[t]:
            now = max(now, stored)
            stored = send(now, stores[t])
    return max(now, stored)
