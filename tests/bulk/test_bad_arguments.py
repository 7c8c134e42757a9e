"""What ``stepfusion generate`` refuses, to the letter, with nothing left behind."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from stepfusion.checkpoints.bundled import bundled_models
from stepfusion.commands.main import main
from stepfusion_testing.tiny_model import save_tiny_model

EXAMPLE = "as in: stepfusion generate fashion-mnist --num 1000 --out images"
DEVICES = ", ".join(("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))))
MODELS = ", ".join(bundled_models())
LABELS = "numbers from 0 to 3; Cat, Dog, T-shirt/top; none"


@pytest.fixture(autouse=True)
def _files(place: Path) -> None:
    Path("file").write_text("")
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    Path("two.txt").write_text("0\n1\n")
    Path("horse.txt").write_text("horse\n0\n1\n2\n")
    Path("bytes.txt").write_bytes(b"\xff\xfe\x00")
    np.save("floats.npy", np.zeros(4))
    np.save("high.npy", np.array([0, 1, 2, 4]))
    np.save("objects.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    save_tiny_model(Path("plain"), num_class_embeds=None)
    save_tiny_model(Path("wide"), in_channels=2, out_channels=2, num_class_embeds=None)
    save_tiny_model(Path("latent"), in_channels=4, out_channels=4, num_class_embeds=None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num 4 --out out", f"a model is needed, {EXAMPLE}"),
        ("model --out out", f"--num is needed, {EXAMPLE}"),
        ("model --num 4", f"--out is needed, {EXAMPLE}"),
        ("model --num 0 --out out", "--num must be in [1, 4294967296], got 0"),
        ("model --num 4 --out out --unit 0", "--unit must be in [1, 4294967296], got 0"),
        ("model --num 4 --out out --batch 0", "--batch must be in [1, 1048576], got 0"),
        ("model --num 4 --out out --threads 0", "--threads must be in [1, 1024], got 0"),
        ("model --num 4 --out out --ray local --workers 0", "--workers must be in [1, 65536], got 0"),
        ("model --num 4 --out out --workers 2", "--workers is an option of --ray"),
        ("model --num 3000000 --out out --unit 2",
         "--unit must be at least 3 for 3000000 images (1000000 shards), got 2"),
        ("model --num 4 --out out --seed -1", "--seed must be in [0, 2**64 - 1], got -1"),
        ("model --num 4 --out out --first-index 4294967295",
         "--first-index must be in [0, 4294967292] for 4 images, got 4294967295"),
        ("model --num 4 --out out --sampler ddpm --eta 1",
         "--eta is an option of --sampler ddim, euler_ancestral, dpmpp_2m_sde, dpmpp_3m, tcd and flow_sde, "
         "got --sampler ddpm"),
        ("model --num 4 --out out --eta 2", "eta must be a finite number in [0, 1], got 2.0"),
        ("model --num 4 --out out --spacing karras --timesteps ddim25",
         "--spacing and --timesteps exclude each other, got both"),
        ("model --num 4 --out out --steps 2 --timesteps 1,1", "--steps and --timesteps exclude each other, got both"),
        ("model --num 4 --out out --timesteps 60,1",
         "timesteps '60,1': section 0 has 50 timesteps, and 60 were asked for"),
        ("model --num 4 --out out --timesteps many",
         "timesteps must be a list of integers, or a text like '10,10,5' or 'ddim25', got 'many'"),
        ("model --num 4 --out out --labels horse", f"--labels must be among {LABELS}, got 'horse'"),
        ("model --num 4 --out out --labels 0 --labels-file two.txt",
         "--labels and --labels-file exclude each other, got both"),
        ("model --num 4 --out out --labels-file two.txt",
         "--labels-file must have one label for each of the 4 images, got [2]"),
        ("model --num 4 --out out --labels-file horse.txt", f"--labels-file must be among {LABELS}, got 'horse'"),
        ("model --num 4 --out out --labels-file bytes.txt",
         "--labels-file bytes.txt is not text; accepted are lines of text, or .npy"),
        ("model --num 4 --out out --labels-file floats.npy",
         "--labels-file floats.npy must hold integers, got float64"),
        ("model --num 4 --out out --labels-file high.npy", "--labels-file must have labels from 0 to 3, got 4"),
        ("model --num 2 --out out --labels-file objects.npy",
         "--labels-file objects.npy is not an array: Array can't be memory-mapped: Python objects in dtype."),
        ("model --num 4 --out out --labels-file none.txt", "--labels-file none.txt is missing, or no file"),
        ("plain --num 4 --out out --labels-file two.txt", "--labels-file was given, and this model takes none"),
        ("plain --num 4 --out out --labels 0", "--labels was given, and this model takes none"),
        ("plain --num 4 --out out --guidance 2", "guidance needs a null label, and this engine's model has none"),
        ("wide --num 4 --out out",
         "--format webdataset cannot be used: pictures have 1 or 3 channels, and this model's images have 2;"
         " use --format npz"),
        ("latent --num 4 --out out --format png",
         "--format png cannot be used: pictures have 1 or 3 channels, and this model's images have 4, as the"
         " latents of an autoencoder have, which needs its decoder; use --format npz"),
        ("model --num 4 --out file", "out file is a file; it must be a directory"),
        ("model --num 4 --out full",
         "out full holds notes.txt and no job.json: name a new directory, or one of this command"),
        ("model --num 4 --out no/out", "out no/out cannot be made: {place}/no is not a directory"),
        ("model --num 4 --out out --devices cpu,abacus",
         f"device must be 'auto' or one that PyTorch finds here ({DEVICES}), got 'abacus'"),
        ("model --num 4 --out out --devices cpu,cpu --ray local",
         "--devices must be one kind of device with --ray, such as cuda, got cpu,cpu"),
        ("horse --num 4 --out out", f"'horse' is neither a bundled model ({MODELS}) nor a directory"),
        ("--verify full", "full/job.json is missing"),
        ("model --verify full", "--verify takes a directory, and no model and no --out"),
    ],
)  # fmt: skip
def test_a_command(arguments: str, message: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(place.rglob("*"))
    assert main(["generate", *shlex.split(arguments)]) == 1
    assert capsys.readouterr().err == f"stepfusion: {message.replace('{place}', str(place))}\n"
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    "option", ["--format gif", "--sampler midpoint", "--spacing even", "--dtype int8", "--num many"]
)
def test_what_the_parser_refuses(option: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(shlex.split(f"generate model --num 4 --out out {option}"))
    assert not Path("out").exists()
