"""What every checkpoint that was read gives: a network, and what is known of its model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from stepfusion.model_spec import ModelSpec
from stepfusion.samplers.scheduler_config import read_config


class LoadedModel:
    """The base of what is read from checkpoints.

    Attributes:
        network: in eval mode, float32, on the CPU.
        scheduler_config: the diffusion, in the words of a diffusers scheduler config.
        class_names: the name of each label, or None; the null label, if any, has no name.
        null_label: the label that means "no label" for classifier-free guidance (Ho & Salimans 2022), or None.
    """

    network: nn.Module
    scheduler_config: Mapping[str, Any]
    class_names: tuple[str, ...] | None
    null_label: int | None

    def __repr__(self) -> str:
        network = self.network
        size = sum(parameter.numel() for parameter in network.parameters())
        facts = [f"{type(network).__name__} of {size:,} parameters"]
        facts.append(str(self.scheduler_config.get("_class_name", "no scheduler")))
        facts += [] if self.class_names is None else [f"{len(self.class_names)} classes"]
        return f"{type(self).__name__}({', '.join(facts)})"

    def around(self, spec: ModelSpec) -> Mapping[str, Any]:
        """What stands around the network of a model with this spec, by the names of an engine's arguments."""
        return {}

    def contents(self) -> Iterator[tuple[str, Tensor | str]]:
        """By name, all that images depend on beside the network and what this object says of it."""
        yield from ()

    @cached_property
    def spec(self) -> ModelSpec:
        """What is known of the model beside its weights.

        Raises:
            CheckpointError: a setting of the scheduler config is unknown or not supported.
            ValueError: the network does not say the size of its images (:meth:`spec_with`).
        """
        return self.spec_with()

    def spec_with(self, **known: Any) -> ModelSpec:
        """The spec with some fields as the caller knows them, by their names in :class:`ModelSpec`."""
        schedule, prediction, options = read_config(self.scheduler_config)
        found = {
            "schedule": schedule,
            "prediction": prediction,
            "null_label": self.null_label,
            "class_names": self.class_names,
            "options": options,
        }
        return ModelSpec.of_network(self.network, **{**found, **known})
