"""Steps of a single run and whole sweeps, each library in turn."""

import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from loralab.bench.measurements import OURS, WARM_UP, Table, counted, interleaved
from loralab.bench.processes import ProcessError, Row, WorkerProcess
from loralab.bench.setup import BenchmarkSetup, trial_words
from loralab.records import record

log = logging.getLogger(__name__)

Engine = tuple[str, dict[str, Any]]  # a class for ``worker``, and what it is made with beside the common setup
TRAINER, MEDIUM, LIGHTNING = "PEFT + HF Trainer", "PEFT + HF Trainer, medium", "PEFT + Lightning"
ALONE = "a process per trial"
PER_USE = "loralab, dequantize=per_use"
PEERS: dict[str, Engine] = {
    **{TRAINER: ("loralab.bench.peers.WithTrainer", {}), MEDIUM: ("loralab.bench.peers.WithTrainer", {"medium": True})},
    LIGHTNING: ("loralab.bench.peers.WithLightning", {}),
}
LEAN: Engine = ("loralab.bench.ours.Loralab", {"more_words": ["quantization.dequantize=per_use"]})
SINGLE_RUNS = {**PEERS, OURS: ("loralab.bench.ours.Loralab", {}), PER_USE: LEAN}
RANKS = (2, 4, 8, 16)
RATES = (3e-4, 1e-3, 2e-3, 3e-3)


class SweepSize(NamedTuple):
    """Steps of a trial, and how often a sweep of them is measured."""

    steps: int
    peers: int  # trials of each library in one process
    alone: int | None  # trials with a process of their own; 0: computed from the start and the trial of the former
    ours: int  # loralab's sweeps
    share: int = 1  # loralab's sweep holds one trial in so many where batch > 1, and is scaled, its start-up too


@dataclass(frozen=True)
class BenchmarkSize:
    """How much is measured."""

    layer_rounds: int
    rounds: int
    steps: int
    batches: tuple[int, ...]
    sweeps: tuple[SweepSize, ...]
    prefix: SweepSize
    decisions: tuple[int, ...]  # steps of a trial, of sweeps that tune
    seeds: int = 3
    arms: tuple[int, ...] = (2, 4, 8, 16)  # ranks
    tuned_rates: tuple[float, ...] = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
    ranks: tuple[int, ...] = RANKS
    rates: tuple[float, ...] = RATES


FULL = BenchmarkSize(
    15, 5, 40, (1, 4), (SweepSize(50, 3, 2, 2), SweepSize(500, 1, 0, 1, share=4)), SweepSize(200, 2, None, 1), (500, 50)
)
QUICK = BenchmarkSize(3, 2, 15, (1,), (SweepSize(50, 1, 0, 1),), SweepSize(50, 1, None, 1), (50,))


def step(table: Table, setup: BenchmarkSetup, size: BenchmarkSize) -> None:
    """One trial after the other on a base that stays loaded; all start from the same A."""
    with started(SINGLE_RUNS, setup, table, "ms") as workers:
        for batch in size.batches:
            losses: dict[str, list[float]] = {}
            steps, what = size.steps + WARM_UP, f"one step, batch {batch}"
            trial = {**one_trial(steps, batch), "same_start": True}
            about = {"trials": 1, "steps": size.steps, "batch": batch, "tokens": setup.tokens(steps, batch) / steps}
            for _, name in interleaved(workers, size.rounds):
                row = table.row(name, what, "ms", **about)
                with failing_alone(table, row):
                    answer = workers[name].ask(trial)
                    losses[name] = answer["losses"]
                    trainable = answer["trainable_parameters"]
                    table.add(row, [1000 * each for each in counted(answer)], trainable_parameters=trainable)
                    log.info("%s, %s: %.1f ms", what, name, row["median"])
                    _compare_losses(table, what, losses)


def _compare_losses(table: Table, what: str, losses: dict[str, list[float]]) -> None:
    """How far each library's losses are from loralab's, at the first step and at most."""
    for row in table.rows:
        if row["what"] == what and row["name"] in losses and OURS in losses:
            differences = [abs(a - b) for a, b in zip(losses[row["name"]], losses[OURS], strict=True)]
            row["loss_difference"] = {"first": differences[0], "largest": max(differences)}


def sweep(table: Table, setup: BenchmarkSetup, size: BenchmarkSize) -> None:
    """Trials of mixed r, lora_alpha and lr over all linear layers."""
    with started(PEERS, setup, table, "s") as workers:
        for one_sweep, batch in itertools.product(size.sweeps, size.batches):
            trials = grid(size.ranks, size.rates, "all-linear", one_sweep.steps, batch)
            compare_sweeps(table, setup, workers, one_sweep, trials)


