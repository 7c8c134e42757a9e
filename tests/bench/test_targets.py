"""What the rows say about each target: met, not met, not measured; and rows that do not count."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stepfusion.bench.rows import Row
from stepfusion.bench.targets import LARGE_BYTES, TARGETS, Target, ratios

DEFAULT, COMPILED = "diffusers float32", "diffusers bfloat16 channels_last compiled"


def target(start: str) -> Target:
    (found,) = [t for t in TARGETS if t.what.startswith(start)]
    return found


def compare_rows(ours: float = 80.0, openvino: float = 100.0) -> list[Row]:
    times = {"stepfusion compile bfloat16": ours, DEFAULT: 400.0, COMPILED: 110.0, "openvino bfloat16": openvino}
    return [
        Row("compare", op, name, "cpu", model="cifar10", batch=8, median_ms=milliseconds)
        for op in ("evaluation", "DDIM-10 loop")
        for name, milliseconds in times.items()
    ]


def kernel(op: str, provider: str, milliseconds: float, **fields: object) -> Row:
    row = Row("kernels", op, provider, "cuda", shape="128x3x256x256", median_ms=milliseconds, bytes=LARGE_BYTES)
    return replace(row, **fields)  # type: ignore[arg-type]


def test_nothing_measured_is_said_and_not_invented() -> None:
    for each in TARGETS:
        assert each.verdict([]) == ("", "not measured here")


def test_ratio_is_of_the_same_work_and_of_our_best() -> None:
    rows = [
        Row("compare", "evaluation", "stepfusion eager float32", "cpu", batch=8, median_ms=50.0),
        Row("compare", "evaluation", "stepfusion compile bfloat16", "cpu", batch=8, median_ms=20.0),
        Row("compare", "evaluation", DEFAULT, "cpu", batch=8, median_ms=100.0),
        Row("compare", "evaluation", DEFAULT, "cpu", batch=1, median_ms=1.0),
    ]
    assert list(ratios(rows, "stepfusion", DEFAULT).values()) == [5.0]


def test_a_row_with_an_error_does_not_count() -> None:
    rows = [replace(row, error="differs") if row.provider.startswith("stepfusion") else row for row in compare_rows()]
    assert target("CPU, CIFAR UNet").verdict(rows) == ("", "not measured here")


def test_cpu_target() -> None:
    cpu = target("CPU, CIFAR UNet")
    assert cpu.verdict(compare_rows()) == ("5.00x default, 1.38x compiled, 1.25x OpenVINO", "met")
    assert cpu.verdict(compare_rows(openvino=79.0))[1] == "not met"
    assert cpu.verdict(compare_rows(ours=101.0))[1] == "not met"
    elsewhere = [replace(row, device="cuda") for row in compare_rows()]
    assert cpu.verdict(elsewhere)[1] == "not measured here"
    without_openvino = [row for row in compare_rows() if row.provider != "openvino bfloat16"]
    assert cpu.verdict(without_openvino)[1] == "not measured here"


def test_bandwidth_is_the_worst_of_the_large_rows() -> None:
    fused = "stepfusion fused"
    rows = [
        kernel("ddim step, no noise", fused, 1.0, fraction=0.95),
        kernel("q_sample, noise given", fused, 1.0, fraction=0.91),
        kernel("q_sample, noise given", fused, 1.0, fraction=0.10, bytes=LARGE_BYTES - 1),
        kernel("q_sample, noise drawn", fused, 1.0, fraction=0.86),
        kernel("group_norm_silu", fused, 1.0, fraction=0.20),
    ]
    assert target("step, q_sample, posterior").verdict(rows) == ("91.0 %", "met")
    assert target("the same, drawing").verdict(rows) == ("86.0 %", "met")
    assert target("the same, drawing").verdict([replace(rows[3], fraction=0.84)]) == ("84.0 %", "not met")


def test_step_against_the_peers_step_at_both_sizes() -> None:
    rows = [
        kernel("ddim step, no noise", "stepfusion fused", 1.0),
        kernel("ddim step, no noise", "diffusers", 7.0),
        kernel("ddim step, no noise", "stepfusion fused", 1.0, shape="1x3x32x32", bytes=36_864),
        kernel("ddim step, no noise", "diffusers", 21.0, shape="1x3x32x32", bytes=36_864),
    ]
    step = target("step against")
    assert step.verdict(rows) == ("7.00x, 21.00x", "met")
    assert step.verdict(rows[:2])[1] == "not measured here"
    assert step.verdict([*rows[:3], replace(rows[3], median_ms=19.0)])[1] == "not met"


def test_inductor_where_noise_is_drawn_must_be_beaten_by_more() -> None:
    def rows(drawn: float) -> list[Row]:
        return [
            kernel("posterior", "stepfusion fused", 1.0),
            kernel("posterior", "inductor", 1.1),
            kernel("q_sample, noise drawn", "stepfusion fused", 1.0),
            kernel("q_sample, noise drawn", "inductor", drawn),
        ]

    assert target("any fused op").verdict(rows(1.6)) == ("1.10x, 1.60x where drawn", "met")
    assert target("any fused op").verdict(rows(1.4))[1] == "not met"


def test_one_image() -> None:
    row = Row(
        "latency", "DDIM-50 to images on the host", "stepfusion graph bfloat16", "cuda", model="cifar10", batch=1
    )
    rows = [
        replace(row, median_ms=10.0),
        replace(row, provider=DEFAULT, median_ms=160.0),
        replace(row, provider=COMPILED, median_ms=16.0),
        replace(row, op="DDIM-50 loop", fraction=0.01, fraction_of="device idle"),
    ]
    assert target("one image").verdict(rows) == ("16.00x default, 1.60x compiled, idle 1.0 %", "met")
    assert target("one image").verdict([*rows[:3], replace(rows[3], fraction=0.03)])[1] == "not met"
    assert target("one image").verdict(rows[:3])[1] == "not measured here"


def test_bulk_takes_each_sides_best_batch() -> None:
    row = Row("throughput", "DDIM-20", "stepfusion graph bfloat16", "cuda", model="cifar10", steps=20)
    rows = [
        replace(row, dtype="bfloat16", batch=64, median_ms=64.0, fraction=0.3),
        replace(row, dtype="bfloat16", batch=256, median_ms=128.0, fraction=0.6),
        replace(row, provider=COMPILED, batch=64, median_ms=46.0),
        replace(row, provider=COMPILED, batch=256, median_ms=256.0),
    ]
    assert target("bulk, same UNet").verdict(rows) == ("1.44x compiled, 60.0 %", "met")
    assert target("bulk, 256x256").verdict(rows)[1] == "not measured here"


@pytest.mark.parametrize(("milliseconds", "verdict"), [(0.0149, "met"), (0.0151, "not met")])
def test_python_of_a_tick(milliseconds: float, verdict: str) -> None:
    row = Row("host", "python of a tick", "stepfusion", "cpu", median_ms=milliseconds)
    assert target("host: Python").verdict([row]) == (f"{1e3 * milliseconds:.3g} us", verdict)
