"""The architecture stays visible: floors, private names, sizes, and the journeys of docs/architecture.md."""

from __future__ import annotations

import ast
import importlib
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import stepfusion as sf
from stepfusion.commands.main import main
from stepfusion_testing.tiny_model import save_tiny_model

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
#: The rooms from the top floor down: a module imports from its own room and from lower floors, never from a peer.
FLOORS = (
    ("commands",),
    ("bench",),
    ("export",),
    ("warming",),
    ("bulk", "serving", "training"),
    ("saved_images",),
    ("engine",),
    ("diffusion",),
    ("lanes",),
    ("execution", "checkpoints"),
    ("model_spec", "latents"),
    ("networks", "samplers"),
    ("options", "files"),
    ("errors", "_checks"),
    ("__init__",),  # imported as a whole, for its version alone
    ("kernels",),
)
FLOOR_OF = {room: -floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TOP = ("__init__", "__main__", "_public")  # the package itself gathers the public names of all rooms
NOT_OURS = {
    "_forward_hooks",
    "_forward_pre_hooks",
    "_schema",
    "_replace",
    "_asdict",
    "_actions",
}  # of PyTorch, named tuples, argparse
MOST_LINES, MEDIAN_FUNCTION, MOST_METHODS = 400, 10, 19
MOST_FILES = 14  # of this package that a sample on a CPU passes


def sources() -> dict[str, Path]:
    """Every module of the package by its name without "stepfusion."."""
    found = {}
    for folder in ("engine", "kernels", "export", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[1:] if folder == "engine" else parts)
            found[name.removesuffix(".__init__") if name != "__init__" else name] = path
    return found


def imports(source: str) -> Iterator[str]:
    """The rooms that a module imports from, wherever the statement stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.level == 0 else ["stepfusion.?"]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == "stepfusion":
                yield rest.split(".")[0] or "__init__"
            elif first in ("engine", "kernels", "export", "bench"):
                yield f"folder {first} as a library"


def upward(room: str, source: str) -> list[str]:
    """The rooms that a module of ``room`` may not import from, and does."""
    return sorted({r for r in imports(source) if r != room and FLOOR_OF.get(r, 1) >= FLOOR_OF[room]})


def test_every_import_goes_down() -> None:
    faults = {}
    for name, path in sources().items():
        room = name.split(".")[0]
        if room not in TOP and (found := upward(room, path.read_text(encoding="utf-8"))):
            faults[name] = found
    assert faults == {}


@pytest.mark.parametrize(
    ("room", "source", "faulty"),
    [
        ("kernels", "import torch\nfrom stepfusion.kernels import step", []),
        ("kernels", "def f():\n    import stepfusion", ["__init__"]),
        ("kernels", "from stepfusion.errors import ExportError", ["errors"]),
        ("kernels", "from kernels import step", ["folder kernels as a library"]),
        ("lanes", "from stepfusion.execution.plan import Plan", []),
        ("execution", "from stepfusion.lanes.runner import Runner", ["lanes"]),
        ("bulk", "from stepfusion.serving import AsyncEngine", ["serving"]),
        ("export", "from stepfusion.bench import peers", ["bench"]),
        ("samplers", "from ..networks import UNet2D", ["?"]),
        ("bench", "from stepfusion import Engine", ["Engine"]),
    ],
)
def test_an_import_that_goes_up_is_noticed(room: str, source: str, faulty: list[str]) -> None:
    assert upward(room, source) == faulty


def string_imports(source: str) -> list[str]:
    """The modules of this package that a module names in a string, if it imports something by a string."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {getattr(node, "attr", getattr(node, "id", "")) for node in nodes}
    if not names & {"import_module", "__import__"}:
        return []
    texts = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return [
        text for text in texts if text.startswith("stepfusion.") and text.removeprefix("stepfusion.") in sources()
    ]


def test_only_an_engine_for_what_was_exported_imports_by_a_string() -> None:
    found = {name: calls for name, path in sources().items() if (calls := string_imports(path.read_text()))}
    assert found == {"engine": ["stepfusion.export.load"]}


def private_reads(source: str) -> list[str]:
    """Underscore names that are read of something other than ``self``, ``cls``, or a class of this module.

    Names of other libraries are known by what they hang on: torch, triton and so on, by the modules' import names.
    """
    tree = ast.parse(source)
    foreign = {"torch", "triton", "tl", "np", "ov", "importlib", "os", "sys"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            foreign |= {(a.asname or a.name).split(".")[0] for a in node.names if not a.name.startswith("stepfusion")}
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("stepfusion"):
            foreign |= {a.asname or a.name for a in node.names}
    own = {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)} | {
        "self",
        "cls",
    }
    defined = {
        t.attr
        for n in ast.walk(tree)
        if isinstance(n, ast.Assign | ast.AnnAssign | ast.AugAssign)
        for target in (n.targets if isinstance(n, ast.Assign) else [n.target])
        for t in ast.walk(target)
        if isinstance(t, ast.Attribute)
    }
    fields = {  # of dataclasses
        n.target.id for n in ast.walk(tree) if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    }
    defined |= own | fields
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not re.fullmatch(r"_[A-Za-z]\w*", node.attr):
            continue
        base: Any = node.value
        while isinstance(base, ast.Attribute | ast.Call | ast.Subscript):
            base = base.func if isinstance(base, ast.Call) else base.value
        if getattr(base, "id", None) in foreign or node.attr in defined | NOT_OURS:
            continue
        found.append(f"{node.lineno}: {ast.unparse(node)}")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stepfusion."):
            found += [f"{node.lineno}: from {node.module} import {a.name}" for a in node.names if a.name[0] == "_"]
    return found


def test_nobody_reads_the_underscore_names_of_another_module() -> None:
    found = {name: reads for name, path in sources().items() if (reads := private_reads(path.read_text()))}
    assert found == {}


@pytest.mark.parametrize(
    ("source", "faults"),
    [
        ("class A:\n    def f(self, other):\n        self._x = 1\n        return other._x", 0),
        ("def f(engine):\n    return engine._evaluator", 1),
        ("def f(service):\n    return service.worker()._thread.name", 1),
        ("from stepfusion.kernels import philox\nx = philox._ROUNDS", 1),
        ("import torch\nok = torch.cpu._is_avx512_bf16_supported()", 0),
        ("from stepfusion.engine import _image_shape", 1),
    ],
)
def test_a_private_read_is_noticed(source: str, faults: int) -> None:
    assert len(private_reads(source)) == faults


def test_files_and_functions_are_small() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in sources().items()}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}
    functions = [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for path in sources().values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]
    assert statistics.median(functions) < MEDIAN_FUNCTION


