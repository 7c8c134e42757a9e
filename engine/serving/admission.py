"""Who gets a free lane: the highest priority, then the least work, and nobody waits for ever."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush

from stepfusion.serving.served_request import ServedRequest


class Admission:
    """Requests that have images without a lane.

    Free lanes go to the highest level, and within it to the request with the least work without a lane, of equal ones
    to the first that came. So requests are finished one after the other instead of all at the end, and a small one
    does not wait for the images of a large one. A request's level is its priority, and one more for every ``aging``
    seconds since it last got a lane: so one of low priority or of many images is served at last.
    """

    def __init__(self, aging: float) -> None:
        self._aging = aging
        self._jobs: dict[int, ServedRequest] = {}

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
        heap = [(-self._level(job, now), _work(job, job.waiting), number) for number, job in self._jobs.items()]
        heapify(heap)
        while heap and len(chosen) < lanes:
            level, _, number = heappop(heap)
            job = self._jobs[number]
            if not ready(job):
                continue
            job.since = now
            chosen.append((job, job.waiting.popleft()))
            if job.waiting:
                heappush(heap, (level, _work(job, job.waiting), number))
            else:
                del self._jobs[number]
        return chosen

    def upcoming(self) -> list[int]:
        """The steps of the images that wait, in the order of their lanes if nothing changes. For any thread, as an
        estimate.
        """
        waiting = [(job, list(job.waiting)) for job in list(self._jobs.values())]
        waiting.sort(key=lambda one: (-one[0].priority, _work(*one), one[0].number))
        return [job.steps(image) for job, images in waiting for image in images]

    def _level(self, job: ServedRequest, now: float) -> int:
        return job.priority + int((now - job.since) / self._aging)


def _work(job: ServedRequest, waiting: Sequence[int]) -> int:
    """The steps of a request's images without a lane, each taken for as long as the next one."""
    return len(waiting) * job.steps(waiting[0]) if waiting else 0
