"""stepfusion's engine as a provider: in each of its network modes, and with its network exported and loaded back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from stepfusion.bench.providers import Built, Case, Provider, Unavailable
from stepfusion.engine import Engine
from stepfusion.errors import ExportError
from stepfusion.export.batch import Batch
from stepfusion.export.exporters import exporter
from stepfusion.export.formats import FORMATS
from stepfusion.kernels import BackendError
from stepfusion.options import DType, NetworkMode
from stepfusion.samplers.scheduler_config import read_config


class Ours(Provider):
    """stepfusion's engine with one of its ``network`` modes."""

    family = "stepfusion"

    def __init__(self, mode: str, dtype: str) -> None:
        self.mode, self.dtype = mode, dtype
        self.name = f"stepfusion {mode} {dtype}"
        self.compiles = "compile" in mode or mode == "openvino"

    def engine(self, case: Case) -> Engine:
        """The engine that is measured."""
        return make_engine(case, case.model.network, self.mode, self.dtype)

    def build(self, case: Case) -> Built:
        try:
            engine = self.engine(case)
        except (BackendError, ExportError) as error:
            raise Unavailable(str(error)) from error
        table = engine.spec.table(case.sampler, case.steps, compat="diffusers")
        evaluations = {n: case.model.evaluation_table(case.timestep, n) for n in (1, case.evaluations)}

        def sample(walked: Any, noise: torch.Tensor | None = None) -> torch.Tensor:
            x = engine.sample(table=walked, start=case.start, labels=case.labels, noise=noise, progress=False)
            check_runs_as_asked(engine)
            return x

        def finish() -> torch.Tensor:
            return engine.to_uint8(sample(table)).cpu()

        def loop(noise: torch.Tensor | None = None) -> torch.Tensor:
            return sample(table, noise)

        return Built(lambda count: sample(evaluations[count]), loop, finish)


class Exported(Ours):
    """stepfusion's engine with its network exported in one of the formats, and loaded back."""

    def __init__(self, form: str, dtype: str) -> None:
        self.form, self.dtype = form, dtype
        self.compiles = form != "onnx"
        self.name = f"stepfusion exported {form} {dtype}"
        self.packages = FORMATS[form].needs

    def engine(self, case: Case) -> Engine:
        home = case.device if FORMATS[self.form].device in ("any", case.device.type) else torch.device("cpu")
        source = make_engine(replace(case, device=home), case.model.network, "eager", self.dtype)
        bundle = Path(case.folder.name) / f"{self.form}-{self.dtype}"
        exporter(self.form)(source, bundle, batch=Batch.fixed(case.batch))
        return Engine.from_exported(bundle, device=case.device, batch=case.batch)


def check_runs_as_asked(engine: Engine) -> None:
    """Refuse an engine that has fallen back: its time would stand under the name of a way that it does not run.

    An engine finds out when it first runs: a compilation may fail or differ, a tick may not be captured.

    Raises:
        RuntimeError: with the reason.
    """
    policy = engine.runners.policy
    reason = engine.evaluator.declined or (None if policy is None else policy.failure)
    if reason is not None:
        raise RuntimeError(f"the engine does not run as it was asked to: {reason}")


def make_engine(case: Case, network: Callable[..., torch.Tensor], mode: str, dtype: str) -> Engine:
    """An engine for a case, with its own network or another that takes and returns the same shapes."""
    schedule, prediction, options = read_config(case.model.scheduler_config)
    return Engine(
        network,
        schedule,
        prediction=prediction,
        shape=case.model.image_shape,
        num_classes=case.model.network.num_classes,
        null_label=case.model.null_label,
        options=options,
        device=case.device,
        dtype=cast(DType, dtype),
        network=cast(NetworkMode, mode),
        batch=case.batch,
    )


def exported_providers(device: torch.device) -> list[Provider]:
    """The engine without an export first, then with each format that can run on a device."""
    if device.type == "cpu":
        plain, forms = "eager", [("onnx", "float32"), ("openvino", "float32"), ("aoti", "float32")]
    else:
        plain, forms = "graph", [(form, "bfloat16") for form in ("aoti", "torch-tensorrt", "tensorrt")]
    return [Ours(plain, forms[0][1]), *(Exported(form, dtype) for form, dtype in forms)]
