"""What fine-tuning forgets: the loss on data.forgetting, which no trial is trained on, beside that of the bare base.

The measure is that of "LoRA Learns Less and Forgets Less" (arXiv 2405.09673), whose source domains are such rows.
"""

from typing import Any

from torch import nn

from loralab.adapters.base import Adapter, AdapterSpec, freeze
from loralab.data.base import FORGETTING, Row
from loralab.data.encoding import Encoded
from loralab.models.loading import Base
from loralab.running.attach import pad_token_id
from loralab.running.finish import choose
from loralab.training.module import FineTuner
from loralab.training.passes import EvaluationPasses
from loralab.training.specs import TrialSpec
from loralab.training.trial import Trial


class _Bare(AdapterSpec):
    """Changes nothing."""

    tokenwise = True

    def attach(self, model: nn.Module, seed: int = 0) -> Adapter:
        freeze(model)
        return Adapter(model, self)


def bare_scores(base: Base, spec: TrialSpec, data: Encoded) -> dict[str, float]:
    """``forgetting/base_loss``, and ``forgetting/base_choice_accuracy`` where rows have choices: of ``base`` on the
    rows of ``data.forgetting``, whatever adapters are attached to it. ``spec``: of a trial with these rows. Raises
    DivergedError where the loss is not finite."""
    trial = Trial(spec, _Bare().attach(base.model), data, pad_token_id(base), {})
    module = FineTuner(base.model, [trial])
    module.split = FORGETTING
    with spec.trainer.settings_restored():
        evaluator = spec.trainer.build([], progress=False, evaluating=True)
        evaluator.validate(module, EvaluationPasses([trial], FORGETTING), verbose=False)
    choose(trial, base, FORGETTING, *_answered(trial))
    if trial.failure is not None:
        raise trial.failure
    kept = [name for name in ("loss", "choice_accuracy") if f"{FORGETTING}/{name}" in trial.metrics]
    return {f"{FORGETTING}/base_{name}": trial.metrics[f"{FORGETTING}/{name}"] for name in kept}


def compare(trial: Trial, base: Base) -> None:
    """Completes the scores of ``trial`` on data.forgetting: by choice where its rows have choices, with those of the
    bare base, and ``forgetting/increase``, how far its loss is above the base's."""
    choose(trial, base, FORGETTING, *_answered(trial))
    if trial.failure is None:
        increase = trial.metrics[f"{FORGETTING}/loss"] - trial.bare_scores[f"{FORGETTING}/base_loss"]
        trial.score({**trial.bare_scores, f"{FORGETTING}/increase": increase})


def _answered(trial: Trial) -> tuple[list[Row], int]:
    """The rows of data.forgetting as text, and its batch size."""
    assert trial.data.forgetting is not None
    return trial.data.forgetting.splits.validation, trial.evaluated(FORGETTING)[1]


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
