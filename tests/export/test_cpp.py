"""The C++ consumer: built with CMake against the installed LibTorch, its pixels compared with the engine's."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import stepfusion as sf
from stepfusion.export.bundle import read_bundle, write_bundle
from stepfusion.export.to_aoti import load_aoti, load_initial_noise
from stepfusion_testing.aoti_bundle import bundled_engine, bundled_tick, consume

SOURCE = Path(__file__).parents[2] / "export" / "cpp"
ARTEFACTS = ("model.pt2", "initial_noise.pt2")
#: Largest difference between compiled and eager images (test_aoti holds the tick to it), in grey levels.
ROUNDING = 5e-5 * 255 / 2


def why_not_built() -> str | None:
    """The reason why nothing can be built here."""
    if shutil.which("cmake") is None:
        return "cmake is not installed"
    if shutil.which("c++") is None and shutil.which("g++") is None:
        return "there is no C++ compiler"
    if torch.version.cuda is not None and shutil.which("nvcc") is None:
        return "LibTorch with CUDA is found by CMake only where the CUDA toolkit is, and nvcc is not"
    return None


pytestmark = [
    pytest.mark.soak,  # Inductor compiles the bundled model's tick for most of a minute
    pytest.mark.skipif(why_not_built() is not None, reason=str(why_not_built())),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The consumer, built."""
    folder = tmp_path_factory.mktemp("cpp")
    configure = ("cmake", "-S", SOURCE, "-B", folder, f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}")
    for command in (configure, ("cmake", "--build", folder)):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "sample"


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run((program, *map(str, arguments)), capture_output=True, text=True, timeout=120)


def with_table(out: Path, table: sf.StepTable) -> Path:
    """The bundled tick with another sampler: no other program."""
    source = read_bundle(bundled_tick())

    def copy(folder: Path) -> None:
        for name in ARTEFACTS:
            shutil.copy(source.path / name, folder)

    write_bundle(out, replace(source.manifest, files={}), copy, table=table)
    return out


def read_ppm(path: Path, n: int, size: int) -> NDArray[np.uint8]:
    """The images of a square grid, uint8 [n, size, size, 3]."""
    magic, shape, largest, data = path.read_bytes().split(b"\n", 3)
    width, height = map(int, shape.split())
    assert (magic, largest) == (b"P6", b"255")
    cells = np.frombuffer(data, np.uint8).reshape(height // size, size, width // size, size, 3)
    return cells.swapaxes(1, 2).reshape(-1, size, size, 3)[:n]


SAMPLERS = [
    ("ddim", {"steps": 10}, 1.0),
    ("ddim", {"steps": 10, "eta": 1.0}, 2.0),
    ("ddpm", {"steps": 6}, 1.0),
    ("ddim", {"steps": 4, "clip": None}, 1.5),
]


@pytest.mark.parametrize(("sampler", "options", "guidance"), SAMPLERS)
def test_its_pixels_are_the_engines(
    program: Path, tmp_path: Path, sampler: str, options: dict[str, float | None], guidance: float
) -> None:
    engine = bundled_engine()
    table = engine.table(sampler, **options)  # type: ignore[arg-type]
    folder, picture = with_table(tmp_path / "bundle", table), tmp_path / "images.ppm"
    seed, labels = 2**63 + 5, [9, 8, 3]  # labels repeat; the seed is negative as int64
    arguments = ("--num", 5, "--index", 7, "--seed", seed, "--labels", "9,8,3", "--guidance", guidance)
    done = run(program, folder, picture, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    pixels = read_ppm(picture, 5, 28)
    assert (pixels == pixels[..., :1]).all()

    indices, condition = range(7, 12), torch.tensor([labels[i % 3] for i in range(5)])
    bundle = read_bundle(folder)
    tick, initial_noise = load_aoti(bundle, "cpu"), load_initial_noise(bundle, "cpu")
    scale = torch.full((5,), guidance)
    same = consume(tick, initial_noise, table, seed - 2**64, indices, condition, scale)
    assert np.array_equal(pixels[..., :1], engine.to_uint8(same).numpy()), "C++ and Python run one program"

    images = engine.sample(table=table, seed=seed, indices=indices, labels=condition, guidance=guidance)
    differs = pixels[..., :1] != engine.to_uint8(images).numpy()
    level = ((images * 0.5 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).double().numpy()
    from_boundary = np.abs(level - np.floor(level) - 0.5)
    assert (from_boundary[differs] <= ROUNDING).all(), "only a level that rounding carries over a boundary may differ"
    assert (np.abs(pixels[..., :1] - level)[differs] <= 0.5 + ROUNDING).all()


def test_without_options_it_draws_the_null_label(program: Path, tmp_path: Path) -> None:
    engine, picture = bundled_engine(), tmp_path / "images.ppm"
    done = run(program, bundled_tick(), picture, "--num", 2)
    assert (done.returncode, done.stderr) == (0, "")
    expected = engine.to_uint8(engine.sample(2, steps=10)).numpy().astype(int)
    assert np.abs(read_ppm(picture, 2, 28)[..., :1] - expected).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--num", "0"), "--num must be from 1 to 64, the bundle's batch, got 0"),
        (("--num", "65"), "--num must be from 1 to 64, the bundle's batch, got 65"),
        (("--seed", "-1"), "--seed must be a number from 0 on, got '-1'"),
        (("--seed", "1x"), "--seed must be a number from 0 on, got '1x'"),
        (("--labels", "3,11"), "--labels must be from 0 to below 11, got 3,11"),
        (("--labels", "3,,4"), "--labels must be a number, got ''"),
        (("--size", "3"), "this tick has no option --size"),
        (("--num",), "usage: sample DIR OUT.ppm [--OPTION VALUE]..."),
    ],
)
def test_bad_options_are_one_sentence(
    program: Path, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    done = run(program, bundled_tick(), tmp_path / "images.ppm", *arguments)
    assert (done.returncode, done.stderr) == (1, f"sample: {sentence}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_bundle_is_one_sentence(program: Path, tmp_path: Path) -> None:
    done = run(program, tmp_path / "nowhere", tmp_path / "images.ppm")
    assert (done.returncode, done.stderr) == (1, f"sample: {tmp_path}/nowhere/manifest.json cannot be read\n")

    folder = with_table(tmp_path / "bundle", bundled_engine().table("ddim", 3))
    manifest = json.loads((folder / "manifest.json").read_text())
    for changed, sentence in (
        ({"kind": "network"}, f"{folder} holds a network as aoti; this program runs a tick as aoti"),
        ({"versions": {"torch": "1.2.3"}}, f"{folder} was made for torch 1.2.3, and LibTorch here is"),
    ):
        (folder / "manifest.json").write_text(json.dumps({**manifest, **changed}))
        done = run(program, folder, tmp_path / "images.ppm")
        assert done.returncode == 1
        assert done.stderr.startswith(f"sample: {sentence}")
        assert done.stderr.count("\n") == 1
    for text, sentence in (("{", "a list or an object in the JSON has no end\n"), ("{}", "the bundle has no ")):
        (folder / "manifest.json").write_text(text)
        done = run(program, folder, tmp_path / "images.ppm")
        assert done.returncode == 1
        assert done.stderr.startswith(f"sample: {sentence}")


def test_it_stays_short() -> None:
    assert len((SOURCE / "sample.cpp").read_text().splitlines()) <= 150
