"""The settings of Lightning's Trainer that a run may choose, checked before anything is loaded."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt, Le

from loralab.errors import ConfigError
from loralab.spec import Count, Natural, Positive, Share, before, spec
from loralab.training.arguments import MOST, SEVERAL

EACH_TRIALS = (  # Lightning's arguments that trials of one pack may differ in
    *("limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches", "gradient_clip_algorithm"),
    *("max_epochs", "min_epochs", "min_steps", "check_val_every_n_epoch"),
)
PROFILERS = {"simple": "SimpleProfiler", "advanced": "AdvancedProfiler", "pytorch": "PyTorchProfiler"}
OURS = {"num_sanity_val_steps": 0, "enable_model_summary": False}  # where they are not given
PASSED_ON = (  # to every Trainer; to that of the training also the others
    *("deterministic", "benchmark", "detect_anomaly", "sync_batchnorm", "use_distributed_sampler"),
    *("default_root_dir", "enable_autolog_hparams"),
)
AMPERE = (8, 0)  # the first compute capability with bfloat16 and TF32
SHORT = {"bf16": "bf16-mixed", "16": "16-mixed", "32": "32-true", "64": "64-true"}  # Lightning's other names


def _precision(value: Any) -> Any:
    """The full name of one of Lightning's short ones. Raises ConfigError for double precision."""
    full = SHORT.get(str(value), value)
    if full == "64-true":
        raise ConfigError(
            f"trainer.precision={value}: adapters are float32, and the frozen base is shared as it was loaded"
            " (model.dtype); valid: auto, 32-true, tf32, bf16-mixed, 16-mixed, bf16-true"
        )
    return full


def _has_bfloat16() -> bool:
    """Whether every card here computes bfloat16, and so TF32 too; True where there is no card."""
    import torch

    cards = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return all(torch.cuda.get_device_capability(card) >= AMPERE for card in cards)


def _accelerator(value: Any) -> Any:
    if value in ("mps", "tpu", "hpu", "xla"):
        raise ConfigError(
            f"trainer.accelerator={value}: quantized layers have kernels for the CPU and for CUDA alone, and no record "
            "of this device would say what its memory held; valid: auto, cpu, gpu"
        )
    return "gpu" if value == "cuda" else value


