"""Checks on the first batch: does the base mix rows, and are there adapted layers that nothing trains?

A pack's first batch is computed packed and alone. Most adapters start as the base, so they are perturbed for that:
else the base would be compared with itself.
"""

import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from loralab.adapters.hooks import NotPackable
from loralab.adapters.perturbed import moderate, perturbed
from loralab.errors import ConfigError
from loralab.forward.dropout import base_dropout, why_alone
from loralab.forward.stacked import in_tf32
from loralab.training import unchanged
from loralab.training.passes import padded_alike
from loralab.training.trial import Trial

log = logging.getLogger(__name__)

NAMED = 5  # layers or parameters that a message names at most


class FirstBatch(Callback):
    """Raises NotPackable where a trial's loss depends on the rows of the others, ConfigError where none would train."""

    pack_aware = True

    def __init__(self, unmixed: set[str] | None = None) -> None:
        """``unmixed``: ids of the trials that were checked on this base, in an earlier pack whose trials go on; those
        of this pack are added."""
        self._unmixed = set() if unmixed is None else unmixed
        self._passed = self._stepped = False
        self._before: dict[str, Tensor] = {}  # the base's bits until the first step is over

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        trials = module.trials
        self._before = _base_bits(module)
        if len(trials) < 2 or any(trial.record["pack"].get("halved") for trial in trials):
            return
        config: Any = module.model.config
        if why := why_alone(config, config._attn_implementation):
            raise NotPackable(why)
        ids = {trial.spec.id for trial in trials if trial.alive}
        if ids <= self._unmixed:
            return
        batches = padded_alike(
            {i: trial.next_batch() for i, trial in enumerate(trials) if trial.alive},
            *(trials[0].pad_token_id, module.device, module.room),
        )
        device = module.device
        forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        with torch.no_grad(), forked, trainer.precision_plugin.train_step_context():
            packed, alone = _packed_and_alone(module, batches)
        allowed = tolerance([str(trainer.precision)], module.model)
        for index, loss in alone.items():
            if abs(packed[index] - loss) > allowed * abs(loss):  # False where both are not finite
                dropout = " or calls dropout by itself (model.dropout=0 switches it off)"
                raise NotPackable(
                    f"the base mixes rows{dropout if base_dropout(module.model) else ''}: the first batch of trial "
                    f"{trials[index].spec.id} has a loss of {packed[index]:.6g} beside the others and {loss:.6g} alone"
                )
        self._unmixed |= ids

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """After the first pass: warns of layers that it did not call. A trial whose layers are all uncalled fails."""
        if self._passed:
            return
        self._passed = True
        module: Any = pl_module
        alive = [trial for trial in module.trials if trial.alive]
        for trial in alive:
            _name_uncalled(trial, type(module.model).__name__)
        failed = [trial.failure for trial in alive if trial.failure is not None]
        if failed and len(failed) == len(alive):
            raise failed[0]
        if not loss.requires_grad:
            raise _untrained(alive[0])

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """After the first backward pass: warns of parameters without a gradient. A trial without any gradient fails."""
        if self._stepped:
            return
        self._stepped = True
        module: Any = pl_module
        for trial in module.trials:
            if trial.alive:
                _name_unreached(trial)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """After the first step: raises ConfigError where the base is not what it was."""
        if not self._before or not self._stepped:
            return
        before, self._before = self._before, {}
        if names := unchanged.changed(before, _base_bits(pl_module)):
            raise ConfigError(
                f"the first step changed {len(names)} tensors of the frozen base ({_some(names)}), which other trials "
                "share and no adapter file holds; valid: a base, an adapter and callbacks that leave them as they are"
            )


