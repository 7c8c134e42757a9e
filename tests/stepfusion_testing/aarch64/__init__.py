"""The C++ sampling kernels compiled for AArch64 with NEON, and run in an emulator: one process a call.

Needs a cross compiler (``aarch64-linux-gnu-g++``) and ``qemu-aarch64``; Debian has both.
"""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from stepfusion.kernels.cpu import sampling_library

_COMPILER, _EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
_FUNCTIONS = ("diffusion_step", "q_sample", "q_posterior", "normal", "to_uint8", "transition_logprob")
_FOLDER = Path(__file__).parent

Call = Callable[[str, Sequence[Tensor | None], Sequence[int]], None]


def why_not_emulated() -> str | None:
    """The reason why nothing can be emulated here; None if it can."""
    missing = [name for name in (_COMPILER, _EMULATOR) if shutil.which(name) is None]
    return f"there is no {' and no '.join(missing)}" if missing else None


def build(folder: Path) -> Path:
    """A program for AArch64 that makes the calls that it is told."""
    source, program = folder / "call.cpp", folder / "call"
    source.write_text(sampling_library.source() + (_FOLDER / "call.cpp").read_text())
    flags = [flag for flag in sampling_library.FLAGS if flag != "-fPIC"]
    subprocess.run([_COMPILER, *flags, "-static", f"-I{_FOLDER}", str(source), "-o", str(program)], check=True)
    return program


def emulated(program: Path) -> Call:
    """What stands in for :func:`stepfusion.kernels.cpu.sampling_library.call`."""
    assert sys.byteorder == "little"

    def call(name: str, tensors: Sequence[Tensor | None], sizes: Sequence[int]) -> None:
        message = [struct.pack("<3q", _FUNCTIONS.index(name), len(tensors), len(sizes))]
        memory = [b"" if t is None else ctypes.string_at(t.data_ptr(), t.numel() * t.itemsize) for t in tensors]
        for tensor, content in zip(tensors, memory, strict=True):
            message += [struct.pack("<q", -1 if tensor is None else len(content)), content]
        message.append(struct.pack(f"<{len(sizes)}q", *sizes))
        command = [_EMULATOR, str(program)]
        answer = subprocess.run(command, input=b"".join(message), capture_output=True, check=True).stdout
        for tensor, content in zip(tensors, memory, strict=True):
            if tensor is not None:
                ctypes.memmove(tensor.data_ptr(), answer[: len(content)], len(content))
                answer = answer[len(content) :]
        assert not answer

    return call
