"""docs/samplers.md names every sampler and every scheduler of diffusers, and says of each what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stepfusion.samplers.registry import SAMPLERS
from stepfusion.samplers.scheduler_keys import (
    DISTILLED,
    OTHER_PATHS,
    OTHER_SOLVERS,
    OWN_SCHEDULERS,
    REFUSED_SCHEDULERS,
)
from stepfusion.samplers.spacing import FLOW_SPACINGS, SIGMA_SPACINGS
from stepfusion.samplers.timesteps import ALL_SPACINGS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "samplers.md").read_text(encoding="utf-8")


def schedulers() -> dict[str, tuple[str, str]]:
    """What the page says of each: how it is read, and its sampler."""
    found: dict[str, tuple[str, str]] = {}
    for line in PAGE.splitlines():
        if re.match(r"\| \w+Scheduler\b", line):
            names, how, sampler = (cell.strip() for cell in line.strip("|").split("|"))
            for name in names.split(", "):
                assert name not in found, name
                found[name] = how, sampler
    return found


def test_every_scheduler_of_the_installed_diffusers_is_named() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = {name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")}
    assert len(theirs) > 30
    assert theirs <= schedulers().keys()


def test_the_page_says_what_the_lists_say() -> None:
    page = schedulers()
    known = [*OWN_SCHEDULERS, *OTHER_SOLVERS, *DISTILLED, *OTHER_PATHS, *REFUSED_SCHEDULERS]
    assert page.keys() == set(known)
    for name, (how, sampler) in page.items():
        if name in REFUSED_SCHEDULERS:
            assert how == "refused", name
        elif name in OTHER_PATHS:
            assert f"stepfusion.{how.strip('`')}" in OTHER_PATHS[name], name
        else:
            assert how == "schedule", name
            own = {**OWN_SCHEDULERS, **OTHER_SOLVERS, **DISTILLED}[name].sampler
            if own is None:
                assert sampler.startswith("none"), name
            else:
                wanted = own.split("'")[1] if "'" in own else own
                assert f"`{wanted}`" in sampler, name
                assert sampler.startswith("(") == (name in OTHER_SOLVERS), name


def test_every_sampler_and_spacing_is_named() -> None:
    table, rows = PAGE.split("## The rows")[0], PAGE.split("## The rows")[1].split("## Levels")[0]
    for name in SAMPLERS:
        assert f"`{name}`" in table, name
        assert f"`{name}`" in rows or name == "dpmpp_1s", name
    for name in {*ALL_SPACINGS, *SIGMA_SPACINGS, *FLOW_SPACINGS}:
        assert f"`{name}`" in PAGE.split("## Levels")[1], name
