"""Prints what the quick cases of ``machine_code --execute`` give, in JSON, with less work than its ``--quick``.

Every launch runs once, all warps side by side, with a search for races: a search that finds what depends on an order.
The reversed order of warps is run for three kernels whose warps exchange sums. Soak tests run all cases in both.
"""

from __future__ import annotations

import json
import sys

from stepfusion.bench.ptx.executor import Executor
from stepfusion.bench.ptx.report import QUICK_ORDERS, every_case, run, run_case

#: Cases whose dtypes, lines of the kernels and ways to be placed in memory others have, too.
LEFT_OUT = {
    "step bfloat16 1x33x32 drawn all history guided 2 copies history 3",
    "step float16 1x64x64 none all history history 2 rows 3,-1,0 shifted 1",
    "step bfloat16 1x65x80 drawn ddpm rows 3,-1,9",
    "step float32 3x32x32 none ddim known",
    "normal 1x64x64 stream 1 1 lanes",
    "layer norm bfloat16 2x5x72",
    "layer norm bfloat16 2x4x1152 adds",
    "log-probability bfloat16 3x32x32",
    "log-probability float32 1",
    "posterior float32 1x8x131 shifted 1",
    "to_uint8 bfloat16 2x1x28x28",
    "add_bias float32 1x5x3x7 bias",
    "add_bias_padded float32 1x5x3x7 bias",
    "add_bias float16 1x200x4x4 residual bias offset",
}
#: A norm in one launch, a norm of tokens, and a log-probability, whose sums join what warps have added up.
BOTH_ORDERS = {
    "norm bfloat16 8x8 64+0 channels 8 groups batch 2 time scale shift",
    "layer norm float16 2x3x96 adds",
    "log-probability bfloat16 2x7x9 learned guided",
}


def main(target: str) -> None:
    """Execute the cases for one target."""
    cases = {case.name: case for case in every_case()}
    for name in LEFT_OUT | BOTH_ORDERS:
        assert target in cases[name].quick, name
    some = [case for name, case in cases.items() if name not in LEFT_OUT]
    report = run((target,), quick=True, cases=some, make=lambda name: Executor(name, check_races=True))
    again = Executor(target, orders=QUICK_ORDERS, check_races=True)
    report.results += [run_case(cases[name], again) for name in sorted(BOTH_ORDERS)]
    print(json.dumps(report.as_json()))


if __name__ == "__main__":
    main(sys.argv[1])
