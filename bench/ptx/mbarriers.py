"""mbarrier objects in shared memory, whose phases complete by arrivals (PTX ISA, "mbarrier").

An arrival comes from a tcgen05.commit, and says that products are complete: at any moment after it, so nobody knows
it who has not waited for the phase. A thread that waits for one which is not complete stands still until it is. One
that need not stand still is told "not yet" once all the same, as PTX allows a try_wait to: so no program gets by
without a loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from stepfusion.bench.ptx.accesses import addresses_of
from stepfusion.bench.ptx.asynchronous import number
from stepfusion.bench.ptx.opcodes import Step
from stepfusion.bench.ptx.ordering import Completion, Uses
from stepfusion.bench.ptx.program import Address, Instruction
from stepfusion.bench.ptx.threads import Threads
from stepfusion.bench.ptx.types import Array, Fault, Lanes

_BYTES, _MOST = 8, 2**20 - 1


class Wait(NamedTuple):
    """A try_wait: which of some threads need not stand still for it, and what it does for those."""

    ready: Callable[[Array], Array]
    step: Step


class Mbarriers:
    """The mbarrier objects of some blocks.

    Attributes:
        changed: a phase has completed since somebody last set this to False.
    """

    def __init__(self, threads: Threads, completion: Completion) -> None:
        self._threads, self._completion = threads, completion
        count = threads.shared.words * (int(threads.block[-1]) + 1) * 4 // _BYTES
        self._live = np.zeros(count, bool)
        self._expected, self._missing, self._phase = (np.zeros(count, np.int64) for _ in range(3))
        # up to which product the phases so far, and the arrivals of the current one, stand for
        self._complete, self._coming = (np.zeros(count, np.int64) for _ in range(2))
        self._made, self._used = Uses(count), Uses(count)
        self._told = np.full(len(threads.block), -1, np.int64)  # the phase that a thread was told "not yet" of
        self.changed = False
        threads.checks.append(self._check_write)

    def compile(self, instruction: Instruction) -> Step:
        """``mbarrier.init`` and ``.inval`` of the block's own shared memory."""
        op, args = instruction.op, instruction.args
        known = {"mbarrier.init.shared.b64": 2, "mbarrier.inval.shared.b64": 1}
        if known.get(op) != len(args) or not isinstance(args[0], Address):
            raise Fault("unknown instruction of an mbarrier")
        addresses = addresses_of(self._threads, args[0])
        if len(args) == 1:
            return lambda lanes: self._end(self._threads.lanes(lanes), addresses(self._threads.lanes(lanes)))
        count = number(args[1], "the count of an mbarrier")
        if not 1 <= count <= _MOST:
            raise Fault(f"an mbarrier of {count} arrivals")
        return lambda lanes: self._begin(self._threads.lanes(lanes), addresses(self._threads.lanes(lanes)), count)

    def compile_wait(self, instruction: Instruction) -> Wait:
        """``mbarrier.try_wait.parity``."""
        args = instruction.args
        known = instruction.op == "mbarrier.try_wait.parity.shared.b64" and len(args) == 3
        if not known or not isinstance(args[1], Address):
            raise Fault("unknown wait for an mbarrier")
        addresses = addresses_of(self._threads, args[1])
        target = self._threads.registers.target(args[0], "pred")
        parity = self._threads.registers.source(args[2], "u32")

        def ready(lanes: Array) -> Array:
            if parity.holes(lanes) is not None:
                raise Fault("a parity that depends on what nobody wrote")
            parities = np.broadcast_to(parity.read(lanes), lanes.shape)
            if (parities > 1).any():
                raise Fault("a parity that is neither 0 nor 1")
            return np.asarray(self._phase[self._usable(lanes, addresses(lanes))] % 2 != parities)

        def step(lanes: Lanes) -> None:
            who = self._threads.lanes(lanes)
            target.write(who, self._try(who, self._usable(who, addresses(who))), None)

        return Wait(ready, step)

    def arrive(self, lanes: Array, addresses: Array, products: Array) -> None:
        """One arrival for each of ``lanes``, which comes when its products up to ``products`` are complete."""
        slots = self._usable(lanes, addresses)
        self._used.once(slots, lanes, self._threads.barriers)
        for slot, upto in zip(slots, products, strict=True):
            self._coming[slot] = max(self._coming[slot], upto)
            self._missing[slot] -= 1
            if self._missing[slot] == 0:
                self._phase[slot] += 1
                self._missing[slot], self._complete[slot] = self._expected[slot], self._coming[slot]
                self.changed = True

    def _try(self, lanes: Array, slots: Array) -> Array:
        """What a try_wait of a complete phase says: no, and to who asks again, yes."""
        self._used.once(slots, lanes, self._threads.barriers)
        phases = slots * 2**32 + self._phase[slots]
        again = self._told[lanes] == phases
        self._told[lanes] = np.where(again, -1, phases)
        self._completion.learn(lanes[again], self._complete[slots[again]])
        return np.asarray(again)

    def _begin(self, lanes: Array, addresses: Array, count: int) -> None:
        slots = self._slots(lanes, addresses)
        if self._live[slots].any() or len(np.unique(slots)) < len(slots):
            raise Fault("an mbarrier.init of what is an mbarrier")
        self._forget(lanes, addresses, slots)
        self._live[slots] = True
        self._expected[slots] = self._missing[slots] = count
        self._phase[slots] = self._complete[slots] = self._coming[slots] = 0

    def _end(self, lanes: Array, addresses: Array) -> None:
        slots = self._usable(lanes, addresses)
        if len(np.unique(slots)) < len(slots):
            raise Fault("an mbarrier.inval by several threads")
        if (self._missing[slots] != self._expected[slots]).any():
            raise Fault("an mbarrier.inval in the middle of a phase")
        if (self._complete[slots] > self._completion.known[lanes]).any():
            raise Fault("an mbarrier.inval before a phase that the thread does not know to be complete")
        self._forget(lanes, addresses, slots)
        self._live[slots] = False

    def _forget(self, lanes: Array, addresses: Array, slots: Array) -> None:
        """The bytes become, or are no more, an mbarrier: nobody else uses it, and nobody may read them."""
        threads = self._threads
        if not all(uses.settled(slots, lanes, threads.barriers).all() for uses in (self._made, self._used)):
            raise Fault("an mbarrier that another thread uses, and no barrier lies between")
        self._live[slots] = False
        threads.check_write(addresses, _BYTES, lanes)
        threads.shared.forget(addresses, threads.block[lanes], _BYTES)
        threads.note("shared", True, addresses, lanes.astype("u8")[:, None], lanes)
        self._made.once(slots, lanes, threads.barriers)

    def _usable(self, lanes: Array, addresses: Array) -> Array:
        """Which objects lie at addresses.

        Raises:
            Fault: none, or another thread has made it and no barrier lies between.
        """
        slots = self._slots(lanes, addresses)
        if not self._live[slots].all():
            raise Fault("what is no mbarrier: before its init, or after its inval")
        if not self._made.settled(slots, lanes, self._threads.barriers).all():
            raise Fault("an mbarrier that another thread has made, and no barrier lies between")
        return slots

    def _slots(self, lanes: Array, addresses: Array) -> Array:
        shared, blocks = self._threads.shared, self._threads.block[lanes]
        shared.check(addresses, blocks, _BYTES)
        return np.asarray(shared.places(addresses, blocks, _BYTES)[:, 0] // 2)

    def _check_write(self, places: Array, lanes: Array) -> None:
        if self._live[places // 2].any():
            raise Fault("a store over an mbarrier")
