"""Every snippet of README.md and docs/ runs, in the order of its page, or is exempt for a reason that stands here.

A page has a stage: what its snippets find when they run. Steps and numbers of images are made small; nothing else of
what is written is changed but the names on the stage. Command lines of exempt snippets go through the real parsers.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator

import pytest

from stepfusion.commands.main import main
from stepfusion_testing.page_stages import NO_STAGE, STAGES, Names, fetch
from stepfusion_testing.snippets import (
    LANGUAGES,
    ROOT,
    Snippet,
    arguments_of,
    commands,
    looks_like_a_snippet,
    pages,
    parse,
    run_python,
    snippets,
)

SERVER = "runs until it is stopped: tests/docs/test_newcomer.py and tests/serving/http start servers"
GPU = "needs a GPU"
INSTALLS = "installs something"
MINUTES = "takes minutes, and is run by tests in a small form"
CLUSTER = "needs several processes or machines: tests/bulk and tests/serving/http run them"
CONTAINERS = "needs an engine for containers; tests/test_deploy.py holds the files to the server"
TARGET = "is what CI runs"
SANDBOX = "is for another checkout; a test of its own runs it"

#: What is not run, each with its reason: the beginning of a command, or of a Python snippet.
EXEMPT = {
    "README.md": {
        "make demo": TARGET,
        "make test": TARGET,
        "make docs": TARGET,
        "stepfusion serve": SERVER,
        "stepfusion bench compare": MINUTES,
        "apt-get install": INSTALLS,
        "stepfusion train /usr/share": INSTALLS,
        "pip install": INSTALLS,
    },
    "docs/bulk.md": {
        "stepfusion generate MODEL --num 1000000 --out images --devices": GPU,
        "torchrun": CLUSTER,
        "stepfusion generate MODEL --num 1000000 --out /shared": CLUSTER,
    },
    "docs/command-line.md": {
        "export STEPFUSION_": "sets what a shell keeps: tests/commands/test_environment.py sets such variables",
        "pip install": INSTALLS,
        "stepfusion completion": "writes into folders of the user's shells: tests/commands runs the scripts",
    },
    "docs/deploy.md": {
        "docker": CONTAINERS,
        "STEPFUSION_KIND=cuda docker": CONTAINERS,
        "kubectl": CONTAINERS,
    },
    "docs/edm.md": {"# convert.py": SANDBOX},
    "docs/examples.md": {
        "python examples/service.py": "runs until it is stopped: tests/examples starts it",
        "python examples/ray_data.py": CLUSTER,
    },
    "docs/export.md": {"stepfusion export fashion-mnist --format tensorrt-rtx": MINUTES},
    "docs/gpu.md": {
        "python -m stepfusion.bench.machine_code": MINUTES,
        "python -m pytest": GPU,
    },
    "docs/http.md": {"pip install": INSTALLS, "stepfusion serve": SERVER},
    "docs/models.md": {"# convert.py": SANDBOX},
}
MOST_EXEMPT = 42
#: Options of commands that do not give them: few images, in few steps, on a CPU.
SMALL = {"DEVICE": "cpu", "DEVICES": "cpu", "STEPS": "2", "NUM": "4", "BATCH_SIZE": "4"}
#: What takes seconds, and runs in the soak tests alone: whole pages, or beginnings of what does not feed the rest.
HEAVY_PAGES = frozenset(("docs/export.md",))
#: Pages that run in tests of their own, for the rest of the page, or a server, belongs to what their snippets do.
ELSEWHERE = {"docs/migrating.md": "test_migrating.py", "docs/quick_start.md": "test_newcomer.py"}
HEAVY = {
    "README.md": (
        "stepfusion export",
        "stepfusion env",
        "stepfusion sample path/to/stable-diffusion",
        'engine = sf.Engine.from_pretrained("stable-diffusion',
    ),
    "docs/gpu.md": ("python -m stepfusion.bench.launches",),
}


def quick(text: str) -> str:
    """The same with few steps, and few images."""
    text = re.sub(r"(--steps[ =]|\bsteps=)\d+", r"\g<1>3", text)
    text = re.sub(r"((?:--num|-n|--save-every|--batch-size) )\d+", r"\g<1>4", text)
    text = re.sub(r"(sample|range|generate)\((64|200)\b", r"\g<1>(4", text)
    return text.replace('engine.table("ddpm")', 'engine.table("ddpm", 3)').replace('"steps": 20', '"steps": 3')


def begins(text: str, beginnings: Iterable[str]) -> str | None:
    """Which of these a command or snippet begins with."""
    return next((one for one in beginnings if text.startswith(one)), None)


def parts(page: str) -> Iterator[tuple[Snippet, str]]:
    """What is to be run of a page, in order: whole Python snippets, and single commands."""
    for snippet in snippets(page):
        if snippet.language == "python":
            yield snippet, snippet.text
        elif snippet.language == "sh":
            for command in commands(snippet):
                yield snippet, command


def run_part(snippet: Snippet, text: str, names: Names) -> None:
    """Run a Python snippet, or one command of a shell snippet."""
    if snippet.language == "python":
        run_python(text, names, str(snippet))
    elif text.startswith("curl "):
        fetch(shlex.split(text))
    else:
        program = arguments_of(text)
        assert program is not None, f"{snippet}: nothing runs {text!r}: run it, or exempt it with a reason"
        entry, words = program
        assert entry(words) == 0, f"{snippet}: {text}"


def run_page(page: str, *, heavy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what there is of a page, on its stage."""
    for name, value in SMALL.items():
        monkeypatch.setenv(f"STEPFUSION_{name}", value)
    stage = STAGES.get(page, NO_STAGE)
    left_out = [*EXEMPT.get(page, ()), *(() if heavy else HEAVY.get(page, ()))]
    with stage.set_up() as (given, changes):
        names: Names = {"__name__": "__main__", **given}
        for snippet, text in parts(page):
            if begins(text, left_out) is not None:
                continue
            if (beginning := begins(text, stage.before)) is not None:
                names |= stage.before[beginning](names)
            for old, new in changes.items():
                text = text.replace(old, new)
            run_part(snippet, quick(text), names)
        stage.check(names)


