"""The model of a job: a process reads it once, and the digest of what it read is how a job knows its model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from stepfusion.checkpoints.bundled import bundled_models
from stepfusion.checkpoints.load import load_model, network_config
from stepfusion.checkpoints.loaded import LoadedModel
from stepfusion.engine import Engine
from stepfusion.execution.forking import check_process
from stepfusion.options import ExecutionOptions


@dataclass(frozen=True)
class Checkpoint:
    """A model as it was read.

    Attributes:
        source: what names it: a bundled model, a model directory or a file.
        model: what is in it, with the weights of ``lora`` added.
        lora: LoRA files, each with its scale.
    """

    source: str
    model: LoadedModel
    lora: tuple[tuple[str, float], ...] = ()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of every weight's name, dtype, shape and value, and of all configs, of all parts of a latent model.

        The layout of the directory and of its files does not count.
        """
        digest, model = hashlib.sha256(), self.model
        configs = [network_config(model.network), model.scheduler_config, model.class_names, model.null_label]
        digest.update(json.dumps(configs, sort_keys=True).encode())
        for name, tensor in sorted(model.network.state_dict().items()):
            _add(digest, name, tensor)
        for name, content in model.contents():
            _add(digest, name, content)
        return digest.hexdigest()

    @property
    def address(self) -> str:
        """What names it to processes that run elsewhere: the bundled model, or an absolute path."""
        return self.source if self.source in bundled_models() else str(Path(self.source).absolute())

    @property
    def lora_addresses(self) -> tuple[tuple[str, float], ...]:
        """The LoRA files by absolute paths, for processes that run elsewhere."""
        return tuple((str(Path(path).absolute()), scale) for path, scale in self.lora)

    def engine(self, execution: ExecutionOptions) -> Engine:
        """An engine of this model."""
        return Engine.from_pretrained(self.model, **vars(execution))


def read_checkpoint(source: str, lora: Sequence[tuple[str, float]] = ()) -> Checkpoint:
    """Read and check a bundled model, a model directory or a file, and the LoRA files that are added to it.

    Raises:
        CheckpointError: what is missing or wrong.
        ValueError: nothing of a LoRA can be added to this model.
        RuntimeError: this process was forked from one that had computed (:mod:`stepfusion.execution.forking`).
    """
    check_process()
    return Checkpoint(source, load_model(source, lora or None), tuple(lora))


def _add(digest: hashlib._Hash, name: str, content: Tensor | str) -> None:
    """Let a digest depend on a tensor or a text, and on its name."""
    if isinstance(content, str):
        digest.update(f"{name} {len(content)}\n{content}\n".encode())
        return
    digest.update(f"{name} {content.dtype} {list(content.shape)}\n".encode())
    digest.update(content.detach().cpu().contiguous().numpy().data)
