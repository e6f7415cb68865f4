"""What Lightning's and the user's own callbacks log, as rows of each trial."""

import re
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers.logger import Logger

from loralab.optim.groups import trial_of

OF_A_GROUP = re.compile(r"(lr-[^/]+)/pg(\d+)(.*)")  # LearningRateMonitor's name of one of several parameter groups


class LightningRows(Logger):
    """The Trainer's logger: ``self.log`` of a callback, and what it gives to ``trainer.logger``, becomes a row of every
    trial of the pack. The step is loralab's own, which counts from 1."""

    def __init__(self, module: Any, folder: str) -> None:
        super().__init__()
        self._module, self._folder = module, folder

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> None:
        return None

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return self._folder

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        values = {name: value for name, value in metrics.items() if name != "epoch"}  # always 0: a run is one
        if not values:
            return
        if len(self._module.trials) == 1 or not any(OF_A_GROUP.fullmatch(name) for name in values):
            self._module.report(values)
            return
        groups = trial_of(self._module.trainer.optimizers[0].param_groups)
        for index in range(len(self._module.trials)):
            self._module.report({}, {index: _of_trial(values, groups, index)})

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: the record holds the configuration."""


def _of_trial(values: Mapping[str, Any], groups: list[int], index: int) -> dict[str, Any]:
    """``values`` without those of other trials' parameter groups; its own under the names that they have alone."""
    own = [number for number, trial in enumerate(groups, 1) if trial == index]
    kept: dict[str, Any] = {}
    for name, value in values.items():
        found = OF_A_GROUP.fullmatch(name)
        if found is None:
            kept[name] = value
        elif int(found[2]) in own:
            place = f"/pg{own.index(int(found[2])) + 1}" if len(own) > 1 else ""
            kept[f"{found[1]}{place}{found[3]}"] = value
    return kept
