"""The Weights & Biases mirror: one run a trial, many in one process, never in the way of training."""

import logging
import netrc
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loralab.errors import ConfigError, nearest

log = logging.getLogger(__name__)

MODES = ("auto", "online", "offline", "disabled")
HOST = "api.wandb.ai"


@dataclass(frozen=True)
class Wandb:
    """``auto`` is online where a key is configured, else offline; an unreachable server means offline, not an error."""

    mode: str = "auto"
    project: str = "loralab"
    group: str | None = None  # null: the sweep's name
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"logger.mode={self.mode!r} is unknown; {nearest(self.mode, MODES)}")

    def start(self, folder: Path, name: str, group: str | None, config: Mapping[str, Any]) -> "Mirror":
        """A run of its own below ``folder/wandb``; a mirror that could not start swallows what it is given."""
        if self.mode == "disabled":
            return Mirror(None)
        online = self.mode == "online" or (self.mode == "auto" and key_configured())
        options = {
            "project": self.project,
            "group": self.group or group,
            "tags": list(self.tags) or None,
            "name": name,
            "config": dict(config),
            "dir": str(folder),
        }
        return Mirror(_start(options, online, folder))


class Mirror:
    """A W&B run, or nothing. Its failures are logged once and never raised: the records are the truth."""

    def __init__(self, run: Any) -> None:
        self._run = run

    @property
    def run_id(self) -> str | None:
        return None if self._run is None else str(self._run.id)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._try(lambda run: run.log({"trainer/global_step": step, **values}))

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Rows that W&B's dashboards can sort and plot."""

        def add(run: Any) -> None:
            import wandb

            run.log({name: wandb.Table(columns=columns, data=rows)})

        self._try(add)

    def summarize(self, values: Mapping[str, Any]) -> None:
        self._try(lambda run: run.summary.update(dict(values)))

    def finish(self, exit_code: int = 0) -> None:
        self._try(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _try(self, action: Any) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            log.warning("W&B stopped: %s; metrics.jsonl goes on", error)
            self._run = None


def key_configured() -> bool:
    """Whether wandb would find an API key: in the environment or in the user's netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", f"https://{HOST}").split("://")[-1].split("/")[0].split(":")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _start(options: dict[str, Any], online: bool, folder: Path) -> Any:
    try:
        import wandb
    except Exception as error:
        log.warning("W&B is not usable (%s); metrics.jsonl goes on", error)
        return None
    try:
        return _init(wandb, options, "online" if online else "offline")
    except Exception as error:
        if not online:
            log.warning("W&B could not start (%s); metrics.jsonl goes on", error)
            return None
        reason = " ".join(str(error).split())[:160]
        log.warning("W&B not reachable (%s); logging offline, upload later: wandb sync %s", reason, folder / "wandb")
    try:
        return _init(wandb, options, "offline")
    except Exception as error:
        log.warning("W&B could not start (%s); metrics.jsonl goes on", error)
        return None


def _init(wandb: Any, options: dict[str, Any], mode: str) -> Any:
    settings = wandb.Settings(console="off", silent=True, x_disable_stats=True, disable_git=True, init_timeout=20)
    # 15 s by default: a killed run would lose everything since the last flush
    for key, value in {"x_transaction_log_flush_interval": 1.0, "finish_timeout": 60.0}.items():
        if key in type(settings).model_fields:
            setattr(settings, key, value)
    run = wandb.init(mode=mode, reinit="create_new", settings=settings, **options)
    run.define_metric("*", step_metric="trainer/global_step")
    return run
