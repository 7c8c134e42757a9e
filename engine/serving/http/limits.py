"""The most that one HTTP request may ask for."""

from __future__ import annotations

from dataclasses import dataclass

from stepfusion.serving.http.errors import InvalidRequest, shown


@dataclass(frozen=True)
class Limits:
    """The most that one HTTP request may ask for.

    Attributes:
        images: of one request.
        steps: of one image.
        evaluations: of the network; a guided image takes two a step.
        elements: of all images together, n * C * H * W.
        previews: of all images of a stream together, n * ceil(steps / every): each is a copy from the device and a
            PNG, which the other requests wait for.
        priority: the highest that a client may choose; 0, which is also the default, if none may pass the others.
        body: bytes of the JSON.
        body_seconds: within which the JSON must arrive.
    """

    images: int = 64
    steps: int = 1000
    evaluations: int = 16_000
    elements: int = 1 << 24
    previews: int = 1000
    priority: int = 0
    body: int = 1 << 16
    body_seconds: float = 10.0


def check_limit(name: str, value: int, most: int, what: str, asked: str = "") -> None:
    """InvalidRequest if ``value``, which counts ``what`` and follows from the argument ``name``, exceeds ``most``.

    ``asked`` says what was entered, if the value is not that, as in "64 images of 500 steps".
    """
    if value > most:
        told = f"{asked} are {shown(value)}" if asked else shown(value)
        raise InvalidRequest(f"{name} is too large: {told} {what}, and a request may have {most}")


def counted(number: int, noun: str) -> str:
    """A number of things, as in "1 image" and "2 images"."""
    return f"{shown(number)} {noun}" if number == 1 else f"{shown(number)} {noun}s"
