"""A wheel with the C++ kernels compiled, for this platform and PyTorch, if ``STEPFUSION_PREBUILT`` is 1.

Everything else is in pyproject.toml. PyTorch has to be installed where the wheel is built: ``make wheel PREBUILT=1``.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


class _Prebuilt(build_py):
    def run(self) -> None:
        super().run()
        built = Path(self.build_lib).absolute()
        folder = built / "stepfusion" / "kernels" / "cpu" / "prebuilt"
        command = [sys.executable, "-PB", "-m", "stepfusion.kernels.cpu.prebuild", str(folder)]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": str(built)}, check=True)


class _OfOnePlatform(Distribution):
    def has_ext_modules(self) -> bool:
        return True


class _AnyPython(bdist_wheel):
    """Python does not link the libraries: ctypes loads them."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if os.environ.get("STEPFUSION_PREBUILT") == "1":
    setup(distclass=_OfOnePlatform, cmdclass={"build_py": _Prebuilt, "bdist_wheel": _AnyPython})
else:
    setup()
