"""``model.compile``: the blocks of the base are compiled behind the first pass of a fit.

That pass is looked into (which layers are called, how rows may be computed) and is not compiled, nor are validations,
where an adapter's function has no gradients and could not be in a graph, and the generation behind the last step.
"""

from contextlib import ExitStack
from dataclasses import fields
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from loralab.errors import ConfigError
from loralab.forward.compiled import NONE, blocks, eager, switch_off, switch_on
from loralab.forward.dropout import base_dropout, own_dropout


def compiling(how: str) -> list[Callback]:
    """The callbacks of ``model.compile``; empty for none."""
    return [] if how == "none" else [CompileBlocks(how)]


class CompileBlocks(Callback):
    """Raises ConfigError where masks are drawn in a block, or where the base is no stack of blocks."""

    pack_aware = True

    def __init__(self, how: str) -> None:
        self.how, self._on = how, False
        self._validation = ExitStack()  # within it blocks are their own

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        blocks(module.model)
        drawn = [
            ("the base", max(base_dropout(module.model), own_dropout(module.model.config)), "model.dropout=0, or ")
        ]
        drawn += [
            (f"adapter={trial.spec.adapter.method}", base_dropout(trial.adapter), _without_dropout(trial.spec.adapter))
            for trial in module.trials
        ]
        for whose, share, remedy in drawn:
            if share > 0:
                raise ConfigError(
                    f"model.compile={self.how}: the dropout of {whose} ({share:g}) draws its masks from a key of its "
                    f"own at each step, which one graph cannot hold; valid: {remedy}{NONE.removeprefix('valid: ')}"
                )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.how == "graphs":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._on:
            module: Any = pl_module
            switch_on(module.model, self.how)
            self._on = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        if self._on:
            self._validation.enter_context(eager(blocks(module.model)))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation.close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._off(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._off(pl_module)

    def _off(self, pl_module: Any) -> None:
        self._validation.close()
        switch_off(pl_module.model)
        self._on = False


def _without_dropout(adapter: Any) -> str:
    """What takes an adapter's dropout away, in the words of its own fields; empty where none is named so."""
    names = [field.name for field in fields(adapter) if field.name.endswith("dropout")]
    return "".join(f"adapter.{name}=0, or " for name in names)
