"""Lanes of one kind: who is in which, and the runner that moves them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from stepfusion.lanes.runner import Runner
from stepfusion.lanes.transfer import as_index
from stepfusion.serving.job import Job


@dataclass
class Seat:
    """An image in its lane, since the tick ``entered``."""

    job: Job
    image: int
    lane: int
    entered: int


class LanePool:
    """Lanes whose images share the way in which the network is called.

    There is a runner for each width, and the images are in the narrowest that holds them: few images do not pay for
    many lanes. They move to another runner when they become more or fewer, to its first lanes.

    Args:
        make: a runner with so many lanes, over the store that all share, prepared to keep x0.
        widths: the numbers of lanes, rising.
    """

    def __init__(self, make: Callable[[int], Runner], widths: Sequence[int]) -> None:
        self._make, self._widths = make, tuple(widths)
        self._runners: dict[int, Runner] = {}
        self._seats: dict[int, Seat] = {}  # by lane
        self._due: dict[int, list[Seat]] = {}  # by the tick with which they are done
        self._now = 0
        self._width = self._widths[0]

    @property
    def lanes(self) -> int:
        """The most images at a time."""
        return self._widths[-1]

    @property
    def busy(self) -> int:
        """How many images are in lanes."""
        return len(self._seats)

    @property
    def free(self) -> int:
        """For how many there is room."""
        return self.lanes - self.busy

    @property
    def runner(self) -> Runner:
        """The runner of the present width; made at need."""
        return self._at(self._width)

    def warm_up(self) -> Iterator[Runner]:
        """Make the runner of each width, and let it tick without images: what is compiled or captured is so then."""
        for width in self._widths:
            runner = self._at(width)
            runner.tick(keep_x0=True)
            yield runner

    def admit(self, chosen: Sequence[tuple[Job, int]]) -> None:
        """Give lanes to images, and take the width that holds all."""
        self._fit(self.busy + len(chosen))
        if not chosen:
            return
        lanes = [lane for lane in range(self._width) if lane not in self._seats][: len(chosen)]
        tickets = [job.request.tickets[image] for job, image in chosen]
        self.runner.admit(lanes, tickets, [job.first or 0 for job, _ in chosen])
        for lane, (job, image) in zip(lanes, chosen, strict=True):
            seat = Seat(job, image, lane, self._now)
            self._seats[lane] = seat
            self._due.setdefault(self._now + job.steps(image), []).append(seat)

    def tick(self) -> None:
        """Move every image one step on."""
        self.runner.tick(keep_x0=True)
        self._now += 1

    def watched(self) -> list[tuple[Job, int, int, list[Seat]]]:
        """What callers want to see of this tick: job, part of its table, step, and the images that did that step."""
        together: dict[tuple[int, int, int], list[Seat]] = {}
        for seat in self._seats.values():
            job = seat.job
            if job.progress is None:
                continue
            step = self._now - seat.entered
            if step % job.every == 0 or step == job.steps(seat.image):
                together.setdefault((job.number, job.request.parts[seat.image], step - 1), []).append(seat)
        return [(seats[0].job, part, step, seats) for (_, part, step), seats in together.items()]

    def done(self) -> list[Seat]:
        """The images that are done with this tick, in the order of their lanes."""
        done = [seat for seat in self._due.get(self._now, ()) if self._seats.get(seat.lane) is seat]
        return sorted(done, key=lambda seat: seat.lane)

    def leave(self, seats: Sequence[Seat]) -> None:
        """Take out these images, which are done."""
        self._due.pop(self._now, None)
        for seat in seats:
            del self._seats[seat.lane]

    def copies(self, seats: Sequence[Seat], *buffers: str) -> list[Tensor]:
        """Copies on the device of these buffers of the runner, of the lanes of these images."""
        runner = self.runner
        where = as_index([seat.lane for seat in seats], runner.x.device)
        return [getattr(runner, name)[where].clone() for name in buffers]

    def ticks_left(self, job: Job) -> int:
        """How many ticks the last of a request's images in lanes still takes."""
        seats = [seat for seat in self._seats.values() if seat.job is job]
        return max((seat.entered + job.steps(seat.image) - self._now for seat in seats), default=0)

    def remove(self, job: Job) -> None:
        """Take out a request's images, wherever they are."""
        lanes = [lane for lane, seat in self._seats.items() if seat.job is job]
        if lanes:
            self.runner.park(lanes)
        for lane in lanes:
            del self._seats[lane]

    def halve(self) -> list[Seat] | None:
        """Drop every runner, and be half as many lanes; the images that lost theirs. None where there is one."""
        half = self.lanes // 2
        if half == 0:
            return None
        narrower = (*(width for width in self._widths if width < half), half)
        lost = list(self._seats.values())
        self._seats.clear()
        self._due.clear()
        self._runners.clear()
        self._widths, self._width = narrower, narrower[0]
        return lost

    def _fit(self, images: int) -> None:
        """Move to the narrowest runner that holds so many."""
        width = next(width for width in self._widths if width >= images)
        if width == self._width:
            return
        before, self._width = self.runner, width
        seats = sorted(self._seats.values(), key=lambda seat: seat.lane)
        if seats:
            self.runner.take_over(before, [seat.lane for seat in seats])
        for lane, seat in enumerate(seats):
            seat.lane = lane
        self._seats = dict(enumerate(seats))

    def _at(self, width: int) -> Runner:
        runner = self._runners.get(width)
        if runner is None:
            runner = self._runners[width] = self._make(width)
        return runner
