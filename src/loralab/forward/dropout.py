"""The base's own dropout, drawn for each trial: masks come from (seed, step, place in the pass), whoever shares it.

``nn.Dropout`` and attention (by SDPA) are drawn so. What a model draws by itself is the same generator's for all rows:
`why_alone` says what of that can be foreseen, and a pack's first batch finds the rest.
"""

from typing import Any

from torch import Tensor, nn

from loralab.adapters.dropout import dropped, length_of
from loralab.adapters.hooks import AdapterHooks
from loralab.forward.unpadded import NAME, prepare


class KeyedDropout(nn.Dropout):
    """``nn.Dropout`` of a base; as it was where a pass is nobody's."""

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
    """From now on the masks of ``model`` follow the keys of a pass. One without dropout is left as it is."""
    if not base_dropout(model):
        return
    for module in model.modules():
        module.__dict__["loralab_hooks"] = AdapterHooks.of(model)
        if type(module) is nn.Dropout and module.p > 0:
            module.__class__ = KeyedDropout
    prepare(model)


def base_dropout(model: nn.Module) -> float:
    """The largest dropout probability inside the base, attention's included."""
    names = ("p", "dropout", "attention_dropout", "dropout_prob", "dropout_rate")
    found = [getattr(module, name, None) for module in model.modules() for name in names]
    return max((value for value in found if isinstance(value, float)), default=0.0)


def own_dropout(config: Any) -> float:
    """The largest dropout probability that a base of this config itself would train with."""
    return _largest(config, "dropout", "_pdrop")


def why_alone(config: Any, attention: str) -> str:
    """Why masks of such a base cannot be drawn for each trial of a pass; empty where they can, or nobody can say."""
    skipped, dropout = _largest(config, "layerdrop"), own_dropout(config)
    if skipped:
        return f"the base skips layers at random (its config's layerdrop: {skipped:g}), for all rows of a pass alike"
    if dropout and attention not in ("sdpa", NAME):
        return (
            f"with model.attn_implementation={attention} the base's own dropout ({dropout:g}) cannot be drawn for each "
            "trial; valid: model.dropout=0, or sdpa where the architecture has it"
        )
    return ""


def _largest(config: Any, *words: str) -> float:
    rates = [value for key, value in vars(config).items() if any(word in key for word in words)]
    return max((float(rate) for rate in rates if isinstance(rate, int | float)), default=0.0)
