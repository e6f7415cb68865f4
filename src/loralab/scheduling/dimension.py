"""The trials that a search for an intrinsic dimension (``sweep.d90``) asks for, from those that are done."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from loralab.errors import ConfigError
from loralab.numerics.intrinsic_dimension import Search
from loralab.scheduling.job import Job, Record
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


def following(search: Search, jobs: Sequence[Job], records: Mapping[str, Record]) -> list[list[str]]:
    """Overrides of the trials to run next; none where every bracket is narrow, or its middle could not be run."""
    scored = [(job.overrides, str(job.content["seed"]), job.value(records[job.trial])) for job in jobs]
    words: list[list[str]] = []
    for setting, scores in search.scores(scored).items():
        answer = search.answer(scores, str(jobs[0].content["metric_mode"]))
        dimension = answer.following
        if dimension is not None and dimension not in scores:
            log.info("%s = %d comes next: %d falls short, %d does not", search.axis, dimension, answer.low, answer.high)
            words += search.at(dimension, [job.overrides for job in jobs if search.setting(job.overrides) == setting])
    return words
