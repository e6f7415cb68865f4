"""Every yaml of conf/quantization gives a frozen layer that is what it says. A new one is found by itself."""

import pytest
import torch
from torch import nn

from loralab.config.build import build
from loralab.config.compose import compose, plain
from loralab.config.places import data_root
from loralab.models import loading
from loralab.quantization.base import dense_weight, is_frozen, measure
from loralab.quantization.linear import FrozenLinear

CONF = data_root() / "conf" / "quantization"
YAMLS = sorted(str(path.relative_to(CONF).with_suffix("")) for path in CONF.rglob("*.yaml"))
OUT, IN = 96, 128


@pytest.fixture(params=YAMLS, scope="module")
def spec(request):
    return build(plain(compose([f"quantization={request.param}"]))["quantization"], "quantization")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(spec):
    dense = nn.Linear(IN, OUT)
    dense.weight.data, dense.bias.data = drawn(OUT, IN), drawn(OUT, seed=1)
    return spec.convert(dense)


def inputs(rows=6):
    """Without outliers, by which some schemes treat columns otherwise."""
    return drawn(rows, IN, seed=2).clamp(-3, 3)


def test_every_yaml_is_found():
    assert {"none", "nf4", "nf4_double", "int8_absmax", "llm_int8", "int8_product/absmax"} <= set(YAMLS)


def test_the_weight_is_the_same_each_time_and_near_the_one_it_was_made_of(spec):
    one, other = layer_of(spec), layer_of(spec)
    weight = dense_weight(one).detach()
    assert torch.equal(weight, dense_weight(other))
    assert torch.equal(weight, dense_weight(one))
    assert weight.shape == (OUT, IN)
    assert float((weight - drawn(OUT, IN)).norm() / drawn(OUT, IN).norm()) < 0.3  # fp4_e3m0, the coarsest: 0.2


def test_forward_is_the_product_with_that_weight_and_the_gradient_goes_through_it(spec):
    layer, x = layer_of(spec), inputs().requires_grad_()
    y = layer(x)
    exact = x.detach().double() @ dense_weight(layer).detach().double().T + layer.bias.detach().double()
    weight_only = not is_frozen(layer) or type(layer).product is FrozenLinear.product
    error = float((y.detach() - exact).norm() / exact.norm())
    assert error < (1e-6 if weight_only else 0.03)  # else x has 8 bits too
    assert weight_only or error > 1e-5
    dy = drawn(6, OUT, seed=3)
    y.backward(dy)
    torch.testing.assert_close(x.grad, dy @ dense_weight(layer).detach())
    if is_frozen(layer):
        assert not any(parameter.requires_grad for name, parameter in layer.named_parameters() if name != "bias")


def test_its_bits_are_those_of_what_it_stores(spec):
    layer = layer_of(spec)
    stored = layer.packed() if is_frozen(layer) else [layer.weight]
    bits = 8 * sum(tensor.untyped_storage().nbytes() for tensor in stored)
    assert bits == spec.storage_bits(OUT, IN)
    assert measure(nn.ModuleList([layer])).bits_per_parameter == bits / (OUT * IN)


def test_a_row_depends_on_its_neighbours_exactly_where_the_scheme_is_not_packable(spec):
    layer = layer_of(spec)
    others = inputs()
    others[5, 7] = 80.0  # sets a scale, or makes its column one of outliers
    assert torch.equal(layer(others)[:5], layer(inputs())[:5]) is spec.packable


def test_a_base_loaded_twice_has_the_same_bits(spec, make_model):
    model = make_model("llama")
    tokenizer = model.load_tokenizer()
    one, other = (loading.load(model, spec, tokenizer) for _ in range(2))
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        assert torch.equal(one.model.eval()(ids).logits, other.model.eval()(ids).logits)
    assert one.size == other.size
    assert one.record()["fingerprint"] == other.record()["fingerprint"]
