"""Noise to start from, which ``stepfusion encode --noise`` and others write, and the seeds of command lines."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stepfusion.engine import Engine
from stepfusion.files.regular import read_regular
from stepfusion.latents.tensor_file import read_tensors
from stepfusion.options import random_seed

_NAME = "noise"  # of the tensor in a safetensors file
_MOST_BYTES = 1 << 34


def add_seed_argument(add: Callable[..., object]) -> None:
    """Declare ``--seed``, a number or the word that asks for one that nobody chose."""
    text = (
        "take the noise of this seed, from 0 to 2**64 - 1; 'random' draws one and says it at the "
        "end (default: %(default)s)"
    )
    add("--seed", type=_seed, default=0, metavar="S", help=text)


def add_noise_argument(add: Callable[..., object]) -> None:
    """Declare ``--noise``, which :func:`read_noise` reads."""
    add(
        "--noise",
        type=Path,
        metavar="FILE",
        help='start from these states, float [N, C, H, W] in a .npy file or as "noise" in a .safetensors file, which '
        "stepfusion encode --noise writes (default: noise of the seed)",
    )


def read_noise(path: Path) -> Tensor:
    """The states of a file, float32 [n, ...] on the CPU.

    Raises:
        ValueError: it is missing, of another kind, damaged, or holds no floating-point tensor of images.
    """
    if path.suffix == ".safetensors":
        tensors = read_tensors(path).tensors
        if _NAME not in tensors:
            raise ValueError(f'--noise {path} must hold a tensor "noise", got {", ".join(sorted(tensors)) or "none"}')
        noise = tensors[_NAME]
    elif path.suffix == ".npy":
        noise = _read_array(path)
    else:
        raise ValueError(f"--noise must be a file that ends in .npy or .safetensors, got {path}")
    if not noise.is_floating_point() or noise.ndim < 2 or not len(noise):
        raise ValueError(f"--noise {path} must hold floats [N, C, H, W], got {noise.dtype} {list(noise.shape)}")
    return noise.to(torch.float32)


def check_noise(engine: Engine, path: Path, noise: Tensor, count: int) -> None:
    """ValueError unless the states are finite, of the shape that the engine samples, and ``count``."""
    if len(noise) != count:
        raise ValueError(f"--noise {path} must hold {count} states, as --num says, got {len(noise)}")
    if tuple(noise.shape[1:]) != tuple(engine.shape):
        wanted = ["N", *engine.shape]
        raise ValueError(f"--noise {path} must have shape [{', '.join(map(str, wanted))}], got {list(noise.shape)}")
    if not bool(noise.isfinite().all()):
        raise ValueError(f"--noise {path} must be finite, got NaN or infinite values")


def _read_array(path: Path) -> Tensor:
    try:
        array = np.load(io.BytesIO(read_regular(path, _MOST_BYTES, follow=True)), allow_pickle=False)
    except OSError as error:
        raise ValueError(f"--noise {path} cannot be read: {error.strerror}") from None
    except (ValueError, EOFError) as error:
        raise ValueError(f"--noise {path} is no sound .npy file: {str(error)[:200]}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise ValueError(f"--noise {path} must hold an array of numbers, got {getattr(array, 'dtype', type(array))}")
    return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))


def _seed(text: str) -> int:
    return random_seed() if text == "random" else int(text)


_seed.__name__ = "seed"  # as argparse names what it does not take
