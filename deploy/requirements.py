"""Print what ``pyproject.toml`` asks for, with the extras that are named, a requirement a line."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = [line for name in sys.argv[1:] for line in project["optional-dependencies"][name]]
# an extra that names another one of ours, as in stepfusion[serving], is named beside it
print(*project["dependencies"], *(line for line in extras if not line.startswith(project["name"])), sep="\n")
