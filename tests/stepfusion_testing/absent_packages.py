"""The packages that a GPU machine need not have, and how a process does without them.

What remains is what the package itself requires, pytest with pytest-benchmark, and matplotlib.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

#: Import names of what pyproject.toml's extras ask for, and of what comes with that.
ABSENT = frozenset(
    (
        "accelerate",
        "anyio",
        "build",
        "diffusers",
        "httpx",
        "httpx2",
        "huggingface_hub",
        "ipykernel",
        "material",
        "mkdocs",
        "mkdocstrings",
        "mlperf_loadgen",
        "mypy",
        "nbclient",
        "nbformat",
        "onnx",
        "onnx_ir",
        "onnxruntime",
        "onnxscript",
        "openai",
        "opentelemetry",
        "openvino",
        "pandas",
        "playwright",
        "schemathesis",
        "shtab",
        "prometheus_client",
        "ray",
        "scipy",
        "starlette",
        "tensorrt",
        "tensorrt_rtx",
        "torch_tensorrt",
        "transformers",
        "uvicorn",
        "xdist",
    )
)


class Without(PathFinder):
    """Finds everything but these packages."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None if fullname.partition(".")[0] in ABSENT else super().find_spec(fullname, path, target)


def hide() -> None:
    """Hide them from this process from now on; those that were imported already are forgotten."""
    sys.meta_path[sys.meta_path.index(PathFinder)] = Without
    for name in [name for name in sys.modules if name.partition(".")[0] in ABSENT]:
        del sys.modules[name]
