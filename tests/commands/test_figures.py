"""The commands that draw figures: what each cell holds, what they say, and what they refuse before any work."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

import stepfusion as sf
from stepfusion.checkpoints.save_directory import save_pretrained
from stepfusion.commands import main as cli
from stepfusion.commands.figures import figure
from stepfusion.files.images import save_png
from stepfusion.networks import ContextUNet
from stepfusion_testing.tiny_model import SIZE, save_tiny_model

Pixels = NDArray[np.uint8]
COURSE = {"_class_name": "DDPMScheduler", "num_train_timesteps": 51, "beta_schedule": "linear"}


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """A working directory with a small labelled model, a context model, a photograph and two pictures; one thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STEPFUSION_BACKEND", raising=False)
    save_tiny_model(tmp_path / "model")
    torch.manual_seed(0)
    network = ContextUNet(1, 8, 5, SIZE, 50).eval()
    for heeded in (network.contextembed1.model[2].weight, network.contextembed2.model[2].weight, network.up0[1].bias):
        torch.nn.init.normal_(heeded, std=3)
    for module in (*network.up1.modules(), *network.up2.modules()):
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(0.05)  # as small as what fresh weights make, so that the context is heeded
    names = ("top", "trouser", "dress", "shoe", "bag")
    save_pretrained(tmp_path / "contexts", network, COURSE, class_names=names, null_label=5)
    random = np.random.default_rng(0)
    save_png("photo.png", random.integers(60, 200, (12, 10, 3), dtype=np.uint8))
    for name in ("a.png", "b.png"):
        save_png(name, random.integers(0, 256, (SIZE, SIZE, 1), dtype=np.uint8))


def run(command: str) -> int:
    """One command, on the CPU where it samples."""
    samples = "" if command.startswith("show schedule") else " --device cpu"
    return cli.main((command + samples).split())


def cells(path: str, rows: int, columns: int, height: int, width: int, scale: int = 1) -> Pixels:
    """The cells of a figure, uint8 [rows, columns, H, W, 3], counted from its lower right corner."""
    with Image.open(path) as picture:
        sheet = np.asarray(picture)
    table = sheet[-(rows * (height * scale + 2)) :, -(columns * (width * scale + 2)) :]
    parts = [
        [
            table[i * (height * scale + 2) :, j * (width * scale + 2) :][: height * scale, : width * scale]
            for j in range(columns)
        ]
        for i in range(rows)
    ]
    return np.asarray(parts)[:, :, ::scale, ::scale]


def pixels(engine: sf.Engine, x: torch.Tensor) -> Pixels:
    """Grey images as a figure shows them."""
    return engine.to_uint8(x).numpy().repeat(3, 3)


def engine(model: str = "model") -> sf.Engine:
    return sf.Engine.from_pretrained(model, device="cpu")


def pictures() -> torch.Tensor:
    images = [np.asarray(Image.open(name)) for name in ("a.png", "b.png")]
    return torch.from_numpy(np.stack(images))[:, None].float() / 127.5 - 1


def test_a_figure_names_its_rows_and_columns() -> None:
    random = np.random.default_rng(0)
    shown = list(random.integers(0, 256, (6, 4, 5, 3), dtype=np.uint8))
    sheet = figure(shown, ["one", "two"], ["a", "b\nc", "d"], scale=2)
    save_png("figure.png", sheet)
    np.testing.assert_array_equal(cells("figure.png", 2, 3, 4, 5, scale=2).reshape(6, 4, 5, 3), shown)
    bare = figure(shown, ["", ""], scale=2)
    assert bare.shape == (2 * 10 + 2, 3 * 12 + 2, 3)
    top, left = sheet.shape[0] - bare.shape[0], sheet.shape[1] - bare.shape[1]
    np.testing.assert_array_equal(sheet[top:, left:], bare)
    assert sheet[:top].max() > 200 < sheet[:, :left].max()  # there is writing in both margins
    with pytest.raises(ValueError, match="2 rows and 3 columns needs as many cells, got 5"):
        figure(shown[:5], ["one", "two"], ["a", "b", "c"])


