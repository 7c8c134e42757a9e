"""The JSON of an HTTP request: its fields, how each is parsed, and one sentence if one is wrong.

An option of a sampler's table is a field as it is declared in :class:`stepfusion.options.TableOptions`. Another
sampling option reaches HTTP by being a field of :class:`GenerateRequest` under its name in
:class:`stepfusion.options.SamplingOptions`, and is passed on by that name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self, TypeGuard, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails

from stepfusion.options import TABLE_OPTIONS, SamplingOptions, TableOptions, table_option
from stepfusion.samplers.table_request import TableRequest
from stepfusion.serving.http.errors import InvalidRequest, shown

_MAX_SEED = (1 << 64) - 1
_MAX_INDEX = (1 << 32) - 1

Seed = Annotated[int, Field(ge=0, le=_MAX_SEED)]
Index = Annotated[int, Field(ge=0, le=_MAX_INDEX)]
_Label = int | str | None
T = TypeVar("T")
PerImage = Annotated[list[T], Field(min_length=1)]  # an empty list would ask for no image

Prompt = Annotated[str, Field(max_length=10_000)]

#: Options of :class:`stepfusion.options.SamplingOptions` that JSON cannot hold: they are tensors, or about one.
TENSOR_OPTIONS = frozenset({"start", "image", "strength", "mask", "noise", "conditions", "null_conditions"})
_IMAGE_OPTIONS = tuple(name for name in SamplingOptions.__annotations__ if name not in TABLE_OPTIONS)
#: What JSON has for an option of a table, and how its description begins.
_JSON_KINDS: dict[type, tuple[Any, str]] = {
    int: (int, "an integer of at least 1"),
    float: (float, "a finite number"),
    bool: (bool, "true or false"),
    list: (PerImage[float], "a list of numbers"),
    str: (str, "a text"),
}


class RequestModel(BaseModel):
    """The fields of a request, each described by what it must be."""

    # building at import would look for plugins in every installed package
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, defer_build=True)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """The request that a JSON body holds.

        InvalidRequest if it holds none, or a field that is unknown or of a wrong type or size.
        """
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            raise cls._refusal(error.errors(include_url=False)[0]) from None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The request of these values; InvalidRequest as for :meth:`parse`."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise cls._refusal(error.errors(include_url=False)[0]) from None

    @classmethod
    def _refusal(cls, error: ErrorDetails) -> InvalidRequest:
        if error["type"] == "json_invalid":
            return InvalidRequest(f"the body is not JSON: {error['ctx']['error']}", code="invalid_json")
        if not error["loc"]:
            return InvalidRequest(f"the body must be a JSON object, got {shown(error['input'])}", code="invalid_type")
        name = str(error["loc"][0])
        if name not in cls.model_fields:
            near = get_close_matches(name, cls.model_fields, 1)
            meant = f"; {near[0]!r} may be meant" if near else ""
            message = f"unknown field {shown(name)}{meant}; /openapi.json has all that are accepted"
            return InvalidRequest(message, param=name, code="unknown_parameter")
        expected = f"{name} must be {cls.model_fields[name].description}"
        if error["type"] == "missing":
            return InvalidRequest(f"{expected}, and is missing", param=name, code="missing_required_parameter")
        return InvalidRequest(f"{expected}, got {shown(error['input'])}", param=name)


def _table_fields() -> type[RequestModel]:
    """A model whose fields are the options of :class:`stepfusion.options.TableOptions`, in what JSON can hold."""
    fields: dict[str, Any] = {}
    for name in TABLE_OPTIONS:
        declared = table_option(name)
        kind, what = _JSON_KINDS[declared.kind]
        limits: dict[str, Any] = {"ge": 1} if declared.kind is int else {}
        if name == "sampler":  # which of them this model's path has, the description of the API says
            kind, what = str, "the name of a sampler; the model says which by default"
        elif name == "timesteps":
            kind, what = list[Index], "a list of integers from 0 on, each smaller than the one before"
        elif declared.choices:
            kind, what = Literal[declared.choices], f"one of {', '.join(map(repr, declared.choices))}"
        fields[name] = (kind | None, Field(None, title=declared.option.text, description=what, **limits))
    return create_model("TableFields", __base__=RequestModel, **fields)


_TableFields: Any = _table_fields()


class GenerateRequest(_TableFields):  # type: ignore[misc]
    """Images to make. Everything has a default; an image is a function of model, sampler, seed, index and label."""

    n: int | None = Field(None, ge=1, description="an integer of at least 1")
    guidance: float | PerImage[float] | None = Field(
        None, description="a finite number, or a list of one for each image"
    )
    labels: _Label | PerImage[_Label] = Field(
        None, description="a class's number or name, null for none, or a list of one for each image"
    )
    prompt: Prompt | PerImage[Prompt] | None = Field(
        None, description="a text of at most 10000 characters, or a list of one for each image"
    )
    negative_prompt: Prompt | PerImage[Prompt] | None = Field(
        None, description="a text of at most 10000 characters, or a list of one for each image"
    )
    seed: Seed | PerImage[Seed] = Field(
        0, description="an integer from 0 to 2**64 - 1, or a list of one for each image"
    )
    indices: PerImage[Index] | None = Field(
        None, description="a list of integers from 0 to 2**32 - 1, one for each image"
    )
    priority: int = Field(
        0, ge=-1000, le=1000, description="an integer from -1000 to 1000, of which higher ones get lanes first"
    )
    deadline_s: float | None = Field(None, description="the seconds after which the images are of no use")

    @property
    def table_request(self) -> TableRequest:
        """The sampler that was asked for, and its options."""
        asked: TableOptions = self._given(TABLE_OPTIONS)  # type: ignore[assignment]
        return TableRequest(**asked)

    @property
    def image_options(self) -> dict[str, Any]:
        """The sampling options that were given beside the sampler's own, by their names."""
        return self._given(_IMAGE_OPTIONS)

    @property
    def count(self) -> int:
        """How many images: ``n``, or as many as the last declared option that is a list has entries, or 1."""
        lengths = [len(value) for value in self.image_options.values() if is_list(value)]
        return self.n if self.n is not None else (lengths or [1])[-1]

    def _given(self, names: Sequence[str]) -> dict[str, Any]:
        """The fields of these names that have a value, in the order of their declaration."""
        given = {name: getattr(self, name) for name in type(self).model_fields if name in names}
        return {name: value for name, value in given.items() if value is not None}


class PictureRequest(GenerateRequest):
    """Images to make, and how to send them."""

    format: str = Field("png", pattern="^(png|npz)$", description="'png' or 'npz'")


class StreamRequest(GenerateRequest):
    """Images to make, and how often to tell of them."""

    every: int | None = Field(None, ge=1, le=_MAX_INDEX, description="an integer of at least 1, in steps")


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether an option has one value for each image."""
    return isinstance(value, Sequence) and not isinstance(value, str)
