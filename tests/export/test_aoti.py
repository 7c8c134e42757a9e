"""What AOTInductor compiled computes what the engine computes; what cannot run here is refused unopened."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stepfusion as sf
from stepfusion.export import to_aoti
from stepfusion.export.batch import Batch
from stepfusion.export.bundle import Bundle, read_bundle, sha256
from stepfusion.export.manifest import Manifest, Tensorspec
from stepfusion.export.tick import InitialNoise
from stepfusion.export.to_aoti import export_aoti, load_aoti, load_initial_noise, load_package
from stepfusion.kernels import COLUMNS, philox, reference
from stepfusion_testing.aoti_bundle import bundled_engine, bundled_tick, consume
from stepfusion_testing.networks import labelled, smooth, tiny_unet

CPU = torch.device("cpu")


def make(**arguments: object) -> sf.Engine:
    settings = {"device": "cpu", "prediction": "v_prediction", "null_label": 3, **arguments}
    return sf.Engine(tiny_unet(classes=4), sf.NoiseSchedule.cosine(), **settings)  # type: ignore[arg-type]


# The bundled model's tick


@pytest.mark.soak
@pytest.mark.parametrize(
    ("sampler", "steps", "eta", "guidance"), [("ddim", 10, 0.0, 1.0), ("ddim", 10, 1.0, 2.0), ("ddpm", 6, None, 1.0)]
)
@pytest.mark.parametrize("n", [1, 4])
def test_the_tick_gives_the_engines_images(
    sampler: str, steps: int, eta: float | None, guidance: float, n: int
) -> None:
    engine, bundle = bundled_engine(), read_bundle(bundled_tick())
    tick, initial_noise = load_aoti(bundle, CPU), load_initial_noise(bundle, CPU)
    table = engine.table(sampler, steps) if eta is None else engine.table(sampler, steps, eta=eta)
    labels, scale = torch.arange(n) % 10, torch.full((n,), guidance)
    images = consume(tick, initial_noise, table, 3, range(n), labels, scale)
    expected = engine.sample(n, table, seed=3, labels=labels, guidance=guidance)
    torch.testing.assert_close(images, expected, rtol=0, atol=5e-5)


@pytest.mark.soak
def test_the_compiled_noise_is_the_kernels_bit_for_bit() -> None:
    initial_noise = load_initial_noise(read_bundle(bundled_tick()), CPU)
    for n in (1, 2, 5, 64):
        seeds, indices = torch.randint(-(2**63), 2**63 - 1, (n,)), torch.randint(0, 2**32, (n,))
        expected = reference.normal(seeds, indices, torch.zeros_like(seeds), (1, 28, 28), philox.STREAM_INITIAL)
        assert torch.equal(initial_noise(seeds, indices), expected)


@pytest.mark.soak
def test_the_compiled_tick_draws_the_kernels_noise_bit_for_bit() -> None:
    """A row whose only coefficient is sigma = 1 returns z itself."""
    engine, tick = bundled_engine(), load_aoti(read_bundle(bundled_tick()), CPU)
    coefficients = torch.zeros(1, len(COLUMNS))
    coefficients[0, [COLUMNS.index(name) for name in ("sigma", "net_scale")]] = 1.0
    timesteps, seeds, indices = torch.tensor([123]), torch.tensor([-7, 1 << 40]), torch.tensor([0, 2**32 - 1])
    rows, labels = torch.zeros(2, dtype=torch.int64), torch.tensor([1, 2])
    z = tick(torch.randn(2, *engine.shape), rows, coefficients, timesteps, seeds, indices, labels, torch.ones(2))
    expected = reference.normal(seeds, indices, timesteps.expand(2), engine.shape)
    assert torch.equal(z, expected)


@pytest.mark.soak
def test_the_bundle_says_what_it_is() -> None:
    bundle = read_bundle(bundled_tick())
    assert (bundle.manifest.format, bundle.manifest.kind, bundle.manifest.device) == ("aoti", "tick", "cpu")
    assert {"model.pt2", "initial_noise.pt2", "table.json"} < set(bundle.manifest.files)
    assert bundle.table is not None
    assert len(bundle.table) == 10
    assert bundle.manifest.versions["cpu_capability"] == torch.backends.cpu.get_cpu_capability()


# A network


class Small(nn.Module):
    """Compiles in a few seconds: what is tested is the way there and back, and the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + labelled(x, timesteps, labels)


