"""What is measured, stage by stage: machine, tests, plan, resume, halving, workers (speed and paging: own files)."""

import signal
import subprocess
from importlib.util import find_spec
from typing import Any

import torch

from loralab.bench.card.session import TOO_LITTLE, CardSession, Case, Skipped, check_ends, run_all, trainer
from loralab.bench.card.shapes import Shape
from loralab.bench.processes import SOURCE, ProcessError, Row
from loralab.records import record

TRIALS = 8  # of a pack that has to be divided
STEPS, KILLED_AT, CHECKPOINT_EVERY = 10, 5, 2  # the step after the last checkpoint is made twice
SAME_LOSS = 1e-2  # relative, of bf16 in other packs
NF4 = "quantization=nf4_double"
PER_USE = "quantization.dequantize=per_use"  # where memory is measured or short on purpose


def machine(session: CardSession, stage: Row) -> None:
    """The card, the driver, the versions, what the doctor says, and what the libraries take before any model."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.used", "--format=csv,noheader"]
        stage["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        stage["nvidia_smi"] = f"not available ({error})"
    stage["cuda"] = torch.version.cuda
    if session.rehearsal:
        stage["stood_in"] = "bytes that this process grows by, for those that a card's context and libraries take"
    sizes = card_bytes(stage["nvidia_smi"])
    with session.worker("loralab.bench.card.constants.Constants") as worker:
        answer = worker.ask({"used_before": sizes[1] if sizes else None})
        stage.update({key: answer[key] for key in ("constants", "environment", "doctor")})


def card_bytes(nvidia_smi: str) -> tuple[int, int] | None:
    """(all, used) of the first card; None where nvidia-smi did not answer."""
    words = (nvidia_smi.splitlines() or [""])[0].split(",")[-2:]
    sizes = [word.strip().removesuffix(" MiB") for word in words]
    return (int(sizes[0]) << 20, int(sizes[1]) << 20) if all(size.isdigit() for size in sizes) else None


def tests(session: CardSession, stage: Row) -> None:
    """The tests that need a card. Raises Skipped where they or pytest are not there."""
    root = SOURCE.parent
    if find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    if not (root / "tests" / "gpu").is_dir():
        raise Skipped("the tests are not part of this installation")
    if session.rehearsal:
        stage["stood_in"] = "without a card each of these tests skips itself: what is shown is that they are found"
    words = ["-m", "pytest", "-m", "gpu", "tests/gpu", "-q", "-rs", "-p", "no:cacheprovider"]
    with session.worker("loralab.bench.worker.Python") as worker:
        try:
            answer = worker.ask({"words": words, "folder": str(root)})
        finally:  # also of tests that the time did not suffice for
            output = worker.tail(6000)
            stage.update(summary=output.splitlines()[-1] if output else "", output=output)
    stage["exit_code"] = answer["exit_code"]
    if answer["exit_code"]:
        raise RuntimeError(stage["summary"])


def plan(session: CardSession, stage: Row) -> None:
    """Predicted beside measured peaks of real trainings, all in one process."""

    def case(shape: Shape, scheme: str, name: str = "", *words: str, trials: int = 1, rows: str = "rows") -> Case:
        about = {"model": shape.name, "quantization": scheme, "case": name, "length": shape.length, "rows": shape.rows}
        words = (f"quantization={scheme}", "trainer.max_steps=4", "plan.record=true", *words)
        return Case(about, [*shape.words(session.device, rows), *words], trials)

    last = session.sizes.plan[-1]
    cases = [case(shape, scheme) for shape in session.sizes.plan for scheme in ("none", "nf4_double")]
    cases.append(case(last, "nf4_double", "ragged", rows="ragged"))
    cases.append(case(last, "nf4_double", "checkpointed", "model.gradient_checkpointing=true"))
    cases.append(case(last, "nf4_double", "4 trials in a pass", trials=4))
    cases.append(case(session.sizes.largest, "nf4_double", "checkpointed", "model.gradient_checkpointing=true"))
    stage["runs"] = []
    run_all(session, "plan", stage["runs"], cases)
    ratios = [run["predicted_over_measured"] for run in stage["runs"] if run.get("predicted_over_measured")]
    stage["worst_ratio"] = max(ratios, key=lambda ratio: abs(ratio - 1), default=None)
    stage["within_5_percent"] = sum(abs(ratio - 1) <= 0.05 for ratio in ratios)
    check_ends(stage["runs"])


def resume(session: CardSession, stage: Row) -> None:
    """A run with a paged optimizer that is killed and taken up by another process, beside one that is not."""
    words = [*session.sizes.large.words(session.device), NF4, "optimizer=paged_adamw", "optimizer.flat=true"]
    words += [f"trainer.max_steps={STEPS}", f"callbacks.checkpoint.every_n_steps={CHECKPOINT_EVERY}"]
    words += ["plan.record=false", "adapter.r=64"]
    cases = [Case({"run": name}, words) for name in ("resumed", "undisturbed")]
    with trainer(session) as worker:
        try:
            answer = worker.ask({"name": "resume0", "words": words, "kill_after": KILLED_AT})
            if "skipped" in answer:
                raise Skipped(f"{TOO_LITTLE}: {answer['skipped']}")
            raise LookupError(f"the run was to be killed after {KILLED_AT} steps, and ended")
        except ProcessError as end:
            if end.code != -signal.SIGKILL:
                raise
    stage["runs"] = []
    run_all(session, "resume", stage["runs"], cases)
    check_ends(stage["runs"])
    compare_resumed(stage, *stage["runs"])


def compare_resumed(stage: Row, resumed: Row, undisturbed: Row) -> None:
    """Losses are those of metrics.jsonl, where steps made twice are written once. Raises RuntimeError for a run that
    began anew, or pages other bytes."""
    pairs: list[tuple[Any, Any]] = list(zip(undisturbed["losses"], resumed["losses"], strict=True))
    stage["loss_difference"] = max(abs(a - b) / abs(a) for a, b in pairs)
    stage["same_bits"] = all(a == b for a, b in pairs)
    stage["same_paged_bytes"] = undisturbed["paged_bytes"] == resumed["paged_bytes"]
    stage["resumed_from"] = resumed["resumed_from"]
    if not resumed["resumed_from"]:
        raise RuntimeError("the second process began anew")
    if not stage["same_paged_bytes"]:
        raise RuntimeError(f"{undisturbed['paged_bytes']} bytes were paged, {resumed['paged_bytes']} after the resume")


def halving(session: CardSession, stage: Row) -> None:
    """A pack for which there is too little memory: it has to be divided, and every trial has to end well."""
    fit = TRIALS // 2
    if session.rehearsal:
        stage["stood_in"] = f"from the second step on the refusal of memory for more than {fit} trials is raised"
    words = [*session.sizes.large.words(session.device), NF4, "trainer.max_steps=4", "plan.record=false", PER_USE]
    case = Case({"case": f"{TRIALS} trials"}, [*words, "callbacks.memory.profiled_step=null"], TRIALS)
    stage["runs"] = []
    run_all(session, "halving", stage["runs"], [case], fit)
    check_ends(stage["runs"])
    if not all(stage["runs"][0]["halved"]):
        raise RuntimeError(f"the pack was not divided: there was room for {TRIALS} trials")


def workers(session: CardSession, stage: Row) -> None:
    """A sweep in two processes that share the card, beside the same in one: the same losses?"""
    shape, device = session.sizes.plan[0], "card" if session.rehearsal else session.first_device
    if session.rehearsal:
        stage["stood_in"] = "two processes on the CPU"
    words = [*shape.words(session.device), NF4, "trainer.max_steps=4", "plan.record=false", "seed=0,1,2,3"]
    words += ["hydra/launcher=packed", f"hydra.launcher.token_budget={2 * shape.rows * shape.length}"]
    stage["runs"] = []
    for name, devices in (("two processes", f"{device},{device}"), ("one process", "")):
        folder = session.work / f"workers{len(stage['runs'])}"
        command = ["-m", "loralab.cli.main", "train", "-m", *words, f"hydra.sweep.dir={folder}"]
        with session.worker("loralab.bench.worker.Python", LORALAB_DEVICES=devices) as worker:
            answer = worker.ask({"words": command, "folder": str(session.work)})
            tail = worker.tail(600)
        kept = [session.keep(run, "workers", f"{name}/{run.name}") for run in record.find(folder)]
        stored = sorted((one for one, _ in kept), key=lambda one: one["seed"])
        stage["runs"].append(
            {
                **{"case": name, "seconds": answer["seconds"], "processes": len({one["pid"] for one in stored})},
                **{"statuses": sorted({one["status"] for one in stored}), "trials": len(stored)},
                "losses": [one["metrics"].get("val/loss") for one in stored],
                "pack_sizes": [one["pack"]["size"] for one in stored],
            }
        )
        session.save()
        if answer["exit_code"]:
            raise RuntimeError(f"{name}: exit code {answer['exit_code']}: {tail}")
    compare_workers(stage, *stage["runs"])


def compare_workers(stage: Row, two: Row, one: Row) -> None:
    """Raises RuntimeError where the sweep was not shared, or its trials differ."""
    pairs = list(zip(two["losses"], one["losses"], strict=True))
    stage["loss_difference"] = max(abs(a - b) / abs(b) for a, b in pairs)
    if (two["processes"], one["processes"]) != (2, 1):
        raise RuntimeError(f"the sweep ran in {two['processes']} processes where it was to run in two")
    if stage["loss_difference"] > SAME_LOSS:
        raise RuntimeError(f"losses differ by {stage['loss_difference']:.2g} from those of one process")
