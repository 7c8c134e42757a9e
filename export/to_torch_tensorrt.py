"""torch-tensorrt: the network compiled ahead of time for the GPU at hand, kept as an exported program.

For torch-tensorrt 2.11 to 2.14. Networks are strongly typed in all of them; if that is an option, it is set.
Built engines and measured timings are kept in stepfusion's cache directory, for the next export.
"""

from __future__ import annotations

import inspect
import re
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.export import ExportedProgram

from stepfusion.engine import Engine
from stepfusion.errors import ExportError, first_line
from stepfusion.execution.cache import make_cache_directory
from stepfusion.execution.streams import Turns
from stepfusion.export.archive import check_archive
from stepfusion.export.base import ExportOptions, NetworkExport, Target, export_network
from stepfusion.export.batch import Batch
from stepfusion.export.bundle import Bundle
from stepfusion.export.environment import here, require, versions
from stepfusion.export.manifest import Manifest
from stepfusion.export.program import example_inputs
from stepfusion.export.runtimes import as_specified

MODEL = "model.ep"
_ENGINE_CACHE_BYTES = 8 << 30
_COVERAGE = re.compile(r"consists of (\d+) Total Operators, of which (\d+) operators are supported")
_UNSUPPORTED = re.compile(r"listed with their op-count in the graph:\n(.+?)\n\n", re.DOTALL)


@dataclass(frozen=True)
class Coverage:
    """What torch-tensorrt's partitioner makes of a network: operators in all and those with a converter, the number
    of TensorRT engines, and the operators without a converter.
    """

    operators: int
    supported: int
    engines: int
    unsupported: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """True if the whole network becomes one engine."""
        return self.supported == self.operators and self.engines == 1

    def __str__(self) -> str:
        share = 100 * self.supported / max(1, self.operators)
        text = f"{self.supported} of {self.operators} operators ({share:.1f} %) in {self.engines} engine(s)"
        return f"{text}; without a converter: {', '.join(self.unsupported)}" if self.unsupported else text


def export_torch_tensorrt(engine: Engine, out: Path, **options: Unpack[ExportOptions]) -> Bundle:
    """Write a bundle with the network as ``model.ep``, for the GPU that the engine is on.

    Args:
        out: the directory to write, which must not exist.
        options: :class:`stepfusion.export.base.ExportOptions`.

    Raises:
        ExportError: the package or the GPU is missing, ``out`` exists, an operator has no converter (it is named), or
            what was built does not compute what the network does.
    """
    require(("torch_tensorrt",), "torch-tensorrt")
    device = engine.plan.device
    if device.type != "cuda":
        raise ExportError(f"torch-tensorrt builds for the GPU that the engine is on, and this one is on {device}")
    made_with = {**versions("torch-tensorrt"), "compute_capability": here("compute_capability", device)}
    return export_network(engine, out, Target("torch-tensorrt", "cuda", made_with), _build, **options)


def _build(export: NetworkExport, folder: Path) -> str:
    trt = import_module("torch_tensorrt")
    engine, batch, program = export.engine, export.batch, export.program
    device = engine.plan.device
    coverage = dry_run(program, engine, batch)
    if not coverage.complete:
        raise ExportError(f"torch-tensorrt cannot build the whole network: {coverage}")
    try:
        module = trt.dynamo.compile(_convertible(program), _inputs(trt, engine, batch), **_settings(trt, device))
    except Exception as error:  # torch-tensorrt has no error class of its own
        raise ExportError(f"torch-tensorrt cannot build the network: {first_line(error)}") from error
    trt.save(module, str(folder / MODEL), output_format="exported_program", retrace=False)
    run = TorchTensorRTNetwork(folder / MODEL, export.manifest, device)
    compared = export.compared(run, "torch-tensorrt module", (batch.low, batch.best))
    return f"Partitioned by torch-tensorrt: {coverage}. {compared}"


def dry_run(program: ExportedProgram, engine: Engine, batch: Batch) -> Coverage:
    """Partition a program as the compiler would, and build nothing.

    Raises:
        ExportError: the package is missing, or the partitioner fails.
    """
    require(("torch_tensorrt",), "torch-tensorrt")
    trt = import_module("torch_tensorrt")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.txt")
        settings = {**_settings(trt, engine.plan.device), "dryrun": str(report)}
        try:
            with redirect_stdout(StringIO()):  # it prints the report, too
                trt.dynamo.compile(_convertible(program), _inputs(trt, engine, batch), **settings)
        except Exception as error:  # as above
            raise ExportError(f"torch-tensorrt cannot partition the network: {first_line(error)}") from error
        return read_coverage(report.read_text())


