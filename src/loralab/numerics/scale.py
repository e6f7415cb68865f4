"""What the update of an adapter is multiplied by, from its settings."""

import math
from collections.abc import Mapping
from typing import Any


def scale(adapter: Mapping[str, Any]) -> float | None:
    """lora_alpha / r (arXiv 2106.09685, section 4.1), with use_rslora lora_alpha / sqrt(r) (arXiv 2312.03732); None for
    a method without these, and where ``rank_pattern`` or ``alpha_pattern`` give modules others."""
    r, alpha = _number(adapter.get("r")), _number(adapter.get("lora_alpha"))
    if not r or alpha is None or adapter.get("rank_pattern") or adapter.get("alpha_pattern"):
        return None
    return alpha / (math.sqrt(r) if adapter.get("use_rslora") else r)


def _number(value: Any) -> float | None:
    """``value`` where it is a number of at least 0; else None."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
    return float(value) if known else None
