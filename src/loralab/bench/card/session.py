"""The stages' results so far, on disk as they come, and the processes that make them, each with a deadline."""

import json
import logging
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from loralab.bench.card.shapes import CARD, CPU, write_rows
from loralab.bench.processes import Late, ProcessError, Row, WorkerProcess
from loralab.memory.ledgers import GIB
from loralab.records import record

log = logging.getLogger(__name__)

RECORDS = "records.jsonl"
NO_RECORD = "it left no record"
TOO_LITTLE = "this card has too little memory"
FEWEST_S = 8.0  # a process with less time than this is not started


class Skipped(Exception):  # noqa: N818 - as Late
    """What the stage needs is not installed, or more than the card has."""


class CardSession:
    """One ``make gpu``. ``rehearsal``: tiny shapes on the CPU. Below ``out`` there are at most three files:
    gpu.json, index.html, and the runs' records, a line each."""

    def __init__(self, out: Path, rehearsal: bool, work: Path, budgets: Mapping[str, float]) -> None:
        self.out, self.rehearsal, self.work, self.budgets = out, rehearsal, work, budgets
        self.sizes, self.device = (CPU, "cpu") if rehearsal else (CARD, "cuda")
        self.deadline = self.begun = time.monotonic()
        self.free_bytes: int | None = None  # in place of what the card has free
        self.result: Row = {
            **{"schema": 2, "rehearsal": rehearsal, "device": self.device},
            **{"date": datetime.now(UTC).isoformat("T", "seconds"), "seconds": 0.0, "stages": {}},
        }
        write_rows(work)
        for name in ("gpu.json", "index.html", RECORDS):
            (out / name).unlink(missing_ok=True)

    def save(self) -> None:
        """gpu.json and the page, as they stand; no page where what draws it is not installed, as on a card's machine
        that has what trains alone."""
        self.result["seconds"] = round(time.monotonic() - self.begun, 1)
        record.replace(self.out / "gpu.json", self.result)
        try:
            from loralab.reporting import card

            page = card.page(self.result)
        except ImportError as missing:
            log.debug("no page: %s", missing)
            return
        (self.out / "index.html").write_text(page, "utf-8")

    def stage(self, name: str, work: Callable[["CardSession", Row], None]) -> None:
        """Runs ``work`` until its time, with all that earlier stages left, is spent. What it measured by then is kept,
        and its end is in ``status``: ok, failed, timeout or skipped (and ``error`` says why)."""
        names = list(self.budgets)
        self.deadline = self.begun + sum(self.budgets[earlier] for earlier in names[: names.index(name) + 1])
        # failed until it is known to be otherwise: a reader of gpu.json may come at any time
        stage: Row = {"status": "failed", "seconds": 0.0, "error": "it had not ended when this was written"}
        started, self.result["stages"][name] = time.monotonic(), stage
        log.info("%s, at most %.0f s", name, self.deadline - started)
        try:
            self.save()
            work(self, stage)
            stage.update(status="ok", error=None)
        except Late as late:
            stage.update(status="timeout", error=str(late))
        except Skipped as why:
            stage.update(status="skipped", error=str(why))
        except Exception as error:
            stage.update(error=f"{type(error).__name__}: {' '.join(str(error).split())[-2000:]}")
        finally:
            stage["seconds"] = round(time.monotonic() - started, 1)
            self.save()
        log.info("%s: %s after %.0f s%s", name, stage["status"], stage["seconds"], f": {stage['error'] or ''}")

    @property
    def first_device(self) -> str:
        """Of the cards that this process may use."""
        return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

    def worker(self, engine: str, setup: Row | None = None, **environment: str) -> WorkerProcess:
        """A process until the stage's deadline. Raises Late where too little time is left to start it."""
        seconds_left = self.deadline - time.monotonic()
        if seconds_left < FEWEST_S:
            raise Late(f"{max(0.0, seconds_left):.0f} s were left for {engine}")
        variables = {"PYTORCH_CUDA_ALLOC_CONF": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")}
        variables |= {"CUDA_VISIBLE_DEVICES": self.first_device, **environment}
        if self.rehearsal:  # threads that wait for each other in tiny shapes cost most where others compute too
            variables |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        setup = {"device": self.device, "free_bytes": self.free_bytes, **(setup or {})}
        return WorkerProcess(engine, setup, self.work, variables, self.deadline)

    def keep(self, folder: Path, stage: str, name: str) -> tuple[Row, list[Row]]:
        """A run's record and metrics, which then are a line of the records' file and no longer a folder."""
        metrics = folder / "metrics.jsonl"
        stored = record.read(folder)
        rows = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()] if metrics.is_file() else []
        with (self.out / RECORDS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, "name": name, "record": stored, "metrics": rows}) + "\n")
        shutil.rmtree(folder)
        return stored, rows


class Case(NamedTuple):
    """``about``: what its row says beside its record; ``trials``: seeds that share a pass."""

    about: Row
    words: list[str]
    trials: int = 1


