"""The plan of an epoch: best-fit packing of TÜLU V2's lengths, ours against TRL's.

    python benchmarks/packing.py

326,154 lengths with the quartiles, the mean and the numbers of long rows of the paper (§2) go into
rows of 8,192. TRL's `pack_dataset(strategy="bfd")` gets all rows as one batch, its best fill, of a
column of one byte a token, the least that it can be given to move. Alternating runs, medians.
"""

import argparse
import statistics
import time

import datasets
import numpy as np
import outcome
import pyarrow as pa
import trl

from tulu_jax.data import packing

ROWS, CAPACITY = 326_154, 8_192
MEAN, QUARTILES = 1_097, (230, 1_464)
OVER_2048, OVER_8192 = 63_900, 20
FILL_TARGET, SECONDS_TARGET = 0.995, 3.0


def paper_lengths(rows: int = ROWS, seed: int = 0) -> np.ndarray:
    """int64 [rows] lengths, cut at 8,192, in random order: log-linear between the known quantiles.

    Known: the quartiles 230 and 1,464, and the shares over 2,048 and over 8,192. Taken: the
    shortest is 20, the longest before the cut 16,384, the median the quartiles' geometric mean. The
    quantile in the middle of the rows over 2,048 is what makes the mean 1,097.
    """
    long, longest = OVER_2048 / ROWS, OVER_8192 / ROWS
    shares = [0.0, 0.25, 0.5, 0.75, 1 - long, 1 - long / 2, 1 - longest, 1.0]
    places = (np.arange(rows) + 0.5) / rows

    def at(middle: float) -> np.ndarray:
        median = np.sqrt(QUARTILES[0] * QUARTILES[1])
        knots = [20, QUARTILES[0], median, QUARTILES[1], 2048, middle, CAPACITY, 2 * CAPACITY]
        lengths = np.exp(np.interp(places, shares, np.log(knots)))
        return np.minimum(np.round(lengths), CAPACITY).astype(np.int64)

    low, high = 2048.0, float(CAPACITY)
    while high - low > 0.5:
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).mean() < MEAN else (low, middle)
    return np.random.default_rng(seed).permutation(at(low))


def theirs(lengths: np.ndarray) -> tuple[float, float]:
    """Seconds, and the share of positions used, of TRL's packing."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    column = pa.LargeListArray.from_arrays(offsets, np.zeros(offsets[-1], np.int8))
    dataset = datasets.Dataset(pa.table({"input_ids": column}))
    start = time.perf_counter()
    packed = trl.pack_dataset(dataset, CAPACITY, "bfd", {"batch_size": len(lengths)})
    seconds = time.perf_counter() - start
    return seconds, int(lengths.sum()) / (len(packed) * CAPACITY)


def ours(lengths: np.ndarray, epoch: int) -> tuple[float, float]:
    start = time.perf_counter()
    plan = packing.epoch_plan(lengths, capacity=CAPACITY, packing="best_fit", seed=0, epoch=epoch)
    seconds = time.perf_counter() - start
    return seconds, int(lengths.sum()) / (plan.num_rows * CAPACITY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    datasets.disable_caching()
    lengths = paper_lengths()
    quartiles = np.percentile(lengths, (25, 50, 75)).round().astype(int).tolist()
    seconds, fill = {"ours": [], "TRL": []}, {}
    for epoch in range(arguments.rounds):
        for name, (spent, used) in (("ours", ours(lengths, epoch)), ("TRL", theirs(lengths))):
            seconds[name].append(spent)
            fill[name] = used
    print(
        f"{len(lengths):,} lengths, quartiles {quartiles}, mean {lengths.mean():.0f}, rows of "
        f"{CAPACITY:,}, {arguments.rounds} alternating rounds, medians, trl {trl.__version__}"
    )
    print(f"{'':5} {'seconds':>8} {'used':>9}")
    for name, times in seconds.items():
        print(f"{name:5} {statistics.median(times):8.2f} {fill[name]:9.4%}")
    ratio = statistics.median(seconds["TRL"]) / statistics.median(seconds["ours"])
    ok = (
        ratio >= 1
        and fill["ours"] >= max(FILL_TARGET, fill["TRL"])
        and statistics.median(seconds["ours"]) <= SECONDS_TARGET
    )
    summary = {"name": "packing", "ratio": ratio, "target": 1.0, "ok": bool(ok)}
    summary |= {"used": fill["ours"], "seconds": statistics.median(seconds["ours"])}
    outcome.tell(summary)


if __name__ == "__main__":
    main()
