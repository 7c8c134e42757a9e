"""The names of weights in files, as a network of today has them."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

from stepfusion.errors import CheckpointError

Value = TypeVar("Value")

# What wrappers put before every name: DataParallel and DDP, torch.compile, trainers that hold the network.
_PREFIXES = ("module.", "_orig_mod.", "model.", "unet.")
_COMPILED = "_orig_mod."  # stands inside a name, too, if a part was compiled
_OLD_ATTENTION = re.compile(
    r"(?P<block>.*attentions\.\d+)\.(?P<name>query|key|value|proj_attn)\.(?P<kind>weight|bias)"
)
_OF_TODAY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def names_of_today(stored: Mapping[str, Value], wanted: Collection[str], path: Path) -> dict[str, Value]:
    """Rename what a file holds: without the prefixes of wrappers, and the attention weights of 2022 as they are now.

    Args:
        stored: what the file holds, by name.
        wanted: the names that the network has; a prefix that is one of its own modules is left.

    Raises:
        CheckpointError: two names become one.
    """
    renamed: dict[str, Value] = {}
    shared = _shared_prefix(stored, wanted)
    for key, value in stored.items():
        name = key.removeprefix(shared).replace(_COMPILED, "")
        if legacy := _OLD_ATTENTION.fullmatch(name):
            name = f"{legacy['block']}.{_OF_TODAY[legacy['name']]}.{legacy['kind']}"
        if name in renamed:
            raise CheckpointError(f"{path} has {name} twice, under its old name and its new one")
        renamed[name] = value
    return renamed


def _shared_prefix(stored: Collection[str], wanted: Collection[str]) -> str:
    """What wrappers put before every name, one inside the other."""
    shared = ""
    while stored:
        more = [p for p in _PREFIXES if all(key.startswith(shared + p) for key in stored)]
        if not more or any(key.startswith(more[0]) for key in wanted):
            return shared
        shared += more[0]
    return shared
