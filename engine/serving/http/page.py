"""The form at ``/``, and the headers that keep it to its own script, style and server."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files


def read_page() -> str:
    """The HTML of the form."""
    return files("stepfusion.serving.http").joinpath("form.html").read_text(encoding="utf-8")


def page_headers(page: str) -> dict[str, str]:
    """Headers by which a page runs its own script and style, talks to its own server, and is framed by nobody."""

    def hashes(tag: str) -> str:
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inside]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    policy = {
        "default-src": "'none'",
        "script-src": hashes("script"),
        "style-src": hashes("style"),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