def small(network: Any = None, **arguments: Any) -> sf.Engine:
    """An engine of that network, or of one with its inputs."""
    settings = {"prediction": "v_prediction", "shape": (1, 8, 8), "num_classes": 4, "device": "cpu", **arguments}
    return sf.Engine(Small() if network is None else network, sf.NoiseSchedule.cosine(), **settings)


@pytest.mark.soak  # the quick one is in test_condition_exports.py
@pytest.mark.parametrize("batch", [Batch(1, 2, 8), Batch.fixed(2)], ids=["dynamic", "fixed"])
def test_a_network_in_the_engines_loop(tmp_path: Path, batch: Batch) -> None:
    engine = small()
    export_aoti(engine, tmp_path / "network", batch=batch)
    exported = small(load_aoti(read_bundle(tmp_path / "network"), CPU), batch=batch.low, invariant=True)
    images = engine.sample(3, steps=4, labels=[0, 1, 2])
    torch.testing.assert_close(exported.sample(3, steps=4, labels=[0, 1, 2]), images, rtol=0, atol=1e-4)


# What is refused


def a_bundle(folder: Path, **changes: object) -> Bundle:
    """A verified-looking bundle of an artefact that is none: whatever opens it fails."""
    (folder / "model.pt2").write_bytes(b"not a package")
    spec = Tensorspec("x", "float32", (1,))
    versions = {"torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    files = {"model.pt2": sha256(folder / "model.pt2")}
    manifest = Manifest("aoti", "network", "cpu", "float32", (spec,), (spec,), versions, {}, files)
    return Bundle(replace(manifest, **changes), folder, None, make().spec, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"device": "cuda"}, r"the aoti bundle was made for cuda, and device is cpu"),
        (
            {"versions": {"torch": "1.2.3", "cpu_capability": "AVX2"}},
            rf"made for torch 1.2.3, and torch here is {re.escape(torch.__version__.partition('+')[0])}",
        ),
        (
            {"versions": {"torch": torch.__version__, "cpu_capability": "AVX9"}},
            r"made for a processor with AVX9, and here is one with \w+$",
        ),
        ({"format": "onnx"}, r"holds a network as onnx, and no model.pt2$"),
    ],
)
def test_what_was_made_for_elsewhere_is_refused_unopened(
    tmp_path: Path, changes: dict[str, object], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: object, **__: object) -> None:
        pytest.fail("the artefact was opened")

    monkeypatch.setattr(torch._inductor, "aoti_load_package", opened)
    with pytest.raises(sf.ExportError, match=sentence):
        load_aoti(a_bundle(tmp_path, **changes), "cpu")


def test_what_is_no_package_is_an_error_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(sf.ExportError, match=r"^model.pt2 is no archive that PyTorch wrote: File is not a zip file$"):
        load_aoti(a_bundle(tmp_path), "cpu")


def test_an_archive_without_a_program_is_an_error_in_a_line(tmp_path: Path) -> None:
    bundle = a_bundle(tmp_path)
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        archive.writestr("model/archive_format", "pt2")
    with pytest.raises(sf.ExportError, match=r"^model.pt2 cannot be loaded on cpu: .+$"):
        load_aoti(bundle, "cpu")


@pytest.mark.soak
def test_a_damaged_tick_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    for file in bundled_tick().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    package = tmp_path / "initial_noise.pt2"
    package.write_bytes(package.read_bytes()[:-100])
    with pytest.raises(sf.ExportError, match=r"initial_noise.pt2 has SHA-256 \w+; the manifest says \w+$"):
        read_bundle(tmp_path)


