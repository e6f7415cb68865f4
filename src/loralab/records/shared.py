"""Equal parts of records and configurations, kept once: ten thousand trials differ in a few settings and numbers."""

from collections.abc import Mapping
from typing import Any

MOST = 4096  # parts that are remembered

_parts: dict[str, Any] = {}


def share(content: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` with its sections, and theirs, as the equal ones of earlier calls: nobody may change them."""
    return {key: part(value, 2) for key, value in content.items()}


def part(value: Any, depth: int = 1) -> Any:
    """``value``, or what was given before and is equal to it; of ``depth`` levels of mappings each part likewise."""
    if not isinstance(value, dict | list):
        return value
    if depth > 1 and isinstance(value, dict):
        value = {key: part(item, depth - 1) for key, item in value.items()}
    if len(_parts) >= MOST:
        _parts.clear()
    return _parts.setdefault(repr(value), value)
