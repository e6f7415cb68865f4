"""VeRA: its formula in plain arithmetic, what is shared, what trains, and what the files hold."""

import math

import pytest
import torch

from loralab.adapters.attached import attached
from loralab.adapters.export import load, save
from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.adapters.vera import SharedMatrices, VeRA, VeRADelta
from loralab.quantization.base import dense_weight, linear_shape

FAMILY = "llama"  # 2 blocks of 7 linear layers


def deltas(adapter):
    return [delta for _, delta in adapter.adapted()]


def moved(adapter):
    for delta in deltas(adapter):
        delta.vera_lambda_d.data.normal_()
        delta.vera_lambda_b.data.normal_()
    return adapter


def test_a_layer_computes_the_papers_formula():
    delta = VeRADelta(SharedMatrices((5, 7), r=3))
    delta.shared.draw(0)
    d, b = torch.randn(3), torch.randn(5)
    delta.vera_lambda_d.data.copy_(d)
    delta.vera_lambda_b.data.copy_(b)
    x, y = torch.randn(2, 4, 7), torch.randn(2, 4, 5)
    product = torch.diag(b) @ delta.shared.vera_B @ torch.diag(d) @ delta.shared.vera_A
    torch.testing.assert_close(delta(x, y, None), y + x @ product.T)
    torch.testing.assert_close(delta.delta_weight(), product)


def test_its_gradients_are_those_of_the_written_out_formula():
    delta = VeRADelta(SharedMatrices((5, 7), r=3)).double()
    delta.shared.draw(0)
    x, weight = torch.randn(4, 7).double(), torch.randn(4, 5).double()
    d = torch.randn(3).double().requires_grad_()
    b = torch.randn(5).double().requires_grad_()
    delta.vera_lambda_d.data.copy_(d.detach())
    delta.vera_lambda_b.data.copy_(b.detach())
    (delta(x, torch.zeros(4, 5).double(), None) * weight).sum().backward()
    product = torch.diag(b) @ delta.shared.vera_B @ torch.diag(d) @ delta.shared.vera_A
    ((x @ product.T) * weight).sum().backward()
    torch.testing.assert_close(delta.vera_lambda_d.grad, d.grad)
    torch.testing.assert_close(delta.vera_lambda_b.grad, b.grad)


@pytest.mark.parametrize("scheme", ["none", "nf4"])
def test_a_layer_of_the_base_computes_with_the_moved_weight(load_base, scheme):
    model = load_base(FAMILY, scheme).model
    adapter = moved(attached(VeRA(r=4), model))
    name, delta = next(adapter.adapted())
    layer = model.get_submodule(name)
    x = torch.randn(2, 3, layer.in_features)
    with torch.no_grad(), AdapterHooks.of(model).batch(BatchSlice(adapter, 2)):
        found = layer(x)
    expected = x @ (dense_weight(layer) + delta.delta_weight().detach()).T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_only_d_and_b_train_and_they_start_at_a_tenth_and_at_zero(load_base):
    model = load_base(FAMILY).model
    adapter = attached(VeRA(r=4), model)
    outs = [linear_shape(model.get_submodule(name))[0] for name, _ in adapter.adapted()]
    assert adapter.trainable_parameters() == sum(4 + out for out in outs)
    for delta in deltas(adapter):
        assert torch.equal(delta.vera_lambda_d, torch.full((4,), 0.1))
        assert not delta.vera_lambda_b.any()


def test_layers_of_one_shape_share_their_matrices_and_others_do_not(load_base):
    model = load_base(FAMILY).model
    shared = {}
    for name, delta in attached(VeRA(r=4), model).adapted():
        shared.setdefault(linear_shape(model.get_submodule(name)), set()).add(delta.shared)
    assert len(shared) > 1
    assert all(len(own) == 1 for own in shared.values())
    assert len(set().union(*shared.values())) == len(shared)


def test_the_matrices_come_from_the_seed_and_the_shape_whatever_else_is_adapted(load_base):
    model = load_base(FAMILY).model

    def first(seed, targets):
        return dict(attached(VeRA(r=4, target_modules=targets), model, seed).adapted())["model.layers.0.mlp.up_proj"]

    one, alone, other = first(1, "all-linear"), first(1, ["up_proj"]), first(2, ["up_proj"])
    assert torch.equal(one.shared.vera_A, alone.shared.vera_A)
    assert torch.equal(one.shared.vera_B, alone.shared.vera_B)
    assert not torch.equal(one.shared.vera_A, other.shared.vera_A)
    assert not torch.equal(one.shared.vera_B, other.shared.vera_B)


def test_the_draw_is_kaimings():
    shared = SharedMatrices((300, 200), r=100)
    shared.draw(0)
    for matrix, columns in ((shared.vera_A, 200), (shared.vera_B, 100)):
        assert matrix.abs().max() <= math.sqrt(6 / columns)
        assert float(matrix.std()) == pytest.approx(math.sqrt(2 / columns), rel=0.02)


def test_the_files_hold_the_vectors_and_no_matrix_and_bring_their_seed(load_base, tmp_path):
    model = load_base(FAMILY).model
    adapter = moved(attached(VeRA(r=4), model, seed=3))
    assert {value.dim() for value in adapter.state_dict().values()} == {0, 1}
    save(adapter, tmp_path / "adapter", seed=3)
    again = load(tmp_path / "adapter", load_base(FAMILY).model)
    for one, other in zip(deltas(adapter), deltas(again), strict=True):
        assert torch.equal(one.delta_weight(), other.delta_weight())
