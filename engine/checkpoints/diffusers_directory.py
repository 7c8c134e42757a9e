"""Model directories: reading and writing networks in the layout of a diffusers pipeline.

Everything that a directory says is checked before it is used: config values, then every weight's name, shape and
dtype against the network that the config describes (built without memory), then every number. No pickle is executed.
The context UNet, which diffusers does not have, is kept in the same layout under the class name "ContextUNet".
"""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from stepfusion.errors import CheckpointError
from stepfusion.files.atomic import atomic_directory, read_json, write_synced
from stepfusion.networks import ContextUNet, UNet2D, UNet2DConfig

MAX_JSON_BYTES = 1 << 20

_MODELS = Path(__file__).parents[1] / "models"
_MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_WEIGHTS = "diffusion_pytorch_model"
_WEIGHT_FILES = tuple(f"{_WEIGHTS}{kind}" for kind in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin"))
_FACTS_FILE = "stepfusion.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGER = ("I64", str(torch.int64))
_LEGACY_KEY = re.compile(r"(?P<block>.*attentions\.\d+)\.(?P<name>query|key|value|proj_attn)\.(?P<kind>weight|bias)")
_LEGACY_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Pretrained:
    """What a model directory holds.

    Attributes:
        network: in eval mode, float32, on the CPU.
        scheduler_config: the scheduler's config as it stands in the directory; empty if a flat directory has none.
        class_names: the name of each label, or None; the null label, if any, has no name.
        null_label: the label that means "no label" for classifier-free guidance (Ho & Salimans 2022), or None.
        path: the directory.
    """

    network: UNet2D | ContextUNet
    scheduler_config: dict[str, Any]
    class_names: tuple[str, ...] | None
    null_label: int | None
    path: Path


def load_pretrained(source: str | os.PathLike[str]) -> Pretrained:
    """Read a bundled model or a model directory. Nothing is downloaded.

    Args:
        source: a bundled model's name, or the path of a directory in one of two layouts: a diffusers pipeline
            (``unet/config.json``, ``unet/diffusion_pytorch_model.safetensors``, ``scheduler/scheduler_config.json``),
            or flat (the same files in one folder; the scheduler's is optional). Half-precision variants (``.fp16``)
            and ``.bin`` files are read where there is no plain safetensors file, the latter without executing
            anything. A bundled name goes before a directory of that name: write ``./name`` for the directory.

    Raises:
        CheckpointError: a file, key, shape or value is missing or wrong; the sentence names it.
    """
    path = _resolve(source)
    nested = (path / "unet").is_dir()
    folder = path / "unet" if nested else path
    network = _read_network(folder / "config.json")
    scheduler_file = path / "scheduler" / "scheduler_config.json" if nested else path / "scheduler_config.json"
    scheduler = _read_json(scheduler_file) if nested or scheduler_file.exists() else {}
    facts_file = path / _FACTS_FILE
    facts = _read_facts(facts_file, network.num_classes) if facts_file.exists() else _Facts(None, None)
    network.load_state_dict(_read_weights(_find_weights(folder), network), strict=True, assign=True)
    return Pretrained(network.eval(), scheduler, facts.class_names, facts.null_label, path)


def save_pretrained(
    directory: str | os.PathLike[str],
    network: UNet2D | ContextUNet,
    scheduler_config: Mapping[str, Any],
    *,
    class_names: Sequence[str] | None = None,
    null_label: int | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write a diffusers pipeline directory, whole or not at all.

    Args:
        directory: where; its parent exists, and it does not, or is empty.
        network: weights on any device, in any memory format.
        scheduler_config: JSON values; ``_class_name`` is diffusers' scheduler class, "DDPMScheduler" if missing.
        class_names: the name of each label, the null label left out.
        null_label: the label that means "no label"; with names, it is the last one.
        dtype: stored dtype (float64, float32, float16 or bfloat16); None keeps the network's.
        overwrite: replace a directory that has content.

    Raises:
        CheckpointError: an argument does not fit, or the directory may not be replaced.
        OSError: a write failed; `directory` is as it was.
    """
    if not isinstance(network, UNet2D | ContextUNet):
        raise CheckpointError(f"network is a {type(network).__name__}; accepted are UNet2D and ContextUNet")
    given = {"class_names": class_names, "null_label": null_label}
    facts = _check_facts(given, network.num_classes, "the arguments")
    config = network.config.to_dict() if isinstance(network, UNet2D) else network.to_config()
    library = "diffusers" if isinstance(network, UNet2D) else "stepfusion"
    scheduler_class = _scheduler_class(scheduler_config)
    pipeline = "DDIMPipeline" if scheduler_class == "DDIMScheduler" else "DDPMPipeline"
    parts = {"scheduler": ["diffusers", scheduler_class], "unet": [library, config["_class_name"]]}
    contents = {
        "model_index.json": _to_json({"_class_name": pipeline, **parts}),
        "scheduler/scheduler_config.json": _to_json({"_class_name": scheduler_class, **scheduler_config}),
        "unet/config.json": _to_json(config),
        f"unet/{_WEIGHT_FILES[0]}": save(_storable_state(network, dtype), metadata={"format": "pt"}),
    }
    if facts != _Facts(None, None):
        contents[_FACTS_FILE] = _to_json({"class_names": facts.class_names, "null_label": facts.null_label})
    try:
        _write_directory(directory, contents, overwrite)
    except FileExistsError as error:
        raise CheckpointError(f"directory {error}") from None


def bundled_models() -> tuple[str, ...]:
    """Return the names of the models that come with the package."""
    if not _MODELS.is_dir():
        return ()
    return tuple(sorted(entry.name for entry in _MODELS.iterdir() if entry.is_dir() and _is_model_name(entry.name)))


def _is_model_name(name: str) -> bool:
    return _MODEL_NAME.fullmatch(name) is not None


def _resolve(source: str | os.PathLike[str]) -> Path:
    """Return the directory that `source` means: only a plain name, never a path, is looked up in the package."""
    if isinstance(source, str) and source in bundled_models():
        return _MODELS / source
    path = Path(source)
    if source != "" and path.is_dir():
        return path
    if not isinstance(source, str) or any(mark in source for mark in (os.sep, os.altsep) if mark):
        raise CheckpointError(f"{path} is {'not a directory' if path.exists() else 'missing'}")
    names = ", ".join(bundled_models()) or "none"
    raise CheckpointError(f"{source!r} is neither a bundled model ({names}) nor a directory")


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, CheckpointError, MAX_JSON_BYTES)


def _read_network(path: Path) -> UNet2D | ContextUNet:
    """The network that a config describes, on the meta device."""
    config = _read_json(path)
    try:
        with torch.device("meta"):
            if config.get("_class_name") == "ContextUNet":
                return ContextUNet.from_config(config)
            return UNet2D(UNet2DConfig.from_dict(config))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


@dataclass(frozen=True)
class _Facts:
    """What ``stepfusion.json`` adds to a diffusers directory."""

    class_names: tuple[str, ...] | None
    null_label: int | None


def _read_facts(path: Path, classes: int | None) -> _Facts:
    given = {key: value for key, value in _read_json(path).items() if not key.startswith("_")}
    for key in given:
        if key not in ("class_names", "null_label"):
            raise CheckpointError(f"{path} has the unknown key {short(key)}; accepted are class_names, null_label")
    return _check_facts(given, classes, str(path))


def _check_facts(given: Mapping[str, Any], classes: int | None, where: str) -> _Facts:
    """Hold class names and null label against the number of classes."""
    names, null_label = given.get("class_names"), given.get("null_label")
    if names is None and null_label is None:
        return _Facts(None, None)
    if classes is None:
        raise CheckpointError(f"{where}: class_names or null_label is given, but the network has no class embedding")
    is_label = isinstance(null_label, int) and not isinstance(null_label, bool) and 0 <= null_label < classes
    if null_label is not None and not is_label:
        raise CheckpointError(
            f"{where}: null_label is {short(null_label)}; accepted are integers from 0 to {classes - 1}"
        )
    if names is None:
        return _Facts(None, null_label)
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) and n for n in names):
        raise CheckpointError(f"{where}: class_names is not a list of non-empty strings")
    wanted = classes - 1 if null_label == classes - 1 else classes
    if len(names) != wanted:
        raise CheckpointError(f"{where}: class_names has {len(names)} entries; accepted are {wanted}")
    return _Facts(tuple(names), null_label)


def _find_weights(folder: Path) -> Path:
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    if (folder / f"{_WEIGHT_FILES[0]}.index.json").exists():
        raise CheckpointError(f"{folder} has weights in several files, which is not implemented; save them as one")
    raise CheckpointError(f"{folder} has no weights; accepted are {', '.join(_WEIGHT_FILES)}")


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: what the file says of it, and how to read it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]


def _read_weights(path: Path, network: nn.Module) -> dict[str, Tensor]:
    """Read the state of `network` (on the meta device), after checking all that the file declares.

    What is floating point becomes float32; a counter, as batch normalisation has, stays int64.
    """
    if path.suffix == ".bin":
        return _fit(stored_in_archive(path), network, path)
    try:
        with safe_open(path, framework="pt") as file:
            stored = {}
            for key in file.keys():  # noqa: SIM118 - a safetensors file, not a dict
                header = file.get_slice(key)
                stored[key] = Stored(tuple(header.get_shape()), header.get_dtype(), _reader(file, key))
            return _fit(stored, network, path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {_first_line(error)}") from None


def _reader(file: Any, key: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        tensor: Tensor = file.get_tensor(key)
        return tensor

    return read


def _fit(stored: Mapping[str, Stored], network: nn.Module, path: Path) -> dict[str, Tensor]:
    """The stored tensors as the state of `network`, under the names of today."""
    state = network.state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    integers = {key for key, value in state.items() if not value.is_floating_point()}
    return check_state(_modern_names(stored, path), shapes, path, integers=integers)


def stored_in_archive(path: Path) -> dict[str, Stored]:
    """Open a state dict saved by ``torch.save``, memory-mapped, with PyTorch's restricted unpickler."""
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is not a torch.save archive (a zip file); other pickles are never opened")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path} holds pickled code, which is never run; save a safetensors file") from None
    except Exception as error:  # a damaged archive fails in the zip reader, the unpickler or a tensor constructor
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}; accepted is a state dict")
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    stored = {}
    for key, value in state.items():
        is_plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not isinstance(key, str) or not is_plain:
            raise CheckpointError(
                f"{path}: {short(key)} is not a name with a dense tensor, but {type(value).__name__}"
            )
        stored[key] = Stored(tuple(value.shape), codes.get(value.dtype, str(value.dtype)), value.detach)
    return stored


