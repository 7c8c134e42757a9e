"""The command line: what it writes, what it says, and how it stops."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import stepfusion as sf
from stepfusion.commands import env as env_cli
from stepfusion.commands import main as cli
from stepfusion.commands.arguments import execution_options
from stepfusion.commands.labels import chosen_labels
from stepfusion.engine import Engine
from stepfusion.execution.selftest import Check
from stepfusion.kernels import backend
from stepfusion.kernels.cpu import compiler
from stepfusion.kernels.cpu.library import why_not_cpu_kernels
from stepfusion.kernels.cpu.sampling_library import why_not_sampling_kernels
from stepfusion.options import ExecutionOptions
from stepfusion_testing.tiny_model import CLASS_NAMES, NULL_LABEL, SIZE, save_tiny_model

COMMANDS = ("sample", "env", "train", "encode", "reconstruct", "interpolate")
GAP, SCALE = 2, 2


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """A working directory with a small class-conditional model, and one thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STEPFUSION_BACKEND", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    save_tiny_model(tmp_path / "model")


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """Every engine that a command makes."""
    made: list[Engine] = []
    original = Engine.from_pretrained.__func__

    def remember(cls: type[Engine], *args: Any, **kwargs: Any) -> Engine:
        made.append(original(cls, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(Engine, "from_pretrained", classmethod(remember))
    return made


def sample(arguments: str = "") -> None:
    """Run ``stepfusion sample`` on the small model, a few steps, on the CPU; it must succeed."""
    assert cli.main(["sample", "model", "--device", "cpu", "--steps", "3", *arguments.split()]) == 0


def pixels(path: str = "samples.png") -> NDArray[np.uint8]:
    """A picture's pixels."""
    with Image.open(path) as picture:
        return np.array(picture)


def tile(picture: NDArray[np.uint8], row: int, column: int) -> NDArray[np.uint8]:
    """One image out of a grid, in its own size."""
    cell = SIZE * SCALE + GAP
    part = picture[GAP + row * cell :, GAP + column * cell :][: SIZE * SCALE, : SIZE * SCALE]
    return part[::SCALE, ::SCALE]


def names(folder: str = ".") -> set[str]:
    """What is in a folder, hidden files too."""
    return {path.name for path in Path(folder).iterdir()}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, without Triton's interpreter."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "stepfusion", *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)


def test_a_grid_has_its_size_and_its_report(capsys: pytest.CaptureFixture[str]) -> None:
    sample("-n 6")
    cell = SIZE * SCALE + GAP
    assert pixels().shape == (2 * cell + GAP, 3 * cell + GAP)  # three classes and a null label: three columns
    assert names() == {"model", "samples.png"}
    output = capsys.readouterr()
    report, again = output.out.splitlines()
    facts = r"6 images, ddim, eta 0, 3 steps, seed 0, guidance 1, \d+\.\d s, [\d.e+]+ images/s: samples\.png"
    assert re.fullmatch(facts, report)
    assert again == "again: stepfusion sample model --num 6 --seed 0 --steps 3 --device cpu"
    assert output.err == ""  # no progress bar: this is no terminal


def test_one_image_in_one_step_is_singular(capsys: pytest.CaptureFixture[str]) -> None:
    sample("-n 1 --steps 1")
    assert capsys.readouterr().out.startswith("1 image, ddim, eta 0, 1 step, ")


@pytest.mark.parametrize("sampler", ["--sampler ddim", "--eta 1", "--sampler ddpm"])
def test_the_same_command_writes_the_same_bytes(sampler: str) -> None:
    sample(f"-n 4 {sampler} --out a.png")
    sample(f"-n 4 {sampler} --out b.png")
    sample(f"-n 4 {sampler} --out c.png --seed 1")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes() != Path("c.png").read_bytes()


def test_the_command_makes_what_the_library_makes() -> None:
    sample("-n 3 --seed 7 --labels dog --guidance 2 --columns 3")
    engine = Engine.from_pretrained("model", device="cpu")
    images = engine.to_uint8(engine.sample(3, steps=3, seed=7, labels=[1] * 3, guidance=2.0))
    picture = pixels()
    for i, image in enumerate(images[..., 0].numpy()):
        np.testing.assert_array_equal(tile(picture, 0, i), image)


def test_sections_of_timesteps() -> None:
    arguments = ["sample", "model", "--device", "cpu", "--single", "-n", "1", "--labels", "Dog", "--quiet"]
    assert cli.main([*arguments, "--timesteps", "2,1", "--sampler", "ddpm"]) == 0
    engine = sf.Engine.from_pretrained("model", device="cpu")
    table = engine.table("ddpm", timesteps=[50, 49, 0])
    expected = engine.to_uint8(engine.sample(1, table, labels=1))[0].numpy()
    assert np.array_equal(pixels("samples/0-0.png"), expected[:, :, 0])


def test_samplers_guidance_and_labels_change_the_images() -> None:
    variants = ["", "--eta 0.5", "--sampler ddpm", "--guidance 3", "--labels dog", "--labels none", "--steps 4"]
    for i, options in enumerate(variants):
        sample(f"-n 2 {options} --out {i}.png")
    assert len({pixels(f"{i}.png").tobytes() for i in range(len(variants))}) == len(variants)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("dog", [1, 1, 1, 1]),
        ("DOG,0", [1, 0, 1, 0]),
        ("t-shirt/top, cat", [2, 0, 2, 0]),
        ("none", [NULL_LABEL] * 4),
        ("2,none", [2, NULL_LABEL, 2, NULL_LABEL]),
        (str(NULL_LABEL), [NULL_LABEL] * 4),
        (None, [0, 1, 2, 0]),
    ],
)
def test_labels_by_name_and_number(text: str | None, labels: list[int]) -> None:
    assert chosen_labels(Engine.from_pretrained("model", device="cpu"), text, 4) == labels


