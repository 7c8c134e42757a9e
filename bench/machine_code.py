"""What the compiler makes of every kernel, with no GPU: instructions an element, registers, widths of accesses.

The launchers themselves run, with Triton told that a GPU of the target is there and to compile instead of launching:
so what is measured is what a GPU would run, argument specialisation included. NVIDIA code is disassembled (SASS).

Large lanes are cut into blocks of 32 elements a thread, small ones into 8, where the fixed cost of a program (its
scalars, addresses, the slow path of the square root) weighs four times as much: bounds are for large lanes.

Commands::

    python -m stepfusion.bench.machine_code [--json] [--target sm_90]
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import torch

from stepfusion import kernels
from stepfusion.kernels import backend

#: Name of a target -> backend, architecture and threads a warp.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_ADDRESS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+\S.*?;", re.MULTILINE)
_JUMP = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+@!?U?P\w+\s+BRA\S*\s+(?:\S+,\s*)?0x([0-9a-f]+)", re.MULTILINE)
_REGISTERS = re.compile(r"REG:(\d+)")
_SCALAR_LOAD = re.compile(r"tt\.load .* : !tt\.ptr<")
_TENSOR_ACCESS = re.compile(r"tt\.(load|store) .* : tensor<([\dx]+)x!tt\.ptr<[a-z]+(\d+)>")
_STORE_INT64 = re.compile(r"st\.global\.[bsu]64\s")
_SCRATCH = re.compile(r"\.private_segment_fixed_size:\s*(\d+)")
_FMA = re.compile(r"\bfma\.rn")


@dataclass(frozen=True)
class Sass:
    """What the disassembly of one kernel says. Widths are in bits.

    Attributes:
        instructions: how many, without the padding (NOP) behind the last.
        loads, stores: global memory accesses by width.
        local: accesses to local memory, which is where spilled registers and indexed arrays live.
        ffma: fused multiply-adds. rsqrt: approximate roots, each refined to a correctly rounded square root by FFMAs.
        registers: of a thread; 0 where the text has no resource usage.
        skipped: instructions that the longest conditional jump leaves out: what a silent row does not execute.
    """

    instructions: int
    loads: dict[int, int]
    stores: dict[int, int]
    local: int
    ffma: int
    rsqrt: int
    registers: int
    skipped: int


@dataclass(frozen=True)
class MachineCode:
    """One kernel, as one launch compiles it for one target. ``sass`` is None for AMD targets.

    Attributes:
        elements: of a thread; where a kernel's block counts pixels, pixels.
        shared: bytes of shared memory of a program.
        scratch: bytes of private memory of a thread, for AMD targets; NVIDIA's is ``sass.local``.
        narrow_loads, narrow_stores: accesses to tensor data of fewer than 128 bits. Not counted is the bookkeeping:
            scalar loads of tables and lanes, stores of int64 flags, and accesses to tensors of less than 16 bytes a
            thread (parameters of channels, statistics), each taken for one instruction an element of a thread.
        contractions: ``fma.rn`` in the PTX; more than 0 would let fused and reference differ.
    """

    kernel: str
    variant: str
    target: str
    elements: int
    shared: int
    scratch: int = 0
    sass: Sass | None = None
    narrow_loads: int = 0
    narrow_stores: int = 0
    contractions: int = 0

    @property
    def instructions_per_element(self) -> float:
        """SASS instructions over elements of a thread; 0 for AMD targets."""
        return self.sass.instructions / self.elements if self.sass else 0.0


@dataclass(frozen=True)
class Variant:
    """A launch to look at: for sm_90, or for every target."""

    name: str
    launch: Callable[[], object]
    every_target: bool = False


def parse_sass(text: str) -> Sass:
    """Read the output of ``cuobjdump -sass -res-usage`` for one kernel."""
    operations = [operation for operation in _INSTRUCTION.findall(text) if operation != "NOP"]
    names = Counter(operation.split(".")[0] for operation in operations)
    registers = _REGISTERS.search(text)
    return Sass(
        instructions=len(operations),
        loads=_widths(operations, "LDG"),
        stores=_widths(operations, "STG"),
        local=names["LDL"] + names["STL"],
        ffma=names["FFMA"] + names["FFMA2"],
        rsqrt=sum(operation.startswith("MUFU.RSQ") for operation in operations),
        registers=int(registers[1]) if registers else 0,
        skipped=_longest_jump(text),
    )


def _longest_jump(text: str) -> int:
    addresses = [int(address, 16) for address in _ADDRESS.findall(text)]
    spans = ((int(source, 16), int(target, 16)) for source, target in _JUMP.findall(text))
    return max((sum(source < a < target for a in addresses) for source, target in spans), default=0)


def _widths(operations: Sequence[str], name: str) -> dict[int, int]:
    """How many accesses of each width: ``LDG.E.128.CONSTANT`` is 128, ``LDG.E.U16`` 16, ``LDG.E`` 32 bits."""
    widths = Counter[int]()
    for operation in operations:
        first, *modifiers = operation.split(".")
        if first == name:
            sizes = [int(m.lstrip("US")) for m in modifiers if m.lstrip("US") in ("8", "16", "64", "128", "256")]
            widths[sizes[0] if sizes else 32] += 1
    return dict(sorted(widths.items(), reverse=True))


def narrow(accesses: dict[int, int], bookkeeping: int, small: int = 0) -> int:
    """Accesses of fewer than 128 bits that are not bookkeeping, of which ``small`` may be as narrow or wide."""
    below = sum(count for width, count in accesses.items() if width < 128) - bookkeeping
    return max(below - small, min(below, 0))


def small_accesses(ttgir: str, operation: str, threads: int) -> int:
    """At most how many instructions of a thread are a ``"load"`` or ``"store"`` of less than 16 bytes a thread.

    int64 is left out, which is what flags are.
    """
    count = 0
    for name, shape, bits in _TENSOR_ACCESS.findall(ttgir):
        elements = math.prod(map(int, shape.split("x")))
        if name == operation and bits != "64" and elements * int(bits) < 128 * threads:
            count += -(-elements // threads)
    return count


def compile_launch(variant: Variant, target: str) -> list[MachineCode]:
    """Compile every kernel that ``variant.launch()`` launches, as it launches it, for ``target``.

    The launch gets CPU tensors and computes nothing.

    Raises:
        RuntimeError: this process runs Triton's interpreter, which has no compiler.
    """
    if backend.interpreting():
        raise RuntimeError("machine code needs Triton's compiler, but TRITON_INTERPRET=1 is set in this process")
    with _recording(target) as compiled:
        variant.launch()
    return [_inspect(variant.name, target, name, kernel, options) for name, kernel, options in compiled]


@contextmanager
def _recording(target: str) -> Iterator[list[tuple[str, Any, dict[str, Any]]]]:
    """Inside, a launch compiles for ``target`` and lands in the list: name, compiled kernel, keyword arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    class Offline:
        """The driver of a GPU that is not here."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget(*TARGETS[target])

        def get_current_device(self) -> str:
            return target

        def get_current_stream(self, device: object) -> int:
            return 0

    compiled: list[tuple[str, Any, dict[str, Any]]] = []
    run = jit.JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.__name__, kernel, kwargs))

    with (
        mock.patch.object(driver, "_active", Offline()),
        mock.patch.object(jit.JITFunction, "run", record),
        mock.patch.object(backend, "why_not_triton", return_value=None),
    ):
        yield compiled


def _inspect(variant: str, target: str, name: str, kernel: Any, options: dict[str, Any]) -> MachineCode:
    threads = TARGETS[target][2] * options["num_warps"]
    code = MachineCode(name, variant, target, options["BLOCK"] // threads, kernel.metadata.shared)
    if "amdgcn" in kernel.asm:
        return replace(code, scratch=sum(map(int, _SCRATCH.findall(kernel.asm["amdgcn"]))))
    sass, ptx, ttgir = parse_sass(disassemble(kernel.asm["cubin"])), kernel.asm["ptx"], kernel.asm["ttgir"]
    small = {operation: small_accesses(ttgir, operation, threads) for operation in ("load", "store")}
    return replace(
        code,
        sass=sass,
        narrow_loads=narrow(sass.loads, len(_SCALAR_LOAD.findall(ttgir)), small["load"]),
        narrow_stores=narrow(sass.stores, len(_STORE_INT64.findall(ptx)), small["store"]),
        contractions=len(_FMA.findall(ptx)),
    )


def disassemble(cubin: bytes) -> str:
    """The SASS and the resource usage of a cubin, by the ``cuobjdump`` of Triton's wheel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _int64(lanes: int) -> torch.Tensor:
    return torch.zeros(lanes, dtype=torch.int64)


