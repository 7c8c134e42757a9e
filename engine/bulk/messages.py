"""What a worker in another process sends back: a finished unit or an error, as JSON, so that nothing is unpickled."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from stepfusion.bulk.manifest import Record
from stepfusion.bulk.stored import parse_stored
from stepfusion.errors import BulkError, NonFiniteError, first_line


@dataclass(frozen=True)
class _Message:
    """A finished unit, or what went wrong."""

    record: Record | None = None
    error: str | None = None
    non_finite: bool = False


def finished_message(record: Record) -> str:
    """The message that a unit is finished."""
    return json.dumps({"record": asdict(record)})


def failure_message(error: Exception) -> str:
    """The message that a unit could not be made."""
    clear = isinstance(error, (BulkError, NonFiniteError))
    return json.dumps(
        {"error": str(error) if clear else first_line(error), "non_finite": isinstance(error, NonFiniteError)}
    )


def read_message(message: str | bytes, worker: str) -> Record:
    """The record in a message; BulkError or NonFiniteError, which names the worker, if the message is a failure."""
    data = message if isinstance(message, bytes) else message.encode()
    content = parse_stored(data, _Message, f"the message of {worker}")
    if content.record is None:
        kind = NonFiniteError if content.non_finite else BulkError
        raise kind(f"{worker}: {content.error}")
    return content.record
