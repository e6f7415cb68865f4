"""Codes used, their entropy, merged weights and the price of an outlier, against counts made with numpy."""

import numpy as np
import pytest
import torch
from torch import nn

from loralab.analysis.code_use import CodeUse, outlier_damage
from loralab.quantization.base import dense_weight
from loralab.quantization.four_bit import FourBit
from loralab.quantization.int8 import Int8Absmax, Int8ZeroPoint
from loralab.quantization.int8_blockwise import Int8Blockwise
from loralab.quantization.microscaling import Microscaled
from loralab.quantization.none import NoQuantization

SCHEMES = [
    *(Int8Absmax(granularity="tensor"), Int8Absmax(), Int8ZeroPoint(), Int8Blockwise(block_size=64)),
    *(FourBit(), FourBit(quant_type="fp4"), FourBit(quant_type="e2m1"), FourBit(quant_type="int4")),
    *(FourBit(quant_storage="float32"), Microscaled(format="mxfp4"), Microscaled()),
]


def layer_of(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    return layer


def drawn(out=64, width=128):
    return torch.randn(out, width, generator=torch.Generator().manual_seed(0))


def used(quantizer, weight):
    use = CodeUse()
    use.add(weight, quantizer.convert(layer_of(weight)))
    return use.summary()


@pytest.mark.parametrize("quantizer", SCHEMES, ids=lambda one: f"{one.name}-{getattr(one, 'quant_storage', '')}")
def test_levels_ascend_with_the_values_they_stand_for(quantizer):
    """Of one scale: the first row's first block."""
    layer = quantizer.convert(layer_of(drawn()))
    places, count = layer.levels()
    values, places = dense_weight(layer)[0, :16].numpy(), places.view(64, 128)[0, :16].numpy()
    order = np.argsort(places, kind="stable")
    assert (np.diff(values[order]) >= 0).all()
    assert places.min() >= 0
    assert places.max() < count


@pytest.mark.parametrize("quantizer", SCHEMES, ids=lambda one: f"{one.name}-{getattr(one, 'quant_storage', '')}")
def test_the_counts_are_numpys(quantizer):
    weight = drawn()
    found = used(quantizer, weight)
    layer = quantizer.convert(layer_of(weight))
    places = layer.levels()[0].numpy()
    counts = np.bincount(places, minlength=found["codes"])
    share = counts[counts > 0] / counts.sum()
    assert found["code_histogram"] == counts.tolist()
    assert found["codes_used"] == len(set(places.tolist()))
    assert found["code_entropy_bits"] == pytest.approx(-(share * np.log2(share)).sum(), rel=1e-12)
    pairs = set(zip(weight.flatten().tolist(), dense_weight(layer).flatten().tolist(), strict=True))
    assert found["merged_share"] == 1 - len({after for _, after in pairs}) / len(pairs)


def test_nf4_uses_its_codes_more_evenly_than_int4_and_int8_leaves_many_unused():
    """What QLoRA (section 3) claims for normal weights: each bin of NF4 holds about as many."""
    weight = drawn(512, 512)
    nf4, int4 = used(FourBit(), weight), used(FourBit(quant_type="int4"), weight)
    assert (nf4["codes"], nf4["codes_used"], int4["codes"]) == (16, 16, 15)
    assert nf4["code_entropy_bits"] > 3.8 > int4["code_entropy_bits"]
    spoilt = weight.clone()
    spoilt[0, 0] = 500.0
    tensor = used(Int8Absmax(granularity="tensor"), spoilt)
    assert tensor["codes_used"] < 10  # four deviations are two of 127 steps
    assert tensor["merged_share"] > 0.99


def test_the_largest_weight_costs_its_own_block_row_or_tensor():
    weight = drawn()
    weight[3, 70] = 40.0
    damage = {
        granularity: outlier_damage(Int8Absmax(granularity=granularity, block_size=64), "w", layer_of(weight))
        for granularity in ("tensor", "row", "block")
    }
    assert damage["block"]["weights"] <= 63 < damage["row"]["weights"] <= 127 < damage["tensor"]["weights"]
    for found in damage.values():
        assert (found["layer"], found["value"]) == ("w", 40.0)
        assert found["relative_rmse"] > 5 * found["relative_rmse_without"]
    row = weight[3].double().numpy()
    rest = np.delete(row, 70)
    codes = np.round(rest / (40.0 / 127)) * (40.0 / 127)
    assert damage["row"]["relative_rmse"] == pytest.approx(
        np.linalg.norm(codes - rest) / np.linalg.norm(rest), rel=0.02
    )


def test_weights_of_few_values_lose_none_of_them():
    """Two values of a row are two codes, whatever the row's scale."""
    weight = torch.where(drawn() > 0, 1.0, -1.0) * (1 + torch.arange(64.0))[:, None]
    assert used(Int8Absmax(), weight)["merged_share"] == 0


def test_a_dense_layer_has_no_codes_and_no_damage():
    assert used(NoQuantization(), drawn()) == {}
    assert outlier_damage(NoQuantization(), "w", layer_of(drawn())) is None