def _packed_and_alone(module: Any, batches: Mapping[int, Any]) -> tuple[dict[int, float], dict[int, float]]:
    """{trial: loss} of one pass of all trials, and of one pass of each alone; all adapters perturbed."""

    def losses(some: Mapping[int, Any]) -> dict[int, float]:
        return {index: float(loss_sum) for index, (loss_sum, _, _) in module.losses(some, training=True).items()}

    start, scales, alone = losses(batches), {}, {}
    adapters = {index: module.trials[index].adapter for index in batches}
    for index in batches:  # the other adapters are not perturbed, so they cannot change this trial's rows

        def loss(i: int = index) -> float:
            return losses({i: batches[i]})[i]

        scales[index], alone[index] = moderate(adapters[index], start[index], loss)
    with ExitStack() as stack:
        for index, adapter in adapters.items():
            stack.enter_context(perturbed(adapter, scales[index]))
        return losses(batches), alone


def _name_uncalled(trial: Trial, model: str) -> None:
    uncalled, layers = trial.adapter.never_called(), trial.adapter.layers()
    if not uncalled:
        return
    method, names = trial.adapter.spec.method, _some(uncalled)
    if len(uncalled) == len(layers):
        trial.fail(
            ConfigError(
                f"adapter={method}: {model} calls none of the {len(uncalled)} layers it adapts ({names}), since it"
                " reads their weights itself, so nothing would train; valid: layers that are called, by "
                "adapter.target_modules"
            )
        )
        return
    log.warning(
        "%s: the first pass called %d of the %d adapted layers not at all, and nothing trains them unless a later one "
        "does: %s",
        *(trial.spec.id, len(uncalled), len(layers), names),
    )


def _base_bits(module: Any) -> dict[str, Tensor]:
    return unchanged.bits(module.model, {id(parameter) for parameter in module.adapters.parameters()})


def _name_unreached(trial: Trial) -> None:
    uncalled = tuple(
        f"{part}.{name.replace('.', '/')}." for name in trial.adapter.never_called() for part in ("deltas", "saved")
    )
    parameters = dict(trial.adapter.named_parameters())
    without = [name for name, parameter in parameters.items() if parameter.grad is None]
    if len(without) == len(parameters):
        trial.fail(_untrained(trial))
        return
    names = [name for name in without if not name.startswith(uncalled)]
    if names and trial.spec.model.gradient_checkpointing:
        trial.fail(
            ConfigError(
                f"model.gradient_checkpointing=true: no gradient reached {len(names)} of the adapter's "
                f"{len(parameters)} parameters in the first step, though their layers were called ({_some(names)}): "
                "the base recomputes them outside of the graph; valid: model.gradient_checkpointing=false"
            )
        )
    elif names:
        log.warning(
            "%s: no gradient reached %d of the adapter's %d parameters in the first step, and nothing trains them "
            "unless a later one does: %s",
            *(trial.spec.id, len(names), len(parameters), _some(names)),
        )


def _untrained(trial: Trial) -> ConfigError:
    return ConfigError(
        f"adapter={trial.adapter.spec.method}: the loss depends on none of its "
        f"{sum(1 for _ in trial.adapter.parameters())} parameters, so nothing would train; valid: an adapter whose "
        "parameters change what a layer that is called gives"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def tolerance(precisions: Iterable[str], model: torch.nn.Module) -> float:
    """Relative difference that the order of a product's sums may make.

    float32: 1e-4 (its epsilon is 1e-7, and 1e-6 to 1e-5 is usual where a larger batch takes another kernel). Shorter
    types: 2.5 epsilons, 2e-2 for bf16, where packs were seen to differ by 2e-3; a base that mixes rows is off by more.
    """
    names = {"bf16": torch.bfloat16, "16": torch.float16}
    dtypes = {names[word.partition("-")[0]] for word in precisions if word.partition("-")[0] in names}
    dtypes |= {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    compute_dtypes = {getattr(layer, "compute_dtype", None) for layer in model.modules()}
    dtypes |= {getattr(torch, name) for name in compute_dtypes if name in ("bfloat16", "float16")}
    if in_tf32(next(model.parameters()).device.type):
        dtypes.add(torch.float16)  # the mantissa of TF32 has as many bits
    return max(1e-4, *(2.5 * torch.finfo(dtype).eps for dtype in dtypes))
