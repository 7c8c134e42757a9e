"""The text of one compiled kernel, read into instructions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TypeAlias

from stepfusion.bench.ptx.types import TYPES, Fault

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"')
_LINE = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+).*$", re.MULTILINE)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{")
_THREADS = re.compile(r"\.(?:reqntid|maxntid)\s+(\d+)")
_PARAMETER = re.compile(r"\.param\s+\.(\w+)\b.*?([\w$]+)$", re.DOTALL)
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]")
_STATEMENT = re.compile(r"\s*(?:([{}])|([\w$]+)\s*:(?!:)|([^;]*);)", re.DOTALL)
_INSTRUCTION = re.compile(r"(?:@(!?)(\S+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?")
_COMMA = re.compile(r",\s*(?![^{\[]*[}\]])")
_MANY = re.compile(r"(.*)<(\d+)>")


@dataclass(frozen=True)
class Address:
    """``[base + offset]``: a register or a symbol, and a number of bytes."""

    base: str
    offset: int


Operand: TypeAlias = "str | Address | tuple[str, ...]"


def operand_names(args: Iterable[Operand]) -> Iterator[str]:
    """What operands name: registers, symbols and numbers."""
    for arg in args:
        yield from (arg.base,) if isinstance(arg, Address) else arg if isinstance(arg, tuple) else (arg,)


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        op: with its types and modifiers. args: operands as they stand. guard: the predicate's name, "" if there is
            none. negated: it runs where the predicate does not hold. where: file and line of the source.
        placeholder: a move of 0 into a register that a masked load may leave alone: in Triton a masked load without
            ``other`` is undefined there, and the 0 is what one compiler happens to put.
    """

    op: str
    args: tuple[Operand, ...]
    guard: str
    negated: bool
    where: str
    text: str
    placeholder: bool = False


@dataclass
class Program:
    """A kernel.

    Attributes:
        threads: of a block. parameters: (name, type) each. registers: name -> type. labels: name -> index in
            ``code``. shared: symbol -> offset.
    """

    name: str
    threads: int = 0
    parameters: list[tuple[str, str]] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    shared: dict[str, int] = field(default_factory=dict)


@lru_cache(maxsize=256)
def parse(text: str) -> Program:
    """Read the one kernel of a PTX module.

    Raises:
        Fault: there is no kernel, or something in it cannot be read.
    """
    files = {number: path.split("/")[-1] for number, path in _FILE.findall(text)}
    text = _LINE.sub(r".loc \1 \2;", _COMMENT.sub("", text))
    entry = _ENTRY.search(text)
    if entry is None:
        raise Fault("no kernel in this text")
    threads = _THREADS.search(entry[3])
    if threads is None or int(threads[1]) % 32:
        raise Fault(f"{entry[1]} does not say how many threads a block has, or the number is no multiple of 32")
    program = Program(entry[1], int(threads[1]), _parameters(entry[2]), shared=_symbols(text))
    _Reader(program, files).read(text, entry.end())
    program.code = _with_placeholders(program.code)
    return program


def _parameters(text: str) -> list[tuple[str, str]]:
    found = []
    for parameter in filter(None, map(str.strip, text.split(","))):
        match = _PARAMETER.match(parameter)
        if match is None or match[1] not in TYPES:
            raise Fault(f"cannot read the parameter {parameter!r}")
        found.append((match[2], match[1]))
    return found


