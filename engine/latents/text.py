"""Prompts as the conditions of a denoiser: CLIP's states of their tokens, as Stable Diffusion and SDXL take them.

Stable Diffusion 1 and 2 take the normalised states after the last layer (Rombach et al. 2022); SDXL those before the
last layer of two models side by side, and the second's projection of the prompt's end (Podell et al. 2023, table 1).
"""

from __future__ import annotations

import copy
import json
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from stepfusion import _checks
from stepfusion.errors import CheckpointError
from stepfusion.kernels.launch import plain_torch
from stepfusion.latents.clip import TextModel
from stepfusion.latents.tokenizer import read_tokenizer

STATES, POOLED = "encoder_hidden_states", "text_embeds"
MAX_CHARACTERS = 10_000

_SHOWN = 200  # characters of a prompt in a warning


@dataclass(frozen=True)
class TextPart:
    """One text encoder of a pipeline, with its tokenizer.

    Attributes:
        tokenizer: the directory of the tokenizer's files.
        config: what the text encoder's ``config.json`` says.
        tensors: its weights by name.
    """

    tokenizer: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


class _Encoded(NamedTuple):
    conditions: dict[str, Tensor]
    cut: str | None  # what did not fit the first model


class TextEncoder:
    """Maps a prompt to conditions, one prompt at a time: its bits depend on no other prompt.

    Prompts that were encoded lately are kept. Threads may share an encoder; they encode one after the other.

    Attributes:
        shapes: of the conditions by name: ``encoder_hidden_states`` [L, D], and ``text_embeds`` [P] if the last model
            projects.
    """

    def __init__(
        self,
        models: Sequence[TextModel],
        tokenizers: Sequence[Any],
        *,
        zeros_for_empty: bool = False,
        cache: int = 64,
    ) -> None:
        """Join text models with their tokenizers.

        Args:
            models: one, or two whose states stand side by side; only the last may project.
            tokenizers: of :func:`~stepfusion.latents.tokenizer.read_tokenizer`, one for each.
            zeros_for_empty: no prompt is zeros (SDXL's ``force_zeros_for_empty_prompt``), and not the empty prompt.
            cache: how many prompts are kept; 0 for none.

        Raises:
            CheckpointError: models and tokenizers do not fit each other.
            ValueError, TypeError: naming the argument.
        """
        if not 1 <= len(models) <= 2 or len(models) != len(tokenizers):
            raise ValueError(
                f"models must be one or two, each with a tokenizer, got {len(models)}, {len(tokenizers)}"
            )
        self._models, self._tokenizers = tuple(models), tuple(tokenizers)
        self._projects = models[-1].projects
        self._zeros = _checks.boolean("zeros_for_empty", zeros_for_empty)
        self._size = _checks.integer("cache", cache, 0, 1 << 20)
        self._kept: OrderedDict[tuple[str, str, int | None], _Encoded] = OrderedDict()
        self._keeping, self._encoding = threading.Lock(), threading.Lock()
        self._device = next(models[0].parameters()).device
        _check_parts(self._models, self._tokenizers)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.shapes[STATES] = (tokenizers[0].model_max_length, sum(m.config.hidden_size for m in models))
        if self._projects:
            self.shapes[POOLED] = (models[-1].config.projection_dim,)

    @classmethod
    def from_parts(
        cls,
        *parts: TextPart,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        zeros_for_empty: bool = False,
        cache: int = 64,
    ) -> Self:
        """Build the text encoders of a pipeline from files and tensors: one, or SDXL's two in their order.

        Raises:
            CheckpointError: a file, a config or a tensor does not fit, or transformers is missing.
        """
        models = [TextModel(part.config, part.tensors, dtype=dtype).to(device) for part in parts]
        tokenizers = [
            read_tokenizer(Path(part.tokenizer), model.config.max_position_embeddings)
            for part, model in zip(parts, models, strict=True)
        ]
        return cls(models, tokenizers, zeros_for_empty=zeros_for_empty, cache=cache)

    def to(self, device: torch.device | str) -> Self:
        """This encoder if its models are on the device, else a copy of it there; nothing is kept of its prompts."""
        there = torch.device(device)
        if there == self._device:
            return self
        models = [copy.deepcopy(model).to(there) for model in self._models]
        moved = type(self)(models, self._tokenizers, zeros_for_empty=self._zeros, cache=self._size)
        moved._encoding = self._encoding  # tokenizers are shared, and are no thread's alone
        return moved

    @property
    def explanation(self) -> str:
        """What encodes prompts, and where, for people."""
        sizes = " and ".join(f"{m.config.num_hidden_layers} layers of {m.config.hidden_size}" for m in self._models)
        dtype = str(next(self._models[0].parameters()).dtype).removeprefix("torch.")
        return f"CLIP, {sizes}, {self.shapes[STATES][0]} tokens, on {self._device} in {dtype}"

    def encode(self, prompt: str, prompt_2: str | None = None, *, clip_skip: int | None = None) -> dict[str, Tensor]:
        """The conditions of a prompt.

        Args:
            prompt: at most 10,000 characters. Tokens after the models' last position are cut off, with a warning that
                shows them.
            prompt_2: for the second model; by default the same.
            clip_skip: take the states so many layers earlier.

        Returns:
            float32 tensors of :attr:`shapes`, on the CPU, where any thread's stream may read them; they are the
            caller's own.

        Raises:
            ValueError: naming the argument.
        """
        first = _checked("prompt", prompt)
        second = first if prompt_2 is None else _checked("prompt_2", prompt_2)
        if prompt_2 is not None and len(self._models) == 1:
            raise ValueError("prompt_2 is for a second text encoder, and there is one")
        if clip_skip is not None:
            fewest = min(model.config.num_hidden_layers for model in self._models)
            clip_skip = _checks.integer("clip_skip", clip_skip, 0, fewest - self._projects)
        encoded = self._lookup((first, second, clip_skip))
        if encoded.cut is not None:
            shown = encoded.cut if len(encoded.cut) <= _SHOWN else encoded.cut[:_SHOWN] + "..."
            most = self.shapes[STATES][0]
            warnings.warn(f"prompt has more than {most} tokens; cut off was {shown!r}", UserWarning, stacklevel=2)
        return {name: value.clone() for name, value in encoded.conditions.items()}

    def null(self) -> dict[str, Tensor]:
        """The conditions of no prompt, for classifier-free guidance (Ho & Salimans 2022)."""
        if not self._zeros:
            return self.encode("")
        return {name: torch.zeros(shape, dtype=torch.float32, device="cpu") for name, shape in self.shapes.items()}

    def contents(self) -> Iterator[tuple[str, Tensor | str]]:
        """By name, every weight of the models, and what their tokenizers and the empty prompt are."""
        yield "text.zeros_for_empty", str(self._zeros)
        for number, (model, tokenizer) in enumerate(zip(self._models, self._tokenizers, strict=True)):
            backend = getattr(tokenizer, "backend_tokenizer", None)
            rules = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
            yield f"text.{number}.tokenizer", f"{tokenizer.model_max_length} {tokenizer.pad_token_id} {rules}"
            yield f"text.{number}.config", repr(model.config)
            yield from ((f"text.{number}.{name}", value) for name, value in sorted(model.state_dict().items()))

    def _lookup(self, key: tuple[str, str, int | None]) -> _Encoded:
        with self._keeping:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        encoded = self._encode(*key)
        with self._keeping:
            self._kept[key] = encoded
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
        return encoded

    def _encode(self, prompt: str, prompt_2: str, clip_skip: int | None) -> _Encoded:
        states, projected, cuts = [], None, []
        with self._encoding, plain_torch(gradients=False):
            for model, tokenizer, text in zip(self._models, self._tokenizers, (prompt, prompt_2), strict=False):
                tokens, cut = _tokens(tokenizer, text)
                said = model(tokens.to(self._device))
                cuts += [cut] if cut is not None else []
                projected = said.projected
                if self._projects:  # SDXL: not normalised
                    states.append(said.layers[-2 - (clip_skip or 0)])
                else:
                    states.append(said.last if clip_skip is None else model.normalise(said.layers[-1 - clip_skip]))
            conditions = {STATES: torch.cat(states, dim=-1).to("cpu", torch.float32)}
            if projected is not None:
                conditions[POOLED] = projected.to("cpu", torch.float32)
        return _Encoded(conditions, cuts[0] if cuts else None)


