"""What would train nothing, lose what it trains, or change the base in secret is refused before the first step."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from loralab.adapters.attached import attached
from loralab.adapters.base import STATED, Adapter, AdapterSpec, freeze
from loralab.adapters.biases import BiasDelta
from loralab.adapters.full import Full, FullAdapter
from loralab.adapters.lora import LoRA, LoRAAdapter, LoRADelta
from loralab.errors import ConfigError
from loralab.quantization.four_bit import FourBit
from loralab.quantization.int8 import Int8Absmax, Int8ZeroPoint
from loralab.quantization.int8_blockwise import Int8Blockwise
from loralab.quantization.llm_int8 import LLMInt8
from loralab.quantization.none import NoQuantization
from loralab.running.runner import Runner

LAYER = "model.layers.0.mlp.up_proj"


class Extra(nn.Module):
    """A delta of one parameter; ``value`` null: of none."""

    def __init__(self, value):
        super().__init__()
        if value is not None:
            self.value = value if isinstance(value, nn.Parameter) else nn.Parameter(value)

    def forward(self, x, y, key):
        return y + self.value.sum()


VALUES = {
    "none": lambda model: None,
    "empty": lambda model: torch.zeros(0, 4),
    "frozen": lambda model: nn.Parameter(torch.zeros(1), False),
    "base": lambda model: model.model.norm.weight,
    "view": lambda model: model.model.norm.weight.data[:3],
}


@dataclass(frozen=True)
class Own(AdapterSpec):
    """Trains one of VALUES at one layer."""

    value: str = "none"

    def attach(self, model, seed=0):
        freeze(model)
        adapter = Adapter(model, self)
        adapter.add(LAYER, Extra(VALUES[self.value](model)))
        return adapter


@dataclass(frozen=True)
class BitFit(AdapterSpec):
    def attach(self, model, seed=0):
        adapter = Adapter(model, self)
        for name, module in model.named_modules():
            if isinstance(getattr(module, "bias", None), nn.Parameter):
                adapter.add(name, BiasDelta(module.bias))
        return adapter


@dataclass(frozen=True)
class Strange(AdapterSpec):
    def attach(self, model, seed=0):
        return nn.Identity()


@dataclass(frozen=True)
class WithObject(BitFit):
    thing: Any = field(default_factory=object)

    def attach(self, model, seed=0):
        adapter = Adapter(model, self)
        adapter.add(LAYER, Extra(torch.zeros(1)))
        return adapter


class Remembering(Extra):
    def get_extra_state(self):
        return {"calls": 3}


@dataclass(frozen=True)
class WithState(AdapterSpec):
    def attach(self, model, seed=0):
        adapter = Adapter(model, self)
        adapter.add(LAYER, Remembering(torch.zeros(1)))
        return adapter


@dataclass(frozen=True)
class Scaled(LoRA):
    """LoRA by another name."""

    def scaling(self, name):
        return 3.0


class Halved(LoRADelta):
    def forward(self, x, y, key):
        return y + 0.5 * (super().forward(x, y, key) - y)


@dataclass(frozen=True)
class HalvedLoRA(LoRA):
    def delta(self, name, layer, device):
        return Halved(layer.in_features, layer.out_features, self.r, 1.0)


class Named(LoRAAdapter):
    """Inherits the export."""


@dataclass(frozen=True)
class Delegating(AdapterSpec):
    """LoRA's own attach, and more."""

    more: str = ""

    def attach(self, model, seed=0):
        adapter = LoRA(r=2, target_modules=["up_proj"]).attach(model, seed)
        if self.more == "delta":
            adapter.add(LAYER, Extra(torch.zeros(1)))
        if self.more == "twice":
            adapter.add(LAYER, LoRADelta(64, 128, 2, 1.0))
        if self.more == "parameter":
            adapter.gate = nn.Parameter(torch.zeros(1))
        if self.more == "subclass":
            adapter.__class__ = Named
        return adapter


@dataclass(frozen=True)
class FullAndMore(Full):
    def attach(self, model, seed=0):
        adapter = super().attach(model, seed)
        adapter.add(LAYER, Extra(torch.zeros(1)))
        return adapter


