"""sweep.json: the question of a sweep, its axes and the status of each trial."""

import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.config import identity
from loralab.config.sweep_files import SETTINGS, own_files
from loralab.errors import ArtifactError, ConfigError
from loralab.records import record
from loralab.records.lock import hold
from loralab.records.secrets import redact
from loralab.scheduling.job import Job

CALL = ("overrides", "hydra_overrides", "flags", "cwd")  # of sweep.json: how the sweep was called
WRITTEN_EVERY = 1.0  # seconds, and
QUICK = 0.02  # seconds, that the file of a thousand trials takes
SHARE = 0.05  # of the time, at most, goes into writing: the file of 10,000 trials takes 40 ms


class SweepFile:
    """Trials of earlier calls stay listed: a call with fewer seeds or other settings hides nothing. Of an earlier form
    of the same call only those that have a record do.

    A status is set entry by entry and written at most once a second, of very many trials less often; ``begin`` writes
    without that second, ``flush`` at once.
    """

    def __init__(
        self, folder: Path, header: Mapping[str, Any], jobs: Sequence[Job], known: Collection[str] = ()
    ) -> None:
        """``header``: what the sweep asks and how it was called; ``known``: trials that have a record of this version,
        which is not looked for."""
        self.folder = folder
        entries = {job.trial: _entry(folder, job) for job in jobs}
        calls = _called(folder, header)
        listed = _earlier_entries(folder, entries, known, open_too=bool(calls))
        earlier = [entries.pop(entry["trial"], {**entry, "earlier": True}) for entry in listed]
        trials = [*earlier, *entries.values()]
        axes = swept_axes([list(entry.get("overrides") or []) for entry in trials])
        content = {**header, "axes": axes, "trials": trials, **_decided(folder), **calls}
        self.content: dict[str, Any] = redact(content)  # once: statuses hold no secrets
        self._entries = {entry["trial"]: entry for entry in self.content["trials"]}
        present = [entry["trial"] for entry in trials if not entry.get("earlier")]
        self.places = {trial: place for place, trial in enumerate(present, 1)}
        self._stale = False  # whether the file lacks a status
        self.flush()

    def set(self, trial: str, status: str) -> None:
        entry = self._entries[trial]
        self._stale = self._stale or entry["status"] != status
        entry["status"] = status
        self._flush_after(WRITTEN_EVERY)

    def begin(self, trials: Iterable[str]) -> None:
        """The trials are running, and for as long as they do nothing more may be set."""
        for trial in trials:
            self.set(trial, "running")
        self._flush_after(0.0, QUICK)

    def _flush_after(self, seconds: float, quick: float = 0.0) -> None:
        """Writes what is new, unless the last time is not so long ago, or took so long that it would be too much of the
        time; ``quick``: seconds that are never too much."""
        share = self._took / SHARE if self._took > quick else 0.0
        if self._stale and time.monotonic() - self._written >= max(seconds, share):
            self.flush()

    def flush(self) -> None:
        begun = time.monotonic()
        record.write_sweep(self.folder, self.content, redacted=True)
        self._written, self._stale = time.monotonic(), False
        self._took = self._written - begun

    def label(self, job: Job) -> str:
        """The overrides of the swept axes; all overrides where the trial has none of them."""
        words = [word.lstrip("+") for word in job.overrides]
        return "  ".join([word for word in words if word.split("=")[0] in self.content["axes"]] or words)


