"""``loralab train --from RUN``: the trial of a record again, exactly, and how what came out differs from the record."""

import filecmp
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loralab.config import identity, staleness
from loralab.errors import ArtifactError
from loralab.records import record
from loralab.records.environment import PACKAGES, package_version
from loralab.records.secrets import MASK
from loralab.scheduling.job import Job, Record

log = logging.getLogger(__name__)

INERT = ("hydra-core", "wandb")  # of the recorded packages: the configuration is composed already, and W&B looks on
WEIGHTS = "adapter_model.safetensors"
NAMED = 4  # differences that a line names at most


@dataclass
class Rerun:
    """A record that is made again. ``words``: settings beside it, with which it may be another trial."""

    source: Path
    stored: Record
    words: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)  # since the record was made, which are allowed
    allow_changes: bool = False

    @classmethod
    def of(cls, source: Path, words: list[str], allow_changes: bool) -> "Rerun":
        """Raises ArtifactError where ``source`` has no whole record, and where library versions, base, data or code of
        the user's have changed since, unless ``allow_changes``. From here on the current folder is that of the record,
        where it is still there: its relative paths mean the same."""
        source = source.absolute()
        stored = _read(source)
        if (cwd := stored["cwd"]) and Path(cwd).is_dir():
            os.chdir(cwd)
        changes = [*_versions(stored), *_files(stored)]
        if changes and not allow_changes:
            raise ArtifactError(
                f"{source}: a rerun would not be the same: {'; '.join(changes)}; valid: what was there then, or"
                " --allow-changes to run it as things are now"
            )
        return cls(source, stored, words, changes, allow_changes)

    @property
    def arguments(self) -> list[str]:
        """The words for Hydra: none where the record's own configuration is taken, else those that it was made of,
        without what ``words`` say anew."""
        if not self.words:
            return []
        said = {_key(word) for word in self.words}
        flags = [*(self.stored["flags"] or ())]
        return [*flags, *(word for word in self.stored["overrides"] if _key(word) not in said), *self.words]

    def job(self, composed: Job) -> Job:
        """The job that is run: with the record's own configuration or, with ``words``, the ``composed`` one."""
        stored = self.stored
        job = composed
        if not self.words:
            job = Job(stored["config"], composed.folder, list(stored["overrides"]), dict(stored["choices"]))
        job.flags = [*(stored["flags"] or ())]
        if hidden := _hidden(job.content, job.trial == stored["trial"]):
            raise ArtifactError(
                f"{self.source}: its record hides a secret in {' and '.join(hidden)}; valid: the value as a word, as in"
                f" {hidden[0]}=VALUE"
            )
        if job.trial != stored["trial"] and not self.words and not self.allow_changes:
            raise ArtifactError(
                f"{self.source}: its settings are those of the trial {job.trial}, and it says {stored['trial']}: the"
                " record was changed by hand, hides a secret among them, or this loralab names trials otherwise; valid:"
                " --allow-changes to run what it says"
            )
        if job.trial != stored["trial"] and self.words:
            differing = _differences(identity.settings(stored["config"]), identity.settings(job.content))
            log.warning("%s is another trial than %s: %s", job.trial, stored["trial"], _some(differing))
        for change in self.changes:
            log.warning("not as it was recorded: %s", change)
        if not (stored["cwd"] and Path(stored["cwd"]).is_dir()):
            log.warning("%s, where the record was made, is gone: relative paths are taken from here", stored["cwd"])
        _same_threads(stored)
        return job

    def tell(self, folder: Path) -> None:
        """Logs whether the record of the rerun, in ``folder``, has the metrics of the first one."""
        made = record.read(folder)
        for section in ("base", "data"):
            before, now = (one[section].get("fingerprint") for one in (self.stored, made))
            if before and now and before != now:
                log.warning("the %s has another fingerprint than the record's", section)
        if made["trial"] != self.stored["trial"] and self.words:
            log.info("beside %s in %s: %s", self.stored["trial"], self.source, _some(_metrics(self.stored, made)))
            return
        for name in ("cpu", "gpu"):
            before, now = (one["environment"].get(name) for one in (self.stored, made))
            if before != now:
                log.warning("the record is of %s %s, this is %s: last digits may differ", name, before, now)
        before, now = (one["base"].get("precision") for one in (self.stored, made))
        if before and now and before != now:
            log.warning(
                "the record was computed in %s, this is in %s, which is what trainer.precision=auto takes here; "
                "trainer.precision=%s beside --from computes as it did, as another trial",
                *(before, now, before),
            )
        if made["status"] != self.stored["status"]:
            log.warning("%s, where %s was %s", made["status"], self.source, self.stored["status"])
        count, differing = len(self.stored["metrics"]), _metrics(self.stored, made)
        if not count:
            log.info("the record in %s has no metrics to compare with", self.source)
        elif differing:
            log.warning("%d of %d metrics differ from %s: %s", len(differing), count, self.source, _some(differing))
        else:
            same = _same_weights(self.source, folder)
            weights = (
                "" if same is None else ", and so are the adapter's bytes" if same else ", the adapter's bytes not"
            )
            log.info("all %d metrics are equal to those of %s%s", count, self.source, weights)


