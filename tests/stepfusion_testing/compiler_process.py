"""A process that has Triton's compiler, for tests whose own process has its interpreter."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def json_of(temporary: pytest.TempPathFactory, *command: str) -> Any:
    """The JSON that ``python command`` prints, without TRITON_INTERPRET and with an empty compile cache.

    It runs once for all workers of a test session, and imports the package of this module. A status that is not 0 is
    accepted if there is JSON: what it says is for the test to look at.
    """
    root = temporary.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else temporary.getbasetemp()
    stem = hashlib.sha256(" ".join(command).encode()).hexdigest()[:16]
    output = root / f"{stem}.json"
    with (root / f"{stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            environment |= {"TRITON_CACHE_DIR": str(temporary.mktemp("triton")), "OMP_NUM_THREADS": "1"}
            paths = [str(Path(__file__).parents[1]), *filter(None, [environment.get("PYTHONPATH")])]
            environment["PYTHONPATH"] = os.pathsep.join(paths)
            done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
            assert done.stdout, done.stderr[-2000:]
            output.write_text(done.stdout)
    return json.loads(output.read_text())
