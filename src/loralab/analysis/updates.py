"""What the adapter of a finished run adds to each weight matrix of its base."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters.base import generator_for
from loralab.adapters.embedding import LoRAEmbeddingDelta
from loralab.adapters.experts import LoRAExpertsDelta
from loralab.adapters.last_layer import LeafCopy
from loralab.adapters.low_rank import LoRADelta
from loralab.adapters.vera import VeRADelta
from loralab.analysis.subspaces import SINGLE, Spectrum, product_spectrum, spectrum
from loralab.artifacts.reopen import OpenRun, open_run
from loralab.errors import ArtifactError, ConfigError, nearest
from loralab.quantization.base import base_linears, dense_weight, is_linear, linear_shape, matching
from loralab.running.inputs import Inputs
from loralab.training.specs import TrialSpec

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Update:
    """Delta W (out, in) of one matrix, on the host: ``left`` @ ``right``, or ``dense`` where it has no factors.

    ``a`` (r, in) and ``b`` (out, r) are the factors that the method trains or draws, without scaling; None: it has
    none. ``start``: A as it was drawn; None: it was not drawn. Of an embedding W is its table transposed, as A and B
    take it.
    """

    weight: Tensor
    left: Tensor | None = None
    right: Tensor | None = None
    dense: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    start: Tensor | None = None

    @property
    def r(self) -> int | None:
        """The rank that the method gives it; None where it gives none."""
        factor = self.a if self.a is not None else self.right
        return None if factor is None else len(factor)

    def matrix(self) -> Tensor:
        """Delta W, float32."""
        if self.dense is not None:
            return self.dense
        assert self.left is not None
        assert self.right is not None
        return (self.left.double() @ self.right.double()).float()

    def spectrum(self) -> Spectrum:
        """Of Delta W. Of a dense one, values that a rounding of W to float32 could make count as 0."""
        if self.left is not None and self.right is not None:
            return product_spectrum(self.left, self.right)
        return spectrum(self.matrix(), SINGLE * float(torch.linalg.matrix_norm(self.weight)))


@dataclass(frozen=True)
class Source:
    """An update that is not computed yet. ``shape``: (out, in)."""

    shape: tuple[int, int]
    read: Callable[[], Update]


@dataclass
class OpenUpdates:
    """A run that is open, with the update of each of its matrices by name."""

    run: OpenRun
    sources: dict[str, Source]

    def read(self, name: str) -> Update:
        """The update of one matrix. Raises ArtifactError where it is not finite."""
        with torch.no_grad():
            update = self.sources[name].read()
        if not bool(torch.isfinite(update.matrix()).all()):
            raise ArtifactError(
                f"{self.run.folder}: the update of {name} holds nan or infinite values; valid: finite ones"
            )
        return update


def open_updates(folder: Path, inputs: Inputs) -> OpenUpdates:
    """Opens the run in ``folder``; ``inputs`` keeps its base, unchanged, for the next. Raises what ``open_run`` raises,
    and ConfigError where the method changes no weight matrix."""
    opened = open_run(folder, inputs)
    if opened.spec.adapter.changes_base:
        inputs.forget_base()
        labels = len(opened.record["data"].get("id2label") or ()) or None
        original = inputs.base(opened.spec, labels).model
        sources = {name: _replaced(original, opened.model, name) for name in base_linears(original)}
    else:
        sources = dict(sources_of(opened))
    if not sources:
        opened.close()
        raise ConfigError(
            f"{folder}: adapter={opened.spec.adapter.method} has no weight update: it adds nothing to a weight matrix; "
            "valid: a run of lora, lora_fa, vera, intrinsic, full or last_layer"
        )
    return OpenUpdates(opened, sources)


def chosen(names: list[str], pattern: str | None) -> list[str]:
    """Those of ``names`` that ``pattern`` is, or is the end of, or matches in full as a regular expression; None: all.
    Raises ConfigError where it names none."""
    if pattern is None:
        return names
    matched = [name for name in names if name == pattern or name.endswith(f".{pattern}")]
    matched = matched or matching(pattern, names, "--layers")
    if not matched:
        raise ConfigError(
            f"--layers {pattern} names no adapted layer; {nearest(pattern, (_leaf(name) for name in names))}"
        )
    return matched


def types(names: list[str]) -> dict[str, str]:
    """{name: what it is called in every block}: ``self_attn.q_proj`` of ``model.layers.3.self_attn.q_proj``."""
    starred = {name: _NUMBER.sub("*", name).split(".") for name in names}
    kept = min(len(parts) - 1 - (parts[-1] == "*") for parts in starred.values())  # a type has a word
    heads = [tuple(parts[:kept]) for parts in starred.values()]
    shared = next((depth for depth in range(kept) if len({head[depth] for head in heads}) > 1), kept)
    return {name: ".".join(parts[shared:]) for name, parts in starred.items()}


def _leaf(name: str) -> str:
    return next((part for part in reversed(name.split(".")) if not part.isdigit()), name)


def sources_of(opened: OpenRun) -> Iterator[tuple[str, Source]]:
    """(name, update) of every matrix that the adapter adds to; an expert has the name of its parameter and a number."""
    for name, delta in opened.adapter.adapted():
        layer = opened.model.get_submodule(name)
        if isinstance(delta, LoRAExpertsDelta):
            yield from _of_experts(name, layer, delta)
        elif isinstance(delta, LoRAEmbeddingDelta):
            yield name, _of_table(layer, delta)
        elif isinstance(delta, LeafCopy) and is_linear(layer):
            yield name, _copied(layer, delta.module)
        elif hasattr(delta, "delta_weight") and is_linear(layer):
            yield name, _of_linear(layer, delta, partial(_start, name, opened.spec))


def _of_linear(layer: nn.Module, delta: Any, start: Callable[[LoRADelta], Tensor | None]) -> Source:
    def read() -> Update:
        weight, pair = _host(dense_weight(layer)), dict[str, Tensor | None]()
        if isinstance(delta, LoRADelta):
            pair = {"a": _host(delta.lora_A), "b": _host(delta.lora_B), "start": start(delta)}
        if isinstance(delta, LoRADelta) and type(delta).delta_weight is LoRADelta.delta_weight:
            a, b = delta.plain_factors()
            return Update(weight, delta.scaling * _host(b), _host(a), **pair)
        if isinstance(delta, VeRADelta):
            left = delta.vera_lambda_b[:, None] * delta.shared.vera_B * delta.vera_lambda_d
            return Update(weight, _host(left), _host(delta.shared.vera_A))
        return Update(weight, dense=_host(delta.delta_weight()), **pair)

    return Source(linear_shape(layer), read)


def _start(name: str, spec: TrialSpec, delta: LoRADelta) -> Tensor | None:
    """A of layer ``name`` as the trial's seed draws it; None for a start that is computed, or another class's draw."""
    init = getattr(spec.adapter, "init_lora_weights", "kaiming")
    if init not in ("kaiming", "gaussian", "orthogonal") or type(delta).draw is not LoRADelta.draw:
        return None
    drawn = LoRADelta(delta.lora_A.shape[1], len(delta.lora_B), len(delta.lora_A), delta.scaling)
    drawn.draw(init, generator_for(spec.seed, name))
    return _host(drawn.lora_A)


def _of_table(layer: nn.Module, delta: LoRAEmbeddingDelta) -> Source:
    def read() -> Update:
        a, b = _host(delta.lora_embedding_A), _host(delta.lora_embedding_B)
        return Update(_host(layer.weight.t()), delta.scaling * b, a, a=a, b=b)  # type: ignore[operator]

    return Source((delta.lora_embedding_B.shape[0], delta.lora_embedding_A.shape[1]), read)


def _of_experts(name: str, layer: nn.Module, delta: LoRAExpertsDelta) -> Iterator[tuple[str, Source]]:
    shape = (len(delta.lora_B), delta.lora_A.shape[1])
    for expert in range(delta.experts):

        def read(expert: int = expert) -> Update:
            b, a = (_host(factor[expert]) for factor in delta.by_expert())
            weight = layer.get_parameter(delta.parameter)[expert]
            return Update(_host(weight.mT if delta.transposed else weight), delta.scaling * b, a, a=a, b=b)

        yield f"{name}.{delta.parameter}.{expert}", Source(shape, read)


def _copied(layer: nn.Module, trained: nn.Module) -> Source:
    def read() -> Update:
        weight = _host(dense_weight(layer))
        return Update(weight, dense=_host(dense_weight(trained)) - weight)

    return Source(linear_shape(layer), read)


def _replaced(original: nn.Module, trained: nn.Module, name: str) -> Source:
    return _copied(original.get_submodule(name), trained.get_submodule(name))


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32)
