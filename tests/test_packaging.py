"""What ships, what an import does, and which folder may import which."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch

import stepfusion
from stepfusion.kernels.cpu.library import why_not_cpu_kernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "engine": "stepfusion",
    "kernels": "stepfusion.kernels",
    "export": "stepfusion.export",
    "bench": "stepfusion.bench",
}
DATA = (
    *("engine/py.typed", "engine/models/*/**/*", "engine/serving/http/form.html"),
    *("kernels/cpu/*.cpp", "kernels/cpu/*.h", "bench/classifier/**/*"),
)
NEVER_EAGER = {"diffusers", "matplotlib", "scipy", "PIL.ImageShow", "onnx", "openvino", "tensorrt", "torch_tensorrt"}
NEVER_EAGER |= {"prometheus_client", "opentelemetry", "mlperf_loadgen", "ray", "transformers", "tokenizers"}


def run_python(*args: str, cwd: Path, stdin: str = "", **env: str) -> str:
    """Run this interpreter as a user would, not as pytest runs, and return what it prints."""
    inherited = {k: v for k, v in os.environ.items() if k not in {"TRITON_INTERPRET", "PYTHONPATH", "PYTHONSAFEPATH"}}
    done = subprocess.run(
        [sys.executable, *args], cwd=cwd, env={**inherited, **env}, input=stdin, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package, by its import name."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


# The wheel


def shipped_path(path: Path, root: Path) -> str:
    """Where a source file stands in the wheel."""
    folder, *rest = path.relative_to(root).parts
    return str(PurePosixPath(*PACKAGES[folder].split("."), *rest))


def wheel_faults(wheel: Path, root: Path) -> dict[str, set[str]]:
    """The files that should ship and do not, and those that do and should not."""
    data = [path for pattern in DATA for path in root.glob(pattern) if path.is_file()]
    expected = {shipped_path(path, root) for path in [*modules(root).values(), *data]}
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    return {"missing": expected - shipped, "stray": shipped - expected}


def copy_sources(to: Path) -> Path:
    """Copy what a build reads, so that it leaves nothing in the repository."""
    skip = shutil.ignore_patterns("__pycache__")
    for folder in [*PACKAGES, "tests"]:
        shutil.copytree(ROOT / folder, to / folder, ignore=skip)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    return to


def build_wheel(root: Path, prebuilt: str = "") -> Path:
    build = "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."
    run_python(*build, cwd=root, PYTHONSAFEPATH="1", STEPFUSION_PREBUILT=prebuilt)
    (wheel,) = (root / "dist").glob("*.whl")
    return wheel


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    """But for a sub-package that pyproject.toml forgets, which is the negative control."""
    root = copy_sources(tmp_path)
    names = modules(root)
    (root / "engine/forgotten").mkdir()
    (root / "engine/forgotten/__init__.py").write_text('"""Not listed in pyproject.toml."""\n')
    wheel = build_wheel(root)
    assert wheel_faults(wheel, root) == {"missing": {"stepfusion/forgotten/__init__.py"}, "stray": set()}
    with zipfile.ZipFile(wheel) as archive:
        (top_level,) = (name for name in archive.namelist() if name.endswith(".dist-info/top_level.txt"))
        assert archive.read(top_level).decode().split() == ["stepfusion"]
    check_installed(wheel, tmp_path / "site", names)


def check_installed(wheel: Path, site: Path, names: dict[str, Path]) -> None:
    """Import every module from an install of the wheel that has lost its data: importing must need none."""
    options = ("-q", "--no-index", "--no-deps", "--no-compile", "--target", str(site))
    run_python("-m", "pip", "install", *options, str(wheel), cwd=ROOT)
    for path in site.joinpath("stepfusion").rglob("*"):
        if path.is_file() and path.suffix != ".py":
            path.unlink()
    script = "import importlib, sys; print(*(importlib.import_module(n).__file__ for n in sys.argv[1:]), sep='\\n')"
    files = run_python("-c", script, *importable(names), cwd=site.parent, PYTHONSAFEPATH="1", PYTHONPATH=str(site))
    assert all(Path(file).is_relative_to(site) for file in files.splitlines()), files


def install(dist: Path, environment: Path) -> None:
    """Install the package by name and version into a fresh environment, whose dependencies are those of this one."""
    run_python("-m", "venv", "--without-pip", str(environment), cwd=dist)
    pip = "-m", "pip", "--python", str(environment / "bin" / "python"), "install", "-q", "--no-index", "--no-deps"
    run_python(*pip, "--find-links", str(dist), f"stepfusion=={stepfusion.__version__}", cwd=dist)
    (packages,) = environment.glob("lib/python*/site-packages")
    ours = [path for path in sys.path if Path(path).name.endswith("-packages")]  # plain paths: no editable install
    (packages / "dependencies.pth").write_text("\n".join(ours))


def run_installed(environment: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program of that environment, beside it."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    command = [str(environment / "bin" / words[0]), *words[1:]]
    options: dict[str, Any] = {"cwd": environment.parent, "capture_output": True, "text": True, "check": True}
    return subprocess.run(command, env={**inherited, **env}, **options)


@pytest.mark.soak
def test_the_wheel_is_installed_by_name_and_version_and_samples(tmp_path: Path) -> None:
    wheel = build_wheel(copy_sources(tmp_path / "sources"))
    assert wheel.name.endswith("-py3-none-any.whl")
    environment = tmp_path / "environment"
    install(wheel.parent, environment)
    assert run_installed(environment, "stepfusion", "--version").stdout == f"stepfusion {stepfusion.__version__}\n"
    where = run_installed(environment, "python", "-c", "import stepfusion; print(stepfusion.__file__)").stdout
    assert Path(where).is_relative_to(environment)
    sample = "sample", "fashion-mnist", "-n", "1", "--steps", "2", "--device", "cpu"
    assert "samples.png" in run_installed(environment, "stepfusion", *sample).stdout
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")


SAMPLE = """
import hashlib, sys
import stepfusion as sf

