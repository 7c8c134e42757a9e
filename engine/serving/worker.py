"""The one thread that touches engine and lanes, and the inbox through which all others talk to it."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from stepfusion.errors import first_line
from stepfusion.serving.errors import EngineClosed, EngineDead
from stepfusion.serving.scheduler import Scheduler
from stepfusion.serving.served_request import ServedRequest

logger = logging.getLogger("stepfusion.serving")

_PATIENCE = 10.0  # seconds for the round under way, when nobody has the engine any more


class Worker:
    """Runs a scheduler until it is told to stop.

    Its states are "new", "starting", "ready", "closing", "closed" and "dead". The thread is a daemon: it keeps no
    interpreter from exiting.

    Args:
        make: makes the scheduler, in the thread.
    """

    def __init__(self, make: Callable[[], Scheduler], device: torch.device) -> None:
        self._make, self._device = make, device
        # a request, the number of one that was cancelled, or a mere nudge
        self._inbox: queue.SimpleQueue[ServedRequest | int | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._settled = threading.Event()  # ready, or dead
        self._thread = threading.Thread(target=self._run, name="stepfusion-serving", daemon=True)
        self.scheduler: Scheduler | None = None  #: once it is made
        self._cause: BaseException | None = None
        self._drop = self._dropped = False
        self.state = "new"
        self._process: int | None = None  # in which the thread is: a forked child has the object without it
        self.beat = time.monotonic()  #: when the last round ended, or the wait for something to do

    @property
    def idle(self) -> bool:
        """True if no request is on its way."""
        return self.scheduler is None or (self.scheduler.idle and self._inbox.empty())

    def start(self) -> None:
        """Start the thread, and wait until it is warm. EngineDead if that fails."""
        with self._lock:
            if self.state == "new":
                self.state, self._process = "starting", os.getpid()
                self._thread.start()
        self._settled.wait()
        self.check()

    def check(self) -> None:
        """EngineDead or EngineClosed unless requests are taken."""
        if self.state == "dead":
            raise self._dead()
        if self.state == "ready" and self._process != os.getpid():
            raise EngineClosed("the engine takes no requests: its thread is in the process that forked this one")
        if self.state != "ready":
            raise EngineClosed("the engine takes no requests: " + _WHY[self.state])

    def submit(self, job: ServedRequest) -> None:
        """Hand a request over. EngineDead or EngineClosed if it is too late."""
        with self._lock:
            self.check()
            self._inbox.put(job)

    def cancel(self, number: int) -> None:
        """Its caller wants nothing more of a request."""
        self._inbox.put(number)

    def close(self, *, drain: bool, timeout: float | None) -> bool:
        """Take no more requests; finish those there are, or end them with EngineClosed. Whether all were finished.

        Args:
            timeout: seconds to drain for; what is left then is ended.
        """
        self._stop(drop=not drain)
        self._join(timeout)
        if self._thread.is_alive():
            self._stop(drop=True)
            self._join(None)
        return self.state == "closed" and not self._dropped

    def abandon(self) -> None:
        """End everything, and wait a while for the round under way: the interpreter exits, or nobody is left."""
        self._stop(drop=True)
        if threading.current_thread() is not self._thread:
            self._join(_PATIENCE)

    def _stop(self, *, drop: bool) -> None:
        with self._lock:
            if self.state == "new":
                self.state = "closed"
                self._settled.set()
            elif self.state in ("starting", "ready"):
                self.state = "closing"
            self._drop |= drop
        self._inbox.put(None)

    def _join(self, timeout: float | None) -> None:
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        try:
            cuda = self._device.type == "cuda"
            with torch.no_grad(), torch.cuda.device(self._device) if cuda else nullcontext():
                self._serve()
            with self._lock:
                self.state = "closed"
        except BaseException as error:
            with self._lock:  # whoever holds it has put a request that is still found here, or finds the engine dead
                self.state, self._cause = "dead", error
            logger.exception("the engine is dead")
            self._fail_all()
        finally:
            self._settled.set()

    def _serve(self) -> None:
        scheduler = self.scheduler = self._make()
        scheduler.warm_up()
        with self._lock:
            if self.state == "starting":
                self.state = "ready"
        self._settled.set()
        while self.state == "ready" or not self.idle:
            self._read_inbox(scheduler)
            if self._drop and not scheduler.idle:
                self._dropped = True
                scheduler.end_all("closed", EngineClosed("the engine was closed before this request was done"))
            scheduler.step()
            self.beat = time.monotonic()

    def _read_inbox(self, scheduler: Scheduler) -> None:
        """Do what others asked for; wait for it if there is nothing else to do."""
        waits = scheduler.idle and self.state == "ready"
        while waits or not self._inbox.empty():
            waits = False
            match self._inbox.get():
                case ServedRequest() as job:
                    scheduler.add(job)
                case int() as number:
                    scheduler.cancelled(number)

    def _fail_all(self) -> None:
        """Fail every request that is here or still in the inbox."""
        late = []
        while not self._inbox.empty():
            if isinstance(job := self._inbox.get(), ServedRequest):
                late.append(job)
        if self.scheduler is not None:
            self.scheduler.fail_all(late, self._dead())

    def _dead(self) -> EngineDead:
        assert self._cause is not None
        error = EngineDead(f"the engine is dead: {first_line(self._cause)}")
        error.__cause__ = self._cause
        return error


_WHY = {
    "new": "it was not started (use `async with`, or start())",
    "starting": "it is still starting",
    "closing": "it is being closed",
    "closed": "it was closed",
}
