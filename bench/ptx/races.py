"""Conflicting accesses of one launch with nothing between that orders them.

Two accesses to one byte by two threads conflict if one is a write. A bar.sync orders the threads of a block, a
bar.warp.sync those of a warp, a shuffle and the end of a block nothing. Writes of one value by several threads are
left out, with what these threads read of it: Triton's layouts repeat elements.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from stepfusion.bench.ptx.threads import WARP, Access
from stepfusion.bench.ptx.types import Array


class Race(NamedTuple):
    """Lines of the source whose accesses conflict, and in which memory."""

    space: str
    lines: tuple[str, ...]


class _Table(NamedTuple):
    """One row for every byte, or for every unit of some bytes, of every access."""

    byte: Array
    block: Array
    barriers: Array
    warp: Array
    fences: Array
    lane: Array
    write: Array
    value: Array
    access: Array  # index in the log


def races(log: Sequence[Access], ignored: Iterable[tuple[int, int]] = ()) -> Counter[Race]:
    """How many bytes each race touches.

    ``ignored``: (address, bytes) of global memory in which conflicts are meant.
    """
    found = Counter[Race]()
    for space in ("shared", "global"):
        entries = [access for access in log if access.space == space]
        if not entries:
            continue
        left_out = list(ignored) if space == "global" else []
        unit = _unit(entries)
        if unit > 1 and not left_out and not _conflicts(_rows(entries, unit), across_blocks=space == "global"):
            continue  # what is fine for the units is so for their bytes, which are far more
        table = _rows(entries)
        for start, size in left_out:
            table = _chosen(table, (table.byte < start) | (table.byte >= start + size))
        for rows in _conflicts(table, across_blocks=space == "global"):
            lines = {f"{'write' if table.write[r] else 'read'} {entries[table.access[r]].where}" for r in rows}
            found[Race(space, tuple(sorted(lines)))] += 1
    return found


def _unit(entries: Sequence[Access]) -> int:
    """How many bytes, 8 at most, every access has all or none of: a power of 2."""
    found = 8
    for access in entries:
        found = math.gcd(found, access.content.shape[1], int(np.bitwise_or.reduce(access.addresses, initial=0)))
    return found


def _rows(entries: Sequence[Access], unit: int = 1) -> _Table:
    tables = []
    for number, access in enumerate(entries):
        width = access.content.shape[1] // unit

        def each(values: Array | int, access: Access = access, width: int = width) -> Array:
            return np.repeat(np.broadcast_to(np.asarray(values, np.int64), access.lanes.shape), width)

        byte = (access.addresses.astype(np.int64)[:, None] // unit + np.arange(width)).reshape(-1)
        values = np.ascontiguousarray(access.content).view(f"i{unit}").reshape(-1)
        warp, fences, lane = each(access.lanes // WARP), each(access.fences), each(access.lanes % WARP)
        order = (each(access.blocks), each(access.barriers), warp, fences, lane)
        tables.append(_Table(byte, *order, each(access.write), values, each(number)))
    return _Table(*map(np.concatenate, zip(*tables, strict=True)))


def _chosen(table: _Table, rows: Array) -> _Table:
    return _Table(*(column[rows] for column in table))


def _conflicts(table: _Table, *, across_blocks: bool) -> list[Array]:
    """The rows of every group of accesses to one byte that nothing orders."""
    columns = (table.byte, table.block, table.barriers, table.warp, table.fences)
    order = np.lexsort(columns[::-1])
    if not len(order):
        return []
    keys = np.stack([column[order] for column in columns])
    # between two barriers: accesses by several warps; within a warp: by several lanes between two fences
    levels = [(3, table.warp), (5, table.lane)]
    if across_blocks:
        levels.append((1, table.block))
    found = []
    for depth, threads in levels:
        edges = np.flatnonzero((np.diff(keys[:depth], axis=1) != 0).any(axis=0)) + 1
        starts = np.concatenate(([0], edges))
        write = table.write[order]
        bad = _differ(threads[order], starts) & (np.maximum.reduceat(write, starts) == 1)
        bad &= _differ(table.value[order], starts) | (np.minimum.reduceat(write, starts) == 0)
        ends = np.concatenate((edges, [len(order)]))
        groups = [order[starts[group] : ends[group]] for group in np.flatnonzero(bad)]
        found += [rows for rows in groups if not _repeated(_chosen(table, rows))]
    return found


def _repeated(group: _Table) -> bool:
    """Every access is of one value, by threads that all write it."""
    threads = np.stack((group.block, group.warp, group.lane))
    writers = {tuple(thread) for thread in threads[:, group.write == 1].T}
    return bool((group.value == group.value[0]).all()) and all(tuple(thread) in writers for thread in threads.T)


def _differ(values: Array, starts: Array) -> Array:
    """Whether a group has more than one value, for groups that begin at ``starts``."""
    return np.asarray(np.minimum.reduceat(values, starts) != np.maximum.reduceat(values, starts))
