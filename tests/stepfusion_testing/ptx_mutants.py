"""Kernels with a fault that Triton's interpreter does not see, for the execution of compiled PTX to find.

``python ptx_mutants.py`` executes them, in a process without TRITON_INTERPRET, and prints what was found as JSON.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from stepfusion import kernels
from stepfusion.bench.ptx.executor import Executor
from stepfusion.bench.ptx.inputs import Case
from stepfusion.bench.ptx.norm_cases import Norm
from stepfusion.bench.ptx.other_cases import Pixels
from stepfusion.bench.ptx.report import run_case
from stepfusion.bench.ptx.step_cases import Step
from stepfusion_testing.planted import planted


@dataclass(frozen=True)
class Mutant:
    """A text in a file of kernels/ and what it becomes, the function that launches it, and a call that shows it."""

    file: str
    function: str
    old: str
    new: str
    call: Step | Norm


BEYOND = Step((9,), torch.float32, "drawn", rows=(3, 10))
PLANTED = Step((9,), torch.float32, "none", "ddim", x0=True, planted=math.nan, rows=(3,))
KEPT = Step((9,), torch.float32, "none", "all history", history=2, rows=(3, 10))
PADDED = Norm(20, 9, 9, 4, torch.float32, batch=1)
TINY = Norm(8, 8, 8, 2, torch.float32, std=4e-20, eps=0.0, silu=False, batch=1)
SPLIT = Norm(40, 29, 29, 4, torch.float32, batch=1)

STATISTICS = "means = tl.load(ptr, mask=there"
MUTANTS = {
    "a masked load of a coefficient without other": Mutant(
        *("step.py", "diffusion_step"),
        old="coefficient_ptr + 6, mask=inside, other=0.0",
        new="coefficient_ptr + 6, mask=inside",
        call=BEYOND,
    ),
    "a masked load of pixels without other": Mutant(
        *("group_norm.py", "group_norm_silu"),
        old="c[None, :]), mask=there, other=0.0)",
        new="c[None, :]), mask=there)",
        call=PADDED,
    ),
    "a masked load of statistics without other": Mutant(
        *("group_norm.py", "group_norm_silu"),
        old=f"{STATISTICS}, other=0.0)",
        new=f"{STATISTICS})",
        call=SPLIT,
    ),
    "a variance below the least normal number": Mutant(
        *("group_norm.py", "group_norm_silu"),
        old="reciprocal_root(variance + eps)",
        new="tl.rsqrt(variance + eps)",
        call=TINY,
    ),
    "a masked load of a weight of the history without other": Mutant(
        *("step.py", "diffusion_step"),
        old="coefficient_ptr + 15, mask=inside, other=0.0",
        new="coefficient_ptr + 15, mask=inside",
        call=KEPT,
    ),
    "a clamp without NaN": Mutant(
        *("step.py", "diffusion_step"),
        old=", propagate_nan=tl.PropagateNan.ALL",
        new="",
        call=PLANTED,
    ),
}

#: Calls whose programs exchange elements between threads: each barrier in them is left out in its turn.
EXCHANGES = {
    "step": Step((1, 33, 32), torch.bfloat16, "drawn", rows=(3,)),
    "pixels": Pixels((1, 3, 32, 32), torch.float32),
    "norm": Norm(24, 5, 7, 2, torch.bfloat16, batch=1),
    "norm of two tiles": Norm(40, 17, 17, 4, torch.bfloat16, batch=1),
}
BARRIER = re.compile(r"^\s*bar\.(?:warp\.)?sync\s+\S+;\n", re.MULTILINE)


def _found(call: Step | Norm | Pixels, edit: Callable[[str], str] | None = None) -> str | None:
    """What executing a call finds, in two orders of warps and with a search for races."""
    executor = Executor("sm_90", orders=("together", "warps reversed"), check_races=True, edit=edit)
    return run_case(Case(str(call), call.check), executor).error


def _mutant(mutant: Mutant, folder: Path) -> str | None:
    module = planted(folder, mutant.file, mutant.old, mutant.new)
    with mock.patch.object(kernels, mutant.function, getattr(module, mutant.function)):
        return _found(mutant.call)


def _without_barriers(call: Step | Norm | Pixels) -> list[str | None]:
    """What is found if each barrier of a call's one program is missing."""
    texts: list[str] = []

    def keep(text: str) -> str:
        texts.append(text)
        return text

    assert _found(call, keep) is None
    places = [match.span() for match in BARRIER.finditer(texts[0])]
    return [_found(call, lambda text, a=start, b=end: text[:a] + text[b:]) for start, end in places]


def main() -> None:
    """Print what was found: by mutant (and None for the calls as they are), and by barrier."""
    with tempfile.TemporaryDirectory() as root:
        folders = {name: Path(root) / f"m{i}" for i, name in enumerate(MUTANTS)}
        for folder in folders.values():
            folder.mkdir()
        report = {
            "plain": {name: _found(mutant.call) for name, mutant in MUTANTS.items()},
            "mutants": {name: _mutant(mutant, folders[name]) for name, mutant in MUTANTS.items()},
            "barriers": {name: _without_barriers(call) for name, call in EXCHANGES.items()},
        }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
