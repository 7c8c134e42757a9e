"""A server is ready only when it is warm: whatever is compiled is compiled before, and nothing afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("starlette", reason="the HTTP application needs the extra 'http'")
pytest.importorskip("httpx2", reason="starlette's test client needs it")

from starlette.testclient import TestClient

import stepfusion as sf
from stepfusion.serving.async_engine import AsyncEngine
from stepfusion.serving.http.app import make_app
from stepfusion_testing.http_service import until


class Network(torch.nn.Module):
    """Three classes, of which the last stands for none."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([0.1, 0.2, 0.3]))

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return x * self.scale[labels].view(-1, 1, 1, 1)


@pytest.mark.slow
def test_it_is_ready_when_all_is_compiled(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    opened, compiled = threading.Event(), []

    def compile_slowly(graph: torch.fx.GraphModule, inputs: list[Any], options: object) -> Callable[..., Any]:
        opened.wait(60)
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch._inductor, "compile", compile_slowly)
    engine = sf.Engine(
        Network(),
        sf.NoiseSchedule.linear(100),
        shape=(1, 4, 4),
        num_classes=3,
        null_label=2,
        device="cpu",
        dtype="float32",
        backend="reference",
        network="compile",
        batch=2,
    )
    service = AsyncEngine(engine)
    with TestClient(make_app(service)) as client:
        until(lambda: service.status.state == "starting")
        assert client.get("/readyz").status_code == 503
        assert client.post("/v1/generate", json={"steps": 2}).status_code == 503
        opened.set()
        until(lambda: client.get("/readyz").status_code == 200)
        assert len(compiled) == 2, "the network for two lanes, and for both halves of two guided ones"
        for body in ({"n": 3, "steps": 3}, {"labels": 1, "guidance": 2}, {"sampler": "dpmpp_2m", "steps": 4}):
            assert client.post("/v1/generate", json={"steps": 2, **body}).status_code == 200
        assert len(compiled) == 2
