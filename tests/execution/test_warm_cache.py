"""A cache that was filled ahead of time: read where it cannot be written to, at another path, only where it fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import stepfusion as sf
from stepfusion.commands.main import main
from stepfusion.execution import cache, warm_cache
from stepfusion.kernels.cache import compiled_anew, note_compiled
from stepfusion.kernels.cpu import compiler
from stepfusion_testing.networks import labelled, smooth
from stepfusion_testing.read_only import obedient_python, pretend_read_only, ship
from stepfusion_testing.tiny_model import save_tiny_model

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no modes, and compiles nothing")
RUN = ["--device", "cpu", "--backend", "reference", "--network", "eager"]
TEXT = 'extern "C" int seven() { return 7; }'


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    """An empty cache, and a small model beside it."""
    monkeypatch.setenv("STEPFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "model")
    return tmp_path


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "warm.json").read_text(encoding="utf-8"))
    return found


# C++


def needs_a_compiler() -> None:
    try:
        compiler.compiler()
    except compiler.CompilerError as error:
        pytest.skip(str(error))


def test_a_library_is_read_where_it_cannot_be_written(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    needs_a_compiler()
    assert compiler.load("tiny", TEXT, ["-fPIC"]).functions.seven() == 7
    assert "compiling the C++ tiny kernels, once on this machine" in capfd.readouterr().err
    shipped = ship(place / "cache", place / "elsewhere")
    monkeypatch.setenv("STEPFUSION_CACHE", str(shipped))
    pretend_read_only(monkeypatch, shipped)
    known = compiled_anew()
    assert compiler.load("tiny", TEXT, ["-fPIC"]).functions.seven() == 7
    assert (capfd.readouterr().err, compiled_anew()) == ("", known)
    lacking = compiler.load("tiny", TEXT.replace("7", "8"), ["-fPIC"]).functions
    assert lacking.seven() == 8, "what it lacks is compiled"
    assert "for this process alone: no cache can be written" in capfd.readouterr().err
    assert compiled_anew() == (*known, "the C++ tiny kernels")
    assert len(list(shipped.rglob("*.so"))) == 1


def test_a_library_that_others_may_have_written_is_not_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_a_compiler()
    compiler.load("tiny", TEXT, ["-fPIC"])
    pretend_read_only(monkeypatch, place / "cache")
    (place / "cache").chmod(0o777)
    known = len(compiled_anew())
    with pytest.warns(RuntimeWarning, match="is not used, for code in it would be run: others may write"):
        compiler.load("tiny", TEXT, ["-fPIC"])
    assert len(compiled_anew()) == known + 1


# Inductor and Triton


def test_inductor_works_in_links_where_it_cannot_write(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = place / "cache" / cache.inductor_folder()
    (shipped / "ab").mkdir(parents=True)
    (shipped / "locks").mkdir()
    (shipped / "ab" / "code.so").write_text("code")
    (shipped / "locks" / "code.lock").touch()
    pretend_read_only(monkeypatch, place / "cache")
    with cache.compiler_cache():
        used = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        assert used != shipped
        assert (used / "ab" / "code.so").readlink() == shipped / "ab" / "code.so"
        assert sorted(path.name for path in used.rglob("*")) == ["ab", "code.so", "locks"]
        (used / "ab" / "more.so").touch()
        assert used.stat().st_mode & 0o077 == 0
    with cache.compiler_cache():
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(used), "one for all networks of a process"
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert not (shipped / "ab" / "more.so").exists()


@pytest.mark.parametrize("writable", [True, False])
def test_tritons_groups_name_files_where_they_are_now(
    writable: bool, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    kernel = place / "cache" / "triton" / "KEY"
    kernel.mkdir(parents=True)
    (kernel / "step.cubin").write_text("code")
    (kernel / "__grp__step.json").write_text(json.dumps({"child_paths": {"step.cubin": "/gone/KEY/step.cubin"}}))
    (kernel / "__grp__other.json").write_text("[]")
    if not writable:
        pretend_read_only(monkeypatch, place / "cache")
    cache.use_triton_cache()
    used = Path(os.environ["TRITON_CACHE_DIR"])
    assert (used == kernel.parent) == writable
    listed = json.loads((used / "KEY" / "__grp__step.json").read_text())["child_paths"]
    assert listed == {"step.cubin": str(used / "KEY" / "step.cubin")}
    assert Path(listed["step.cubin"]).read_text() == "code"
    assert ("/gone/" in (kernel / "__grp__step.json").read_text()) != writable


def test_tritons_own_directory_is_left_to_its_user(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/theirs")
    cache.use_triton_cache()
    assert os.environ["TRITON_CACHE_DIR"] == "/theirs"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.delenv("STEPFUSION_CACHE")
    cache.use_triton_cache()
    assert "TRITON_CACHE_DIR" not in os.environ


# The manifest


def test_the_command_says_what_it_was_for(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warm", "model", "--batch", "1", "3", "--lanes", "2", "--out", "shipped", *RUN]) == 0
    assert "model, batch 1, 3, 2 lanes, cpu float32, network eager" in capsys.readouterr().out
    (run,) = manifest(place / "shipped")["runs"]
    assert (run["model"], run["batches"], run["lanes"], run["guided"]) == ("model", [1, 3], 2, True)
    assert run["environment"]["torch"] == torch.__version__
    assert main(["warm", "model", "--batch", "1", "3", "--lanes", "2", "--out", "shipped", *RUN, "--quiet"]) == 0
    assert main(["warm", "model", "--batch", "4", "--out", "shipped", *RUN, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert [one["batches"] for one in manifest(place / "shipped")["runs"]] == [[1, 3], [4]]
    assert os.environ["STEPFUSION_CACHE"] == str(place / "cache")
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (place / "shipped").rglob("*"))


@pytest.mark.soak
def test_an_exported_network_is_warmed_too(place: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert main(["export", "model", "--format", "onnx", "--out", "bundle", "--quiet"]) == 0
    assert main(["warm", "bundle", "--out", "shipped", "--backend", "reference", "--quiet"]) == 0
    assert manifest(place / "shipped")["runs"][0]["network"] == "eager"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "model"], "--out must be a new or empty directory, or one with a warm.json"),
        (["--out", "file"], "--out must be a directory, and"),
        (["--out", "none/cache"], "none is not a directory"),
        (["--batch", "0"], "--batch and --lanes must be in [1, 1048576], got 0"),
        (["--lanes", "0"], "--batch and --lanes must be in [1, 1048576], got 0"),
        (["--out", "open/cache"], "cannot be used: others may write to"),
    ],
)
def test_what_cannot_be_filled_is_refused(
    words: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "open").mkdir()
    (place / "open").chmod(0o777)
    (place / "file").touch()
    before = sorted(place.rglob("*"))
    assert main(["warm", "model", *words, *RUN]) == 1
    assert message in capsys.readouterr().err
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("existed", [True, False])
def test_what_fails_leaves_no_cache_behind(
    existed: bool, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if existed:
        (place / "shipped").mkdir()
    before = sorted(place.rglob("*"))
    assert main(["warm", "nowhere", "--out", "shipped", *RUN]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert sorted(place.rglob("*")) == before
    assert main(["warm", "model", "--out", "shipped", *RUN]) == 0
    kept = sorted(place.rglob("*"))
    assert main(["warm", "nowhere", "--out", "shipped", *RUN]) == 1
    assert sorted(place.rglob("*")) == kept, "what others made there stays"


def engine(network: Any = smooth) -> sf.Engine:
    return sf.Engine(
        network, sf.NoiseSchedule.linear(100), shape=(1, 4, 4), device="cpu", backend="reference", network="eager"
    )


def cache_line() -> str | None:
    return next((line for line in engine().explain().splitlines() if line.startswith("cache ")), None)


def test_a_cache_that_fits_is_not_spoken_of_before_something_is_compiled(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepfusion.kernels.cache._COMPILED", [])
    assert cache_line() is None
    run = sf.warm(engine(), [2], name="smooth")
    assert (run.model, run.compiled, run.guided) == ("smooth", [], False)
    assert cache_line() == f"cache          warm          {place / 'cache'}: nothing was compiled anew"
    note_compiled("the network")
    assert cache_line() == f"cache          partly warm   {place / 'cache'}: compiled anew: the network"
    assert capsys.readouterr().err == ""
    warm_cache.tell_compiled(["the network"])
    line = (
        f"stepfusion: compiled anew: the network; {place / 'cache'} has smooth, batch 2, cpu float32, network eager\n"
    )
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("field", ["stepfusion", "torch", "triton", "python", "system", "instructions"])
def test_a_cache_for_something_else_is_named_in_one_line(
    field: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sf.warm(engine())
    found = manifest(place / "cache")
    here = found["runs"][0]["environment"][field]
    found["runs"][0]["environment"][field] = "another"
    (place / "cache" / "warm.json").write_text(json.dumps(found))
    assert engine().sample(1, steps=2).isfinite().all()
    line = (
        f"does not fit: it was made with {field} another, and here is {here or 'none'}; what is missing is compiled"
    )
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1
    assert f"{field} another" in (cache_line() or "")
    assert capsys.readouterr().err == "", "once"


def test_another_gpu_matters_on_a_gpu_alone() -> None:
    here = warm_cache.environment_here("eager").model_copy(update={"gpu": "one"})
    there = here.model_copy(update={"gpu": "another"})
    assert there.differences(here, on_gpu=False) == []
    assert there.differences(here, on_gpu=True) == ["gpu another, and here is one"]


def test_what_inductor_compiled_is_for_more_than_pytorchs_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    before = {network: warm_cache.environment_here(network) for network in ("cpp", "compile")}
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    assert before["cpp"] == warm_cache.environment_here("cpp")
    assert before["compile"] != warm_cache.environment_here("compile")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2, "runs": []}', '{"format": 1, "runs": [], "more": 1}'])
def test_a_damaged_manifest_stops_nobody(text: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "cache").mkdir(mode=0o700)
    (place / "cache" / "warm.json").write_text(text)
    assert engine().sample(1, steps=2).isfinite().all()
    assert "warm.json" in capsys.readouterr().err
    with pytest.raises(warm_cache.WarmCacheError, match=r"warm\.json"):
        sf.warm(engine())


def test_every_kind_of_batch_is_walked(place: Path) -> None:
    seen: list[int] = []

    def network(x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        out: torch.Tensor = labelled(x, timesteps, labels)
        return out

    made = sf.Engine(
        network,
        sf.NoiseSchedule.linear(100),
        shape=(1, 4, 4),
        num_classes=4,
        null_label=3,
        device="cpu",
        backend="reference",
        network="eager",
    )
    assert sf.warm(made, [1, 3]).guided
    assert set(seen) == {1, 2, 4, 8}, "buckets of 1 and 4 lanes, and twice that with guidance"
    with pytest.raises(ValueError, match="batches"):
        sf.warm(made, [0])


# All of it, compiled


USE = """
import sys
import torch
import stepfusion as sf

