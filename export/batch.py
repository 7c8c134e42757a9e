"""The batch sizes of an export."""

from __future__ import annotations

from dataclasses import dataclass

from stepfusion import _checks

_LARGEST = 1 << 16


@dataclass(frozen=True)
class Batch:
    """The batch sizes of an export: from ``low`` to ``high``, tuned for ``best``; one size if all are equal."""

    low: int
    best: int
    high: int

    def __post_init__(self) -> None:
        for name in ("low", "best", "high"):
            _checks.integer(f"batch.{name}", getattr(self, name), 1, _LARGEST)
        if not self.low <= self.best <= self.high:
            raise ValueError(f"batch must have low <= best <= high, got {self.low}, {self.best}, {self.high}")

    @classmethod
    def fixed(cls, size: int) -> Batch:
        """One size."""
        return cls(size, size, size)

    @property
    def dynamic(self) -> bool:
        """True if there is more than one size."""
        return self.low != self.high

    @property
    def dimension(self) -> int | str:
        """The first size of a :class:`stepfusion.export.manifest.Tensorspec`."""
        return "batch" if self.dynamic else self.low

    def examples(self) -> list[int]:
        """Sizes to trace (the first one) and to check at. PyTorch would specialise on a size that is traced at 1."""
        return [max(2, self.low), min(5, self.high), self.low] if self.dynamic else [self.low]


DYNAMIC = Batch(1, 8, 64)
