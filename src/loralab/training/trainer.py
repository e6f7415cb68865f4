"""The spec around Lightning's Trainer: what a run may set, checked before anything is loaded."""

import logging
import math
import warnings
from dataclasses import dataclass
from typing import Any

from loralab.errors import ConfigError, nearest

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true")
ACCELERATORS = ("auto", "cpu", "gpu")


@dataclass(frozen=True)
class TrainerSpec:
    """How long and on what. Steps are optimizer steps; ``val_check_interval`` counts them too (null: only the end)."""

    accelerator: str = "auto"
    max_steps: int = 200
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = 1.0
    precision: str = "auto"  # auto: 32-true
    val_check_interval: int | None = None
    patience: int | None = None  # validations without a better metric after which a trial ends (null: never)
    log_every_n_steps: int = 1
    test: bool = False  # score the test split too, once, at the end

    def __post_init__(self) -> None:
        if self.accelerator not in ACCELERATORS:
            raise ConfigError(
                f"trainer.accelerator={self.accelerator!r} is unknown; {nearest(self.accelerator, ACCELERATORS)}"
            )
        if self.precision not in PRECISIONS:
            raise ConfigError(f"trainer.precision={self.precision!r} is unknown; {nearest(self.precision, PRECISIONS)}")
        if self.max_steps < 0:
            raise ConfigError(
                f"trainer.max_steps must be at least 0 (0: score the base as it is), got {self.max_steps}"
            )
        for key in ("max_steps", "accumulate_grad_batches", "val_check_interval", "patience", "log_every_n_steps"):
            value = getattr(self, key)
            if value is not None and value >= 2**31:
                raise ConfigError(f"trainer.{key}={value} is beyond any run; valid: below {2**31}")
            if key == "max_steps":
                continue
            if value is not None and value < 1:
                raise ConfigError(f"trainer.{key} must be at least 1, got {value}")
        if self.patience is not None and self.val_check_interval is None:
            raise ConfigError("trainer.patience counts validations: it needs trainer.val_check_interval, which is null")
        clip = self.gradient_clip_val
        if clip is not None and not (math.isfinite(clip) and clip > 0):
            raise ConfigError(f"trainer.gradient_clip_val must be a positive number or null, got {clip}")

    @property
    def device(self) -> str:
        """cpu or cuda, as this machine has it. Raises ConfigError where a GPU is asked for and none is there."""
        import torch

        if self.accelerator == "cpu":
            return "cpu"
        if torch.cuda.is_available():
            return "cuda"
        if self.accelerator == "gpu":
            raise ConfigError("trainer=gpu, but torch sees no CUDA device; trainer=auto takes the CPU")
        return "cpu"

    def check_precision(self) -> None:
        """Raises ConfigError for 16-mixed on a CPU, where Lightning would compute in bf16 and not say so."""
        if self.precision == "16-mixed" and self.device == "cpu":
            raise ConfigError("trainer.precision=16-mixed needs a GPU; valid on a CPU: 32-true, bf16-mixed, bf16-true")

    def build(self, callbacks: list[Any], progress: bool, evaluating: bool = False) -> Any:
        """Lightning's Trainer: one epoch of numbered passes, no logger or checkpoint of its own."""
        quiet()
        from lightning.pytorch import Trainer

        from loralab.training.strategy import InPlace

        interval = self.val_check_interval
        return Trainer(
            accelerator="gpu" if self.device == "cuda" else "cpu",
            devices=1,
            strategy=InPlace("cuda:0" if self.device == "cuda" else "cpu"),
            precision="32-true" if self.precision == "auto" else self.precision,  # type: ignore[arg-type]
            max_epochs=1,
            accumulate_grad_batches=self.accumulate_grad_batches,
            val_check_interval=None if interval is None else interval * self.accumulate_grad_batches,
            check_val_every_n_epoch=None if interval is not None else 1,
            limit_val_batches=1.0 if evaluating or interval is not None else 0,
            num_sanity_val_steps=0,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=progress,
            enable_model_summary=False,
            inference_mode=False,  # weights cached in inference mode would break later training steps
            log_every_n_steps=1,
        )


def quiet() -> None:
    """Lightning's advertisements, hardware lines and loading bars say nothing about an experiment."""
    from transformers.utils.logging import disable_progress_bar

    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    disable_progress_bar()
    warnings.filterwarnings("ignore", message=r".*gradient_checkpointing_enable. is deprecated")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
