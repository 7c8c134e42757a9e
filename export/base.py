"""What all exports share: an engine's network or tick is traced, described, built, compared, and written as a bundle.

A format adds a :class:`Target` and a function that builds its artefact in a folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, Unpack

import torch
from torch.export import ExportedProgram

from stepfusion.engine import Engine
from stepfusion.export.batch import DYNAMIC, Batch
from stepfusion.export.bundle import Bundle, check_out, write_bundle
from stepfusion.export.manifest import Manifest, Tensorspec
from stepfusion.export.program import (
    check_close,
    example_inputs,
    export_program,
    input_specs,
    name_of,
    output_specs,
    plain_network,
)
from stepfusion.export.runtimes import Runtime, TickRuntime
from stepfusion.export.spec_json import model_to_json
from stepfusion.export.tick_program import (
    check_kind,
    compare_tick,
    initial_noise_program,
    tick_program,
    tick_specs,
)
from stepfusion.samplers.table import StepTable


class ExportOptions(TypedDict, total=False):
    """The options of every export.

    Attributes:
        batch: the batch sizes that the artefact is for; 1 to 64, tuned for 8, by default.
        table: the sampler's rows for ``table.json``; none by default.
    """

    batch: Batch
    table: StepTable | None


class TickOptions(ExportOptions, total=False):
    """The options of an export that can also hold a tick.

    Attributes:
        kind: "network", which is the default, or "tick", which needs a table.
        guided: a tick with classifier-free guidance, whose network runs twice a step.
    """

    kind: str
    guided: bool


@dataclass(frozen=True)
class Target:
    """What an artefact is for, as its manifest says.

    Attributes:
        format, device, versions: the entries of :class:`stepfusion.export.manifest.Manifest`.
        dtype: that the artefact computes in; the engine's by default.
        entries: further entries of the manifest's ``model``.
    """

    format: str
    device: str
    versions: dict[str, str]
    dtype: str | None = None
    entries: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NetworkExport:
    """A network on its way into a bundle: the engine it is of, its program, and the manifest without files."""

    engine: Engine
    batch: Batch
    program: ExportedProgram
    manifest: Manifest

    @torch.no_grad()
    def compare(
        self, run: Runtime, what: str, sizes: Iterable[int] | None = None, *, rounded_to: torch.dtype | None = None
    ) -> float:
        """The largest difference of an artefact's output to that of the engine's network.

        Args:
            run: the artefact, loaded. what: names it in the error.
            sizes: the batch sizes to compare at; those of :meth:`Batch.examples` by default.
            rounded_to: the dtype that the network's output is rounded to before it is compared.

        Raises:
            ExportError: rounding does not explain it.
        """
        network, largest = plain_network(self.engine), 0.0
        for size in sorted(set(self.batch.examples() if sizes is None else sizes)):
            example = example_inputs(self.engine, size)
            with self.engine.plan.products():
                expected, out = network(*example), run(*example)
            if rounded_to is not None:
                expected = expected.to(rounded_to)
            largest = max(largest, check_close(out, expected, what, size))
        return largest

    def compared(self, run: Runtime, what: str, sizes: Iterable[int] | None = None) -> str:
        """:meth:`compare`, as a sentence for the bundle's page."""
        largest = self.compare(run, what, sizes)
        return f"Run before the bundle was finished: it differs from the engine's network by at most {largest:.2g}."


@dataclass(frozen=True)
class TickExport:
    """A tick and its initial noise on their way into a bundle, like :class:`NetworkExport`."""

    engine: Engine
    batch: Batch
    table: StepTable
    guided: bool
    program: ExportedProgram
    initial_noise: ExportedProgram
    manifest: Manifest

    def compare(self, tick: TickRuntime, initial_noise: Runtime, what: str) -> str:
        """:func:`stepfusion.export.tick_program.compare_tick` with the artefacts, loaded."""
        with self.engine.plan.products():
            return compare_tick(self.engine, self.batch, self.table, tick, initial_noise, what, guided=self.guided)


BuildNetwork: TypeAlias = Callable[[NetworkExport, Path], str | None]
BuildTick: TypeAlias = Callable[[TickExport, Path], str | None]


def export_network(
    engine: Engine,
    out: Path,
    target: Target,
    build: BuildNetwork,
    *,
    batch: Batch = DYNAMIC,
    table: StepTable | None = None,
) -> Bundle:
    """Write a bundle with the engine's network.

    Args:
        out: the directory to write, which must not exist.
        build: writes the artefact into a folder; returns what it has to say on the bundle's page.
        batch, table: :class:`ExportOptions`.

    Raises:
        ExportError: ``out`` exists, or the network cannot be traced. Whatever ``build`` raises.
    """
    check_out(out)
    program = export_program(engine, batch)
    tensors = input_specs(engine, batch), output_specs(program, batch)
    export = NetworkExport(engine, batch, program, _manifest(engine, batch, target, "network", tensors))
    return write_bundle(out, export.manifest, lambda folder: build(export, folder), table=table)


def export_tick(
    engine: Engine,
    out: Path,
    target: Target,
    build: BuildTick,
    *,
    batch: Batch = DYNAMIC,
    table: StepTable,
    guided: bool = False,
) -> Bundle:
    """Write a bundle with the engine's tick and its initial noise, as :func:`export_network` does with a network."""
    check_out(out)
    tensors = tick_specs(engine, batch, guided=guided, history=table.history)
    manifest = _manifest(engine, batch, target, "tick", tensors)
    program = tick_program(engine, batch, guided=guided, history=table.history)
    export = TickExport(engine, batch, table, guided, program, initial_noise_program(engine, batch), manifest)
    return write_bundle(out, manifest, lambda folder: build(export, folder), table=table)


def export_either(
    engine: Engine,
    out: Path,
    target: Target,
    build_network: BuildNetwork,
    build_tick: BuildTick,
    *,
    kind: str = "network",
    guided: bool = False,
    **options: Unpack[ExportOptions],
) -> Bundle:
    """Write a bundle with the engine's network or its tick, as ``kind`` says.

    Raises:
        ValueError: there is no such kind.
        ExportError: as :func:`export_network`, and if there is no table for a tick, or it cannot be guided.
    """
    table = options.get("table")
    check_kind(engine, kind, table, guided)
    if kind == "tick" and table is not None:
        batch = options.get("batch", DYNAMIC)
        return export_tick(engine, out, target, build_tick, batch=batch, table=table, guided=guided)
    return export_network(engine, out, target, build_network, **options)


def _manifest(
    engine: Engine,
    batch: Batch,
    target: Target,
    kind: str,
    tensors: tuple[tuple[Tensorspec, ...], tuple[Tensorspec, ...]],
) -> Manifest:
    inputs, outputs = tensors
    return Manifest(
        format=target.format,
        kind=kind,
        device=target.device,
        dtype=target.dtype or name_of(engine.plan.dtype),
        inputs=inputs,
        outputs=outputs,
        versions=target.versions,
        model={**model_to_json(engine, batch), **target.entries},
        files={},
    )