def prefix(table: Table, setup: BenchmarkSetup, size: BenchmarkSize) -> None:
    """Eight trials that adapt only the last block."""
    targets = f"model.layers.{setup.last_block}.*_proj"
    with started({TRAINER: PEERS[TRAINER]}, setup, table, "s") as workers:
        for batch in size.batches:
            trials = grid(size.ranks[:4], size.rates[:2], targets, size.prefix.steps, batch)
            compare_sweeps(table, setup, workers, size.prefix, trials)


def compare_sweeps(
    table: Table, setup: BenchmarkSetup, workers: dict[str, WorkerProcess], size: SweepSize, trials: list[Row]
) -> None:
    """A peer's sweep is a start and as many times a measured trial; loralab's is a whole process."""
    n, steps, batch = len(trials), trials[0]["steps"], trials[0]["batch"]
    what, tokens = f"{n} trials x {steps} steps, batch {batch}", n * setup.tokens(steps, batch)
    each = [name for name in workers if PEERS[name][0] == PEERS[TRAINER][0] and size.alone is not None]
    names = [*(f"{name}, one process" for name in workers), *(f"{name}, {ALONE}" for name in each), OURS]
    about = {"trials": n, "steps": steps, "batch": batch, "tokens": tokens, "measured_trials": 0}
    rows = {name: table.row(name, what, "s", **about) for name in names}

    def add(name: str, seconds: float, measured: int = 1, **known: Any) -> None:
        table.add(rows[name], [seconds], measured_trials=rows[name]["measured_trials"] + measured, **known)
        log.info("%s, %s: %.1f s", what, name, seconds)

    def one_process(name: str, trial: Row) -> None:
        start, seconds = workers[name].startup_s, workers[name].ask(trial)["seconds"]
        add(f"{name}, one process", start + n * seconds)
        if size.alone == 0 and name in each:
            add(f"{name}, {ALONE}", n * (start + seconds), computed=True)

    def process_per_trial(name: str, trial: Row) -> None:
        begun, (engine, options) = time.perf_counter(), PEERS[name]
        with setup.start(engine, **options) as worker:
            worker.ask(trial)
            worker.finish()
            add(f"{name}, {ALONE}", n * (time.perf_counter() - begun))

    def ours(_: str, __: Row) -> None:
        some = trials[:: size.share] if batch > 1 else trials
        folder = Path(tempfile.mkdtemp(prefix="sweep", dir=setup.folder))
        seconds = setup.sweep([*trial_words(some), f"hydra.sweep.dir={folder}"])
        packs = sorted(record.read(run)["pack"]["size"] for run in record.find(folder))
        add(OURS, seconds * n / len(some), len(some), pack_sizes=packs)

    work: list[tuple[str, str, int, Callable[[str, Row], None]]] = []
    work += [(f"{name}, one process", name, size.peers, one_process) for name in workers]
    work += [(f"{name}, {ALONE}", name, size.alone or 0, process_per_trial) for name in each]
    work += [(OURS, OURS, size.ours, ours)]
    for number, (row, name, times, measure) in interleaved(work, size.peers):
        if number < times:
            with failing_alone(table, rows[row]):
                measure(name, trials[(2 * number + 1) * n // (2 * size.peers)])


@contextmanager
def started(
    engines: dict[str, Engine], setup: BenchmarkSetup, table: Table, unit: str
) -> Iterator[dict[str, WorkerProcess]]:
    """A process for each library, after a trial of two steps that is not counted; one that fails is a row's error."""
    with ExitStack() as stack:
        workers: dict[str, WorkerProcess] = {}
        for name, (engine, options) in engines.items():
            try:
                worker = stack.enter_context(setup.start(engine, **options))
                worker.wait_until_ready()
                worker.ask(one_trial(2, 1))
                workers[name] = worker
            except ProcessError as error:
                table.fail(table.row(name, "start", unit), error)
        yield workers


@contextmanager
def failing_alone(table: Table, row: Row) -> Iterator[None]:
    """Within, a ProcessError is what the row says, and the others go on."""
    try:
        yield
    except ProcessError as error:
        log.warning("%s, %s: %s", row["what"], row["name"], error)
        table.fail(row, error)


def one_trial(steps: int, batch: int) -> Row:
    """What an engine is asked: r = 8 on all linear layers."""
    return grid((8,), (1e-3,), "all-linear", steps, batch)[0]


def grid(ranks: Sequence[int], rates: Sequence[float], targets: str, steps: int, batch: int) -> list[Row]:
    """lora_alpha = 2 r."""
    same = {"target_modules": targets, "steps": steps, "batch": batch}
    return [{"r": r, "lora_alpha": 2 * r, "lr": rate, **same} for r in ranks for rate in rates]
