"""The tests on a machine that has a GPU and little else: those for the GPU are found, and nothing stops them."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from stepfusion_testing.absent_packages import ABSENT

ROOT = Path(__file__).resolve().parents[1]
GPU_FILES = ("tests/engine/test_gpu.py", "tests/kernels/test_gpu.py", "tests/export/test_aoti.py")


def collect(*arguments: str) -> tuple[int, str]:
    """The exit status of collecting tests in another process, and what it said."""
    # What this process's own workers are told would have pytest-benchmark warn, and warnings are errors.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    plugins = ["-p", "pytest_benchmark.plugin", "-p", "stepfusion_testing.without_packages", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "pytest",
            *plugins,
            "--benchmark-disable",
            "--collect-only",
            "--assert=plain",  # no test runs
            "-q",
            *arguments,
        ],
        cwd=ROOT,
        env={**inherited, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_the_gpu_tests_are_found_without_any_optional_package() -> None:
    status, said = collect("-m", "gpu")
    assert status == 0, said[-3000:]
    assert "error" not in said.splitlines()[-1]
    for file in GPU_FILES:
        assert f"{file}::" in said


def test_a_module_that_needs_one_is_noticed(tmp_path: Path) -> None:
    """The negative control."""
    (tmp_path / "test_needy.py").write_text("import diffusers\n\ndef test_it(): pass\n")
    status, said = collect(str(tmp_path / "test_needy.py"))
    assert status == 2
    assert "No module named 'diffusers'" in said


def test_every_extra_is_hidden() -> None:
    """But those that are wanted on a GPU machine, too, and tools that no test imports."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    kept = {"pytest", "pytest-benchmark", "pytest-xdist", "matplotlib", "setuptools", "ruff", "stepfusion"}
    imported = {"mlcommons-loadgen": "mlperf_loadgen", "opentelemetry-api": "opentelemetry"}
    imported |= {"opentelemetry-sdk": "opentelemetry"}
    imported |= {"mkdocs-material": "material", "mkdocstrings-python": "mkdocstrings"}
    names = {
        re.match(r"[\w.-]+", requirement)[0]  # type: ignore[index]
        for extra in project["optional-dependencies"].values()
        for requirement in extra
    }
    wanted = {imported.get(name, name.replace("-", "_")) for name in names - kept}
    assert wanted <= ABSENT, wanted - ABSENT


def test_this_process_hides_nothing() -> None:
    assert sys.meta_path.count(PathFinder) == 1
