"""Pictures say where they come from, and the command that they name makes them again."""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path

import numpy as np
import pytest

import stepfusion as sf
from stepfusion.commands.main import main
from stepfusion.files.images import save_png
from stepfusion.files.png_text import read_texts
from stepfusion_testing.tiny_model import SIZE, save_tiny_model


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    save_tiny_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    save_png("picture.png", np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE, 1))


def run(command: str) -> None:
    assert main(shlex.split(command)) == 0


def facts(path: str | Path) -> dict[str, str]:
    return {name.removeprefix("stepfusion."): text for name, text in read_texts(Path(path).read_bytes()).items()}


def again(path: str | Path, out: str) -> None:
    """Run the command that a file names."""
    program, *words = shlex.split(facts(path)["command"])
    assert program == "stepfusion"
    assert main([*words, "--out", out, "--quiet"]) == 0


def test_a_grid_says_what_it_is_of(capsys: pytest.CaptureFixture[str]) -> None:
    run("sample model -n 4 --labels dog,cat --guidance 1.5 --seed 7 --steps 3 --first-index 2 --device cpu --quiet")
    weights = hashlib.sha256(Path("model/unet/diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    command = "stepfusion sample model --num 4 --labels 1,0 --guidance 1.5 --seed 7 --first-index 2 --steps 3"
    assert facts("samples.png") == {
        "Software": f"stepfusion {sf.__version__}",
        "model": "model",
        "weights": f"sha256:{weights}",
        "sampler": "ddim, eta 0",
        "steps": "3",
        "seed": "7",
        "index": "2-5",
        "label": "1,0 in turn",
        "class": "Dog,Cat in turn",
        "guidance": "1.5",
        "command": f"{command} --device cpu",
    }
    again("samples.png", "again.png")
    assert Path("samples.png").read_bytes() == Path("again.png").read_bytes()
    run("show metadata samples.png")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"version    stepfusion {sf.__version__}"
    assert lines[-1] == f"command    {facts('samples.png')['command']}"


def test_each_file_has_its_own_command() -> None:
    run("sample model -n 3 --single --invariant --batch 2 --steps 2 --sampler ddpm --seed 3 --device cpu --quiet")
    for i in range(3):
        again(f"samples/3-{i}.png", f"again{i}")
        assert Path(f"samples/3-{i}.png").read_bytes() == Path(f"again{i}/3-{i}.png").read_bytes()
    assert facts("samples/3-2.png")["class"] == "T-shirt/top"


def test_an_edit_names_its_picture_as_it_was_typed() -> None:
    run(
        "sample model -n 1 --image picture.png --strength 0.5 --steps 4 --labels dog --device cpu --quiet --out a.png"
    )
    told = facts("a.png")
    assert (told["image"], told["strength"], told["steps"]) == ("picture.png", "0.5", "2")
    again("a.png", "b.png")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert str(Path.cwd()) not in "".join(told.values())


@pytest.mark.parametrize(
    "command",
    [
        "show schedule --image picture.png --at 0,100",
        "show noise model --steps 2 -n 1 --device cpu",
        "encode model picture.png --steps 2 --device cpu",
        "reconstruct model picture.png --steps 2 --device cpu",
        "interpolate model --seeds 1,2 --steps 2 --weights 2 --device cpu",
    ],
)
def test_figures_name_their_command(command: str) -> None:
    run(f"{command} --quiet --out a.png")
    told = facts("a.png")
    assert told["command"] == f"stepfusion {command} --quiet --out a.png"
    assert ("weights" in told) == (told.get("model") == "model") == (" model " in command)
    again("a.png", "b.png")
    assert facts("b.png")["command"].endswith("--out b.png --quiet")
    run(f"{command} --quiet --out c.png --no-metadata")
    assert read_texts(Path("c.png").read_bytes()) == {}


def test_no_metadata_means_none(capsys: pytest.CaptureFixture[str]) -> None:
    run("sample model -n 1 --steps 2 --device cpu --quiet --no-metadata")
    run("sample model -n 1 --steps 2 --device cpu --quiet --no-metadata --single")
    for path in ("samples.png", "samples/0-0.png"):
        assert read_texts(Path(path).read_bytes()) == {}
        assert main(["show", "metadata", path]) == 1
        assert f"{path} does not say where it comes from" in capsys.readouterr().err


def test_one_image_is_the_picture_itself() -> None:
    from PIL import Image

    run("sample model -n 1 --steps 2 --labels dog --device cpu --quiet")
    engine = sf.Engine.from_pretrained("model", device="cpu")
    wanted = engine.to_uint8(engine.sample(1, steps=2, labels=1, progress=False))[0, ..., 0].numpy()
    np.testing.assert_array_equal(np.asarray(Image.open("samples.png")), wanted)
    run("sample model -n 1 --steps 2 --labels dog --device cpu --quiet --scale 3")
    np.testing.assert_array_equal(np.asarray(Image.open("samples.png")), wanted.repeat(3, 0).repeat(3, 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"GIF89a", "a.png: it is not a PNG file"), (None, "a.png cannot be read: No such file or directory")],
)
def test_what_has_no_metadata_is_one_sentence(
    content: bytes | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        Path("a.png").write_bytes(content)
    assert main(["show", "metadata", "a.png"]) == 1
    assert capsys.readouterr().err == f"stepfusion: {message}\n"


def test_what_others_wrote_steers_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    save_png("a.png", np.zeros((2, 2, 1), np.uint8), {"stepfusion.model": "\x1b[2J\u202ex"})
    run("show metadata a.png")
    assert capsys.readouterr().out == "model      ?[2J?x\n"
