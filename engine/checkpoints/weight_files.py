"""The files of a directory that hold a network's weights: which there are, which are read, and how.

diffusers and accelerate write ``diffusion_pytorch_model.safetensors`` or ``model.safetensors``, ``.bin`` files of
``torch.save`` before that; a *variant* (``.fp16.safetensors``) beside or in place of it; and weights of several
gigabytes in shards, listed by an ``.index.json`` file.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stepfusion.checkpoints.archive import stored_in_archive
from stepfusion.checkpoints.json_file import read_model
from stepfusion.checkpoints.weight_names import names_of_today
from stepfusion.checkpoints.weights import Stored, check_state, first_line
from stepfusion.errors import CheckpointError
from stepfusion.files.strict_model import StrictModel

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

_NAME = re.compile(
    r"(?P<base>diffusion_pytorch_model|model|pytorch_model)"
    r"(\.(?P<early>[A-Za-z0-9_-]+))?\.(?P<kind>safetensors|bin)"
    r"(?P<index>\.index(\.(?P<late>[A-Za-z0-9_-]+))?\.json)?"
)
_BASES = ("diffusion_pytorch_model", "model", "pytorch_model")
#: Variants in the order in which they are read if none was asked for: more digits first, then averages of training.
_PRECISIONS = ("fp32", "fp16", "bf16")
_VARIANTS = (*_PRECISIONS, "ema", "non_ema", "non-ema")
_OTHER_FORMS = (".msgpack", ".h5", ".onnx", ".ckpt", ".pt", ".pth", ".gguf", ".safetensors", ".bin", ".flashpack")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


class ShardIndex(StrictModel):
    """The object in an ``.index.json`` file: the shard of each tensor."""

    weight_map: dict[str, str]
    metadata: Any = None


@dataclass(frozen=True)
class WeightFile:
    """A file of weights, or the index of several.

    Attributes:
        path: the file.
        base: the first part of its name.
        kind: "safetensors" or "bin".
        variant: the part of its name that says which weights these are, such as "fp16" or "ema"; None for none.
        index: whether it lists shards.
    """

    path: Path
    base: str
    kind: str
    variant: str | None
    index: bool

    @property
    def rank(self) -> tuple[bool, bool, int, int, bool]:
        """The place among the files of a folder: the weights themselves first, and of these safetensors first.

        A half-precision safetensors file goes before a ``.bin`` file, which goes before an average of training.
        """
        other = self.variant not in (None, *_PRECISIONS)
        variant = 0 if self.variant is None else 1 + _order(_VARIANTS, self.variant)
        return other, self.kind == "bin", variant, _order(_BASES, self.base), self.index


def find_weights(folder: Path, variant: str | None = None) -> WeightFile:
    """The file with a network's weights.

    Args:
        variant: which weights, by the part of the file's name: "fp16", "ema", ...; by default those without one if
            there are any.

    Raises:
        CheckpointError: there are none that can be read, or several and no way to choose.
    """
    files = _weight_files(folder)
    if variant is not None:
        files = [file for file in files if file.variant == variant]
        if not files:
            raise CheckpointError(f"{folder} has no weights of the variant {short(variant)}{_present(folder)}")
    if not files:
        raise CheckpointError(
            f"{folder} has no weights in a form that is read: {WEIGHTS_FILE}, a variant of it (.fp16.safetensors), "
            f"shards with an .index.json file, or a .bin file{_present(folder)}"
        )
    first = min(files, key=lambda file: file.rank)
    others = {file.variant for file in files}
    if first.variant not in (None, *_VARIANTS) and len(others) > 1:
        shown = ", ".join(sorted(map(str, others)))
        raise CheckpointError(f"{folder} has weights in the variants {shown}: choose one by variant=")
    return first


def read_weights(file: WeightFile, network: nn.Module) -> dict[str, Tensor]:
    """Read the state of `network` (on the meta device), after checking all that the file declares.

    What is floating point becomes float32; a counter, as batch normalisation has, stays int64.

    Raises:
        CheckpointError: the file is damaged, or does not fit the network; what is wrong is named.
    """
    state = network.state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    integers = {key for key, value in state.items() if not value.is_floating_point()}
    with opened(file) as stored:
        return check_state(names_of_today(stored, shapes, file.path), shapes, file.path, integers=integers)


def _weight_files(folder: Path) -> list[WeightFile]:
    found = []
    for path in sorted(folder.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match is None or _SHARD.search(path.name) or not path.is_file():
            continue
        variant = match["late"] or match["early"]
        found.append(WeightFile(path, match["base"], match["kind"], variant, match["index"] is not None))
    return found


def _present(folder: Path) -> str:
    """The files of weights that there are, but in no form that is read."""
    names = [path.name for path in sorted(folder.iterdir()) if path.name.endswith((*_OTHER_FORMS, ".index.json"))]
    shown = ", ".join(repr(name[:100]) for name in names[:3])
    return f"; there is {shown}{', ...' if len(names) > 3 else ''}" if names else ""


@contextmanager
def opened(file: WeightFile) -> Iterator[dict[str, Stored]]:
    """What a file, or all shards of an index, say of their tensors; they are open as long as these are read."""
    with ExitStack() as stack:
        if not file.index:
            yield _open_one(file.path, file.kind, stack)
            return
        stored: dict[str, Stored] = {}
        for shard, keys in _shards(file).items():
            held = _open_one(shard, file.kind, stack)
            if held.keys() != keys:
                wrong = sorted(held.keys() ^ keys)[0]
                where = "is not in it" if wrong in keys else "is in it"
                raise CheckpointError(f"{file.path} does not fit its shard {shard.name}: {short(wrong)} {where}")
            stored |= held
        yield stored


def _shards(file: WeightFile) -> dict[Path, set[str]]:
    """The shards that an index lists, with the tensors of each; all are files beside the index."""
    shards: dict[Path, set[str]] = {}
    for key, name in read_model(file.path, ShardIndex).weight_map.items():
        if Path(name).name != name or not name.endswith(f".{file.kind}") or name.startswith("."):
            raise CheckpointError(
                f"{file.path} lists {short(name)}; accepted are .{file.kind} files beside it, without folders"
            )
        shards.setdefault(file.path.with_name(name), set()).add(key)
    if not shards:
        raise CheckpointError(f"{file.path} lists no shards")
    for shard in sorted(shards):
        if not shard.is_file():
            raise CheckpointError(f"{file.path} lists {shard.name}, which is missing")
    return shards


def _open_one(path: Path, kind: str, stack: ExitStack) -> dict[str, Stored]:
    if kind == "bin":
        return stored_in_archive(path)
    try:
        file = stack.enter_context(safe_open(path, framework="pt"))
        stored = {}
        for key in file.keys():  # noqa: SIM118 - a safetensors file, not a dict
            header = file.get_slice(key)
            stored[key] = Stored(tuple(header.get_shape()), header.get_dtype(), _reader(file, key, path))
        return stored
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {first_line(error)}") from None


def _reader(file: Any, key: str, path: Path) -> Callable[[], Tensor]:
    def read() -> Tensor:
        try:
            tensor: Tensor = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a complete safetensors file: {first_line(error)}") from None
        return tensor

    return read


def _order(names: tuple[str, ...], name: str) -> int:
    return names.index(name) if name in names else len(names)
