"""Numbers for JSON, which knows neither nan nor infinity: null, and a word for why."""

import math
from collections.abc import Mapping
from typing import Any


def defined(values: Mapping[str, Any], why: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A copy in which floats that are not finite are None, with ``undefined`` {key: word} where a value is None.

    ``why``: words for keys, where the caller knows better than "infinite" or "not a number"."""
    made = {key: None if _strange(value) else value for key, value in values.items()}
    words = {key: (why or {}).get(key, _word(values[key])) for key, value in made.items() if value is None}
    return {**made, "undefined": words} if words else made


def root(error: float, norm: float) -> float | None:
    """sqrt(error / norm), None where ``norm`` is 0."""
    return math.sqrt(error / norm) if norm else None


def _strange(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _word(value: Any) -> str:
    return "infinite" if isinstance(value, float) and math.isinf(value) else "not a number"