def test_show_schedule_is_q_sample_of_both_schedules() -> None:
    assert run("show schedule --image photo.png --at 0,100,499 --quiet") == 0
    drawn = cells("schedule.png", 2, 3, 12, 10)
    photo = torch.from_numpy(np.asarray(Image.open("photo.png")).copy()).permute(2, 0, 1).double() / 127.5 - 1
    zero = torch.zeros(1, dtype=torch.int64)
    z = sf.kernels.reference.normal(zero, zero, zero, (3, 12, 10))[0].double()
    for row, schedule in enumerate((sf.NoiseSchedule.linear(500), sf.NoiseSchedule.cosine(500))):
        for column, t in enumerate((0, 100, 499)):
            abar = schedule.alphas_cumprod[t]
            noisy = (abar**0.5 * photo + (1 - abar) ** 0.5 * z).clamp(-1, 1).permute(1, 2, 0).numpy()
            assert np.abs((noisy + 1) * 127.5 - drawn[row, column]).max() < 0.51
    errors = np.abs(drawn.astype(int) - drawn[0, 0]).mean(axis=(2, 3, 4))
    assert errors[0, 1] > errors[1, 1]  # cosine keeps more of the picture at t = 100


def test_show_steps_has_a_setting_in_each_cell() -> None:
    assert run("show steps model --steps 2,5 --eta 0,0.5,1 -n 2 --labels cat,dog --seed 3 --scale 1 --quiet") == 0
    drawn = cells("steps.png", 2, 3, SIZE, 2 * SIZE)
    for row, steps in enumerate((2, 5)):
        for column, eta in enumerate((0.0, 0.5, 1.0)):
            x = pixels(engine(), engine().sample(2, steps=steps, eta=eta, labels=[0, 1], seed=3))
            np.testing.assert_array_equal(drawn[row, column], np.concatenate(list(x), axis=1))


def test_show_noise_is_ddpm_with_and_without_its_noise() -> None:
    assert run("show noise model --steps 6 -n 3 --scale 1 --quiet") == 0
    drawn, model = cells("noise.png", 2, 3, SIZE, SIZE), engine()
    table = model.table("ddpm", 6)
    np.testing.assert_array_equal(drawn[0], pixels(model, model.sample(3, table, labels=[0, 1, 2])))
    silent = model.sample(3, table, labels=[0, 1, 2], noise=torch.zeros(6, 3, 1, SIZE, SIZE))
    np.testing.assert_array_equal(drawn[1], pixels(model, silent))
    assert (drawn[0] != drawn[1]).any()


def test_show_context_has_none_each_and_mixtures() -> None:
    assert run("show context contexts --steps 4 -n 2 --mix .5,.5,0,0,0 --mix 0,0,0,0,2 --scale 1 --quiet") == 0
    drawn, model = cells("context.png", 8, 2, SIZE, SIZE), engine("contexts")
    table = model.table("ddpm", 4)
    np.testing.assert_array_equal(drawn[0], pixels(model, model.sample(2, table)))
    np.testing.assert_array_equal(drawn[3], pixels(model, model.sample(2, table, labels=2)))
    mixture = torch.tensor([0.5, 0.5, 0, 0, 0])
    np.testing.assert_array_equal(drawn[6], pixels(model, model.sample(2, table, labels=mixture)))
    assert (drawn[6] != drawn[1]).any()


