"""What a worker in another process sends back: a finished unit or an error, as JSON, so that nothing is unpickled."""

from __future__ import annotations

import json
from dataclasses import asdict

from stepfusion.bulk.manifest import Record, record_from
from stepfusion.errors import BulkError, NonFiniteError, first_line


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
    content = json.loads(message)
    if "error" in content:
        kind = NonFiniteError if content["non_finite"] else BulkError
        raise kind(f"{worker}: {content['error']}")
    return record_from(content["record"])
