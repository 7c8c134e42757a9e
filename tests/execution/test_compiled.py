"""network="compile": one compilation for each signature, checked against eager, scoped, kept on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from stepfusion.execution import cache, compiled
from stepfusion.execution.compiled import CompiledNetwork, compile_network, describe_difference, known_options
from stepfusion.kernels.cpu.library import why_not_cpu_kernels

CPU = torch.device("cpu")


class Small(nn.Module):
    """A network of one convolution with a condition for each lane: x [B, 3, H, W], condition [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, kernel_size=3, padding=1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return torch.nn.functional.silu(self.conv(x)) + condition[:, :, None, None]


def inputs(batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 8, 8, dtype=dtype), torch.randn(batch, 3, dtype=dtype)


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Dynamo traces and guards as ever, but what it traced runs as it is; the list: each graph's options."""
    seen: list[dict[str, Any]] = []

    def keep(graph: torch.fx.GraphModule, example: list[Tensor], options: dict[str, Any]) -> Callable[..., Any]:
        seen.append(options)
        return graph.forward

    monkeypatch.setattr(torch._inductor, "compile", keep)
    return seen


def distort(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Make the compiler wrong by a factor."""

    def wrong(graph: torch.fx.GraphModule, example: list[Tensor], options: dict[str, Any]) -> Callable[..., Any]:
        return lambda *args: tuple(factor * out for out in graph.forward(*args))

    monkeypatch.setattr(torch._inductor, "compile", wrong)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_network_is_the_eager_one(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPFUSION_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    module = Small().to(dtype).eval()
    network = compile_network(module, CPU, dtype)
    for batch in (2, 3, 2, 3):
        tensors = inputs(batch, dtype)
        with torch.no_grad():
            expected = module(*tensors)
        assert describe_difference(network(*tensors), expected, compiled.TOLERANCE[dtype]) is None
    assert network.compilations == 2
    assert network.failure is None
    assert any((tmp_path / cache.inductor_folder()).rglob("*.so"))
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir())  # PyTorch itself sets its own
    assert not torch._inductor.config.freezing


def test_every_call_runs_what_was_compiled_the_first_too(monkeypatch: pytest.MonkeyPatch) -> None:
    distort(monkeypatch, 1 + 2.0**-10)  # within the tolerance, but to be seen
    module, tensors = Small().eval(), inputs(2)
    network = compile_network(module, CPU, torch.float32)
    with torch.no_grad():
        expected = module(*tensors)
    for _ in range(2):
        assert torch.equal(network(*tensors), expected * (1 + 2.0**-10))


@pytest.mark.parametrize("grad", [True, False])
def test_many_engines_and_signatures_never_reach_the_limit_of_recompilations(
    grad: bool, traced_only: list[dict[str, Any]]
) -> None:
    count = torch._dynamo.config.recompile_limit + 4
    networks = [compile_network(Small().eval(), CPU, torch.float32) for _ in range(count)]
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            for network in networks:
                network(*inputs(2))
            for batch in range(1, count):
                networks[0](*inputs(batch))
    assert [network.compilations for network in networks] == [count - 1] + [1] * (count - 1)
    assert all(network.failure is None for network in networks)


def test_other_values_do_not_recompile(traced_only: list[dict[str, Any]]) -> None:
    network = compile_network(Small().eval(), CPU, torch.float32)
    for _ in range(4):
        network(*inputs(2))
    x, condition = inputs(2)
    network(x.clone(memory_format=torch.channels_last), condition)
    assert network.compilations == 2


def test_another_layout_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    distort(monkeypatch, 1.0)
    network = compile_network(Small().eval(), CPU, torch.float32)
    x, condition = inputs(2)
    network(x, condition)
    distort(monkeypatch, 2.0)
    with pytest.warns(RuntimeWarning, match="differs"):
        network(x.contiguous(memory_format=torch.channels_last), condition)


def test_the_options_are_those_of_the_device(traced_only: list[dict[str, Any]]) -> None:
    compile_network(Small().eval(), CPU, torch.float32)(*inputs(1))
    assert traced_only == [known_options(compiled.CPU_OPTIONS)]
    for options in (compiled.CPU_OPTIONS, compiled.CUDA_OPTIONS):
        # all of them, except for the one that PyTorch 2.11 does not have
        assert set(options) - set(torch._inductor.list_options()) <= {"loop_reindexing_after_fusion"}
    assert compiled.CUDA_OPTIONS["triton.cudagraphs"] is False


def test_an_option_that_this_inductor_has_not_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one, Inductor refuses every compilation, and every network would run eagerly."""
    monkeypatch.setattr(compiled, "CPU_OPTIONS", {**compiled.CPU_OPTIONS, "an_option_of_another_release": False})
    network = compile_network(Small().eval(), CPU, torch.float32)
    network(*inputs(2))
    assert network.failure is None
    assert network.compilations == 1


def test_options_without_those_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on PyTorch 2.11, which has no ``loop_reindexing_after_fusion``."""
    there = [name for name in torch._inductor.list_options() if name != "loop_reindexing_after_fusion"]
    monkeypatch.setattr(torch._inductor, "list_options", lambda: there)
    assert set(compiled.CUDA_OPTIONS) - set(known_options(compiled.CUDA_OPTIONS)) == {"loop_reindexing_after_fusion"}
    assert known_options({"freezing": False, "no such": 1}) == {"freezing": False}


def test_a_wrong_compilation_is_named_once_and_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    distort(monkeypatch, 1.25)
    module = Small().eval()
    network = compile_network(module, CPU, torch.float32)
    tensors = inputs(2)
    with torch.no_grad():
        expected = module(*tensors)
    with pytest.warns(RuntimeWarning, match=r"runs eagerly: the compiled network differs by [\d.]+ where"):
        assert torch.equal(network(*tensors), expected)
    assert network.failure is not None
    for batch in (2, 2, 3):  # filterwarnings = error: none of these warns again
        tensors = inputs(batch)
        with torch.no_grad():
            assert torch.equal(network(*tensors), module(*tensors))
    assert network.compilations == 1


def test_signatures_that_were_trusted_stay_compiled_when_another_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    distort(monkeypatch, 1 + 2.0**-10)
    module, tensors = Small().eval(), inputs(2)
    network = compile_network(module, CPU, torch.float32)
    network(*tensors)
    distort(monkeypatch, 2.0)
    with pytest.warns(RuntimeWarning):
        network(*inputs(3))
    with torch.no_grad():
        assert torch.equal(network(*tensors), module(*tensors) * (1 + 2.0**-10))


def test_a_compiler_that_fails_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(graph: torch.fx.GraphModule, example: list[Tensor], options: dict[str, Any]) -> Callable[..., Any]:
        raise RuntimeError("no working C++ compiler\nand so on")

    monkeypatch.setattr(torch._inductor, "compile", fail)
    network = compile_network(Small().eval(), CPU, torch.float32)
    with pytest.warns(RuntimeWarning, match=r"torch\.compile failed with RuntimeError: no working C\+\+ compiler$"):
        network(*inputs(1))
    for batch in (1, 2):  # filterwarnings = error: none of these warns again
        assert network(*inputs(batch)).shape[0] == batch


def test_a_network_that_cannot_be_traced_whole_runs_eagerly(traced_only: list[dict[str, Any]]) -> None:
    class Breaks(Small):
        def forward(self, x: Tensor, condition: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return super().forward(x, condition)

    network = compile_network(Breaks().eval(), CPU, torch.float32)
    with pytest.warns(RuntimeWarning, match=r"torch\.compile failed with Unsupported"):
        assert network(*inputs(1)).isfinite().all()


def test_running_out_of_memory_is_the_engines_business(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(graph: torch.fx.GraphModule, example: list[Tensor], options: dict[str, Any]) -> Callable[..., Any]:
        return lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("full"))

    with monkeypatch.context() as patched:
        patched.setattr(torch._inductor, "compile", fail)
        network = compile_network(Small().eval(), CPU, torch.float32)
        with pytest.raises(torch.OutOfMemoryError, match="full"):
            network(*inputs(2))
    assert network.failure is None
    distort(monkeypatch, 1 + 2.0**-10)
    tensors = inputs(2)
    with torch.no_grad():
        assert not torch.equal(network(*tensors), network._module(*tensors)), "tried again, and compiled"


def test_a_result_that_is_not_finite_proves_nothing(traced_only: list[dict[str, Any]]) -> None:
    network = compile_network(Small().eval(), CPU, torch.float32)
    x, condition = inputs(2)
    for _ in range(2):
        assert network(x * torch.nan, condition).isnan().all()
    assert network.compilations == 0
    network(x, condition)
    assert network.compilations == 1
    assert network(x * torch.nan, condition).isnan().all()
    assert network.compilations == 1


def test_a_fault_of_the_caller_stays_an_error(traced_only: list[dict[str, Any]]) -> None:
    network = compile_network(Small().eval(), CPU, torch.float32)
    with pytest.raises(RuntimeError, match="channels"):
        network(torch.randn(1, 4, 8, 8), torch.randn(1, 3))
    assert network.failure is None


def test_threads_that_meet_at_a_first_call_compile_once(traced_only: list[dict[str, Any]]) -> None:
    network = compile_network(Small().eval(), CPU, torch.float32)
    tensors = inputs(2)
    barrier = threading.Barrier(4)
    outputs: list[Tensor] = []

    def call() -> None:
        barrier.wait()
        outputs.append(network(*tensors))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert network.compilations == 1
    assert len(outputs) == 4
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_dtype_without_a_tolerance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of .*torch\.bfloat16.*, got torch\.int8"):
        compile_network(Small(), CPU, torch.int8)


@pytest.mark.parametrize(("factor", "differs"), [(1.06, False), (1.07, True), (float("nan"), True)])
def test_the_difference_is_relative_to_the_largest_output(factor: float, differs: bool) -> None:
    expected = torch.tensor([0.5, -400.0])
    assert (describe_difference(expected * factor, expected, 2.0**-4) is not None) == differs


def test_another_shape_or_dtype_is_a_difference() -> None:
    ones = torch.ones(2, 3)
    assert describe_difference(ones[:1], ones, 1.0) == (
        "the compiled network returned float32 [1, 3], the eager one float32 [2, 3]"
    )
    assert describe_difference(ones.half(), ones, 1.0) is not None
    assert describe_difference(ones[:0], ones[:0], 0.0) is None


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"STEPFUSION_CACHE": "/there"}, "/there"),
        ({"STEPFUSION_CACHE": "/there", "XDG_CACHE_HOME": "/xdg"}, "/there"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/stepfusion"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/someone/.cache/stepfusion"),
        ({}, "/home/someone/.cache/stepfusion"),
    ],
)
def test_where_caches_are(variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", "/home/someone")
    for name in ("STEPFUSION_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache.cache_directory() == Path(expected)


def test_the_cache_is_its_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPFUSION_CACHE", str(tmp_path / "new" / "place"))
    made = cache.make_cache_directory("inductor")
    assert made == tmp_path / "new" / "place" / "inductor"
    assert made.stat().st_mode & 0o077 == 0


def test_a_users_own_compiler_cache_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPFUSION_CACHE", str(tmp_path / "ours"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "theirs"))
    with cache.compiler_cache():
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "theirs")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "theirs")
    assert not (tmp_path / "ours").exists()


def test_inductors_own_default_is_no_choice_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPFUSION_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    with cache.compiler_cache():
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / cache.inductor_folder())
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == default_cache_dir()


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("STEPFUSION_CACHE", str(tmp_path / "file"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    assert cache.make_cache_directory("inductor") is None
    with cache.compiler_cache():
        assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_compiled_network_is_a_plain_callable() -> None:
    assert isinstance(compile_network(Small(), CPU, torch.float32), CompiledNetwork)


PROCESS = """
import json, sys, torch
from torch._dynamo.utils import counters
from stepfusion.execution.compiled import compile_network
from stepfusion.networks import UNet2D, UNet2DConfig
from stepfusion.networks.time_conditioned import TimeConditioned

class Partly(TimeConditioned):
    def __init__(self):
        super().__init__()
        self.first, self.act = torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.GELU()
        self.second = torch.nn.Conv2d(32, 3, 3, padding=1)

    def embed_time(self, timesteps):
        return timesteps[:, None].to(self.first.weight.dtype)

    def condition(self, time, class_labels=None):
        return time

    def predict(self, x, projections):
        return self.second(self.act(self.first(x) + projections[:, :, None, None]))

def whole():
    config = UNet2DConfig(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(32,), down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), layers_per_block=1, add_attention=False,
    )
    return UNet2D(config)

torch.set_num_threads(1)
torch.manual_seed(0)
dtype = getattr(torch, sys.argv[1])
module = {"partly": Partly, "whole": whole}[sys.argv[2]]()
network = compile_network(module.eval().to(dtype, memory_format=torch.channels_last), torch.device("cpu"), dtype)
x = torch.randn(2, 3, 8, 8).to(dtype)
network(x, torch.tensor([1, 2]))
assert network.failure is None and network.declined is None
print(json.dumps({key: counters["inductor"][key] for key in
      ("fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass")}))
"""


def run_twice(folder: Path, dtype: str, cpp: str) -> list[dict[str, int]]:
    """What two processes say that use one cache; the second one leaves no library there that the first did not.

    C++ kernels run the network's convolutions, "partly", or the "whole" network.
    """
    environment = {**os.environ, "STEPFUSION_CACHE": str(folder)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    runs, libraries = [], []
    for _ in range(2):
        command = [sys.executable, "-P", "-c", PROCESS, dtype, cpp]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        libraries.append({path: path.stat().st_mtime_ns for path in folder.rglob("*.so")})
    assert libraries[0]
    assert libraries[0] == libraries[1]
    return runs


@pytest.mark.slow
def test_the_next_process_reuses_what_this_one_compiled(tmp_path: Path) -> None:
    first, second = run_twice(tmp_path, "float32", "partly")
    assert first["fxgraph_cache_miss"] == 1
    assert (second["fxgraph_cache_hit"], second["fxgraph_cache_miss"]) == (1, 0)
    assert first["fxgraph_cache_bypass"] == second["fxgraph_cache_bypass"] == 0


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_next_process_reuses_the_cpp_kernels(dtype: str, tmp_path: Path) -> None:
    reason = why_not_cpu_kernels(getattr(torch, dtype))
    if reason is not None:
        pytest.skip(f"C++: {reason}")
    first, second = run_twice(tmp_path, dtype, "whole")
    assert first == second, "Inductor has nothing to do in either"
