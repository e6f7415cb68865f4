"""The intrinsic dimension of a task, from the records of a sweep that searches it (``sweep.d90``)."""

from collections.abc import Mapping

from loralab.analysis.results import SweepResults
from loralab.errors import ConfigError
from loralab.numerics.intrinsic_dimension import Answer, Search
from loralab.spec import make


def answers(results: SweepResults) -> dict[str, Answer]:
    """{the overrides that its trials share: the answer}; empty where the sweep asks for none."""
    asked = results.about.get("d90")
    try:
        search = make(Search, asked, "sweep.d90") if isinstance(asked, Mapping) else None
    except ConfigError:  # sweep.json is of a later version, or was edited
        search = None
    if search is None:
        return {}
    scored = [(trial.record["overrides"], trial.seed, trial.score(results.metric)) for trial in results.trials]
    found = search.scores(scored)
    return {" ".join(sorted(setting)): search.answer(scores, results.mode) for setting, scores in found.items()}


def sentences(results: SweepResults) -> list[str]:
    """The answers in words."""
    found = answers(results)
    return [f"{setting}: {answer.text}" if len(found) > 1 else answer.text for setting, answer in found.items()]
