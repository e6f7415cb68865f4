"""The arguments of Lightning's Trainer beside TrainerSpec's own fields: which pass, as what, and why others do not."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge

from loralab.errors import ConfigError, nearest
from loralab.spec import Count, Natural, Whole, before, make, spec


def _part(value: Any) -> Any:
    """1 is one batch and 1.0 all of them, as in Lightning."""
    if value is None or (type(value) is int and value >= 1) or (type(value) is float and 0 < value <= 1):
        return value
    raise ValueError("no part of a split")


def _duration(value: Any) -> Any:
    """DD:HH:MM:SS, or a mapping of timedelta's words to whole numbers, that is longer than nothing."""
    if isinstance(value, Mapping):
        valid = bool(value) and all(
            name in ("days", "hours", "minutes", "seconds", "weeks") and type(count) is int and count >= 0
            for name, count in value.items()
        )
        if valid and any(value.values()):
            return dict(value)
    elif value is None or (re.fullmatch(r"\d+:\d\d:\d\d:\d\d", str(value)) and re.search("[1-9]", str(value))):
        return value
    raise ValueError("no duration")


def _devices(value: Any) -> Any:
    """A count of devices, also as a text, or auto."""
    if value in (None, "auto") or (isinstance(value, str) and re.fullmatch("[1-9][0-9]{0,4}", value)):
        return value if value in (None, "auto") else int(value)
    if type(value) is int and value >= 1:
        return value
    raise ValueError("no number of devices")


Duration = Annotated[
    Any, before(_duration), "a time in double quotes and single ones, DD:HH:MM:SS, or {minutes: 5}: weeks to seconds"
]
Part = Annotated[Any, before(_part), "a number of batches (1 is one) or a share in (0, 1] (1.0 is all)"]


@spec("trainer", kw_only=True)
class Decisive:
    """Arguments that can change a result, and are part of a trial's id. None: as if it were not given."""

    max_epochs: Count | None = None
    min_epochs: Count | None = None
    min_steps: Count | None = None
    check_val_every_n_epoch: Count | None = None
    max_time: Duration = None
    limit_train_batches: Part = None
    limit_val_batches: Part = None
    limit_test_batches: Part = None
    overfit_batches: Part = None
    fast_dev_run: bool | Natural | None = None
    gradient_clip_algorithm: Literal["norm", "value"] | None = None
    deterministic: bool | Literal["warn"] | None = None
    benchmark: bool | None = None


@spec("trainer", kw_only=True)
class Harmless:
    """Arguments that change no result."""

    detect_anomaly: bool | None = None
    num_sanity_val_steps: Annotated[Whole, Ge(-1)] | None = None  # -1: all
    enable_progress_bar: bool | None = None
    enable_model_summary: bool | None = None
    profiler: Literal["simple", "advanced", "pytorch"] | None = None
    default_root_dir: str | None = None
    use_distributed_sampler: bool | None = None
    sync_batchnorm: bool | None = None
    enable_autolog_hparams: bool | None = None
    # a trial means the same on any number of processes
    strategy: Literal["auto", "single_device", "ddp", "fsdp"] | None = None
    devices: Annotated[Any, before(_devices), "a number of processes, or auto: as many as there are GPUs"] = None


MOST = 2**31 - 1  # of anything that is counted
# what Lightning does anyway where they are not given
USUAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches"), (1.0,)),
    **dict.fromkeys(("deterministic", "benchmark", "detect_anomaly"), (False,)),
    "fast_dev_run": (False, 0),
    "gradient_clip_algorithm": ("norm",),
    "strategy": ("auto", "single_device"),
    "devices": ("auto",),
}
SEVERAL = ("ddp", "fsdp")  # strategies by which several processes train one trial
ONE_DEVICE = (
    "a trial trains on one device, where the frozen base that trials share is loaded once; of several GPUs each runs "
    "packs of its own (hydra.launcher), and CUDA_VISIBLE_DEVICES chooses among them; valid: 1, or trainer=ddp with "
    "trainer.devices, by which several processes train one trial"
)
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {  # {argument: (values that it may have, why it may have no other)}
    "num_nodes": ((1,), "the processes of a run are on one machine"),
    "inference_mode": ((False,), "weights that a validation caches in inference mode would break later training steps"),
    "reload_dataloaders_every_n_epochs": (
        (0,),
        "the order of the rows follows from the seed and the step alone, by which a killed run goes on exactly",
    ),
    "barebones": ((False,), "it forbids what the record is made of: losses, validations and callbacks"),
    "enable_checkpointing": (
        (False,),
        "callbacks.checkpoint keeps the state that a run goes on from; for Lightning's own files add "
        "+callbacks.NAME._target_=lightning.pytorch.callbacks.ModelCheckpoint",
    ),
    "plugins": ((None,), "precision is trainer.precision, and one device needs no other environment"),
    "model_registry": ((None,), "the record and adapter/ are where a run's model lies"),
    "limit_predict_batches": ((None, 1.0), "no run predicts; loralab generate RUN does"),
    "logger": ((), "logger is a group of its own: logger=wandb, tensorboard, csv, several, none"),
    "callbacks": ((), "callbacks is a group of its own: +callbacks.NAME._target_=CLASS"),
}
PASSED = (*Decisive.__dataclass_fields__, *Harmless.__dataclass_fields__)  # type: ignore[attr-defined]


def split(values: Mapping[str, Any], own: tuple[str, ...]) -> dict[str, Any]:
    """``values`` of the ``trainer`` group as fields of TrainerSpec: those that are not among its ``own`` fields as its
    ``decisive`` and ``passed`` ones. Raises ConfigError for a name that the Trainer does not have, a wrong value, and
    one that would break what loralab promises."""
    others = {name: value for name, value in values.items() if name not in own}
    for name, value in others.items():
        if name in FIXED:
            _check_fixed(name, value)
        elif name not in PASSED:
            raise ConfigError(
                f"trainer.{name} is no argument of Lightning's Trainer; {nearest(name, [*own, *PASSED, *FIXED])}"
            )
    decisive, passed = _given(Decisive, others), _given(Harmless, others)
    if passed.get("strategy") not in SEVERAL and passed.pop("devices", 1) != 1:
        raise ConfigError(f"trainer.devices={others['devices']!r}: {ONE_DEVICE}")
    fields = {name: value for name, value in values.items() if name in own}
    if fields.get("max_steps") in (-1, None) and "max_epochs" in decisive:  # Lightning's word for no such end
        fields["max_steps"] = MOST
    return {**fields, "decisive": decisive, "passed": passed}


def _check_fixed(name: str, value: Any) -> None:
    valid, why = FIXED[name]
    if any(value == one and type(value) is type(one) for one in valid):
        return
    named = ", ".join("null" if one is None else str(one).lower() for one in valid)
    raise ConfigError(f"trainer.{name}={value!r}: {why}" + (f"; valid: {named}" if named else ""))


def _given(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``cls`` among ``values`` that change something, checked."""
    names = cls.__dataclass_fields__
    made = make(cls, {name: value for name, value in values.items() if name in names}, "trainer")
    found = {name: getattr(made, name) for name in names}
    return {name: value for name, value in found.items() if value is not None and not _is_usual(name, value)}


def _is_usual(name: str, value: Any) -> bool:
    return any(value == one and type(value) is type(one) for one in USUAL.get(name, ()))