WITH_SNIPPETS = [page for page in pages() if any(one.language in LANGUAGES for one in snippets(page))]


@pytest.fixture(autouse=True)
def _place(tmp_path: object, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in WITH_SNIPPETS if page not in HEAVY_PAGES | ELSEWHERE.keys()])
def test_a_page_runs(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_page(page, heavy=False, monkeypatch=monkeypatch)


@pytest.mark.soak
@pytest.mark.parametrize("page", sorted(HEAVY_PAGES | HEAVY.keys()))
def test_a_whole_page_runs(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_page(page, heavy=True, monkeypatch=monkeypatch)


def test_every_exemption_is_needed(record_property: pytest.RecordProperty) -> None:
    used: Counter[tuple[str, str]] = Counter()
    ran = 0
    for page in pages():
        for _, text in parts(page):
            beginning = begins(text, EXEMPT.get(page, {}))
            used.update([(page, beginning)] if beginning is not None else [])
            ran += beginning is None  # here, or in a page's own test
    assert used.keys() == {(page, beginning) for page, those in EXEMPT.items() for beginning in those}
    assert used.total() <= MOST_EXEMPT
    record_property("snippets of the pages", f"{ran} run, {used.total()} exempt")
    assert {(page, one) for page, those in HEAVY.items() for one in those} == {
        (page, one) for page in HEAVY for _, text in parts(page) if (one := begins(text, HEAVY[page])) is not None
    }


#: Commands that no test of this file runs.
NOT_RUN = [
    pytest.param(page, text, id=f"{page}: {text[:60]}")
    for page in pages()
    for snippet, text in parts(page)
    if snippet.language == "sh" and (page in ELSEWHERE or begins(text, EXEMPT.get(page, {})) is not None)
]


@pytest.mark.parametrize(("page", "command"), NOT_RUN)
def test_a_command_that_is_not_run_here_is_right_as_far_as_can_be_seen(page: str, command: str) -> None:
    words = shlex.split(command)
    if (program := arguments_of(command)) is not None:
        parse(*program)
    elif words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^[\w -]*\b{words[1]}\b[\w -]*:", makefile, re.MULTILINE), command
    elif words[:2] == ["pip", "install"]:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        (wanted,) = words[2:]
        named = re.fullmatch(r"\.(?:\[([\w,-]+)\])?", wanted)
        assert named is not None, command
        assert {*(named[1] or "").split(",")} - {""} <= project["optional-dependencies"].keys(), command
    elif words[0] in ("docker", "kubectl", "STEPFUSION_KIND=cuda"):
        files = [words[place + 1] for place, word in enumerate(words) if word == "-f"]
        assert all((ROOT / name).is_file() for name in files), command
    else:
        assert words[0] in ("apt-get", "export", "python", ".", "curl"), command


@pytest.mark.parametrize(
    "command",
    ["stepfusion sample MODEL --stpes 3", "python -m stepfusion.bench.launches --model", "stepfusion sampel MODEL"],
)
def test_a_command_that_is_wrong_is_noticed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    program = arguments_of(command)
    assert program is not None
    with pytest.raises(SystemExit):
        parse(*program)
    capsys.readouterr()


def test_a_parsed_command_has_not_run() -> None:
    assert parse(main, ["sample", "no such model", "--steps", "7"]).steps == 7


def test_what_somebody_would_run_has_a_language() -> None:
    for page in pages():
        for snippet in snippets(page):
            if snippet.language not in LANGUAGES:
                assert snippet.language in ("", "text"), f"{snippet}: {snippet.language}"
                assert not looks_like_a_snippet(snippet.text), str(snippet)


def test_every_stage_has_its_page_and_every_page_its_test() -> None:
    assert STAGES.keys() <= set(WITH_SNIPPETS)
    assert all((ROOT / "tests" / "docs" / name).is_file() for name in ELSEWHERE.values())
