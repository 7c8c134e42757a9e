"""The launches of a tick and the bytes that they move, counted without a GPU.

A runner ticks on the meta device, where every operator has shapes and strides and no data. Our own operators run
their launchers, with Triton told to note launches instead of making them; of PyTorch's operators it is known how many
kernels they are on CUDA (:data:`_KERNELS`). Counted are the bytes of every tensor that a kernel reads or writes, each
once.

Commands::

    python -m stepfusion.bench.launches [--json] [--model NAME] [--batch N] [--guided] [--whole]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepfusion import kernels
from stepfusion.bench.models import LATENT, PUBLISHED, Denoiser, image_shape, latent_network, load_model
from stepfusion.execution.evaluator import Evaluator
from stepfusion.kernels import backend
from stepfusion.lanes.prepared import PreparedConditions
from stepfusion.lanes.runner import Runner, RunnerKey
from stepfusion.networks import UNet2D, prepare_network
from stepfusion.networks.conditioned import ConditionedNetwork
from stepfusion.samplers.implicit import ddim
from stepfusion.samplers.schedule import NoiseSchedule

META = torch.device("meta")
#: What is not bound by memory: these launches are compared by their number alone.
PRODUCTS = ("convolution", "matrix product", "attention")
#: Operators that launch another number of kernels than one. A padding fills its result, and copies into it.
_KERNELS = {"empty": 0, "empty_strided": 0, "empty_like": 0, "new_empty": 0, "constant_pad_nd": 2}
#: Kind of our kernels whose name has a word; the others are "elementwise".
_KINDS_OF_OURS = {"norm": "norm", "step": "step", "projection": "matrix product"}
_MATRIX_PRODUCTS = ("addmm", "mm", "bmm", "baddbmm", "addmm_", "baddbmm_")


@dataclass(frozen=True)
class Kernel:
    """A launch. ``kind``: "convolution", "norm", "copy" and so on. ``name``: of the operator, or of our kernel.

    ``flops``: two for each multiplication of a product; 0 for what is no product.
    """

    kind: str
    name: str
    bytes: int
    flops: int = 0


@dataclass
class Tick:
    """The launches of a tick, in their order."""

    kernels: list[Kernel] = field(default_factory=list)

    @property
    def launches(self) -> int:
        """How many there are."""
        return len(self.kernels)

    def kinds(self) -> dict[str, tuple[int, int]]:
        """Launches and bytes by kind."""
        count, moved = Counter[str](), Counter[str]()
        for kernel in self.kernels:
            count[kernel.kind] += 1
            moved[kernel.kind] += kernel.bytes
        return {kind: (count[kind], moved[kind]) for kind in sorted(count, key=lambda kind: -count[kind])}

    def bytes(self, *kinds: str) -> int:
        """Bytes that launches of these kinds move."""
        return sum(kernel.bytes for kernel in self.kernels if kernel.kind in kinds)

    @property
    def flops(self) -> int:
        """Of all products."""
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def bytes_beside_products(self) -> int:
        """Bytes that everything but convolutions, matrix products and attention moves."""
        return sum(kernel.bytes for kernel in self.kernels if kernel.kind not in PRODUCTS)


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what the operators inside launch on CUDA."""

    def __init__(self, tick: Tick) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tick = tick

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "stepfusion":
            with self:
                return torch._library.custom_ops.OPDEFS[func.name()]._init_fn(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name != "upsample_nearest2d":  # which the meta device makes of others, and CUDA does not
            with self:
                out = func.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        out = func(*args, **(kwargs or {}))
        if name in ("convolution", "constant_pad_nd"):  # as on CUDA, and not everywhere on the meta device
            out = out.contiguous(memory_format=torch.channels_last)
        if not _is_view(func, args, out):
            self._note(name, args, kwargs or {}, out)
        return out

    def _note(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        read, written = _tensors((args, kwargs)), _tensors(out)
        moved = sum(map(_size, read)) + sum(map(_size, written))
        if name == "convolution":
            self._convolution(args, out)
        elif name in _MATRIX_PRODUCTS:
            self._matrix_product(name, args, out, moved)
        elif name in ("index", "embedding", "index_select"):  # of the table, only the rows that are copied
            self._add("gather", name, sum(map(_size, read[1:])) + 2 * _size(out))
        else:
            count = _KERNELS.get(name, 1)
            for _ in range(count):
                self._add(_kind(name), name, moved // count)

    def _convolution(self, args: Any, out: Tensor) -> None:
        """cuDNN's, in NHWC as our weights are: what has another layout is copied, and the bias is added after."""
        x, weight, bias = args[:3]
        for tensor in (x, weight):
            if not tensor.is_contiguous(memory_format=torch.channels_last):
                self._add("copy", "layout of a convolution", 2 * _size(tensor))
        moved, flops = _size(x) + _size(weight) + _size(out), 2 * out.numel() * weight[0].numel()
        self._add("convolution", "convolution", moved, flops)
        if bias is not None:
            self._add("bias", "bias of a convolution", 2 * _size(out) + _size(bias))

    def _matrix_product(self, name: str, args: Any, out: Tensor, moved: int) -> None:
        """cuBLAS adds a bias [N] itself; a matrix is copied to where the result comes, unless it is there."""
        if name == "addmm" and args[0].ndim == 2:
            self._add("copy", "matrix of addmm", 2 * _size(out))
        inner = args[1 if name.startswith(("addmm", "baddbmm")) else 0].shape[-1]
        self._add("matrix product", name, moved, 2 * out.numel() * inner)

    def launched(self, kernel: str, tensors: Sequence[Tensor], options: Mapping[str, Any]) -> None:
        """Note a launch of a kernel of ours. A product that resamples what it returns counts as what resamples."""
        kind = next((k for word, k in _KINDS_OF_OURS.items() if word in kernel), "elementwise")
        flops = 0
        if kind == "matrix product":
            # the first tensor is the image [B, N, H, W] that is added to
            flops = 2 * tensors[0].numel() * (options["K_X"] + options["K_SKIP"])
            if options["DOUBLES"]:
                kind = "elementwise"
        self._add(kind, kernel, sum(map(_size, tensors)), flops)

    def _add(self, kind: str, name: str, moved: int, flops: int = 0) -> None:
        self._tick.kernels.append(Kernel(kind, name, moved, flops))


class _Attention(TorchFunctionMode):
    """Attention as the one kernel that it is on CUDA, whatever the meta device makes of it."""

    def __init__(self, counting: Counting) -> None:
        super().__init__()
        self._counting = counting

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        flops = 4 * q.numel() * k.shape[-2]
        self._counting._add("attention", "attention", 2 * _size(q) + _size(k) + _size(v), flops)
        return q.transpose(1, 2).new_empty(q.transpose(1, 2).shape).transpose(1, 2)


def _is_view(func: Any, args: Any, out: Any) -> bool:
    """Whether an operator returns its input with another shape, and moves nothing."""
    if func.is_view:
        return True
    first = args[0] if args and isinstance(args[0], Tensor) else None
    return first is not None and out is first and not func.overloadpacket.__name__.endswith("_")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _kind(name: str) -> str:
    if name in ("copy_", "clone", "_to_copy", "cat", "contiguous"):
        return "copy"
    return {"upsample_nearest2d": "resize", "constant_pad_nd": "resize", "_softmax": "attention"}.get(
        name, "elementwise"
    )


@contextmanager
def counting(tick: Tick) -> Iterator[None]:
    """Inside, what CUDA would launch for tensors on the meta device is noted in ``tick``."""
    from triton.runtime import interpreter, jit

    mode = Counting(tick)

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        mode.launched(self.fn.__name__, _tensors((args, kwargs)), kwargs)

    with (
        mock.patch.object(jit.JITFunction, "run", run),
        mock.patch.object(interpreter.InterpretedFunction, "run", run),
        mock.patch.object(backend, "why_not_triton", return_value=None),
        _Attention(mode),
        mode,
    ):
        yield


_CLASSES = 11  # of a guided network, the last of which stands for none


def _published(name: str, guided: bool) -> Denoiser:
    """A published network; to be guided a UNet needs classes, and ValueError says that it is no UNet2D."""
    if name in LATENT:
        return latent_network(name)
    network = load_model(name).network
    if not guided:
        return network
    if not isinstance(network, UNet2D):
        raise ValueError(f"guided ticks are counted of a UNet2D, and {name} is a {type(network).__name__}")
    return UNet2D(replace(network.config, num_class_embeds=_CLASSES))


@torch.no_grad()
def count_tick(
    name: str,
    batch: int,
    *,
    guided: bool = False,
    network: Callable[[torch.nn.Module], torch.nn.Module] | None = None,
) -> Tick:
    """The launches of a tick of ``batch`` lanes of a published network in bfloat16, by DDIM and our kernels.

    Args:
        name: of :data:`stepfusion.bench.models.PUBLISHED` or :data:`stepfusion.bench.models.LATENT`.
        guided: with guidance; a UNet without classes gets some.
        network: what an engine makes of the network, instead of preparing it for our kernels; :func:`whole` for one.
    """
    with META:
        unet = _published(name, guided)
    specs = unet.conditions if isinstance(unet, ConditionedNetwork) else ()
    labelled = guided if name in PUBLISHED else unet.num_classes is not None
    prepare = network or (lambda module: prepare_network(module, META, torch.bfloat16, fused=True))
    evaluator = Evaluator(prepare(unet), labelled, conditions=specs)
    prepared = PreparedConditions(evaluator, specs, META, torch.bfloat16)
    layout = prepared.layout if specs else ()
    shape, null_label = image_shape(unet), _CLASSES - 1 if labelled else None
    key = RunnerKey(batch, shape, META, torch.bfloat16, guided=guided, null_label=null_label, conditions=layout)
    runner = Runner(evaluator, key, kernels, prepared=prepared)
    runner.load(ddim(NoiseSchedule.linear(), 50))
    with counting(Tick()):
        runner.tick()  # what is done once is done before
    tick = Tick()
    with counting(tick):
        runner.tick()
    return tick


def whole(network: torch.nn.Module) -> torch.nn.Module:
    """A network as its authors call it: all of it at every tick, by PyTorch's operators. For :func:`count_tick`."""
    return _Whole(prepare_network(network, META, torch.bfloat16, fused=False))


class _Whole(torch.nn.Module):
    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, timesteps: Tensor, *labels: Tensor, **conditions: Tensor) -> Any:
        network = self.network
        if not isinstance(network, ConditionedNetwork):
            return network(x, timesteps, *labels)
        # its `forward`, but for the check that conditions are no tensors of the meta device
        prepared = network.prepare(conditions)
        return network.predict(
            x, network.condition(network.embed_time(timesteps), *(labels or (None,)), *prepared), *prepared
        )


def lines(name: str, batch: int, tick: Tick) -> Iterator[str]:
    """A table for a terminal."""
    yield f"{name}, batch {batch}, bfloat16: {tick.launches} launches, {tick.flops / 1e9:.1f} GFLOP"
    for kind, (count, moved) in tick.kinds().items():
        yield f"  {kind:16} {count:4} launches {moved / 1e6:9.1f} MB"
    yield f"  {'beside products':16} {'':13} {tick.bytes_beside_products / 1e6:9.1f} MB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m stepfusion.bench.launches", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    names = (*PUBLISHED, *LATENT)
    parser.add_argument("--model", choices=names, action="append", help="only this one (repeat for more)")
    parser.add_argument("--batch", type=int, default=8, help="lanes (default: 8)")
    parser.add_argument("--guided", action="store_true", help="with guidance, and classes")
    parser.add_argument(
        "--whole", action="store_true", help="the network as its authors call it: nothing computed before, or fused"
    )
    options = parser.parse_args(arguments)
    network = whole if options.whole else None
    ticks = {
        name: count_tick(name, options.batch, guided=options.guided, network=network)
        for name in options.model or PUBLISHED
    }
    if options.json:
        found = {
            name: {"launches": tick.launches, "flops": tick.flops, "kinds": tick.kinds()}
            for name, tick in ticks.items()
        }
        json.dump(found, sys.stdout)
        return 0
    for name, tick in ticks.items():
        print("\n".join(lines(name, options.batch, tick)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
