"""The options of samplers on the command line and over HTTP are those that are declared, as in Python."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import stepfusion as sf
from stepfusion.commands import main as command_line
from stepfusion.commands.arguments import add_sampler_arguments, table_request
from stepfusion.commands.main import main
from stepfusion.files.picture_reader import read_any_picture
from stepfusion.files.png_text import read_texts
from stepfusion.options import TABLE_OPTIONS, table_option
from stepfusion.samplers.registry import OFFERED, options_of
from stepfusion.samplers.table_request import TableRequest
from stepfusion_testing.tiny_model import save_tiny_model

GIVEN: dict[str, tuple[str, Any]] = {  # as typed, and as it arrives
    "sampler": ("unipc", "unipc"),
    "steps": ("7", 7),
    "levels": ("2,1.5,0.25", [2.0, 1.5, 0.25]),
    "timesteps": ("10,10,5", "10,10,5"),
    "guidance_interval": ("0,40", [0.0, 40.0]),
    "lower_order_final": ("no", False),
    "predict_x0": ("yes", True),
}
KINDS: dict[type, tuple[str, Any]] = {int: ("3", 3), float: ("0.5", 0.5)}


def parse(*words: str) -> TableRequest:
    parser = argparse.ArgumentParser()
    add_sampler_arguments(parser)
    return table_request(parser.parse_args(words))


def typed(name: str) -> tuple[str, Any]:
    declared = table_option(name)
    if name in GIVEN:
        return GIVEN[name]
    return (declared.choices[0], declared.choices[0]) if declared.choices else KINDS[declared.kind]


@pytest.mark.parametrize("name", TABLE_OPTIONS)
def test_every_option_is_typed_as_it_is_declared(name: str) -> None:
    text, value = typed(name)
    assert parse(f"--{name.replace('_', '-')}", text).given == {name: value}
    assert parse().given == {}


@pytest.mark.parametrize("name", TABLE_OPTIONS)
def test_every_option_is_a_field_over_http(name: str) -> None:
    requests = pytest.importorskip("stepfusion.serving.http.requests", reason="HTTP needs the extra 'serve'")
    value = [9, 5, 1] if name == "timesteps" else typed(name)[1]
    asked = requests.GenerateRequest.parse(json.dumps({name: value}).encode())
    assert asked.table_request.given == {name: value}
    for wrong in ({}, [[]], "no such", -1 if table_option(name).kind is int else {"x": 1}):
        if wrong == "no such" and name == "sampler":
            continue  # which samplers there are, the model's path says
        with pytest.raises(ValueError, match=f"^{name} must be "):
            requests.GenerateRequest.parse(json.dumps({name: wrong}).encode())


@pytest.mark.parametrize("sampler", OFFERED)
def test_words_of_a_request_are_read_back(sampler: str) -> None:
    names = [name for name in TABLE_OPTIONS if name in ("steps", "reuse") or name in options_of(sampler)]
    names = [name for name in names if name not in ("timesteps", "levels")]
    given: Any = {"sampler": sampler, **{name: typed(name)[1] for name in names}}
    asked = TableRequest(**given)
    words = asked.words()
    assert words is not None
    assert (
        parse(*(word for name, text in words.items() for word in (f"--{name.replace('_', '-')}", str(text)))) == asked
    )


def test_an_option_of_another_sampler_is_refused_before_the_model_is_read() -> None:
    with pytest.raises(ValueError, match=r"^--s-churn is an option of --sampler euler and heun, got --sampler ddim$"):
        parse("--sampler", "ddim", "--s-churn", "3")
    with pytest.raises(
        ValueError, match=r"^order is an option of sampler unipc, deis, ipndm and plms, got sampler ddpm$"
    ):
        TableRequest(sampler="ddpm", order=2).check()
    with pytest.raises(ValueError, match=r"^--steps and --levels exclude each other, got both$"):
        parse("--steps", "3", "--levels", "2,1")


def test_a_request_in_python_takes_the_same_options() -> None:
    schedule = sf.NoiseSchedule.linear(100)
    engine = sf.Engine(lambda x, t: 0.5 * x, schedule, shape=(1, 4, 4), device="cpu", backend="reference")
    asked: Any = {"sampler": "unipc", "steps": 6, "order": 3, "spacing": "karras", "predict_x0": False}
    table = engine.table("unipc", 6, order=3, spacing="karras", predict_x0=False)
    assert engine.request(1, **asked).table.digest == table.digest
    assert torch.equal(engine.sample(2, seed=3, **asked), engine.sample(2, table, seed=3))
    sigma = sf.Engine(lambda x, t: 0.5 * x, sf.SigmaPath(), shape=(1, 4, 4), device="cpu", backend="reference")
    churned = sigma.request(1, sampler="heun", levels=[10.0, 1.0, 0.1], s_churn=3.0).table
    assert churned.digest == sigma.table("heun", levels=[10.0, 1.0, 0.1], s_churn=3.0).digest
    with pytest.raises(ValueError, match=r"^table and spacing exclude each other, got both$"):
        engine.sample(1, table, spacing="karras")


# Noise and seeds


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "model")
    return tmp_path


def test_images_start_from_the_noise_of_a_file(place: Path, one_thread: None) -> None:
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    np.save("noise.npy", noise.numpy())
    save_file({"noise": noise}, "noise.safetensors")
    command = "sample model --single --steps 3 --device cpu --batch 2 --invariant --quiet --labels cat"
    for suffix in ("npy", "safetensors"):
        assert main([*command.split(), "--noise", f"noise.{suffix}", "--out", suffix]) == 0
    engine = sf.Engine.from_pretrained("model", device="cpu", batch=2, invariant=True)
    wanted = engine.to_uint8(engine.sample(start=noise, steps=3, labels="cat")).numpy()
    for image in range(2):
        for suffix in ("npy", "safetensors"):
            np.testing.assert_array_equal(read_any_picture(f"{suffix}/0-{image}.png"), wanted[image])
    texts = read_texts(Path("npy/0-1.png").read_bytes())
    assert texts["stepfusion.noise"] == "noise.npy"
    assert "stepfusion.command" not in texts, "no option takes one noise of a file"


@pytest.mark.parametrize(
    ("write", "name", "message"),
    [
        (lambda path: path.write_bytes(b"\x93NUMPY junk"), "a.npy", "is no sound .npy file"),
        (lambda path: np.save(path, np.array([None, {}])), "a.npy", "is no sound .npy file"),
        (lambda path: np.save(path, np.zeros((2, 1, 8, 8), int)), "a.npy", "must hold floats"),
        (lambda path: np.save(path, np.zeros((2, 1, 8, 9))), "a.npy", "must have shape [N, 1, 8, 8]"),
        (lambda path: np.save(path, np.full((2, 1, 8, 8), np.nan)), "a.npy", "must be finite"),
        (lambda path: save_file({"x": torch.zeros(1)}, path), "a.safetensors", 'must hold a tensor "noise", got x'),
        (lambda path: path.write_bytes(b""), "a.bin", "must be a file that ends in .npy or .safetensors"),
        (lambda path: None, "a.npy", "cannot be read: No such file"),
    ],
)
def test_noise_that_is_none_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], write: Any, name: str, message: str
) -> None:
    write(place / name)
    assert main(["sample", "model", "--noise", name, "--device", "cpu", "--out", "out.png", "--quiet"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("stepfusion: --noise ")
    assert message in said
    assert not (place / "out.png").exists()


def test_a_random_seed_is_drawn_and_told(place: Path, capsys: pytest.CaptureFixture[str], one_thread: None) -> None:
    command = "sample model -n 1 --steps 2 --device cpu --seed"
    assert main([*command.split(), "random", "--out", "a.png"]) == 0
    said = capsys.readouterr().out
    seed = read_texts((place / "a.png").read_bytes())["stepfusion.seed"]
    assert f"seed {seed}," in said
    assert f"--seed {seed} " in said
    assert main([*command.split(), seed, "--out", "b.png"]) == 0
    np.testing.assert_array_equal(read_any_picture("a.png"), read_any_picture("b.png"))
    assert main([*command.split(), "random", "--out", "c.png"]) == 0
    assert read_texts((place / "c.png").read_bytes())["stepfusion.seed"] != seed


# What commands say


def actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [one for sub in dict.fromkeys(action.choices.values()) for one in actions(sub)]
        elif action.dest not in ("help", "version"):
            found.append(action)
    return found


@pytest.mark.parametrize("verb", command_line._COMMANDS)
def test_help_texts_are_more_than_fragments(verb: str) -> None:
    fragments = ("of ", "from ", "with ", "where ", "only ", "at ", "(", "no ")
    for action in actions(command_line._parser([verb])):
        told = action.help or ""
        assert told, action
        assert not told.startswith(fragments), f"{action.option_strings}: {told}"


@pytest.mark.parametrize("quiet", [False, True])
def test_what_is_compiled_is_told_unless_quiet(
    quiet: bool, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("stepfusion.compiling")
    before = logger.level, list(logger.handlers)

    def work(args: argparse.Namespace) -> int:
        logger.info("compiling the network, %d operators", 3)
        return 0

    monkeypatch.setattr(command_line, "_parser", lambda given: _Parser(work, quiet))
    assert main(["env"]) == 0
    said = capsys.readouterr().err
    assert said == ("" if quiet else "stepfusion: compiling the network, 3 operators\n")
    assert (logger.level, list(logger.handlers)) == before


class _Parser:
    """Stands for the parser of a command that does ``work``."""

    def __init__(self, work: Any, quiet: bool) -> None:
        self._found = argparse.Namespace(command=work, quiet=quiet, words_of_environment=[], traceback=False)

    def parse_args(self, given: Any) -> argparse.Namespace:
        return self._found
