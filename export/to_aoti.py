"""AOTInductor: a network or a tick as ``.pt2``, machine code for Python and C++ that needs no stepfusion."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

import torch
from torch.export import ExportedProgram

from stepfusion.engine import Engine
from stepfusion.errors import ExportError, first_line
from stepfusion.execution.cache import compiler_cache
from stepfusion.execution.compiled import CUDA_OPTIONS, known_options
from stepfusion.export.archive import check_archive, has_entries
from stepfusion.export.base import NetworkExport, Target, TickExport, TickOptions, export_either
from stepfusion.export.bundle import Bundle
from stepfusion.export.environment import check_runs_here, here, versions
from stepfusion.export.manifest import Tensorspec
from stepfusion.export.runtimes import Runtime, as_specified
from stepfusion.export.tick_program import initial_noise_specs

MODEL, INITIAL_NOISE = "model.pt2", "initial_noise.pt2"
_PROGRAMS = "data/aotinductor/"  # where a package has its machine code
_PROCESSOR = "cpu_capability"  # in ``versions``: the vector instructions that code for a CPU was made with

#: The noise is a chain of some hundred short integer operations with several uses each. Unless Inductor gives a name
#: to intermediate results early, it spells out every path through the chain, and compiles for minutes instead of
#: seconds; fusion takes the names out again.
_TICK_OPTIONS = {"realize_opcount_threshold": 8, "realize_reads_threshold": 1}

#: ``freezing``, which :mod:`stepfusion.execution.compiled` uses, gives wrong numbers in a package (PyTorch 2.13), and
#: threads are counted on the machine that the package runs on, not on the one it was made on.
_CPU_OPTIONS: dict[str, Any] = {"freezing": False, "cpp.dynamic_threads": True}


def export_aoti(engine: Engine, out: Path, **options: Unpack[TickOptions]) -> Bundle:
    """Write a bundle with the network, or a whole tick of a sampler, compiled for the engine's device.

    A network is ``model.pt2``. A tick is ``model.pt2`` (:class:`stepfusion.export.tick.Tick`) and
    ``initial_noise.pt2`` (:class:`stepfusion.export.tick.InitialNoise`).

    Args:
        engine: on a CPU or a CUDA device.
        out: the directory to write, which must not exist.
        options: :class:`stepfusion.export.base.TickOptions`.

    Raises:
        ExportError: ``out`` exists; there is no table for a tick; the network cannot be exported or compiled; or what
            was compiled does not compute what the engine does.
    """
    device = engine.plan.device
    if device.type not in ("cpu", "cuda"):
        raise ExportError(f"AOTInductor compiles for cpu and cuda, and the engine is on {device}")
    bound = {_PROCESSOR: torch.backends.cpu.get_cpu_capability()}
    if device.type == "cuda":
        bound = {"compute_capability": here("compute_capability", device)}
    target = Target("aoti", device.type, {**versions(), **bound})
    return export_either(engine, out, target, _build_network, _build_tick, **options)


def _build_network(export: NetworkExport, folder: Path) -> str:
    device = export.engine.plan.device
    with export.engine.plan.products():
        compile_program(export.program, folder / MODEL, device)
    return export.compared(load_package(folder / MODEL, device), "compiled network")


def _build_tick(export: TickExport, folder: Path) -> str:
    device = export.engine.plan.device
    with export.engine.plan.products():
        compile_program(export.program, folder / MODEL, device, _TICK_OPTIONS)
        compile_program(export.initial_noise, folder / INITIAL_NOISE, device, _TICK_OPTIONS)
    run, noise = load_package(folder / MODEL, device), load_package(folder / INITIAL_NOISE, device)
    return f"Run before the bundle was finished: {export.compare(run, noise, 'compiled')}"


def load_aoti(bundle: Bundle, device: str | torch.device) -> Runtime:
    """The network or tick of a bundle that :func:`stepfusion.export.bundle.read_bundle` verified.

    Returns:
        A function of the inputs that the manifest lists, in their order.

    Raises:
        ExportError: it was made for another device, GPU, processor, platform or version; the sentence names both.
    """
    return _load(bundle, MODEL, bundle.manifest.inputs, device)


def load_initial_noise(bundle: Bundle, device: str | torch.device) -> Runtime:
    """The function (seed, index) -> x_T of a tick's bundle; errors as those of :func:`load_aoti`."""
    lanes, *shape = bundle.manifest.inputs[0].shape
    return _load(bundle, INITIAL_NOISE, initial_noise_specs(list(map(int, shape)), lanes)[0], device)


def _load(bundle: Bundle, name: str, specs: tuple[Tensorspec, ...], device: str | torch.device) -> Runtime:
    manifest, where = bundle.manifest, torch.device(device)
    if manifest.format != "aoti" or name not in manifest.files:
        raise ExportError(f"{bundle.path} holds a {manifest.kind} as {manifest.format}, and no {name}")
    check_runs_here(manifest, device=where, dtype=manifest.dtype)
    made, found = manifest.versions.get(_PROCESSOR), torch.backends.cpu.get_cpu_capability()
    if where.type == "cpu" and made != found:
        raise ExportError(f"the aoti bundle was made for a processor with {made}, and here is one with {found}")
    run = load_package(bundle.path / name, where)
    return lambda *inputs: run(*as_specified(specs, inputs, where))


def load_package(path: Path, device: torch.device) -> Runtime:
    """A ``.pt2`` file as a function; it is machine code and runs with the rights of this process.

    Raises:
        ExportError: it is no archive that PyTorch wrote, or PyTorch cannot load it.
    """
    check_archive(path)
    if not has_entries(path, _PROGRAMS):  # PyTorch 2.11 would end the process
        raise ExportError(f"{path.name} cannot be loaded on {device}: it holds no compiled program")
    index = -1 if device.type == "cpu" else device.index or 0
    try:
        loaded: Runtime = torch._inductor.aoti_load_package(str(path), device_index=index)
    except RuntimeError as error:
        raise ExportError(f"{path.name} cannot be loaded on {device}: {first_line(error)}") from error
    return loaded


def compile_program(
    program: ExportedProgram, path: Path, device: torch.device, options: dict[str, Any] | None = None
) -> None:
    """Compile a program to a ``.pt2`` file.

    Raises:
        ExportError: Inductor, or the C++ compiler that it calls, cannot.
    """
    settings: dict[str, Any] = CUDA_OPTIONS if device.type == "cuda" else _CPU_OPTIONS
    try:
        with torch.no_grad(), compiler_cache("an export"), _quiet():
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs=known_options({**settings, **(options or {})})
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Inductor has a class for each stage, all private
        raise ExportError(f"AOTInductor cannot compile the {path.stem}: {first_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out Inductor's advice to change process-wide settings, and deprecations inside PyTorch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
