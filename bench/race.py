"""One case, several providers, one interleaved run: rows of evaluations, of whole loops, of finished images."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from stepfusion.bench.budget import OutOfBudget, budget
from stepfusion.bench.floors import Floors
from stepfusion.bench.measure import Contender, Limit, contest, one_line
from stepfusion.bench.ours import Ours
from stepfusion.bench.peers import Diffusers
from stepfusion.bench.providers import Built, Case, Provider, Unavailable
from stepfusion.bench.rows import Row

#: For each compilation of a network: most of a part's time on a GPU.
COMPILE_SECONDS = {"cpu": 600.0, "cuda": 60.0}
#: Of one evaluation, relative to the largest output. On a GPU PyTorch's float32 convolutions are TF32 by default.
_EVALUATION = {"float32": {"cpu": 1e-4, "cuda": 1e-2}, "bfloat16": {"cpu": 5e-2, "cuda": 5e-2}}
#: Of a whole loop's images in [-1, 1], root mean square: single pixels turn at the clip, so a maximum says little.
_LOOP = {"float32": {"cpu": 1e-3, "cuda": 5e-2}, "bfloat16": {"cpu": 2e-1, "cuda": 2e-1}}


class Race:
    """The providers of one case, built once; those that cannot run here are rows already.

    Args:
        part: of the rows. floors: what fractions refer to.
    """

    def __init__(self, part: str, case: Case, providers: Sequence[Provider], floors: Floors) -> None:
        self._part, self._case, self._floors = part, case, floors
        self._built: dict[str, tuple[Provider, Built]] = {}
        self._build_seconds: dict[str, float] = {}
        self._absent: list[Row] = []
        self._shape = "x".join(map(str, (case.batch, *case.model.image_shape)))
        torch._dynamo.reset()
        for provider in providers:
            self._build(provider)
        self._reference = self._make_reference()

    def __enter__(self) -> Race:
        return self

    def __exit__(self, *_: object) -> None:
        """Give the memory of this case back before the next."""
        self._built.clear()
        del self._reference
        self._case.folder.cleanup()
        gc.collect()
        if self._case.device.type == "cuda":
            torch.cuda.empty_cache()

    def evaluations(self, rounds: int) -> Iterator[Row]:
        """Rows of one evaluation of the network, timed in so many rounds."""
        case = self._case
        reference = self._reference.evaluate(1)
        scale = float(reference.abs().max())
        contenders = [
            Contender(
                name,
                reference,
                partial(_second, built),
                partial(built.evaluate, case.evaluations),
                Limit(scale * self._allowed(_EVALUATION, provider)),
                self._budget(provider),
            )
            for name, (provider, built) in self._built.items()
        ]
        for row in self._rows("evaluation", contenders, None, rounds):
            yield _each(row, case.evaluations)

    def loops(self, rounds: int, *, finish: bool = False) -> Iterator[Row]:
        """Rows of a whole loop; with ``finish``, until the finished images are on the host."""
        case = self._case
        reference = self._reference.loop(case.noise).clamp(-1, 1)
        contenders = []
        for name, (provider, built) in self._built.items():

            def check(built: Built = built) -> torch.Tensor:
                return built.loop(case.noise).clamp(-1, 1)

            run: Callable[[], object] = built.finish if finish else partial(built.loop, None)
            limit = Limit(self._allowed(_LOOP, provider), "rms")
            contenders.append(Contender(name, reference, check, run, limit, self._budget(provider)))
        op = f"{case.sampler.upper()}-{case.steps} {'to images on the host' if finish else 'loop'}"
        yield from self._rows(op, contenders, case.steps, rounds)

    def absent(self) -> list[Row]:
        """A row for each provider that cannot run here, with the reason, or that failed to build, with the error."""
        return list(self._absent)

    def _build(self, provider: Provider) -> None:
        row = Row(
            self._part,
            "build",
            provider.name,
            self._case.device.type,
            model=self._case.model.name,
            shape=self._shape,
            dtype=provider.dtype,
            batch=self._case.batch,
        )
        reason = provider.why_not(self._case)
        if reason is not None:
            self._absent.append(replace(row, notes=reason))
            return
        _say(f"{self._part}: building {provider.name} for {self._shape}")
        started = time.perf_counter()
        try:
            with budget(self._budget(provider)):
                self._built[provider.name] = provider, provider.build(self._case)
            self._build_seconds[provider.name] = time.perf_counter() - started
        except Unavailable as error:
            self._absent.append(replace(row, notes=str(error)))
        except OutOfBudget as error:
            torch._dynamo.reset()
            self._absent.append(replace(row, error=one_line(error)))
        except Exception as error:  # whatever a provider raises is its result, and the others go on
            self._absent.append(replace(row, error=one_line(error)))

    def _make_reference(self) -> Built:
        """The float32 truth: diffusers' own network and loop, or without diffusers our eager engine."""
        peer = Diffusers()
        if peer.name in self._built:
            return self._built[peer.name][1]
        provider: Provider = peer if peer.why_not(self._case) is None else Ours("eager", "float32")
        return provider.build(self._case)

    def _budget(self, provider: Provider) -> float | None:
        """Seconds for what a provider compiles at a time."""
        return COMPILE_SECONDS[self._case.device.type] if provider.compiles else None

    def _allowed(self, limits: dict[str, dict[str, float]], provider: Provider) -> float:
        return limits[provider.dtype][self._case.device.type]

    def _rows(self, op: str, contenders: Sequence[Contender], steps: int | None, rounds: int) -> Iterator[Row]:
        case = self._case
        _say(f"{self._part}: {op}, {self._shape}, {len(contenders)} providers, {rounds} rounds")
        flops = case.model.flops(case.batch) * (case.evaluations if steps is None else steps)
        for name, verdict in contest(contenders, case.device, rounds).items():
            provider, _ = self._built[name]
            timing = verdict.timing
            warmup = None if verdict.warmup_s is None else verdict.warmup_s + self._build_seconds[name]
            fraction = None
            if timing is not None:
                fraction = flops / (timing.median_ms / 1e3) / self._floors.matmul[provider.dtype]
            yield Row(
                self._part,
                op,
                name,
                case.device.type,
                model=case.model.name,
                shape=self._shape,
                dtype=provider.dtype,
                batch=case.batch,
                steps=steps,
                flops=flops,
                fraction=fraction,
                fraction_of=None if fraction is None else "matmul rate",
                **{**verdict.fields(), "warmup_s": warmup},  # type: ignore[arg-type]
            )


def _second(built: Built) -> torch.Tensor:
    """The output that is compared: not the first, which may be a compiler's eager check of itself."""
    built.evaluate(1)
    return built.evaluate(1)


def _each(row: Row, calls: int) -> Row:
    """The row of one of the calls that a timed call makes."""
    if calls == 1 or row.median_ms is None or row.p20_ms is None or row.p80_ms is None or row.flops is None:
        return row
    return replace(
        row,
        median_ms=row.median_ms / calls,
        p20_ms=row.p20_ms / calls,
        p80_ms=row.p80_ms / calls,
        min_ms=None if row.min_ms is None else row.min_ms / calls,
        device_ms=None if row.device_ms is None else row.device_ms / calls,
        flops=row.flops // calls,
        notes=f"{calls} evaluations a call",
    )


def _say(text: str) -> None:
    """Progress, on stderr: rows go to stdout."""
    print(text, file=sys.stderr, flush=True)
