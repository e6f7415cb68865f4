"""One class of each kind of your own: an adapter, a quantizer, a data set, a metric and a callback.

Nothing is registered. A yaml of conf/ names the class (``_target_: lab.Scaled``), and its other keys are the class's
fields: ``adapter=scaled adapter.target_modules=[q_proj]``. An edit of this file makes the trials that used one of its
classes stale, and the next call of the sweep runs them again.
"""

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import Metric

from loralab.adapters.base import Adapter, AdapterSpec, freeze, match_targets
from loralab.data.base import DataSpec, Row, Splits, make_splits
from loralab.quantization.base import Quantizer, linear_shape
from loralab.quantization.linear import FrozenLinear

# An adapter: the spec holds the settings, ``attach`` hooks its modules onto the frozen base.


@dataclass(frozen=True)
class Scaled(AdapterSpec):
    """y = (1 + s) * W x, with one trained s for each output feature."""

    target_modules: Any = field(default_factory=lambda: ["q_proj", "v_proj"])  # PEFT's: a list, a regex, all-linear

    # Promises, each false where a class does not make it. Without them its trials run one by one.
    packable = True  # several trials may share a pass through the base
    tokenwise = True  # what it does at a token depends on that token alone
    layerwise = True  # it only changes what single layers give

    def attach(self, model: nn.Module, seed: int = 0) -> Adapter:
        freeze(model)
        adapter = Adapter(model, self)
        for name in match_targets(model, self.target_modules):
            out_features, _ = linear_shape(model.get_submodule(name))
            adapter.add(name, Scale(out_features))
        return adapter.to(next(model.parameters()).device)


class Scale(nn.Module):
    """What is done at one layer. Its parameters are float32 and train; what is fixed would be a buffer."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.zeros(out_features))  # zeros: training starts at the base

    def forward(self, x: Tensor, y: Tensor, key: int | None) -> Tensor:
        """x (..., in) went into the layer, y (..., out) came out; ``key`` is for dropout."""
        return y + y * self.s.to(y.dtype)  # the base may compute in half precision

    def merged(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """The layer's weight (out, in) and bias with the scale in them, for ``loralab merge``. Optional."""
        return {name: ((1 + self.s) * value.T).T for name, value in own.items()}


# A quantizer: ``pack`` turns the weight of one dense layer into a frozen layer.


@dataclass(frozen=True)
class Uniform(Quantizer):
    """W = codes * absmax / levels: evenly spaced codes, one absmax for each row (output feature)."""

    bits: int = 4

    packable = True  # a row of the batch does not depend on the others

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}; valid: 2 to 8")

    @property
    def name(self) -> str:
        return f"uniform{self.bits}"

    def storage_bits(self, out_features: int, in_features: int) -> int:
        """Of the codes as they lie in memory (int8), and of an absmax in float32 for each row."""
        return 8 * out_features * in_features + 32 * out_features

    def pack(self, weight: Tensor, bias: nn.Parameter | None) -> FrozenLinear:
        return UniformLinear(weight, bias, self)


class UniformLinear(FrozenLinear):
    codes: Tensor  # (out, in) int8
    absmax: Tensor  # (out, 1) float32

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, spec: Uniform) -> None:
        super().__init__(weight, bias, spec.compute_dtype, spec.dequantize)
        self.scheme, self.top = spec.name, 2 ** (spec.bits - 1) - 1
        absmax = weight.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
        codes = torch.round(weight.float() / absmax * self.top).to(torch.int8)
        self.keep(codes=codes, absmax=absmax)  # counted in bits_per_parameter, moved to the GPU

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight, dequantized for each use."""
        weight: Tensor = self.codes.float() * (self.absmax / self.top)
        return weight.to(dtype)


# A data set: ``splits`` returns rows of text. Tokenizing, masking of the prompt and batches are loralab's.


@dataclass(frozen=True)
class Sums(DataSpec):
    """``17+25=`` -> ``42``: the loss is on the answer alone."""

    digits: int = 2
    rows: int = 256  # of the training split; a quarter as many validate

    def splits(self) -> Splits:
        drawn = random.Random(f"sums of {self.digits} digits")  # the same rows in every trial, whatever its seed
        pairs = [
            (drawn.randrange(10**self.digits), drawn.randrange(10**self.digits)) for _ in range(self.rows * 5 // 4)
        ]
        every = [Row(prompt=f"{a}+{b}=", target=str(a + b)) for a, b in pairs]
        return make_splits("sums", {"train": every[: self.rows], "validation": every[self.rows :]}, limit=self.limit)


# A metric: any torchmetrics class of one value. It is given predicted and true token ids of a language model.


class TokenError(Metric):
    """The share of target tokens that are not the likeliest: val/token_error."""

    higher_is_better = False
    wrong: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("wrong", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        self.wrong += (preds != target).sum()
        self.count += target.numel()

    def compute(self) -> Tensor:
        return self.wrong / self.count


# A callback: any Lightning callback. One that knows that several trials may train at once says pack_aware.


class AdapterNorm(Callback):
    """Writes ``own/adapter_norm``, the norm of all that a trial trains, into its metrics.jsonl and to W&B."""

    pack_aware = True

    def __init__(self, every_n_steps: int = 5) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % self.every_n_steps:
            return
        trials: Any = pl_module.trials
        for trial in trials:
            with torch.no_grad():
                norm = torch.stack([parameter.norm() for parameter in trial.adapter.parameters()]).norm()
            trial.log({"own/adapter_norm": float(norm)})
