"""Units on the machines of a Ray cluster, by Ray Data: the engine is an actor, and the units come from a range."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from stepfusion.bulk.manifest import Record
from stepfusion.bulk.messages import failure_message, finished_message, read_message
from stepfusion.bulk.worker import Worker, WorkerConfig
from stepfusion.errors import BulkError, first_line

_SPARE_CPUS = 2  # Ray Data reads the range in tasks of their own, and waits for ever if the actors hold every CPU


class EngineActor:
    """A :class:`Worker` as Ray Data calls it: a batch of places in ``units`` in, a message for each out.

    What goes wrong is a message too: Ray repeats what raises, and wraps it in errors of its own.
    """

    def __init__(self, config: WorkerConfig, units: Sequence[int]) -> None:
        self._config, self._units = config, units
        self._worker: Worker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make the units at the places ``id``; ``message`` is a JSON text for each."""
        return {"message": np.array([self._message(int(place)) for place in batch["id"]])}

    def _message(self, place: int) -> str:
        try:
            if self._worker is None:
                self._worker = Worker(self._config)
            return finished_message(self._worker.make(self._units[place]))
        except Exception as error:
            return failure_message(error)


def make_with_ray(
    config: WorkerConfig, address: str, workers: int | None, device: str, units: Sequence[int]
) -> Generator[Record, None, None]:
    """Make the units with actors on a Ray cluster, and yield their records as they come.

    Args:
        address: of the cluster, "auto" for the one that this machine belongs to, "local" to start one here.
        workers: actors; by default one for each GPU of the cluster, or one if it has none.
        device: of every actor, "auto" for the GPU that Ray gives it, or the CPU if it gives none.

    A worker that dies is started again by Ray, and its unit with it. One unit is one block: the smallest piece that
    Ray Data repeats.

    Raises:
        BulkError: Ray is not installed, cannot be reached, or what went wrong in an actor.
    """
    try:
        import ray
        from ray.data import ActorPoolStrategy
    except ImportError as error:
        raise BulkError(f"--ray needs Ray Data: pip install stepfusion[ray] ({first_line(error)})") from None
    local: dict[str, Any] = {}
    if address == "local":
        cpus = max(os.cpu_count() or 1, (workers or 1) + _SPARE_CPUS)
        local = {"num_cpus": cpus, "include_dashboard": False}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BulkError(f"--ray {address}: {first_line(error)}") from None
    chatter = logging.getLogger("ray.data")
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        gpus = 0 if device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
        size = workers or max(1, gpus)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        made = ray.data.range(len(units), override_num_blocks=len(units)).map_batches(
            EngineActor,
            fn_constructor_kwargs={"config": config.on(device), "units": list(units)},
            batch_size=1,
            compute=ActorPoolStrategy(size=min(size, len(units))),
            num_cpus=1,
            num_gpus=1 if gpus else 0,
        )
        for row in made.iter_rows():
            yield read_message(row["message"], "a Ray worker")
    except ray.exceptions.RayError as error:
        raise BulkError(f"Ray: {first_line(error)}") from error
    finally:
        chatter.setLevel(level)
        ray.shutdown()
