"""PTX written by hand: a kernel of one block around a few instructions, and its results."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from stepfusion.bench.ptx.launch import Options, execute
from stepfusion.bench.ptx.memory import Extent, GlobalMemory
from stepfusion.bench.ptx.types import Fault

Array = npt.NDArray[Any]

LANES = np.arange(32, dtype="u4")
UNTOUCHED = 0xDEADBEEF

# %r1: thread. %rd1, %rd2: output and input; %rd3, %rd4: the thread's word of each. %r2: a number.
_KERNEL = """.version 8.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(.param .u64 .ptr .global .align 1 k_0, .param .u64 k_1, .param .u32 k_2)
.reqntid {threads}
{{
.reg .pred %p<9>; .reg .b16 %rs<99>; .reg .b32 %r<299>; .reg .b64 %rd<99>;
mov.u32 %r1, %tid.x; ld.param.b64 %rd1, [k_0]; ld.param.b64 %rd2, [k_1]; ld.param.b32 %r2, [k_2];
mad.wide.u32 %rd3, %r1, 4, %rd1; mad.wide.u32 %rd4, %r1, 4, %rd2;
{body}
ret;
}}
"""


def kernel(body: str, threads: int = 32) -> str:
    """The text of a module whose kernel runs ``body``; OUT is the thread's word of the output."""
    return _KERNEL.format(threads=threads, body=body.replace("OUT", "[%rd3]"))


def run(
    body: str,
    given: Array | None = None,
    *,
    words: int = 1,
    threads: int = 32,
    number: int = 7,
    shared: int = 512,
    options: Options | None = None,
    states: Array | None = None,
) -> Array:
    """What ``threads`` threads leave in an output of ``words`` words each, uint32 [threads, words].

    ``given``: the input, any dtype; zeros, a word a thread, by default. ``states``: of the input's bytes.
    """
    source = np.zeros(threads, "u4") if given is None else np.ascontiguousarray(given).view("u1")
    out = np.full(threads * words, UNTOUCHED, "u4")
    memory = GlobalMemory([Extent(out.ctypes.data, out.nbytes), Extent(source.ctypes.data, source.nbytes, states)])
    arguments = [out.ctypes.data, source.ctypes.data, number]
    execute(kernel(body, threads), (1,), arguments, memory, shared, options)
    return out.reshape(threads, words)


def fault(call: Callable[[], object]) -> str | None:
    """The fault that a call runs into, if any."""
    try:
        call()
    except Fault as error:
        return str(error)
    return None


def compute(instructions: str, *operands: Any, kind: str = "u4") -> Array:
    """What a lane computes from words of its own: ``D`` from ``A``, ``B`` and ``C``. Floats are float32. [32]."""
    words = np.stack([np.broadcast_to(_word(operand), 32) for operand in operands], axis=1)
    count = len(operands)
    loads = f"mad.wide.u32 %rd5, %r1, {4 * count}, %rd2;" + "".join(
        f"ld.global.b32 %r{10 + i}, [%rd5+{4 * i}];" for i in range(count)
    )
    registers = {"D": "%r20", "A": "%r10", "B": "%r11", "C": "%r12"}
    named = re.sub(r"\b[ABCD]\b", lambda match: registers[match[0]], instructions)
    return run(f"{loads} {named}; st.global.b32 OUT, %r20;", words).view(kind).reshape(-1)


def _word(operand: Any) -> Array:
    """An operand as the bits of a register."""
    array = np.asarray(operand)
    return array.astype("f4").view("u4") if array.dtype.kind == "f" else array.astype("u4")
