"""Finds secrets by the name of a key or by their look, and masks them wherever loralab writes."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "***"
VARIABLES = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # their values are secrets whatever they look like
SHORTEST = 8  # characters of a value of these that is looked for in other text

_WORDS = r"(?:api_?key|token|secret|passw(?:or)?d|credentials?|authorization)"
_SECRET_KEY = re.compile(rf"(?i)(^|[_.\-]){_WORDS}$")
_SETTING = re.compile(r"[+~]*[\w.\-/@]+")
_SPECIAL_TOKEN = re.compile(r"(?i)(^|[_.\-])(pad|eos|bos|unk|sep|cls|mask|prompt|stop|start|end)_token$")
_PUBLIC_KEY = re.compile(r"(?i)(revision|commit|sha\d*|fingerprint|git|trial)$")
_SECRET_VALUE = re.compile(
    r"hf_[A-Za-z0-9]{8,}|wandb_v\d_[A-Za-z0-9_]{8,}|\bsk-[A-Za-z0-9_\-]{16,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_HEX40 = re.compile(  # with digits and letters, as any key has
    r"(?<![0-9A-Fa-f])(?=[0-9]*[A-Fa-f])(?=[A-Fa-f]*[0-9])[0-9A-Fa-f]{40}(?![0-9A-Fa-f])"
)
_IN_TEXT = re.compile(  # key=value; "key": value; a line of yaml, key: value
    rf"(?im)(?P<key>(?<![\w.\-])(?:[\w.\-]*[_.\-])?{_WORDS})(?P<between>=|[\"']\s*:\s*|:[ ]+(?=\S+$))"
    r"(?P<quote>[\"']?)(?P<value>[^\s\"',;)}\]]+)"
)


def redact(value: Any, key: str = "") -> Any:
    """``value`` without secrets, as plain JSON types; found by the name of a key or the look of a value.

    ``k=v`` strings are read as a key and a value. 40 hexadecimal digits look like a W&B key, but are kept
    under names such as ``revision``, where they are a commit.
    """
    return _redacted(value, key, _environments())


def _redacted(value: Any, key: str, known: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _redacted(item, str(name), known) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(item, key, known) for item in value]
    if not isinstance(value, str):
        return value
    name, equals, rest = value.partition("=")
    if equals and _SETTING.fullmatch(name):
        return f"{name}={_redacted(rest, name, known)}"
    if _is_secret(key) and value not in ("", "null"):
        return MASK
    text = _SECRET_VALUE.sub(MASK, _without(known, value))
    return text if _PUBLIC_KEY.search(key) else _HEX40.sub(MASK, text)


def masked(text: str) -> str:
    """A line of a log or an error without secrets: of what stands behind ``api_key=`` and the like too."""
    shown = _IN_TEXT.sub(_masked_value, _without(_environments(), text))
    return _HEX40.sub(MASK, _SECRET_VALUE.sub(MASK, shown))


class MaskedFormatter(logging.Formatter):
    """Formats log lines, tracebacks included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


def _is_secret(key: str) -> bool:
    return bool(_SECRET_KEY.search(key)) and not _SPECIAL_TOKEN.search(key)


def _environments() -> list[str]:
    """The values of VARIABLES that are looked for."""
    return [value for name in VARIABLES if len(value := os.environ.get(name, "")) >= SHORTEST]


def _without(known: Sequence[str], text: str) -> str:
    for value in known:
        text = text.replace(value, MASK)
    return text


def _masked_value(found: re.Match[str]) -> str:
    if not _is_secret(found["key"]) or found["value"] in ("null", "None", MASK):
        return found[0]
    return f"{found['key']}{found['between']}{found['quote']}{MASK}"
