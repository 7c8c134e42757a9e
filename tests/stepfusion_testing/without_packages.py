"""Hides every optional package from the process that imports this: for ``pytest -p``, or a ``sitecustomize``."""

from stepfusion_testing.absent_packages import hide

hide()
