"""Strict models of values that were read already, and one form of sentence for what does not fit them."""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import Repr
from typing import Any, Self

import numpy as np
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from stepfusion.files.json_files import FileModel

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 60

_KINDS = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "True or False",
    "string_type": "a string",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "finite_number": "a finite number",
}
_LIMITS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}


class StrictModel(FileModel):
    """A :class:`FileModel` that is also made of values in memory: a config as a dict, flags as arguments."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The model of these values; NumPy's scalars count as Python's.

        Raises:
            TypeError: a value is of another type, named in one sentence with what is accepted.
            ValueError: a value is out of range, missing, or of an unknown name.
        """
        plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in values.items()}
        try:
            return cls.model_validate(plain)
        except ValidationError as error:
            details = error.errors(include_url=False)[0]
            kind = TypeError if details["type"].endswith("_type") else ValueError
            known = f"; accepted are {', '.join(cls.model_fields)}" if details["type"] == "extra_forbidden" else ""
            raise kind(sentence(details) + known) from None


def sentence(details: ErrorDetails) -> str:
    """What is wrong with a value: where it stands, what is accepted, what was given."""
    name = ".".join(map(str, details["loc"])) or "the file"
    kind, context = details["type"], details.get("ctx", {})
    if kind == "missing":
        return f"{name} is missing"
    if kind == "extra_forbidden":
        return f"{name} is unknown"
    if kind == "value_error":
        return str(context["error"])
    given = _SHORT.repr(details["input"])
    if kind == "literal_error":
        accepted = str(context["expected"]).replace(" or ", ", ")
        return f"{name} must be {'one of ' if ',' in accepted else ''}{accepted}, got {given}"
    if kind in _LIMITS:
        words, limit = _LIMITS[kind]
        return f"{name} must be {words} {context[limit]:g}, got {given}"
    if kind in _KINDS:
        return f"{name} must be {_KINDS[kind]}, got {given}"
    return f"{name}: {details['msg']}, got {given}"
