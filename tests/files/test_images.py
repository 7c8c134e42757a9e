"""Grids, PNGs and GIFs: every pixel where it belongs, and a file whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stepfusion.files.images import Pixels, grid, grid_size, save_gif, save_png

BACKGROUND = 24


def noise(*shape: int) -> Pixels:
    """Random pixels, none of the background's grey."""
    return np.random.default_rng(0).integers(BACKGROUND + 1, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    ("n", "columns", "scale", "gap", "rows", "used"),
    [(1, None, 1, 2, 1, 1), (6, 4, 1, 2, 2, 4), (9, None, 3, 0, 3, 3), (10, None, 2, 1, 3, 4), (3, 50, 1, 2, 1, 3)],
)
def test_every_image_is_in_its_place(
    n: int, columns: int | None, scale: int, gap: int, rows: int, used: int, channels: int
) -> None:
    pixels = noise(n, 5, 7, channels)
    sheet = grid(pixels, columns=columns, scale=scale, gap=gap)
    assert sheet.dtype == np.uint8
    assert sheet.shape == (rows * (5 * scale + gap) + gap, used * (7 * scale + gap) + gap, channels)
    assert sheet.shape[:2] == grid_size(n, 5, 7, columns=columns, scale=scale, gap=gap)
    found = np.zeros_like(sheet, dtype=bool)
    for i, image in enumerate(pixels):
        top, left = gap + i // used * (5 * scale + gap), gap + i % used * (7 * scale + gap)
        place = np.s_[top : top + 5 * scale, left : left + 7 * scale]
        np.testing.assert_array_equal(sheet[place], np.kron(image, np.ones((scale, scale, 1), dtype=np.uint8)))
        found[place] = True
    assert (sheet[~found] == BACKGROUND).all()


def test_an_empty_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="a grid needs at least one image, got none"):
        grid(noise(0, 5, 7, 1))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_a_png_holds_the_pixels(channels: int, mode: str, tmp_path: Path) -> None:
    pixels = noise(5, 7, channels)
    save_png(tmp_path / "a.png", pixels)
    with Image.open(tmp_path / "a.png") as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", mode, (7, 5))
        np.testing.assert_array_equal(np.asarray(picture).reshape(pixels.shape), pixels)


def test_a_gif_holds_the_frames(tmp_path: Path) -> None:
    frames = list(noise(4, 5, 7, 1))
    save_gif(tmp_path / "a.gif", frames, milliseconds=50, hold=900)
    with Image.open(tmp_path / "a.gif") as picture:
        assert (picture.format, picture.n_frames, picture.info["loop"]) == ("GIF", 4, 0)
        for i, frame in enumerate(frames):
            picture.seek(i)
            assert picture.info["duration"] == (900 if i == 3 else 50)
            np.testing.assert_array_equal(np.asarray(picture.convert("L")), frame[..., 0])


def test_a_gif_in_colour_is_close(tmp_path: Path) -> None:
    """256 colours a frame: flat areas come back as they were."""
    frames = [np.full((5, 7, 3), (10, 200, level), dtype=np.uint8) for level in (0, 100, 255)]
    save_gif(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.n_frames == 3
        picture.seek(2)
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), frames[2])


@pytest.mark.parametrize("channels", [2, 5])
def test_other_channels_are_refused(channels: int, tmp_path: Path) -> None:
    sentence = f"images must have 1, 3 or 4 channels to become a picture, got {channels}"
    with pytest.raises(ValueError, match=sentence):
        save_png(tmp_path / "a.png", noise(5, 7, channels))
    with pytest.raises(ValueError, match=sentence):
        save_gif(tmp_path / "a.gif", [noise(5, 7, channels)])
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    save_png(path, noise(9, 9, 3))
    save_png(path, noise(5, 7, 1))
    with Image.open(path) as picture:
        assert picture.size == (7, 5)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"the old one")

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
        save_png(path, noise(5, 7, 1))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interruption_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.gif"
    path.write_bytes(b"the old one")

    def fsync(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(KeyboardInterrupt):
        save_gif(path, [noise(5, 7, 1)])
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]
