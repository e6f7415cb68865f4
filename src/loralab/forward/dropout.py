"""The base's own dropout with a mask for each trial, from (seed, step, place in the pass), alone or in a pack.

This covers ``nn.Dropout`` and attention by SDPA. Other random numbers that a model draws come from one generator for
all rows: ``why_alone`` names those that a config shows, and a pack's first batch detects the rest.
"""

from typing import Any

from torch import Tensor, nn

from loralab.adapters.dropout import dropped, length_of
from loralab.adapters.hooks import AdapterHooks
from loralab.forward.unpadded import NAME, prepare


class KeyedDropout(nn.Dropout):
    """``nn.Dropout`` of a base with each trial's masks; outside of a pass of trials plain ``nn.Dropout``."""

    def forward(self, input: Tensor) -> Tensor:
        hooks = AdapterHooks.of(self)
        if not hooks.slices:
            return super().forward(input)
        keys = hooks.keys() if self.training else []
        if not keys:
            return input
        spans = hooks.spans(input.unsqueeze(-1))
        parts = [(stop - start, key) for (start, stop), key in zip(spans, keys, strict=True)]
        return dropped(input, self.p, parts, length_of(input))


def key_dropout(model: nn.Module) -> None:
    """Changes ``model`` so that its dropout masks follow the trials' keys; a model without dropout stays as it is."""
    if not base_dropout(model):
        return
    for module in model.modules():
        module.__dict__["loralab_hooks"] = AdapterHooks.of(model)
        if type(module) is nn.Dropout and module.p > 0:
            module.__class__ = KeyedDropout
    prepare(model)


def base_dropout(model: nn.Module) -> float:
    """The largest dropout probability in the modules of the base, attention's included; 0.0 without dropout."""
    names = ("p", "dropout", "attention_dropout", "dropout_prob", "dropout_rate")
    values = [getattr(module, name, None) for module in model.modules() for name in names]
    return max((value for value in values if isinstance(value, float)), default=0.0)


def own_dropout(config: Any) -> float:
    """The largest dropout probability in a base's config; 0.0 without dropout."""
    return _largest(config, "dropout", "_pdrop")


def why_alone(config: Any, attention: str) -> str:
    """Why a base of ``config`` cannot have a dropout mask for each trial of a pass; empty where it can as far as the
    config shows."""
    skipped, dropout = _largest(config, "layerdrop"), own_dropout(config)
    if skipped:
        return f"the base skips layers at random (its config's layerdrop: {skipped:g}), the same for all rows of a pass"
    if dropout and attention not in ("sdpa", NAME):
        return (
            f"with model.attn_implementation={attention} the base's own dropout ({dropout:g}) cannot be drawn for each "
            "trial; valid: model.dropout=0, or sdpa where the architecture has it"
        )
    return ""


def _largest(config: Any, *words: str) -> float:
    """The largest number under a config's keys that contain one of ``words``; 0.0 without any."""
    rates = [value for key, value in vars(config).items() if any(word in key for word in words)]
    return max((float(rate) for rate in rates if isinstance(rate, int | float)), default=0.0)
