"""The documentation site: it builds without a warning, has every public name, and loads nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import stepfusion as sf
from stepfusion_testing.snippets import ROOT, pages

pytest.importorskip("mkdocs", reason="the site needs the extra 'docs'")
pytest.importorskip("mkdocstrings", reason="the site needs the extra 'docs'")
SOURCES = ("docs", "engine", "kernels", "export", "bench", "examples")
FILES = ("mkdocs.yml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md")


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """docs/site/hooks.py."""
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def public() -> set[str]:
    """Every public name of the package and of the packages in it that have public names."""
    packages = [name for name in sf.__all__ if isinstance(getattr(sf, name), ModuleType)] + ["bulk", "export"]
    modules = {name: importlib.import_module(f"stepfusion.{name}") for name in packages}
    inside = {f"{name}.{one}" for name, module in modules.items() for one in module.__all__}
    return {*sf.__all__} - {*packages} | inside - {"kernels.reference"}  # a module with the names of kernels


def test_the_reference_has_every_public_name_once(hooks: ModuleType) -> None:
    names = [name for those in hooks.reference().values() for name in those]
    assert len(names) == len(set(names))
    assert public() <= set(names)
    assert {f"options.{one}" for one in ("SamplingOptions", "ExecutionOptions")} <= set(names)
    assert all(hooks.reference().values())


def test_a_new_name_is_on_a_page(hooks: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("from stepfusion.a.b import New\n\n__all__ = ['New', 'here']\n")
    assert hooks.public_names(tmp_path / "__init__.py") == {"New": "stepfusion.a.b", "here": ""}


@pytest.mark.parametrize(
    ("source", "uri", "text", "moved"),
    [
        ("docs/a.md", "a.md", "[x](b.md#c)", "[x](b.md#c)"),
        ("docs/a.md", "a.md", "[x](../README.md)", "[x](repository/README.md)"),
        ("README.md", "repository/README.md", "![x](docs/images/a.png)", "![x](../images/a.png)"),
        ("README.md", "repository/README.md", "[`x`](docs/b.md)", "[`x`](../b.md)"),
        ("docs/a.md", "a.md", "[x](https://example.org/a)", "[x](https://example.org/a)"),
        ("docs/a.md", "a.md", "[x](#c) and `[x](y)`", "[x](#c) and `[x](y)`"),
    ],
)
def test_links_follow_pages_to_the_site(hooks: ModuleType, source: str, uri: str, text: str, moved: str) -> None:
    assert hooks.moved_links(text, source, uri) == moved


def test_a_pipe_in_the_code_of_a_cell_has_no_backslash(hooks: ModuleType) -> None:
    assert hooks.plain_pipes("| `a\\|b` | c \\| d |\n`a\\|b`") == "| `a|b` | c \\| d |\n`a\\|b`"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the site is made of, in a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    return folder


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]  # --quiet would count no warning
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONSAFEPATH": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.soak
def test_the_site_builds_and_stands_alone(copy: Path) -> None:
    built = build(copy)
    assert (built.returncode, re.findall(r"WARNING.*", built.stderr)) == (0, [])
    site = copy / "build" / "site"
    for page in pages():
        if page != "README.md":
            assert (site / page.removeprefix("docs/")).with_suffix(".html").is_file(), page
    html = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    anchors = {anchor for text in html.values() for anchor in re.findall(r'id="stepfusion\.([\w.]+)"', text)}
    assert public() <= anchors
    assert "Engine.sample" in anchors
    loaded = r'<(?:script|img|iframe)[^>]+src="(https?:[^"]*)"|<link[^>]+stylesheet[^>]+href="(https?:[^"]*)"'
    assert [found for text in html.values() for found in re.findall(loaded, text)] == []
    marks = [path.name for path, text in html.items() if re.search(r":(?:class|meth|func|mod|attr|data):", text)]
    assert marks == [], "marks of another language are left in docstrings"
    assert (site / "search" / "search_index.json").stat().st_size > 100_000


@pytest.mark.soak
@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[x](no_such_page.md)", "no_such_page.md"),
        ("[x](http.md#no-such-heading)", "no-such-heading"),
        ("[`x`][stepfusion.NoSuchName]", "stepfusion.NoSuchName"),
    ],
)
def test_a_link_to_nothing_ends_the_build(copy: Path, text: str, complaint: str) -> None:
    page = copy / "docs" / "training.md"
    before = page.read_text(encoding="utf-8")
    page.write_text(f"{before}\n{text}\n", encoding="utf-8")
    try:
        built = build(copy)
    finally:
        page.write_text(before, encoding="utf-8")
    assert built.returncode != 0
    assert complaint in built.stderr
