"""What PEFT's files mean beside the base, where loralab writes it otherwise: PiSSA, VeRA, virtual tokens."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters import peft
from loralab.adapters.lora import LoRA
from loralab.adapters.virtual import KEY
from loralab.artifacts.foreign import Foreign, Method
from loralab.errors import ArtifactError, ConfigError
from loralab.quantization.base import dense_weight, is_frozen, is_linear, linear_shape


@torch.no_grad()
def converted(foreign: Foreign, method: Method, model: nn.Module) -> tuple[Foreign, Method]:
    """``foreign`` and ``method`` as A and B beside ``model`` as it is. Raises ConfigError, ArtifactError."""
    foreign = replace(foreign, state=_without_copies(_without_base(foreign, model)))
    method = replace(method, fields=_without_idle(method.fields, model))
    if foreign.kind == "VERA":
        return _without_vera(foreign, model), method
    start = foreign.config.get("init_lora_weights")
    if foreign.kind == "LORA" and start == "pissa":
        return _without_pissa(foreign, method, model)
    if foreign.kind == "LORA" and start == "loftq":
        _check_loftq(foreign, model)
    return foreign, method


def _without_idle(fields: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """``fields`` without entries of patterns and exclusions that no layer answers to, which PEFT allows."""
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    kept = dict(fields)
    for key in ("rank_pattern", "alpha_pattern"):
        if key in fields:
            kept[key] = {one: value for one, value in fields[key].items() if _matches(names, rf"(.*\.)?({one})$")}
    if isinstance(excluded := fields.get("exclude_modules"), list):
        kept["exclude_modules"] = [one for one in excluded if _matches(names, rf"(.*\.)?{re.escape(one)}$")] or None
    return kept


def _matches(names: Iterable[str], pattern: str) -> bool:
    try:
        return any(re.match(pattern, name) for name in names)
    except re.error:
        return True  # the adapter's spec says what is wrong with it


def _without_base(foreign: Foreign, model: nn.Module) -> dict[str, Tensor]:
    """The state without the base's own tables, which PEFT adds where it adapts them or the vocabulary has grown.

    Raises ArtifactError where they are not those of ``model``.
    """
    state = dict(foreign.state)
    for get in ("get_input_embeddings", "get_output_embeddings"):
        table = getattr(model, get)()
        names = [name for name, module in model.named_modules() if module is table] if table is not None else []
        for name in [name for name in names if not name.endswith(foreign.whole)]:
            for key in (f"{foreign.prefix}{name}.weight", f"{foreign.prefix}{name}.base_layer.weight"):
                if key not in state:
                    continue
                own, stored = dense_weight(table) if is_linear(table) else table.weight, state.pop(key)
                if own.shape != stored.shape or not torch.equal(own.to(stored), stored):
                    raise ArtifactError(
                        f"{foreign.weights} holds a {name} of its own, {tuple(stored.shape)}, where the base has"
                        f" another, {tuple(own.shape)}: its vocabulary or its weights were changed; valid:"
                        " an adapter of this base"
                    )
    return state


def _without_copies(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the biases of heads that PEFT writes once more where all biases train: those of the base's own head,
    which it does not compute with, and the trained ones under a second name."""

    def copied(key: str) -> bool:
        twin = state.get(key.replace(".modules_to_save.", "."))
        return ".original_module." in key or (
            ".modules_to_save." in key and twin is not None and torch.equal(twin, state[key])
        )

    return {key: value for key, value in state.items() if not copied(key)}


def _without_pissa(foreign: Foreign, method: Method, model: nn.Module) -> tuple[Foreign, Method]:
    """PEFT takes the first r principal directions out of each weight as it opens the file, and adds B A. Beside the
    whole weight that is [A; A0] and [B, -B0] of rank 2 r, as PEFT itself converts it."""
    spec, state = LoRA(**method.fields), dict(foreign.state)
    for key_a in [key for key in state if key.endswith(".lora_A.weight")]:
        name = key_a.removeprefix(foreign.prefix).removesuffix(".lora_A.weight")
        key_b = peft.lora_keys(name)[1]
        r, a, b = spec.rank(name), state[key_a], state.get(key_b)
        try:
            weight = dense_weight(model.get_submodule(name)).float().cpu()
        except AttributeError as error:
            raise ArtifactError(f"{foreign.weights}: the base has no {name}") from error
        if b is None or a.shape != (r, weight.shape[1]) or b.shape != (len(weight), r):
            raise ArtifactError(f"{foreign.weights}: {key_a} and its B are not of rank {r} on {tuple(weight.shape)}")
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        roots = (s[:r] / spec.scaling(name)).sqrt()
        state[key_a] = torch.cat([a.float(), roots[:, None] * vh[:r]])
        state[key_b] = torch.cat([b.float(), -u[:, :r] * roots], 1)
    factor = math.sqrt(2) if spec.use_rslora else 2.0
    fields: dict[str, Any] = {
        "r": 2 * spec.r,
        "lora_alpha": factor * spec.lora_alpha,
        "rank_pattern": {key: 2 * r for key, r in spec.rank_pattern.items()},
        "alpha_pattern": {key: factor * alpha for key, alpha in spec.alpha_pattern.items()},
    }
    return replace(foreign, state=state), replace(method, fields={**method.fields, **fields})


