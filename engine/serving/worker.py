"""The one thread that touches engine and lanes, and the inbox through which all others talk to it."""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext

import torch

from stepfusion.errors import first_line
from stepfusion.serving.containment import contained
from stepfusion.serving.errors import EngineClosed, EngineDead
from stepfusion.serving.open_requests import OpenRequests
from stepfusion.serving.scheduler import Scheduler
from stepfusion.serving.served_request import ServedRequest
from stepfusion.serving.watchdog import Patience, Watchdog

logger = logging.getLogger("stepfusion.serving")

_LAST_ROUND_SECONDS = 5.0  # for the round under way, when nothing is wanted of it any more


class Worker:
    """Runs a scheduler until it is told to stop.

    Its states are "new", "starting", "ready", "closing", "closed" and "dead". The thread is a daemon: it keeps no
    interpreter from exiting. Nobody waits for it without a limit: if a round does not end, it is left behind, and
    ends by itself if it ever comes back.

    Args:
        make: makes the scheduler, in the thread.
        requests: those that are under way.
        hang_after: seconds after which a round of ticks that has not ended makes the engine dead; None for never.
    """

    def __init__(
        self,
        make: Callable[[], Scheduler],
        device: torch.device,
        requests: OpenRequests,
        hang_after: float | None,
    ) -> None:
        self._make, self._device, self._requests = make, device, requests
        # a request, the number of one that was cancelled, or a mere nudge
        self._inbox: queue.SimpleQueue[ServedRequest | int | None] = queue.SimpleQueue()
        self._lock = threading.RLock()  # a finalizer that closes may interrupt whoever holds it
        self._settled = threading.Event()  # ready, or nothing more is to come
        self._over = threading.Event()  # the thread is at its end, or left behind
        self._thread = threading.Thread(target=self._run, name="stepfusion-serving", daemon=True)
        self._watchdog = Watchdog(requests, Patience(hang_after), lambda: self.round_since, self._hangs)
        self.scheduler: Scheduler | None = None  #: once it is made
        self._cause: BaseException | None = None
        self._dropped = self._left = False
        self.state = "new"
        self._process: int | None = None  # in which the thread is: a forked child has the object without it
        self.round_since: float | None = None  #: when the round under way began; None while nothing is to be done

    @property
    def idle(self) -> bool:
        """True if no request is on its way."""
        return self.scheduler is None or (self.scheduler.idle and self._inbox.empty())

    @property
    def left_behind(self) -> bool:
        """True while the thread is inside a round that nobody waits for any more."""
        return self._left and self._thread.is_alive()

    @property
    def moves(self) -> bool:
        """False if lanes that have images are moved by nobody."""
        return self.state != "dead" and not self._left

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
        if self.state == "ready" and self._is_elsewhere:
            raise EngineClosed("the engine takes no requests: its thread is in the process that forked this one")
        if self.state != "ready":
            raise EngineClosed("the engine takes no requests: " + _WHY[self.state])

    def submit(self, job: ServedRequest) -> None:
        """Hand a request over. EngineDead or EngineClosed if it is too late."""
        with self._lock:
            self.check()
            self._requests.add(job)
            self._inbox.put(job)
        self._watchdog.expect(job.deadline)

    def cancel(self, number: int) -> None:
        """Its caller wants nothing more of a request."""
        self._inbox.put(number)

    def close(self, *, drain: bool, timeout: float | None) -> bool:
        """Take no more requests; finish those there are, or end them with EngineClosed. Whether all were finished.

        Args:
            timeout: seconds to drain for; what is left then is ended.
        """
        if self._is_elsewhere:
            return False
        if threading.current_thread() in self._own_threads:
            raise RuntimeError("close was called in a thread of the engine, which it would have to wait for")
        self._stop()
        if drain and len(self._requests):
            self._over.wait(timeout)
        self._end_rest()
        return self.state == "closed" and not self._dropped

    def abandon(self) -> None:
        """End everything: the interpreter exits, or nobody has the engine any more. Any thread may come to this."""
        if self._is_elsewhere:
            return
        self._stop()
        if threading.current_thread() in self._own_threads:
            self._end_requests()
        else:
            self._end_rest()

    @property
    def _own_threads(self) -> tuple[threading.Thread, ...]:
        return self._thread, self._watchdog.thread

    @property
    def _is_elsewhere(self) -> bool:
        return self._process not in (None, os.getpid())

    def _stop(self) -> None:
        with self._lock:
            if self.state == "new":
                self.state = "closed"
                self._settled.set()
                self._over.set()
            elif self.state in ("starting", "ready"):
                self.state = "closing"
        self._inbox.put(None)

    def _end_rest(self) -> None:
        """End what is left, and wait for the round under way, but not for ever."""
        self._end_requests()
        while not self._over.wait(_LAST_ROUND_SECONDS):
            if self._leave("closed", None, self.round_since):
                with contained("the log"):
                    logger.warning("the engine was closed, and its thread was left in a tick that does not end")
                self._over.set()
        if not self._left and self._thread.ident is not None:
            self._thread.join()

    def _end_requests(self) -> None:
        error = EngineClosed("the engine was closed before this request was done")
        self._dropped |= self._requests.end_all("closed", error) > 0
        self._inbox.put(None)

    # A thread that does not come back

    def _hangs(self, since: float) -> bool:
        """The round that began then does not end: the engine is dead. False if it has ended meanwhile."""
        cause = TimeoutError(f"no tick has ended for {time.monotonic() - since:.3g} s")
        if not self._leave("dead", cause, since):
            return False
        with contained("the log"):
            logger.critical("the engine is dead: %s; its thread is here:\n%s", cause, self._where())
        self._requests.end_all("dead", self._dead())
        self._over.set()
        return True

    def _leave(self, state: str, cause: BaseException | None, since: float | None) -> bool:
        """Leave the thread behind in the round that began then; False if that has ended, or was left before."""
        with self._lock:
            if self._left or self._over.is_set() or self.round_since != since:
                return False
            self._left, self.state, self._cause = True, state, cause
            if self.scheduler is not None:
                self.scheduler.report(moves=False)
        self._watchdog.stop()
        self._settled.set()
        return True

    def _where(self) -> str:
        """Where the thread is, as tracebacks say it."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame is not None else "it has ended\n"

    # The thread

    def _run(self) -> None:
        try:
            cuda = self._device.type == "cuda"
            with torch.no_grad(), torch.cuda.device(self._device) if cuda else nullcontext():
                self._serve()
            self._ended("closed", None)
        except BaseException as error:
            with contained("the log"):
                logger.exception("the engine is dead")
            self._ended("dead", error)

    def _serve(self) -> None:
        scheduler = self.scheduler = self._make()
        scheduler.warm_up()
        with self._lock:
            if self.state == "starting":
                self.state = "ready"
        self._settled.set()
        self._watchdog.start()
        while not self._left and (self.state == "ready" or not self.idle):
            self._read_inbox(scheduler)
            scheduler.step()
            self._round_ended(scheduler)

    def _read_inbox(self, scheduler: Scheduler) -> None:
        """Do what others asked for; wait for it if there is nothing else to do."""
        waits = scheduler.idle and self.state == "ready"
        if waits:
            self.round_since = None
        while waits or not self._inbox.empty():
            waits = False
            asked = self._inbox.get()
            if self.round_since is None:
                self.round_since = time.monotonic()
            match asked:
                case ServedRequest() as job:
                    scheduler.add(job)
                case int() as number:
                    scheduler.cancelled(number)

    def _round_ended(self, scheduler: Scheduler) -> None:
        with self._lock:  # whoever leaves this thread behind has done so before, or finds another round
            self.round_since = time.monotonic()
            if not self._left:
                scheduler.report()

    def _ended(self, state: str, cause: BaseException | None) -> None:
        """The thread is at its end. Whoever holds the lock has put a request that is found here, or finds the state;
        what those who left this thread behind have said, stays.
        """
        with self._lock:
            if not self._left:
                self.state, self._cause = state, cause
                if cause is not None and self.scheduler is not None:
                    self.scheduler.report(moves=False)
        if cause is not None and self._cause is cause:
            self._requests.end_all("dead", self._dead())
        self._watchdog.stop()
        self._settled.set()
        self._over.set()

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
