"""Bad input to commands: each mistake's error to the letter, before any work, and nothing left behind."""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from stepfusion.commands.main import main
from stepfusion_testing.bad_input import (
    DEVICES,
    MODELS,
    check,
    full_at_last,
    full_disk,
    tree,
)

pytestmark = pytest.mark.usefixtures("bad_input_workspace")


# fmt: off
COMMANDS = [
    ("no command", "", 2, "stepfusion: the following arguments are required: COMMAND (see stepfusion --help)"),
    ("unknown command", "frobnicate", 2, "stepfusion: argument COMMAND: invalid choice: 'frobnicate' ..."),
    ("no model", "sample",
     2, "stepfusion sample: the following arguments are required: model (see stepfusion sample --help)"),
    ("unknown option", "sample model --stepz 3",
     2, "stepfusion: unrecognized arguments: --stepz 3 (see stepfusion --help)"),
    ("fraction of an image", "sample model -n 2.5",
     2, "stepfusion sample: argument -n/--num: invalid int value: '2.5' (see stepfusion sample --help)"),
    ("sampler: unknown", "sample model --sampler midpoint",
     2, "stepfusion sample: argument --sampler: invalid choice: 'midpoint' ..."),
    ("dtype: float64", "sample model --dtype float64",
     2, "stepfusion sample: argument --dtype: invalid choice: 'float64' ..."),
    ("model name: with ../", "sample ../models/fashion-mnist", 1, "stepfusion: ../models/fashion-mnist is missing"),
    ("model name: unknown", "sample imagenet",
     1, f"stepfusion: 'imagenet' is neither a bundled model ({MODELS}) nor a directory"),
    ("model name: a file", "sample model/unet/config.json",
     1, "stepfusion: model/unet/config.json is not a directory"),
    ("n: 0", "sample model -n 0", 1, "stepfusion: --num must be in [1, 1048576], got 0"),
    ("n: negative", "sample model -n -1", 1, "stepfusion: --num must be in [1, 1048576], got -1"),
    ("n: too many", "sample model -n 9999999", 1, "stepfusion: --num must be in [1, 1048576], got 9999999"),
    ("seed: negative", "sample model --seed -1", 1, "stepfusion: --seed must be in [0, 2**64 - 1], got -1"),
    ("seed: 2**64", "sample model --seed 18446744073709551616",
     1, "stepfusion: --seed must be in [0, 2**64 - 1], got 18446744073709551616"),
    ("first index: negative", "sample model -n 2 --first-index -1",
     1, "stepfusion: --first-index must be in [0, 4294967294] for 2 images, got -1"),
    ("first index: too large", "sample model -n 2 --first-index 4294967295",
     1, "stepfusion: --first-index must be in [0, 4294967294] for 2 images, got 4294967295"),
    ("steps: 0", "sample model --steps 0", 1, "stepfusion: steps must be in [1, 100], got 0"),
    ("steps above T", "sample model --steps 101", 1, "stepfusion: steps must be in [1, 100], got 101"),
    ("eta: NaN", "sample model --eta nan", 1, "stepfusion: eta must be a finite number in [0, 1], got nan"),
    ("steps and sections", "sample model --steps 4 --timesteps 2,1",
     1, "stepfusion: --steps and --timesteps exclude each other, got both"),
    ("spacing and sections", "sample model --spacing trailing --timesteps 2,1",
     1, "stepfusion: --spacing and --timesteps exclude each other, got both"),
    ("sections: no stride", "sample model --timesteps ddim77",
     1, "stepfusion: timesteps 'ddim77': no stride through 100 timesteps gives 77"),
    ("eta of ddpm", "sample model --sampler ddpm --eta 1",
     1, "stepfusion: --eta is an option of --sampler ddim, euler_ancestral, dpmpp_2m_sde, dpmpp_3m, tcd "
     "and flow_sde, got --sampler ddpm"),
    ("eta of dpmpp_2m, in bulk", "generate model --num 4 --out out --sampler dpmpp_2m --eta 1",
     1, "stepfusion: --eta is an option of --sampler ddim, euler_ancestral, dpmpp_2m_sde, dpmpp_3m, tcd "
     "and flow_sde, got --sampler dpmpp_2m"),
    ("eta of ddpm, exported", "export model --format onnx --out out --sampler ddpm --eta 1",
     1, "stepfusion: --eta is an option of --sampler ddim, euler_ancestral, dpmpp_2m_sde, dpmpp_3m, tcd "
     "and flow_sde, got --sampler ddpm"),
    ("eta above 1, of euler_ancestral in bulk", "generate model --num 4 --out out --sampler euler_ancestral --eta 2",
     1, "stepfusion: eta must be a finite number in [0, 1], got 2.0"),
    ("labels: unknown name", "sample model --labels bird",
     1, "stepfusion: --labels must be among numbers from 0 to 3; Cat, Dog, T-shirt/top; none, got 'bird'"),
    ("labels: out of range", "sample model --labels 4",
     1, "stepfusion: --labels must be among numbers from 0 to 3; Cat, Dog, T-shirt/top; none, got '4'"),
    ("labels: negative", "sample model --labels -1",
     1, "stepfusion: --labels must be among numbers from 0 to 3; Cat, Dog, T-shirt/top; none, got '-1'"),
    ("labels: one empty", "sample model --labels cat,,dog",
     1, "stepfusion: --labels must be among numbers from 0 to 3; Cat, Dog, T-shirt/top; none, got ''"),
    ("guidance: NaN", "sample model --guidance nan",
     1, "stepfusion: guidance must be a finite number in [0, 10000], got nan"),
    ("guidance: negative", "sample model --guidance=-1",
     1, "stepfusion: guidance must be a finite number in [0, 10000], got -1.0"),
    ("batch: 0", "sample model --batch 0", 1, "stepfusion: batch must be in [1, 1048576], got 0"),
    ("columns: 0", "sample model --columns 0", 1, "stepfusion: --columns must be in [1, 1048576], got 0"),
    ("scale: 0", "sample model --scale 0", 1, "stepfusion: --scale must be in [1, 1048576], got 0"),
    ("scale: an enormous picture", "sample model -n 1 --scale 100000",
     1, "stepfusion: the grid must have at most 1073741824 pixels, got 800000 x 800000: lower --scale or "
        "--num"),
    ("scale: too wide for a GIF", "sample model -n 100 --scale 1000 --animate a.gif",
     1, "stepfusion: a GIF is at most 65535 pixels wide and high, got a grid of 24008 x 272070"),
    ("device: not here", "sample model --device cuda:99",
     1, f"stepfusion: device must be 'auto' or one that PyTorch finds here ({DEVICES}), got 'cuda:99'"),
    ("out: no PNG", "sample model --out grid.jpg", 1, "stepfusion: --out must end in .png, got grid.jpg"),
    ("out: a directory", "sample model --out .",
     1, "stepfusion: --out . is a directory: name a PNG file, or use --single"),
    ("out: no folder", "sample model --out no/where/grid.png",
     1, "stepfusion: --out no/where/grid.png cannot be written: no/where is not a directory"),
    ("out: under a file", "sample model --out model/unet/config.json/grid.png",
     1, "stepfusion: --out model/unet/config.json/grid.png cannot be written: model/unet/config.json is not"
        " a directory"),
    ("out: a file for many", "sample model --single --out model/unet/config.json",
     1, "stepfusion: --out model/unet/config.json is a file, and --single needs a directory"),
    ("out: no folder for many", "sample model --single --out no/where",
     1, "stepfusion: --out no/where cannot be written: no is not a directory"),
    ("animate: no GIF", "sample model --animate a.png",
     1, "stepfusion: --animate must be a file that ends in .gif, got a.png"),
    ("animate: no folder", "sample model --animate no/a.gif",
     1, "stepfusion: --animate no/a.gif cannot be written: no is not a directory"),
    ("env: device", "env --device quantum",
     1, f"stepfusion: device must be 'auto' or one that PyTorch finds here ({DEVICES}), got 'quantum'"),
    ("train: no data", "train nowhere --out run", 1, "stepfusion: nowhere is neither a directory nor an .npz file"),
    ("train: out is a file", "train model --out model/unet/config.json",
     1, "stepfusion: --out model/unet/config.json is a file; it must be a directory"),
    ("train: device", "train model --out run --device quantum",
     1, f"stepfusion: device must be 'auto' or one that PyTorch finds here ({DEVICES}), got 'quantum'"),
    ("train: workers", "train model --out run --workers 0", 1, "stepfusion: --workers must be in [1, 1024], got 0"),
    ("train: export", "train model --out run --export no/where",
     1, "stepfusion: --export no/where cannot be written: no is not a directory"),
    ("train: channels", "train model --out run --channels 0",
     1, "stepfusion: channels[0] must be in [1, 16384], got 0"),
    ("train: learning rate", "train model --out run --learning-rate nan",
     1, "stepfusion: learning_rate must be a finite number in (0, 1], got nan"),
]

