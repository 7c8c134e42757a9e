"""The suite: parts that fail, crash or hang, what a second run does, and all of it end to end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from stepfusion.bench.own_loop import OWN
from stepfusion.bench.parts import PARTS
from stepfusion.bench.report import read
from stepfusion.bench.rows import End, Row, rows_of, to_line
from stepfusion.bench.suite import LIMITS, run_part, run_suite

ROW = Row("host", "op", "provider", "cpu", median_ms=1.0)
PRINT = f"print({to_line(ROW)!r}, flush=True)\n"
DONE = f"print({to_line(End('host', 'done', 1.0))!r})\n"


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def ended(records: list[object]) -> End:
    (end,) = [record for record in records if isinstance(record, End)]
    return end


def test_a_part_that_ends() -> None:
    assert run_part("host", python(PRINT + DONE), 60.0) == [ROW, End("host", "done", 1.0)]


@pytest.mark.parametrize(
    ("code", "status", "notes"),
    [
        ("raise ValueError('no luck')", "failed", "Exit status 1: ValueError: no luck"),
        ("import os; os.abort()", "failed", "Exit status -6: it said nothing"),
        ("", "failed", "Exit status 0: it said nothing"),
        ("print('hello')", "failed", "Exit status 0: a line of benchmark rows must be JSON, got 'hello\\n'"),
    ],
)
def test_what_was_measured_before_a_failure_is_kept(code: str, status: str, notes: str) -> None:
    records = run_part("host", python(PRINT + code), 60.0)
    assert records[0] == ROW
    end = ended(list(records))
    assert (end.status, end.notes) == (status, notes)


def test_a_part_that_hangs_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    """It closes neither its output nor itself, and has a child that would outlive it."""
    sleep = "import time; time.sleep(99)"
    child = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-S', '-c', {sleep!r}])\n"
    child += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid))\n"
    for limit in (2.0, 8.0, 30.0):  # on a busy machine it starts slowly
        started = time.monotonic()
        records = run_part("host", python(PRINT + child + sleep), limit)
        assert time.monotonic() - started < limit + 32
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            break
    assert records[0] == ROW
    assert ended(list(records)).status == "stopped"
    stat = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    deadline = time.monotonic() + 60  # the signal is sent; dying takes a moment on a busy machine
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the child outlived its part"
        time.sleep(0.05)


def test_a_line_cut_short_is_no_line() -> None:
    records = run_part("host", python(PRINT + 'import sys; sys.stdout.write(\'{"kind": "ro\')'), 60.0)
    assert records[0] == ROW
    assert ended(list(records)).notes == "Exit status 0: it said nothing"


def test_one_part_fails_and_the_others_do_not(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    codes = {"host": PRINT + DONE, "compare": "raise SystemExit('broken')"}
    limits = dict.fromkeys(codes, 60.0)
    ends = run_suite(tmp_path, ("compare", "host"), lambda part: python(codes[part]), limits)
    assert [(end.part, end.status) for end in ends] == [("compare", "failed"), ("host", "done")]
    assert rows_of(read(tmp_path)) == [ROW]
    assert "Failed after" in (tmp_path / "report.md").read_text(encoding="utf-8")

    asked: list[str] = []

    def again(part: str) -> list[str]:
        asked.append(part)
        return python(PRINT.replace("host", part) + DONE.replace("host", part))

    ends = run_suite(tmp_path, ("compare", "host"), again, limits)
    assert asked == ["compare"]  # what is done is not measured again
    assert {end.status for end in ends} == {"done"}
    run_suite(tmp_path, ("compare", "host"), again, limits, force=True)
    assert asked == ["compare", "compare", "host"]
    assert len(rows_of(read(tmp_path))) == 2
    assert "host: done before" in capfd.readouterr().err


def test_every_part_has_a_limit_and_all_fit_ten_minutes() -> None:
    assert set(LIMITS) == set(PARTS)
    assert sum(LIMITS.values()) < 600


@pytest.mark.soak
@pytest.mark.parametrize("packages", ["all", "required"])
def test_the_whole_suite_rehearsed(tmp_path: Path, packages: str) -> None:
    """As on this machine, and as on one that has the required packages and matplotlib alone."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if packages == "required":
        hiding = tmp_path / "hiding"
        hiding.mkdir()
        (hiding / "sitecustomize.py").write_text("from stepfusion_testing import without_packages as _\n")
        environment["PYTHONPATH"] = os.pathsep.join((str(hiding), str(Path(__file__).resolve().parents[1])))
    folder = tmp_path / "results"
    done = subprocess.run(
        [sys.executable, "-m", "stepfusion.bench.cli", "suite", "--tiny", "--device", "cpu", "--out", str(folder)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = read(folder)
    assert [(r.part, r.status) for r in records if isinstance(r, End)] == [(part, "done") for part in PARTS]
    rows = rows_of(records)
    assert not [row for row in rows if row.error is not None]
    for part in PARTS:
        assert [row for row in rows if row.part == part and row.median_ms is not None], part
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["latency.png", "report.md", "roofline.png", "rows.jsonl", "throughput.png", "tick.png"]
    assert all(path.stat().st_size < 16 << 20 for path in folder.iterdir())
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "host: Python of a tick" in text
    providers = {row.provider for row in rows if row.median_ms is not None}
    own = {provider for provider in providers if provider.startswith(OWN)}
    assert bool(own) == (packages == "required" or find_spec("diffusers") is None)
    assert bool(own) != ("diffusers float32" in providers)
    assert "not measured here" in text
