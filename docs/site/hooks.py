"""What mkdocs is given beside the pages of docs/: the pages of the API, and files that they link to.

The pages of the API follow from the lists of public names, so that a new name is on them without anybody's doing.
"""

from __future__ import annotations

import ast
import posixpath
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
#: The packages whose public names have pages, beside the package itself, and what the pages are called.
PACKAGES = {
    "networks": "Networks",
    "latents": "Latents and texts",
    "serving": "Serving",
    "bulk": "Bulk jobs",
    "export": "Export",
    "kernels": "Kernels",
}
#: What the page is called on which a name of the package itself stands, by the room where it is defined.
ROOMS = {
    "engine": "Engine",
    "lanes": "Engine",
    "execution": "Engine",
    "saved_images": "Engine",
    "warming": "Engine",
    "options": "Engine",
    "model_spec": "Engine",
    "samplers": "Samplers, schedules and paths",
    "diffusion": "The literature's methods",
    "checkpoints": "Reading and writing models",
    "files": "Reading and writing models",
    "training": "Training",
    "errors": "Errors",
}
ELSEWHERE = "Other names"
#: Modules whose classes signatures and docstrings name, and which are no public names themselves.
ALSO = {
    "Engine": ("options.SamplingOptions", "options.ExecutionOptions", "model_spec.ModelSpec"),
    "Samplers, schedules and paths": ("samplers.grid.GridOptions",),
    "Export": ("export.base.ExportOptions", "export.base.TickOptions"),
    "Training": ("training.config.TrainConfig",),
}
_CODE = re.compile(r"`[^`]+`")
_LINK = re.compile(r"(?<!`)(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s#]+)(#[^)\s]*)?(\))")


def public_names(module: Path) -> dict[str, str]:
    """The names in a package's ``__all__``, each with the module that it is imported from, without importing it."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    origins = {
        alias.asname or alias.name: node.module or ""
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]
    )
    return {name: origins.get(name, "") for name in names}


def source_of(package: str) -> Path:
    """Where the code of ``stepfusion.PACKAGE`` lies."""
    inside = ROOT / "engine" / package
    return inside if inside.is_dir() else ROOT / package


def reference() -> dict[str, list[str]]:
    """The titles of the API's pages, each with the names on it, from "stepfusion." on."""
    pages: dict[str, list[str]] = {title: [] for title in ROOMS.values()}
    for name, origin in public_names(ROOT / "engine" / "_public.py").items():
        room = origin.removeprefix("stepfusion.").split(".")[0]
        pages.setdefault(ROOMS.get(room, ELSEWHERE), []).append(name)
    for package, title in PACKAGES.items():
        names = public_names(source_of(package) / "__init__.py")
        pages[title] = [f"{package}.{name}" for name in names if f"{package}.{name}" != "kernels.reference"]
    for title, more in ALSO.items():
        pages.setdefault(title, []).extend(more)
    return {title: _first_the_engine(names) for title, names in pages.items() if names}


def _first_the_engine(names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: (name != "Engine", name.lower()))


def slug(title: str) -> str:
    """The file name of a page, without its suffix."""
    return re.sub(r"[^a-z]+", "_", title.lower()).strip("_")


@event_priority(100)  # before mkdocstrings looks at its paths
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lay the package out as it installs, for the sources are read and not imported; give the API its pages."""
    target = Path(config.config_file_path).parent / "build" / "site-source"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(ROOT / "engine", target / "stepfusion", ignore=_not_python)
    for package in ("kernels", "export", "bench"):
        shutil.copytree(ROOT / package, target / "stepfusion" / package, ignore=_not_python)
    assert config.nav is not None
    pages = [{"Overview": "api/index.md"}, *({title: f"api/{slug(title)}.md"} for title in reference())]
    for entry in config.nav:
        if entry.get("API reference") == "api/":
            entry["API reference"] = pages
    return config


def _not_python(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not (name.endswith(".py") or (Path(folder) / name).is_dir())]


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages of the API, and every file that a page links to, and those that these link to."""
    for path, text in api_pages().items():
        files.append(File.generated(config, path, content=text))
    waiting = [page.abs_src_path for page in files.documentation_pages() if page.abs_src_path]
    waiting += [str(ROOT / name) for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
    done: set[Path] = set()
    while waiting:
        page = Path(waiting.pop())
        for path in {page, *_linked(page)} - done:
            done.add(path)
            if path.is_relative_to(ROOT / "docs"):
                continue
            place = f"repository/{path.relative_to(ROOT).as_posix()}"
            if path.suffix == ".md":
                files.append(File.generated(config, place, content=path.read_text(encoding="utf-8")))
                waiting.append(str(path))
            else:
                files.append(File.generated(config, place, content=path.read_bytes()))
    return files


def _linked(page: Path) -> Iterator[Path]:
    """The files of the repository that a page links to; folders are no pages."""
    for match in _LINK.finditer(page.read_text(encoding="utf-8")):
        path = (page.parent / match[2]).resolve()
        if ":" not in match[2] and path.is_file() and path.is_relative_to(ROOT):
            yield path


def api_pages() -> dict[str, str]:
    """The Markdown of the API's pages, by their paths."""
    pages = {f"api/{slug(title)}.md": _api_page(title, names) for title, names in reference().items()}
    lines = ["# API reference", "", "`import stepfusion as sf` has all that stands here without a module's name.", ""]
    for title, names in reference().items():
        lines += [f"- [{title}]({slug(title)}.md): " + ", ".join(f"[`{name}`][stepfusion.{name}]" for name in names)]
    return {"api/index.md": "\n".join(lines) + "\n", **pages}


def _api_page(title: str, names: list[str]) -> str:
    block = "::: stepfusion.{0}\n    options:\n      heading: {0}\n      toc_label: {0}\n"
    blocks = [block.format(name) for name in names]
    return "\n".join([f"# {title}", "", *blocks])


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turn links that are right in the repository into links that are right on the site."""
    uri: str = page.file.src_uri
    source = uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}"
    return plain_pipes(moved_links(markdown, source, uri))


def plain_pipes(markdown: str) -> str:
    """A page's text without the backslashes that a | in the code of a cell needs elsewhere."""
    lines = (
        _CODE.sub(lambda code: code[0].replace("\\|", "|"), line) if line.startswith("|") else line
        for line in markdown.split("\n")
    )
    return "\n".join(lines)


def moved_links(markdown: str, source: str, uri: str) -> str:
    """A page's text with its links from where the page lies on the site.

    Args:
        markdown: the text.
        source: the page's path in the repository.
        uri: its path on the site, before it becomes HTML.
    """

    def moved(match: re.Match[str]) -> str:
        before, target, anchor, after = match[1], match[2], match[3] or "", match[4]
        if ":" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path.startswith("docs/"):
            there = path.removeprefix("docs/")
        elif (ROOT / path).is_file():
            there = f"repository/{path}"
        else:
            return match[0]
        return f"{before}{posixpath.relpath(there, posixpath.dirname(uri) or '.')}{anchor}{after}"

    return _LINK.sub(moved, markdown)
