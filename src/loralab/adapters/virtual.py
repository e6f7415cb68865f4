"""Virtual tokens: trained states that stand before the tokens of every row of a trial.

They change what a stack of layers is called with: its mask, its positions, and its cache or its embeddings. All rows
of a pass have as many of them, so that what the base is called with stays one rectangle; trials with other numbers of
them run one after the other.
"""

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from loralab.adapters import peft
from loralab.adapters.base import Adapter, AdapterSpec
from loralab.adapters.files import WEIGHTS, read_state
from loralab.adapters.hooks import AdapterHooks, Hook, NotPackable
from loralab.adapters.targets import within
from loralab.errors import ArtifactError, ConfigError

log = logging.getLogger(__name__)

KEY = "prompt_embeddings"  # PEFT's name of the one tensor
BLANK = 1  # in a mask: there to be attended to


class VirtualHook(Hook):
    """Around the calls of one stack of the base, in passes of trials that have virtual tokens there."""

    def __init__(self, hooks: AdapterHooks, layer: nn.Module, salt: int) -> None:
        super().__init__(hooks, layer, salt)
        self.handles.append(layer.register_forward_pre_hook(self._enter, with_kwargs=True))
        self.handles.append(layer.register_forward_hook(self._leave, with_kwargs=True))

    def _enter(
        self, stack: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        found = self._found()
        if not found:
            return None
        self.called.update(part.owner for part in self.hooks.slices)
        given = by_name(stack, args, named)
        return (), type(found[0]).enter(stack, given, self._shares(found, given))

    def _leave(self, stack: nn.Module, args: tuple[Any, ...], named: dict[str, Any], out: Any) -> Any:
        found = self._found()
        return found[0].leave(stack, named, out) if found else out

    def _found(self) -> list["Virtual"]:
        """The virtual tokens of each slice; none for a pass in which nobody has any here."""
        found = [self.deltas.get(part.owner) for part in self.hooks.slices]
        if not any(found):
            return []
        first = [cast(Virtual, own[0]) if own else None for own in found]
        if len({(type(one), one and one.size) for one in first}) > 1:
            raise NotPackable("trials with other numbers of virtual tokens, or without any, cannot share a pass")
        return cast(list[Virtual], first)

    def _shares(self, found: "Sequence[Virtual]", given: Mapping[str, Any]) -> list["Share"]:
        """Rows of each; they may be multiplied (beams)."""
        rows = next(v for k in ("input_ids", "inputs_embeds") if (v := given.get(k)) is not None).shape[0]
        total = sum(part.rows for part in self.hooks.slices)
        if rows % total or self.hooks.slices[0].tokens is not None:
            raise NotPackable(f"a stack sees {rows} rows where {total} were fed")
        return [Share(one, part.rows * rows // total) for one, part in zip(found, self.hooks.slices, strict=True)]


@dataclass(frozen=True)
class Share:
    """A trial's virtual tokens, and how many rows of the stacked batch have them."""

    tokens: "Virtual"
    rows: int


class Virtual(nn.Module):
    """The virtual tokens of one trial at one stack of the base: ``size`` of them."""

    hook: ClassVar[type[Hook]] = VirtualHook
    size: int

    def forward(self) -> Tensor:
        """What PEFT calls the prompt embeddings, (size, features)."""
        raise NotImplementedError

    @staticmethod
    def enter(stack: nn.Module, named: dict[str, Any], shares: Sequence[Share]) -> dict[str, Any]:
        """What ``stack`` is called with in place of ``named``."""
        raise NotImplementedError

    def leave(self, stack: nn.Module, named: Mapping[str, Any], out: Any) -> Any:
        """What the rest of the model sees of ``out``."""
        return out


def by_name(stack: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by their names."""
    return {**dict(zip(inspect.signature(stack.forward).parameters, args, strict=False)), **named}


def widened(mask: Tensor | None, size: int) -> Tensor | None:
    """A mask (rows, T) with ``size`` columns in front that are attended to."""
    return None if mask is None else torch.cat([mask.new_full((len(mask), size), BLANK), mask], 1)


def stack_of(spec: AdapterSpec, model: Any) -> nn.Module:
    """The decoder of an encoder-decoder, else the model without its head: of OPT and of BART's decoder alone the part
    that both its classes call. Raises ConfigError where it is no part of its own."""
    if model.config.is_encoder_decoder:
        return cast(nn.Module, model.get_decoder())
    base: Any = model.base_model if model.base_model is not model else model.get_decoder()
    if base is model:
        raise refuse(spec, model, "is no stack of layers below a head")
    return cast(nn.Module, getattr(base, "decoder", base))


def name_of(model: nn.Module, part: nn.Module) -> str:
    """The name of ``part`` in ``model``."""
    found: str = next(name for name, module in model.named_modules() if module is part)
    return found


def takes(stack: nn.Module, argument: str) -> bool:
    """Whether ``stack`` can be called with ``argument``."""
    return argument in inspect.signature(stack.forward).parameters


def refuse(spec: AdapterSpec, model: nn.Module, why: str) -> ConfigError:
    """An error that says what the base lacks."""
    config: Any = model.config
    return ConfigError(
        f"adapter={spec.method}: {type(model).__name__} (model_type={config.model_type}) {why}; valid: another base, "
        "or an adapter that acts on its layers (lora)"
    )


def name_unlike_peft(spec: AdapterSpec, model: nn.Module) -> None:
    """Warns of bases on which PEFT itself does not compute with virtual tokens."""
    config: Any = model.config
    coded = config.is_encoder_decoder and peft.task_type(model) == "SEQ_CLS"
    if coded or config.model_type == "gpt_bigcode":
        log.warning(
            "adapter=%s: PEFT cannot compute with virtual tokens before %s; the files hold them, and loralab loads "
            "them",
            *(spec.method, type(model).__name__),
        )


class VirtualAdapter(Adapter):
    """Virtual tokens and new heads; on disk they are PEFT's, which computes the same logits from them."""

    @property
    def virtual(self) -> tuple[str, Virtual]:
        """(name of the stack they stand before, the virtual tokens)."""
        return next((name, one) for name, one in self.adapted() if isinstance(one, Virtual))

    def embeddings(self) -> Tensor:
        """PEFT's tensor."""
        return cast(Tensor, self.virtual[1]())

    def peft_fields(self) -> dict[str, Any]:
        """What adapter_config.json holds of the method itself."""
        raise NotImplementedError

    def take(self, embeddings: Tensor) -> None:
        """Takes up what ``embeddings`` gave."""
        raise NotImplementedError

    def export(self, folder: Path) -> None:
        peft.write(folder, self._config(), self._state())

    def restore(self, folder: Path) -> None:
        stored, own = read_state(folder / WEIGHTS), self._state()
        wrong = sorted(set(stored) ^ set(own)) or [key for key in own if stored[key].shape != own[key].shape]
        if wrong:
            raise ArtifactError(f"{folder / WEIGHTS} and {type(self._model[0]).__name__} do not agree in {wrong[0]}")
        with torch.no_grad():
            self.take(stored[KEY])
        for name, module in self.saved_modules():
            module.load_state_dict({key: stored[head_key(name, key)] for key in module.state_dict()})

    def _config(self) -> dict[str, Any]:
        saved = [name for name, _ in self.saved_modules()]
        return {**self.peft_fields(), **peft.base_fields(self._model[0]), "modules_to_save": saved or None}

    def _state(self) -> dict[str, Tensor]:
        """PEFT's names for what was trained; and for the base's own head, which it looks for in every classifier's
        adapter."""
        heads = {**self._frozen_heads(), **dict(self.saved_modules())}
        parts = {head_key(name, key): value for name, head in heads.items() for key, value in head.state_dict().items()}
        return {KEY: self.embeddings(), **parts}

    def _frozen_heads(self) -> dict[str, nn.Module]:
        model, trained = self._model[0], [name for name, _ in self.saved_modules()]
        if peft.task_type(model) != "SEQ_CLS":
            return {}
        found = {name: head for name, head in model.named_modules() if name.endswith(peft.HEADS)}
        return {name: head for name, head in found.items() if not within(name, trained)}


def head_key(name: str, key: str) -> str:
    """PEFT's name of a tensor of a module that is trained whole beside virtual tokens."""
    return f"base_model.{name}.{key}"