def test_encode_writes_the_noise(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("encode model a.png b.png --steps 5 --labels dog --noise noise.safetensors --scale 1") == 0
    noise = engine().encode(pictures(), steps=5, labels=[1, 1])
    assert torch.equal(load_file("noise.safetensors")["noise"], noise)
    drawn = cells("encoded.png", 2, 2, SIZE, SIZE)
    np.testing.assert_array_equal(drawn[0], pixels(engine(), pictures()))
    np.testing.assert_array_equal(drawn[1], pixels(engine(), noise / 3))
    assert re.fullmatch(r"mean -?\d\.\d{3}, std \d\.\d{3}, 5 steps: encoded\.png\n", capsys.readouterr().out)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_every_command_reads_a_picture_alike(mode: str, tmp_path: Path) -> None:
    """A picture is converted to the model's channels, whichever command reads it, and by training as well."""
    random = np.random.default_rng(1)
    shape = (SIZE, SIZE) if mode == "L" else (SIZE, SIZE, len(mode))
    values = random.integers(0, 256, shape, dtype=np.uint8)
    if mode == "RGBA":
        values[..., 3] = 255
    Image.fromarray(values, mode).save("given.png")
    Image.open("given.png").convert("L").save("grey.png")
    for name in ("given.png", "grey.png"):
        assert run(f"encode model {name} --steps 3 --noise {name}.safetensors --quiet --out {name}.encoded.png") == 0
        edit = (
            f"sample model --image {name} --strength 0.5 --steps 4 -n 1 --labels cat --quiet --out {name}.edited.png"
        )
        assert run(edit) == 0
    assert Path("given.png.safetensors").read_bytes() == Path("grey.png.safetensors").read_bytes()
    for kind in ("encoded.png", "edited.png"):  # whose texts name the picture
        np.testing.assert_array_equal(*(np.asarray(Image.open(f"{name}.png.{kind}")) for name in ("given", "grey")))


def test_reconstruct_says_how_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("reconstruct model a.png b.png --steps 5,20 --scale 1") == 0
    back = engine().reconstruct(pictures(), steps=20)
    np.testing.assert_array_equal(cells("reconstructed.png", 3, 2, SIZE, SIZE)[2], pixels(engine(), back))
    mean_square = (back - pictures()).square().mean(dim=(1, 2, 3)).double()
    line = capsys.readouterr().out.splitlines()[1]
    found = re.fullmatch(r"20 steps: mean squared error (\S+), PSNR mean (\S+) dB, least (\S+) dB", line)
    decibels = 10 * torch.log10(4 / mean_square)
    expected = [float(mean_square.mean()), float(decibels.mean()), float(decibels.min())]
    np.testing.assert_allclose([float(number) for number in found.groups()], expected, rtol=0.01)


def test_interpolate_between_seeds() -> None:
    assert run("interpolate model --seeds 1,2,3,4 --labels cat,dog --weights 3 --steps 4 --scale 1 --quiet") == 0
    drawn = cells("interpolated.png", 2, 3, SIZE, SIZE)
    np.testing.assert_array_equal(drawn[1], pixels(engine(), engine().interpolate(3, 4, 3, steps=4, labels=1)))


def test_interpolate_between_pictures_begins_and_ends_with_them() -> None:
    assert run("interpolate model --images a.png b.png --weights 3 --steps 20 --scale 1 --quiet") == 0
    drawn = cells("interpolated.png", 1, 3, SIZE, SIZE)[0].astype(int)
    back = pixels(engine(), engine().reconstruct(pictures(), steps=20))
    assert np.abs(drawn[[0, 2]] - back).max() <= 1
    assert np.abs(drawn[1] - back[0]).max() > 20


REFUSED = {
    "show schedule --image none.png": "none.png cannot be read: No such file or directory",
    "show schedule --image photo.png --at 0,500": "--at must be in [0, 499], got 500",
    "show schedule --image photo.png --at 1,x": "--at must be integers in [0, 499], separated by commas, got '1,x'",
    "show schedule --image photo.png --out a.gif": "--out must be a file that ends in .png, got a.gif",
    "show schedule --image photo.png --out no/a.png": "--out no/a.png cannot be written: no is not a directory",
    "show steps model --steps 101": "--steps must be in [1, 100], got 101",
    "show steps model --steps 2 --eta 0,2": "eta must be a finite number in [0, 1], got 2.0",
    "show steps model --steps 2 --eta a": "--eta must be numbers in [0, 1], separated by commas, got 'a'",
    "show steps model --scale 0": "--scale must be in [1, 64], got 0",
    "show noise model -n 0": "--num must be in [1, 64], got 0",
    "show context model": "show context needs a model whose network is a ContextUNet, and model has another",
    "show context contexts --mix 1,2": "--mix must have 5 numbers, one for each class, got '1,2'",
    "show context contexts --mix 1,2,3,4,nan": "--mix must be a finite number in [-10, 10], got nan",
    "encode model photo.png": "photo.png is 10 x 12 pixels, and images are 8 x 8",
    "encode model a.png --noise a.pt": "--noise must be a file that ends in .safetensors, got a.pt",
    "encode model a.png --labels zebra": "--labels must be among numbers from 0 to 3; Cat, Dog, T-shirt/top; none",
    "reconstruct model a.png --steps 0": "--steps must be in [1, 100], got 0",
    "interpolate model --seeds 1,2,3": "--seeds must be pairs, got '1,2,3'",
    "interpolate model --seeds 1,-2": "--seeds must be in [0, 18446744073709551615], got -2",
    "interpolate model --seeds 1,2 --weights 1": "--weights must be in [2, 256], got 1",
    "interpolate nowhere --seeds 1,2": "'nowhere' is neither a bundled model",
}


@pytest.mark.parametrize("command", REFUSED)
def test_refuses_in_one_line_and_writes_nothing(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name for path in Path().iterdir()}
    assert run(command) == 1
    output = capsys.readouterr()
    assert output.err.startswith(f"stepfusion: {REFUSED[command]}"), output.err
    assert output.err.count("\n") == 1
    assert {path.name for path in Path().iterdir()} == before


@pytest.mark.parametrize(
    "command", ["show", "show schedule", "show fractal", "encode model", "interpolate model", "reconstruct"]
)
def test_a_wrong_command_line_is_status_2(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(command.split())
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
