"""The adapter that CONTRIBUTING.md shows is one."""

import re
from pathlib import Path

import torch
from torch import nn

from loralab.adapters.attached import attached
from loralab.adapters.hooks import AdapterHooks, BatchSlice

PAGE = Path(__file__).parents[2] / ".github" / "CONTRIBUTING.md"
IMPORTS = """
from typing import ClassVar

import torch
from torch import Tensor, nn

from loralab.adapters.base import (
    Adapter, AdapterSpec, Saved, freeze, match_targets, modules_to_save, outside, save_modules
)
from loralab.adapters.targets import Targets
from loralab.quantization.base import linear_shape
from loralab.spec import spec
"""


def test_the_shown_adapter_trains_and_scales_each_output(load_base, inputs):
    shown = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL).group(1)
    names = {"__name__": "shown"}
    exec(IMPORTS + "\n".join(line.removeprefix("   ") for line in shown.splitlines()), names)
    model = load_base("llama").model
    adapter = attached(names["Scaled"](), model)
    with AdapterHooks.of(model).batch(BatchSlice(adapter, 2)):
        model(**inputs()).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    name, delta = next(adapter.adapted())
    nn.init.constant_(delta.s, 0.5)
    layer = model.get_submodule(name)
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(delta(x, layer(x), None), 1.5 * layer(x))
