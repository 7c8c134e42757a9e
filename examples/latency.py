"""A latency study of a model on this machine: how long images take, by steps and by batch.

    python examples/latency.py fashion-mnist --steps 5,10,25 --batches 1,4,16

Every cell is the median of some calls after one that warms up, from the call to pixels on the host. Cells are
measured in turns, so that what else the machine does falls on all of them alike. ``stepfusion bench`` compares with
other libraries.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import stepfusion as sf


def seconds(engine: sf.Engine, batch: int, steps: int) -> float:
    """The time of one call, with its pixels on the host."""
    labels = None if engine.num_classes is None else 0
    begin = time.perf_counter()
    engine.to_uint8(engine.sample(batch, steps=steps, labels=labels, progress=False)).cpu()
    return time.perf_counter() - begin


def study(
    engine: sf.Engine, steps: Sequence[int], batches: Sequence[int], rounds: int
) -> dict[tuple[int, int], float]:
    """The median time in seconds of each pair of steps and batch."""
    pairs = [(count, batch) for count in steps for batch in batches]
    for _, batch in pairs[: len(batches)]:
        seconds(engine, batch, 2)  # compiles, captures, fills caches
    found: dict[tuple[int, int], list[float]] = {pair: [] for pair in pairs}
    for _ in range(rounds):
        for count, batch in pairs:
            found[count, batch].append(seconds(engine, batch, count))
    return {pair: statistics.median(times) for pair, times in found.items()}


def table(found: dict[tuple[int, int], float]) -> str:
    """A line for each number of steps, a column for each batch: milliseconds, and images in a second."""
    steps, batches = (sorted({pair[place] for pair in found}) for place in (0, 1))
    lines = ["steps  " + "".join(f"{f'batch {batch}':>24}" for batch in batches)]
    for count in steps:
        cells = (f"{found[count, b] * 1e3:10.1f} ms {b / found[count, b]:8.1f}/s" for b in batches)
        lines.append(f"{count:5}  " + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="fashion-mnist")
    parser.add_argument("--steps", type=numbers, default=[5, 10, 25])
    parser.add_argument("--batches", type=numbers, default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--network", default="auto", help="as for Engine (default: %(default)s)")
    options = parser.parse_args()
    engine = sf.Engine.from_pretrained(options.model, network=options.network)
    print(engine.explain(), end="\n\n")
    print(table(study(engine, options.steps, options.batches, options.rounds)))


if __name__ == "__main__":
    main()
