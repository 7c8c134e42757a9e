"""``network="compile"``: a network as `torch.compile` makes it, specialised, cached on disk, checked before use."""

from __future__ import annotations

import threading
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepfusion.cache import compiler_cache

#: Largest difference between the compiled and the eager network that rounding explains, relative to the largest output.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

#: What Inductor is told, for this network alone.
CPU_OPTIONS: dict[str, Any] = {"freezing": True}
CUDA_OPTIONS: dict[str, Any] = {
    "max_autotune": True,
    "coordinate_descent_tuning": True,
    "triton.cudagraphs": False,
    "loop_reindexing_after_fusion": False,
}


def compile_network(module: nn.Module, device: torch.device, dtype: torch.dtype) -> CompiledNetwork:
    """Compile ``module``, once for each signature of its inputs, when it is first called with them.

    Args:
        module: maps tensors to one tensor; in eval mode, its parameters on ``device`` and, where floating, in
            ``dtype``. Its parameters may not change afterwards.
        device: where it runs; decides the compiler's settings.
        dtype: of its output; decides how close compiled and eager must be.
    """
    return CompiledNetwork(module, CPU_OPTIONS if device.type == "cpu" else CUDA_OPTIONS, TOLERANCE[dtype])


class CompiledNetwork:
    """A network that is compiled for each signature (shapes, dtypes, strides) of its inputs, and checked against eager.

    Attributes:
        compilations: graphs compiled so far: one for each signature, unless something was compiled again.
        failure: why the eager network is used for signatures that come from now on; None while all is well.
    """

    def __init__(self, module: nn.Module, options: dict[str, Any], tolerance: float) -> None:
        self.compilations = 0
        self.failure: str | None = None
        self._module = module
        self._options = options
        self._tolerance = tolerance
        self._trusted: dict[tuple[object, ...], Callable[..., Tensor]] = {}
        self._lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, *tensors: Tensor) -> Tensor:
        """Run the network. The first call of a signature compiles, which takes seconds to minutes."""
        network = self._trusted.get(_signature(tensors))
        return network(*tensors) if network is not None else self._first_call(tensors)

    def _first_call(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Compile for these inputs, and return the eager result; trust what was compiled if it agrees."""
        expected: Tensor = self._module(*tensors)
        with self._lock:
            signature = _signature(tensors)
            if signature in self._trusted:
                return expected
            if self.failure is None:
                compiled = self._compile()
                self.failure = self._compare(compiled, tensors, expected)
                if self.failure is None:
                    self._trusted[signature] = compiled
                    return expected
                warnings.warn(f"the eager network is used: {self.failure}", RuntimeWarning, stacklevel=4)
            self._trusted[signature] = self._module
        return expected

    def _compare(self, compiled: Callable[..., Tensor], tensors: tuple[Tensor, ...], expected: Tensor) -> str | None:
        """Run what was compiled for the first time: None, or why it may not be used."""
        try:
            with compiler_cache():
                actual = compiled(*tensors)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            return f"torch.compile failed with {type(error).__name__}: {lines[0]}"
        return describe_difference(actual, expected, self._tolerance)

    def _compile(self) -> Callable[..., Tensor]:
        """`torch.compile` the module behind a code object of its own.

        Dynamo counts recompilations by code object: a class's ``forward`` is shared by its instances, so that several
        engines, or several signatures, would run into its limit together.
        """
        module = self._module

        def forward(*tensors: Tensor) -> Tensor:
            out: Tensor = module(*tensors)
            return out

        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            self.compilations += 1
            made: Callable[..., Any] = torch._inductor.compile(graph, inputs, options=self._options)
            return made

        code = forward.__code__.replace()
        own = types.FunctionType(code, forward.__globals__, "network", None, forward.__closure__)
        compiled: Callable[..., Tensor] = torch.compile(own, fullgraph=True, dynamic=False, backend=backend)
        return compiled


def describe_difference(actual: Tensor, expected: Tensor, tolerance: float) -> str | None:
    """How two outputs of a network differ by more than ``tolerance`` times the largest expected value; None if not."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"the compiled network returned {_describe(actual)}, the eager one {_describe(expected)}"
    if expected.numel() == 0:
        return None
    scale = expected.abs().max().item()
    difference = (actual.float() - expected.float()).abs().max().item()
    if difference <= tolerance * scale:
        return None
    return f"the compiled network differs by {difference:.3g} where the largest output is {scale:.3g}"


def _signature(tensors: Sequence[Tensor]) -> tuple[object, ...]:
    return tuple((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