def _check_loftq(foreign: Foreign, model: nn.Module) -> None:
    """PEFT quantizes the base as it opens the file; here the base is quantized already."""
    steps = (foreign.config.get("loftq_config") or {}).get("loftq_iter", 1)
    if steps != 1:
        raise ConfigError(
            f"{foreign.weights.parent}: loftq_iter={steps} quantizes what A and B leave of each weight, while loralab's"
            " base is the quantized weight itself; valid: 1"
        )
    if not any(is_frozen(module) for module in model.modules()):
        raise ConfigError(
            f"{foreign.weights.parent}: init_lora_weights=loftq stands beside a quantized base; valid:"
            " quantization=nf4, or the scheme that it was trained over"
        )


def _without_vera(foreign: Foreign, model: nn.Module) -> Foreign:
    """Lambda_b B and Lambda_d A of each layer, cut out of the one pair of matrices; those are drawn as PEFT draws them
    where the file does not hold them."""
    names = [found[1] for key in foreign.state if (found := re.fullmatch(rf"{foreign.prefix}(.+)\.vera_lambda_d", key))]
    layers = dict(model.named_modules())
    if strange := [name for name in names if name not in layers or not is_linear(layers[name])]:
        raise ArtifactError(f"{foreign.weights}: the base has no linear layer {strange[0]}")
    shapes = {name: linear_shape(layers[name]) for name in names}
    state = dict(foreign.state)
    a, b = state.pop("base_model.vera_A", None), state.pop("base_model.vera_B", None)
    if a is None or b is None:
        if foreign.config.get("save_projection", True) or not names:
            raise ArtifactError(f"{foreign.weights} lacks base_model.vera_A or base_model.vera_B")
        a, b = _drawn(foreign.config, [max(sizes) for sizes in zip(*shapes.values(), strict=True)])
    for name, (out_features, in_features) in shapes.items():
        d = state.pop(f"{foreign.prefix}{name}.vera_lambda_d").float()
        scale = state.pop(f"{foreign.prefix}{name}.vera_lambda_b", torch.empty(0)).float()
        fits = len(scale) == out_features <= len(b) and in_features <= a.shape[1] and len(d) == len(a) == b.shape[1]
        if not fits:
            raise ArtifactError(
                f"{foreign.weights}: the vectors of {name}, {len(d)} and {len(scale)}, and matrices {tuple(a.shape)}"
                f" and {tuple(b.shape)} do not fit a layer of {out_features} x {in_features}"
            )
        key_a, key_b = peft.lora_keys(name)
        state[key_a] = d[:, None] * a[:, :in_features].float()
        state[key_b] = scale[:, None] * b[:out_features].float()
    return replace(foreign, state=state)


def _drawn(config: dict[str, Any], largest: list[int]) -> tuple[Tensor, Tensor]:
    """PEFT's matrices for layers of at most ``largest``, (out, in): uniform in +- sqrt(6 / columns)."""
    generator, r = torch.Generator().manual_seed(int(config.get("projection_prng_key", 0))), int(config.get("r", 256))
    pair = []
    for shape in ((r, largest[1]), (largest[0], r)):
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        pair.append(torch.empty(shape).uniform_(-bound, bound, generator=generator))
    return pair[0], pair[1]


def virtual_tokens(foreign: Foreign, own: Tensor) -> Tensor:
    """PEFT's tensor in the layout that loralab's files of this base have, that of ``own``. Raises ArtifactError.

    Of an encoder-decoder PEFT keeps a second prompt, for the decoder, which it does not use; and it gives layer i of
    the decoder the keys and values that it keeps for layer 2i, counted round.
    """
    stored, config = foreign.state[KEY], foreign.config
    if config.get("num_transformer_submodules") != 2:
        return stored
    if foreign.kind == "PROMPT_TUNING":
        size = int(config["num_virtual_tokens"])
        return stored[:size] if len(stored) == 2 * size else stored
    layers, width = int(config.get("num_layers") or 0), 2 * int(config.get("token_dim") or 0)
    if not layers or stored.shape[1] != layers * width or own.shape[1] % (2 * width):
        raise ArtifactError(
            f"{foreign.weights}: {KEY} is {tuple(stored.shape)}, which is not num_layers={layers} times two of"
            f" token_dim={width // 2}, or does not fit the base"
        )
    kept = stored.view(len(stored), layers, width)
    spread = torch.zeros(len(stored), own.shape[1] // (2 * width), 2, width)
    for layer in range(spread.shape[1]):
        spread[:, layer, 0] = kept[:, 2 * layer % layers]
    return spread.flatten(1)
