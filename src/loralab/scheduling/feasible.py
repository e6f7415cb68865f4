"""Which points of a search can be built, and which are predicted to fit into memory, before anything is trained."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from loralab.errors import ConfigError, LoralabError
from loralab.scheduling import launch
from loralab.scheduling.composing import Composed
from loralab.scheduling.job import Job
from loralab.scheduling.session import Session

log = logging.getLogger(__name__)


class Trying:
    """Composes trials of a search without running them."""

    def __init__(self, sweeper: Any, session: Session) -> None:
        self.master, self.session = sweeper.config, session
        self.loader = Composed(sweeper.hydra_context.config_loader)
        self.memory_budget: float | None = OmegaConf.select(self.master, "hydra.launcher.memory_budget")
        executor = OmegaConf.select(self.master, "hydra.launcher.executor")
        self.runs_here = getattr(sweeper.launcher, "packs", False) and executor in (None, "local")
        self.members: Any = None

    def check(self, trials: Sequence[Sequence[str]]) -> None:
        """Raises the error of a trial that cannot be built: Hydra's for a key that does not exist, else ConfigError."""
        for words in trials:
            try:
                self._job(words).spec()
            except ConfigError as error:
                raise ConfigError(f"{error} (a point of the search: {' '.join(words)})") from error

    def excess(self, words: Sequence[str]) -> float | None:
        """GiB by which the predicted need of a trial alone is above its budget, negative where it fits; None where
        nothing is predicted, or no budget holds.

        The budget: the least of ``hydra.launcher.memory_budget`` and ``plan.budget_gib``; where neither is set, with
        ``plan.enforce``, what this machine has free, if trials run on it.
        """
        job = self._job(words)
        job.memory_budget = self.memory_budget
        try:
            return self._excess(job)
        except LoralabError as error:  # reported by the trial itself
            log.debug("the memory of %s could not be foreseen", " ".join(words), exc_info=error)
            return None

    def _excess(self, job: Job) -> float | None:
        from loralab.planning.foresee import free_bytes
        from loralab.planning.plan import GIB, device_bytes
        from loralab.training.epochs import settled

        spec = job.spec()
        budget, enforce = spec.plan.budget_gib, spec.plan.enforce
        if not (enforce and (budget is not None or self.runs_here)) and self.memory_budget is None:
            return None
        runner = self.session.runner()
        rows = runner.inputs.rows(spec)
        spec = settled(spec, rows)
        need = max(runner.foresight.alone(spec, rows) or 0 if enforce else 0, self._packers(spec, rows))
        if not need:
            return None
        device = spec.trainer.device
        room = budget * GIB if budget is not None else free_bytes(device) + runner.inputs.base_bytes
        return float((device_bytes(need) if device == "cuda" else need) - room) / GIB

    def _packers(self, spec: Any, rows: Any) -> int:
        """Bytes by which the launcher refuses a trial under its memory budget; 0 where it has none."""
        if self.memory_budget is None:
            return 0
        from loralab.scheduling.members import Members

        self.members = self.members or Members()
        member = self.members.member(spec, rows)
        return int(member.base + member.own)

    def _job(self, words: Sequence[str]) -> Job:
        config = self.loader.load_sweep_config(self.master, list(words))
        return launch.job_of(config, Path(str(self.master.hydra.sweep.dir)), {})
