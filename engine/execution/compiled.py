"""``network="compile"`` and ``"cpp"``: a network in faster forms, specialised, cached on disk, checked before use.

"compile" is what `torch.compile` makes of it, "cpp" on a CPU our C++ kernels alone, without Inductor; "compile" on a
CPU has both: what the kernels leave is compiled.

What Inductor is told, and why. Measured: the 35.7 M CIFAR UNet at batch 8 in bfloat16 with its time path hoisted,
one thread of an AMD Zen 5 with AVX512-BF16, PyTorch 2.13, least of several evaluations. CUDA: not measured yet.

====  ======================================  =================================================================
CPU   networks of ours in bfloat16 in their   145 ms of processor time, 300 to 316 without; the first process
      form of `networks.cpu_form`, which is   starts in 15 s, of which most is the C++ compiler's, and the next
      not compiled where it is whole          in 2.3; Inductor's in 57 and 3.8
CPU   ``freezing`` off                        288 and 293 ms in two runs, 278 and 302 with it: no gain to be sure of,
                                              and the graph's packed weights cannot be cached: the next process
                                              starts in 22 s, without freezing in 8
CUDA  ``max_autotune``                        matrix products and convolutions are chosen by timing them
      ``coordinate_descent_tuning``           and so are the launch settings of generated kernels
      ``loop_reindexing_after_fusion`` off    upsample, conv, GroupNorm, SiLU ran six times as long (pytorch#189488)
      ``triton.cudagraphs`` off               the engine captures whole ticks itself
====  ======================================  =================================================================
"""

from __future__ import annotations

import logging
import threading
import types
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from stepfusion import _checks
from stepfusion.errors import first_line
from stepfusion.execution.cache import compiler_cache
from stepfusion.execution.cpu_form import CpuForm, CpuForms, is_ours
from stepfusion.execution.warm_cache import tell_compiled
from stepfusion.kernels.cache import compiled_anew
from stepfusion.kernels.cpu.library import why_not_cpu_kernels
from stepfusion.kernels.tolerance import NETWORK_FLOAT32

#: What takes long before the first image is told here; commands print it.
logger = logging.getLogger("stepfusion.compiling")

_Signature: TypeAlias = tuple[tuple[object, ...], ...]

#: Largest difference between the compiled and the eager network that rounding explains, relative to the largest
#: output: eight units in the last place, of ten bits in float32, which is what TF32 keeps.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2.0**-7, torch.float16: 2.0**-7, torch.bfloat16: 2.0**-4}

#: The same of a network by our C++ kernels.
CPU_FORM_TOLERANCE = {torch.float32: NETWORK_FLOAT32, torch.bfloat16: TOLERANCE[torch.bfloat16]}

#: What Inductor is told, for this network alone.
CPU_OPTIONS: dict[str, Any] = {"freezing": False}
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

    Raises:
        ValueError: ``dtype`` is not float64, float32, float16 or bfloat16.
    """
    if dtype not in TOLERANCE:
        raise ValueError(f"dtype must be one of {', '.join(map(str, TOLERANCE))}, got {dtype}")
    options = known_options(CPU_OPTIONS if device.type == "cpu" else CUDA_OPTIONS)
    forms = CpuForms(module) if why_not_cpu_form(device, dtype) is None else None
    return CompiledNetwork(module, options, TOLERANCE[dtype], forms, CPU_FORM_TOLERANCE.get(dtype, 0.0))


def cpp_network(module: nn.Module, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The same without `torch.compile`: the C++ kernels run layers of our networks, PyTorch whatever is left.

    Nothing but the kernels' library is compiled. A network that is not ours is returned as it is.
    """
    if not is_ours(module):
        return module
    return CompiledNetwork(module, None, 0.0, CpuForms(module), CPU_FORM_TOLERANCE[dtype])


def known_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that the installed Inductor has: it refuses to compile with others.

    PyTorch 2.11, for one, has no ``loop_reindexing_after_fusion``.
    """
    known = {*torch._inductor.list_options()}
    return {name: value for name, value in options.items() if name in known}


def why_not_cpu_form(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the C++ kernels run no layers of our networks on ``device``; None if they do."""
    return why_not_cpu_kernels(dtype) if device.type == "cpu" else "the C++ kernels are for CPUs"


