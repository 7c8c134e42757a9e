"""What every launcher shares: argument checks, the shape of a launch, lanes, and PyTorch's ambient settings.

A batch is [B, ...]: B lanes of E elements each, contiguous. A program of a kernel handles BLOCK consecutive elements
of one lane.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_AUTOCAST = ("cpu", "cuda", "xpu")
#: Parameters of kernels that are read one number at a time. Alignment gains nothing there, and kernels would be
#: compiled once more for columns of an upload that begin anywhere.
SCALARS = ("row_ptr", "seed_ptr", "index_ptr", "timestep_ptr", "t_ptr", "flag_ptr", "guidance_ptr")
_MAX_ELEMENTS = 65535 * 2048  # of a lane: CUDA's limit along a grid's second axis times the least block


class Geometry(NamedTuple):
    """How one batch is cut into programs."""

    grid: tuple[int, int]
    block: int
    vec: int
    even: bool
    num_warps: int


def geometry(lanes: int, elements: int, *dtypes: torch.dtype) -> Geometry:
    """Programs of 4 warps: 32 elements a thread for large lanes, which spreads the fixed cost thin, 8 for small ones.

    ``vec`` is how many consecutive elements make 128 bits in the narrowest of ``dtypes``, at most 8: the layout that
    all loads share.
    """
    block = 4096 if elements >= 4096 else 1024
    vec = 8 if any(d.itemsize <= 2 for d in dtypes) else 4
    return Geometry((lanes, -(-elements // block)), block, vec, elements % block == 0, 4)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the current one: Triton launches there, on its current stream, wherever the tensors are."""
    return nullcontext() if device.type in ("cpu", "meta") else torch.accelerator.device_index(device.index)


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """An optional input as kernels read it."""
    return None if x is None else x.contiguous()


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """True if autograd, in reverse or forward mode, follows what is made of ``tensors``.

    Kernels have no gradient, and autograd would take what they write for a constant. So every public function that
    launches one asks this first, and leaves such inputs to its reference in eager PyTorch.
    """
    given = [x for x in tensors if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return True
    return has_tangent(*given)


def has_tangent(*tensors: torch.Tensor | None) -> bool:
    """True if autograd in forward mode follows what is made of ``tensors``."""
    if forward_ad._current_level < 0:
        return False
    given = [x for x in tensors if x is not None]
    return any(forward_ad.unpack_dual(x).tangent is not None for x in given)  # type: ignore[no-untyped-call]


def check_lanes(name: str, x: torch.Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> int:
    """The number of elements of a lane of ``x`` [B, ...]; TypeError or ValueError if it cannot be a batch."""
    check_dtype(name, x, dtypes)
    if x.ndim < 1:
        raise ValueError(f"{name} must have a batch dimension, got a 0-dimensional tensor")
    return check_elements(name, math.prod(x.shape[1:]))


def check_elements(name: str, elements: int) -> int:
    """``elements``; ValueError if one image has more of them than a launch can cover."""
    if elements > _MAX_ELEMENTS:
        raise ValueError(f"{name} must have at most {_MAX_ELEMENTS} elements an image, got {elements}")
    return elements


def check_dtype(name: str, x: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """TypeError unless ``x`` is a tensor of one of ``dtypes``."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        accepted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {accepted}, got {str(x.dtype).removeprefix('torch.')}")


def check_joined(x: torch.Tensor, skip: torch.Tensor | None) -> int:
    """The channels of concat(x, skip); TypeError or ValueError unless both are images [B, C, H, W] of one size."""
    if x.ndim != 4:
        raise ValueError(f"x must be images [B, C, H, W], got shape {list(x.shape)}")
    if skip is None:
        return x.shape[1]
    check_dtype("skip", skip, (x.dtype,))
    if skip.ndim != 4:
        raise ValueError(f"skip must be images [B, C, H, W], got shape {list(skip.shape)}")
    check_like("skip", skip, (len(x), skip.shape[1], *x.shape[2:]), x.device, (x.dtype,))
    return x.shape[1] + skip.shape[1]


def of_parameters(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """What weights and biases may be beside images of ``dtype``: the same, or float32 beside half precision."""
    return (dtype,) if dtype in (torch.float32, torch.float64) else (dtype, torch.float32)


def check_like(
    name: str, x: torch.Tensor, shape: tuple[int, ...], device: torch.device, dtypes: tuple[torch.dtype, ...] = FLOATS
) -> None:
    """TypeError or ValueError unless ``x`` has this shape, device and one of ``dtypes``."""
    check_dtype(name, x, dtypes)
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device}, got {x.device}")


def check_table(name: str, table: torch.Tensor, device: torch.device, entries: int | None = None) -> int:
    """The number of entries of a table [T] of a schedule; TypeError or ValueError unless it is one of ``entries``."""
    check_dtype(name, table, (torch.float32, torch.float64))
    check_like(name, table, (table.numel() if entries is None else entries,), device, (table.dtype,))
    return len(table)


def check_output(name: str, x: torch.Tensor) -> None:
    """ValueError unless the output buffer ``x`` is contiguous."""
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(x.stride())} for shape {list(x.shape)}")


def is_nhwc(x: torch.Tensor) -> bool:
    """Whether the memory of images [B, C, H, W] is in channels_last order, and that is another than C order."""
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def check_source(
    noise: torch.Tensor | None, seeds: torch.Tensor | None, indices: torch.Tensor | None, x: torch.Tensor
) -> None:
    """Noise is either given ([B, ...] like ``x``) or drawn (``seeds`` and ``indices``, int64 [B]), or neither."""
    if noise is not None:
        if seeds is not None or indices is not None:
            raise ValueError("noise must be given or drawn, got both noise and seeds or indices")
        check_like("noise", noise, tuple(x.shape), x.device, (*FLOATS, torch.float64))
    elif (seeds is None) != (indices is None):
        raise ValueError("seeds and indices must be given together, got one of them")
    elif seeds is not None and indices is not None:
        check_like("seeds", seeds, (len(x),), x.device, (torch.int64,))
        check_like("indices", indices, (len(x),), x.device, (torch.int64,))


def per_lane(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B] as [B, 1, ...], to broadcast over ``like`` [B, ...]."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def gather(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``table[rows]``, NaN if a row lies outside the table, as in the kernels: no device-side assertion."""
    inside = (rows >= 0) & (rows < len(table))
    values = table[rows.clamp(0, len(table) - 1)]
    return torch.where(inside.reshape(-1, *(1,) * (values.ndim - 1)), values, math.nan)


def with_unit_stride(x: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """A [B, C] operand with unit stride along C, and the distance of its rows: a slice of a wider tensor as it is."""
    if x is None:
        return None, 0
    x = x if x.stride(1) == 1 else x.contiguous()
    return x, x.stride(0) if len(x) > 1 else 0


def nhwc(x: torch.Tensor) -> torch.Tensor:
    """``x`` in channels_last memory that starts at a multiple of 16 bytes, so that one cut of a tile fits all."""
    x = x.contiguous(memory_format=torch.channels_last)
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.channels_last)


def images_like(x: torch.Tensor, channels: int) -> torch.Tensor:
    """New images of the size, dtype and device of ``x`` with so many channels, in NHWC memory."""
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """``x`` contiguous, in memory that starts at a multiple of 16 bytes, as for :func:`nhwc`."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


@contextmanager
def plain_torch(*, gradients: bool) -> Iterator[None]:
    """Run a block, or as a decorator a function, under PyTorch's own defaults, and restore the caller's after it.

    The ambient settings belong to the caller: what is computed must not depend on them.

    These are: float32 as the default dtype, the CPU as the default device, no autocast, no inference mode, and
    gradients as asked for. All but the dtype are settings of a thread; the default dtype is the process's, so that
    other threads see float32 meanwhile if the caller had chosen another.
    """
    with ExitStack() as stack:
        # Each is left alone if it is as it should be: a tick enters this, and each costs microseconds.
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.is_grad_enabled() is not gradients:
            stack.enter_context(torch.set_grad_enabled(gradients))
        for device in _AUTOCAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        if _DTYPE.users or torch.get_default_dtype() != torch.float32:
            stack.enter_context(_DTYPE.float32())
        yield


class _DefaultDtype:
    """float32 as the default dtype of the process, for as long as any thread needs it.

    The first to need it notes what the caller had, and the last one restores that. If each thread restored what it
    found, the last one could restore the float32 that it found while another one was under way.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._before = torch.float32
        self.users = 0

    @contextmanager
    def float32(self) -> Iterator[None]:
        with self._lock:
            if not self.users:
                self._before = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            self.users += 1
        try:
            yield
        finally:
            with self._lock:
                self.users -= 1
                if not self.users:
                    torch.set_default_dtype(self._before)


_DTYPE = _DefaultDtype()
