"""Pictures in and out of Python: PIL images and files in place of tensors, and files that say what made them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import stepfusion as sf
from stepfusion.commands.main import main
from stepfusion.files.picture_reader import read_any_picture
from stepfusion.files.png_text import read_texts
from stepfusion_testing.tiny_model import save_tiny_model


def half(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    return 0.5 * x


def make_engine(channels: int = 3) -> sf.Engine:
    return sf.Engine(half, sf.NoiseSchedule.linear(100), shape=(channels, 6, 8), device="cpu", backend="reference")


@pytest.fixture
def picture() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(values)


def as_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1


def test_a_picture_a_path_and_a_tensor_are_the_same_image(picture: Image.Image, tmp_path: Path) -> None:
    engine, path = make_engine(), tmp_path / "one.png"
    picture.save(path)
    mask = Image.new("L", (8, 6), 0)
    mask.paste(255, (0, 0, 4, 6))
    asked: dict[str, Any] = {"steps": 6, "strength": 0.5, "seed": 3}
    wanted_mask = torch.zeros(1, 1, 6, 8, dtype=torch.bool)
    wanted_mask[..., :4] = True
    wanted = engine.sample(2, image=as_tensor(picture), mask=wanted_mask, **asked)
    for given in (picture, path, str(path), [picture, path]):
        assert torch.equal(engine.sample(2, image=given, mask=mask, **asked), wanted)
    assert torch.equal(wanted[0, :, :, 4:], as_tensor(picture)[0, :, :, 4:])
    assert len(engine.sample(image=[picture, picture, picture], **asked)) == 3


def test_a_picture_becomes_the_channels_of_the_model(picture: Image.Image) -> None:
    grey = make_engine(1).sample(image=picture, mask=torch.zeros(1, 1, 6, 8), steps=2)
    wanted = torch.from_numpy(np.array(picture.convert("L"))).float() / 127.5 - 1
    assert torch.equal(grey[0, 0], wanted)
    opaque = picture.convert("RGBA")
    opaque.putalpha(0)
    white = make_engine().sample(image=opaque, mask=torch.zeros(1, 1, 6, 8), steps=2)
    assert bool((white == 1).all()), "what is transparent is seen as white"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"image": Image.new("RGB", (9, 6))}, ValueError, "image is 9 x 6 pixels, and images are 8 x 6"),
        ({"image": Image.new("F", (8, 6))}, ValueError, "image is stored with values that are signed, fractional"),
        ({"image": "nowhere.png"}, ValueError, "nowhere.png cannot be read: No such file"),
        (
            {"image": []},
            TypeError,
            "image must be a tensor, a PIL.Image, the path of a picture, or a list of pictures",
        ),
        ({"image": [Image.new("RGB", (8, 6)), 3]}, TypeError, "image must be a tensor, a PIL.Image"),
        ({"image": Image.new("RGB", (8, 6)), "mask": Image.new("L", (6, 8))}, ValueError, "mask is 6 x 8 pixels"),
        ({"mask": Image.new("L", (8, 6)), "strength": None}, ValueError, "mask needs an image"),
    ],
    ids=lambda one: str(one)[:30],
)
def test_wrong_pictures_are_named(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        make_engine().sample(steps=2, **{"strength": 0.5, **given})


def test_images_become_pictures() -> None:
    engine = make_engine()
    x = engine.sample(2, steps=2)
    pictures = sf.to_pil(x)
    assert [one.size for one in pictures] == [(8, 6)] * 2
    np.testing.assert_array_equal(np.stack([np.array(one) for one in pictures]), engine.to_uint8(x).numpy())
    assert sf.to_pil(engine.to_uint8(x))[1].tobytes() == pictures[1].tobytes()
    assert sf.to_pil(torch.zeros(1, 1, 6, 8))[0].mode == "L"
    with pytest.raises(ValueError, match=r"^images must be float \[n, C, H, W\] or uint8 \[n, H, W, C\], got int64"):
        sf.to_pil(torch.zeros(1, 1, 2, 2, dtype=torch.int64))


def test_a_request_is_sampled_as_it_was_made() -> None:
    engine = make_engine()
    asked: dict[str, Any] = {"steps": 3, "eta": 0.5, "seed": [4, 5], "spacing": "karras"}
    request = engine.request(2, **asked)
    assert (request.seeds, request.indices, request.labels) == ([4, 5], [0, 1], None)
    wanted = engine.sample(2, **asked)
    assert torch.equal(engine.sample(request), wanted)
    assert torch.equal(engine.sample(request), wanted), "as often as one likes"
    assert torch.equal(torch.cat(list(engine.generate(request))), engine.to_uint8(wanted))
    with pytest.raises(ValueError, match=r"^a request has its options already, got seed beside it$"):
        engine.sample(request, seed=3)
    with pytest.raises(ValueError, match=r"^a request is sampled by an engine of the model that it was made for"):
        make_engine(1).sample(request)


def test_no_seed_draws_one_that_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    engine = make_engine()
    first, second = engine.request(2, steps=2, seed=None), engine.request(2, steps=2, seed=None)
    assert len(set(first.seeds)) == 1
    assert first.seeds != second.seeds
    assert torch.equal(engine.sample(first), engine.sample(2, steps=2, seed=first.seeds[0]))
    engine.sample(first, progress=True)
    assert f"seed {first.seeds[0]}" in capsys.readouterr().err
    assert engine.request(2, steps=2).seeds == [0, 0], "which is the default"


def test_the_bar_counts_images(capsys: pytest.CaptureFixture[str]) -> None:
    make_engine().sample(3, steps=4, progress=True)
    told = capsys.readouterr().err
    assert "3/3 images" in told
    assert "12/12" not in told
    assert "seed" not in told


def test_saved_images_say_what_makes_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "model")
    engine = sf.Engine.from_pretrained("model", device="cpu", batch=4, invariant=True)
    asked: dict[str, Any] = {"sampler": "dpmpp_2m", "steps": 4, "solver_type": "heun", "spacing": "karras"}
    request = engine.request(2, labels=["dog", "cat"], guidance=2.0, seed=11, **asked)
    x = engine.sample(request)
    files = sf.save_images(x, "out", request, engine)
    assert [str(file) for file in files] == ["out/11-0.png", "out/11-1.png"]
    texts = read_texts(files[1].read_bytes())
    assert texts["stepfusion.class"] == "Cat"
    assert texts["stepfusion.guidance"] == "2"
    again = shlex.split(texts["stepfusion.command"])[1:]
    assert main([*again, "--device", "cpu", "--quiet", "--out", "again"]) == 0
    assert np.array_equal(read_any_picture("again/11-1.png"), read_any_picture(files[1]))
    grid = sf.save_images(x, "grid.png", request, engine, columns=1, scale=2)
    assert read_any_picture(grid[0]).shape == (4 * 8 + 6, 2 * 8 + 4, 1)
    assert "stepfusion.command" not in read_texts(Path("grid.png").read_bytes())
    sf.save_images(x[:1], "bare.png", metadata=False)
    assert read_any_picture("bare.png").shape == (8, 8, 1)
    assert read_texts(Path("bare.png").read_bytes()) == {}


@pytest.mark.parametrize("other", [{"start": torch.zeros(1, 1, 8, 8)}, {"table": True}], ids=str)
def test_what_no_command_makes_has_none(other: dict[str, Any], tmp_path: Path) -> None:
    engine = sf.Engine.from_pretrained(save_tiny_model(tmp_path / "model"), device="cpu")
    other = {"table": engine.table("ddim", 2, clip=None)} if "table" in other else {**other, "steps": 2}
    request = engine.request(1, **other)
    (file,) = sf.save_images(engine.sample(request), tmp_path / "one.png", request, engine)
    assert "stepfusion.command" not in read_texts(file.read_bytes())


def test_wrong_arguments_of_save_images_are_named(tmp_path: Path) -> None:
    x = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"^request must be for the 2 images, got one for 1$"):
        sf.save_images(x, tmp_path / "a", make_engine().request(1, steps=2))
    with pytest.raises(ValueError, match=r"^pictures have 1 or 3 channels, and this model's images have 4"):
        sf.save_images(torch.zeros(1, 4, 4, 4), tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"^images must be a tensor with one image or more, got float32 \[0, 1, 4, 4\]"
    ):
        sf.save_images(x[:0], tmp_path / "a")
    assert not (tmp_path / "a").exists()
