"""``stepfusion env``: versions, devices, which path would run and why, and a self-test."""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

import stepfusion
from stepfusion.checkpoints.bundled import bundled_models
from stepfusion.execution.compiled import why_not_cpu_form
from stepfusion.execution.plan import make_plan
from stepfusion.execution.selftest import Check, self_test, self_test_in_interpreter
from stepfusion.kernels.backend import HAS_TRITON, BackendError, why_not_triton
from stepfusion.kernels.cpu import library
from stepfusion.kernels.cpu.sampling_library import sampling_library_origin, why_not_sampling_kernels

_PACKAGES = ("triton", "numpy", "safetensors", "pillow", "diffusers", "torch-tensorrt")


def add_env_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``stepfusion env``."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")


def run_env(args: argparse.Namespace) -> int:
    """Print what is here; returns 0, or 1 if the self-test found a difference that rounding does not explain."""
    plan = make_plan(args.device, "auto", "auto", "auto")
    versions = {"stepfusion": stepfusion.__version__, "python": platform.python_version()}
    versions |= {"torch": torch.__version__} | {name: _version(name) for name in _PACKAGES}
    checks = self_test(plan.device)
    reason = why_not_triton(plan.device)
    if reason is not None and HAS_TRITON:
        checks.append(self_test_in_interpreter())
    fused = _fused_kernels(plan.device)
    networks = _network_kernels(plan.device)
    if args.json:
        report = {
            "versions": versions,
            "platform": platform.platform(),
            "devices": _devices(),
            "plan": {name: {"value": one.value, "reason": one.reason} for name, one in plan.choices().items()},
            "fused": fused,
            "network_kernels": networks,
            "models": bundled_models(),
            "self_test": [_as_json(check) for check in checks],
        }
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        print("\n".join(f"{name:<14} {text}" for name, text in versions.items()))
        print(f"{'platform':<14} {platform.platform()}")
        print("\n".join(f"{'device':<14} {name}" for name in _devices()))
        print(f"{'models':<14} {', '.join(bundled_models()) or 'none'}\n")
        print("\n".join(plan.lines()))
        print(f"{'fused kernels':<14} {fused}")
        print(f"{'C++ networks':<14} {networks}\n")
        print("\n".join(_line(check) for check in checks))
    failed = [check.name for check in checks if not check.passed]
    if failed:
        print(f"stepfusion: the self-test failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _fused_kernels(device: torch.device) -> str:
    """Whether the fused kernels run on a device, and where their library is from, or why not."""
    if device.type == "cpu":
        return why_not_sampling_kernels() or f"the fused kernels run here ({sampling_library_origin()})"
    return why_not_triton(device) or "the fused kernels run here"


def _network_kernels(device: torch.device) -> str:
    """The same of the C++ kernels of networks; compiles them if this machine has not yet."""
    reason = why_not_cpu_form(device, torch.float32)
    if reason is not None:
        return reason
    try:
        library.load(torch.float32)
    except BackendError as error:
        return str(error)
    origin = library.library_origin(torch.float32) or "compiled for this process"
    return f"the C++ kernels of networks run here ({origin})"


def _as_json(check: Check) -> dict[str, object]:
    """A check for JSON, which has no NaN."""
    error = check.error if math.isfinite(check.error) else None
    return {"name": check.name, "passed": check.passed, "error": error, "allowed": check.allowed}


def _line(check: Check) -> str:
    verdict = "ok" if check.passed else "FAILED"
    return f"{'self-test':<14} {verdict:<7} {check.name}: {check.error:.2g} (allowed {check.allowed:.2g})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    """Every device that PyTorch finds, by name."""
    found = [f"cpu ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found.append(f"cuda:{i} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)")
    return found