@pytest.mark.parametrize("kind", [sf.Engine, sf.GaussianDiffusion])
def test_a_facade_has_few_methods_of_its_own(kind: type) -> None:
    assert sum(callable(value) or isinstance(value, property) for value in vars(kind).values()) <= MOST_METHODS


# The journeys


def journeys() -> list[list[str]]:
    """The functions of each journey on the page, as ``module.function`` or ``module.Class.method``."""
    section = PAGE.partition("## Journeys")[2].partition("\n## ")[0]
    parts = section.split("\n### ")[1:]
    return [re.findall(r"^\d+\. `([\w.]+)`", part, re.MULTILINE) for part in parts]


def named(name: str) -> Any:
    """The object that a journey names."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(["stepfusion", *parts[:cut]]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[cut:]:
            value = getattr(value, attribute)
        return value
    raise AssertionError(f"{name} is not there")


def test_the_page_has_five_journeys_whose_functions_exist() -> None:
    assert len(journeys()) == 5
    for journey in journeys():
        assert len(journey) >= 5
        for name in journey:
            assert callable(named(name)), name


def trace(call: Callable[[], object]) -> list[tuple[str, str]]:
    """File and qualified name of every function of this package that a call enters, in order."""
    entered: list[tuple[str, str]] = []
    ours = {str(path) for path in sources().values()}

    def note(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename in ours:
            entered.append((str(Path(code.co_filename).relative_to(ROOT)), code.co_qualname))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


def in_order(journey: list[str], entered: list[tuple[str, str]]) -> str | None:
    """The first function of a journey that was not entered after the one before it; None if all were."""
    place = 0
    for name in journey:
        function = named(name)
        function = getattr(function, "__wrapped__", function)
        wanted = function.__code__ if hasattr(function, "__code__") else function.__init__.__code__
        target = (str(Path(wanted.co_filename).relative_to(ROOT)), wanted.co_qualname)
        if target not in entered[place:]:
            return name
        place = entered.index(target, place) + 1
    return None


def test_sampling_passes_the_first_journey_in_order_and_few_files() -> None:
    schedule = sf.NoiseSchedule.linear(100)
    engine = sf.Engine(lambda x, t: 0.5 * x, schedule, shape=(1, 4, 4), device="cpu", backend="reference")
    table = engine.table(steps=3)
    entered = trace(lambda: engine.sample(2, table, progress=False))
    assert in_order(journeys()[0], entered) is None
    files = {file for file, _ in entered}
    assert len(files) <= MOST_FILES, sorted(files)
    assert in_order(journeys()[0][::-1], entered) is not None, "the control: the journey backwards"


def test_a_unit_of_a_bulk_job_passes_the_third_journey_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "model")
    command = "generate model --num 2 --unit 2 --steps 2 --devices cpu --format png --out images --quiet"
    entered = trace(lambda: main(command.split()))
    assert in_order(journeys()[2], entered) is None
    assert in_order(journeys()[2][::-1], entered) is not None, "the control: the journey backwards"
