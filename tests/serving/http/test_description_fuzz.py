"""The description of the API, fuzzed: a server does what its OpenAPI document says, and fails at nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the HTTP application needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="requests need a server")
pytest.importorskip("schemathesis", reason="nothing makes requests of a description here")

from stepfusion.serving import AsyncEngine
from stepfusion.serving.http.app import make_app
from stepfusion.serving.http.limits import Limits
from stepfusion_testing.http_service import gated_engine, idle, served_here, until

SECONDS = int(os.environ.get("STEPFUSION_FUZZ_SECONDS", "60"))
#: What is held: no status 500 or above, no status, media type or body that the description does not have, and no
#: request that the description refuses, or allows, and the server treats otherwise.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
)


@pytest.mark.soak
def test_every_response_is_one_that_the_description_has(tmp_path: Path) -> None:
    _, engine = gated_engine(class_names=("Cat",), num_classes=2, null_label=1)
    service = AsyncEngine(engine, queue=4096)
    limits = Limits(images=8, steps=20, evaluations=400)
    with served_here(make_app(service, name="pets", limits=limits), drain=5.0) as (_, port):
        until(lambda: service.ready)
        found = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{port}/openapi.json"),
                *("--phases", "coverage,fuzzing", "--max-time", str(SECONDS), "--checks", ",".join(CHECKS)),
                *("--seed", "1", "--workers", "1", "--generation-database", "none", "--no-color"),
                *("--request-timeout", "60", "--warnings", "off", "--continue-on-failure"),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=SECONDS * 5 + 120,
        )
        until(lambda: idle(service))
        assert service.live
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
