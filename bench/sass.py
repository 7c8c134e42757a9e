"""Disassembled NVIDIA code (SASS): instructions, registers, widths of accesses."""

from __future__ import annotations

import math
import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_ADDRESS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+\S.*?;", re.MULTILINE)
_JUMP = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+@!?U?P\w+\s+BRA\S*\s+(?:\S+,\s*)?0x([0-9a-f]+)", re.MULTILINE)
_REGISTERS = re.compile(r"REG:(\d+)")
#: Of ELF: where the offset of the section headers stands, then their size and number and the index of their names.
_SECTIONS, _SECTION_COUNTS = struct.Struct("<40xQ"), struct.Struct("<58xHHH")
#: Of the header of a section: offset of its name, offset of its contents, size.
_SECTION = struct.Struct("<I20xQQ24x")
_TENSOR_ACCESS = re.compile(r"tt\.(load|store) .* : tensor<([\dx]+)x!tt\.ptr<([a-z]+)(\d+)>")


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


def parse_sass(text: str) -> Sass:
    """Read a text of :func:`disassemble`, or what ``cuobjdump -sass -res-usage`` prints of one kernel."""
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
    for name, shape, kind, bits in _TENSOR_ACCESS.findall(ttgir):
        elements = math.prod(map(int, shape.split("x")))
        if name == operation and (kind, bits) != ("i", "64") and elements * int(bits) < 128 * threads:
            count += -(-elements // threads)
    return count


def disassemble(cubins: Sequence[bytes], capability: int) -> list[str]:
    """The SASS and the resource usage of each cubin of one kernel, by the programs of Triton's wheel.

    ``nvdisasm`` takes half a second to start, whatever it reads: so it runs once, on the instructions of all kernels.

    Args:
        capability: of the GPU that all are compiled for, such as 90.
    """
    from triton import knobs

    if not cubins:
        return []
    codes = [_instructions(cubin) for cubin in cubins]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels"
        path.write_bytes(b"".join(codes))
        architecture = f"SM{capability}{'a' if capability >= 90 else ''}"
        text = _output(knobs.nvidia.nvdisasm.path, "--binary", architecture, str(path))
        usages = []
        for cubin in cubins:
            path.write_bytes(cubin)
            usages.append(_output(knobs.nvidia.cuobjdump.path, "-res-usage", str(path)))
    return ["\n".join(parts) for parts in zip(usages, _split(text, [len(code) for code in codes]), strict=True)]


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _split(text: str, sizes: Sequence[int]) -> list[str]:
    """Disassembled instructions that follow each other, by the kernel: ``sizes`` of them in bytes."""
    ends = list(accumulate(sizes))
    parts: list[list[str]] = [[] for _ in sizes]
    for line in text.splitlines():
        if address := _ADDRESS.match(line):
            parts[bisect_right(ends, int(address[1], 16))].append(line)
    return ["\n".join(lines) for lines in parts]


def _instructions(cubin: bytes) -> bytes:
    """The machine code in a cubin (an ELF file of 64 bits) of one kernel.

    Raises:
        ValueError: it does not hold one section of code.
    """
    (table,) = _SECTIONS.unpack_from(cubin)
    size, count, names = _SECTION_COUNTS.unpack_from(cubin)
    headers = [_SECTION.unpack_from(cubin, table + i * size) for i in range(count)]
    base = headers[names][1]
    found = [cubin[at : at + length] for name, at, length in headers if cubin.startswith(b".text.", base + name)]
    if len(found) != 1:
        raise ValueError(f"a cubin must hold the code of one kernel, got {len(found)}")
    return found[0]
