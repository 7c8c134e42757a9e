"""What images are conditioned on beside labels: tensors, or prompts that an encoder makes tensors of.

A condition is data of a lane, and so is what stands for none: a negative prompt is a request's own. An image's
conditions are made and prepared when it enters its lane (:mod:`stepfusion.lanes.prepared`), so that a request of many
prompts holds texts, and not their tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor

from stepfusion._checks import Same, contexts
from stepfusion.model_spec import ModelSpec
from stepfusion.networks.conditioned import ConditionSpec
from stepfusion.options import SamplingOptions

#: Makes the conditions of one image, by name, of a prompt; of None, those that stand for no prompt. It may have a
#: method ``negative`` of the same form for what an image is not to show, a method ``to`` that gives it for a device,
#: an ``explanation``, and ``missing``: why it cannot make any, which is then said of every prompt.
Prompts = Callable[[str | None], Mapping[str, Tensor]]

_LONGEST_PROMPT = 10_000
_TENSORS = "give conditions, as tensors"
_ENCODED_AT_ONCE = 64  # prompts of a request whose faults are found before any work is done

#: The options that are about conditions.
CONDITION_OPTIONS = ("prompt", "negative_prompt", "conditions", "null_conditions")


@dataclass(frozen=True)
class ConditionSet:
    """The conditions of one image; sets of one engine with the same key are the same.

    Attributes:
        load: makes them, tensors by name, each of one image.
    """

    key: tuple[Hashable, ...]
    load: Callable[[], dict[str, Tensor]] = field(compare=False, repr=False)


@dataclass(frozen=True)
class LaneConditions:
    """What an image is conditioned on, and what stands for none of it; the same where that makes no difference."""

    given: ConditionSet
    null: ConditionSet


class LaneConditionsOfImages(Sequence[LaneConditions]):
    """One for each image of a request, made when it is asked for."""

    def __init__(self, given: _Half, null: _Half, images: range) -> None:
        self._given, self._null, self._images = given, null, images

    def __len__(self) -> int:
        return len(self._images)

    @overload
    def __getitem__(self, place: int) -> LaneConditions: ...
    @overload
    def __getitem__(self, place: slice) -> LaneConditionsOfImages: ...
    def __getitem__(self, place: int | slice) -> LaneConditions | LaneConditionsOfImages:
        if isinstance(place, slice):
            return LaneConditionsOfImages(self._given, self._null, self._images[place])
        image = self._images[place]
        return LaneConditions(self._given.of(image), self._null.of(image))


def context_vectors(spec: ModelSpec, given: torch.Tensor, count: int) -> Sequence[tuple[float, ...]]:
    """One context vector for each image, from floats [K] for all or [n, K]."""
    size = spec.context_size
    if list(given.shape) not in ([size], [count, size]):
        raise ValueError(
            f"labels that are contexts must have shape [{size}] or [{count}, {size}], got {list(given.shape)}"
        )
    if not bool(given.isfinite().all()):
        raise ValueError("labels that are contexts must be finite, got NaN or infinite values")
    return contexts(given, count)


def make_conditions(
    spec: ModelSpec, prompts: Prompts | None, options: SamplingOptions, count: int, *, guided: bool
) -> Sequence[LaneConditions]:
    """The conditions of each of ``count`` images, as a request's options give them.

    ``prompts`` makes conditions of texts, if the model has an encoder.

    Raises:
        TypeError, ValueError: naming the option or the condition.
    """
    given = {name: options.get(name) for name in CONDITION_OPTIONS if options.get(name) is not None}
    missing = getattr(prompts, "missing", None)
    prompts = prompts if missing is None else None
    for name in ("prompt", "negative_prompt"):
        if name in given and prompts is None:
            raise ValueError(f"{name} was given, and this engine has no text encoder: {missing or _TENSORS}")
    half = _Half(spec.conditions, prompts, _texts("prompt", given.get("prompt"), count))
    half.take("conditions", given.get("conditions", {}), count)
    negative: Prompts | None = getattr(prompts, "negative", None)
    texts = _texts("negative_prompt", given.get("negative_prompt"), count)
    null = _Half(spec.conditions, negative or prompts, texts, "" if negative is None else "negative")
    null.take("null_conditions", given.get("null_conditions", {}), count)
    if guided and prompts is None and not null.tensors and spec.null_label is None:
        raise ValueError("guidance needs null_conditions: this model has none of its own")
    half.complete({})
    if guided:
        null.complete(half.tensors)
    return LaneConditionsOfImages(half, null if guided else half, range(count))


def prompts_on(prompts: Prompts | None, device: torch.device) -> Prompts | None:
    """What encodes prompts on a device, if it has a method ``to``; else as it is."""
    move: Callable[[torch.device], Prompts] | None = getattr(prompts, "to", None)
    return prompts if move is None else move(device)


def images_of(options: SamplingOptions, conditions: Sequence[ConditionSpec]) -> int | None:
    """How many images the prompts or conditions are for; None if each is one for all."""
    for name in ("prompt", "negative_prompt"):
        texts: Any = options.get(name)
        if isinstance(texts, Sequence) and not isinstance(texts, str):
            return len(texts)
    sizes = {one.name: len(one.shape) for one in conditions}
    for name in ("conditions", "null_conditions"):
        tensors: Any = options.get(name)
        for key, value in tensors.items() if isinstance(tensors, Mapping) else ():
            if isinstance(value, Tensor) and value.ndim > sizes.get(key, value.ndim):
                return len(value)
    return None


def blank_options(spec: ModelSpec, guidance: float = 1.0) -> SamplingOptions:
    """What an image of this model needs to be asked for, whatever it will show: for trials and warm-ups."""
    options: SamplingOptions = {"guidance": guidance}
    if spec.num_classes is not None:
        options["labels"] = 0
    if spec.conditions:
        zeros = {
            one.name: torch.zeros(one.shape, dtype=torch.int64 if one.integer else torch.float32)
            for one in spec.conditions
        }
        options["conditions"], options["null_conditions"] = zeros, zeros
    return options


class _Half:
    """The conditions of all images, or what stands for none: texts for an encoder, and tensors, which go before."""

    def __init__(
        self, specs: Sequence[ConditionSpec], prompts: Prompts | None, texts: Sequence[str | None], side: str = ""
    ) -> None:
        self._specs, self._prompts, self._texts, self._side = tuple(specs), prompts, texts, side
        self._encoded: dict[str | None, Mapping[str, Tensor]] = {}
        #: by name: the tensor, whether it is one for all images, and what its key holds
        self.tensors: dict[str, tuple[Tensor, bool, object]] = {}

    def take(self, option: str, tensors: object, count: int) -> None:
        """Check tensors by name: one for all images, or one each."""
        known = {spec.name: spec for spec in self._specs}
        if not isinstance(tensors, Mapping):
            raise TypeError(f"{option} must be a mapping of names to tensors, got {type(tensors).__name__}")
        for name, value in tensors.items():
            if name not in known:
                raise ValueError(f"{option} has {name!r}, and the model's conditions are {', '.join(known)}")
            shape = known[name].shape
            for_all = not isinstance(value, Tensor) or value.ndim == len(shape)
            self.tensors[name] = known[name].check(value, None if for_all else count), for_all, object()

    def complete(self, others: Mapping[str, tuple[Tensor, bool, object]]) -> None:
        """Take ``others`` for what neither tensors nor texts give, and find faults before any work is done.

        Raises:
            ValueError: a condition is missing.
        """
        if not self._texts:
            return
        if all(spec.name in self.tensors for spec in self._specs):
            self._prompts = None  # there is nothing left to encode
        if self._prompts is not None:
            distinct = dict.fromkeys([self._texts.value] if isinstance(self._texts, Same) else self._texts)
            # Of many prompts only one now, and the others when their images enter lanes.
            few = list(distinct) if len(distinct) <= _ENCODED_AT_ONCE else [self._texts[0]]
            self._encoded = {text: self._prompts(text) for text in few}
        encoded = set(self._encoded[self._texts[0]]) if self._encoded else set[str]()
        self.tensors = {**{name: one for name, one in others.items() if name not in encoded}, **self.tensors}
        for spec in self._specs:
            if spec.name not in encoded and spec.name not in self.tensors:
                raise ValueError(f"conditions must have {spec.name!r}, {list(spec.shape)} for all images or for each")

    def of(self, image: int) -> ConditionSet:
        """The conditions of one image."""
        text, prompts, own = self._texts[image], self._prompts, self.tensors
        key = tuple((name, token, None if for_all else image) for name, (_, for_all, token) in own.items())

        def load() -> dict[str, Tensor]:
            found = dict[str, Tensor]()
            if prompts is not None:
                found.update(self._encoded[text] if text in self._encoded else prompts(text))
            found.update((name, tensor if for_all else tensor[image]) for name, (tensor, for_all, _) in own.items())
            return {spec.name: spec.check(found.get(spec.name)) for spec in self._specs}

        return ConditionSet(((self._side, text) if prompts is not None else None, *key), load)


def _texts(option: str, value: object, count: int) -> Sequence[str | None]:
    """A text for each image, None for no prompt; TypeError or ValueError naming the option."""
    if value is None or isinstance(value, str):
        return Same(None if value is None else _text(option, value), count)
    if not isinstance(value, Sequence):
        raise TypeError(f"{option} must be a text or a list of texts, got {type(value).__name__}")
    if len(value) != count:
        raise ValueError(f"{option} must be one text or one for each of the {count} images, got {len(value)}")
    return [_text(option, one) for one in value]


def _text(option: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{option} must be a text or a list of texts, got {value!r}")
    if len(value) > _LONGEST_PROMPT:
        raise ValueError(f"{option} must have at most {_LONGEST_PROMPT} characters, got {len(value)}")
    if "\0" in value:
        raise ValueError(f"{option} must not have a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{option} must be text that UTF-8 can hold, got a lone surrogate") from None
    return value
