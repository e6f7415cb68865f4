"""What a sweep would run, arm by arm: nothing is loaded and nothing written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loralab.numerics.scale import scale
from loralab.scheduling import launch
from loralab.scheduling.composing import Composed
from loralab.scheduling.job import Job
from loralab.scheduling.sweep_file import swept_axes


@dataclass(frozen=True)
class Arm:
    """Trials that differ in seed and in what is tuned alone.

    ``values``: of the swept axes, ``tuned``: each value of what is tuned, both as overrides write them. ``scale``: what
    the update is multiplied by; None for a method without it."""

    values: dict[str, str]
    tuned: dict[str, list[str]]
    seeds: list[str]
    steps: list[int]
    scale: float | None
    rates: list[str]  # optimizer.lr of its trials
    finished: int
    trials: int


@dataclass(frozen=True)
class Preview:
    """``arms`` in the order of the trials; ``tune``: the names of what is tuned; ``search``: of a search, what it is,
    in one sentence."""

    folder: Path
    arms: list[Arm] = field(default_factory=list)
    axes: list[str] = field(default_factory=list)
    tune: list[str] = field(default_factory=list)
    search: str = ""


def preview(sweeper: Any, trials: Sequence[Sequence[str]], tune: Sequence[str], search: str = "") -> Preview:
    """Of ``trials``, the overrides that the sweep asks for first; ``tune``: keys that are tuned; ``search``: see
    ``Preview``. Raises ConfigError for a trial that cannot be built."""
    master, folder = sweeper.config, Path(str(sweeper.config.hydra.sweep.dir))
    loader = Composed(sweeper.hydra_context.config_loader)
    jobs = launch.distinct(launch.jobs_of(folder, launch.compose_all(loader, master, trials, 0)))
    axes = [key for key in swept_axes([job.overrides for job in jobs]) if key not in ("seed", *tune)]
    grouped: dict[tuple[tuple[str, str], ...], list[Job]] = {}
    for job in jobs:
        settings = _settings(job)
        grouped.setdefault(tuple((axis, settings.get(axis, "-")) for axis in axes), []).append(job)
    arms = [_arm(dict(values), own, tune) for values, own in grouped.items()]
    return Preview(folder, arms, axes, list(tune), search)


def _arm(values: dict[str, str], jobs: Sequence[Job], tune: Sequence[str]) -> Arm:
    for job in jobs:
        job.spec()
    settings = [_settings(job) for job in jobs]
    tuned = {key: list(dict.fromkeys(one[key] for one in settings if key in one)) for key in tune}
    seeds = list(dict.fromkeys(str(job.content.get("seed")) for job in jobs))
    steps = sorted({int(job.content["trainer"].get("max_steps") or 0) for job in jobs})
    scales = {scale(job.content["adapter"]) for job in jobs}
    finished = sum(job.finished() is not None for job in jobs)
    rates = list(dict.fromkeys(str(job.content["optimizer"].get("lr")) for job in jobs))
    common = scales.pop() if len(scales) == 1 else None
    return Arm(values, tuned, seeds, steps, common, rates, finished, len(jobs))


def _settings(job: Job) -> Mapping[str, str]:
    return dict(word.lstrip("+").split("=", 1) for word in job.overrides if "=" in word)