def _noise(how: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    if how == "drawn":
        return {"seeds": _int64(len(x)), "indices": _int64(len(x))}
    return {"noise": torch.zeros(x.shape)} if how == "given" else {}


def step(
    dtype: torch.dtype = torch.bfloat16,
    noise: str = "none",
    *,
    shape: tuple[int, ...] = (2, 1, 64, 64),
    learned: bool = False,
    guidance: bool = False,
    copies: int = 1,
    x0: bool = False,
    known: bool = False,
) -> Variant:
    """A launch of the table walker, in place and with flags, as the engine makes it."""

    def launch() -> None:
        lanes = shape[0]
        x = torch.zeros(shape)
        out = torch.zeros((lanes, (1 + learned) * shape[1], *shape[2:]), dtype=dtype)
        extra: dict[str, torch.Tensor] = _noise(noise, x)
        if guidance:
            extra |= {"out_uncond": torch.zeros_like(out), "guidance": torch.ones(lanes)}
        if copies:
            extra["x_net"] = torch.zeros((copies * lanes, *shape[1:]), dtype=dtype)
        if x0:
            extra["x0"] = torch.zeros_like(x)
        if known:
            extra["known"] = torch.zeros_like(x)
        table, timesteps = torch.zeros(50, len(kernels.COLUMNS)), _int64(50)
        kernels.diffusion_step(x, out, _int64(lanes), table, timesteps, x_next=x, flags=_int64(lanes), **extra)

    words = [_shape(shape), _name(dtype), f"noise {noise}"]
    words += [word for word, on in (("learned", learned), ("guided", guidance), ("x0", x0), ("known", known)) if on]
    return Variant(", ".join([*words, f"{copies} copies"]), launch)


def _forward(dtype: torch.dtype, noise: str, shape: tuple[int, ...] = (2, 1, 64, 64)) -> Variant:
    def launch() -> None:
        x, table = torch.zeros(shape, dtype=dtype), torch.zeros(1000)
        kernels.q_sample(x, _int64(len(x)), table, table, **_noise(noise, x))

    return Variant(f"{_shape(shape)}, {_name(dtype)}, noise {noise}", launch)


def _posterior(dtype: torch.dtype, shape: tuple[int, ...] = (2, 1, 64, 64)) -> Variant:
    def launch() -> None:
        x, table = torch.zeros(shape, dtype=dtype), torch.zeros(1000)
        kernels.q_posterior_mean_variance(x, x, _int64(len(x)), table, table, table, table)

    return Variant(f"{_shape(shape)}, {_name(dtype)}", launch)


def _normal(shape: tuple[int, ...], stream: int) -> Variant:
    lanes = _int64(shape[0])
    return Variant(
        f"{_shape(shape)}, stream {stream}", lambda: kernels.normal(lanes, lanes, lanes, shape[1:], stream)
    )


def _pixels(dtype: torch.dtype, shape: tuple[int, ...]) -> Variant:
    return Variant(f"{_shape(shape)}, {_name(dtype)}", lambda: kernels.to_uint8(torch.zeros(shape, dtype=dtype)))


def _group_norm(
    dtype: torch.dtype,
    size: int,
    channels: int,
    skip: int = 0,
    groups: int = 32,
    *,
    modulated: bool = False,
    silu: bool = True,
) -> Variant:
    """A launch as in a residual block, on images of size x size; modulated: with time, scale and shift."""

    def launch() -> None:
        x, other = (
            torch.zeros(2, c, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
            for c in (channels, skip)
        )
        parameters = torch.zeros(channels + skip, dtype=dtype)
        projections = torch.zeros(2, 4 * len(parameters), dtype=dtype).chunk(4, dim=1)
        extra = dict(zip(("time", "scale", "shift"), projections, strict=False)) if modulated else {}
        kernels.group_norm_silu(
            x, parameters, parameters, groups, 1e-6, skip=other if skip else None, silu=silu, **extra
        )

    words = [f"{size}x{size}", f"{channels}+{skip} channels" if skip else f"{channels} channels", _name(dtype)]
    words += [word for word, on in (("modulated", modulated), ("no silu", not silu)) if on]
    return Variant(", ".join(words), launch)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def variants() -> list[Variant]:
    """Every kind of launch: dtypes, sources of noise, optional arguments, large, small, ragged and single lanes."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    noises = ("none", "given", "drawn")
    large, fashion, cifar, ragged = (2, 1, 64, 64), (2, 1, 28, 28), (2, 3, 32, 32), (2, 1, 65, 80)
    everywhere = [
        step(brain, "none"),
        step(brain, "drawn"),
        step(brain, "drawn", shape=fashion),
        step(brain, "drawn", learned=True),
        _forward(brain, "drawn"),
        _posterior(brain),
        _normal(large, kernels.STREAM_INITIAL),
        *(_pixels(single, (2, channels, 64, 64)) for channels in (1, 3, 4)),
        _group_norm(brain, 256, 128),
        _group_norm(brain, 128, 256, 128),
        _group_norm(brain, 16, 256, modulated=True),
    ]
    return [replace(variant, every_target=True) for variant in everywhere] + [
        step(brain, "given"),
        *(step(dtype, noise) for dtype in (half, single) for noise in noises),
        *(step(brain, noise, shape=fashion) for noise in noises[:2]),
        *(step(brain, noise, shape=ragged) for noise in noises),
        step(brain, "drawn", shape=cifar),
        step(brain, "drawn", shape=(1, 3, 64, 64)),
        step(half, "none", shape=(1, 1, 1, 1)),
        step(brain, "given", learned=True, guidance=True, copies=2, x0=True),
        step(brain, "drawn", guidance=True, copies=2),
        step(brain, "none", copies=0),
        step(single, "none", copies=0, x0=True),
        step(brain, "none", x0=True),
        step(brain, "drawn", known=True),
        step(brain, "given", known=True),
        step(single, "drawn", x0=True, known=True),
        _forward(brain, "given"),
        *(_forward(dtype, noise) for dtype in (half, single) for noise in noises[1:]),
        _forward(brain, "drawn", fashion),
        *(_posterior(dtype) for dtype in (half, single)),
        _posterior(brain, fashion),
        _normal(fashion, kernels.STREAM_STEP),
        _pixels(brain, large),
        _pixels(single, (2, 2, 64, 64)),
        _pixels(single, cifar),
        *(_group_norm(dtype, 32, 128) for dtype in (half, brain, single)),
        _group_norm(brain, 64, 512, 512),
        _group_norm(brain, 64, 512, 256),
        _group_norm(single, 128, 256, 128),
        _group_norm(half, 16, 512, 256),
        _group_norm(brain, 32, 256, modulated=True),
        _group_norm(brain, 4, 256, silu=False),
        _group_norm(brain, 14, 256, 128),
        _group_norm(brain, 256, 500, groups=125),
    ]


def measure(targets: Sequence[str] = tuple(TARGETS)) -> list[MachineCode]:
    """Compile every variant for each of ``targets``."""
    return [
        code
        for variant in variants()
        for target in targets
        if variant.every_target or target == "sm_90"
        for code in compile_launch(variant, target)
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
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m stepfusion.bench.machine_code", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    parser.add_argument("--target", choices=TARGETS, action="append", help="compile for this one (repeat for more)")
    options = parser.parse_args(arguments)
    try:
        codes = measure(options.target or tuple(TARGETS))
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


if __name__ == "__main__":
    sys.exit(main())
