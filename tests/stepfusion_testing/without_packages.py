"""Hides every optional package from the process that imports this: a plugin of pytest, ``-p``, or a ``sitecustomize``."""

from stepfusion_testing.absent_packages import hide

hide()