def trainer(session: CardSession, **environment: str) -> WorkerProcess:
    """A process that pays once for its imports and for CUDA's context."""
    setup = {"words": [], "folder": str(session.work), "anew": True}
    return session.worker("loralab.bench.ours.Loralab", setup, **environment)


def run_all(
    session: CardSession, stage: str, rows: list[Row], cases: list[Case], fit: int | None = None, **environment: str
) -> None:
    """Appends a row for each case to ``rows``, in one process; one that left no record has an error, and so have those
    that wait when the process ends. ``fit``: how many trials there is memory for."""
    with trainer(session, **environment) as worker:
        for number, case in enumerate(cases):
            name = f"{stage}{number}"
            try:
                answer = worker.ask({"name": name, "words": case.words, "trials": case.trials, "fit": fit})
            except ProcessError as error:
                answer = {"failure": str(error)}
            row = outcome(session, stage, name)
            if "failure" in answer and (row["status"] == "running" or row["error"] == NO_RECORD):
                row.update(status="failed", error=answer["failure"])
            if "skipped" in answer:
                row.update(status="skipped", error=answer["skipped"])
            row.update({key: answer.get(key) for key in ("seconds", "left_bytes")})
            rows.append({**case.about, **row})
            session.save()


def outcome(session: CardSession, stage: str, name: str) -> Row:
    """What the records below the folder ``name`` say; of several, those of one pass, the first and all outcomes."""
    folders = record.find(session.work / name)
    stored_runs = [session.keep(folder, stage, f"{name}/{folder.name}") for folder in folders]
    if not stored_runs:
        return {"status": "failed", "error": NO_RECORD}
    row = summary(*stored_runs[0])
    if len(stored_runs) > 1:
        row["statuses"] = sorted({stored["status"] for stored, _ in stored_runs})
        row["pack_sizes"] = sorted(stored["pack"]["size"] for stored, _ in stored_runs)
        row["halved"] = [stored["pack"].get("halved") for stored, _ in stored_runs]
        row["status"] = next((status for status in row["statuses"] if status != "completed"), "completed")
    return row


def summary(stored: Row, rows: list[Row]) -> Row:
    """The numbers of a record that are about memory and time."""
    memory = stored["memory"]
    predicted, measured = memory["predicted_peak_bytes"], memory["measured_peak_bytes"]
    steps = [row for row in rows if "time/optimizer_s" in row and row["step"] > 2]  # the first two warm up
    step_seconds = [
        sum(row.get(f"time/{phase}_s", 0.0) for phase in ("forward", "backward", "optimizer")) for row in steps
    ]
    return {
        **{key: stored.get(key) for key in ("status", "error", "exit_code", "resumed_from")},
        **{**stored["optimizer"], **memory, **stored["time"]},
        "predicted_over_measured": predicted / measured if predicted and measured else None,
        "parameters": stored["base"].get("parameters"),
        "trainable_parameters": stored["adapter"].get("trainable_parameters"),
        "step_s": statistics.median(step_seconds) if step_seconds else None,
        "optimizer_step_s": statistics.median(row["time/optimizer_s"] for row in steps) if steps else None,
        "slowest_optimizer_step_s": max((row["time/optimizer_s"] for row in steps), default=None),
        "losses": [row["train/loss"] for row in rows if "train/loss" in row],
        **series(rows),
    }


def series(rows: list[Row]) -> Row:
    """The memory of each step that has a row, in GiB: ``series``, torch's highest peak and, of paged state, what of it
    was on the card; and ``evicted_bytes``, the most that was not, None where nothing is paged."""
    phases = ("forward", "backward", "optimizer")
    found: Row = {"step": [], "peak_gib": [], "managed_resident_gib": []}
    evicted: list[float] = []
    for row in rows:
        peaks = [row[f"memory/{phase}_peak_gib"] for phase in phases if f"memory/{phase}_peak_gib" in row]
        if peaks:
            resident = row.get("memory/managed_resident_gib")
            for name, value in (("step", row["step"]), ("peak_gib", max(peaks)), ("managed_resident_gib", resident)):
                found[name].append(value)
            if resident is not None:
                evicted.append(row["memory/managed_gib"] - resident)
    return {"series": found, "evicted_bytes": round(max(evicted) * GIB) if evicted else None}


def check_ends(rows: Iterable[Row], allowed: tuple[str, ...] = ("completed",)) -> None:
    """Raises Skipped where there was memory for none of ``rows``, else RuntimeError for the first that ended otherwise;
    of some that there was no memory for their own rows say so."""
    rows = list(rows)
    skipped = [row for row in rows if row["status"] == "skipped"]
    if skipped and len(skipped) == len(rows):
        raise Skipped(f"{TOO_LITTLE}: {skipped[0]['error']}")
    for row in rows:
        if row in skipped:
            continue
        if row["status"] not in allowed:
            name = next(row[key] for key in ("case", "optimizer", "model", "run") if row.get(key))
            raise RuntimeError(f"{name}: {row['status']}: {row['error']}")
