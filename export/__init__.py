"""Exporting networks for other runtimes, and loading what was exported.

Every export is a bundle (:mod:`stepfusion.export.bundle`): an artefact, a manifest with a hash of every file, a
sampler's table and a page that says how to run it. :mod:`stepfusion.export.formats` lists the formats, one
``to_FORMAT.py`` each; :mod:`stepfusion.export.base` is what they share.
"""

from stepfusion.export.batch import Batch
from stepfusion.export.bundle import Bundle, read_bundle
from stepfusion.export.formats import FORMATS
from stepfusion.export.load import ExportedNetwork, ExportedTick, load_network, load_tick
from stepfusion.export.manifest import Manifest, Tensorspec
from stepfusion.export.program import export_program

__all__ = [
    "FORMATS",
    "Batch",
    "Bundle",
    "ExportedNetwork",
    "ExportedTick",
    "Manifest",
    "Tensorspec",
    "export_program",
    "load_network",
    "load_tick",
    "read_bundle",
]
