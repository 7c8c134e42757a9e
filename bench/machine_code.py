"""What the compiler makes of every kernel, with no GPU: instructions an element, registers, widths of accesses.

The launchers themselves run, with Triton told that a GPU of the target is there and to compile instead of launching:
so what is measured is what a GPU would run, argument specialisation included. NVIDIA code is disassembled (SASS).

Large lanes are cut into blocks of 32 elements a thread, small ones into 8, where the fixed cost of a program (its
scalars, addresses, the slow path of the square root) weighs four times as much: bounds are for large lanes.

With ``--quick`` only the launches that tests look at are compiled: every kernel, and for the step every source of
noise and every option, in few dtypes.

With ``--execute`` the PTX is also run, by an interpreter on the CPU (:mod:`stepfusion.bench.ptx`), and every result
compared with the reference.

Commands::

    python -m stepfusion.bench.machine_code [--quick] [--json] [--target sm_90]
    python -m stepfusion.bench.machine_code --execute [--quick] [--json] [--target sm_90]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from stepfusion.bench.offline import TARGETS, Launch, offline
from stepfusion.bench.ptx.executor import NVIDIA
from stepfusion.bench.ptx.report import Result, lines, run
from stepfusion.bench.sass import Sass, disassemble, narrow, parse_sass, small_accesses
from stepfusion.bench.variants import Variant, variants
from stepfusion.kernels import backend

_SCALAR_LOAD = re.compile(r"tt\.load .* : !tt\.ptr<")
_SCALAR_STORE = re.compile(r"tt\.store .* : !tt\.ptr<(?!f64>)")  # of float64: counted with those of int64
_STORE_INT64 = re.compile(r"st\.global\.[bsu]64\s")
_SCRATCH = re.compile(r"\.private_segment_fixed_size:\s*(\d+)")
_FMA = re.compile(r"\bfma\.rn")


@dataclass(frozen=True)
class MachineCode:
    """One kernel, as one launch compiles it for one target. ``sass`` is None for AMD targets.

    Attributes:
        elements: of a thread; where a kernel's block counts pixels, pixels.
        shared: bytes of shared memory of a program.
        bodies: how often the code has what a norm does with a tile: twice if its programs have several, once for the
            first and once for the others.
        scratch: bytes of private memory of a thread, for AMD targets; NVIDIA's is ``sass.local``.
        narrow_loads, narrow_stores: accesses to tensor data of fewer than 128 bits. Not counted is the bookkeeping:
            scalars of tables and lanes, stores of int64 flags, and accesses to tensors of less than 16 bytes a
            thread (parameters of channels, statistics), each taken for one instruction an element of a thread.
        contractions: ``fma.rn`` in the PTX; more than 0 would let fused and reference differ.
    """

    kernel: str
    variant: str
    target: str
    elements: int
    shared: int
    bodies: int = 1
    scratch: int = 0
    sass: Sass | None = None
    narrow_loads: int = 0
    narrow_stores: int = 0
    contractions: int = 0

    @property
    def instructions_per_element(self) -> float:
        """SASS instructions over elements of a thread, of each body; 0 for AMD targets."""
        return self.sass.instructions / (self.bodies * self.elements) if self.sass else 0.0


def compile_launches(chosen: Iterable[Variant], target: str) -> list[MachineCode]:
    """Compile every kernel that the variants launch, as they launch it, for ``target``.

    A variant that launches the same code several times has it once here. The launches get CPU tensors and compute
    nothing.

    Raises:
        RuntimeError: this process runs Triton's interpreter, which has no compiler.
    """
    launches: list[Launch] = []
    compiled: dict[tuple[str, str], Launch] = {}
    with offline(target, launches.append):
        for variant in chosen:
            variant.launch()
            compiled |= {(variant.name, launch.kernel.hash): launch for launch in launches}
            launches.clear()
    backend_name, capability, _ = TARGETS[target]
    texts = ["" for _ in compiled]
    if backend_name == "cuda":
        texts = disassemble([launch.kernel.asm["cubin"] for launch in compiled.values()], int(capability))
    return [
        _inspect(name, target, launch, text)
        for ((name, _), launch), text in zip(compiled.items(), texts, strict=True)
    ]


def _inspect(variant: str, target: str, launch: Launch, disassembled: str) -> MachineCode:
    kernel, threads = launch.kernel, TARGETS[target][2] * launch.options["num_warps"]
    elements, bodies = _block(launch) // threads, 1 + (launch.arguments.get("TILES", 1) > 1)
    code = MachineCode(launch.name, variant, target, elements, kernel.metadata.shared, bodies)
    if "amdgcn" in kernel.asm:
        return replace(code, scratch=sum(map(int, _SCRATCH.findall(kernel.asm["amdgcn"]))))
    sass, ptx, ttgir = parse_sass(disassembled), kernel.asm["ptx"], kernel.asm["ttgir"]
    small = {operation: small_accesses(ttgir, operation, threads) for operation in ("load", "store")}
    return replace(
        code,
        sass=sass,
        narrow_loads=narrow(sass.loads, len(_SCALAR_LOAD.findall(ttgir)), small["load"]),
        narrow_stores=narrow(
            sass.stores, len(_STORE_INT64.findall(ptx)) + len(_SCALAR_STORE.findall(ttgir)), small["store"]
        ),
        contractions=len(_FMA.findall(ptx)),
    )


def _block(launch: Launch) -> int:
    """Elements of a program, of what it returns."""
    given = launch.arguments
    return int(given["ROWS"] * given["COLUMNS"] if "ROWS" in given else given["BLOCK"])


def measure(targets: Sequence[str] = tuple(TARGETS), *, quick: bool = False) -> list[MachineCode]:
    """Compile every variant for each of ``targets``, or the quick ones."""
    chosen = [variant for variant in variants() if variant.quick or not quick]
    return [
        code
        for target in targets
        for code in compile_launches((v for v in chosen if v.every_target or target == "sm_90"), target)
    ]


def _row(code: MachineCode) -> str:
    head = f"{code.target:7} {code.kernel.removesuffix('_kernel'):17} {code.variant:52}"
    if code.sass is None:
        return f"{head} compiles, shared {code.shared}, scratch {code.scratch}"
    sass = code.sass
    accesses = [" ".join(f"{n}x{width}" for width, n in widths.items()) for widths in (sass.loads, sass.stores)]
    return (
        f"{head} {sass.instructions:5} {code.instructions_per_element:6.1f} {sass.registers:4} {code.shared:6} "
        f"{accesses[0]:20} {accesses[1]:20} {code.narrow_loads:3}/{code.narrow_stores:<3} {sass.local:5}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or JSON; with ``--execute`` what running the compiled PTX gave. 1 if a result was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m stepfusion.bench.machine_code", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--target", choices=TARGETS, action="append", help="compile for this one (repeat for more)")
    parser.add_argument("--execute", action="store_true", help="run the compiled PTX on the CPU and compare results")
    parser.add_argument("--quick", action="store_true", help="the part that tests run, of less than a minute")
    options = parser.parse_args(arguments)
    if options.execute and set(options.target or ()) - set(NVIDIA):
        parser.error(f"--execute runs PTX, which targets {', '.join(NVIDIA)} have; give one of these to --target")
    try:
        if options.execute:
            return _execute(options.target or NVIDIA, quick=options.quick, as_json=options.json)
        codes = measure(options.target or tuple(TARGETS), quick=options.quick)
    except RuntimeError as error:
        if not backend.interpreting():
            raise
        parser.exit(2, f"{parser.prog}: {error}\n")
    if options.json:
        json.dump([{**asdict(c), "instructions_per_element": c.instructions_per_element} for c in codes], sys.stdout)
        return 0
    heads = f"{'target':7} {'kernel':17} {'variant':52} {'instr':>5} {'/elem':>6} {'regs':>4} {'shared':>6}"
    print(f"{heads} {'loads':20} {'stores':20} {'narrow':7} {'local':>5}")
    print("\n".join(map(_row, codes)))
    return 0


def _execute(targets: Sequence[str], *, quick: bool, as_json: bool) -> int:
    """Run the compiled PTX of every kernel on the CPU, and print how it compares."""

    def show(result: Result) -> None:
        if not as_json:
            print(f"{result.target:7} {result.seconds:6.1f} s  {result.case}: {result.error or 'agrees'}", flush=True)

    report = run(targets, quick=quick, progress=show)
    if as_json:
        json.dump(report.as_json(), sys.stdout)
    else:
        print("\n".join(lines(report)))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