def decide(folder: Path, decisions: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Writes what a sweep has decided so far into its sweep.json, in place of earlier decisions on the same arms;
    ``about``: what else it says now."""
    if not (decisions or about) or not (folder / record.SWEEP).exists():
        return  # the trials of another task than loralab's have no sweep.json
    arms = [decision["arm"] for decision in decisions]
    with hold(folder):
        stored = record.read_sweep(folder)
        others = [one for one in stored.get("decisions") or [] if one.get("arm") not in arms]
        record.write_sweep(folder, {**stored, **about, "decisions": [*others, *decisions]})


def mark(folder: Path, statuses: Mapping[str, str]) -> None:
    """Sets the ``statuses`` of trials in the sweep.json of ``folder``."""
    with hold(folder):
        stored = record.read_sweep(folder)
        for entry in stored["trials"]:
            if entry.get("trial") in statuses:
                entry["status"] = statuses[entry["trial"]]
        record.write_sweep(folder, stored)


def _decided(folder: Path) -> dict[str, Any]:
    """``decisions`` of the sweep.json there; empty where it has none."""
    try:
        stored = record.read_sweep(folder)
    except ArtifactError:
        return {}
    return {"decisions": stored["decisions"]} if stored.get("decisions") else {}


def calls_of(stored: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The calls that ``--resume`` finishes, the first of them first; each has ``overrides``, and other keys of CALL."""
    listed = [call for call in stored.get("calls") or [] if isinstance(call, Mapping)] or [stored]
    called: list[dict[str, Any]] = [{key: call.get(key) for key in CALL} for call in listed if call.get("overrides")]
    return [{**call, "overrides": [str(word) for word in call["overrides"]]} for call in called]


def _called(folder: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """``calls``: those of the sweep.json there, and that of ``header``, which takes the place of one that has asked for
    the same trials. Empty where it is the only one."""
    try:
        before = calls_of(record.read_sweep(folder))
    except ArtifactError:
        return {}
    present = {key: header.get(key) for key in CALL}
    calls = [present if _asked(call) == _asked(present) else call for call in before]
    calls += [] if present in calls else [present]
    return {"calls": calls} if len(calls) > 1 else {}


def _asked(call: Mapping[str, Any]) -> list[str]:
    """The words of a call that say which trials it asks for."""
    return sorted(word for word in call.get("overrides") or () if identity.decides(word))


def check_begun(folder: Path, jobs: Sequence[Job]) -> None:
    """Raises ConfigError where the sweep in ``folder`` does not list one of ``jobs``, with which it is to be finished:
    a file of the user's that they are made of has changed since it was begun."""
    stored = record.read_sweep(folder)
    if stored.get("schema", record.SCHEMA) < record.SCHEMA:  # which named the same trials otherwise
        return
    listed = {entry.get("trial") for entry in stored["trials"]}
    other = [job for job in jobs if job.trial not in listed]
    files = own_files(other[0].choices) if other else []
    if not files:
        return
    raise ConfigError(
        f"{', '.join(files)}: one of these has changed since {folder} was begun: {len(other)} of {len(jobs)} trials are"
        f" none of those that it lists, as {' '.join(other[0].overrides)}; valid: the files as they were, or the sweep"
        " by its name, which runs the trials of today's files beside the finished ones"
    )


def swept_axes(trials: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """{swept key: its values in order} over the trials' own overrides; a key that some trials lack stands where it
    stands in those that have it."""
    axes: dict[str, dict[str, None]] = {}  # values in order
    order: list[str] = []
    settings = [dict(word.lstrip("+").split("=", 1) for word in overrides if "=" in word) for overrides in trials]
    for overrides in settings:
        before = ""
        for key, value in overrides.items():
            if key not in axes:
                axes[key] = {}
                order.insert(order.index(before) + 1 if before else 0, key)
            axes[key][value] = None
            before = key
    return {key: list(axes[key]) for key in order if (len(axes[key]) > 1 or len(settings) == 1) and _may_be_axis(key)}


def _may_be_axis(key: str) -> bool:
    """False of what two calls of one sweep may say differently about the same trials."""
    return key not in SETTINGS and key.partition(".")[0].partition("/")[0] not in ("logger", "plan")


def _entry(folder: Path, job: Job) -> dict[str, Any]:
    return {
        "trial": job.trial,
        "folder": os.path.relpath(job.folder, folder),
        "status": status_of(job.folder),
        "overrides": job.overrides,
        "choices": job.choices,
    }


def status_of(folder: Path) -> str:
    """The status of the record in ``folder``, as ``loralab ls`` has it; ``pending`` where there is none or it cannot be
    read."""
    try:
        return record.status(record.read(folder))
    except ArtifactError:
        return "pending"


def _earlier_entries(
    folder: Path, entries: Mapping[str, Mapping[str, Any]], known: Collection[str], open_too: bool
) -> list[dict[str, Any]]:
    """Trials that sweep.json already lists and that are in ``entries``, whose order is kept, or that have a record, or
    (``open_too``) not yet one; without those of an earlier version of loralab that ``entries`` lists under a new id."""
    try:
        listed: list[dict[str, Any]] = record.read_sweep(folder)["trials"]
    except ArtifactError:
        return []
    overrides = {tuple(sorted(entry["overrides"])) for entry in entries.values()}
    return [
        entry
        for entry in listed
        if "trial" in entry
        and (
            entry["trial"] in known or entry["trial"] in entries or not _is_left_out(folder, entry, overrides, open_too)
        )
    ]


def _is_left_out(folder: Path, entry: Mapping[str, Any], overrides: set[tuple[str, ...]], open_too: bool) -> bool:
    place = folder / str(entry["folder"])
    try:
        schema = record.read(place)["schema"]
    except ArtifactError:  # there is no record, or it cannot be read
        return not open_too
    return bool(schema < record.SCHEMA and tuple(sorted(entry.get("overrides") or [])) in overrides)
