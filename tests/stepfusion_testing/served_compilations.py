"""What a server compiles before it takes requests, and what while it serves them.

``python served_compilations.py`` runs a scheduler whose kernels are compiled for sm_90 and not launched, in a process
without TRITON_INTERPRET, and prints JSON.
"""

from __future__ import annotations

import json
import sys

from stepfusion.bench.offline import Launch, offline
from stepfusion_testing.serving_twins import Desk, small_engine

#: Images of one request after the other: odd and even numbers, so that columns of their data begin anywhere.
COUNTS = (1, 2, 3, 5, 7, 8, 4)


def main() -> None:
    """Print the names of the kernels that were compiled in the warm-up, and in serving."""
    launches: list[Launch] = []
    with offline("sm_90", launches.append):
        desk = Desk(small_engine(backend="triton", network="eager"), widths=(1, 2, 4, 8))
        desk.scheduler.warm_up()
        warm = {(launch.name, launch.kernel.hash) for launch in launches}
        launches.clear()
        for seed, count in enumerate(COUNTS):
            for guidance in (1.0, 2.0):
                desk.ask(n=count, steps=2, eta=1.0, labels=0, guidance=guidance, seed=seed, pixels=seed % 2 == 0)
            desk.finish()
    late = {(launch.name, launch.kernel.hash) for launch in launches} - warm
    served = sorted({launch.name for launch in launches})
    json.dump(
        {"warm": sorted(name for name, _ in warm), "late": sorted(n for n, _ in late), "served": served}, sys.stdout
    )


if __name__ == "__main__":
    main()
