"""Jobs with prompts: an image each, the same bytes however often a job stops, and files that are refused."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import stepfusion as sf
from stepfusion.bulk import prompts as prompts_of_jobs
from stepfusion.bulk.manifest import Manifest
from stepfusion.commands.main import main
from stepfusion_testing.bulk_jobs import finished, generate, run_in, start, tree
from stepfusion_testing.stable_diffusion import save_lora, save_stable_diffusion

PROMPTS = ["cat on dog", "", "dog sat", "a cat sat on a dog", "Zoë sat", "cat on dog", "--dog"]
JOB = "generate latent --prompts prompts.txt --unit 3 --steps 2 --batch 2 --threads 1 --quiet --format npz --out"


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of Stable Diffusion."""
    return save_stable_diffusion(tmp_path_factory.mktemp("latent") / "model")


@pytest.fixture(autouse=True)
def _files(place: Path, latent: Path) -> None:
    (place / "latent").symlink_to(latent)
    write(PROMPTS)


def write(prompts: list[str], end: str = "\n") -> None:
    Path("prompts.txt").write_bytes("".join(prompt + end for prompt in prompts).encode())


def test_images_are_those_of_their_prompts(latent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(f"{JOB} out --guidance 3 --negative on --seed 5")
    engine = sf.Engine.from_pretrained("latent", device="cpu", batch=2)
    x = engine.sample(prompt=PROMPTS[:3], negative_prompt="on", guidance=3.0, steps=2, seed=5)
    first = np.load("out/images/000000.npz")["arr_0"]
    assert first.shape == (3, 16, 16, 3)
    np.testing.assert_array_equal(first, engine.to_uint8(x).numpy())
    job = json.loads(Path("out/job.json").read_text())
    assert (job["num"], job["negative"], job["shape"]) == (7, "on", [3, 16, 16])
    assert Path("out/prompts.txt").read_text(encoding="utf-8").splitlines() == PROMPTS
    settings = json.loads(Path("out/engine.json").read_text())
    assert {"transformers", "tokenizers", "diffusers"} <= settings["versions"].keys()
    assert main(["generate", "--verify", "out", "--quiet"]) == 0
    assert len({image.tobytes() for image in first}) == 3

    shutil.copytree(latent, "other")
    path = Path("other/text_encoder/model.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    generate(f"{JOB.replace('latent', 'other')} out --guidance 3 --negative on --seed 5", status=1)
    assert "was started with other settings: model was " in capsys.readouterr().err


def test_lora_files_are_part_of_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    write(PROMPTS[:2])
    save_lora(Path("style.safetensors"), Path("latent"))
    generate(f"{JOB} out --lora style.safetensors:0.5")
    engine = sf.Engine.from_pretrained("latent", lora={"style.safetensors": 0.5}, device="cpu", batch=2)
    images = engine.to_uint8(engine.sample(prompt=PROMPTS[:2], steps=2, seed=0)).numpy()
    np.testing.assert_array_equal(np.load("out/images/000000.npz")["arr_0"], images)
    for other in ("", " --lora style.safetensors"):  # another scale is another model
        generate(f"{JOB} out{other}", status=1)
        assert "was started with other settings: model was " in capsys.readouterr().err
    generate(f"{JOB} none --lora missing.safetensors", status=1)
    assert "missing.safetensors" in capsys.readouterr().err
    assert not Path("none").exists()


def test_a_job_that_stopped_goes_on_with_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(f"{JOB} whole")
    original, calls = Manifest.append, 0

    def append(self: Manifest, record: Any) -> None:
        nonlocal calls
        original(self, record)
        calls += 1
        if calls < 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Manifest, "append", append)
    generate(f"{JOB} out", status=130)
    generate(f"{JOB} out", status=130)
    assert finished() == 2
    write([*PROMPTS[:-1], "another"])
    generate(f"{JOB} out", status=1)
    assert "was started with other settings: prompts_sha256 was " in capsys.readouterr().err
    write(PROMPTS, end="\r\n")  # the same prompts
    generate(f"{JOB} out")
    assert tree("out") == tree("whole")
    Path("out/prompts.txt").write_text("other\n" * 7)
    generate("generate --verify out", status=1)
    assert "prompts.txt is damaged: its hash is not the one in job.json" in capsys.readouterr().err
    generate(f"{JOB} out")
    assert tree("out") == tree("whole")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--prompts prompts.txt is missing, or no file"),
        (b"", "--prompts prompts.txt has no prompt: it is empty"),
        (b"\n\n", "--prompts prompts.txt has no prompt: it is empty"),
        (b"cat\nd\xffg\n", "--prompts prompts.txt is not UTF-8 text: line 2 has another byte"),
        (b"cat\nd\0g\n", "--prompts prompts.txt must not have a NUL character, got one on line 2"),
        (
            b"cat\n" + b"d" * 10_001,
            "--prompts prompts.txt must have at most 10000 characters on a line, got 10001 on line 2",
        ),
        (b"cat\n" * 21, "--prompts prompts.txt must have at most 20 lines, got 21"),
    ],
    ids=["missing", "empty", "blank", "latin", "nul", "long", "many"],
)
def test_files_that_are_refused(
    content: bytes | None, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prompts_of_jobs, "MOST_PROMPTS", 20)
    Path("prompts.txt").unlink()
    if content is not None:
        Path("prompts.txt").write_bytes(content)
    generate(f"{JOB} out", status=1)
    assert capsys.readouterr().err == f"stepfusion: {message}\n"
    assert not Path("out").exists()


def test_what_does_not_fit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for change, message in (
        (f"{JOB} out --num 3", "--prompts must have one prompt for each of the 3 images, got 7"),
        (JOB.replace("latent", "model") + " out", "--prompts was given, and this model has no text encoder"),
        (
            "generate model --num 3 --negative dog --quiet --out out",
            "--negative was given, and this model has no text encoder",
        ),
    ):
        generate(change, status=1)
        assert capsys.readouterr().err == f"stepfusion: {message}\n"
        assert not Path("out").exists()


@pytest.mark.soak
def test_a_hundred_prompts_killed_five_times(place: Path) -> None:
    numbers = random.Random(12)
    write([" ".join(numbers.choices(["cat", "dog", "on", "sat", "a"], k=4)) + f" {i}" for i in range(100)])
    torch.set_num_threads(1)
    command = JOB.replace("--unit 3", "--unit 5") + " {} --guidance 3 --negative on"
    generate(command.format("whole"))
    for units in sorted(numbers.sample(range(18), 5)):
        process = start(run_in, str(place), command.format("out"))
        while finished() < units and process.is_alive():
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -9
    generate(command.format("out"))
    assert tree("out") == tree("whole")
