"""Prompts and sizes on the command line: what is made of them, what files say of them, and what is refused."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import stepfusion as sf
from stepfusion.commands.main import main
from stepfusion.files.png_text import read_texts
from stepfusion.files.provenance import Provenance, command_line
from stepfusion_testing.stable_diffusion import save_stable_diffusion
from stepfusion_testing.tiny_model import save_tiny_model


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of Stable Diffusion."""
    return save_stable_diffusion(tmp_path_factory.mktemp("latent") / "model")


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, latent: Path, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latent").symlink_to(latent)


def run(command: str) -> None:
    assert main(shlex.split(command)) == 0


def facts(path: str) -> dict[str, str]:
    return {name.removeprefix("stepfusion."): text for name, text in read_texts(Path(path).read_bytes()).items()}


def pixels(path: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.asarray(Image.open(path))


def test_prompts_are_taken_in_turn_and_files_say_them(capsys: pytest.CaptureFixture[str]) -> None:
    run(
        "sample latent -n 3 --prompt 'cat on dog' --prompt=-dog --negative 'on, Zoë' --guidance 3 --steps 2 --single "
        "--device cpu --batch 1 --invariant"
    )
    assert ", seed 0, guidance 3, " in capsys.readouterr().out
    engine = sf.Engine.from_pretrained("latent", device="cpu", batch=1, invariant=True)
    prompts = ["cat on dog", "-dog", "cat on dog"]
    x = engine.sample(prompt=prompts, negative_prompt="on, Zoë", guidance=3.0, steps=2)
    for place, wanted in enumerate(engine.to_uint8(x).numpy()):
        np.testing.assert_array_equal(pixels(f"samples/0-{place}.png"), wanted)
    said = facts("samples/0-1.png")
    assert (said["prompt"], said["negative"]) == ("-dog", "on, Zoë")
    program, *words = shlex.split(said["command"])
    assert program == "stepfusion"
    assert main([*words, "--out", "again", "--quiet"]) == 0
    assert Path("again/0-1.png").read_bytes() == Path("samples/0-1.png").read_bytes()
    run("show metadata samples/0-1.png")
    out = capsys.readouterr().out
    assert "\nprompt     -dog\n" in out
    assert "\nnegative   on, Zoë\n" in out


def test_as_many_images_as_prompts_of_another_size() -> None:
    run("sample latent --prompt cat --prompt dog --size 24x16 --steps 2 --device cpu --scale 1 --quiet")
    engine = sf.Engine.from_pretrained("latent", device="cpu", shape=(4, 12, 8))
    images = engine.to_uint8(engine.sample(prompt=["cat", "dog"], steps=2)).numpy()
    sheet = pixels("samples.png")
    assert sheet.shape == (28, 38, 3)
    np.testing.assert_array_equal(sheet[2:26, 2:18], images[0])
    said = facts("samples.png")
    assert json.loads(said["prompt"]) == ["cat", "dog"]
    assert said["size"] == "24x16"
    assert "--num 2 --prompt cat --prompt dog --seed 0 --size 24x16 --steps 2" in said["command"]


def test_pictures_go_through_the_autoencoder(capsys: pytest.CaptureFixture[str]) -> None:
    run("sample latent -n 1 --prompt cat --steps 2 --device cpu --quiet --out a.png")
    run("sample latent -n 1 --prompt dog --image a.png --strength 0.5 --steps 4 --device cpu --quiet --out b.png")
    assert pixels("b.png").shape == (16, 16, 3)
    run("reconstruct latent a.png b.png --prompt cat --prompt dog --steps 20 --device cpu")
    assert "20 steps: mean squared error " in capsys.readouterr().out
    run("interpolate latent --seeds 1,2 --prompt cat --weights 3 --steps 2 --device cpu --quiet")
    engine = sf.Engine.from_pretrained("latent", device="cpu")
    wanted = engine.to_uint8(engine.interpolate(1, 2, 3, steps=2, prompt="cat")).numpy()
    assert wanted.shape == (3, 16, 16, 3)
    large = wanted[2].repeat(2, 0).repeat(2, 1)
    found = np.lib.stride_tricks.sliding_window_view(pixels("interpolated.png"), large.shape)
    assert (found == large).all(axis=(-3, -2, -1)).any()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sample plain --prompt cat", "--prompt was given, and this model has no text encoder"),
        ("sample plain --negative cat", "--negative was given, and this model has no text encoder"),
        ("sample plain --size 8x8", "--size is for models of latents, and the images of this one are 8x8"),
        ("interpolate plain --seeds 1,2 --prompt a", "--prompt was given, and this model has no text encoder"),
        ("sample latent --prompt a --size 16", "--size must be height and width in pixels, as in 512x768, got '16'"),
        ("sample latent --prompt a --size 16x18", "--size must be multiples of 4 for this model, got 16x18"),
        (f"sample latent --prompt {'x' * 10_001}", "prompt must have at most 10000 characters, got 10001"),
        ("sample latent --prompt a --labels 1", "--labels was given, and this model takes none"),
    ],
)
def test_what_is_refused(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(Path("plain"))
    assert main([*shlex.split(command), "--device", "cpu"]) == 1
    assert capsys.readouterr().err == f"stepfusion: {message}\n"
    assert not list(Path().glob("*.png"))


def test_show_model_says_what_a_model_has(capsys: pytest.CaptureFixture[str]) -> None:
    run("show model latent")
    lines = dict(
        line.split(maxsplit=1) for line in capsys.readouterr().out.replace("text enc", "text-enc").splitlines()
    )
    assert lines["conditions"] == "encoder_hidden_states [77, 32]"
    assert lines["images"] == "3x16x16, of latents 4x8x8"
    assert lines["autoencoder"].startswith("2 pixels a latent pixel, scaling 0.18215; decoder of ")
    assert lines["text-encoder"].startswith("a prompt of 77 tokens to encoder_hidden_states [77, 32]; ")
    run("show model fashion-mnist")
    out = capsys.readouterr().out
    assert "\nimages       1x28x28\n" in out
    assert "autoencoder" not in out


def test_a_command_line_survives_any_text() -> None:
    texts = ["-n", "--out", "a 'b' \"c\"", "", "two\nlines", "$HOME", "Zoë"]
    words = shlex.split(command_line("sample", "m", options={"prompt": texts}))
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompt", action="append")
    assert parser.parse_args(words[3:]).prompt == texts
    known = {"model": "m", "sampler": "ddim", "steps": 1, "seeds": [0] * 4, "indices": range(4)}
    for prompts, said in ((["a", "a"], "a"), (["a", "b"] * 2, '["a", "b"] in turn'), (["a", "b"], '["a", "b"]')):
        assert Provenance(**known, prompts=prompts).text()["stepfusion.prompt"] == said  # type: ignore[arg-type]
