"""A run in W&B made anew from what lies in a run folder: metrics.jsonl and result.json."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from loralab.errors import ArtifactError, ConfigError
from loralab.records import jsonl, record, wandb_run
from loralab.records.wandb import Wandb


def upload(folder: Path) -> str:
    """The address of the new run, or the folder of an offline one. The run's own project, entity, group and tags are
    taken, whatever mode it was logged in; W&B's environment variables say how it goes out.

    Raises ArtifactError where there is no record or W&B takes no run, ConfigError where the environment disables it.
    """
    stored = record.read(folder)
    if stored["status"] == "running":
        raise ArtifactError(f"{folder}: the trial {stored['trial']} is not finished; valid: a run that has ended")
    logger = stored_logger(stored["config"]) or Wandb()
    refuse_disabled(logger)
    memory = stored["memory"]
    left_out = wandb_run.not_measured(memory["device"])
    mirror = logger.start(folder, wandb_run.labels(folder, stored), left_out=left_out, anew=True)
    if not (place := mirror.place):
        raise ArtifactError(f"{folder}: W&B takes no run; the reason is in the line above")
    for step, values in jsonl.rows(folder / "metrics.jsonl"):
        mirror.log(step, values)
    mirror.summarize(wandb_run.summary(stored))
    if spikes := memory["spikes"]:
        mirror.table("memory/spikes", list(spikes[0]), [list(spike.values()) for spike in spikes])
    mirror.finish(stored.get("exit_code") or 0)
    return place


def refuse_disabled(logger: Wandb) -> None:
    """Raises ConfigError where W&B is asked for and its environment variables disable it."""
    if logger.effective_mode == "disabled":
        raise ConfigError(
            "WANDB_MODE or WANDB_DISABLED disables W&B, so nothing would be uploaded; valid: unset, online"
        )


def stored_logger(config: Mapping[str, Any], keep_mode: bool = False) -> Wandb | None:
    """The settings of W&B in a record's configuration, alone or among several loggers; None where it has none. Without
    ``keep_mode`` W&B's environment variables say how a run goes out."""
    names = {field.name for field in fields(Wandb)} - (set() if keep_mode else {"mode"})
    found = next(_nodes(config.get("logger")), None)
    return None if found is None else Wandb(**{key: value for key, value in found.items() if key in names})


def _nodes(node: object) -> Iterator[Mapping[str, Any]]:
    if not isinstance(node, Mapping):
        return
    if str(node.get("_target_")) == f"{Wandb.__module__}.{Wandb.__qualname__}":
        yield node
    for value in node.values():
        yield from _nodes(value)
