"""``${loralab.rank_for:N}``: an adapter's size from the number of parameters that it is to have."""

import copy
import json
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from loralab.config.build import build
from loralab.config.classes import target
from loralab.errors import ConfigError


def rank_for(budget: Any, root: DictConfig) -> int:
    """The value of ``adapter.r``, or of what else sets the size of the adapter that ``root`` chooses, with which its
    parameters are nearest to ``budget``. Raises ConfigError where none is near."""
    if type(budget) is not int or budget < 1:
        raise ConfigError(f"loralab.rank_for:{budget}: a number of parameters is needed; valid: a whole number above 0")
    settled = copy.deepcopy(root)
    adapter = OmegaConf.to_container(settled.adapter, resolve=False)
    assert isinstance(adapter, dict)
    field = target(adapter, "adapter").size_field
    with open_dict(settled):
        if field:
            settled.adapter[field] = 1  # what is asked for; other keys may refer to it
    parts = {key: OmegaConf.to_container(settled[key], resolve=True) for key in ("model", "adapter")}
    return _size(budget, json.dumps(parts, sort_keys=True))


@cache
def _size(budget: int, parts: str) -> int:
    from loralab.planning.budget import size_for

    content = json.loads(parts)
    return size_for(budget, build(content["model"], "model"), build(content["adapter"], "adapter"))