engine = sf.Engine.from_pretrained("fashion-mnist", device="cpu", network="cpp", dtype=sys.argv[1])
print(hashlib.sha256(engine.sample(2, steps=5, eta=1.0, seed=3).numpy().tobytes()).hexdigest())
print(engine.explain())
"""


@pytest.mark.soak
def test_a_wheel_of_this_platform_needs_no_compiler(tmp_path: Path) -> None:
    """It has every library that this processor can use, and samples the bits of those that are compiled here."""
    wheel = build_wheel(copy_sources(tmp_path / "sources"), prebuilt="1")
    tag, platform = wheel.stem.split("-", 2)[2].rsplit("-", 1)
    assert (tag, platform != "any") == ("py3-none", True)
    faults = wheel_faults(wheel, tmp_path / "sources")
    assert not faults["missing"]
    assert all(
        path.startswith("stepfusion/kernels/cpu/prebuilt/") and path.endswith(".so") for path in faults["stray"]
    )
    environment = tmp_path / "environment"
    install(wheel.parent, environment)
    without = {"CXX": "/no/such/compiler", "STEPFUSION_CACHE": str(tmp_path / "without")}
    compiled = {"STEPFUSION_CXXFLAGS": "-DOTHER", "STEPFUSION_CACHE": str(tmp_path / "compiled")}
    variants = [(torch.float32, {}), (torch.float32, {"ATEN_CPU_CAPABILITY": "avx2"}), (torch.bfloat16, {})]
    for dtype, limit in variants:
        if why_not_cpu_kernels(dtype) is not None:
            continue
        sample = "python", "-c", SAMPLE, str(dtype).removeprefix("torch.")
        found, expected = (run_installed(environment, *sample, **limit, **kind) for kind in (without, compiled))
        assert found.stderr == ""
        assert expected.stderr.count("stepfusion: compiling the C++ ") in (1, 2)
        assert found.stdout.count("prebuilt") == 2, found.stdout
        assert found.stdout == expected.stdout.replace("compiled on this machine", "prebuilt").replace(
            "compiled when first used", "prebuilt"
        )
    plain = run_installed(environment, "stepfusion", "env", **without, ATEN_CPU_CAPABILITY="default")
    assert "the fused kernels in C++ (DEFAULT, prebuilt)" in plain.stdout
    assert not list((tmp_path / "without").rglob("*.so"))
    missing = run_installed(environment, "stepfusion", "env", **{**without, "STEPFUSION_CXXFLAGS": "-DOTHER"}).stdout
    assert missing.count("there is no C++ compiler '/no/such/compiler', which CXX names") == 4, missing


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert stepfusion.__version__ == project["version"] == importlib.metadata.version("stepfusion")


# Names: other libraries own `kernels`, and ours must not stand in their way


@pytest.mark.parametrize("folder", PACKAGES)
def test_folder_names_do_not_resolve_to_the_repository_under_pytest(folder: str) -> None:
    spec = importlib.util.find_spec(folder)
    assert spec is None or not Path(str(spec.origin)).is_relative_to(ROOT)


@pytest.mark.parametrize(("safe_path", "finds_ours"), [("1", False), ("", True)], ids=["safe path", "control"])
def test_safe_path_keeps_the_repository_off_the_path(safe_path: str, finds_ours: bool) -> None:
    script = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else '')"
    origin = run_python("-c", script, cwd=ROOT, PYTHONSAFEPATH=safe_path).strip()
    assert (origin == str(ROOT / "kernels/__init__.py")) == finds_ours


# What an import does

LIST_DEPENDENCIES = """
import importlib, json, sys

