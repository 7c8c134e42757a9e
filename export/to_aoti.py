"""AOTInductor: a network or a tick as ``.pt2``, machine code for Python and C++ that needs no stepfusion."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from stepfusion.engine import Engine
from stepfusion.errors import ExportError, first_line
from stepfusion.execution.cache import compiler_cache
from stepfusion.execution.compiled import CUDA_OPTIONS
from stepfusion.export.bundle import (
    Bundle,
    Manifest,
    Tensorspec,
    check_out,
    check_runs_here,
    here,
    versions,
    write_bundle,
)
from stepfusion.export.facts import model_facts
from stepfusion.export.program import (
    DYNAMIC,
    Batch,
    check_close,
    example_inputs,
    export_program,
    input_specs,
    name_of,
    output_specs,
    plain_network,
)
from stepfusion.export.runtimes import Runtime, as_specified
from stepfusion.export.tick import (
    check_kind,
    compare_tick,
    initial_noise_program,
    initial_noise_specs,
    tick_program,
    tick_specs,
)
from stepfusion.samplers.table import StepTable

MODEL, INITIAL_NOISE = "model.pt2", "initial_noise.pt2"
_PROCESSOR = "cpu_capability"  # in ``versions``: the vector instructions that code for a CPU was made with

#: The noise is a chain of some hundred short integer operations with several uses each. Unless Inductor gives a name
#: to intermediate results early, it spells out every path through the chain, and compiles for minutes instead of
#: seconds; fusion takes the names out again.
_TICK_OPTIONS = {"realize_opcount_threshold": 8, "realize_reads_threshold": 1}

#: ``freezing``, which :mod:`stepfusion.execution.compiled` uses, gives wrong numbers in a package (PyTorch 2.13), and
#: threads are counted where the package runs, not where it was made.
_CPU_OPTIONS: dict[str, Any] = {"freezing": False, "cpp.dynamic_threads": True}


def export_aoti(
    engine: Engine,
    out: Path,
    *,
    kind: str = "network",
    batch: Batch = DYNAMIC,
    table: StepTable | None = None,
    guided: bool = False,
) -> None:
    """Write a bundle with the network, or a whole tick of a sampler, compiled for the engine's device.

    A network is ``model.pt2``. A tick is ``model.pt2`` (:class:`stepfusion.export.tick.Tick`) and
    ``initial_noise.pt2`` (:class:`stepfusion.export.tick.InitialNoise`).

    Args:
        engine: on a CPU or a CUDA device.
        out: the directory to write, which must not exist.
        kind: "network" or "tick".
        batch: the batch sizes to compile for.
        table: the sampler's rows for ``table.json``, which a tick needs.
        guided: a tick with classifier-free guidance, whose network runs twice a step.

    Raises:
        ExportError: ``out`` exists; there is no table for a tick; the network cannot be exported or compiled; or what
            was compiled does not compute what the engine does.
    """
    if engine.plan.device.type not in ("cpu", "cuda"):
        raise ExportError(f"AOTInductor compiles for cpu and cuda, and the engine is on {engine.plan.device}")
    check_kind(engine, kind, table, guided)
    check_out(out)
    if kind == "tick" and table is not None:
        _export_tick(engine, out, batch, table, guided)
    else:
        _export_network(engine, out, batch, table)


def _export_network(engine: Engine, out: Path, batch: Batch, table: StepTable | None) -> None:
    program = export_program(engine, batch)
    manifest = _manifest(engine, "network", batch, input_specs(engine, batch), output_specs(program, batch))

    def build(folder: Path) -> str:
        compile_program(program, folder / MODEL, engine.plan.device)
        run, network = load_package(folder / MODEL, engine.plan.device), plain_network(engine)
        largest = 0.0
        with torch.no_grad():
            for size in batch.examples():
                example = example_inputs(engine, size)
                largest = max(largest, check_close(run(*example), network(*example), "compiled network", size))
        return f"Run before the bundle was finished: it differs from the engine's network by at most {largest:.2g}."

    write_bundle(out, manifest, build, table=table)


def _export_tick(engine: Engine, out: Path, batch: Batch, table: StepTable, guided: bool) -> None:
    program = tick_program(engine, batch, guided=guided)
    manifest = _manifest(engine, "tick", batch, *tick_specs(engine, batch, guided=guided))
    device = engine.plan.device

    def build(folder: Path) -> str:
        compile_program(program, folder / MODEL, device, _TICK_OPTIONS)
        compile_program(initial_noise_program(engine, batch), folder / INITIAL_NOISE, device, _TICK_OPTIONS)
        run, noise = load_package(folder / MODEL, device), load_package(folder / INITIAL_NOISE, device)
        found = compare_tick(engine, batch, table, run, noise, "compiled", guided=guided)
        return f"Run before the bundle was finished: {found}"

    write_bundle(out, manifest, build, table=table)


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
        ExportError: PyTorch cannot load it.
    """
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
        with torch.no_grad(), compiler_cache(), _quiet():
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs={**settings, **(options or {})}
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Inductor has a class for each stage, all private
        raise ExportError(f"AOTInductor cannot compile the {path.stem}: {first_line(error)}") from error


def _manifest(
    engine: Engine, kind: str, batch: Batch, inputs: tuple[Tensorspec, ...], outputs: tuple[Tensorspec, ...]
) -> Manifest:
    device = engine.plan.device
    bound = {_PROCESSOR: torch.backends.cpu.get_cpu_capability()}
    if device.type == "cuda":
        bound = {"compute_capability": here("compute_capability", device)}
    return Manifest(
        format="aoti",
        kind=kind,
        device=device.type,
        dtype=name_of(engine.plan.dtype),
        inputs=inputs,
        outputs=outputs,
        versions={**versions(), **bound},
        model=model_facts(engine, batch),
        files={},
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out Inductor's advice to change process-wide settings, and deprecations inside PyTorch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
