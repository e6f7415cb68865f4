"""The ``callbacks`` group: loralab's observers, Lightning's callbacks and the user's own, by ``_target_``."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from loralab.config.classes import checked, target
from loralab.errors import ConfigError

if TYPE_CHECKING:
    from loralab.training.early_stopping import EarlyStopping
    from loralab.training.trainer import TrainerSpec

COPIES = "it copies the whole module, the frozen base with it, and swaps the weights of the copy in"
FREEZES = "it decides which parameters train, and that is the adapter's: adapter=last_layer and others train a part"
REFUSED = {  # Lightning's callbacks that would break a promise, by the names of their classes
    "StochasticWeightAveraging": f"{COPIES} by epochs, and a run is one; trainer.keep_best=true exports the best state",
    "WeightAveraging": f"{COPIES}; trainer.keep_best=true exports the best state",
    "EMAWeightAveraging": f"{COPIES}; trainer.keep_best=true exports the best state",
    "GradientAccumulationScheduler": (
        "the loss of a step is divided by the target tokens of the whole step, which needs one number of passes for "
        "the whole run: trainer.accumulate_grad_batches"
    ),
    "BatchSizeFinder": "it would train before the run begins, on rows that the run then sees again; data.batch_size",
    "LearningRateFinder": "it would train before the run begins; sweep optimizer.lr instead: optimizer.lr=1e-4,1e-3",
    "BaseFinetuning": FREEZES,
    "BackboneFinetuning": FREEZES,
    "ModelPruning": "it changes the frozen base, which trials share",
    "LambdaCallback": "its functions cannot be written in a configuration: write a class with these methods",
}


def callbacks(nodes: Mapping[str, Any]) -> dict[str, Any]:
    """{name: function that makes the callback}: each fit makes its own. Their options are checked now: ConfigError."""
    made: dict[str, Any] = {}
    for name, node in nodes.items():
        if node is None:
            continue
        key = f"callbacks.{name}"
        cls = target(node, key)
        from lightning.pytorch import Callback

        if not (isinstance(cls, type) and issubclass(cls, Callback)):
            raise ConfigError(f"{key}._target_={node['_target_']!r} is not a Lightning callback")
        for kind in cls.__mro__:
            if kind.__module__.startswith("lightning.pytorch.") and kind.__name__ in REFUSED:
                raise ConfigError(f"{key}: {cls.__name__} does not go with loralab: {REFUSED[kind.__name__]}")
        make = partial(cls, **checked(cls, node, key))
        try:
            make()
        except ConfigError:
            raise
        except Exception as error:  # Lightning raises kinds of its own, and a module may be missing
            raise ConfigError(f"{key}: {' '.join(str(error).split()) or type(error).__name__}") from error
        made[str(name)] = make
    return made


def stopping(made: Mapping[str, Any], trainer: "TrainerSpec", watchable: Sequence[str]) -> "dict[str, EarlyStopping]":
    """{name: rule} of Lightning's EarlyStopping callbacks among ``made``: each trial of a pack ends by its own.

    Raises ConfigError for one that would never decide.
    """
    from lightning.pytorch.callbacks import EarlyStopping as Lightnings

    from loralab.training.early_stopping import EarlyStopping

    rules: dict[str, EarlyStopping] = {}
    for name, make in made.items():
        if make.func is not Lightnings:  # a class derived from it is the user's own
            continue
        rule, key = make(), f"callbacks.{name}"
        if not trainer.validates:
            raise ConfigError(
                f"{key}: EarlyStopping watches the validations on the way, and there are none: it needs "
                "trainer.val_check_interval=N or +trainer.check_val_every_n_epoch=1"
            )
        if rule.monitor not in watchable:
            raise ConfigError(
                f"{key}.monitor={rule.monitor!r} is measured by no validation on the way; valid: {', '.join(watchable)}"
            )
        if rule._check_on_train_epoch_end:
            raise ConfigError(f"{key}.check_on_train_epoch_end=true: a run is one epoch of Lightning's; valid: false")
        rules[name] = EarlyStopping(
            max(1, rule.patience),
            rule.mode,
            min_delta=rule.min_delta * (1 if rule.mode == "max" else -1),  # Lightning keeps it with a sign
            stopping_threshold=rule.stopping_threshold,
            divergence_threshold=rule.divergence_threshold,
            check_finite=rule.check_finite,
            metric=rule.monitor,
        )
    return rules
