"""Batches without padding, and the attention that they need: over each row by itself, with each trial's dropout masks.

All layers but attention compute token by token, so the padding, 40% of a batch of four rows of ordinary text, can be
left out. A row is then computed at its own length, so that a trial's results do not depend on the rows of other trials.
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
from loralab.forward import varlen

NAME = "loralab_rows"
LENGTHS = "loralab_lengths"  # of the rows of a flat batch, an attribute of its mask


def can_unpad(model: nn.Module) -> bool:
    """Whether the model's attention can run on flat batches: causal, without a window, SDPA of transformers."""
    config: Any = model.config
    windows = {"full_attention"} != set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = windows or bool(getattr(config, "sliding_window", None))
    return config._attn_implementation in ("sdpa", NAME) and not config.is_encoder_decoder and not windows


def prepare(model: nn.Module) -> list[Any]:
    """Replaces SDPA in ``model`` by an attention that calls SDPA for each row of a flat batch, with the trials' dropout
    keys. Returns the configs that it changed, for ``undo``."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    # of every module: T5's encoder and decoder have their own
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    changed = [config for config in configs if getattr(config, "_attn_implementation", None) == "sdpa"]
    for config in changed:
        config._attn_implementation = NAME
    return changed


def undo(changed: list[Any]) -> None:
    """Sets SDPA back in the configs that ``prepare`` changed: models that compare its name take another path else."""
    for config in changed:
        config._attn_implementation = "sdpa"


def flatten(inputs: Mapping[str, Tensor], lengths: Sequence[int]) -> dict[str, Any]:
    """input_ids (rows, T), padded on the right -> input_ids and position_ids (1, tokens), ``mask_of(lengths)``."""
    ids = inputs["input_ids"]
    positions = torch.arange(ids.shape[1], device=ids.device)
    return {
        "input_ids": flat(ids, lengths),
        "position_ids": torch.cat([positions[:length] for length in lengths])[None],
        "attention_mask": mask_of(lengths, ids.device),
    }


def flat(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """x (rows, T) -> (1, tokens): of each row the first ``length`` positions."""
    return torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])[None]


def mask_of(lengths: Sequence[int], device: torch.device | None = None) -> Tensor:
    """A mask (1, 1, 0, 0) that carries ``lengths`` to the attention. Models pass a mask of four dimensions on as it is;
    one that computed with it would fail on its shape."""
    mask = torch.empty(1, 1, 0, 0, device=device)
    setattr(mask, LENGTHS, tuple(lengths))
    return mask


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """query (rows, heads, T, width) -> (rows, T, heads, width); of a flat batch, rows = 1 and T = tokens.

    With dropout each trial's rows are computed by themselves, torch's generator set to the trial's key."""
    hooks = AdapterHooks.of(module)
    keys = hooks.keys() if kwargs.get("dropout") else []
    if not keys:
        return _sdpa(module, query, key, value, attention_mask, **kwargs), None
    bias = kwargs.pop("position_bias", None)
    rows = (hooks.split(x.transpose(1, 2)) for x in (query, key, value))
    parts = zip(keys, *rows, _by_trial(hooks, attention_mask), _by_trial(hooks, bias), strict=True)
    outputs = []
    # not flash attention: it draws other masks, and cannot run a row that is padded
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        for seed, q, k, v, mask, own_bias in parts:
            # of several processes each draws for its own rows: these are not parts of one process's masks
            before = seed.units[0] if seed.units else 0
            _generator(query.device).manual_seed(seed + before)
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            outputs.append(_sdpa(module, q, k, v, mask, position_bias=own_bias, **kwargs))
    return hooks.join(outputs), None


def _by_trial(hooks: AdapterHooks, mask: Tensor | None) -> Sequence[Tensor | None]:
    """A mask or a bias (rows or 1, ...) -> each trial's (its rows or 1, ...)."""
    lengths: tuple[int, ...] | None = getattr(mask, LENGTHS, None)
    if lengths is not None:
        remaining = iter(lengths)
        return [mask_of([next(remaining) for _ in range(part.rows)]) for part in hooks.slices]
    return [mask] * len(hooks.slices) if mask is None or mask.shape[0] == 1 else hooks.split(mask)


def _generator(device: torch.device) -> torch.Generator:
    """The generator that torch's attention kernels on ``device`` use."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Tensor:
    """SDPA: query (rows, heads, T, width) -> (rows, T, heads, width); of a flat batch over each row by itself."""
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    lengths: tuple[int, ...] | None = getattr(attention_mask, LENGTHS, None)
    if lengths is None:
        return sdpa(module, query, key, value, attention_mask, **kwargs)[0]  # type: ignore[no-any-return]
    if len(set(lengths)) == 1:  # one call for rows of one length
        rows = [_rows(x, len(lengths)) for x in (query, key, value)]
        return sdpa(module, *rows, None, **kwargs)[0].flatten(0, 1)[None]  # type: ignore[no-any-return]
    if varlen.takes(query) and not kwargs.get("dropout") and kwargs.get("position_bias") is None:
        return varlen.attend(query, key, value, lengths, kwargs.get("scaling"))
    parts = zip(*(torch.split(x, list(lengths), 2) for x in (query, key, value)), strict=True)
    return torch.cat([sdpa(module, *part, None, **kwargs)[0] for part in parts], 1)


def _rows(x: Tensor, count: int) -> Tensor:
    """(1, heads, rows * T, width) -> (rows, heads, T, width)."""
    return x[0].reshape(x.shape[1], count, -1, x.shape[3]).transpose(0, 1)
