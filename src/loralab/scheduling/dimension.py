"""The trials that a search for an intrinsic dimension (``sweep.d90``) asks for, from those that are done."""

import logging
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from loralab.errors import ConfigError
from loralab.numerics.intrinsic_dimension import Scores, Search
from loralab.spec import make

log = logging.getLogger(__name__)


def search_of(config: DictConfig) -> Search | None:
    """What the sweep file asks under ``sweep.d90``; None where it asks nothing. Raises ConfigError."""
    asked: Any = OmegaConf.select(config, "sweep.d90")
    if asked is None:
        return None
    if not isinstance(asked, DictConfig):
        raise ConfigError(f"sweep.d90={asked!r} is no group of settings; valid: ladder, reference, trial, axis, ...")
    values: Any = OmegaConf.to_container(asked, resolve=True)
    return make(Search, values, "sweep.d90")


class Searching:
    """A ``rounds.Study``: the trials of the axes with those that the search begins with, then the middles of brackets
    until each is narrow, or its middle could not be run."""

    def __init__(self, search: Search, trials: list[list[str]], master: DictConfig) -> None:
        """``trials``: of the axes; ``master``: the configuration that they are overrides of. Raises ConfigError."""
        self.search, self.mode, self.seed = search, str(master.metric_mode), str(master.seed)
        self.waiting = [*trials, *search.first(trials, self.mode)]
        self.scored: list[tuple[Sequence[str], str, float | None]] = []

    def ask(self) -> list[list[str]]:
        """The overrides of the trials to run next; empty: no more."""
        return self.waiting

    def tell(self, trials: Sequence[Sequence[str]], values: Sequence[float | None]) -> list[dict[str, Any]]:
        """Takes the metric of each trial that was asked for (None: it was not completed); there is nothing to decide
        beside the trials themselves."""
        told = zip(trials, values, strict=True)
        self.scored += [(overrides, self._seed(overrides), value) for overrides, value in told]
        self.waiting = [words for setting, scores in self._scores() for words in self._following(setting, scores)]
        return []

    def _scores(self) -> list[tuple[frozenset[str], Scores]]:
        return list(self.search.scores(self.scored).items())

    def _following(self, setting: frozenset[str], scores: Scores) -> list[list[str]]:
        answer = self.search.answer(scores, self.mode)
        dimension = answer.following
        if dimension is None or dimension in scores:
            return []
        text = "%s = %d comes next: %d falls short, %d does not"
        log.info(text, self.search.axis, dimension, answer.low, answer.high)
        return self.search.at(dimension, [told[0] for told in self.scored if self.search.setting(told[0]) == setting])

    def _seed(self, overrides: Sequence[str]) -> str:
        return next((word.removeprefix("seed=") for word in overrides if word.startswith("seed=")), self.seed)
