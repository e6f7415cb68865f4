"""What fine-tuning forgets: the loss on data.forgetting, which no trial is trained on, beside that of the bare base.

The measure is that of "LoRA Learns Less and Forgets Less" (arXiv 2405.09673), whose source domains are such rows.
"""

from typing import Any

from torch import nn

from loralab.adapters.base import Adapter, AdapterSpec
from loralab.data.base import FORGETTING
from loralab.data.encoding import Encoded
from loralab.models.loading import Base
from loralab.running.attach import pad_token_id
from loralab.training.module import FineTuner
from loralab.training.passes import EvaluationPasses
from loralab.training.specs import TrialSpec
from loralab.training.trial import Trial


class _Bare(AdapterSpec):
    """Changes nothing."""

    tokenwise = True

    def attach(self, model: nn.Module, seed: int = 0) -> Adapter:
        return Adapter(model, self)


def bare_loss(base: Base, spec: TrialSpec, data: Encoded) -> float:
    """The loss of ``base`` on the rows ``data.forgetting``, whatever adapters are attached to it. ``spec``: of a trial
    with these rows, for precision and batch size. Raises DivergedError where it is not finite."""
    trial = Trial(spec, _Bare().attach(base.model), data, pad_token_id(base), {})
    module = FineTuner(base.model, [trial])
    module.split = FORGETTING
    with spec.trainer.settings_restored():
        evaluator = spec.trainer.build([], progress=False, evaluating=True)
        evaluator.validate(module, EvaluationPasses([trial], FORGETTING), verbose=False)
    if trial.failure is not None:
        raise trial.failure
    return trial.metrics[f"{FORGETTING}/loss"]


def compare(trial: Trial) -> None:
    """Adds to the scores of ``trial`` on data.forgetting the loss of the base and how far its own is above it."""
    loss = trial.metrics.get(f"{FORGETTING}/loss")
    if loss is None or trial.base_loss is None or trial.failure is not None:
        return
    trial.score({f"{FORGETTING}/base_loss": trial.base_loss, f"{FORGETTING}/increase": loss - trial.base_loss})


def described(data: Encoded, source: str | None) -> dict[str, Any] | None:
    """The ``data.forgetting`` part of a record; None where there are no such rows."""
    other = data.forgetting
    if other is None:
        return None
    return {
        "name": other.splits.name,
        "fingerprint": other.splits.fingerprint,
        "targets": other.targets,
        "source": source,
        "rows": len(other.validation),
    }