def check_state(
    stored: Mapping[str, Stored],
    wanted: Mapping[str, tuple[int, ...]],
    path: Path,
    source: str = "config",
    *,
    integers: Set[str] = frozenset(),
) -> dict[str, Tensor]:
    """Compare the stored tensors with the shapes that are wanted, as `source` says, then read them as float32.

    Those that `integers` names stay int64.

    Raises:
        CheckpointError: tensors are missing, unexpected, misshapen, of another kind or not finite; it names them.
    """
    problems = [
        _problem("missing", sorted(wanted.keys() - stored.keys())),
        _problem("unexpected", sorted(stored.keys() - wanted.keys())),
        _problem(
            "misshapen",
            [
                f"{key} {list(stored[key].shape)} instead of {list(shape)}"
                for key, shape in wanted.items()
                if key in stored and stored[key].shape != shape
            ],
        ),
        _problem(
            "not floating point",
            [
                f"{key} {stored[key].dtype}"
                for key in wanted
                if key in stored and key not in integers and stored[key].dtype not in _DTYPES
            ],
        ),
        _problem(
            "not int64",
            [
                f"{key} {stored[key].dtype}"
                for key in sorted(integers & stored.keys())
                if stored[key].dtype not in _INTEGER
            ],
        ),
    ]
    if any(problems):
        raise CheckpointError(f"{path} does not fit its {source}: {'; '.join(filter(None, problems))}")
    return {
        key: stored[key].read().clone() if key in integers else _finite_float32(key, stored[key].read(), path)
        for key in wanted
    }


