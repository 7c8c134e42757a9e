"""Who gets a free lane: requests in turn, those of higher priority first, and nobody waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush

from stepfusion.serving.served_request import ServedRequest


class Admission:
    """Requests that have images without a lane.

    Free lanes go to the highest level, one image a request in turn. A request's level is its priority, and one more
    for every ``aging`` seconds since it last got a lane: so one of low priority is served at last, and one of many
    images does not outrank the others by being served slowly.
    """

    def __init__(self, aging: float) -> None:
        self._aging = aging
        self._jobs: dict[int, ServedRequest] = {}
        self._turn = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: ServedRequest) -> None:
        """Let a request wait, unless all of its images have a lane."""
        if job.waiting:
            self._jobs[job.number] = job

    def discard(self, job: ServedRequest) -> None:
        """Forget a request."""
        self._jobs.pop(job.number, None)

    def pick(self, lanes: int, now: float, ready: Callable[[ServedRequest], bool]) -> list[tuple[ServedRequest, int]]:
        """The images that get so many free lanes at the time ``now``, taken off what their requests wait with.

        ``ready``: whether a request can start now.
        """
        if not self._jobs or lanes < 1:
            return []
        chosen: list[tuple[ServedRequest, int]] = []
        heap = [(-self._level(job, now), job.turn, number) for number, job in self._jobs.items()]
        heapify(heap)
        while heap and len(chosen) < lanes:
            level, _, number = heappop(heap)
            job = self._jobs[number]
            if not ready(job):
                continue
            self._turn += 1
            job.turn, job.since = self._turn, now
            chosen.append((job, job.waiting.popleft()))
            if job.waiting:
                heappush(heap, (level, job.turn, number))
            else:
                del self._jobs[number]
        return chosen

    def _level(self, job: ServedRequest, now: float) -> int:
        return job.priority + int((now - job.since) / self._aging)
