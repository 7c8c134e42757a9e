"""Copies of kernel files with one text replaced, as modules of their own."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import stepfusion.kernels
from stepfusion_testing.twins import mutate

FOLDER = Path(stepfusion.kernels.__file__).parent


def planted(folder: Path, file: str, old: str | None = None, new: str = "") -> ModuleType:
    """The module ``file`` of kernels/ with ``old`` replaced, written into ``folder`` and imported from there.

    Its name and the namespace of its ops come from the folder's name, so that one folder holds one module.
    """
    text = (FOLDER / file).read_text()
    text = mutate(text, old, new) if old is not None else text
    name = re.sub(r"\W", "_", f"mutant_{folder.name}").lower()
    path = folder / file
    path.write_text(text.replace('custom_op("stepfusion::', f'custom_op("{name}::'))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