def _symbols(text: str) -> dict[str, int]:
    """Symbol of shared memory -> offset, in the order of their declaration."""
    offsets, size = {}, 0
    for align, name, length in _SHARED.findall(text):
        size = -(-size // int(align)) * int(align)
        offsets[name] = size
        size += int(length or 0)
    return offsets


class _Reader:
    """Reads statements. A register or a label of an inner ``{ }`` gets a name that nothing else has."""

    def __init__(self, program: Program, files: dict[str, str]) -> None:
        self._program, self._files = program, files
        self._scopes: list[dict[str, str]] = [{}]
        self._labels: list[dict[str, str]] = [{}]  # of the same scopes
        self._branches: list[tuple[int, list[dict[str, str]]]] = []  # a label may stand behind its branch
        self._where = ""

    def read(self, text: str, position: int) -> None:
        """Read from ``position`` up to the brace that closes the kernel."""
        while self._scopes:
            match = _STATEMENT.match(text, position)
            if match is None:
                raise Fault(f"cannot read {text[position : position + 80]!r}")
            position = match.end()
            brace, label, statement = match[1], match[2], " ".join((match[3] or "").split())
            if brace:
                self._scopes = [*self._scopes, {}] if brace == "{" else self._scopes[:-1]
                self._labels = [*self._labels, {}] if brace == "{" else self._labels[:-1]
            elif label:
                self._label(label)
            elif statement:
                self._statement(statement)
        for index, scopes in self._branches:
            branch = self._program.code[index]
            target = next((s[str(branch.args[0])] for s in reversed(scopes) if branch.args[0] in s), branch.args[0])
            self._program.code[index] = replace(branch, args=(target,))

    def _label(self, name: str) -> None:
        if name in self._labels[-1]:
            raise Fault(f"the label {name} twice")
        unique = name if len(self._labels) == 1 else f"{name}'{len(self._program.labels)}"
        self._labels[-1][name] = unique
        self._program.labels[unique] = len(self._program.code)

    def _statement(self, statement: str) -> None:
        if statement.startswith(".reg"):
            _, kind, names = re.split(r"\s*\.reg\s+\.|\s+", statement, maxsplit=2)
            self._declare(kind, names)
        elif statement.startswith(".loc"):
            _, file, line = statement.split()
            self._where = f"{self._files.get(file, file)}:{line}"
        elif not statement.startswith((".pragma", ".shared")):
            self._instruction(statement)

    def _declare(self, kind: str, names: str) -> None:
        scope, registers = self._scopes[-1], self._program.registers
        for name in map(str.strip, names.split(",")):
            many = _MANY.fullmatch(name)
            for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                scope[one] = one if len(self._scopes) == 1 else f"{one}'{len(registers)}"
                registers[scope[one]] = kind

    def _instruction(self, statement: str) -> None:
        match = _INSTRUCTION.fullmatch(statement)
        if match is None:
            raise Fault(f"cannot read {statement!r}")
        args = tuple(self._operand(part) for part in _COMMA.split(match[4])) if match[4] else ()
        guard = self._name(match[2]) if match[2] else ""
        if match[3] in ("bra", "bra.uni") and len(args) == 1:
            self._branches.append((len(self._program.code), self._labels))
        op = match[3].replace(".shared::cta", ".shared")  # two spellings of the block's own shared memory
        self._program.code.append(Instruction(op, args, guard, match[1] == "!", self._where, statement))

    def _operand(self, text: str) -> Operand:
        text = text.strip()
        if text.startswith("{"):
            return tuple(self._name(part) for part in text[1:-1].split(","))
        if text.startswith("["):
            base, _, offset = re.sub(r"\s", "", text[1:-1]).partition("+")
            return Address(self._name(base), int(offset or "0", 0))
        if "|" in text:  # two results
            return tuple(self._name(part) for part in text.split("|"))
        return self._name(text)

    def _name(self, text: str) -> str:
        text = text.strip()
        bare = text.removeprefix("!")
        declared = next((scope[bare] for scope in reversed(self._scopes) if bare in scope), bare)
        return text[: len(text) - len(bare)] + declared


def _with_placeholders(code: list[Instruction]) -> list[Instruction]:
    """Mark what Triton puts before a masked load without ``other``: ``mov.u32 %r, 0x0`` for each register of it."""
    marked, waiting = list(code), dict[str, int]()
    for index, instruction in enumerate(code):
        if instruction.op.startswith("mov.") and instruction.args[1:] == ("0x0",):
            waiting[str(instruction.args[0])] = index
            continue
        if instruction.guard and instruction.op.startswith("ld.global"):
            loaded = instruction.args[0]
            for name in loaded if isinstance(loaded, tuple) else (loaded,):
                if name in waiting:
                    marked[waiting[str(name)]] = replace(code[waiting[str(name)]], placeholder=True)
        waiting.clear()
    return marked
