"""What the pictures of a command say of themselves, which ``stepfusion show metadata`` prints."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from stepfusion.checkpoints.weights_digest import weights_digest
from stepfusion.engine import Engine
from stepfusion.files.picture_reader import MAX_BYTES
from stepfusion.files.png_text import read_texts
from stepfusion.files.provenance import PREFIX, SOFTWARE, Provenance, command_line, texts
from stepfusion.files.regular import read_regular
from stepfusion.samplers.table import StepTable
from stepfusion.samplers.table_request import TableRequest

_RUN = ("device", "dtype", "backend", "network", "batch", "invariant")
_OTHERS = ("size", "lora", "noise", "image", "strength", "mask")


def add_metadata_argument(add: Callable[..., object]) -> None:
    """Declare ``--no-metadata``."""
    add("--no-metadata", action="store_true", help="write no text into PNG files that says where they come from")


def figure_texts(args: argparse.Namespace) -> dict[str, str] | None:
    """The texts of a figure: its model, and the command as it was typed; None with ``--no-metadata``."""
    if args.no_metadata:
        return None
    model, words = getattr(args, "model", None), getattr(args, "words", None)
    weights = None if model is None else weights_digest(model)
    return texts(
        {
            "model": model,
            "weights": None if weights is None else f"sha256:{weights}",
            "command": None if words is None else shlex.join(["stepfusion", *words]),
        }
    )


class SampleProvenance:
    """Where the pictures of ``stepfusion sample`` come from.

    Args:
        asked, table: the table that was asked for, and the rows of it that are walked.
        labels, prompts: of all images; None for a model without, or if none were given.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        engine: Engine,
        asked: TableRequest,
        table: StepTable,
        labels: Sequence[int] | None,
        prompts: Sequence[str] | None = None,
    ) -> None:
        self._args, self._engine, self._asked, self._table = args, engine, asked, table
        self._labels, self._prompts = labels, prompts
        self._weights = None if args.no_metadata else weights_digest(args.model)

    @property
    def command(self) -> str:
        """The command that makes all images again, with everything that they depend on."""
        args = self._args
        labels = None
        if args.labels is not None and self._labels is not None:
            labels = ",".join(map(str, self._labels[: args.labels.count(",") + 1]))
        grid = {name: getattr(args, name) for name in _GRID}
        return self._command(args.num, args.first_index, labels, args.prompt, grid)

    def of_grid(self) -> dict[str, str] | None:
        """The texts of the grid; None with ``--no-metadata``."""
        return self._texts(range(self._args.num), self.command)

    def of_image(self, image: int) -> dict[str, str] | None:
        """The texts of one image's own file; None with ``--no-metadata``."""
        label = None if self._labels is None else str(self._labels[image])
        prompt = None if self._prompts is None else [self._prompts[image]]
        # of a file of noises no option takes one
        command = (
            None
            if self._args.noise
            else self._command(1, self._args.first_index + image, label, prompt, {"single": True})
        )
        return self._texts([image], command)

    def _texts(self, images: Sequence[int], command: str | None) -> dict[str, str] | None:
        args, engine = self._args, self._engine
        if args.no_metadata:
            return None
        labels = None if self._labels is None else [self._labels[i] for i in images]
        names = engine.class_names or ()
        return Provenance(
            model=args.model,
            sampler=self._table.name,
            steps=len(self._table),
            seeds=[args.seed] * len(images),
            indices=[args.first_index + i for i in images],
            labels=labels,
            classes=None if labels is None else [names[i] if i < len(names) else None for i in labels],
            guidance=None if args.guidance is None else [args.guidance],
            weights=self._weights,
            command=command,
            prompts=None if self._prompts is None else [self._prompts[i] for i in images],
            negatives=None if args.negative is None else [args.negative],
            others={name: str(getattr(args, name)) for name in _OTHERS if getattr(args, name) is not None},
        ).text()

    def _command(
        self, num: int, first: int, labels: str | None, prompt: Sequence[str] | None, others: dict[str, object]
    ) -> str:
        args = self._args
        run = {name: getattr(args, name) for name in _RUN}
        return command_line(
            "sample",
            args.model,
            options={
                "num": num,
                "labels": labels,
                "prompt": prompt,
                "negative": args.negative,
                "guidance": args.guidance,
                "seed": args.seed,
                "first_index": first or None,
                **{name: getattr(args, name) for name in _OTHERS},
                **(self._asked.words() or {}),
                **{name: value for name, value in run.items() if value != "auto"},
                **others,
            },
        )


_GRID = ("single", "columns", "scale")  # how the images of a command are laid out


def print_metadata(path: Path) -> None:
    """Print what a PNG file says of where it comes from, a line each.

    Raises:
        ValueError: the file is no PNG, or says nothing of it.
    """
    try:
        found = read_texts(read_regular(path, MAX_BYTES, follow=True))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    facts = {name.removeprefix(PREFIX): text for name, text in found.items() if name.startswith(PREFIX)}
    if not facts:
        raise ValueError(f"{path} does not say where it comes from: no text of stepfusion's is in it")
    software = {"version": found[SOFTWARE]} if SOFTWARE in found else {}
    for name, text in {**software, **facts}.items():
        print(f"{_printable(name):<10} {_printable(text)}")


def _printable(text: str) -> str:
    """A text without what could steer a terminal: anybody may have written it."""
    return "".join(one if one.isprintable() else "?" for one in text)
