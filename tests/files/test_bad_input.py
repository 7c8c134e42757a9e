"""Bad input to file systems: each mistake's error to the letter, before any work, and nothing left behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stepfusion_testing.bad_input import (
    tree,
)

pytestmark = pytest.mark.usefixtures("bad_input_workspace")


def test_a_file_system_that_takes_no_more_bytes() -> None:
    """The kernel refuses: a limit on the size of files, where a small full disk would need a mount."""
    pytest.importorskip("resource")
    Path("grid.png").write_bytes(b"the old one")
    before = tree()
    program = (
        "import resource, sys, torch; torch.set_num_threads(1); from stepfusion.commands.main import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200)); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, *["sample", "model", "-n", "9", "--steps", "2", "--out", "grid.png"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"stepfusion: grid.png: {os.strerror(errno.EFBIG)}\n"
    assert tree() == before
