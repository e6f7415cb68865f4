"""Rows without their padding, and attention that keeps rows apart: those of one flat batch, and the trials' masks.

Everything but attention looks at tokens one by one, so padding is work for nothing: 40% of it at four rows of ordinary
text. It also makes a trial's figures independent of whoever shares its pass: a row is computed in its own length.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loralab.adapters.hooks import AdapterHooks

NAME = "loralab_rows"
LENGTHS = "loralab_lengths"  # of the rows of a flat batch, an attribute of its mask


def can_unpad(model: nn.Module) -> bool:
    """Whether the model's attention can be handed the rows: SDPA through transformers' interface, causal, full."""
    config: Any = model.config
    windows = {"full_attention"} != set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = windows or bool(getattr(config, "sliding_window", None))
    return config._attn_implementation in ("sdpa", NAME) and not config.is_encoder_decoder and not windows


def prepare(model: nn.Module) -> list[Any]:
    """Lets the model's attention ask for the rows' lengths and for dropout keys. All else is computed by SDPA. Returns
    the configs that say so now."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]  # T5's stacks have their own
    changed = [config for config in configs if getattr(config, "_attn_implementation", None) == "sdpa"]
    for config in changed:
        config._attn_implementation = NAME
    return changed


def undo(changed: list[Any]) -> None:
    """What ``prepare`` changed: a model that asks for SDPA by its name would compute attention in another way."""
    for config in changed:
        config._attn_implementation = "sdpa"


def flatten(inputs: Mapping[str, Tensor], lengths: Sequence[int]) -> dict[str, Any]:
    """input_ids (rows, T), real tokens first -> input_ids, position_ids (1, tokens), and the lengths as a mask."""
    ids = inputs["input_ids"]
    positions = torch.arange(ids.shape[1], device=ids.device)
    return {
        "input_ids": flat(ids, lengths),
        "position_ids": torch.cat([positions[:length] for length in lengths])[None],
        "attention_mask": mask_of(lengths, ids.device),
    }


def flat(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """(rows, T) -> (1, tokens)."""
    return torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])[None]


def mask_of(lengths: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Models hand a mask of four dimensions on as it is; one that used it in earnest would fail over its shape."""
    mask = torch.empty(1, 1, 0, 0, device=device)
    mask.loralab_lengths = tuple(lengths)  # type: ignore[attr-defined]
    return mask


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """query (rows, heads, T, width) -> (rows, T, heads, width); of a flat batch, rows = 1 and T = tokens.

    Dropout: torch's own, share by share, its generator set to the share's key."""
    hooks = AdapterHooks.of(module)
    keys = hooks.keys() if kwargs.get("dropout") else []
    if not keys:
        return _attended(module, query, key, value, attention_mask, **kwargs), None
    bias = kwargs.pop("position_bias", None)
    rows = (hooks.split(x.transpose(1, 2)) for x in (query, key, value))
    parts = zip(keys, *rows, _apart(hooks, attention_mask), _apart(hooks, bias), strict=True)
    found = []
    # flash attention draws other masks, and a row that comes beside shorter ones cannot have it
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        for seed, q, k, v, mask, own_bias in parts:
            _generator(query.device).manual_seed(seed)
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            found.append(_attended(module, q, k, v, mask, position_bias=own_bias, **kwargs))
    return hooks.join(found), None


def _apart(hooks: AdapterHooks, mask: Tensor | None) -> Sequence[Tensor | None]:
    """A mask or a bias (rows or 1, ...) for each share."""
    lengths: tuple[int, ...] | None = getattr(mask, "loralab_lengths", None)
    if lengths is not None:
        waiting = iter(lengths)
        return [mask_of([next(waiting) for _ in range(part.rows)]) for part in hooks.slices]
    return [mask] * len(hooks.slices) if mask is None or mask.shape[0] == 1 else hooks.split(mask)


def _generator(device: torch.device) -> torch.Generator:
    """The one that attention kernels draw from."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def _attended(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Tensor:
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    lengths: tuple[int, ...] | None = getattr(attention_mask, "loralab_lengths", None)
    if lengths is None:
        return sdpa(module, query, key, value, attention_mask, **kwargs)[0]  # type: ignore[no-any-return]
    if len(set(lengths)) == 1:  # rows of one length need not be taken apart
        rows = [_rows(x, len(lengths)) for x in (query, key, value)]
        return sdpa(module, *rows, None, **kwargs)[0].flatten(0, 1)[None]  # type: ignore[no-any-return]
    parts = zip(*(torch.split(x, list(lengths), 2) for x in (query, key, value)), strict=True)
    return torch.cat([sdpa(module, *part, None, **kwargs)[0] for part in parts], 1)


def _rows(x: Tensor, count: int) -> Tensor:
    """(1, heads, rows * T, width) -> (rows, heads, T, width)."""
    return x[0].reshape(x.shape[1], count, -1, x.shape[3]).transpose(0, 1)
