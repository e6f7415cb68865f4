"""A mirror in trackio: local dashboards (``trackio show``), or a Space of the Hugging Face hub."""

from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from loralab.records.loggers import Aside
from loralab.records.metric_logger import Labels
from loralab.spec import spec


@spec("logger")
class Trackio:
    """A run for each trial, named and grouped as in W&B. A run that goes on after a kill is the same run, which may
    hold the rows between its last checkpoint and the kill twice; metrics.jsonl holds them once."""

    extra: ClassVar[str] = "trackio"  # what has to be installed

    project: str = "loralab"
    space_id: str | None = None  # of the hub, USER/SPACE; null: this machine, in TRACKIO_DIR

    def start(self, folder: Path, labels: Labels, resumed: bool = False, left_out: Collection[str] = ()) -> Aside:
        """Starts the run in a thread; what goes wrong there is logged and stops nothing."""
        options: dict[str, Any] = {
            **{"project": self.project, "space_id": self.space_id, "name": f"{labels.name} {labels.config['trial']}"},
            **{"group": labels.group, "config": dict(labels.config), "resume": "allow" if resumed else "never"},
            **{"embed": False, "auto_log_gpu": False, "auto_log_cpu": False},
        }
        return Aside(lambda: _Run(options, frozenset(left_out)), "logger=trackio")


class _Run:
    """A run with the methods of Lightning's loggers that ``Aside`` calls, in the thread that started it."""

    def __init__(self, options: Mapping[str, Any], left_out: frozenset[str]) -> None:
        import trackio
        from trackio import run

        for module in (trackio, run):
            _silence(module)
        self._run, self._left_out = trackio.init(**options), left_out

    def log_metrics(self, row: Mapping[str, Any], step: int) -> None:
        self._run.log({key: value for key, value in row.items() if key not in self._left_out}, step=step)

    def save(self) -> None:
        """It writes each row at once."""

    def finalize(self, status: str) -> None:
        self._run.finish()


def _silence(module: ModuleType) -> None:
    """Its lines on stdout would stand between those of the trials."""
    module.print = lambda *_, **__: None  # type: ignore[attr-defined]
