"""Exporting networks for runtimes other than this one.

So far the common root of all formats: a network as a ``torch.export`` program with a dynamic batch, checked against
the engine's own network before it is handed out.
"""

from stepfusion.export.program import export_program

__all__ = ["export_program"]
