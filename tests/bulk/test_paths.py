"""Digests of tables on any path: jobs of other paths, levels or options are other jobs."""

from __future__ import annotations

from dataclasses import replace

import stepfusion as sf
from stepfusion.bulk.new_job import table_digest


def table(path: sf.Path, **options: object) -> sf.StepTable:
    return sf.heun(path, 4, prediction=path.predictions[0], **options)  # type: ignore[arg-type]


def test_other_paths_and_options_have_other_digests() -> None:
    near = sf.SigmaPath(sigma_max=80.0 * (1 + 1e-15))
    tables = [
        table(sf.SigmaPath()),
        replace(table(sf.SigmaPath()), schedule=near),  # the same rows, of a path that prints alike
        table(sf.SigmaPath(sigma_data=1.0)),
        table(sf.SigmaPath(), s_churn=1.0),
        table(sf.FlowPath()),
        table(sf.FlowPath(shift=3.0)),
        sf.ddim(sf.NoiseSchedule.linear(), 4),
    ]
    assert len({table_digest(one) for one in tables}) == len(tables)
    assert table_digest(table(sf.SigmaPath())) == table_digest(table(sf.SigmaPath()))


def test_a_level_that_differs_in_its_last_bit_is_another() -> None:
    plain = table(sf.FlowPath())
    assert plain.levels is not None
    told = plain.levels.told.copy()
    told[2] *= 1 + 2**-52
    assert table_digest(replace(plain, levels=replace(plain.levels, told=told))) != table_digest(plain)