def test_a_function_and_an_existing_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(sf.ExportError, match=r"exists$"):
        export_aoti(make(), tmp_path)
    engine = sf.Engine(smooth, sf.NoiseSchedule.cosine(), shape=(1, 8, 8), device="cpu")
    with pytest.raises(sf.ExportError, match=r"^only a torch.nn.Module can be exported"):
        export_aoti(engine, tmp_path / "out", kind="tick", table=engine.table("ddim", 3))


def test_a_package_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_wrongly(program: object, *, package_path: str, inductor_configs: object) -> None:
        with zipfile.ZipFile(package_path, "w") as archive:
            archive.writestr("model/data/aotinductor/model/model.so", "another program")

    def load_wrongly(*_: object, **__: object) -> Callable[..., torch.Tensor]:
        return lambda x, *_: x

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_wrongly)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", load_wrongly)
    with pytest.raises(sf.ExportError, match=r"^the compiled network differs from the network by"):
        export_aoti(small(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_options_that_this_inductor_has_not_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor refuses every compilation with an option that it does not know."""
    given: list[dict[str, object]] = []

    def package(program: object, *, package_path: str, inductor_configs: dict[str, object]) -> None:
        given.append(inductor_configs)
        with zipfile.ZipFile(package_path, "w") as archive:
            archive.writestr("model/archive_format", "pt2")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", package)
    program = torch.export.export(nn.ReLU(), (torch.zeros(1),))
    to_aoti.compile_program(program, tmp_path / "model.pt2", CPU)
    monkeypatch.setitem(to_aoti._CPU_OPTIONS, "an_option_of_another_release", True)
    to_aoti.compile_program(program, tmp_path / "model.pt2", CPU)
    assert given[0] == given[1] != {}
    assert set(given[0]) <= set(torch._inductor.list_options())


def test_a_compiler_that_fails_is_an_error_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler\nand a long log")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(
        sf.ExportError, match=r"^AOTInductor cannot compile the model: RuntimeError: no C\+\+ compiler$"
    ):
        export_aoti(small(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 5e-3), ("bfloat16", 0.15)])
def test_a_tick_on_a_gpu(tmp_path: Path, dtype: str, allowed: float) -> None:
    engine = make(device="cuda", dtype=dtype)
    table = engine.table("ddim", 6, eta=1.0)
    export_aoti(engine, tmp_path / "tick", kind="tick", table=table)
    bundle = read_bundle(tmp_path / "tick")
    tick, initial_noise = load_aoti(bundle, "cuda"), load_initial_noise(bundle, "cuda")
    index = torch.arange(3, device="cuda")
    seeds, labels = torch.full_like(index, 5), index
    start = initial_noise(seeds, index)
    torch.testing.assert_close(start, InitialNoise(engine.shape)(seeds, index), rtol=0, atol=1e-5)
    values, x = table.on(start.device), start
    with engine.plan.products():  # the tick is a consumer's, whose switches they are
        for row in range(6):
            x = tick(x, torch.full_like(index, row), values.coefficients, values.timesteps, seeds, index, labels)
    expected = engine.sample(3, table, seed=5, labels=[0, 1, 2])
    torch.testing.assert_close(x, expected, rtol=0, atol=allowed)


@pytest.mark.gpu
def test_a_network_on_a_gpu(tmp_path: Path) -> None:
    engine = make(device="cuda", dtype="float32", network="eager")
    export_aoti(engine, tmp_path / "network")
    run = load_package(tmp_path / "network" / "model.pt2", torch.device("cuda", 0))
    x = torch.randn(2, *engine.shape, device="cuda")
    t, labels = torch.tensor([10, 900], device="cuda"), torch.tensor([0, 1], device="cuda")
    with torch.no_grad(), engine.plan.products():
        torch.testing.assert_close(run(x, t, labels), engine.network(x, t, labels), rtol=0, atol=5e-3)
