"""The random subspace: P against matrices written out, what is counted, and what trains."""

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard as matrix
from torch import nn

from loralab.adapters.attached import attached
from loralab.adapters.intrinsic import Intrinsic, hadamard
from loralab.errors import ConfigError
from loralab.quantization.base import dense_weight

FAMILY = "llama"  # 2 blocks of 7 linear layers


def deltas(adapter):
    return [delta for _, delta in adapter.adapted()]


def dense_projection(delta, coordinates):
    """H G Pi H B with every matrix written out, in float64, (out * in, coordinates)."""
    size = delta.signs.numel()
    signs, gauss = np.diag(delta.signs.double().numpy()), np.diag(delta.gauss.double().numpy())
    permutation = np.eye(size)[delta.permutation.numpy()]
    whole = matrix(size) @ gauss @ permutation @ matrix(size) @ signs
    count = delta.shape[0] * delta.shape[1]
    return whole[:count, :coordinates] / (np.linalg.norm(np.diag(gauss)) * np.sqrt(count))


@pytest.fixture
def small():
    """A model of two layers whose sizes are no powers of two."""
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    return model, attached(Intrinsic(dimension=7, target_modules=["0", "2"]), model)


@pytest.mark.parametrize("size", [1, 2, 16, 32, 64, 4096])
def test_the_transform_is_the_walsh_hadamard_matrix(size):
    x = torch.randn(size, dtype=torch.float64)
    np.testing.assert_allclose(hadamard(x).numpy(), matrix(size) @ x.numpy(), rtol=1e-11, atol=1e-12)


def test_the_projection_is_the_product_of_its_matrices(small):
    _, adapter = small
    theta = torch.randn(7)
    for delta in deltas(adapter):
        dense = dense_projection(delta, 7)
        np.testing.assert_allclose(delta.project(theta).flatten().numpy(), dense @ theta.numpy(), rtol=1e-4, atol=1e-6)
        gradient = torch.randn(delta.shape)
        back = dense.T @ gradient.flatten().numpy()
        np.testing.assert_allclose(delta.project_back(gradient, 7).numpy(), back, rtol=1e-4, atol=1e-6)


def test_the_columns_have_length_one_on_average(load_base):
    adapter = attached(Intrinsic(dimension=200), load_base(FAMILY).model)
    for delta in deltas(adapter):
        lengths = torch.stack([delta.project(row) for row in torch.eye(200)]).flatten(1).norm(dim=1)
        assert 0.97 < float(lengths.square().mean()) < 1.03


@pytest.mark.parametrize("scheme", ["none", "nf4"])
def test_a_layer_computes_with_the_moved_weight(load_base, scheme):
    adapter = attached(Intrinsic(dimension=50), load_base(FAMILY, scheme).model)
    adapter.theta.data.normal_()
    name, delta = next(adapter.adapted())
    layer = adapter._model[0].get_submodule(name)
    x = torch.randn(2, 3, layer.in_features)
    moved = dense_weight(layer) + delta.delta_weight()
    torch.testing.assert_close(delta(x, layer(x), None), x @ moved.T, rtol=1e-5, atol=1e-5)


def test_the_dimension_is_what_is_counted_scales_included(load_base):
    did = attached(Intrinsic(dimension=50), load_base(FAMILY).model)
    said = attached(Intrinsic(dimension=50, variant="said"), load_base(FAMILY).model)
    assert did.trainable_parameters() == said.trainable_parameters() == 50
    assert (did.theta.numel(), said.theta.numel()) == (50, 50 - 14)
    with pytest.raises(ConfigError, match=r"adapter.dimension=14.*14 adapted layers.*valid: more than 14"):
        attached(Intrinsic(dimension=14, variant="said"), load_base(FAMILY).model)


def test_the_seed_draws_the_subspace(load_base):
    base = load_base(FAMILY).model
    one, again, other = (attached(Intrinsic(dimension=50), base, seed) for seed in (1, 1, 2))
    for adapter in (one, again, other):
        adapter.theta.data.fill_(1.0)
    first, same, different = (next(iter(deltas(adapter))).delta_weight() for adapter in (one, again, other))
    assert torch.equal(first, same)
    assert not torch.allclose(first, different)


def test_more_numbers_than_weights_are_no_error(small):
    model, _ = small
    adapter = attached(Intrinsic(dimension=100, target_modules=["2"]), model)
    adapter.theta.data.normal_()
    assert next(iter(deltas(adapter))).delta_weight().shape == (3, 6)
