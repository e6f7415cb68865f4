"""Where a model's blocks are: the stack that hidden states go through."""

from typing import Any

from torch import nn


def stack(model: nn.Module) -> nn.ModuleList | None:
    """The layers of a model that is one stack of them; None for an encoder with a decoder."""
    config: Any = model.config
    if config.is_encoder_decoder:
        return None
    return _of_length(model, getattr(config, "num_hidden_layers", None))


def last_stack(model: nn.Module) -> nn.ModuleList | None:
    """The stack that ends at the output: ``stack``, or an encoder-decoder's decoder; None where there is none whose
    layers are modules of their own (ALBERT's are one layer, called again)."""
    config: Any = model.config
    layers = _decoder(model) if config.is_encoder_decoder else stack(model)
    return None if layers is None or len(set(layers)) < len(layers) else layers


def stacks(model: nn.Module) -> list[nn.ModuleList]:
    """Every stack of a model: of an encoder-decoder the encoder's and the decoder's; empty where none is found."""
    config: Any = model.config
    if not config.is_encoder_decoder:
        found = [stack(model)]
    else:
        encoder = getattr(model, "get_encoder", lambda: None)()
        count = getattr(config, "num_layers", None) or getattr(config, "encoder_layers", None)
        found = [None if encoder is None else _of_length(encoder, count), last_stack(model)]
    return [layers for layers in found if layers is not None]


def _decoder(model: nn.Module) -> nn.ModuleList | None:
    config: Any = model.config
    decoder = getattr(model, "get_decoder", lambda: None)()
    count = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", None)
    return None if decoder is None else _of_length(decoder, count)


def _of_length(model: nn.Module, count: int | None) -> nn.ModuleList | None:
    return next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count), None)
