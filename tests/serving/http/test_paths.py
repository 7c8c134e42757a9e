"""HTTP requests for models on EDM's path and on the straight one."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the HTTP application needs the extra 'serve'")

import torch

import stepfusion as sf
from stepfusion.lanes.request import Event
from stepfusion.samplers.registry import samplers_of
from stepfusion.serving.http.errors import InvalidRequest
from stepfusion.serving.http.limits import Limits
from stepfusion.serving.http.messages import progress
from stepfusion.serving.http.metadata import model_metadata
from stepfusion.serving.http.openapi import describe
from stepfusion.serving.http.previews import Preview
from stepfusion.serving.http.requests import GenerateRequest
from stepfusion.serving.http.validation import validate
from stepfusion_testing.path_networks import FLOW, SIGMA, path_engine


@pytest.mark.parametrize(("path", "default"), [(SIGMA, "heun"), (FLOW, "euler")], ids=["sigma", "flow"])
def test_a_model_offers_the_samplers_of_its_path(path: sf.Path, default: str) -> None:
    engine = path_engine(path)
    facts = model_metadata(engine, Limits(), "model")
    assert facts["samplers"] == list(samplers_of(path))
    assert "ddpm" not in facts["samplers"]
    assert (facts["default_sampler"], facts["path"], facts["timesteps"]) == (default, path.name, 1000)
    assert "leading" not in facts["spacings"]
    assert "ddpm" not in facts["eta"]
    schema: dict[str, Any] = describe(Limits(), path)["paths"]["/v1/generate"]["post"]["requestBody"]["content"]
    assert schema["application/json"]["schema"]["properties"]["sampler"]["enum"] == [*samplers_of(path), None]
    for sampler in (None, *samplers_of(path)):
        table = validate(GenerateRequest(sampler=sampler, steps=4), engine, Limits()).table
        assert table.digest == engine.table(sampler, 4).digest
    with pytest.raises(InvalidRequest, match=r"^sampler must be one of 'ddim', .*, got 'ddpm'$"):
        validate(GenerateRequest(sampler="ddpm"), engine, Limits())
    with pytest.raises(ValueError, match=r"^timesteps is an option of a NoiseSchedule"):
        validate(GenerateRequest(timesteps=[5, 1]), engine, Limits())


def test_limits_count_evaluations() -> None:
    """Heun's steps are two rows each."""
    engine = path_engine(SIGMA)
    asked = GenerateRequest(sampler="heun", steps=8)
    validate(asked, engine, Limits(steps=15, evaluations=15))
    with pytest.raises(InvalidRequest, match=r"^steps is too large: 15 steps, and a request may have 14$"):
        validate(asked, engine, Limits(steps=14))
    with pytest.raises(InvalidRequest, match=r"^n \* steps is too large: 1 image of 15 steps are 15 evaluations"):
        validate(asked, engine, Limits(evaluations=14))


def test_a_model_may_name_its_sampler() -> None:
    engine = path_engine(FLOW, options={"sampler": "heun"})
    assert model_metadata(engine, Limits(), "model")["default_sampler"] == "heun"
    assert validate(GenerateRequest(steps=3), engine, Limits()).table.name == engine.table("heun", 3).name


def test_a_preview_holds_a_float() -> None:
    x = torch.zeros(1, 1, 4, 4)
    sent = progress(Preview.of_event(Event(0, 4, -1.553652, (0,), x, x)))
    data = next(line for line in sent.decode().splitlines() if line.startswith("data: "))
    assert json.loads(data.removeprefix("data: "))["timestep"] == -1.553652