REFUSED = {
    "no parameter": (BitFit(), "adapter=bitfit would train nothing: it has no parameters on this base"),
    "a delta without one": (Own("none"), "adapter=own would train nothing"),
    "an empty one alone": (Own("empty"), "adapter=own would train nothing"),
    "a frozen one": (Own("frozen"), "takes no gradient, yet would be counted"),
    "the base's": (Own("base"), "trains model.norm.weight, a parameter of the base"),
    "a view of the base's": (Own("view"), "trains model.norm.weight"),
    "no adapter": (Strange(), "Strange.attach returned Identity; valid: an Adapter"),
    "an object among its fields": (WithObject(), "adapter.thing=<object object at .* cannot be written"),
    "state that is no tensor": (WithState(), "_extra_state of its state is no tensor"),
    "a subclass of LoRA": (Scaled(r=2), "Scaled has no export of its own, and that of LoRAAdapter would leave out"),
    "LoRA with another delta": (HalvedLoRA(r=2), "what HalvedLoRA changes in LoRA; valid: .*`makes = Adapter`"),
    "another delta beside LoRA's": (Delegating("delta"), f"would leave out Extra of {LAYER}"),
    "two deltas of LoRA": (Delegating("twice"), f"would leave out the second LoRADelta of {LAYER}"),
    "a parameter of no layer": (Delegating("parameter"), "would leave out gate"),
    "a subclass of LoRA's adapter": (Delegating("subclass"), "would leave out what Named adds to it"),
    "full with a delta": (FullAndMore(), "that of FullAdapter would leave out deltas.model/layers/0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_with_its_reason_and_leaves_no_hook(load_base, case):
    spec, says = REFUSED[case]
    model = load_base().model
    with pytest.raises(ConfigError, match=says):
        attached(spec, model)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("case", ["no parameter", "a subclass of LoRA", "LoRA with another delta"])
def test_the_refusal_comes_before_the_first_step_with_exit_code_2(make_spec, case):
    spec = make_spec(adapter=REFUSED[case][0])
    (record,) = Runner().run([spec])
    assert (record["status"], record["exit_code"]) == ("failed", 2), record["error"]
    assert not (spec.folder / "metrics.jsonl").exists()
    assert not (spec.folder / "adapter").exists()


def test_an_empty_parameter_beside_others_is_refused(load_base):
    class Two(Extra):
        def __init__(self):
            super().__init__(torch.zeros(1))
            self.empty = nn.Parameter(torch.zeros(0, 8))

    @dataclass(frozen=True)
    class Spec(AdapterSpec):
        def attach(self, model, seed=0):
            adapter = Adapter(model, self)
            adapter.add(LAYER, Two())
            return adapter

    with pytest.raises(ConfigError, match=r"empty is empty \(0, 8\)"):
        attached(Spec(), load_base().model)


def test_who_says_that_it_changes_the_base_may_train_its_parameters(load_base):
    @dataclass(frozen=True)
    class Norm(AdapterSpec):
        changes_base = True

        def attach(self, model, seed=0):
            adapter = Adapter(model, self)
            adapter.norm = model.model.norm.requires_grad_(True)
            return adapter

    adapter = attached(Norm(), load_base().model)
    assert adapter.trainable_parameters() == 64


def test_what_the_adapter_does_not_own_is_frozen_whether_it_said_so_or_not(load_base):
    model = load_base().model.requires_grad_(True)
    attached(WithObject(thing=1), model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_lora_attached_by_another_spec_is_judged_by_that_spec(load_base):
    adapter = attached(Delegating(), load_base().model)
    assert type(adapter) is LoRAAdapter
    assert (adapter.spec, adapter.lora.r) == (Delegating(), 2)
    assert not any(getattr(adapter.spec, name) for name in STATED)


@pytest.mark.parametrize("statement", STATED)
def test_a_statement_counts_for_the_class_that_makes_it(statement):
    says = type("Says", (Scaled,), {statement: True})
    heir = type("Heir", (says,), {})
    assert getattr(LoRA, statement)
    assert not getattr(Full, statement)
    assert not getattr(Own, statement)
    assert not getattr(Scaled, statement)
    assert getattr(says, statement)
    assert not getattr(heir, statement)


@pytest.mark.parametrize("kind", [FourBit, Int8Absmax, Int8ZeroPoint, Int8Blockwise, NoQuantization, LLMInt8])
def test_a_quantizer_derived_from_one_that_is_packable_is_not_so_by_itself(kind):
    made = kind(threshold=0.0) if kind is LLMInt8 else kind()
    assert made.packable
    heir = type("Heir", (kind,), {})
    assert not (heir(threshold=0.0) if kind is LLMInt8 else heir()).packable
    assert type("Sure", (kind,), {"packable": True})().packable


def test_full_is_written_by_its_own_class(load_base):
    assert type(attached(Full(), load_base().model)) is FullAdapter
