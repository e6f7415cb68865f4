"""What the update of an adapter is multiplied by, from its settings."""

import math
from collections.abc import Mapping
from typing import Any


def scale(adapter: Mapping[str, Any]) -> float | None:
    """lora_alpha / r (arXiv 2106.09685, section 4.1), with use_rslora lora_alpha / sqrt(r) (arXiv 2312.03732); None for
    a method without these, and where ``rank_pattern`` or ``alpha_pattern`` give modules others."""
    r, alpha = adapter.get("r"), adapter.get("lora_alpha")
    if adapter.get("rank_pattern") or adapter.get("alpha_pattern") or not (_is_number(r) and _is_number(alpha)):
        return None
    return None if r <= 0 else float(alpha / (math.sqrt(r) if adapter.get("use_rslora") else r))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
