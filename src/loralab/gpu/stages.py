"""What is measured, stage by stage: machine, tests, speed, plan, resume, halving (paging has a file of its own)."""

import signal
import statistics
import subprocess
import time
from importlib.util import find_spec
from typing import Any

import torch

from loralab.gpu.callbacks import KILL_AFTER
from loralab.gpu.session import POLL_S, SOURCE, Late, ProcessError, Row, Session, Skipped
from loralab.gpu.shapes import Shape, common, sizes
from loralab.records import record

SCHEMES = ("none", "nf4_double")
R = 8
TRIALS = 8  # of a pack that has to be divided
STEPS, KILLED_AT, CHECKPOINT_EVERY = 10, 5, 2  # the step after the last checkpoint is made twice
KILL = "+callbacks.kill._target_=loralab.gpu.callbacks.Kill"
NO_RECORD = "it left no record"
PAGED = ("optimizer=paged_adamw", "optimizer.flat=true", "quantization=nf4_double")


def machine(session: Session, told: Row) -> None:
    """The card, the driver, the versions, what the doctor says, and what the libraries take before any model."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.used", "--format=csv,noheader"]
        told["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        told["nvidia_smi"] = f"not available ({error})"
    told["cuda"] = torch.version.cuda
    words = told["nvidia_smi"].splitlines()[:1] or [""]
    used = words[0].rpartition(",")[2].strip().removesuffix(" MiB")
    job = {"used_before": int(used) * 2**20 if used.isdigit() else None}
    for row in session.lines("loralab.gpu.constants", job):
        told.update(row)
    if session.rehearsal:
        told["stood_in"] = "bytes that this process grows by, for those that a card's context and libraries take"


def tests(session: Session, told: Row) -> None:
    """The tests that need a card. Raises Skipped where they or pytest are not there."""
    root = SOURCE.parent
    if find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    if not (root / "tests" / "gpu").is_dir():
        raise Skipped("the tests are not part of this installation")
    if session.rehearsal:
        told["stood_in"] = "without a card each of these tests skips itself: what is shown is that they are found"
    words = ["-m", "pytest", "-m", "gpu", "tests/gpu", "-q", "-rs", "-p", "no:cacheprovider"]
    with session.python(*words, cwd=root) as process:
        while not process.ended(POLL_S):
            if time.monotonic() > session.deadline:
                raise Late(f"stopped in the tests: {process.said(300)}")
        said = process.said(6000)
    told.update(exit_code=process.code, summary=said.splitlines()[-1] if said else "", output=said)
    if process.code:
        raise RuntimeError(told["summary"])


def speed(session: Session, told: Row) -> None:
    """K trials in one pass, for several K, and one trial of PEFT; each base has a process a side."""
    measured = sizes(session.rehearsal)
    told["bases"], errors = [], []
    for number, (shape, trials) in enumerate(measured.speed):
        base: Row = {"model": shape.name, "length": shape.length, "rows": shape.rows, "quantization": "nf4_double"}
        base["sides"] = []
        told["bases"].append(base)
        folder = session.work / f"speed{number}"
        job = {
            **{"device": session.found["device"], "config": shape.config, "length": shape.length, "rows": shape.rows},
            **{"r": R, "trials": trials, "steps": measured.steps, "folder": str(folder)},
            **{"train": str(session.work / "rows.jsonl"), "validation": str(session.work / "held_out.jsonl")},
        }
        for side in ("speed", "peft"):
            if side == "peft" and find_spec("peft") is None:
                base["note"] = "peft is not installed"
                continue
            try:
                for row in session.lines(f"loralab.gpu.{side}", job):
                    base["sides"].append(row)
                    session.save()
            except ProcessError as error:
                errors.append(f"{shape.name}: {error}")
        compare(base)
        errors += [f"{shape.name}, {one['trials']} trials: {one['error']}" for one in base["sides"] if "error" in one]
    if errors:
        raise RuntimeError("; ".join(errors))


def compare(base: Row) -> None:
    """Tokens a second of each side over those of loralab with one trial a pass, and over PEFT's."""
    rates = {(one["name"], one["trials"]): one["tokens_per_s"] for one in base["sides"] if "tokens_per_s" in one}
    alone = rates.get(("loralab", 1))
    peft = next((rate for (name, _), rate in rates.items() if name != "loralab"), None)
    for one in base["sides"]:
        if "tokens_per_s" in one:
            one["over_alone"] = one["tokens_per_s"] / alone if alone else None
            one["over_peft"] = one["tokens_per_s"] / peft if peft else None


