"""What the pictures of a server say of themselves: the model by its name, and the command that makes them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stepfusion.engine import Engine
from stepfusion.files.provenance import Provenance, command_line
from stepfusion.lanes.editing import Edit
from stepfusion.serving.http.messages import class_name
from stepfusion.serving.http.requests import is_list
from stepfusion.serving.http.validation import ValidatedRequest

Texts = dict[str, str] | None  # of a PNG file


@dataclass(frozen=True)
class Origin:
    """A served model, as its pictures name it.

    Attributes:
        name: for people; a path of the server's is never told.
        weights: SHA-256 of its file of weights, if it is known.
        told: whether pictures say anything.
        lora: the LoRA files that were added to it, as ``--lora`` takes them, without their directories.
    """

    name: str
    weights: str | None = None
    told: bool = True
    lora: str | None = None

    def of_image(self, engine: Engine, request: ValidatedRequest, image: int, edit: Edit | None = None) -> Texts:
        """The texts of one image; an edited one has no command, for its picture came with the request."""
        return self._texts(engine, request, [image], edit)

    def of_all(self, engine: Engine, request: ValidatedRequest) -> Texts:
        """The texts of one picture of all images; there is a command only if it is of one."""
        return self._texts(engine, request, range(len(request)), None)

    def _texts(self, engine: Engine, request: ValidatedRequest, images: Sequence[int], edit: Edit | None) -> Texts:
        if not self.told:
            return None
        labels = None if request.labels is None else [request.labels[i] for i in images]
        scales: Any = request.request.guidance  # one for all, or a list
        guidance = None if scales is None else [scales[i] for i in images] if is_list(scales) else [scales]
        alone = edit is None and len(images) == 1
        return Provenance(
            model=self.name,
            sampler=request.table.name,
            steps=len(request.table if edit is None else edit.shorten(request.table)),
            seeds=[request.seeds[i] for i in images],
            indices=[request.indices[i] for i in images],
            labels=labels,
            classes=None if labels is None else [class_name(engine, label) for label in labels],
            guidance=guidance,
            weights=self.weights,
            command=self._command(engine, request, images[0], guidance) if alone else None,
            prompts=None if request.prompts is None else [request.prompts[i] for i in images],
            negatives=None if request.negatives is None else [request.negatives[i] for i in images],
            others={
                **({} if self.lora is None else {"lora": self.lora}),
                **({} if edit is None else {"edit": _described(edit)}),
            },
        ).text()

    def _command(
        self, engine: Engine, request: ValidatedRequest, image: int, guidance: Sequence[float] | None
    ) -> str | None:
        words = request.request.table_request.words()
        if words is None:
            return None
        return command_line(
            "sample",
            self.name,
            options={
                "num": 1,
                "lora": self.lora,
                "labels": None if request.labels is None else request.labels[image],
                "prompt": None if request.prompts is None else request.prompts[image],
                "negative": None if request.negatives is None else request.negatives[image],
                "guidance": None if guidance is None else guidance[0],
                "seed": request.seeds[image],
                "first_index": request.indices[image] or None,
                **words,
                **({"batch": engine.batch, "invariant": True} if engine.invariant else {}),
                "single": True,
            },
        )


def _described(edit: Edit) -> str:
    return f"strength {edit.strength:g}{' and a mask' if edit.mask is not None else ''}"
