"""The mirror in Weights & Biases: one run for each trial, many in one process. Its errors never stop training.

Row n of metrics.jsonl is W&B's step n, so that a run that is killed and goes on has each row once: what the server has
already is not sent again, and an offline run is written anew from its first row.
"""

import logging
import netrc
import os
import shutil
import sys
import threading
import uuid
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from loralab.errors import ConfigError, nearest
from loralab.records.metric_logger import Labels
from loralab.records.record import SWEEP
from loralab.records.secrets import redact
from loralab.records.wandb_run import LONGEST_TAG
from loralab.spec import Text, spec

log = logging.getLogger(__name__)

SYNONYMS = {"run": "online", "dryrun": "offline"}  # W&B's older words
ENVIRONMENT = ("online", "offline", "shared", "disabled", *SYNONYMS)  # of WANDB_MODE
HOST = "api.wandb.ai"
PROJECT = "loralab"
LONGEST = 128  # characters of a project, a group or a run's name
ID_FILE = "wandb/id"  # in a run folder, until the run is completed
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
    tags: list[Text] = field(default_factory=list)  # empty: WANDB_TAGS; beside those of the sweep

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

    def prepare(self) -> None:
        """Imports wandb and starts its service, in a thread; ``start`` waits for both."""
        if self.effective_mode != "disabled" and "wandb" not in sys.modules:
            threading.Thread(target=_set_up, name="wandb", daemon=True).start()

    def start(
        self, folder: Path, labels: Labels, resumed: bool = False, left_out: Collection[str] = (), anew: bool = False
    ) -> "Mirror":
        """Starts a run below ``folder/wandb``, or below WANDB_DIR.

        ``resumed``: rows of an earlier process may be on the server. ``left_out``: keys of rows that W&B is not given.
        ``anew``: a run beside the one that the folder may have. A run that has not completed keeps its id, so that it
        has one history. The Mirror of a run that could not start does nothing.
        """
        mode = self.effective_mode
        if mode == "disabled":
            return Mirror(None)
        swept = (folder.parent / SWEEP).is_file()
        prefix = os.environ.get("WANDB_NAME", "")
        options: dict[str, Any] = {
            "project": self._project[1],
            "entity": self._value("entity", "WANDB_ENTITY")[1],
            "group": (self._value("group", "WANDB_RUN_GROUP")[1] or labels.group or "")[:LONGEST] or None,
            "job_type": os.environ.get("WANDB_JOB_TYPE") or labels.job_type,
            "tags": redact(list(dict.fromkeys([*labels.tags, *self._tags[1]]))) or None,
            "name": (f"{prefix} {labels.name}" if prefix and swept else prefix or labels.name)[:LONGEST],
            "config": dict(labels.config),
            # W&B's service writes, from the folder that this process was in when it was started
            "dir": str(Path(os.environ.get("WANDB_DIR") or folder).absolute()),
        }
        if _names_the_run(swept):
            return Mirror(_start(options, mode), left_out)
        id_file = None if anew else folder / ID_FILE
        kept, known = _kept_id(id_file) if id_file else (_new_id(), False)
        resume = {"resume": "allow"} if resumed and known and mode != "offline" else {}
        run = _start({**options, **resume, "id": kept}, mode)
        if run is not None and id_file and run.id != kept:
            _keep_id(id_file, run.id)
        if known and run is not None:
            _forget_offline(Path(options["dir"]), kept, but=Path(run.settings.sync_dir))
        return Mirror(run, left_out, id_file)