def plan(session: Session, told: Row) -> None:
    """Predicted beside measured peaks of real trainings, all in one process."""
    measured, cases = sizes(session.rehearsal), list[tuple[Row, list[str]]]()
    for shape in measured.plan:
        for scheme in SCHEMES:
            cases.append(_case(session, shape, scheme))
    last = measured.plan[-1]
    cases.append(_case(session, last, "nf4_double", "ragged", rows="ragged"))
    cases.append(_case(session, last, "nf4_double", "checkpointed", "model.gradient_checkpointing=true"))
    several = f"seed={','.join(map(str, range(4)))}"
    packed = ["hydra/launcher=packed", "hydra.launcher.pack=auto", "hydra.launcher.token_budget=65536"]
    cases.append(_case(session, last, "nf4_double", "4 trials in a pass", several, *packed))
    told["runs"] = []
    for about, found in trained(session, "plan", cases):
        told["runs"].append({**about, **found})
        session.save()
    ratios = [one["predicted_over_measured"] for one in told["runs"] if one.get("predicted_over_measured")]
    told["worst_ratio"] = max(ratios, key=lambda ratio: abs(ratio - 1), default=None)
    told["within_5_percent"] = sum(abs(ratio - 1) <= 0.05 for ratio in ratios)
    complain(told["runs"])


def _case(
    session: Session, shape: Shape, scheme: str, case: str = "", *words: str, rows: str = "rows"
) -> tuple[Row, list[str]]:
    about = {"model": shape.name, "quantization": scheme, "case": case, "length": shape.length, "rows": shape.rows}
    fixed = [f"quantization={scheme}", "trainer.max_steps=4", "plan.record=true", *common(session.rehearsal, rows)]
    return about, [*shape.words(), *fixed, *words]


def trained(
    session: Session,
    stage: str,
    cases: list[tuple[Row, list[str]]],
    environment: dict[str, str] | None = None,
    room: Row | None = None,
) -> Any:
    """(case, what its record says) of each of ``cases``, in one process; one that left no record has an error.

    A process that ends before all of them are done takes the rest with it: they are told as failed.
    """
    jobs: list[Row] = []
    for number, (_, words) in enumerate(cases):
        folder = f"{stage}{number}"
        many = any(word.startswith("seed=") and "," in word for word in words)
        where = ["-m", f"hydra.sweep.dir={folder}"] if many else [f"hydra.run.dir={folder}"]
        jobs.append({"name": folder, "words": [*words, *where], "room": room})
    waiting = {job["name"]: about for job, (about, _) in zip(jobs, cases, strict=True)}
    try:
        for row in session.lines("loralab.gpu.lab", jobs, environment):
            about = waiting.pop(row["name"])
            yield about, {**outcome(session, stage, row["name"]), **row}
    except ProcessError as error:
        for name, about in waiting.items():
            found = outcome(session, stage, name)
            if found["status"] == "running" or found["error"] == NO_RECORD:
                found.update(status="failed", error=str(error))
            yield about, found


def outcome(session: Session, stage: str, name: str) -> Row:
    """What the records below the folder ``name`` say; of several, those of one pass, the first and all outcomes."""
    folders = record.find(session.work / name)
    kept = [found for folder in folders if (found := session.keep(folder, stage, f"{name}/{folder.name}"))]
    if not kept:
        return {"status": "failed", "error": NO_RECORD}
    told = summary(*kept[0])
    if len(kept) > 1:
        told["statuses"] = sorted({found["status"] for found, _ in kept})
        told["pack_sizes"] = sorted(found["pack"]["size"] for found, _ in kept)
        told["halved"] = [found["pack"].get("halved") for found, _ in kept]
        told["status"] = next((one for one in told["statuses"] if one != "completed"), "completed")
    return told


def summary(found: Row, rows: list[Row]) -> Row:
    """The numbers of a record that are about memory and time."""
    memory, spent, optimizer = found["memory"], found["time"], found["optimizer"]
    predicted, measured = memory["predicted_peak_bytes"], memory["measured_peak_bytes"]
    steps = [row for row in rows if "time/optimizer_s" in row and row["step"] > 2]  # the first two warm up
    whole = [sum(row.get(f"time/{phase}_s", 0.0) for phase in ("forward", "backward", "optimizer")) for row in steps]
    kept = ("reserved_by_phase", "by_phase", "ballast_bytes", "cap_bytes", "simulated", "spike_count")
    return {
        **{"status": found["status"], "error": found["error"]},
        **{"predicted_peak_bytes": predicted, "measured_peak_bytes": measured},
        "predicted_over_measured": predicted / measured if predicted and measured else None,
        "parameters": found["base"].get("parameters"),
        "trainable_parameters": found["adapter"].get("trainable_parameters"),
        **{key: optimizer.get(key) for key in ("effective_name", "state_bytes", "paged_bytes", "paging", "note")},
        **{key: memory[key] for key in kept if key in memory},
        **{key: value for key, value in memory.items() if key.startswith(("managed", "device_used", "host_"))},
        **{key: spent[key] for key in ("steps", "startup_s", "train_s", "wall_s", "tokens", "tokens_per_s")},
        "step_s": statistics.median(whole) if whole else None,
        "optimizer_step_s": statistics.median(row["time/optimizer_s"] for row in steps) if steps else None,
        "slowest_optimizer_step_s": max((row["time/optimizer_s"] for row in steps), default=None),
        "resumed_from": found.get("resumed_from"),
        "losses": [row["train/loss"] for row in rows if "train/loss" in row],
    }


