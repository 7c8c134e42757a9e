"""``stepfusion bench``: what it prints and writes, and what bad input gets, before any work."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from stepfusion.bench import cli
from stepfusion.bench.models import load_model
from stepfusion.bench.options import Options
from stepfusion.bench.parts import PARTS
from stepfusion.bench.peers import all_providers
from stepfusion.bench.rows import End, Row, parse, rows_of
from stepfusion_testing.cpu_kernels import cpp_contenders

NAMES = ", ".join(repr(provider.name) for provider in all_providers(torch.device("cpu")))


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("suite --tiny", "--out is needed: the folder of the suite's rows, pictures and report"),
        (
            "suite --tiny --out x --parts host,hosts",
            "--parts must be of 'kernels', 'latency', 'throughput', 'compare', 'exports', 'headline', 'host', "
            "got 'hosts'",
        ),
        ("suite --tiny --out x --limit 0", "--limit must be a finite number in (0, 1e+06], got 0.0"),
        ("compare --tiny --batch 0", "--batch must be in [1, 1048576], got 0"),
        ("latency --tiny --steps -1", "--steps must be in [1, 1048576], got -1"),
        ("host --rounds 0", "--rounds must be in [1, 1048576], got 0"),
        ("compare --providers diffusers --device cpu", f"providers must be of {NAMES}, got 'diffusers'"),
        ("host --out file", "--out must be a folder, got 'file', which is a file"),
        ("host --out broken", "a line of benchmark rows must be JSON, got 'x'"),
        ("kernels --device meta", None),
    ],
)
def test_bad_input_is_refused_before_any_work(
    command: str, message: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("something was measured")

    monkeypatch.setattr(cli, "measure", never)
    monkeypatch.setattr(cli, "run_suite", never)
    (tmp_path / "file").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "rows.jsonl").write_text("x")
    with pytest.raises(ValueError) as caught:
        cli.main(shlex.split(command))
    if message is not None:
        assert str(caught.value) == message
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ["", "everything", "compare --peer someone", "suite --model tiny"])
def test_unknown_words_end_with_status_2(command: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(shlex.split(command))
    assert caught.value.code == 2


def test_compare_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real run of the smallest size, on a model with labels: who runs, who is absent, and that all agree."""
    command = (
        "compare --tiny --device cpu --peer diffusers --model fashion-mnist --batch 2 --steps 2 --rounds 1 --json"
    )
    assert cli.main([*shlex.split(command), "--out", str(tmp_path / "out")]) == 0
    records = parse(capsys.readouterr().out)
    rows = [row for row in rows_of(records) if not row.op.startswith("ceiling")]
    names = {"stepfusion eager float32", "stepfusion eager bfloat16", "diffusers float32"}
    names |= {"diffusers bfloat16 channels_last"} | cpp_contenders(absent=False)
    absent = [row for row in rows if row.op == "build"]
    assert {row.provider for row in absent} == cpp_contenders(absent=True)
    assert all(row.error is None and row.notes for row in absent)
    for op in ("evaluation", "DDIM-2 loop"):
        assert {row.provider for row in rows if row.op == op} == names
    for row in [row for row in rows if row not in absent]:
        assert row.error is None
        assert row.median_ms is not None
        assert row.max_difference is not None
        if row.provider == "stepfusion eager float32":
            assert row.max_difference < 1e-4
        assert row.flops == load_model("fashion-mnist").flops(2) * (row.steps or 1)
    assert isinstance(records[-1], End)
    written = parse((tmp_path / "out" / "rows.jsonl").read_text(encoding="utf-8"))
    assert written == records


def test_a_failed_row_is_one_line_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Row("host", "op", "a", "cpu", median_ms=1.0), Row("host", "op", "b", "cpu", error="it differs")]
    monkeypatch.setattr(cli, "measure", lambda part, options: iter([*rows, End(part, "done", 1.0)]))
    assert cli.main(["host"]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[1:] == ["stepfusion: b, op: it differs (1 rows failed)"]
    assert "ERROR: it differs" in captured.out


def test_whom_the_options_select() -> None:
    def names(**options: object) -> list[str]:
        return [p.name for p in Options(torch.device("cpu"), **options).select()]  # type: ignore[arg-type]

    everyone = names()
    assert len(everyone) == len(set(everyone)) == 18
    assert {f"stepfusion {mode} float32" for mode in ("eager", "cpp", "compile", "openvino")} < {*everyone}
    assert {"openvino float32", "openvino bfloat16"} < {*everyone}
    assert [name for name in names(families=("openvino",)) if not name.startswith("stepfusion")] == [
        "openvino float32", "openvino bfloat16",
    ]  # fmt: skip
    assert all("compile" not in name for name in names(compiled=False))
    assert names(providers=("inductor bfloat16",), compiled=False) == ["inductor bfloat16"]
    chosen = names(dtype="float32")
    assert chosen
    assert all("float32" in name.split() for name in chosen)


def measured_until(stop: BaseException) -> object:
    """A part that measures two things and is then ended."""

    def rows(options: Options) -> Iterator[Row]:
        yield Row("host", "one", "stepfusion", "cpu", median_ms=1.0)
        yield Row("host", "two", "stepfusion", "cpu", median_ms=2.0)
        raise stop

    return rows


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)], ids=["Ctrl-C", "SIGTERM"])
def test_a_part_that_is_ended_keeps_its_rows(
    stop: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PARTS, "host", measured_until(stop))
    with pytest.raises(type(stop)):
        cli.main(["host", "--device", "cpu", "--out", str(tmp_path / "results"), "--rounds", "3"])
    printed = capsys.readouterr()
    assert printed.err.startswith("stepfusion: host on cpu: up to 8 min, after which the suite stops it; Ctrl-C ends")
    assert "one" in printed.out
    records = parse((tmp_path / "results" / "rows.jsonl").read_text(encoding="utf-8"))
    assert [row.op for row in rows_of(records)] == ["one", "two"]
    assert [(end.status, end.notes) for end in records if isinstance(end, End)] == [
        ("stopped", "It was ended before it was done.")
    ]
    report = (tmp_path / "results" / "report.md").read_text(encoding="utf-8")
    assert "Stopped after 0 s. It was ended before it was done." in report
    assert "| command | stepfusion bench " in report
    assert str(tmp_path) not in report  # no path of a machine in what is committed
    assert "| sizes | rounds 3 |" in report
    assert "| load | " in report


def test_a_part_that_is_ended_at_once_leaves_earlier_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nothing(options: Options) -> Iterator[Row]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setitem(PARTS, "host", measured_until(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        cli.main(["host", "--device", "cpu", "--out", "results"])
    before = (tmp_path / "results" / "rows.jsonl").read_bytes()
    monkeypatch.setitem(PARTS, "host", nothing)
    with pytest.raises(KeyboardInterrupt):
        cli.main(["host", "--device", "cpu", "--out", "results"])
    assert (tmp_path / "results" / "rows.jsonl").read_bytes() == before


def test_the_time_of_the_last_run_is_the_estimate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Row("host", "one", "stepfusion", "cpu", median_ms=1.0)
    monkeypatch.setattr(cli, "measure", lambda part, options: iter([row, End("host", "done", 250.0)]))
    for _ in range(2):
        assert cli.main(["host", "--device", "cpu", "--out", "results"]) == 0
    assert "host on cpu: about 4 min, as the last time; Ctrl-C ends it and keeps" in capsys.readouterr().err
