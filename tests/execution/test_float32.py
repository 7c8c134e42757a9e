"""float32 on a CUDA device: decided by the dtype of an engine; the switches of the process stay as they were."""

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch

import stepfusion as sf
from stepfusion.execution.evaluator import Evaluator
from stepfusion.execution.float32 import float32_products
from stepfusion.execution.plan import make_plan
from stepfusion_testing.networks import tiny_unet


def switches() -> list[object]:
    """What PyTorch says of its settings, of every kind."""
    backends = torch.backends
    reads: list[Callable[[], object]] = [
        lambda: backends.cuda.matmul.allow_tf32,
        lambda: backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision,
        lambda: backends.cuda.matmul.fp32_precision,
        lambda: backends.cudnn.conv.fp32_precision,
        lambda: backends.cudnn.rnn.fp32_precision,
        lambda: backends.mkldnn.matmul.fp32_precision,
        lambda: backends.mkldnn.conv.fp32_precision,
    ]
    found = []
    for read in reads:
        try:
            found.append(read())
        except RuntimeError:
            found.append("contradicted")
    return found


def tf32() -> tuple[bool, bool]:
    """Whether matrix products and convolutions may use it."""
    backends = torch.backends
    assert backends.cuda.matmul.allow_tf32 == (backends.cuda.matmul.fp32_precision == "tf32")
    assert backends.cudnn.allow_tf32 == (backends.cudnn.conv.fp32_precision == "tf32")
    return backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.mkldnn.matmul.fp32_precision = "none"


def precise() -> None:
    torch.backends.cudnn.allow_tf32 = False


def fast() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def medium() -> None:
    torch.set_float32_matmul_precision("medium")


def by_the_newer_kind() -> None:
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cudnn.rnn.fp32_precision = "tf32"


def on_a_cpu() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


@pytest.mark.parametrize("set_before", [None, precise, fast, medium, by_the_newer_kind, on_a_cpu])
@pytest.mark.parametrize("wanted", [False, True])
def test_the_switches_hold_in_the_block_and_are_as_before_afterwards(
    set_before: Callable[[], None] | None, wanted: bool
) -> None:
    if set_before is not None:
        set_before()
    before = switches()
    with float32_products(tf32=wanted):
        assert tf32() == (wanted, wanted)
    assert switches() == before
    with pytest.raises(ValueError, match="shape"), float32_products(tf32=wanted):
        raise ValueError("shape")
    assert switches() == before


def test_pytorch_lets_convolutions_use_tf32_by_itself() -> None:
    """The negative control: without the block, float32 is not float32."""
    assert tf32() == (False, True)


def test_blocks_of_several_threads_end_in_the_users_settings() -> None:
    """Whoever is last restores, not whoever came last; float32 wins while both are under way."""
    before = switches()
    entered, leave = threading.Event(), threading.Event()
    seen: list[tuple[bool, bool]] = []

    def exact() -> None:
        with float32_products(tf32=False):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=exact)
    with float32_products(tf32=True):
        seen.append(tf32())
        thread.start()
        assert entered.wait(10)
        seen.append(tf32())
    seen.append(tf32())
    leave.set()
    thread.join()
    assert seen == [(True, True), (False, False), (False, False)]
    assert switches() == before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", (False, False)), ("tf32", (True, True)), ("bfloat16", (False, True))]
)
def test_the_dtype_of_an_engine_decides(dtype: str, expected: tuple[bool, bool]) -> None:
    plan = make_plan("cuda", dtype, "reference", "eager")
    assert plan.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    seen: list[tuple[bool, bool]] = []

    def network(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        seen.append(tf32())
        return x

    before = switches()
    Evaluator(network, False, plan.products).network(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    assert seen == [expected]
    assert switches() == before


@pytest.mark.usefixtures("cuda")
def test_the_time_path_is_computed_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    network, seen = tiny_unet(classes=None), list[tuple[bool, bool]]()
    embed = network.embed_time
    monkeypatch.setattr(network, "embed_time", lambda timesteps: (seen.append(tf32()), embed(timesteps))[1])
    plan = make_plan("cuda", "float32", "reference", "eager")
    Evaluator(network, False, plan.products).features(torch.arange(3))
    assert seen == [(False, False)]


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("dtype", "said"),
    [("float32", "without TF32"), ("tf32", "float32 with TF32 in convolutions and matrix products")],
)
def test_explain_says_it(dtype: str, said: str) -> None:
    (line,) = (
        line for line in make_plan("cuda", dtype, "reference", "eager").lines() if line.startswith("network d")
    )
    assert line.split()[2] == dtype
    assert said in line


def test_a_cpu_has_no_tf32_and_its_switches_are_left_alone() -> None:
    assert make_plan("cpu", "float32", "reference", "eager").products is nullcontext
    with pytest.raises(sf.BackendError, match=r"^dtype='tf32' needs a CUDA device, and the device is cpu"):
        sf.Engine(lambda x, t: x, sf.NoiseSchedule.linear(), shape=(1, 2, 2), device="cpu", dtype="tf32")
