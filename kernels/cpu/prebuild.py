"""Every library compiled ahead of time, for a wheel of this platform: ``python -m ...cpu.prebuild FOLDER``.

``make wheel PREBUILT=1`` runs it. Such a library fits the sources and the PyTorch that it is compiled with.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from stepfusion.kernels.cpu import compiler, library, sampling_library


def write_libraries(folder: Path) -> list[Path]:
    """Compile the libraries for every instruction set that is told apart on this kind of processor, into ``folder``.

    Raises:
        CompilerError: there is no compiler, or it fails.
    """
    x86_64 = platform.machine() in ("x86_64", "AMD64")
    folder.mkdir(parents=True, exist_ok=True)
    every = [*sampling_library.libraries(x86_64=x86_64), *(library.libraries() if x86_64 else [])]
    return [compiler.prebuild(*one, folder) for one in every]


if __name__ == "__main__":
    for path in write_libraries(Path(sys.argv[1])):
        print(path.name)
