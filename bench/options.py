"""What a benchmark is asked to measure; every part reads what concerns it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stepfusion.bench.peers import all_providers
from stepfusion.bench.providers import Provider


@dataclass(frozen=True)
class Options:
    """None anywhere: the part's own choice for the device.

    Attributes:
        device: where. tiny: every size shrunk, to rehearse. compiled: who compiles takes part.
        models, batches, steps, rounds: of the work. dtype: only providers whose network has it.
        families: only these kinds of providers, besides stepfusion itself. providers: only these, by name.
        command: as it was typed, for the report.
    """

    device: torch.device
    tiny: bool = False
    compiled: bool = True
    models: tuple[str, ...] | None = None
    batches: tuple[int, ...] | None = None
    steps: int | None = None
    rounds: int | None = None
    dtype: str | None = None
    families: tuple[str, ...] | None = None
    providers: tuple[str, ...] | None = None
    command: str | None = None

    def select(self) -> list[Provider]:
        """The providers that take part on this device. ValueError if a name is none of theirs."""
        everyone = all_providers(self.device)
        if self.providers is not None:
            check_names("providers", self.providers, [provider.name for provider in everyone])
            return [provider for provider in everyone if provider.name in self.providers]
        return [
            provider
            for provider in everyone
            if (self.compiled or not provider.compiles)
            and self.dtype in (None, provider.dtype)
            and (self.families is None or provider.family in ("stepfusion", *self.families))
        ]


def stages(providers: Sequence[Provider]) -> list[list[Provider]]:
    """Who is measured first, and who next: those that do not compile, so that they have rows whatever a compiler
    takes; then, if anybody compiles, everyone in one interleaved run, whose rows take the place of the first.
    """
    plain = [provider for provider in providers if not provider.compiles]
    return [plain] if len(plain) == len(providers) else [plain, list(providers)]


def check_names(argument: str, given: Sequence[str], accepted: Sequence[str]) -> None:
    """ValueError unless every name given is one of those accepted."""
    for name in given:
        if name not in accepted:
            raise ValueError(f"{argument} must be of {', '.join(map(repr, accepted))}, got {name!r}")