def _check_parts(models: Sequence[TextModel], tokenizers: Sequence[Any]) -> None:
    if any(model.projects for model in models[:-1]) or (len(models) == 2 and not models[1].projects):
        raise CheckpointError("of two text encoders the second one must have a projection, and the first one none")
    for model, tokenizer in zip(models, tokenizers, strict=True):
        most = max(tokenizer.get_vocab().values())
        if most >= model.config.vocab_size:
            raise CheckpointError(
                f"the tokenizer has the token {most}; its text encoder has vocab_size {model.config.vocab_size}"
            )
    if len({tokenizer.model_max_length for tokenizer in tokenizers}) != 1:
        raise CheckpointError("the two tokenizers have different numbers of tokens for a prompt")


def _tokens(tokenizer: Any, text: str) -> tuple[Tensor, str | None]:
    """The tokens [L] of a prompt, padded or cut to the model's length, and the text of those that were cut off."""
    most = tokenizer.model_max_length
    kept = tokenizer(text, padding="max_length", max_length=most, truncation=True)["input_ids"]
    every = tokenizer(text, padding=False, truncation=False, verbose=False)["input_ids"]
    cut = tokenizer.decode(every[most - 1 : -1]) if len(every) > most else None
    return torch.tensor(kept, dtype=torch.int64), cut


def _checked(name: str, prompt: object) -> str:
    if not isinstance(prompt, str):
        raise ValueError(f"{name} must be a text, got {type(prompt).__name__}")
    if len(prompt) > MAX_CHARACTERS:
        raise ValueError(f"{name} must have at most {MAX_CHARACTERS} characters, got {len(prompt)}")
    if "\0" in prompt:
        raise ValueError(f"{name} must have no NUL character, got one at {prompt.index(chr(0))}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be text that UTF-8 can hold, got a lone surrogate at {error.start}") from None
    return str(prompt)
