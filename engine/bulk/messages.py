"""What a worker in another process answers: a finished unit, or what went wrong; in JSON, so nothing is unpickled."""

from __future__ import annotations

import json
from dataclasses import asdict

from stepfusion.bulk.manifest import Record, from_facts
from stepfusion.errors import BulkError, NonFiniteError, first_line


def success(record: Record) -> str:
    """The answer for a finished unit."""
    return json.dumps({"record": asdict(record)})


def failure(error: Exception) -> str:
    """The answer where something went wrong."""
    clear = isinstance(error, (BulkError, NonFiniteError))
    return json.dumps(
        {"error": str(error) if clear else first_line(error), "non_finite": isinstance(error, NonFiniteError)}
    )


def record_of(answer: str | bytes, worker: str) -> Record:
    """The record in an answer; BulkError or NonFiniteError, which names the worker, where something went wrong."""
    facts = json.loads(answer)
    if "error" in facts:
        kind = NonFiniteError if facts["non_finite"] else BulkError
        raise kind(f"{worker}: {facts['error']}")
    return from_facts(facts["record"])