# fmt: on


@pytest.mark.usefixtures("no_network_call")
@pytest.mark.parametrize(("arguments", "status", "message"), [c[1:] for c in COMMANDS], ids=[c[0] for c in COMMANDS])
def test_a_command(arguments: str, status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree()
    try:
        given = main(shlex.split(arguments))
    except SystemExit as exit_:  # what argparse does with a wrong command line
        given = exit_.code
    output = capsys.readouterr()
    assert (given, output.out, output.err[-1:]) == (status, "", "\n")
    check(output.err[:-1], message)
    assert tree() == before


@pytest.mark.usefixtures("no_network_call")
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a directory that refuses every file, root's too")
@pytest.mark.parametrize("option", ["--out /proc/a.png", "--animate /proc/a.gif", "--single --out /proc/a"])
def test_an_output_where_nobody_may_write(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree()
    assert main(["sample", "model", *option.split()]) == 1
    name, path = option.split()[-2:]
    reasons = [os.strerror(code) for code in (errno.ENOENT, errno.EACCES, errno.EPERM)]  # root's, then a user's
    assert capsys.readouterr().err in [f"stepfusion: {name} {path} cannot be written: {text}\n" for text in reasons]
    assert tree() == before


@pytest.mark.usefixtures("no_network_call")
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_without_permission(capsys: pytest.CaptureFixture[str]) -> None:
    Path("locked").mkdir(mode=0o555)
    assert main(["sample", "model", "--out", "locked/a.png"]) == 1
    assert capsys.readouterr().err == "stepfusion: --out locked/a.png cannot be written: Permission denied\n"


OUTPUTS = [
    ("--out grid.png", "grid.png"),
    ("--single --out many", "many/5-0.png"),
    ("--single --animate a.gif --out model", "model/5-0.png"),
]


@pytest.mark.parametrize("disk", [full_disk, full_at_last])
@pytest.mark.parametrize(("options", "path"), OUTPUTS, ids=["grid", "single files", "single files in a folder"])
def test_a_full_disk(
    disk: Callable[[pytest.MonkeyPatch], None],
    options: str,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("grid.png").write_bytes(b"the old one")
    before = tree()
    disk(monkeypatch)
    assert main(f"sample model -n 2 --steps 2 --seed 5 {options}".split()) == 1
    assert capsys.readouterr().err == f"stepfusion: {path}: {os.strerror(errno.ENOSPC)}\n"
    assert tree() == before