class CompiledNetwork:
    """A network compiled for each signature (shapes, dtypes, strides) of its inputs, and checked against eager.

    Attributes:
        compilations: graphs compiled so far: one for each signature, unless something was compiled again.
        failure: why the eager network is used for signatures that come from now on; None while all is well.
        declined: why the module itself is compiled for signatures that come from now on, and not its ``forms``.

    Args:
        module: the network.
        options: what Inductor is told; None if nothing is compiled.
        tolerance: how far the compiled network may be from the module, relative to the largest output.
        forms: makes a faster form of the module for given inputs, or None; it is checked against the module.
        form_tolerance: how far that may be from it.
    """

    def __init__(
        self,
        module: nn.Module,
        options: dict[str, Any] | None,
        tolerance: float,
        forms: Callable[[tuple[Tensor, ...]], CpuForm | None] | None = None,
        form_tolerance: float = 0.0,
    ) -> None:
        self.compilations = 0
        self.failure: str | None = None
        self.declined: str | None = None
        self._module = module
        self._options = options
        self._tolerance = tolerance
        self._forms = forms
        self._form_tolerance = form_tolerance
        self._trusted: dict[_Signature, Callable[..., Tensor]] = {}
        self._lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, *tensors: Tensor) -> Tensor:
        """Run the network. The first call of a signature compiles, which takes seconds to minutes."""
        network = self._trusted.get(_signature(tensors))
        return network(*tensors) if network is not None else self._first_call(tensors)

    def _first_call(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Compile for these inputs, and trust what was compiled if it agrees with the eager network.

        Returns what every later call returns, so that a request gives the same bits first and later.
        """
        signature = _signature(tensors)
        with self._lock:
            if signature not in self._trusted:
                expected: Tensor = self._module(*tensors)
                if self.failure is not None:
                    self._trusted[signature] = self._module
                elif expected.numel() and not bool(_finite_lanes(expected).any()):
                    return expected  # nothing to check against, until another call
                elif not self._faster_form_is_trusted(signature, tensors, expected) and self._options is not None:
                    self.failure = self._try("torch.compile", self._compiled, signature, tensors, expected)
                    if self.failure is not None:
                        warnings.warn(f"the network runs eagerly: {self.failure}", RuntimeWarning, stacklevel=4)
        return self._trusted[signature](*tensors)

    def _faster_form_is_trusted(self, signature: _Signature, tensors: tuple[Tensor, ...], expected: Tensor) -> bool:
        """Trust a faster form for these inputs, if there is one and it agrees; if it fails, none is made again."""
        forms = self._forms
        if forms is None:
            self._trusted[signature] = self._module
            return False

        def make() -> Callable[..., Tensor] | None:
            form = forms(tensors)
            if form is None or form.whole or self._options is None:
                return None if form is None else form.network
            return self._compile(form.network)

        self.declined = self._try("its C++ form", make, signature, tensors, expected, self._form_tolerance)
        if self.declined is not None:
            self._forms = None
            instead = "runs eagerly" if self._options is None else "is compiled as it is"
            warnings.warn(f"the network {instead}: {self.declined}", RuntimeWarning, stacklevel=5)
        return self._trusted[signature] is not self._module

    def _try(
        self,
        what: str,
        make: Callable[[], Callable[..., Tensor] | None],
        signature: _Signature,
        tensors: tuple[Tensor, ...],
        expected: Tensor,
        tolerance: float | None = None,
    ) -> str | None:
        """Trust what is made for these inputs and return None; or trust the eager network and return why.

        If ``make`` makes nothing, there is no reason either.
        """
        self._trusted[signature] = self._module
        known, named = len(compiled_anew()), f"the network for {_checks.describe(tensors[0])}" if tensors else what
        try:
            with nullcontext() if self._options is None else compiler_cache(named):
                made = make()
                if made is None:
                    return None
                actual = made(*tensors)
        except torch.OutOfMemoryError:
            del self._trusted[signature]
            raise
        except Exception as error:
            cause = getattr(error, "inner_exception", error)  # what Dynamo wraps when a backend fails
            return f"{what} failed with {first_line(cause)}"
        tell_compiled(compiled_anew()[known:])
        difference = describe_difference(actual, expected, self._tolerance if tolerance is None else tolerance)
        if difference is None:
            self._trusted[signature] = made
        return difference

    def _compiled(self) -> Callable[..., Tensor]:
        return self._compile(self._module)

    def _compile(self, module: nn.Module) -> Callable[..., Tensor]:
        """`torch.compile` a module behind a code object of its own.

        Dynamo counts recompilations by code object: a class's ``forward`` is shared by its instances, so that several
        engines, or several signatures, would run into its limit together.
        """

        def forward(*tensors: Tensor) -> Tensor:
            out: Tensor = module(*tensors)
            return out

        def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            self.compilations += 1
            logger.info("compiling the network, %d operators: seconds to minutes", len(graph.graph.nodes))
            made: Callable[..., Any] = torch._inductor.compile(graph, inputs, options=self._options)
            return made

        code = forward.__code__.replace()
        own = types.FunctionType(code, forward.__globals__, "network", None, forward.__closure__)
        compiled: Callable[..., Tensor] = torch.compile(own, fullgraph=True, dynamic=False, backend=backend)
        return compiled


def describe_difference(actual: Tensor, expected: Tensor, tolerance: float) -> str | None:
    """How two outputs differ by more than ``tolerance`` times the largest expected absolute value; None if not.

    Images that are not finite are not compared: they must not decide how the others beside them are computed.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"the compiled network returned {_checks.describe(actual)}, the eager one {_checks.describe(expected)}"
    if expected.numel() == 0:
        return None
    sound = _finite_lanes(expected)
    actual, expected = actual[sound], expected[sound]
    if expected.numel() == 0:
        return None
    scale = expected.abs().max().item()
    difference = (actual.float() - expected.float()).abs().max().item()
    if difference <= tolerance * scale:  # never true of a NaN
        return None
    return f"the compiled network differs by {difference:.3g} where the largest output is {scale:.3g}"


def _finite_lanes(out: Tensor) -> Tensor:
    """Which images of an output [B, ...] are finite, bool [B]."""
    return out.reshape(len(out), -1).isfinite().all(1)


def _signature(tensors: Sequence[Tensor]) -> _Signature:
    return tuple((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors)
