"""Writing a network in the layout of a diffusers pipeline, whole or not at all."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from stepfusion.checkpoints.json_file import to_json
from stepfusion.checkpoints.labels import LABELS_FILE, LabelMetadata, check_labels
from stepfusion.checkpoints.weight_files import WEIGHTS_FILE
from stepfusion.checkpoints.weights import DTYPES
from stepfusion.errors import CheckpointError
from stepfusion.files.atomic import atomic_directory, write_synced
from stepfusion.networks import ContextUNet, UNet2D

#: The pipeline of diffusers that draws with a scheduler, if it is not DDPMPipeline: of EDM's, the one that asks the
#: scheduler how noisy the first state is, and what the network is shown.
_PIPELINES = {"DDIMScheduler": "DDIMPipeline", "EDMEulerScheduler": "ConsistencyModelPipeline"}


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
        scheduler_config: JSON values; ``_class_name`` is diffusers' scheduler class, "DDPMScheduler" if missing. It
            says the network's path: "EDMEulerScheduler" EDM's, "FlowMatchEulerDiscreteScheduler" the straight one.
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
    labels = check_labels(given, network.num_classes, "the arguments")
    config = network.config.to_dict() if isinstance(network, UNet2D) else network.to_config()
    library = "diffusers" if isinstance(network, UNet2D) else "stepfusion"
    scheduler_class = _scheduler_class(scheduler_config)
    pipeline = _PIPELINES.get(scheduler_class, "DDPMPipeline")
    parts = {"scheduler": ["diffusers", scheduler_class], "unet": [library, config["_class_name"]]}
    contents = {
        "model_index.json": to_json({"_class_name": pipeline, **parts}),
        "scheduler/scheduler_config.json": to_json({"_class_name": scheduler_class, **scheduler_config}),
        "unet/config.json": to_json(config),
        f"unet/{WEIGHTS_FILE}": save(_storable_state(network, dtype), metadata={"format": "pt"}),
    }
    if labels != LabelMetadata(None, None):
        contents[LABELS_FILE] = to_json({"class_names": labels.class_names, "null_label": labels.null_label})
    try:
        _write_directory(directory, contents, overwrite)
    except FileExistsError as error:
        raise CheckpointError(f"directory {error}") from None


def _scheduler_class(config: Mapping[str, Any]) -> str:
    if not isinstance(config, Mapping):
        raise CheckpointError(f"scheduler_config is a {type(config).__name__}; accepted is a dict")
    name = config.get("_class_name", "DDPMScheduler")
    if not isinstance(name, str):
        raise CheckpointError(f"scheduler_config: _class_name is {short(name)}; accepted is a string")
    return name


def _storable_state(network: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    dtype = dtype or next(network.parameters()).dtype
    if dtype not in DTYPES.values():
        raise CheckpointError(f"dtype is {dtype}; accepted are {', '.join(map(str, DTYPES.values()))}")
    state = {}
    for key, value in network.state_dict().items():
        state[key] = value.to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous()
        if not state[key].isfinite().all():
            raise CheckpointError(f"network: {key} has values that are not finite in {dtype}")
    return state


def _write_directory(directory: str | os.PathLike[str], contents: Mapping[str, bytes], overwrite: bool) -> None:
    path = Path(directory)
    if not path.absolute().parent.is_dir():
        raise CheckpointError(f"directory {path}: its parent is not a directory")
    with atomic_directory(path, overwrite=overwrite) as folder:
        for name, data in contents.items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_synced(folder / name, data)