def _read(source: Path) -> Record:
    """The record in ``source``, whole enough to be run. Raises ArtifactError."""
    if not (source / record.RESULT).exists() and (source / record.SWEEP).exists():
        raise ArtifactError(f"{source} is a sweep of several trials; valid: the folder of one of them, or --resume")
    stored = record.read(source)
    if stored["schema"] != record.SCHEMA:
        raise ArtifactError(
            f"{source / record.RESULT}: schema {stored['schema']} is of an earlier loralab, whose settings meant other"
            f" trials; valid: a record of schema {record.SCHEMA}"
        )
    if not all(isinstance(stored["config"].get(part), Mapping) for part in identity.USUAL):
        raise ArtifactError(f"{source / record.RESULT}: damaged: it has no whole configuration, so nothing can be run")
    return stored


def _versions(stored: Record) -> list[str]:
    """The libraries that decide a result and are of another version than they were."""
    before = stored["environment"].get("versions") or {}
    now = {name: package_version(name) for name in PACKAGES if name not in INERT}
    return [
        f"{name} was {before[name]} and is {version or 'not installed'}"
        for name, version in now.items()
        if before.get(name) is not None and before[name] != version
    ]


def _files(stored: Record) -> list[str]:
    """What of base, tokenizer, data and the user's own code has changed; the paths are relative to this folder."""
    changed = staleness.of_record({**stored, "cwd": None})
    return [changed] if changed else []


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _hidden(content: Mapping[str, Any], same: bool) -> list[str]:
    """Dotted keys whose value was masked when the record was written. ``same``: the settings give the recorded trial,
    so that none of those that decide it was."""
    hidden = [key for key, value in identity.flat(content) if value == MASK]
    return [key for key in hidden if not same or key.partition(".")[0] in identity.VOLATILE]


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``trainer.max_steps 20 -> 5`` for each setting that is another."""
    old, new = dict(identity.flat(before)), dict(identity.flat(now))
    keys = [key for key in dict.fromkeys([*old, *new]) if identity.plain(old.get(key)) != identity.plain(new.get(key))]
    return [f"{key} {json.dumps(old.get(key))} -> {json.dumps(new.get(key))}" for key in keys]


def _metrics(stored: Record, made: Record) -> list[str]:
    """``val/loss 1.25 -> 1.26 (+0.01)`` for each metric of either record that is not equal in both."""
    lines = []
    for name in dict.fromkeys([*stored["metrics"], *made["metrics"]]):
        before, now = stored["metrics"].get(name), made["metrics"].get(name)
        if before == now:
            continue
        known = isinstance(before, int | float) and isinstance(now, int | float)
        by = f" ({now - before:+.3g})" if known else ""
        lines.append(f"{name} {before} -> {now}{by}")
    return lines


def _some(texts: list[str]) -> str:
    more = f" and {len(texts) - NAMED} more" if len(texts) > NAMED else ""
    return (", ".join(texts[:NAMED]) or "nothing differs") + more


def _same_weights(source: Path, folder: Path) -> bool | None:
    """Whether the two runs' adapter files have the same bytes; None where one of them has none."""
    before, now = (place / "adapter" / WEIGHTS for place in (source, folder))
    return filecmp.cmp(before, now, shallow=False) if before.is_file() and now.is_file() else None


def _same_threads(stored: Record) -> None:
    """Lets torch compute on as many threads as the record says: the order of a sum depends on them."""
    import torch

    threads = stored["environment"].get("threads")
    if isinstance(threads, int) and threads > 0 and threads != torch.get_num_threads():
        log.info("computes on %d threads, as the record did", threads)
        torch.set_num_threads(threads)
