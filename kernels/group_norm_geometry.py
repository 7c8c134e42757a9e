"""How the GroupNorm kernels cut one image into programs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

_CHANNELS = 32  # of a block, at least: 64 bytes of a pixel, whole sectors of DRAM
_FEWEST_CHANNELS = 16  # of a block that is narrowed to hold all pixels: one sector
_MOST_CHANNELS = 128  # of a block that is widened to whole vectors
_TILE = 16384  # elements that one program holds in registers
_IN_CACHE = 24 << 20  # bytes: with what is written, half of the least L2 that a GPU for bulk work has, and its margin
_SHARE = _IN_CACHE // 192  # bytes that a program reads twice: it fits for more programs than GPUs run at a time
_SECTOR = 32  # bytes of DRAM that are read and written together
MOST_OF_A_GROUP = 2**16  # channels of a group: a tile of one pixel holds it


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


class Geometry(NamedTuple):
    """How one image is cut into programs.

    Attributes:
        groups: of a block of channels; a power of two. width: its channels, padded to a power of two.
        chunk: U, neighbouring channels that have statistics of their own.
        pixels: of a tile; a power of two. tiles: of a program. splits: programs along the pixels.
        blocks: programs along the channels. num_warps: of a program.
    """

    groups: int
    width: int
    chunk: int
    pixels: int
    tiles: int
    splits: int
    blocks: int
    num_warps: int

    @property
    def padded_splits(self) -> int:
        """The splits whose statistics a program reads, padded to a power of two.

        At least an element a thread: fewer, and Triton has every thread read all of them.
        """
        return max(power_of_two(self.splits), 32 * self.num_warps * self.chunk // self.width)

    def constants(self, channels: int, groups: int, pixels: int) -> dict[str, int | bool]:
        """What both kernels take of it, by the names of their parameters."""
        return {
            "C": channels,
            "WIDE": self.groups * (channels // groups),
            "W": self.width,
            "U": self.chunk,
            "BLOCKS": self.blocks,
            "SPLITS": self.splits,
            "TILES": self.tiles,
            "EVEN": pixels == self.splits * self.tiles * self.pixels,
            "BLOCK": self.pixels * self.width,
            "num_warps": self.num_warps,
        }


def geometry(channels: int, groups: int, pixels: int, dtype: torch.dtype) -> Geometry:
    """Cut an image [H W, C]. It depends on nothing else, so that an image's bits depend on nothing else."""
    size, vector = channels // groups, 16 // dtype.itemsize
    together = max(power_of_two(-(-_CHANNELS // size)), 8 // math.gcd(size, 8))
    if together * size > _MOST_CHANNELS:
        together = power_of_two(-(-_CHANNELS // size))
    together = min(together, power_of_two(groups))
    narrow = together // 2
    if pixels > _rows(together * size) and _narrows(narrow * size, pixels, dtype.itemsize):
        together = narrow  # one launch, where it would have been two, or twice the programs of one
    width = power_of_two(together * size)
    rows = _rows(width)
    if pixels <= rows or pixels * together * size * dtype.itemsize <= _SHARE:  # one launch
        tile = min(power_of_two(pixels), rows)
        share = -(-pixels // tile) * tile
    else:
        # 2 sqrt(pixels): the statistics that a program reads, one of each split, stay a fraction of its pixels
        share = 2 << ((pixels.bit_length() - 1) // 2)
        tile = min(share, rows)
    warps = max(min(tile * width // 512, 4), tile * width // 1024, 1)
    return Geometry(
        groups=together,
        width=width,
        chunk=min(size & -size, vector),
        pixels=tile,
        tiles=share // tile,
        splits=-(-pixels // share),
        blocks=-(-groups // together),
        num_warps=min(warps, 16),
    )


def _narrows(channels: int, pixels: int, size: int) -> bool:
    """Whether a block of half as many channels is whole vectors and leaves one launch to do."""
    if channels < _FEWEST_CHANNELS or channels % 8:
        return False
    return pixels <= _rows(channels) or (channels * size % _SECTOR == 0 and pixels * channels * size <= _SHARE)


def _rows(channels: int) -> int:
    """Pixels of so many channels that one program can hold."""
    return max(_TILE // power_of_two(channels), 1)


def lanes_in_cache(lanes: int, size: int) -> int:
    """How many lanes of ``size`` bytes each a pair of launches takes, so that what is read twice stays in L2."""
    return max(1, min(lanes, _IN_CACHE // size))