class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, timesteps):
        return torch.nn.functional.gelu(self.inner(x)) * timesteps.view(-1, 1, 1, 1).cos()

torch.manual_seed(0)
schedule = sf.NoiseSchedule.linear(100)
made = sf.Engine(Network(), schedule, shape=(1, 8, 8), device="cpu", dtype="float32", network="compile")
if sys.argv[1] == "warm":
    sf.warm(made, [2])
made.sample(int(sys.argv[2]), steps=2)
print(next(line for line in made.explain().splitlines() if line.startswith("cache ")))
"""


@pytest.mark.soak
def test_a_process_compiles_nothing_that_the_image_has(tmp_path: Path) -> None:
    """In a read-only directory at another path: kernels in C++, and a network by Inductor."""
    needs_a_compiler()
    (tmp_path / "made").mkdir(mode=0o700)

    def use(python: list[str], where: Path, *words: str) -> tuple[str, str]:
        environment = {**os.environ, "STEPFUSION_CACHE": str(where), "PYTHONSAFEPATH": "1"}
        environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
        command = [*python, "-c", USE, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout, done.stderr

    said, log = use([sys.executable], tmp_path / "made", "warm", "2")
    assert "the C++ sampling kernels, the network for float32 [2, 1, 8, 8]" in said
    assert "compiling the C++ sampling kernels" in log
    shipped = ship(tmp_path / "made", tmp_path / "shipped")
    said, log = use(obedient_python(), shipped, "use", "2")
    assert "warm          " in said
    assert "nothing was compiled anew" in said
    assert log == ""
    said, log = use(obedient_python(), shipped, "use", "4")
    assert "compiled anew: the network for float32 [4, 1, 8, 8]" in said
    assert "stepfusion: compiled anew: the network for float32 [4, 1, 8, 8]; " in log
