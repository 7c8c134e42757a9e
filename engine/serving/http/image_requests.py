"""The fields of the image API that clients of other services speak, and the request that they stand for here.

What a client sends by habit and cannot change an image here is accepted: ``user``, and fields that leave the choice
to the server. What asks for something else is refused, so that nobody gets another image than the one they asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field

from stepfusion.engine import Engine
from stepfusion.serving.http.errors import InvalidRequest, shown
from stepfusion.serving.http.limits import Limits, check_limit
from stepfusion.serving.http.messages import class_name
from stepfusion.serving.http.multipart import Form
from stepfusion.serving.http.requests import GenerateRequest, Index, PerImage, Prompt, RequestModel, Seed

#: Fields of a form that are numbers, lists or truth values, and come as text.
_PARSED = frozenset(
    ("n", "seed", "steps", "eta", "guidance", "indices", "strength", "stream", "partial_images", "output_compression")
)
_FILES = ("image", "mask")
_SAMPLING = ("n", "seed", "sampler", "steps", "eta", "guidance", "indices")
_NONE = ("", "none")  # prompts that name no class


class ImageRequest(RequestModel):
    """Images of a class, in the words of the image API."""

    prompt: Prompt = Field(
        description="what to show, or without a text encoder the name of a class of the model, or its number"
    )
    model: str | None = Field(None, description="the name of the served model, or absent")
    n: int | None = Field(None, ge=1, description="an integer of at least 1")
    size: str | None = Field(None, description="'auto', or the size of the model's images, as in '28x28'")
    response_format: Literal["b64_json"] | None = Field(
        None, description="'b64_json' (images are kept nowhere, so that there is no 'url')"
    )
    output_format: Literal["png"] | None = Field(None, description="'png'")
    output_compression: Literal[100] | None = Field(None, description="100")
    background: Literal["auto", "opaque"] | None = Field(None, description="'auto' or 'opaque'")
    quality: Literal["auto", "standard"] | None = Field(None, description="'auto' or 'standard'")
    moderation: Literal["auto", "low"] | None = Field(None, description="'auto' or 'low'")
    stream: Literal[False] | None = Field(None, description="false (/v1/stream tells of progress)")
    partial_images: Literal[0] | None = Field(None, description="0 (/v1/stream tells of progress)")
    negative_prompt: Prompt | None = Field(
        None, description="what guidance leads away from, of at most 10000 characters, of models with a text encoder"
    )
    user: str | None = Field(None, description="a string, which is ignored")
    safety_identifier: str | None = Field(None, description="a string, which is ignored")
    seed: Seed | PerImage[Seed] = Field(
        0, description="an integer from 0 to 2**64 - 1, or a list of one for each image"
    )
    sampler: str | None = Field(None, description="the name of a sampler; the model says which by default")
    steps: int | None = Field(None, ge=1, description="an integer of at least 1")
    eta: float | None = Field(None, description="a finite number")
    guidance: float | PerImage[float] | None = Field(
        None, description="a finite number, or a list of one for each image"
    )
    indices: PerImage[Index] | None = Field(
        None, description="a list of integers from 0 to 2**32 - 1, one for each image"
    )

    def generate_request(self, engine: Engine, limits: Limits) -> GenerateRequest:
        """The request for images that these fields stand for; it has no more labels than ``limits`` allow images.

        Raises:
            InvalidRequest: a field does not fit the model, or there would be too many images.
        """
        size = size_of(engine)
        if self.size not in (None, "auto", size):
            raise InvalidRequest(f"size must be {size!r} or 'auto' for this model, got {shown(self.size)}")
        given = {key: getattr(self, key) for key in _SAMPLING}
        if engine.runners.takes_prompts:
            return GenerateRequest(**given, prompt=self.prompt, negative_prompt=self.negative_prompt)
        if self.negative_prompt is not None:
            raise InvalidRequest("negative_prompt was given, and this model has no text encoder")
        asked = GenerateRequest(**given)
        labels = labels_of(engine, self.prompt)
        if labels is None:
            return asked
        count = len(labels) if asked.count == 1 and self.n is None else asked.count
        check_limit("n", count, limits.images, "images")
        return GenerateRequest(**{**given, "n": count}, labels=[labels[i % len(labels)] for i in range(count)])


class EditRequest(ImageRequest):
    """Images made from one, in the words of the image API; the pictures come beside these fields."""

    strength: float | None = Field(None, gt=0, le=1, description="a number above 0, and at most 1")
    input_fidelity: Literal["high"] | None = Field(None, description="'high'")

    @classmethod
    def of_form(cls, form: Form) -> Self:
        """The request that a form's texts hold; InvalidRequest as for :meth:`parse`."""
        for name in form.files:
            if name not in _FILES:
                known = ", ".join((*_FILES, *cls.model_fields))
                message = f"unknown file {shown(name)}; accepted are the fields {known}"
                raise InvalidRequest(message, param=name, code="unknown_parameter")
        texts = {name: given for name, given in form.texts.items() if name not in _FILES}
        return cls.of({name: _value(name, given) for name, given in texts.items()})


def size_of(engine: Engine) -> str:
    """The size of an engine's images, in the words of the image API."""
    return f"{engine.image_shape[-1]}x{engine.image_shape[-2]}"


def labels_of(engine: Engine, prompt: str) -> list[int] | None:
    """The labels that a prompt names, as ``--labels`` of the command line: one class, or several separated by commas.

    Returns:
        None for a model without classes, whose prompt is empty.

    Raises:
        InvalidRequest: a part of the prompt is no class of the model.
    """
    if engine.num_classes is None:
        if prompt.strip().lower() not in _NONE:
            raise InvalidRequest(f"prompt must be empty, for this model has no classes, got {shown(prompt)}")
        return None
    names = {(class_name(engine, label) or "").lower(): label for label in range(engine.num_classes)}
    whole = _label_of(engine, names, prompt)
    found = [whole] if whole is not None else [_label_of(engine, names, part) for part in prompt.split(",")]
    if None not in found:
        return [label for label in found if label is not None]
    accepted = [", ".join(map(repr, engine.class_names[:12]))] if engine.class_names else []
    accepted += [f"the classes' numbers from 0 to {engine.num_classes - 1}"]
    accepted += ["'none'"] if engine.null_label is not None else []
    raise InvalidRequest(f"prompt must be among {'; '.join(accepted)} (GET /v1/model has all), got {shown(prompt)}")


def _label_of(engine: Engine, names: Mapping[str, int], text: str) -> int | None:
    """The label of a class by name, in any case, or by number; the null label for none; None if there is no such."""
    text = text.strip().lower()
    if text and text in names:
        return names[text]
    if text in _NONE:
        return engine.null_label
    if text.isascii() and text.isdecimal() and len(text) < 10 and int(text) < (engine.num_classes or 0):
        return int(text)
    return None


def _value(name: str, given: list[str]) -> Any:
    """What a form's field says: a list if it was given several times."""
    values: list[Any] = [_number(text) if name in _PARSED else text for text in given]
    if len(values) > 1 or (name == "indices" and not isinstance(values[0], list)):
        return values
    return values[0]


def _number(text: str) -> Any:
    """The JSON that a text is, or the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
