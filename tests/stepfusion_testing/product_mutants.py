"""Compiled matrix products, executed as they are and with one synchronisation less.

``python product_mutants.py`` does that in a process without TRITON_INTERPRET, and prints what was found as JSON.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable

import torch

from stepfusion.bench.ptx.executor import Executor
from stepfusion.bench.ptx.types import Fault
from stepfusion_testing.product_kernels import Product

TARGETS = ("sm_80", "sm_90")  # what sm_100 has for products is not known here
ORDERS = ("together", "warps reversed")
HALF = torch.float16

#: Every shape of a tile and of a pipeline, ragged sizes, both types, w in both layouts.
CASES = {
    "two products in a pipeline": Product(70, 64, (192, 96), tile=(64, 64, 32)),
    "128 columns, 8 warps": Product(130, 128, (128, 64), tile=(128, 128, 64), warps=8),
    "200 columns, copies of 4 and 8 bytes": Product(33, 200, (100, 42), HALF, stages=2),
    "copies of 8 bytes": Product(64, 64, (100, 44), tile=(64, 64, 32), stages=4),
    "row by row, 128 columns": Product(65, 128, (96, 64), HALF, across=True, tile=(64, 128, 32), stages=4),
    "row by row, 64 columns": Product(64, 64, (128, 64), across=True, tile=(64, 64, 64)),
    "row by row, 32 columns": Product(64, 48, (128, 64), across=True, tile=(64, 32, 64)),
    "32 rows": Product(50, 64, (128, 64), tile=(32, 64, 64), stages=2),
    "128 rows, 16 at a time": Product(130, 64, (64, 72), tile=(128, 64, 16), warps=8),
    "256 columns": Product(128, 256, (64, 64), HALF, tile=(128, 256, 64), warps=8),
    "no copies": Product(33, 37, (24, 13), HALF, tile=(64, 64, 32)),
}
#: Two loops, each of which uses its buffers several times.
MUTATED = Product(64, 64, (160, 128), tile=(64, 64, 32))
SYNCHRONISATION = re.compile(
    r"^\s*(bar\.sync|cp\.async\.wait_group|wgmma\.(?:fence|commit_group|wait_group)|fence\.proxy\.async)[^;\n]*;\n",
    re.MULTILINE,
)
_LOOP = re.compile(r"^(\$L__BB\w+):.*?bra(?:\.uni)?\s+\1;", re.MULTILINE | re.DOTALL)


def found(
    call: Product, target: str, edit: Callable[[str], str] | None = None, orders: tuple[str, ...] = ORDERS
) -> str | None:
    """What executing a product finds, with a search for races."""
    executor = Executor(target, orders=orders, check_races=True, edit=edit)
    try:
        with executor.running():
            return call.wrong()
    except Fault as error:
        return str(error)


def place(text: str, position: int) -> str:
    """Where in a kernel of two loops something stands."""
    loops = [match.span() for match in _LOOP.finditer(text)]
    inside = [i for i, (start, end) in enumerate(loops) if start <= position < end]
    passed = sum(end <= position for _, end in loops)
    outside = ("before the loops", "between the loops", "behind the loops")
    return f"loop {inside[0] + 1}" if inside else outside[passed]


def mutants(target: str) -> list[dict[str, str | None]]:
    """What is found if one synchronisation is left out, or waits for one group less."""
    texts: list[str] = []

    def keep(text: str) -> str:
        texts.append(text)
        return text

    assert found(MUTATED, target, keep) is None
    text, results = texts[0], []
    for match in SYNCHRONISATION.finditer(text):
        start, end = match.span()
        edits = {"left out": ""}
        if "wait_group" in match[1]:
            edits["one less"] = re.sub(r"\d+(?=;)", lambda number: str(int(number[0]) + 1), match[0])
        for name, new in edits.items():
            changed = text[:start] + new + text[end:]
            error = found(MUTATED, target, lambda _, changed=changed: changed, ORDERS[:1])
            results.append({"what": match[1], "edit": name, "place": place(text, start), "found": error})
    return results


def main() -> None:
    """Print what was found: by target and case, and by target and synchronisation."""
    report = {
        "cases": {f"{target}, {name}": found(call, target) for target in TARGETS for name, call in CASES.items()},
        "mutants": {target: mutants(target) for target in TARGETS},
    }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