names = json.load(sys.stdin)
for name in names:
    importlib.import_module(name)
print(json.dumps([name for name in sys.modules if name not in names and name != "__main__"]))
"""

# The dependencies come first, so that everything after them is the doing of the modules under test.
OBSERVE = """
import contextlib, importlib, json, logging, os, random, signal, sys, threading, warnings

dependencies, names = json.load(sys.stdin)
for name in dependencies:
    with contextlib.suppress(ImportError):  # some stand in sys.modules under names that cannot be imported
        importlib.import_module(name)

import pydantic, torch

type("First", (pydantic.BaseModel,), {})  # the first model of a process has pydantic look for its plugins

TOUCHES = "open os.mkdir os.rename os.remove os.rmdir os.link os.symlink os.truncate os.system os.posix_spawn \
os.fork subprocess.Popen socket.connect tempfile.mkstemp tempfile.mkdtemp".split()
WRITES = os.O_WRONLY | os.O_RDWR
touched = []


def audit(event, args):
    reads_code = event == "open" and not args[2] & WRITES and str(args[0]).endswith((".py", ".pyc"))
    if event in TOUCHES and not reads_code:
        touched.append(f"{event} {args}")


def state():
    loggers = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
    facts = {
        "CUDA context": torch.cuda.is_initialized(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad mode": torch.is_grad_enabled(),
        "determinism": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
        "autotuning": torch.backends.cudnn.benchmark,
        "matmul precision": (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32),
        "cudnn tf32": torch.backends.cudnn.allow_tf32,
        "random state": (hash(random.getstate()), torch.get_rng_state().tolist()),
        "signal handlers": [(s, signal.getsignal(s)) for s in sorted(signal.valid_signals())],
        "warning filters": warnings.filters,
        "log handlers": [(x.name, x.handlers) for x in loggers if x.handlers],
        "root log level": logging.root.level,
        "environment": dict(os.environ),
        "sys.path": sys.path,
        "exception hook": sys.excepthook,
        "threads of Python": threading.active_count(),
    }
    return {key: repr(value) for key, value in facts.items()}


before = state()
sys.addaudithook(audit)
for name in names:
    importlib.import_module(name)
after = state()
print(json.dumps({"touched": touched, "changed": [k for k in before if before[k] != after[k]],
                  "CUDA": torch.cuda.is_initialized()}))
"""


def importable(names: dict[str, Path]) -> list[str]:
    """All but `__main__` modules, whose import is to run them."""
    return [name for name in names if not name.endswith("__main__")]


def observe_import(names: list[str], cwd: Path, **env: str) -> dict[str, Any]:
    """Import modules in a fresh interpreter: what they pull in, which files they touch, what global state changes."""
    dependencies = json.loads(run_python("-c", LIST_DEPENDENCIES, cwd=cwd, stdin=json.dumps(names), **env))
    env |= {"PYTHONDONTWRITEBYTECODE": "1"}
    report: dict[str, Any] = {"eager": sorted(NEVER_EAGER & set(dependencies))}
    return report | json.loads(run_python("-c", OBSERVE, cwd=cwd, stdin=json.dumps([dependencies, names]), **env))


def test_importing_has_no_side_effects(tmp_path: Path) -> None:
    report = observe_import(importable(modules(ROOT)), tmp_path, PYTHONSAFEPATH="1")
    assert report == {"touched": [], "changed": [], "CUDA": False, "eager": []}


RUDE = """
import logging, pathlib, signal, warnings
import scipy, torch
pathlib.Path("settings.json").read_text()
pathlib.Path("cache").write_text("")
torch.set_default_dtype(torch.float64)
torch.rand(1)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
warnings.simplefilter("ignore", ResourceWarning)
logging.basicConfig()
"""


def test_side_effects_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "rude.py").write_text(RUDE)
    report = observe_import(["rude"], tmp_path, PYTHONPATH=str(tmp_path))
    changed = ["default dtype", "random state", "signal handlers", "warning filters", "log handlers"]
    assert report["changed"] == changed
    assert report["eager"] == ["scipy"]
    assert [name in " ".join(report["touched"]) for name in ("settings.json", "cache")] == [True, True]


def test_every_module_says_what_it_is() -> None:
    silent = [name for name, path in modules(ROOT).items() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []
