"""Registers of many threads: their values, and for every bit whether somebody wrote it.

Triton computes with the elements that a mask leaves out: their registers hold what nobody wrote, and nothing may come
of it. So every register has a second array, its *holes*: the bits that depend on what nobody wrote. They travel with
the values (:mod:`stepfusion.bench.ptx.holes`); an address, a predicate or a value stored to global memory must have
none. A register that is whole in every thread has no entry, which makes the usual case free.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepfusion.bench.ptx.arithmetic import from_bfloat16, to_bfloat16
from stepfusion.bench.ptx.types import FLOATS, TYPES, Array, Fault, Lanes, bits, ones

_HEXADECIMAL_FLOAT = re.compile(r"0[fFdD]([0-9a-fA-F]{8,16})")
_INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?")


@dataclass(frozen=True)
class Source:
    """An operand that is read.

    Attributes:
        read: the values of some lanes, in the dtype that computes: bfloat16 as float32, f32x2 as float32 [lanes, 2].
            A constant has no lanes.
        holes: bits of those values that depend on what nobody wrote, as unsigned integers; None: there are none.
    """

    read: Callable[[Lanes], Array]
    holes: Callable[[Lanes], Array | None] = lambda lanes: None


@dataclass(frozen=True)
class Target:
    """A register that is written: ``write(lanes, values, holes)``."""

    write: Callable[[Lanes, Array, Array | None], None]


class Registers:
    """The registers of ``threads`` threads.

    Args:
        declared: name -> type. special: the read-only registers, uint32: one value a thread, or one for all. symbols:
            name -> address in shared memory.
    """

    def __init__(
        self, declared: Mapping[str, str], special: Mapping[str, Array], symbols: Mapping[str, int], threads: int
    ) -> None:
        self._special, self._symbols = special, symbols
        self._values: dict[str, Array] = {}
        self._holes: dict[str, Array] = {}
        for name, kind in declared.items():
            storage = TYPES[bits(kind)]
            self._values[name] = np.full(threads, ones(storage), storage)
            self._holes[name] = np.full(threads, ones(storage), storage)

    def width(self, name: str) -> str:
        """The type of a register that holds an address; b32 for a symbol."""
        return f"b{8 * self._values[name].itemsize}" if name in self._values else "b32"

    def punch(self, name: str, lanes: Lanes) -> None:
        """Forget what the register holds in some lanes: nobody wrote it."""
        register = self._values[name]
        marks = self._holes.setdefault(name, np.zeros_like(register))
        marks[slice(None) if lanes is None else lanes] = ones(register.dtype)

    def source(self, token: object, kind: str) -> Source:
        """The operand ``token``, read as ``kind``.

        Raises:
            Fault: it is not there, or it is no such type.
        """
        if not isinstance(token, str):
            raise Fault(f"operand {token!r} read as {kind}")
        if token.startswith("!"):
            inner = self.source(token[1:], kind)
            return Source(lambda lanes: ~inner.read(lanes), inner.holes)
        if token in self._values:
            return self._register(token, kind)
        if token in self._special:
            return _special(self._special[token], kind)
        constant = _widen(self._constant(token, kind), kind)
        return Source(lambda lanes: constant)

    def _register(self, name: str, kind: str) -> Source:
        view = _view(self._values[name], name, kind)

        def read(lanes: Lanes) -> Array:
            return _widen(view if lanes is None else view[lanes], kind)

        def holes(lanes: Lanes) -> Array | None:
            found = self._holes.get(name)
            if found is None:
                return None
            part = _view(found, name, _holes_kind(kind))
            part = part if lanes is None else part[lanes]
            return part if part.any() else None

        return Source(read, holes)

    def _constant(self, token: str, kind: str) -> Array:
        dtype = TYPES[kind]
        if token in self._symbols:
            number = self._symbols[token]
        elif match := _HEXADECIMAL_FLOAT.fullmatch(token):
            number = int(match[1], 16)
            if len(match[1]) != 2 * dtype.itemsize:
                raise Fault(f"operand {token!r} read as {kind}")
        elif _INTEGER.fullmatch(token) and (kind not in FLOATS or kind == "bf16"):
            number = int(token.rstrip("U"), 0)
        else:
            raise Fault(f"operand {token!r} read as {kind}")
        if kind == "pred":
            return np.array([number != 0])
        return np.array([number & (256**dtype.itemsize - 1)], f"u{dtype.itemsize}").view(dtype)

    def target(self, token: object, kind: str) -> Target:
        """The register ``token``, written as ``kind``; narrower than the register, it is extended.

        Raises:
            Fault: there is no such register, or it cannot hold the type.
        """
        if token == "_":
            return Target(lambda lanes, values, holes: None)
        if not isinstance(token, str) or token not in self._values:
            raise Fault(f"{token} is no register that can be written")
        register = self._values[token]
        dtype, raw = _computing(kind), TYPES[bits(kind)]
        if (register.dtype.kind == "b") != (raw.kind == "b") or register.itemsize < raw.itemsize:
            raise Fault(f"{token} written as {kind}")
        if register.itemsize > raw.itemsize and kind in FLOATS:
            raise Fault(f"{token} is too wide for {kind}")

        def write(lanes: Lanes, values: Array, holes: Array | None) -> None:
            values = np.asarray(values)
            if values.dtype != dtype:
                raise Fault(f"a value of {values.dtype} for {kind}")
            register[slice(None) if lanes is None else lanes] = _extended(_narrow(values, kind), register.dtype)
            if holes is not None or token in self._holes:
                self._note(token, lanes, holes, values.dtype)

        return Target(write)

    def _note(self, name: str, lanes: Lanes, holes: Array | None, dtype: np.dtype[Any]) -> None:
        register = self._values[name]
        if holes is None and lanes is None:
            del self._holes[name]
            return
        marks = self._holes.setdefault(name, np.zeros_like(register))
        if holes is None:
            marks[lanes] = 0
        else:
            signed = holes.view(dtype) if dtype.kind == "i" else holes
            marks[slice(None) if lanes is None else lanes] = _extended(_joined(signed), register.dtype)
        if not marks.any():
            del self._holes[name]


def _special(values: Array, kind: str) -> Source:
    """A read-only register of 32 bits, of which 16 may be read."""
    dtype = TYPES[kind]
    if dtype.kind not in "iu" or dtype.itemsize > 4:
        raise Fault(f"a special register read as {kind}")
    read = np.atleast_1d(values).astype(f"u{dtype.itemsize}").view(dtype)
    return Source(lambda lanes: read if lanes is None or len(read) == 1 else read[lanes])


def _computing(kind: str) -> np.dtype[Any]:
    """The dtype in which values of a type are computed with."""
    return np.dtype("f4") if kind in ("bf16", "f32x2") else TYPES[kind]


def _holes_kind(kind: str) -> str:
    return "b32x2" if kind == "f32x2" else bits(kind)


def _view(register: Array, name: str, kind: str) -> Array:
    """A register's lowest bits as ``kind``: [threads], or [threads, 2] for two in one."""
    if kind in ("f32x2", "b32x2"):
        if register.itemsize != 8:
            raise Fault(f"{name} read as f32x2")
        return register.view("f4" if kind == "f32x2" else "u4").reshape(-1, 2)
    dtype = TYPES[kind]
    if (register.dtype.kind == "b") != (dtype.kind == "b") or register.itemsize < dtype.itemsize:
        raise Fault(f"{name} read as {kind}")
    return register.view(dtype)[:: register.itemsize // dtype.itemsize]


def _widen(values: Array, kind: str) -> Array:
    """Bits as they stand in a register, in the dtype that computes."""
    if kind == "bf16":
        return from_bfloat16(values)
    return values.view("f4").reshape(-1, 2) if kind == "f32x2" and values.dtype == np.uint64 else values


def _narrow(values: Array, kind: str) -> Array:
    """The inverse of :func:`_widen`, as unsigned bits, or as a signed integer that is still to be extended."""
    if kind == "bf16":
        return to_bfloat16(values)
    if kind == "f32x2":
        return _joined(np.ascontiguousarray(values).view("u4"))
    return values if values.dtype.kind in "biu" else np.ascontiguousarray(values).view(f"u{values.itemsize}")


def _joined(halves: Array) -> Array:
    """[n, 2] words of 32 bits as [n] of 64, the first the lower; other shapes as they are."""
    return np.ascontiguousarray(halves).view("u8")[:, 0] if halves.ndim == 2 else halves


def _extended(values: Array, storage: np.dtype[Any]) -> Array:
    """As wide as the register: by the sign, or by zeros."""
    if values.dtype == storage:
        return values
    if values.itemsize == storage.itemsize:
        return values.view(storage)
    return values.astype(f"{values.dtype.kind}{storage.itemsize}").view(storage)
