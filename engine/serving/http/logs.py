"""The logs of the local server: a line on stderr for each request, and what goes wrong."""

from __future__ import annotations

import logging
from typing import Any

LEVELS = ("debug", "info", "warning", "error")
#: Levels at which each request is a line.
REQUESTS = ("debug", "info")
_PROBES = ("/healthz", "/readyz", "/metrics")


class WithoutProbes(logging.Filter):
    """Leaves out the requests by which others watch the server, every few seconds."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record of uvicorn's access log is shown; its third argument is the path."""
        arguments = record.args
        return not (isinstance(arguments, tuple) and len(arguments) > 2 and arguments[2] in _PROBES)


def log_config(level: str) -> dict[str, Any]:
    """What :func:`logging.config.dictConfig` takes: everything of ``level`` and above goes to stderr.

    "info" shows each request, as it came and as its images were done; "debug" also those that watch the server.
    """
    shown = level.upper()
    handler = {"class": "logging.StreamHandler", "stream": "ext://sys.stderr"}
    own = {"handlers": ["default"], "level": shown, "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"without_probes": {"()": WithoutProbes}},
        "formatters": {
            "default": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"},
            "access": {
                "()": "uvicorn.logging.AccessFormatter",
                "fmt": '%(asctime)s %(levelname)s %(client_addr)s "%(request_line)s" %(status_code)s',
                "use_colors": False,
            },
        },
        "handlers": {
            "default": {**handler, "formatter": "default"},
            "access": {
                **handler,
                "formatter": "access",
                "filters": [] if level == "debug" else ["without_probes"],
            },
        },
        "loggers": {
            "stepfusion": own,
            "uvicorn": own,
            "uvicorn.access": {**own, "handlers": ["access"]},
        },
    }
