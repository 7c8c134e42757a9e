"""Bulk generation that survives: many images as shards, resumable at any moment, with the same bytes in the end.

``stepfusion generate`` is its command line, and docs/bulk.md its guide.
"""

from stepfusion.bulk.job import Job
from stepfusion.bulk.placement import Placement
from stepfusion.bulk.run import run, verify
from stepfusion.bulk.worker import WorkerConfig
from stepfusion.options import ExecutionOptions
from stepfusion.samplers.table_request import TableRequest

__all__ = ["ExecutionOptions", "Job", "Placement", "TableRequest", "WorkerConfig", "run", "verify"]
