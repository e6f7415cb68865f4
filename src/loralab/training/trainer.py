"""The settings of Lightning's Trainer that a run may choose, checked before anything is loaded."""

import logging
import warnings
from typing import Annotated, Any, Literal

from annotated_types import Le

from loralab.errors import ConfigError
from loralab.spec import Count, Natural, Positive, spec

MOST = 2**31 - 1  # of anything that is counted


@spec("trainer")
class TrainerSpec:
    """Steps, device, precision, validations. All steps are optimizer steps; ``val_check_interval`` null: at the end."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    max_steps: Annotated[Natural, Le(MOST)] = 200  # 0: the base is scored as it is
    accumulate_grad_batches: Annotated[Count, Le(MOST)] = 1
    gradient_clip_val: Positive | None = 1.0
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true"] = "auto"  # auto: 32-true
    val_check_interval: Annotated[Count, Le(MOST)] | None = None
    # validations without a better metric after which a trial ends (null: never)
    patience: Annotated[Count, Le(MOST)] | None = None
    log_every_n_steps: Annotated[Count, Le(MOST)] = 1
    test: bool = False  # score the test split too, once, at the end

    def __post_init__(self) -> None:
        if self.patience is not None and self.val_check_interval is None:
            raise ConfigError("trainer.patience counts validations: it needs trainer.val_check_interval, which is null")

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
        """A Lightning Trainer for one epoch, without Lightning's own logger and checkpoints."""
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
    """Silences Lightning's and transformers' messages and loading bars, which say nothing about an experiment."""
    from transformers.utils.logging import disable_progress_bar

    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    disable_progress_bar()
    warnings.filterwarnings("ignore", message=r".*gradient_checkpointing_enable. is deprecated")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
