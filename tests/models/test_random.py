"""Random bases: the same on every machine unless they are drawn on the device, where everything else is done anyway."""

import pytest
import torch

from loralab.errors import ConfigError
from loralab.models import loading
from loralab.quantization.four_bit import FourBit
from loralab.quantization.none import NoQuantization


def built(spec, quantizer, device):
    return spec.weights(spec.prepared_config(None), quantizer, "auto", device)


def values(model):
    return [tensor.clone() for _, tensor in loading.tensors(model)]


@pytest.mark.parametrize("drawn_on", ["cpu", "device"])
def test_layers_are_packed_where_the_run_is_and_the_model_stays_there(make_model, monkeypatch, drawn_on):
    seen = []
    monkeypatch.setattr(FourBit, "convert", lambda _, layer, name: (seen.append(layer.weight.device.type), layer)[1])
    model = built(make_model(drawn_on=drawn_on), FourBit(), "meta")
    assert set(seen) == {"meta"}
    assert {tensor.device.type for _, tensor in loading.tensors(model)} == {"meta"}


@pytest.mark.parametrize(("drawn_on", "drawn"), [("cpu", "cpu"), ("device", "meta")])
def test_values_are_drawn_where_the_specification_says(make_model, monkeypatch, drawn_on, drawn):
    where, real = set(), torch.Tensor.normal_
    monkeypatch.setattr(
        torch.Tensor, "normal_", lambda self, *a, **k: (where.add(self.device.type), real(self, *a, **k))[1]
    )
    built(make_model(drawn_on=drawn_on), NoQuantization(), "meta")
    assert where == {drawn}


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_on_a_cpu_both_are_the_same_bits(make_model, family):
    for quantizer in (NoQuantization(), FourBit(double_quant=True)):
        here, there = (values(built(make_model(family, drawn_on=on), quantizer, "cpu")) for on in ("cpu", "device"))
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_drawing_disturbs_no_other_random_numbers(make_model):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    built(make_model(), NoQuantization(), "cpu")
    assert torch.equal(torch.rand(4), expected)


def test_another_place_is_refused_by_name(make_model):
    with pytest.raises(ConfigError, match="model.drawn_on='gpu'"):
        make_model(drawn_on="gpu")
