"""Lanes of one kind: which image is in which lane, when it is done, and the runner that moves them all.

Offline sampling and the server's scheduler both keep their images here. An image enters a free lane between two ticks
and leaves with the tick that finishes it. Which tick that is follows from counting, so the host asks the device for
nothing in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepfusion.errors import NonFiniteError
from stepfusion.kernels import FINITE
from stepfusion.lanes.request import ActiveRequest, Event, Request
from stepfusion.lanes.runner import Part, Runner
from stepfusion.lanes.transfer import HostCopy, as_index

Image = tuple[ActiveRequest, int]


@dataclass(eq=False)
class Occupant:
    """An image in its lane, since the tick ``entered``."""

    active: ActiveRequest
    image: int
    lane: int
    entered: int


class Departure:
    """Images that left their lanes; their flags are on the way to the host.

    A flag holds the row at which its image first became non-finite. It is read only after the host has launched more
    work, so that the device does not wait for the host.
    """

    def __init__(self, occupants: Sequence[Occupant], flags: Tensor) -> None:
        self._images = [(occupant.active, occupant.image) for occupant in occupants]
        self._flags = HostCopy(flags)

    @property
    def ready(self) -> bool:
        """True once the flags are on the host."""
        return self._flags.ready

    def outcomes(self) -> Iterator[tuple[ActiveRequest, int, NonFiniteError | None]]:
        """Every image with the error that names it if it became non-finite; waits for the flags."""
        for (active, image), flag in zip(self._images, self._flags.wait().tolist(), strict=True):
            yield active, image, None if flag == FINITE else active.nonfinite(image, flag)


class LaneEngine:
    """Lanes whose images share the way in which the network is called.

    There is a runner for each width, and the images are in the narrowest that holds them: few images do not pay for
    many lanes. When their number changes, they move to the first lanes of another runner.

    Args:
        make: returns a runner with so many lanes. All runners of one lane engine share their device tables.
        widths: the numbers of lanes, rising.
        watched: keep the predictions x0 of every tick, which events show.
        given_noise: the requests bring the noise of every step (:attr:`Request.noise`).
        may_halve: go on with half the lanes if the device runs out of memory.
    """

    def __init__(
        self,
        make: Callable[[int], Runner],
        widths: Sequence[int],
        *,
        watched: bool = True,
        given_noise: bool = False,
        may_halve: bool = True,
    ) -> None:
        self._make, self._widths = make, tuple(widths)
        self._watched, self._given_noise, self._may_halve = watched, given_noise, may_halve
        self._runners: dict[int, Runner] = {}
        # The host counts ticks, so it knows which lane is done without asking the device.
        self._occupants: dict[int, Occupant] = {}  # by lane
        self._due: dict[int, list[Occupant]] = {}  # by the tick with which they are done
        self._finishing: list[Occupant] = []  # with the last tick
        self._now = 0
        self._width = self._widths[0]

    @property
    def lanes(self) -> int:
        """The most images at a time."""
        return self._widths[-1]

    @property
    def busy(self) -> int:
        """How many images are in lanes."""
        return len(self._occupants)

    @property
    def free(self) -> int:
        """How many more images the lanes can take."""
        return self.lanes - self.busy

    @property
    def runner(self) -> Runner:
        """The runner of the present width; it is made when it is first needed."""
        return self._at(self._width)

    @property
    def runners(self) -> tuple[Runner, ...]:
        """The runners that were made so far."""
        return tuple(self._runners.values())

    def warm_up(self) -> Iterator[Runner]:
        """Make the runner of each width, and let it tick without images: it is compiled and captured afterwards."""
        for width in self._widths:
            runner = self._at(width)
            runner.tick(keep_x0=self._watched)
            yield runner

    def admit(self, chosen: Sequence[Image]) -> None:
        """Give lanes to images, and take the narrowest width that holds all."""
        self._fit(self.busy + len(chosen))
        if not chosen:
            return
        # The lowest free lanes: consecutive lanes are read and written as slices, without an index on the device.
        lanes = [lane for lane in range(self._width) if lane not in self._occupants][: len(chosen)]
        for together in _admissions(chosen):
            self._start([chosen[place] for place in together], [lanes[place] for place in together])
        for lane, (active, image) in zip(lanes, chosen, strict=True):
            occupant = Occupant(active, image, lane, self._now)
            self._occupants[lane] = occupant
            self._due.setdefault(self._now + active.steps(image), []).append(occupant)

    def tick(self) -> None:
        """Move every image one step on."""
        noise = self._noise() if self._given_noise else None
        self.runner.tick(noise, keep_x0=self._watched, part=self._part())
        self._now += 1
        due = self._due.pop(self._now, [])
        self._finishing = [occupant for occupant in due if self._occupants.get(occupant.lane) is occupant]

    def events(self) -> list[tuple[ActiveRequest, Event]]:
        """What is to be seen of this tick: an event for all images at the same step of the same part of a table."""
        together: dict[tuple[int, int, int], list[Occupant]] = {}
        for occupant in self._occupants.values():
            step = self._now - occupant.entered
            if occupant.active.shows(occupant.image, step):
                part = occupant.active.request.parts[occupant.image]
                together.setdefault((id(occupant.active), part, step - 1), []).append(occupant)
        return [(group[0].active, self._event(part, step, group)) for (_, part, step), group in together.items()]

    def at_steps(self) -> dict[int, list[Occupant]]:
        """The images in lanes by how many steps of their tables they have made."""
        found: dict[int, list[Occupant]] = {}
        for occupant in self._occupants.values():
            found.setdefault(self._now - occupant.entered, []).append(occupant)
        return found

    def done(self) -> list[Occupant]:
        """The images that are done with this tick, in the order of their lanes."""
        return sorted(self._finishing, key=lambda occupant: occupant.lane)

    def values(self, occupants: Sequence[Occupant], buffer: str) -> Tensor:
        """A buffer of the runner at the lanes of these images: a view if the lanes are consecutive, else a copy."""
        runner = self.runner
        values: Tensor = getattr(runner, buffer)[as_index([o.lane for o in occupants], runner.x.device)]
        return values

    def depart(self, occupants: Sequence[Occupant]) -> Departure:
        """Take out images that are done. Read what is wanted of them (:meth:`values`) before."""
        departure = Departure(occupants, self.values(occupants, "flags").clone())
        for occupant in occupants:
            self._leave(occupant)
        return departure

    def ticks_left(self, active: ActiveRequest) -> int:
        """How many ticks the last of a request's images in lanes still takes."""
        ends = [o.entered + active.steps(o.image) for o in self._occupants.values() if o.active is active]
        return max((end - self._now for end in ends), default=0)

    def remaining(self) -> list[int]:
        """How many ticks each lane is still taken for, 0 for those that are free. For any thread, as an estimate."""
        busy = [o.entered + o.active.steps(o.image) - self._now for o in list(self._occupants.values())]
        return busy + [0] * (self.lanes - len(busy))

    def remove(self, active: ActiveRequest) -> None:
        """Take out all images of a request, done or not."""
        occupants = [occupant for occupant in self._occupants.values() if occupant.active is active]
        if occupants:
            self.runner.park([occupant.lane for occupant in occupants])
        for occupant in occupants:
            self._leave(occupant)

    def halve(self, error: torch.OutOfMemoryError) -> list[Image]:
        """Drop every runner, and have half as many lanes.

        Returns:
            the images that lost their lanes. They start again, and come out the same.

        Raises:
            torch.OutOfMemoryError: ``error``, if there is one lane or the number of lanes must not change.
        """
        half = self.lanes // 2
        if half == 0 or not self._may_halve:
            raise error
        narrower = (*(width for width in self._widths if width < half), half)
        lost = [(occupant.active, occupant.image) for occupant in self._occupants.values()]
        self._occupants.clear()
        self._due.clear()
        self._finishing.clear()
        # Dropped before the narrower ones are made: their memory is what is missing.
        self._runners.clear()
        self._widths, self._width = narrower, narrower[0]
        return lost

    def _leave(self, occupant: Occupant) -> None:
        """Forget an image: a request that is over must not be kept alive until the next tick."""
        del self._occupants[occupant.lane]
        if occupant in self._finishing:
            self._finishing.remove(occupant)

    def _start(self, chosen: Sequence[Image], lanes: Sequence[int]) -> None:
        """Put images into free lanes, from their given states or from noise of their own."""
        runner = self.runner  # first: making it may give the request's table its rows
        request, places = chosen[0][0].request, [image for _, image in chosen]
        runner.admit(
            lanes,
            [active.request.lane_starts[image] for active, image in chosen],
            [active.first or 0 for active, _ in chosen],
            None if request.start is None else request.start[places],
            None if request.known is None else request.known[places],
        )

    def _part(self) -> Part:
        """What of the network this tick runs: what the rows of the images in lanes need."""
        if not self.runner.keeps:
            return Part.WHOLE
        reuse = {occupant.active.request.reuses(occupant.image, self._now - occupant.entered)
                 for occupant in self._occupants.values()}  # fmt: skip
        if len(reuse) > 1:
            return Part.BOTH
        return Part.OUTER if True in reuse else Part.WHOLE

    def _noise(self) -> Tensor:
        """The z of this tick for every lane [lanes, ...], as the requests brought it."""
        x = self.runner.x
        noise = torch.zeros_like(x)
        together: dict[int, list[Occupant]] = {}
        for occupant in self._occupants.values():
            together.setdefault(id(occupant.active), []).append(occupant)
        for group in together.values():
            given = group[0].active.request.noise
            assert given is not None
            steps = [self._now - occupant.entered for occupant in group]
            values = given[steps, [occupant.image for occupant in group]]
            noise[[occupant.lane for occupant in group]] = values.to(x.device, x.dtype)
        return noise

    def _event(self, part: int, step: int, group: Sequence[Occupant]) -> Event:
        table = group[0].active.request.table
        timestep = table.told[table.starts[part] + step].item()
        x, x0 = (self.values(group, name).clone() for name in ("x", "x0"))
        return Event(step, table.steps(part), timestep, tuple(o.image for o in group), x, x0)

    def _fit(self, images: int) -> None:
        """Move to the narrowest runner that holds so many images."""
        width = next(width for width in self._widths if width >= images)
        if width == self._width:
            return
        # Lanes are independent, so an image goes on in another lane of another runner with the same bits.
        before, self._width = self.runner, width
        occupants = sorted(self._occupants.values(), key=lambda occupant: occupant.lane)
        if occupants:
            self.runner.take_over(before, [occupant.lane for occupant in occupants])
        for lane, occupant in enumerate(occupants):
            occupant.lane = lane
        self._occupants = dict(enumerate(occupants))

    def _at(self, width: int) -> Runner:
        runner = self._runners.get(width)
        if runner is None:
            runner = self._runners[width] = self._make(width)
        return runner


def _admissions(chosen: Sequence[Image]) -> list[list[int]]:
    """Places in ``chosen`` that one call of the runner can admit.

    Images that start from noise go together, whatever their requests; given states and known regions are tensors of
    one request.
    """
    together: dict[int | None, list[int]] = {}
    for place, (active, _) in enumerate(chosen):
        request: Request = active.request
        alone = request.start is not None or request.known is not None
        together.setdefault(id(active) if alone else None, []).append(place)
    return list(together.values())
