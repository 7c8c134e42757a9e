"""Compiled matrix products, executed as they are and with one synchronisation less.

``python product_mutants.py`` does that in a process without TRITON_INTERPRET, and prints what was found as JSON.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton

from stepfusion.bench.ptx.executor import Executor
from stepfusion.bench.ptx.types import Fault
from stepfusion_testing.product_kernels import Product

TARGETS = ("sm_80", "sm_90")
TENSOR_TARGET = "sm_100"  # where products are added up in tensor memory
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
#: What a program for sm_100 has besides, all of a kind at a time, and what is found without it.
TENSOR_PARTS = {
    r"@\S+\s+tcgen05\.commit": "a wait for a phase that never completes",
    r"@!complete bra\.uni": "which the thread does not know to be complete",
    r"fence\.proxy\.async": "a tcgen05.mma of shared memory that no fence.proxy.async",
    r"cp\.async\.wait_group": "which nobody waited for",
    r"tcgen05\.wait::st": "no tcgen05.wait::st",
    r"tcgen05\.wait::ld": "no tcgen05.wait::ld",
    r"@\S+\s+tcgen05\.dealloc": "still allocated at the end of its block",
    r"@\S+\s+mbarrier\.init": "what is no mbarrier",
}
_LOOP = re.compile(r"^(\$L__BB\w+):.*?bra(?:\.uni)?\s+\1;", re.MULTILINE | re.DOTALL)

RELEASE = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:3])
#: These releases of Triton leave out the fence between a cp.async and the product that reads what it wrote (3.7.1 has
#: it: github.com/triton-lang/triton/pull/10537).
UNFENCED = RELEASE < (3, 7, 1)
#: And these wait two or three times for one thing on sm_80.
REPEATS = RELEASE >= (3, 8)


def fenced(text: str) -> str:
    """The text with a fence.proxy.async before every wgmma.fence and tcgen05.mma only, if Triton leaves some out."""
    if not UNFENCED:
        return text
    bare = re.sub(r"^\s*fence\.proxy\.async[^;\n]*;\n", "", text, flags=re.MULTILINE)
    return re.sub(
        r"^(?=\s*(wgmma\.fence|@\S+\s+tcgen05\.mma))", "\tfence.proxy.async.shared::cta;\n", bare, flags=re.MULTILINE
    )


def as_compiled(text: str) -> str:
    """The text, as it is."""
    return text


def found(
    call: Product, target: str, edit: Callable[[str], str] = fenced, orders: tuple[str, ...] = ORDERS
) -> str | None:
    """What executing a product finds, with a search for races."""
    executor = Executor(target, orders=orders, check_races=True, edit=edit)
    try:
        with executor.running():
            return call.wrong()
    except Fault as error:
        return str(error)


def tensor_mutants() -> dict[str, str | None]:
    """What is found in a program for sm_100 without each of :data:`TENSOR_PARTS`, which it must have."""

    def without(part: str) -> Callable[[str], str]:
        def edit(text: str) -> str:
            changed, count = re.subn(rf"^\s*{part}[^;\n]*;\n", "\n", fenced(text), flags=re.MULTILINE)
            assert count, part
            return changed

        return edit

    return {part: found(MUTATED, TENSOR_TARGET, without(part), ORDERS[:1]) for part in TENSOR_PARTS}


def place(text: str, position: int) -> str:
    """Where in a kernel of two loops something stands."""
    loops = [match.span() for match in _LOOP.finditer(text)]
    inside = [i for i, (start, end) in enumerate(loops) if start <= position < end]
    passed = sum(end <= position for _, end in loops)
    outside = ("before the loops", "between the loops", "behind the loops")
    return f"loop {inside[0] + 1}" if inside else outside[passed]


def mutants(target: str) -> list[dict[str, Any]]:
    """What is found if one synchronisation, or all of a kind in one place, are left out or wait too little."""
    texts: list[str] = []

    def keep(text: str) -> str:
        texts.append(fenced(text))
        return texts[-1]

    assert found(MUTATED, target, keep) is None
    kinds: dict[tuple[str, str], list[re.Match[str]]] = {}
    for match in SYNCHRONISATION.finditer(texts[0]):
        kinds.setdefault((match[1], place(texts[0], match.start())), []).append(match)
    results = []
    for (what, where), matches in kinds.items():
        for some in [[match] for match in matches] + [matches] * (len(matches) > 1):
            for name in ("left out", "one less")[: 1 + ("wait_group" in what)]:
                changed = _changed(texts[0], some, less=name == "one less")
                error = found(MUTATED, target, lambda _, changed=changed: changed, ORDERS[:1])
                every = len(some) == len(matches)
                results.append({"what": what, "place": where, "edit": name, "all": every, "found": error})
    return results


def _changed(text: str, matches: list[re.Match[str]], *, less: bool) -> str:
    """The text without what matched, or with waits that let one more group be missing."""
    for match in reversed(matches):
        new = re.sub(r"\d+(?=;)", lambda number: str(int(number[0]) + 1), match[0]) if less else ""
        text = text[: match.start()] + new + text[match.end() :]
    return text


def main() -> None:
    """Print what was found: by target and case, and by target and synchronisation."""
    report = {
        "cases": {
            f"{target}, {name}": found(call, target)
            for target in (*TARGETS, TENSOR_TARGET)
            for name, call in CASES.items()
        },
        "tensor mutants": tensor_mutants(),
        "as compiled": {target: found(MUTATED, target, as_compiled) for target in ("sm_90", TENSOR_TARGET)},
        "mutants": {target: mutants(target) for target in TARGETS},
    }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
