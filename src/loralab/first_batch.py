"""Before a pack's first step: its first batch packed and alone. A base that mixes rows cannot be shared."""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from loralab.adapters.sites import NotPackable
from loralab.dropout import base_dropout, why_alone
from loralab.trial import padded_alike


class FirstBatch(Callback):
    """Raises NotPackable where a trial's loss depends on the rows of the others."""

    pack_aware = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        trials = module.trials
        if len(trials) < 2 or any(trial.record["pack"].get("halved") for trial in trials):
            return
        config: Any = module.model.config
        if why := why_alone(config, config._attn_implementation):
            raise NotPackable(why)
        batches = padded_alike({i: one.peek() for i, one in enumerate(trials) if one.alive}, trials[0].pad_token_id)
        with torch.no_grad(), trainer.precision_plugin.train_step_context():
            packed = {i: float(found[0]) for i, found in module.losses(batches, training=True).items()}
            alone = {i: float(module.losses({i: own}, training=True)[i][0]) for i, own in batches.items()}
        allowed = tolerance([str(trainer.precision)], module.model)
        for index, loss in alone.items():
            if abs(packed[index] - loss) > allowed * abs(loss):  # False where both are not finite
                drawn = (
                    " or calls dropout by itself (model.dropout=0 switches it off)"
                    if base_dropout(module.model)
                    else ""
                )
                raise NotPackable(
                    f"the base mixes rows{drawn}: the first batch of trial {trials[index].settings.id} has a loss of "
                    f"{packed[index]:.6g} beside the others and {loss:.6g} alone"
                )


def tolerance(precisions: Iterable[str], model: torch.nn.Module) -> float:
    """Relative difference that the order of a product's sums may make.

    float32: 1e-4 (its epsilon is 1e-7, and 1e-6 to 1e-5 is usual where a larger batch takes another kernel). Shorter
    types: 2.5 epsilons, 2e-2 for bf16, where packs were seen to differ by 2e-3; a base that mixes rows is off by more.
    """
    names = {"bf16": torch.bfloat16, "16": torch.float16}
    kinds = {names[word.partition("-")[0]] for word in precisions if word.partition("-")[0] in names}
    kinds |= {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    named = {getattr(layer, "compute_dtype", None) for layer in model.modules()}
    kinds |= {getattr(torch, name) for name in named if name in ("bfloat16", "float16")}
    return max(1e-4, *(2.5 * torch.finfo(kind).eps for kind in kinds))
