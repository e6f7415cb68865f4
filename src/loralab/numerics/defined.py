"""Numbers for JSON, which has neither nan nor infinity: null in their place, with the reason."""

import math
from collections.abc import Mapping
from typing import Any


def defined(values: Mapping[str, Any], why: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A copy of ``values`` with None for floats that are not finite; where a value is None also ``undefined``, {key:
    reason}. The reason is "infinite" or "not a number", or the one that ``why`` has for the key."""
    finite = {key: None if _is_not_finite(value) else value for key, value in values.items()}
    reasons = {key: (why or {}).get(key, _reason(values[key])) for key, value in finite.items() if value is None}
    return {**finite, "undefined": reasons} if reasons else finite


def root(error: float, norm: float) -> float | None:
    """sqrt(error / norm), None where ``norm`` is 0."""
    return math.sqrt(error / norm) if norm else None


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _reason(value: Any) -> str:
    return "infinite" if isinstance(value, float) and math.isinf(value) else "not a number"
