"""How many images fit on a device at a time, from its free memory and a trial."""

from __future__ import annotations

from collections.abc import Callable

import torch

from stepfusion.options import ExecutionOptions

_DEFAULT = {"cpu": 64}  # by device type
_DEFAULT_GPU = 256
_DEFAULT_INVARIANT = 16
_SHARE = 0.8  # of the free memory: fragmentation, and libraries that pick a larger workspace for a larger batch
#: Images of the second trial, the first of these that fits, after one of a single image. Memory is close to linear in
#: them, and the difference leaves out what is paid once.
_TRIALS = (4, 2)


def default_batch(options: ExecutionOptions, device: torch.device) -> int | None:
    """The most images at a time, as given or by default; None if free memory decides it (:func:`largest_batch`)."""
    if options.batch is not None:
        return options.batch
    if options.invariant:
        return _DEFAULT_INVARIANT
    if device.type == "cuda":
        return None
    return _DEFAULT.get(device.type, _DEFAULT_GPU)


def largest_batch(peak: Callable[[int], int], free: int, most: int = _DEFAULT_GPU) -> int:
    """The largest power of two, at most ``most``, of images that need at most a share of ``free`` bytes.

    Args:
        peak: peak bytes of a tick of so many images; it may raise torch.OutOfMemoryError.
    """
    one = _tried(peak, 1)
    if one is None:
        return 1
    for images in _TRIALS:
        if (several := _tried(peak, images)) is not None:
            each = max(1, (several - one) // (images - 1))
            fitting = int((_SHARE * free - max(0, one - each)) // each)
            return 1 << max(0, min(fitting, most).bit_length() - 1)
    return 1


def _tried(peak: Callable[[int], int], images: int) -> int | None:
    """The peak of so many images; None if they do not fit."""
    try:
        return peak(images)
    except torch.OutOfMemoryError:
        return None


def free_bytes(device: torch.device) -> int:
    """Bytes of a CUDA device that this process can still have: free there, or cached by PyTorch and unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Bytes of a CUDA device that ``run()`` needs at its peak, above what is allocated before it."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)