def _problem(what: str, entries: list[str], shown: int = 3) -> str:
    """Say how many keys are `what`, and the first few of them; nothing if there are none."""
    if not entries:
        return ""
    safe = [entry if entry.isprintable() and len(entry) <= 200 else short(entry) for entry in entries[:shown]]
    rest = ", ..." if len(entries) > shown else ""
    return f"{len(entries)} {what} ({', '.join(safe)}{rest})"


def _modern_names(stored: Mapping[str, Stored], path: Path) -> dict[str, Stored]:
    """Rename the attention weights of directories from 2022: query, key, value and proj_attn."""
    renamed: dict[str, Stored] = {}
    for key, value in stored.items():
        legacy = _LEGACY_KEY.fullmatch(key)
        name = f"{legacy['block']}.{_LEGACY_NAMES[legacy['name']]}.{legacy['kind']}" if legacy else key
        if name in renamed:
            raise CheckpointError(f"{path} has {name} twice, under its old name and its new one")
        renamed[name] = value
    return renamed


def _finite_float32(key: str, tensor: Tensor, path: Path) -> Tensor:
    """Copy out of the mapped file, so that the network outlives what happens to it."""
    weights = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not weights.isfinite().all():
        raise CheckpointError(f"{path}: {key} has values that are not finite")
    return weights


def _scheduler_class(config: Mapping[str, Any]) -> str:
    if not isinstance(config, Mapping):
        raise CheckpointError(f"scheduler_config is a {type(config).__name__}; accepted is a dict")
    name = config.get("_class_name", "DDPMScheduler")
    if not isinstance(name, str):
        raise CheckpointError(f"scheduler_config: _class_name is {short(name)}; accepted is a string")
    return name


def _storable_state(network: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    dtype = dtype or next(network.parameters()).dtype
    if dtype not in _DTYPES.values():
        raise CheckpointError(f"dtype is {dtype}; accepted are {', '.join(map(str, _DTYPES.values()))}")
    state = {}
    for key, value in network.state_dict().items():
        state[key] = value.to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous()
        if not state[key].isfinite().all():
            raise CheckpointError(f"network: {key} has values that are not finite in {dtype}")
    return state


def _to_json(value: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"scheduler_config is not JSON: {_first_line(error)}") from None


def _write_directory(directory: str | os.PathLike[str], contents: Mapping[str, bytes], overwrite: bool) -> None:
    path = Path(directory)
    if not path.absolute().parent.is_dir():
        raise CheckpointError(f"directory {path}: its parent is not a directory")
    with atomic_directory(path, overwrite=overwrite) as folder:
        for name, data in contents.items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_synced(folder / name, data)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
