"""The fields of a request: every sampling option has its name, and is passed on by it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the HTTP application needs the extra 'serve'")

from pydantic import Field

from stepfusion.options import SamplingOptions
from stepfusion.serving.http.limits import Limits
from stepfusion.serving.http.requests import TENSOR_OPTIONS, GenerateRequest, PictureRequest, StreamRequest
from stepfusion.serving.http.validation import validate
from stepfusion_testing.http_service import gated_engine

NO_SAMPLING_OPTIONS = {"n", "priority", "deadline_s"}  # arguments of submit beside the sampling options


def test_every_sampling_option_is_a_field_or_a_tensor() -> None:
    declared = set(GenerateRequest.model_fields)
    assert declared - NO_SAMPLING_OPTIONS == set(SamplingOptions.__annotations__) - TENSOR_OPTIONS
    assert declared >= NO_SAMPLING_OPTIONS
    assert set(SamplingOptions.__annotations__) >= TENSOR_OPTIONS


def test_options_are_passed_on_by_their_names() -> None:
    _, engine = gated_engine()
    asked = GenerateRequest(n=2, guidance=[1.0, 2.0], labels="Dog", seed=7, steps=3, sampler="ddim", eta=0.5)
    arguments = validate(asked, engine, Limits()).arguments
    table = arguments.pop("table")
    assert repr(table) == repr(engine.table("ddim", 3, eta=0.5))
    assert arguments == {
        "n": 2,
        "seed": [7, 7],
        "indices": [0, 1],
        "labels": [1, 1],
        "guidance": [1.0, 2.0],
        "priority": 0,
        "deadline": None,
    }


def test_a_new_sampling_option_needs_a_field_and_nothing_else() -> None:
    class WithStrength(GenerateRequest):
        strength: float | None = Field(None, description="a number in (0, 1]")

    _, engine = gated_engine()
    parsed = WithStrength.parse(b'{"strength": 0.25, "steps": 2}')
    assert validate(parsed, engine, Limits()).arguments["strength"] == 0.25
    absent = WithStrength.parse(b'{"steps": 2}')
    assert "strength" not in validate(absent, engine, Limits()).arguments


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ({}, 1),
        ({"n": 3}, 3),
        ({"labels": ["Cat", "Dog"]}, 2),
        ({"guidance": [1.0] * 4, "indices": [5, 6, 7]}, 3),
        ({"timesteps": [9, 5, 1]}, 1),
        ({"labels": "Cat", "seed": 3}, 1),
    ],
)
def test_the_number_of_images_follows_from_lists(given: dict[str, Any], count: int) -> None:
    assert GenerateRequest(**given).count == count


def test_the_documentation_lists_every_field() -> None:
    text = (Path(__file__).parents[3] / "docs" / "http.md").read_text(encoding="utf-8")
    rows = text.split("| field | what |")[1].split("\n\n")[0].splitlines()[2:]
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(listed) == sorted({*PictureRequest.model_fields, *StreamRequest.model_fields})
