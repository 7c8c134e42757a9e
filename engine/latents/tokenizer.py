"""CLIP's tokenizer, read from its directory (Radford et al. 2021): pairs of letters, joined in the order of a list.

The library transformers tokenizes; the files are read here, within limits, so that none of them chooses what is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

from stepfusion.errors import CheckpointError, first_line
from stepfusion.files.json_files import read_json
from stepfusion.files.regular import read_regular
from stepfusion.latents.libraries import library

CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
WHOLE_FILE = "tokenizer.json"
MAX_BYTES = 1 << 25
MAX_TOKENS = 100_000

_SPECIAL = ("unk_token", "bos_token", "eos_token", "pad_token")
_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def read_tokenizer(directory: Path, positions: int) -> Any:
    """CLIP's tokenizer in a directory.

    Args:
        directory: with ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``; ``tokenizer_config.json`` and
            ``special_tokens_map.json`` say which tokens are special.
        positions: of the text model: a prompt has at most so many tokens, or fewer if the config says so.

    Returns:
        A ``CLIPTokenizer`` of transformers.

    Raises:
        CheckpointError: a file is missing, too large or wrong, asks for something that is not implemented, or
            transformers is not installed.
    """
    config = _read(directory / CONFIG_FILE) if (directory / CONFIG_FILE).exists() else {}
    _check_config(config, directory / CONFIG_FILE)
    vocabulary, merges, listed = _vocabulary(directory)
    transformers = library("transformers", f"the tokenizer in {directory}")
    try:
        special, added = _special_tokens(config, directory, listed, transformers.AddedToken)
        tokenizer = transformers.CLIPTokenizer(
            vocab=vocabulary,
            merges=merges,
            added_tokens_decoder=added,
            model_max_length=_longest(config, positions),
            **special,
        )
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises bare ones
        raise CheckpointError(f"the tokenizer in {directory} cannot be built: {first_line(error)[:300]}") from None
    return tokenizer


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, CheckpointError, MAX_BYTES)


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    """Refuse what would change tokens and is not done here."""
    kind = config.get("tokenizer_class")
    if kind is not None and kind not in _CLASSES:
        raise CheckpointError(f"{path}: tokenizer_class must be {' or '.join(_CLASSES)}, got {short(kind)}")
    for key in ("padding_side", "truncation_side"):
        if config.get(key, "right") != "right":
            raise CheckpointError(f"{path}: {key} must be 'right', got {short(config[key])}")
    for key in ("additional_special_tokens", "extra_special_tokens", "split_special_tokens"):
        if config.get(key):
            raise CheckpointError(f"{path}: {key} is not implemented, got {short(config[key])}")


def _longest(config: Mapping[str, Any], positions: int) -> int:
    """How many tokens a prompt has; transformers writes 1e30 for no limit."""
    value = config.get("model_max_length", positions)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 3:
        raise CheckpointError(f"model_max_length of a tokenizer must be a number of at least 3, got {short(value)}")
    return int(min(value, positions))


def _vocabulary(directory: Path) -> tuple[dict[str, int], list[tuple[str, str]], list[Any]]:
    """The number of each token, the pairs that are joined, and the added tokens that ``tokenizer.json`` lists."""
    whole = directory / WHOLE_FILE
    if whole.exists():
        value = _read(whole)
        model, listed = value.get("model"), value.get("added_tokens", [])
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(listed, list):
            raise CheckpointError(f"{whole} must have a model of the type BPE")
        return _numbers(model.get("vocab"), whole), _pairs(model.get("merges"), whole), listed
    path = directory / "merges.txt"
    if not path.exists() or not (directory / "vocab.json").exists():
        raise CheckpointError(f"{directory} has no tokenizer: accepted is {WHOLE_FILE}, or vocab.json and merges.txt")
    try:
        lines = read_regular(path, MAX_BYTES, follow=True).decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)[:200]}") from None
    entries = [line.rstrip("\r") for line in lines if not line.startswith("#version")]
    vocabulary = _numbers(_read(directory / "vocab.json"), directory / "vocab.json")
    return vocabulary, _pairs([entry for entry in entries if entry], path), []


def _numbers(value: object, path: Path) -> dict[str, int]:
    if not isinstance(value, dict) or not 0 < len(value) <= MAX_TOKENS:
        raise CheckpointError(f"{path}: the vocabulary must be an object of 1 to {MAX_TOKENS} tokens")
    for token, number in value.items():
        if type(number) is not int or not 0 <= number < MAX_TOKENS:
            raise CheckpointError(
                f"{path}: the number of {short(token)} must be in [0, {MAX_TOKENS}), got {short(number)}"
            )
    if len(set(value.values())) != len(value):
        raise CheckpointError(f"{path}: two tokens have the same number")
    return value


def _pairs(value: object, path: Path) -> list[tuple[str, str]]:
    if not isinstance(value, list) or len(value) > MAX_TOKENS:
        raise CheckpointError(f"{path}: the merges must be a list of at most {MAX_TOKENS} pairs")
    pairs = []
    for entry in value:
        parts = entry.split(" ") if isinstance(entry, str) else entry
        if (
            not isinstance(parts, list)
            or len(parts) != 2
            or not all(isinstance(part, str) and part for part in parts)
        ):
            raise CheckpointError(f"{path}: a merge must be a pair of tokens, got {short(entry)}")
        pairs.append((parts[0], parts[1]))
    return pairs


def _special_tokens(
    config: Mapping[str, Any], directory: Path, listed: list[Any], kind: Any
) -> tuple[dict[str, Any], dict[int, Any]]:
    """The special tokens by role, and the added ones by number, as transformers takes them from these files.

    The config goes first if it lists the added tokens; otherwise it is older, and ``special_tokens_map.json`` does.
    """
    roles = {key: config[key] for key in _SPECIAL if config.get(key) is not None}
    numbered = config.get("added_tokens_decoder")
    if numbered is None:
        path = directory / SPECIAL_FILE
        given = _read(path) if path.exists() else {}
        if any(given.get(key) for key in ("additional_special_tokens", "extra_special_tokens")):
            raise CheckpointError(f"{path}: additional special tokens are not implemented")
        for key in _SPECIAL:
            if given.get(key) is not None:
                value = given[key]
                roles[key] = {**value, "special": True} if isinstance(value, dict) else value
        if (directory / "added_tokens.json").exists() and _read(directory / "added_tokens.json"):
            raise CheckpointError(f"{directory / 'added_tokens.json'}: added tokens are not implemented")
        numbered = {entry.get("id"): entry for entry in listed if isinstance(entry, dict)}
    if not isinstance(numbered, dict):
        raise CheckpointError(f"{directory / CONFIG_FILE}: added_tokens_decoder must be an object")
    added = {_number(key): _token(value, kind) for key, value in numbered.items()}
    by_text = {str(token): token for token in added.values()}
    special = {key: _token(value, kind) for key, value in roles.items()}
    return {key: by_text.get(str(token), token) for key, token in special.items()}, added


def _number(key: object) -> int:
    text = str(key)
    if not text.isascii() or not text.isdigit() or int(text[:8]) >= MAX_TOKENS or len(text) > 8:
        raise CheckpointError(f"the number of an added token must be in [0, {MAX_TOKENS}), got {short(key)}")
    return int(text)


def _token(value: object, kind: Any) -> Any:
    """A special token: its text, or an object with the text as "content" and flags."""
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, dict) or not isinstance(value.get("content"), str) or not value["content"]:
        raise CheckpointError(f"a special token must be a text, or an object with its 'content', got {short(value)}")
    return kind(value["content"], **{flag: value[flag] for flag in _FLAGS if type(value.get(flag)) is bool})
