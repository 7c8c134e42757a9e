"""Loops of latent denoisers beside diffusers': who takes part, what is compared, and that it is compared."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers", reason="the loops stand beside diffusers'")

from stepfusion.bench import latent
from stepfusion.bench.models import TINY_LATENT
from stepfusion.kernels.cpu.library import why_not_cpu_kernels


@pytest.mark.parametrize("model", TINY_LATENT)
def test_everybody_makes_the_same_latents(model: str) -> None:
    ways = [("eager", "float32")] + [("cpp", "float32")] * (why_not_cpu_kernels(torch.float32) is None)
    work = latent.make_work(model, batch=2, latent=None, steps=3)
    rows = list(latent.measure(model, work, 1, ways))
    assert [row.provider for row in rows] == [latent.DIFFUSERS, *(f"stepfusion {m} {d}" for m, d in ways)]
    assert all(row.milliseconds > 0 and row.batch == 2 and row.latent == 8 for row in rows)
    assert all(row.difference < 1e-4 for row in rows[1:])
    assert rows[0].faster == 1.0


@pytest.mark.parametrize("model", TINY_LATENT)
def test_other_latents_are_not_timed(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers is given what our network is not."""
    work = latent.make_work(model, batch=2, latent=None, steps=3)
    (name, theirs), *_ = work.theirs.items()
    monkeypatch.setattr(latent, "interleave", pytest.fail)
    with pytest.raises(RuntimeError, match=r"^stepfusion eager float32: latents differ by .*, nothing was timed$"):
        list(latent.measure(model, replace(work, theirs={name: theirs.roll(1, 0)}), 1, [("eager", "float32")]))


def test_the_command_prints_rows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent, "OURS", [("eager", "float32")])
    command = ["--model", "tiny-dit", "--latent", "4", "--steps", "2", "--rounds", "1"]
    assert latent.main([*command, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["provider"], row["latent"], row["steps"]) for row in rows] == [
        ("diffusers float32", 4, 2),
        ("stepfusion eager float32", 4, 2),
    ]
    assert latent.main(command) == 0
    assert "| tiny-dit | 4 x 4 | 1 | stepfusion eager float32 |" in capsys.readouterr().out


def test_who_cannot_run_here_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As bfloat16 on a processor that multiplies no matrices of it."""
    monkeypatch.setattr("stepfusion.execution.plan.why_not_cpu_kernels", lambda dtype: "this CPU has none")
    work = latent.make_work("tiny-dit", batch=1, latent=None, steps=2)
    rows = list(latent.measure("tiny-dit", work, 1, [("cpp", "bfloat16"), ("eager", "float32")]))
    assert [row.provider for row in rows] == [latent.DIFFUSERS, "stepfusion eager float32"]
    line = "stepfusion cpp bfloat16: network='cpp' cannot run: this CPU has none; use network='eager'\n"
    assert capsys.readouterr().err == line


def test_a_loop_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    work = latent.make_work("tiny-dit", batch=1, latent=None, steps=2)
    calls = []

    def fails_later() -> torch.Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise MemoryError("no memory")
        return work.start

    monkeypatch.setattr(latent, "diffusers_loop", lambda work: fails_later)
    with pytest.raises(RuntimeError, match="no memory"):
        list(latent.measure("tiny-dit", work, 1, []))