def read_coverage(report: str) -> Coverage:
    """What a report of torch-tensorrt's dry run says.

    Raises:
        ExportError: it is not one.
    """
    counts = _COVERAGE.search(report)
    if counts is None:
        raise ExportError("torch-tensorrt's dry run wrote a report without the number of operators")
    found = _UNSUPPORTED.search(report)
    unsupported = tuple(line.strip() for line in found[1].splitlines()) if found else ()
    return Coverage(int(counts[1]), int(counts[2]), len(re.findall(r"TRT Engine #\d+", report)), unsupported)


class TorchTensorRTNetwork:
    """A compiled module on CUDA.

    Args:
        cudagraphs: let torch-tensorrt replay its engine as a CUDA graph of its own. An engine with
            ``network="graph"`` captures the whole tick instead, and needs none.
    """

    def __init__(self, path: Path, manifest: Manifest, device: torch.device, *, cudagraphs: bool = False) -> None:
        check_archive(path)
        self._trt = import_module("torch_tensorrt")
        self._manifest, self._device, self._cudagraphs = manifest, device, cudagraphs
        self.turns = Turns(device)  #: the engines inside have one memory on all streams
        with torch.cuda.device(device):
            loaded = self._trt.load(str(path))
            self._module = loaded.module() if isinstance(loaded, ExportedProgram) else loaded

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run it."""
        values = as_specified(self._manifest.inputs, inputs, self._device)
        if not self._cudagraphs:
            with self.turns.take():
                out: Tensor = self._module(*values)
            return out
        with self.turns.take(), self._trt.runtime.enable_cudagraphs(self._module) as replayed:
            replay: Tensor = replayed(*values)
            return replay.clone()


def load_torch_tensorrt(bundle: Bundle, device: torch.device, *, cudagraphs: bool = False) -> TorchTensorRTNetwork:
    """The network of a verified bundle."""
    require(("torch_tensorrt",), "torch-tensorrt")
    return TorchTensorRTNetwork(bundle.path / MODEL, bundle.manifest, device, cudagraphs=cudagraphs)


def _convertible(program: ExportedProgram) -> ExportedProgram:
    """The program with the operator of large attention heads, which has no converter, in terms of others."""
    decomposed: ExportedProgram = program.run_decompositions(get_decompositions([torch.ops.aten.baddbmm]))
    return decomposed


def _inputs(trt: Any, engine: Engine, batch: Batch) -> list[Any]:
    """The inputs' shapes and dtypes in torch-tensorrt's own words."""
    inputs = []
    for example in example_inputs(engine, batch.best):
        sizes = tuple(example.shape[1:])
        low, best, high = ((size, *sizes) for size in (batch.low, batch.best, batch.high))
        shape = {"min_shape": low, "opt_shape": best, "max_shape": high} if batch.dynamic else {"shape": best}
        inputs.append(trt.Input(dtype=example.dtype, **shape))
    return inputs


def _settings(trt: Any, device: torch.device) -> dict[str, Any]:
    """The compiler's settings, of those that this version knows: it swallows unknown ones in silence."""
    wanted: dict[str, Any] = {
        "min_block_size": 1,
        "require_full_compilation": False,  # the dry run before it has named what is not covered
        "use_explicit_typing": True,
        "truncate_double": False,
        "disable_tf32": True,  # float32 is float32
        "pass_through_build_failures": True,
    }
    if device.type == "cuda":
        wanted["device"] = device
    folder = make_cache_directory("torch-tensorrt")
    if folder is not None:
        wanted |= {
            "timing_cache_path": str(folder / "timing.bin"),
            "cache_built_engines": True,
            "reuse_cached_engines": True,
            "engine_cache_dir": str(folder / "engines"),
            "engine_cache_size": _ENGINE_CACHE_BYTES,
            "immutable_weights": False,  # only engines that can be refitted are cached
        }
    known = inspect.signature(trt.dynamo.compile).parameters
    return {name: value for name, value in wanted.items() if name in known}
