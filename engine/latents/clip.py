"""CLIP's text models (Radford et al. 2021), built from a config and tensors: what it says of a prompt's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stepfusion.errors import CheckpointError
from stepfusion.files.strict_model import StrictModel
from stepfusion.latents.filled import FLOATS, built, fill, settings
from stepfusion.latents.libraries import library

KINDS = ("CLIPTextModel", "CLIPTextModelWithProjection")

_PREFIX = "text_model."
_POSITIONS = "embeddings.position_ids"  # in files of before 2023: 0, 1, 2, ...


class TextConfig(StrictModel):
    """What a text model's config says of its architecture; the defaults are those of transformers."""

    vocab_size: Annotated[int, Field(ge=1, le=1 << 20)] = 49408
    hidden_size: Annotated[int, Field(ge=1, le=1 << 14)] = 512
    intermediate_size: Annotated[int, Field(ge=1, le=1 << 16)] = 2048
    projection_dim: Annotated[int, Field(ge=1, le=1 << 14)] = 512
    num_hidden_layers: Annotated[int, Field(ge=1, le=256)] = 12
    num_attention_heads: Annotated[int, Field(ge=1, le=1 << 10)] = 8
    max_position_embeddings: Annotated[int, Field(ge=3, le=1 << 12)] = 77
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-5
    eos_token_id: Annotated[int, Field(ge=0)] = 49407
    use_attention_mask: Literal[False] = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads ({self.num_attention_heads}), got "
                f"{self.hidden_size}"
            )
        return self


class TextStates(NamedTuple):
    """What a text model says of one prompt.

    Attributes:
        layers: the states [L, D] before the first layer, and after each.
        last: the states after the last layer, normalised.
        projected: of the state at the prompt's end [P]; None without a projection.
    """

    layers: tuple[Tensor, ...]
    last: Tensor
    projected: Tensor | None


class TextModel(nn.Module):
    """A text model of transformers, frozen, for one prompt at a time.

    Attributes:
        config: its architecture.
        projects: whether it projects the state at a prompt's end.
    """

    def __init__(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32
    ) -> None:
        """Build a ``CLIPTextModel`` or ``CLIPTextModelWithProjection``.

        Args:
            config: what its ``config.json`` says; entries that say nothing of the architecture are left out.
            tensors: its weights by name, with or without the prefix ``text_model.``.
            dtype: of the weights and of all that is computed: float32, bfloat16 or float16.

        Raises:
            CheckpointError: the config or the tensors do not fit, or transformers is missing; it names the first.
            ValueError: dtype is another one.
        """
        super().__init__()
        if dtype not in FLOATS:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
        kind, self.config = checked_text_config(config)
        self.projects = kind == "CLIPTextModelWithProjection"
        transformers = library("transformers", f"a text encoder ({kind})")
        what = f"the text encoder ({kind})"
        arguments = self.config.model_dump(exclude={"use_attention_mask"})
        self.network = built(lambda: getattr(transformers, kind)(transformers.CLIPTextConfig(**arguments)), what)
        fill(self.network, _names_of(self.network, tensors, what), what, dtype)
        _fill_positions(self.network, next(self.network.parameters()).device, what)

    def forward(self, tokens: Tensor) -> TextStates:
        """Read tokens int64 [L] of one prompt."""
        out = self.network(tokens[None], output_hidden_states=True)
        projected = out.text_embeds[0] if self.projects else None
        return TextStates(tuple(state[0] for state in out.hidden_states), out.last_hidden_state[0], projected)

    def normalise(self, states: Tensor) -> Tensor:
        """The norm after the last layer, for states [L, D] of another one."""
        model = self.network.text_model if self.projects else self.network
        model = getattr(model, "text_model", model)
        normalised: Tensor = model.final_layer_norm(states)  # type: ignore[operator, union-attr]
        return normalised


def checked_text_config(config: Mapping[str, Any]) -> tuple[str, TextConfig]:
    """The class that a text encoder's ``config.json`` names, and its architecture.

    Raises:
        CheckpointError: the class is another one, or an entry is of another type or out of range.
    """
    named = config.get("architectures")
    kind = named[0] if isinstance(named, list | tuple) and len(named) == 1 else named
    if kind not in KINDS:
        raise CheckpointError(
            f"architectures of a text encoder must be one of {', '.join(KINDS)}, got {named!r:.100}"
        )
    if config.get("model_type", "clip_text_model") != "clip_text_model":
        raise CheckpointError(
            f"model_type of a text encoder must be 'clip_text_model', got {config['model_type']!r:.100}"
        )
    known = {key: value for key, value in settings(config).items() if key in TextConfig.model_fields}
    try:
        return kind, TextConfig.of(known)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the config of {kind}: {error}") from None


def _names_of(network: nn.Module, tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Tensors under the names that this version of transformers has: with ``text_model.`` or without."""
    today = {name.removeprefix(_PREFIX): name for name in network.state_dict()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(_PREFIX)
        if short == _POSITIONS:
            continue
        if today.get(short, name) in renamed:
            raise CheckpointError(f"{what} has {short} twice, with the prefix {_PREFIX} and without it")
        renamed[today.get(short, name)] = tensor
    return renamed


def _fill_positions(network: nn.Module, device: torch.device, what: str) -> None:
    """The one buffer that no file holds."""
    for name, buffer in network.named_buffers():
        if not buffer.is_meta:
            continue
        owner, _, own = name.rpartition(".")
        if own != "position_ids":
            raise CheckpointError(f"{what} has the buffer {name}, which this version does not know")
        positions = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
        setattr(network.get_submodule(owner), own, positions)