class Mirror:
    """A W&B run, or none. An error is logged, ends the mirror and is not raised.

    It is given every row of metrics.jsonl from the first on, also those of an earlier process.
    """

    replays = True

    def __init__(self, run: Any, left_out: Collection[str] = (), id_file: Path | None = None) -> None:
        self._run, self._left_out, self._id_file = run, frozenset(left_out), id_file
        self._row = 0
        self._first = int(getattr(run, "step", 0) or 0)  # of the rows that the server does not have
        self._completed = False

    @property
    def run_id(self) -> str | None:
        return None if self._run is None else str(self._run.id)

    @property
    def place(self) -> str:
        """The address of the run; of an offline one its folder; empty without a run."""
        if self._run is None:
            return ""
        return str(Path(self._run.settings.sync_dir) if self._run.offline else self._run.url)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Row number n is W&B's step n; its x-axis is the optimizer step."""
        number, self._row = self._row, self._row + 1
        kept = {key: value for key, value in values.items() if key not in self._left_out}
        if number >= self._first and (kept or not values):
            self._try(lambda run: run.log({"step": step, **kept}, step=number, commit=True))

    def sync(self) -> None:
        """W&B flushes by itself, every second."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Rows that W&B's dashboards can sort and plot."""

        def add(run: Any) -> None:
            import wandb

            run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

        self._try(add)

    def pages(self, pages: Mapping[str, str]) -> None:
        """Panels of HTML by name, which carry all that they show: W&B makes a preset of a chart by its server alone."""

        def add(run: Any) -> None:
            import wandb

            run.log({name: wandb.Html(text, inject=False, data_is_not_path=True) for name, text in pages.items()})

        self._try(add)

    def summarize(self, values: Mapping[str, Any]) -> None:
        self._completed = values.get("status") == "completed"
        self._try(lambda run: run.summary.update(dict(values)))

    def finish(self, exit_code: int = 0) -> None:
        run = self._run
        self._try(lambda run: run.finish(exit_code=exit_code))
        if self._run is not None and run.offline and not (file := Path(run.settings.sync_file)).is_file():
            log.warning("W&B has written no %s; metrics.jsonl has all rows, and loralab wandb-upload sends them", file)
        self._run = None
        if self._completed and self._id_file is not None:
            self._id_file.unlink(missing_ok=True)

    def _try(self, action: Any) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            log.warning("W&B stopped: %s; metrics.jsonl goes on", _short(error))
            self._run = None


def _set_up() -> None:
    with suppress(Exception):  # ``start`` meets it again, and says so
        import wandb

        wandb.setup()


def key_configured() -> bool:
    """Whether wandb would find an API key: in the environment or in the user's netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", f"https://{HOST}").split("://")[-1].split("/")[0].split(":")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _names_the_run(swept: bool) -> bool:
    """Whether the environment says which run it is: of an agent of W&B's, or a single one. One id for all trials of a
    sweep would be refused."""
    return bool(os.environ.get("WANDB_RUN_ID")) and ("WANDB_SWEEP_ID" in os.environ or not swept)


def _new_id() -> str:
    return uuid.uuid4().hex[:8]


def _kept_id(file: Path) -> tuple[str, bool]:
    """(id, True) of the run that was begun in this folder and not completed; else (new id, False), kept in ``file``."""
    with suppress(OSError):
        if file.is_file() and (kept := file.read_text("utf-8").strip()):
            return kept, True
    made = _new_id()
    _keep_id(file, made)
    return made, False


def _keep_id(file: Path, run_id: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(run_id, "utf-8")
    except OSError as error:
        log.warning("the id of the run in W&B cannot be kept (%s); a resumed run will be a second one", _short(error))


def _forget_offline(folder: Path, run_id: str, but: Path) -> None:
    """Removes what an earlier process wrote of this run offline: the run in ``but`` has all of its rows."""
    for old in folder.glob(f"wandb/offline-run-*-{run_id}"):
        if old.resolve() != but.resolve():
            shutil.rmtree(old, ignore_errors=True)


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
    # another id, for W&B's service still holds the one that it could not reach the server with
    anew = {key: value for key, value in options.items() if key != "resume"} | {"id": _new_id()}
    return _start(anew, "offline")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _init(wandb: Any, options: dict[str, Any], mode: str) -> Any:
    # 15 s by default: a killed run would lose everything since the last flush
    wanted = {**LEAN, "x_transaction_log_flush_interval": 1.0, "finish_timeout": 60.0}
    settings = wandb.Settings()
    for key, value in wanted.items():
        if key in type(settings).model_fields and not _in_environment(key):
            setattr(settings, key, value)
    argv = sys.argv
    sys.argv = redact(argv)  # W&B stores the words of the command
    try:
        run = wandb.init(mode=mode, reinit="create_new", settings=settings, **options)
    finally:
        sys.argv = argv
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _in_environment(setting: str) -> bool:
    """True if W&B's own environment variable sets ``setting``."""
    return any(name in os.environ for name in (f"WANDB_{setting.upper()}", f"WANDB_{setting[1:].upper()}"))