def complain(runs: list[Row], allowed: tuple[str, ...] = ("completed",)) -> None:
    """Raises RuntimeError for the first that ended otherwise."""
    for one in runs:
        if one["status"] not in allowed:
            name = next(one[key] for key in ("case", "optimizer", "model", "run") if one.get(key))
            raise RuntimeError(f"{name}: {one['status']}: {one['error']}")


def resume(session: Session, told: Row) -> None:
    """A run with a paged optimizer that is killed and taken up by another process, beside one that is not."""
    words = [*sizes(session.rehearsal).large.words(), *common(session.rehearsal), *PAGED, f"trainer.max_steps={STEPS}"]
    words += [KILL, f"callbacks.checkpoint.every_n_steps={CHECKPOINT_EVERY}", "plan.record=false", "adapter.r=64"]
    killed: Row = {"name": "resumed", "words": [*words, "hydra.run.dir=resumed"], "room": None}
    _kill(session, killed)
    jobs: list[Row] = [killed, {"name": "undisturbed", "words": [*words, "hydra.run.dir=undisturbed"], "room": None}]
    told["runs"] = []
    for row in session.lines("loralab.gpu.lab", jobs):
        told["runs"].append({"run": row["name"], **outcome(session, "resume", str(row["name"])), **row})
        session.save()
    complain(told["runs"])
    _alike(told, *told["runs"])


def _kill(session: Session, job: Row) -> None:
    """Runs ``job``, which kills itself. Raises RuntimeError where it ends otherwise."""
    try:
        for row in session.lines("loralab.gpu.lab", [job], {KILL_AFTER: str(KILLED_AT)}):
            raise LookupError(f"the run was to be killed after {KILLED_AT} steps, and ended with {row['exit_code']}")
    except ProcessError as end:
        if end.code != -signal.SIGKILL:
            raise


def _alike(told: Row, resumed: Row, whole: Row) -> None:
    """Losses are those of metrics.jsonl, where steps made twice are written once."""
    pairs = list(zip(whole["losses"], resumed["losses"], strict=True))
    told["loss_difference"] = max(abs(a - b) / abs(a) for a, b in pairs)
    told["same_bits"] = all(a == b for a, b in pairs)
    told["same_paged_bytes"] = whole["paged_bytes"] == resumed["paged_bytes"]
    told["resumed_from"] = resumed["resumed_from"]
    if not resumed["resumed_from"]:
        raise RuntimeError("the second process began anew")
    if not told["same_paged_bytes"]:
        raise RuntimeError(f"{whole['paged_bytes']} bytes were paged, {resumed['paged_bytes']} after the resume")


def halving(session: Session, told: Row) -> None:
    """A pack for which there is too little memory: it has to be divided, and every trial has to end well."""
    shape = sizes(session.rehearsal).large
    words = [*shape.words(), *common(session.rehearsal), "quantization=nf4_double", "trainer.max_steps=4"]
    words += ["plan.record=false", "callbacks.memory.profiled_step=null"]
    room = {"words": words, "trials": TRIALS, "fit": TRIALS // 2}
    several = [f"seed={','.join(map(str, range(TRIALS)))}", "hydra/launcher=packed", "hydra.launcher.pack=auto"]
    case = {"case": f"{TRIALS} trials"}
    if session.rehearsal:
        told["stood_in"] = f"from the second step on the refusal of memory for more than {TRIALS // 2} trials is raised"
    ((_, found),) = trained(
        session, "halving", [(case, [*words, *several, "hydra.launcher.token_budget=65536"])], room=room
    )
    told["runs"] = [{**case, **found}]
    complain(told["runs"])
    if not all(found["halved"]):
        raise RuntimeError(f"the pack was not divided: there was room for {TRIALS} trials")
