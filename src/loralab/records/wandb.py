"""The mirror in Weights & Biases: one run for each trial, many in one process. Its errors never stop training."""

import logging
import netrc
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from loralab.errors import ConfigError, nearest
from loralab.records.record import SWEEP
from loralab.spec import Text, spec

log = logging.getLogger(__name__)

SYNONYMS = {"run": "online", "dryrun": "offline"}  # W&B's older words
ENVIRONMENT = ("online", "offline", "shared", "disabled", *SYNONYMS)  # of WANDB_MODE
HOST = "api.wandb.ai"
PROJECT = "loralab"
LONGEST = 128  # characters of a project, a group or a run's name
LONGEST_TAG = 64
FORBIDDEN = "/\\#?%:"  # in a project
LEAN = {"console": "off", "silent": True, "x_disable_stats": True, "disable_git": True, "init_timeout": 20}


@spec("logger")
class Wandb:
    """Null and auto take W&B's environment variables, and loralab's default where they are unset.

    An unreachable server means offline, not an error. WANDB_DIR, WANDB_NOTES, WANDB_BASE_URL and the like are obeyed;
    WANDB_NAME is the name of a single run, and a prefix of the names of a sweep's trials.
    """

    # auto: WANDB_MODE, else online where a key is configured, else offline
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str | None = None  # null: WANDB_PROJECT, else loralab
    entity: str | None = None  # null: WANDB_ENTITY, else the account's own
    group: str | None = None  # null: WANDB_RUN_GROUP, else the sweep's name
    tags: list[Text] = field(default_factory=list)  # empty: WANDB_TAGS

    def __post_init__(self) -> None:
        if self.effective_mode == "disabled":
            return
        key, name = self._project
        bad = sorted(set(name) & set(FORBIDDEN))
        if bad:
            raise ConfigError(f"{key}={name!r} holds {' '.join(bad)}; valid: a name without any of {FORBIDDEN}")
        named = (self._project, self._value("entity", "WANDB_ENTITY"), self._value("group", "WANDB_RUN_GROUP"))
        for key, text in named:
            if text is not None and not 1 <= len(text) <= LONGEST:
                raise ConfigError(f"{key} has {len(text)} characters ({text[:40]!r}); valid: 1 to {LONGEST}, or null")
        key, tags = self._tags
        for tag in tags:
            if not 1 <= len(tag) <= LONGEST_TAG:
                raise ConfigError(
                    f"{key}: the tag {tag[:40]!r} has {len(tag)} characters; valid: 1 to {LONGEST_TAG}, W&B's bound"
                )

    @property
    def effective_mode(self) -> str:
        """online, offline, shared or disabled. Raises ConfigError where WANDB_MODE is none that W&B knows."""
        if self.mode != "auto":
            return self.mode
        if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
            return "disabled"
        mode = os.environ.get("WANDB_MODE", "")
        if mode and mode not in ENVIRONMENT:
            raise ConfigError(f"WANDB_MODE={mode!r} is unknown; {nearest(mode, ENVIRONMENT)}")
        return SYNONYMS.get(mode, mode) or ("online" if key_configured() else "offline")

    def _value(self, name: str, variable: str) -> tuple[str, str | None]:
        """(configuration key or environment variable, its value or None)."""
        value = getattr(self, name)
        return (f"logger.{name}", value) if value is not None else (variable, os.environ.get(variable) or None)

    @property
    def _project(self) -> tuple[str, str]:
        key, name = self._value("project", "WANDB_PROJECT")
        return key, PROJECT if name is None else name

    @property
    def _tags(self) -> tuple[str, list[str]]:
        if self.tags:
            return "logger.tags", list(self.tags)
        return "WANDB_TAGS", [tag.strip() for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag.strip()]

    def start(self, folder: Path, name: str, group: str | None, config: Mapping[str, Any]) -> "Mirror":
        """Starts a run below ``folder/wandb``, or below WANDB_DIR; ``group``: the sweep's name.

        The Mirror of a run that could not start does nothing.
        """
        mode = self.effective_mode
        if mode == "disabled":
            return Mirror(None)
        swept = (folder.parent / SWEEP).is_file()
        prefix = os.environ.get("WANDB_NAME", "")
        options = {
            "project": self._project[1],
            "entity": self._value("entity", "WANDB_ENTITY")[1],
            "group": (self._value("group", "WANDB_RUN_GROUP")[1] or group or "")[:LONGEST] or None,
            "tags": self._tags[1] or None,
            "name": (f"{prefix} {name}" if prefix and swept else prefix or name)[:LONGEST],
            "config": dict(config),
            "dir": os.environ.get("WANDB_DIR") or str(folder),
        }
        if swept and os.environ.get("WANDB_RUN_ID"):  # one for all trials would be refused
            options["id"] = uuid.uuid4().hex[:8]
        return Mirror(_start(options, mode))


class Mirror:
    """A W&B run, or none. An error is logged, ends the mirror and is not raised."""

    def __init__(self, run: Any) -> None:
        self._run = run

    @property
    def run_id(self) -> str | None:
        return None if self._run is None else str(self._run.id)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._try(lambda run: run.log({"trainer/global_step": step, **values}))

    def sync(self) -> None:
        """W&B flushes by itself, every second."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Rows that W&B's dashboards can sort and plot."""

        def add(run: Any) -> None:
            import wandb

            run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

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
            log.warning("W&B stopped: %s; metrics.jsonl goes on", _short(error))
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


def _start(options: dict[str, Any], mode: str) -> Any:
    try:
        import wandb
    except Exception as error:
        log.warning("W&B is not usable (%s); metrics.jsonl goes on", _short(error))
        return None
    try:
        return _init(wandb, options, mode)
    except Exception as error:
        if mode == "offline":
            log.warning("W&B could not start (%s); metrics.jsonl goes on", _short(error))
            return None
        where = Path(options["dir"]) / "wandb"
        log.warning("W&B not reachable (%s); logging offline, upload later: wandb sync %s", _short(error), where)
    return _start(options, "offline")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _init(wandb: Any, options: dict[str, Any], mode: str) -> Any:
    # 15 s by default: a killed run would lose everything since the last flush
    wanted = {**LEAN, "x_transaction_log_flush_interval": 1.0, "finish_timeout": 60.0}
    settings = wandb.Settings()
    for key, value in wanted.items():
        if key in type(settings).model_fields and not _in_environment(key):
            setattr(settings, key, value)
    run = wandb.init(mode=mode, reinit="create_new", settings=settings, **options)
    run.define_metric("*", step_metric="trainer/global_step")
    return run


def _in_environment(setting: str) -> bool:
    """True if W&B's own environment variable sets ``setting``."""
    return any(name in os.environ for name in (f"WANDB_{setting.upper()}", f"WANDB_{setting[1:].upper()}"))
