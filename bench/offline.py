"""The real launchers on a machine without a GPU: Triton is told that one is there, and compiles instead of launching.

So what is compiled is what a GPU would run, with the specialisation that the arguments themselves cause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from stepfusion.kernels import backend

#: Name of a target -> backend, architecture and threads a warp.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Launch:
    """A launch that a launcher asked for, compiled.

    Attributes:
        name: of the kernel. kernel: what Triton compiled. grid: programs along each axis. arguments: of the kernel's
            parameters, by name. options: the compiler's, such as num_warps.
    """

    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


@contextmanager
def offline(target: str, launched: Callable[[Launch], None]) -> Iterator[None]:
    """Inside, a launch of a Triton kernel with CPU tensors is compiled for ``target`` and handed to ``launched``.

    Raises:
        RuntimeError: this process runs Triton's interpreter, which has no compiler.
    """
    if backend.interpreting():
        raise RuntimeError("machine code needs Triton's compiler, but TRITON_INTERPRET=1 is set in this process")
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

    compile_only = jit.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
        arguments = dict(zip(self.arg_names, args, strict=False))
        arguments |= {name: value for name, value in kwargs.items() if name in self.arg_names}
        options = {name: value for name, value in kwargs.items() if name not in self.arg_names}
        launched(Launch(self.__name__, kernel, grid(arguments) if callable(grid) else grid, arguments, options))
        return kernel

    with (
        mock.patch.object(driver, "_active", Offline()),
        mock.patch.object(jit.JITFunction, "run", run),
        mock.patch.object(backend, "why_not_triton", return_value=None),
    ):
        yield
