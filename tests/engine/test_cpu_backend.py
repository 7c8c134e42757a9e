"""backend="cpu": the step, the noise and the pixels by the fused C++ kernels, with the reference's bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import stepfusion as sf
from stepfusion.execution import plan
from stepfusion.kernels.cpu.sampling_library import sampling_library_origin, why_not_sampling_kernels

REASON = why_not_sampling_kernels()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"the C++ sampling kernels cannot run: {REASON}")
SCHEDULE = sf.NoiseSchedule.linear(100)
X = torch.linspace(-0.9, 0.9, 3 * 2 * 35).reshape(3, 2, 5, 7)


class Network(torch.nn.Module):
    """A labelled network with parameters, on an odd shape, that learns its variance if asked to."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.layer, self.learned = torch.nn.Conv2d(2, 4 if learned else 2, 3, padding=1), learned

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + (0.1 * labels + timesteps / 1000).view(-1, 1, 1, 1).to(x.dtype)


def both(*, learned: bool = False, **arguments: Any) -> list[sf.Engine]:
    network = Network(learned)
    given = {"shape": (2, 5, 7), "num_classes": 3, "null_label": 2, "device": "cpu", "batch": 4, **arguments}
    return [sf.Engine(network, sf.NoiseSchedule.linear(100), backend=name, **given) for name in ("cpu", "reference")]


REQUESTS: dict[str, dict[str, Any]] = {
    "ddim": {"n": 6, "steps": 5, "labels": [0, 1, 2, 0, 1, 2]},
    "noisy and guided": {"n": 5, "steps": 4, "eta": 1.0, "labels": 1, "guidance": [1.0, 2.0, 0.0, 3.5, 1.0]},
    "ddpm": {"n": 3, "sampler": "ddpm", "steps": 5, "seed": (1 << 64) - 1},
    "history": {"n": 3, "sampler": "dpmpp_2m", "steps": 5},
    "euler": {"indices": [7, 4_000_000_000], "sampler": "euler_ancestral", "steps": 4},
    "given": {"start": X, "noise": torch.linspace(-2, 2, 4 * X.numel()).reshape(4, *X.shape), "steps": 4, "eta": 0.5},
    "masked": {"image": X, "mask": (X > 0).float(), "steps": 4, "eta": 1.0},
    "strength": {"image": X, "strength": 0.5, "steps": 6},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("request_", REQUESTS)
def test_whole_loops_have_the_references_bits(request_: str, dtype: str) -> None:
    fused, reference = both(dtype=dtype)
    assert torch.equal(fused.sample(**REQUESTS[request_]), reference.sample(**REQUESTS[request_]))


def test_pixels_have_the_references_bits() -> None:
    fused, reference = (
        sf.Engine(lambda x, t: 0.5 * x, sf.NoiseSchedule.linear(100), shape=(3, 9, 5), device="cpu", backend=name)
        for name in ("cpu", "reference")
    )
    for ours, wanted in zip(fused.generate(5, steps=3), reference.generate(5, steps=3), strict=True):
        assert torch.equal(ours, wanted)


def test_a_learned_variance_is_as_near_as_the_tolerance_says() -> None:
    fused, reference = both(learned=True)
    tables = [engine.table("ddpm", 4, variance="learned_range") for engine in (fused, reference)]
    images = [engine.sample(3, table, labels=0) for engine, table in zip((fused, reference), tables, strict=True)]
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-5)


def test_research_code_takes_it_too() -> None:
    t, noise = torch.tensor([0, 50, 99]), X.flip(0)
    fused, reference = (sf.GaussianDiffusion(sf.NoiseSchedule.linear(100), backend=b) for b in ("cpu", "reference"))
    assert torch.equal(fused.q_sample(X, t, noise), reference.q_sample(X, t, noise))
    step = [d.p_sample(lambda x, t: 0.5 * x, X, t, noise=noise)["sample"] for d in (fused, reference)]
    assert torch.equal(*step)


def test_the_environment_chooses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPFUSION_BACKEND", "cpu")
    engine = sf.Engine(lambda x, t: x, sf.NoiseSchedule.linear(100), shape=(1, 4, 4), device="cpu")
    assert "asked for by STEPFUSION_BACKEND: the fused kernels in C++" in engine.explain()


def test_auto_takes_it_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEPFUSION_BACKEND", raising=False)
    arguments: dict[str, Any] = {"shape": (1, 4, 4), "device": "cpu"}
    chosen, asked = (sf.Engine(lambda x, t: 0.5 * x, SCHEDULE, backend=b, **arguments) for b in ("auto", "reference"))
    assert chosen.plan.backend.value == "cpu"
    found = f"{torch.backends.cpu.get_cpu_capability()}, {sampling_library_origin()}"
    assert f"auto: the fused kernels in C++ ({found}), with the reference's bits" in chosen.explain()
    assert torch.equal(chosen.sample(3, steps=4, eta=1.0), asked.sample(3, steps=4, eta=1.0))
    thresholded = {"table": chosen.table("ddim", 4, threshold=0.9, sample_max_value=2.0)}
    assert torch.equal(chosen.sample(2, **thresholded), asked.sample(2, **thresholded))


def test_auto_takes_the_reference_if_they_do_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEPFUSION_BACKEND", raising=False)
    monkeypatch.setattr(plan, "why_not_sampling_kernels", lambda: "there is no C++ compiler")
    engine = sf.Engine(lambda x, t: 0.5 * x, SCHEDULE, shape=(1, 4, 4), device="cpu")
    assert engine.plan.backend.value == "reference"
    assert "auto: the fused kernels in C++ cannot run: there is no C++ compiler" in engine.explain()
    assert sf.GaussianDiffusion(SCHEDULE).ops.on(torch.device("cpu")) is sf.kernels.reference


def test_dynamic_thresholding_is_refused() -> None:
    fused, _ = both(options={"threshold": 0.9, "sample_max_value": 2.0, "clip": None})
    with pytest.raises(sf.BackendError, match=r"^backend='cpu' cannot run dynamic thresholding: it needs a quantile"):
        fused.sample(2, steps=3, labels=0)


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(device: torch.device) -> None:
        raise sf.BackendError("the C++ sampling kernels cannot run here: no compiler")

    monkeypatch.setattr(plan, "require_sampling_kernels", missing)
    with pytest.raises(sf.BackendError, match="no compiler"):
        both()