@spec("trainer")
class TrainerSpec:
    """Steps, device, precision, validations. All steps are optimizer steps; ``val_check_interval`` null: at the end."""

    accelerator: Annotated[Literal["auto", "cpu", "gpu"], before(_accelerator)] = "auto"
    max_steps: Annotated[Natural, Le(MOST)] = 200  # 0: the base is scored as it is
    accumulate_grad_batches: Annotated[Count, Le(MOST)] = 1
    gradient_clip_val: Positive | None = 1.0
    # auto: bf16-mixed on a card that computes bfloat16, else 32-true
    precision: Annotated[
        Literal["auto", "32-true", "tf32", "bf16-mixed", "16-mixed", "bf16-true"], before(_precision)
    ] = "auto"
    val_check_interval: Annotated[Count, Le(MOST)] | None = None
    # validations without a better metric after which a trial ends (null: never)
    patience: Annotated[Count, Le(MOST)] | None = None
    log_every_n_steps: Annotated[Count, Le(MOST)] = 1
    keep_best: bool = False  # export the state that had the best metric of all validations, not the last one
    test: bool = False  # score the test split too, once, at the end
    # the share of its steps after which the run is paused, scored by its metric; a run with more, or null, goes on
    until: Annotated[Share, Gt(0), "a share between 0 and 1"] | None = None
    # other arguments of Lightning's Trainer, +trainer.NAME=VALUE: see training/arguments.py
    decisive: dict[str, Any] = field(default_factory=dict)
    passed: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, given in (("patience", self.patience), ("keep_best", self.keep_best or None)):
            if given is not None and not self.validates:
                raise ConfigError(
                    f"trainer.{key} is about validations on the way: it needs trainer.val_check_interval, which is null"
                )
        if self.val_check_interval is not None and self.given("check_val_every_n_epoch"):
            raise ConfigError(
                f"trainer.val_check_interval={self.val_check_interval} and trainer.check_val_every_n_epoch both say "
                "when to validate; valid: one of them"
            )

    @property
    def validates(self) -> bool:
        """Whether there are validations on the way."""
        return self.val_check_interval is not None or self.given("check_val_every_n_epoch")

    def given(self, *names: str) -> bool:
        """Whether one of these arguments of Lightning's Trainer was given, with more than it does anyway."""
        return any(name in self.decisive or name in self.passed for name in names)

    @property
    def strategy(self) -> str:
        """ddp or fsdp where several processes may train a trial; else empty."""
        strategy = self.passed.get("strategy")
        return strategy if strategy in SEVERAL else ""

    @property
    def processes(self) -> int:
        """How many train a trial together: ``devices`` or, where that is auto, as many as there are GPUs. Raises
        ConfigError where there are not as many."""
        if not self.strategy:
            return 1
        import torch

        from loralab.training.together import rank_and_size, several

        if several():  # this is one of them, which sees its own device alone
            return rank_and_size()[1]
        devices, cards = self.passed.get("devices", "auto"), torch.cuda.device_count() if self.device == "cuda" else 0
        if cards and devices != "auto" and devices > cards:
            raise ConfigError(f"trainer.devices={devices}, but torch sees {cards} CUDA devices; valid: at most {cards}")
        return max(1, cards) if devices == "auto" else int(devices)

    @property
    def spreads(self) -> bool:
        """Whether the base is spread over the processes, so that all of them must compute every pass."""
        return self.strategy == "fsdp" and self.processes > 1

    @property
    def base_device(self) -> str:
        """Where the base is loaded: on the host where it is to be spread over several devices."""
        return "cpu" if self.spreads else self.device

    @property
    def shared(self) -> tuple[str, ...]:
        """What trials of one pack must share beside the fields: what their one Trainer is given."""
        given = {**self.decisive, **self.passed}
        return tuple(sorted(f"{name}={value}" for name, value in given.items() if name not in EACH_TRIALS))

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

    def precision_on(self, device: str) -> str:
        """The precision of the passes on ``device``, cpu or cuda: ``precision`` or, where that is auto, bf16-mixed on a
        card that computes bfloat16 and 32-true elsewhere. A card that this machine does not have is taken to."""
        if self.precision != "auto":
            return self.precision
        return "bf16-mixed" if device == "cuda" and _has_bfloat16() else "32-true"

    def autocast(self) -> AbstractContextManager[Any]:
        """Within, a pass that no Trainer makes, of generation for one, is computed in the precision of those it makes:
        mixed precision is a context, and any other the state of the module and of the process."""
        import torch

        dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
        dtype = dtypes.get(self.precision_on(self.device))
        return nullcontext() if dtype is None else torch.autocast(self.device, dtype)

    def check_precision(self) -> None:
        """Raises ConfigError for what the device would compute otherwise: 16-mixed on a CPU, where Lightning takes
        bf16 and does not say so, and TF32 where the products have none."""
        if self.precision == "16-mixed" and self.device == "cpu":
            raise ConfigError("trainer.precision=16-mixed needs a GPU; valid on a CPU: 32-true, bf16-mixed, bf16-true")
        if self.precision == "tf32" and (self.device == "cpu" or not _has_bfloat16()):
            raise ConfigError(
                "trainer.precision=tf32 needs a GPU of compute capability 8.0 or more (Ampere); valid here: 32-true"
            )

    def build(
        self,
        callbacks: list[Any],
        progress: bool,
        evaluating: bool = False,
        logger: Any = False,
        validating: bool = False,
        folder: Path | None = None,
    ) -> Any:
        """A Lightning Trainer for one epoch. ``logger``: where its callbacks' own values go; ``validating``: also
        where no validation is asked for on the way, one at the end; ``folder``: of a profiler's report."""
        quiet()
        from lightning.pytorch import Trainer
        from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar

        from loralab.training.strategy import InPlace, Replicated, leave_signals
        from loralab.training.together import several

        interval, precision = self.val_check_interval, self.precision_on(self.device)
        asked = any(isinstance(callback, ProgressBar) for callback in callbacks)
        trainer = Trainer(
            **{
                **self._passed(evaluating),
                "enable_progress_bar": self.passed.get("enable_progress_bar", progress) or asked,
            },
            accelerator="gpu" if self.device == "cuda" else "cpu",
            devices=1,
            strategy=(Replicated if several() else InPlace)("cuda:0" if self.device == "cuda" else "cpu"),
            precision="32-true" if precision == "tf32" else precision,  # type: ignore[arg-type]
            max_epochs=1,
            accumulate_grad_batches=self.accumulate_grad_batches,
            val_check_interval=None if interval is None else interval * self.accumulate_grad_batches,
            check_val_every_n_epoch=None if interval is not None else 1,
            limit_val_batches=1.0 if evaluating or validating or interval is not None else 0,
            callbacks=callbacks,
            logger=logger,
            profiler=None if evaluating or folder is None else self._profiler(folder),
            min_steps=self.decisive.get("min_steps") if validating else None,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            inference_mode=False,  # weights cached in inference mode would break later training steps
            log_every_n_steps=self.log_every_n_steps if logger else 1,
        )
        leave_signals(trainer)
        return trainer

    def _passed(self, evaluating: bool) -> dict[str, Any]:
        """The arguments that Lightning's Trainer itself is given."""
        names = PASSED_ON if evaluating else (*PASSED_ON, *OURS)
        given = {**self.decisive, **self.passed}
        return {**OURS, **{name: given[name] for name in names if name in given}}

    def _profiler(self, folder: Path) -> Any:
        """Lightning's profiler of that name, whose report is ``fit-profile.txt`` in ``folder``."""
        from lightning.pytorch import profilers

        name = self.passed.get("profiler")
        return getattr(profilers, PROFILERS[name])(dirpath=folder, filename="profile") if name else None

    @contextmanager
    def settings_restored(self) -> Iterator[None]:
        """Undoes what Lightning's Trainer sets for the whole process, so that a later trial is not another for it.

        Within, float32 products on a card are TF32 where ``precision`` says so and not otherwise, and cuDNN's attention
        is off: it makes a plan for every new shape, which takes the host tens of milliseconds, and ragged rows bring
        one in almost every pass. Flash attention, which is foreseen, makes none."""
        import torch

        attention: bool = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        benchmark = torch.backends.cudnn.benchmark
        products = torch.get_float32_matmul_precision()
        torch.backends.cuda.enable_cudnn_sdp(False)
        if self.device == "cuda":
            torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(products)
            torch.backends.cuda.enable_cudnn_sdp(attention)
            if self.given("deterministic"):
                torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.backends.cudnn.benchmark = benchmark


def quiet() -> None:
    """Silences Lightning's and transformers' messages and loading bars, which say nothing about an experiment."""
    from transformers.utils.logging import disable_progress_bar

    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("callbacks.model_summary", "callbacks.timer"):  # what they say was asked for
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.INFO)
    logging.getLogger("lightning").handlers.clear()  # each line once
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    disable_progress_bar()
    warnings.filterwarnings("ignore", message=r".*gradient_checkpointing_enable. is deprecated")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
