"""The time to a decision: the best rate of each arm, by the full grid and with rates that cannot win ended early."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralab.bench.measurements import OURS, Table
from loralab.bench.parts import ALONE, PEERS, TRAINER, BenchmarkSize, failing_alone, grid, started
from loralab.bench.processes import Row
from loralab.bench.setup import BenchmarkSetup
from loralab.records import record

FULL = "loralab, the full grid"
SAME_RULE = f"{TRAINER}, one process, the same steps ended early"


def decision(table: Table, setup: BenchmarkSetup, size: BenchmarkSize) -> None:
    """Arms of several ranks, each at its own best of several rates over several seeds."""
    with started({TRAINER: PEERS[TRAINER]}, setup, table, "s") as workers:
        for steps in size.decisions:
            trials = [t for t in grid(size.arms, size.tuned_rates, "all-linear", steps, 1) for _ in range(size.seeds)]
            arms, rates, seeds = (len(set(values)) for values in (size.arms, size.tuned_rates, range(size.seeds)))
            what = f"{arms} arms x {rates} rates x {seeds} seeds x {steps} steps"
            about = {"trials": len(trials), "steps": steps, "measured_trials": 0}
            names = [f"{TRAINER}, {ALONE}", f"{TRAINER}, one process", SAME_RULE, FULL, OURS]
            rows = {name: table.row(name, what, "s", **about) for name in names}
            with failing_alone(table, rows[OURS]):
                ours, full = (_swept(table, rows[name], setup, size, steps, name == OURS) for name in (OURS, FULL))
                rows[OURS].update(_beside(ours, full))
                for worker in workers.values():
                    sample = [trials[0], trials[-1]]
                    trial = sum(worker.ask(one)["seconds"] for one in sample) / len(sample)
                    start, share = worker.startup_s, ours["steps"] / full["steps"]
                    known = {"measured_trials": len(sample), "computed": True}
                    table.add(rows[names[0]], [len(trials) * (start + trial)], **known)
                    table.add(rows[names[1]], [start + len(trials) * trial], **known)
                    table.add(rows[SAME_RULE], [start + share * len(trials) * trial], **known)


def _swept(table: Table, row: Row, setup: BenchmarkSetup, size: BenchmarkSize, steps: int, halving: bool) -> Row:
    """A whole sweep, from its start to its page: {steps trained, the chosen rate of each arm with its means}."""
    folder = Path(tempfile.mkdtemp(prefix="decision", dir=setup.folder))
    (folder / "decision.yaml").write_text(_file(size, steps, halving))
    words = ["sweep", str(folder / "decision.yaml"), *setup.worker["words"], f"data.test={setup.test}"]
    table.add(row, [setup.command([*words, f"hydra.sweep.dir={folder / 'sweep'}"])], measured_trials=row["trials"])
    stored = [record.read(place) for place in record.find(folder / "sweep")]
    found: Row = {"steps": sum(int(one["time"]["steps"] or 0) for one in stored), "chosen": _chosen(folder / "sweep")}
    row.update(trained_steps=found["steps"], chosen={arm: one["chosen"] for arm, one in found["chosen"].items()})
    return found


def _file(size: BenchmarkSize, steps: int, halving: bool) -> str:
    """The sweep file, in JSON, which is YAML."""
    content = {
        "sweep": {
            "question": "Which rate is the best of each rank?",
            "tune": {"optimizer.lr": list(size.tuned_rates)},
            "extend": 0,
            "halving": halving,
        },
        "adapter": {"lora_alpha": "${loralab.mul:2,${adapter.r}}"},
        "trainer": {"max_steps": steps},
        "data": {"batch_size": 1},
        "hydra": {"sweeper": {"params": {"adapter.r": list(size.arms), "seed": list(range(size.seeds))}}},
    }
    return "# @package _global_\n" + json.dumps(content, indent=1) + "\n"


def _chosen(folder: Path) -> dict[str, Mapping[str, Any]]:
    """{arm: its last decision} of sweep.json."""
    decisions = record.read_sweep(folder)["decisions"]
    return {" ".join(word for word in one["arm"] if word.startswith("adapter.r=")): one for one in decisions}


def _beside(ours: Row, full: Row) -> Row:
    """How many arms have the rate that the full grid chose, and by how much more validation loss, by the full grid's
    own means, those that have another."""
    losses = []
    for arm, decided in full["chosen"].items():
        means, own = decided["means"], ours["chosen"][arm]["chosen"]
        losses.append(means[own] - means[decided["chosen"]])
    return {"same_rates": sum(loss == 0 for loss in losses), "arms": len(losses), "largest_loss": max(losses)}
