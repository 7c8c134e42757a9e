"""A form with files, as ``multipart/form-data`` sends it (RFC 7578): its text fields, and its files' bytes.

A body is read whole, within the limit of its size, before it comes here. Nothing is written to a disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from email.message import Message

from starlette.exceptions import HTTPException

from stepfusion.serving.http.errors import InvalidRequest, shown

MEDIA_TYPE = "multipart/form-data"
_MOST_PARTS = 64
_LONGEST_BOUNDARY = 70  # RFC 2046, section 5.1.1
_LONGEST_HEAD = 1 << 12  # bytes of the headers of a part
_END_OF_HEAD = b"\r\n\r\n"


@dataclass(frozen=True)
class Form:
    """The parts of a form, each name with what was given under it in order; ``name[]`` counts as ``name``."""

    texts: dict[str, list[str]]
    files: dict[str, list[bytes]]

    def file(self, name: str) -> bytes | None:
        """The one file of this name, None if there is none; InvalidRequest if there are several, or it is a text."""
        if name in self.texts:
            raise InvalidRequest(f"{name} must be a file, got a text", param=name)
        given = self.files.get(name, [])
        if len(given) > 1:
            raise InvalidRequest(f"{name} must be one file, got {len(given)}", param=name)
        return given[0] if given else None


def boundary_of(content_type: str) -> bytes:
    """What separates the parts of a form; HTTPException with status 415 if the type is not that of a form."""
    header = Message()
    header["Content-Type"] = " ".join(content_type.split())
    boundary = header.get_param("boundary")
    if header.get_content_type() != MEDIA_TYPE or not isinstance(boundary, str):
        raise HTTPException(415, f"the Content-Type must be {MEDIA_TYPE}, with its boundary")
    if not (0 < len(boundary) <= _LONGEST_BOUNDARY and boundary.isascii() and boundary.isprintable()):
        raise HTTPException(415, f"the boundary must have 1 to {_LONGEST_BOUNDARY} ASCII characters")
    return boundary.encode()


def parse_form(body: bytes, boundary: bytes) -> Form:
    """The parts of a body that ``boundary`` separates.

    Raises:
        InvalidRequest: the body is cut short or no such form, a text is not UTF-8, or there are too many parts.
    """
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary, _MOST_PARTS + 1)
    if len(pieces) > _MOST_PARTS + 1:
        raise InvalidRequest(f"the form must have at most {_MOST_PARTS} parts", code="invalid_form")
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise _broken("it is cut short, or its boundary is another")
    form = Form({}, {})
    for piece in pieces[1:-1]:
        name, content, is_file = _part(piece)
        if is_file:
            form.files.setdefault(name, []).append(content)
        else:
            form.texts.setdefault(name, []).append(_text(name, content))
    return form


def _part(piece: bytes) -> tuple[str, bytes, bool]:
    """The name and the content of a part, and whether it is a file."""
    start, _, rest = piece.partition(b"\r\n")
    head, separator, content = (b"\r\n" + rest).partition(_END_OF_HEAD)
    if start.strip(b" \t") or not separator or len(head) > _LONGEST_HEAD:
        raise _broken("a part has no headers, or too long ones")
    disposition = Message()
    for line in head.decode("utf-8", "replace").split("\r\n"):
        key, _, value = line.partition(":")
        if key.strip().lower() == "content-disposition":
            disposition["Content-Disposition"] = value.strip()
    name = disposition.get_param("name", header="content-disposition")
    if disposition.get_content_disposition() != "form-data" or not isinstance(name, str) or not name:
        raise _broken("a part has no name")
    filename = disposition.get_param("filename", header="content-disposition")
    return name.removesuffix("[]"), content, filename is not None


def _text(name: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"{shown(name)} must be text in UTF-8", param=name) from None


def _broken(reason: str) -> InvalidRequest:
    return InvalidRequest(f"the body is not a form: {reason}", code="invalid_form")
