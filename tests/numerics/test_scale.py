"""The scale of an update, beside PEFT's own."""

import peft
import pytest
import torch
from torch import nn

from loralab.numerics.scale import scale


@pytest.mark.parametrize(("r", "alpha", "rslora"), [(2, 16, False), (8, 16, False), (8, 16, True), (3, 1.5, True)])
def test_it_is_what_peft_multiplies_by(r, alpha, rslora):
    config = peft.LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora, target_modules=["0"])
    layer = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config).base_model.model[0]
    assert scale({"r": r, "lora_alpha": alpha, "use_rslora": rslora}) == pytest.approx(layer.scaling["default"])
    assert torch.is_tensor(layer.weight)


@pytest.mark.parametrize(
    "adapter",
    [
        {},
        {"r": 8},
        {"r": "8", "lora_alpha": 16},
        {"r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 4}},
        {"r": True},
    ],
)
def test_where_there_is_no_one_scale_it_is_none(adapter):
    assert scale(adapter) is None
