"""A training run in a directory: it goes on from the newest state there, and saves states and metrics on its way."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn

from stepfusion.files.json_files import append_line
from stepfusion.files.regular import open_regular
from stepfusion.training.config import TrainConfig
from stepfusion.training.datasets import ImageDataset
from stepfusion.training.metrics import METRICS, forget_rows_after
from stepfusion.training.state import check_room_for_states, latest_state, load_state, remove_leftovers, save_state
from stepfusion.training.trainer import Trainer

LOCK = ".train.lock"


def train(
    config: TrainConfig,
    dataset: ImageDataset,
    directory: str | Path,
    *,
    device: str | torch.device = "cpu",
    workers: int = 1,
    start_from: nn.Module | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    begin: Callable[[Trainer], object] = lambda trainer: None,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Trainer:
    """Train, or go on from the newest state in `directory`, until ``config.steps`` or until `should_stop`.

    Writes ``metrics.jsonl`` and ``state-*/`` (the last two) in `directory`; the last step made is always saved.

    Args:
        config: what to train and how.
        dataset: the images to train on.
        directory: the directory of the run, which is made if it is missing.
        device: the device to train on.
        workers: threads (see `Trainer`).
        start_from: a network of the same architecture, whose weights the first step starts from, in place of random
            ones; a run that goes on goes on from its own.
        should_stop: is called after every step; True ends the run.
        begin: is called with the trainer as it is before the first step that is made now.
        report: is called with each row of metrics: step, loss (mean since the row before), lr, images_per_s and
            elapsed_s.

    Returns:
        The trainer as it stands; ``trainer.done`` says whether it was finished.

    Raises:
        ValueError: `directory` has a state of another run, or is in use by another process; `dataset` does not fit
            `config`; `start_from` is another network.
        FloatingPointError: the loss is not finite.
    """
    directory = Path(directory)
    trainer = Trainer(config, dataset, device, workers)
    if start_from is not None:
        trainer.start_from(start_from)
    directory.mkdir(parents=True, exist_ok=True)
    with _alone(directory):
        remove_leftovers(directory)
        newest = latest_state(directory)
        if newest is not None:
            trainer.restore(load_state(newest))
        check_room_for_states(directory, trainer.step)
        forget_rows_after(directory / METRICS, trainer.step)
        begin(trainer)
        _go_on(trainer, directory, should_stop, report)
    return trainer


def _go_on(
    trainer: Trainer, directory: Path, should_stop: Callable[[], bool], report: Callable[[dict[str, Any]], None]
) -> None:
    """Make the steps that are left, and save states and metrics of them."""
    saved = trainer.step
    for row in _run(trainer, should_stop):
        if row:
            append_line(directory / METRICS, row)
            report(row)
        if trainer.step % trainer.config.save_every == 0:
            save_state(directory, trainer.state())
            saved = trainer.step
    if trainer.step != saved:
        save_state(directory, trainer.state())


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold the directory of a run; the lock of a process that died is free.

    Raises:
        ValueError: another process trains there, or the lock cannot be taken.
    """
    path = directory / LOCK
    if os.path.lexists(path):
        with open_regular(path) as file:  # some versions of the library empty whatever stands there
            if file.read(1):
                raise ValueError(f"{path} is not the lock of a training run: name another directory, or move it away")
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"{directory} is in use by another training process") from None
    except NotImplementedError as error:
        raise ValueError(f"{directory} is on a file system without locks: {error}") from None
    try:
        yield
    finally:
        lock.release()


def _run(trainer: Trainer, should_stop: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """Make steps; yields after each a row of metrics, or an empty one between two rows.

    The loss is looked at when a row or a state is due, so that no state of a run that went astray is saved.
    """
    config, start, before = trainer.config, time.monotonic(), trainer.elapsed
    total, count, since = torch.zeros((), device=trainer.device), 0, start
    while not trainer.done and not should_stop():
        total += trainer.train_step()
        count += 1
        now = time.monotonic()
        trainer.elapsed = before + now - start
        logs = trainer.done or trainer.step % config.log_every == 0
        if not logs and trainer.step % config.save_every:
            yield {}
            continue
        loss = total.item() / count
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {trainer.step}; a lower learning_rate may help")
        if not logs:
            yield {}
            continue
        yield {
            "step": trainer.step,
            "loss": loss,
            "lr": config.learning_rate_at(trainer.step - 1),
            "images_per_s": round(count * config.batch_size / (now - since), 1),
            "elapsed_s": round(trainer.elapsed, 1),
        }
        total, count, since = torch.zeros_like(total), 0, time.monotonic()