def test_labels_say_the_same_by_name_and_by_number() -> None:
    sample(f"-n 4 --labels {CLASS_NAMES[0].lower()},{CLASS_NAMES[1]} --out a.png")
    sample("-n 4 --labels 0,1 --out b.png")
    sample("-n 4 --labels 1,0 --out c.png")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes() != Path("c.png").read_bytes()


def test_a_model_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path / "plain", num_class_embeds=None, in_channels=3, out_channels=3)
    assert cli.main(["sample", "plain", "--device", "cpu", "-n", "5", "--steps", "2"]) == 0
    assert pixels().shape == (2 * 18 + 2, 3 * 18 + 2, 3)
    capsys.readouterr()
    assert cli.main(["sample", "plain", "--device", "cpu", "--labels", "0"]) == 1
    assert capsys.readouterr().err == "stepfusion: --labels was given, and this model takes none\n"


@pytest.mark.parametrize(
    ("channels", "told"),
    [(2, "2"), (5, "5"), (4, "4, as the latents of an autoencoder have, which needs its decoder")],
)
def test_images_without_a_picture_are_refused_first(
    channels: int, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_model(tmp_path / "plain", num_class_embeds=None, in_channels=channels, out_channels=channels)
    before = names()
    for options in ("", "--single", "--animate a.gif"):
        assert cli.main(f"sample plain --device cpu {options}".split()) == 1
        sentence = f"pictures have 1 or 3 channels, and this model's images have {told}"
        sentence += "; stepfusion generate --format npz writes arrays"
        assert capsys.readouterr().err == f"stepfusion: {sentence}\n"
    assert names() == before


def test_single_files_are_named_by_seed_and_index(capsys: pytest.CaptureFixture[str]) -> None:
    sample("-n 3 --seed 9 --first-index 40 --single")
    assert names("samples") == {"9-40.png", "9-41.png", "9-42.png"}
    assert pixels("samples/9-41.png").shape == (SIZE, SIZE)
    sample("-n 1 --seed 9 --first-index 43 --single")  # into the same folder
    assert names("samples") == {f"9-{i}.png" for i in (40, 41, 42, 43)}
    assert names() == {"model", "samples"}
    assert " images/s: samples\nagain: stepfusion sample model --num 1 " in capsys.readouterr().out


def test_single_files_and_the_grid_show_the_same() -> None:
    sample("-n 3 --single --out many --animate a.gif")
    sample("-n 3 --columns 3")
    for i in range(3):
        np.testing.assert_array_equal(tile(pixels(), 0, i), pixels(f"many/0-{i}.png"))


@pytest.mark.parametrize(("steps", "frames"), [(1, 1), (7, 7), (60, 40)])
def test_an_animation_ends_in_the_grid(steps: int, frames: int, capsys: pytest.CaptureFixture[str]) -> None:
    sample(f"-n 3 --steps {steps} --animate a.gif --batch 2")
    assert capsys.readouterr().out.splitlines()[0].endswith(" images/s: samples.png, a.gif")
    with Image.open("a.gif") as picture:
        assert picture.n_frames == frames
        picture.seek(frames - 1)
        np.testing.assert_array_equal(np.array(picture.convert("L")), pixels())


def save_picture(path: str, values: NDArray[np.uint8]) -> None:
    Image.fromarray(values).save(path)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral"])
def test_solvers_and_spacing_reach_the_table(sampler: str, capsys: pytest.CaptureFixture[str]) -> None:
    sample(f"-n 2 --sampler {sampler} --spacing karras --single --quiet")
    engine = Engine.from_pretrained("model", device="cpu")
    table = engine.table(sampler, 3, spacing="karras")
    want = engine.to_uint8(engine.sample(2, table, labels=[0, 1])).numpy()
    for i in range(2):
        assert np.array_equal(pixels(f"samples/0-{i}.png").reshape(want[i].shape), want[i])
    sample(f"-n 1 --sampler {sampler}")
    assert table.name in capsys.readouterr().out


def test_a_picture_is_edited(capsys: pytest.CaptureFixture[str]) -> None:
    """A kept part is the picture's to the pixel, and what is written is what the library makes."""
    engine = Engine.from_pretrained("model", device="cpu")
    shape = engine.shape[1:] if engine.shape[0] == 1 else (*engine.shape[1:], engine.shape[0])
    picture = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    grey = np.zeros(engine.shape[1:], dtype=np.uint8)
    grey[2:] = 255
    grey[0] = 127
    save_picture("picture.png", picture)
    save_picture("mask.png", grey)
    sample("-n 2 --image picture.png --mask mask.png --strength 0.6 --single --animate walk.gif")
    assert "2 images" in (said := capsys.readouterr().out)
    assert "2 steps" in said
    image = torch.from_numpy(picture.reshape(*engine.shape[1:], -1)).permute(2, 0, 1)[None].float() / 127.5 - 1
    mask = torch.from_numpy(grey >= 128)[None, None]
    images = engine.sample(2, steps=3, image=image, mask=mask, strength=0.6, labels=[0, 1])
    want = engine.to_uint8(images).numpy()
    for i in range(2):
        written = pixels(f"samples/0-{i}.png").reshape(want[i].shape)
        assert np.array_equal(written, want[i])
        assert np.array_equal(written[:2], picture.reshape(want[i].shape)[:2])
        assert not np.array_equal(written[2:], picture.reshape(want[i].shape)[2:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--image picture.png", "image needs a strength in (0, 1], or a mask, got neither"),
        ("--strength 0.5", "strength needs an image, got none"),
        ("--mask picture.png", "mask needs an image, got none"),
        ("--image picture.png --strength 2", "strength must be a finite number in (0, 1], got 2.0"),
        ("--image wide.png --strength 0.5", f"wide.png is 3 x {SIZE} pixels, and images are {SIZE} x {SIZE}"),
        ("--image text.png --strength 0.5", "text.png is not a sound picture (PNG, JPEG, WebP, BMP or TIFF)"),
        ("--image none.png --strength 0.5", "none.png cannot be read: "),
    ],
)
def test_bad_edits_are_refused_before_any_work(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_picture("picture.png", np.zeros((SIZE, SIZE), dtype=np.uint8))
    save_picture("wide.png", np.zeros((SIZE, 3), dtype=np.uint8))
    Path("text.png").write_text("no picture")
    assert cli.main(["sample", "model", "--device", "cpu", "--steps", "3", *arguments.split()]) == 1
    assert capsys.readouterr().err.startswith(f"stepfusion: {message}")
    assert not Path("samples.png").exists()


def test_columns_and_scale() -> None:
    sample("-n 5 --columns 5 --scale 3")
    assert pixels().shape == (8 * 3 + 2 + 2, 5 * (8 * 3 + 2) + 2)


def test_any_image_alone_with_invariant() -> None:
    sample("-n 8 --labels dog --columns 8 --invariant --batch 4")
    sample("-n 1 --labels dog --first-index 6 --invariant --batch 4 --out alone.png")
    np.testing.assert_array_equal(tile(pixels(), 0, 6), pixels("alone.png"))


def test_execution_options_are_what_the_command_line_says() -> None:
    given = {"device": "cpu", "dtype": "bfloat16", "backend": "reference", "network": "eager", "batch": 3}
    arguments = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    words = ["sample", "model", "--invariant", *arguments]
    args = cli._parser(words).parse_args(words)
    assert execution_options(args) == ExecutionOptions(**given, invariant=True)
    words = ["encode", "model", "a.png"]
    args = cli._parser(words).parse_args(words)  # declares neither --batch nor --invariant
    assert execution_options(args) == ExecutionOptions()


def test_dtype_backend_and_network_reach_the_engine(engines: list[Engine]) -> None:
    sample("-n 2 --dtype bfloat16 --backend reference --network eager --batch 3")
    (engine,) = engines
    plan = engine.plan
    assert (plan.dtype, plan.backend.value, plan.network.value) == (torch.bfloat16, "reference", "eager")
    assert (plan.backend.reason, engine.batch) == ("asked for: eager PyTorch", 3)


def test_the_environment_chooses_the_backend(
    engines: list[Engine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEPFUSION_BACKEND", "reference")
    sample("-n 1")
    assert engines[-1].plan.backend.reason == "asked for by STEPFUSION_BACKEND: eager PyTorch"
    monkeypatch.setenv("STEPFUSION_BACKEND", "")
    sample("-n 1")
    assert engines[-1].plan.backend.reason.startswith("auto: ")
    monkeypatch.setenv("STEPFUSION_BACKEND", "fast")
    sample("-n 1 --backend reference")  # what is said outright goes first
    capsys.readouterr()
    assert cli.main(["sample", "model", "-n", "1", "--device", "cpu"]) == 1
    accepted = "'auto', 'triton', 'cpu', 'reference'"
    assert capsys.readouterr().err == f"stepfusion: STEPFUSION_BACKEND must be one of {accepted}, got 'fast'\n"


def test_triton_on_a_cpu_is_an_error_and_no_fallback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    assert cli.main(["sample", "model", "-n", "1", "--device", "cpu", "--backend", "triton"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("stepfusion: the fused kernels cannot run on cpu: ")
    assert said.err.count("\n") == 1
    assert names() == {"model"}


def test_triton_from_the_environment_is_no_less_strict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    monkeypatch.setenv("STEPFUSION_BACKEND", "triton")
    assert cli.main(["sample", "model", "-n", "1", "--device", "cpu"]) == 1
    assert capsys.readouterr().err.startswith("stepfusion: the fused kernels cannot run on cpu: ")


def test_quiet_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    sample("-n 2 --quiet --animate a.gif")
    assert capfd.readouterr() == ("", "")
    assert names() == {"model", "samples.png", "a.gif"}


@pytest.mark.parametrize(("options", "shown"), [("", True), ("--quiet", False)])
def test_a_terminal_gets_a_progress_bar(
    options: str, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    sample(f"-n 2 {options}")
    assert ("2/2 images" in capsys.readouterr().err) == shown


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    subparsers = next(
        action for action in cli._parser([command])._actions if action.choices and command in action.choices
    )
    for action in subparsers.choices[command]._actions:
        assert action.help, f"{action.dest} has no help"
        assert all(option in text for option in action.option_strings)
        is_off_by_default = action.nargs == 0 or action.dest in ("animate", "class_names")
        if action.option_strings and not action.required and not is_off_by_default:
            assert "default" in action.help, f"{action.option_strings} says no default"


def test_help_lists_the_commands_and_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"\n    {command}\s", text) for command in COMMANDS)
    assert "exit status: 0 done; 1 " in text
    assert "--traceback" in text


def test_help_imports_no_other_folder() -> None:
    """Start-up stays fast: what ``export``, ``bench`` and ``serve`` need is imported when they are named."""
    script = (
        "import json, sys\nfrom stepfusion.commands.main import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    try: main(words)\n    except SystemExit: pass\n"
        "    print(*[name for name in sys.modules if name.startswith('stepfusion.')], file=sys.stderr)"
    )
    heavy = ("stepfusion.export", "stepfusion.bench", "stepfusion.serving.http.", "stepfusion.commands.serve")
    asked = [["--help"], ["sample", "--help"], ["export", "--help"]]  # the last imports what the others must not
    command = [sys.executable, "-P", "-c", script, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {
        words[0]: {name for name in line.split() if name.startswith(heavy)}
        for words, line in zip(asked, done.stderr.splitlines(), strict=True)
    }
    assert found["--help"] == found["sample"] == set()
    assert "stepfusion.export.formats" in found["export"]
    assert "stepfusion.bench.cli" not in found["export"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert (caught.value.code, capsys.readouterr().out) == (0, f"stepfusion {sf.__version__}\n")


def test_traceback_shows_where_an_error_came_from() -> None:
    with pytest.raises(sf.CheckpointError, match="'imagenet' is neither a bundled model"):
        cli.main(["--traceback", "sample", "imagenet"])


def test_what_a_command_fails_of_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = [
        MemoryError(),
        RuntimeError("two\nlines"),
        sf.NonFiniteError("image 3 became non-finite"),
        OSError("odd"),
    ]
    for error, line in zip(errors, ["MemoryError", "two lines", "image 3 became non-finite", "odd"], strict=True):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(Engine, "sample", fail)
        assert cli.main(["sample", "model", "--device", "cpu"]) == 1
        assert capsys.readouterr().err == f"stepfusion: {line}\n"


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only errors that have something to say to a user become one line."""
    monkeypatch.setattr(Engine, "sample", lambda *_, **__: {}["missing"])
    with pytest.raises(KeyError):
        cli.main(["sample", "model", "--device", "cpu"])


def test_env_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env", "--device", "cpu"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    lines = output.out.splitlines()
    for start in (f"stepfusion     {sf.__version__}", f"torch          {torch.__version__}", "device         cpu"):
        assert any(line.startswith(start) for line in lines), start
    assert any(re.match(r"step +(cpu|reference) +auto: ", line) for line in lines)
    reasons = {"fused kernels": why_not_sampling_kernels(), "C++ networks": why_not_cpu_kernels(torch.float32)}
    for name, reason in reasons.items():
        words = r"run here \((prebuilt|compiled on this machine)\)" if reason is None else re.escape(reason)
        assert any(re.fullmatch(rf"{re.escape(name)} .*{words}", line) for line in lines), name
    assert any(re.match(r"self-test +ok +\w+ step against float64: ", line) for line in lines)


def test_env_where_the_kernels_of_networks_cannot_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiler, "instruction_set", lambda: "DEFAULT")
    assert cli.main(["env", "--device", "cpu"]) == 0
    assert "C++ networks   PyTorch uses DEFAULT here, and the C++ kernels need AVX2\n" in capsys.readouterr().out


def test_env_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env", "--json", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert report["versions"]["stepfusion"] == sf.__version__
    assert report["plan"]["device"] == {"value": "cpu", "reason": "asked for"}
    assert set(report["plan"]) == {"device", "network dtype", "step", "network"}
    assert report["self_test"]
    assert all(check["passed"] is True for check in report["self_test"])


@pytest.mark.parametrize("error", [1.0, float("nan")])
@pytest.mark.parametrize("option", [[], ["--json"]])
def test_env_fails_with_its_self_test(
    option: list[str], error: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [Check("good step", 0.0, 0.1), Check("bad step", error, 0.1)]
    monkeypatch.setattr(env_cli, "self_test", lambda device: checks)
    monkeypatch.setattr(env_cli, "why_not_triton", lambda device: None)
    assert cli.main(["env", *option]) == 1
    output = capsys.readouterr()
    assert output.err == "stepfusion: the self-test failed: bad step\n"
    if option:
        report = json.loads(output.out, parse_constant=pytest.fail)
        assert [check["passed"] for check in report["self_test"]] == [True, False]
    else:
        assert "self-test      FAILED  bad step" in output.out


def test_the_module_runs_as_a_program() -> None:
    done = run("sample", "model", "-n", "2", "--steps", "2", "--device", "cpu", "--out", "a.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].endswith(" images/s: a.png")
    assert pixels("a.png").shape == (20, 38)


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_ctrl_c_leaves_what_is_finished() -> None:
    arguments = ["--batch", "8", "--steps", "20", "--device", "cpu", "--single", "--out", "many"]
    command = [sys.executable, "-m", "stepfusion", "sample", "model", "-n", "100000", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not Path("many/0-7.png").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        try:
            output, errors = process.communicate(timeout=30)
        finally:
            process.kill()  # or a process that goes on would hold the test for ever
    assert (process.returncode, output, errors) == (130, "", "stepfusion: interrupted\n")
    assert names() == {"model", "many"}
    written = sorted(Path("many").iterdir())
    assert len(written) >= 8
    assert all(re.fullmatch(r"0-\d+\.png", path.name) for path in written)  # no temporary file
    assert all(pixels(str(path)).shape == (SIZE, SIZE) for path in written)


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize(
    ("number", "status", "line"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_while_writing_leaves_no_half_file(number: int, status: int, line: str) -> None:
    """In a process of its own: other libraries' threads in this one are not made for signals."""
    script = f"""
import os, signal, sys
from stepfusion.commands import main as cli
os.fsync = lambda descriptor: signal.raise_signal({int(number)})
handler = signal.getsignal(signal.SIGTERM)
try:
    given = cli.main(["sample", "model", "-n", "2", "--steps", "2", "--device", "cpu", "--animate", "a.gif"])
except SystemExit as exit_:
    given = exit_.code
assert signal.getsignal(signal.SIGTERM) is handler
sys.exit(given)
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (status, f"stepfusion: {line}\n")
    assert names() == {"model"}
