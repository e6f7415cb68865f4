"""Steps of a single run and whole sweeps, each library in turn."""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from loralab.bench.ground import Failed, Ground, Side
from loralab.bench.table import OURS, Table
from loralab.bench.worker import Row
from loralab.records import record

log = logging.getLogger(__name__)

TRAINER, MEDIUM, LIGHTNING = "PEFT + HF Trainer", "PEFT + HF Trainer, medium", "PEFT + Lightning"
ALONE = "a process per trial"
KEPT = "loralab, dequantize=resident"
PEERS = {TRAINER: ("trainer", False), MEDIUM: ("trainer", True), LIGHTNING: ("lightning", False)}
RANKS = (2, 4, 8, 16)
RATES = (3e-4, 1e-3, 2e-3, 3e-3)
WARM_UP = 3  # steps at the head of a measurement that are not counted


class Sweep(NamedTuple):
    """One of ``steps`` steps a trial, and how often it is measured."""

    steps: int
    peers: int  # trials of each library in one process
    alone: int | None  # trials with a process of their own; 0: computed from the start and the trial of the former
    ours: int  # loralab's sweeps
    share: int = 1  # loralab's sweep holds one trial in so many where batch > 1, and is scaled, its start-up too


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    layer_rounds: int
    rounds: int
    steps: int
    batches: tuple[int, ...]
    sweeps: tuple[Sweep, ...]
    prefix: Sweep
    ranks: tuple[int, ...] = RANKS
    rates: tuple[float, ...] = RATES


FULL = Extent(15, 5, 40, (1, 4), (Sweep(50, 3, 2, 2), Sweep(500, 1, 0, 1, share=4)), Sweep(200, 2, None, 1))
QUICK = Extent(3, 2, 15, (1,), (Sweep(50, 1, 0, 1),), Sweep(50, 1, None, 1))


def step(table: Table, ground: Ground, extent: Extent) -> None:
    """One trial after the other on a base that stays loaded; all start from the same A."""
    ours = {OURS: ("loralab", False), KEPT: ("resident", False)}
    with opened({**PEERS, **ours}, ground, table, "ms") as sides:
        for batch in extent.batches:
            losses: dict[str, list[float]] = {}
            steps = extent.steps + WARM_UP
            trial = {**one_trial(steps, batch), "same_start": True}
            about = {"trials": 1, "steps": extent.steps, "batch": batch, "tokens": ground.tokens(steps, batch) / steps}
            for number in range(extent.rounds):
                for name in turned(list(sides), number):
                    row = table.row(name, f"one step, batch {batch}", "ms", **about)
                    with _guarded(table, row):
                        done = sides[name].trial(trial)
                        losses[name] = done["losses"]
                        known = {"trainable_parameters": done["trainable_parameters"]}
                        table.add(row, [1000 * one for one in done["steps"][WARM_UP - 1 :]], **known)
                        log.info("%s, %s: %.1f ms", row["what"], name, row["median"])
                _compare(table, f"one step, batch {batch}", losses)


def _compare(table: Table, what: str, losses: dict[str, list[float]]) -> None:
    """How far each library's losses are from loralab's, at the first step and at most."""
    for row in table.rows:
        if row["what"] == what and row["name"] in losses and OURS in losses:
            apart = [abs(a - b) for a, b in zip(losses[row["name"]], losses[OURS], strict=True)]
            row["loss_difference"] = {"first": apart[0], "largest": max(apart)}


def sweep(table: Table, ground: Ground, extent: Extent) -> None:
    """Trials of mixed r, lora_alpha and lr over all linear layers."""
    with opened(PEERS, ground, table, "s") as sides:
        for one in extent.sweeps:
            for batch in extent.batches:
                measure_sweep(table, ground, sides, one, batch, grid(extent.ranks, extent.rates, "all-linear"))


def prefix(table: Table, ground: Ground, extent: Extent) -> None:
    """Eight trials that adapt only the last block."""
    with opened({TRAINER: PEERS[TRAINER]}, ground, table, "s") as sides:
        trials = grid(extent.ranks[:4], extent.rates[:2], f"model.layers.{ground.last_block}.*_proj")
        for batch in extent.batches:
            measure_sweep(table, ground, sides, extent.prefix, batch, trials)


def measure_sweep(
    table: Table, ground: Ground, sides: dict[str, Side], plan: Sweep, batch: int, trials: list[Row]
) -> None:
    """A peer's sweep is a start and as many times a measured trial; loralab's is a whole process."""
    n, what = len(trials), f"{len(trials)} trials x {plan.steps} steps, batch {batch}"
    about = {"trials": n, "steps": plan.steps, "batch": batch, "tokens": n * ground.tokens(plan.steps, batch)}
    rows = _rows(table, sides, plan, what, about)
    mine = trials[:: plan.share] if batch > 1 else trials

    def peer(name: str, trial: Row) -> None:
        start, seconds = sides[name].startup_s, sides[name].trial(trial)["seconds"]
        _told(table, rows[f"{name}, one process"], start + n * seconds)
        if plan.alone == 0 and f"{name}, {ALONE}" in rows:
            _told(table, rows[f"{name}, {ALONE}"], n * (start + seconds), computed=True)

    def alone(name: str, trial: Row) -> None:
        begun = time.perf_counter()
        side = Side(ground, *PEERS[name])
        try:
            side.trial(trial)
        except BaseException:
            side.close(kill=True)
            raise
        side.close()
        _told(table, rows[f"{name}, {ALONE}"], n * (time.perf_counter() - begun))

    def ours(name: str, trial: Row) -> None:
        folder = Path(tempfile.mkdtemp(prefix="sweep", dir=ground.folder))
        seconds = ground.sweep(sweep_words(mine, plan.steps, batch, folder)) * n / len(mine)
        packs = sorted(record.read(one)["pack"]["size"] for one in record.find(folder))
        _told(table, rows[name], seconds, len(mine), pack_sizes=packs)

    work: list[tuple[str, str, int, Callable[[str, Row], None]]] = []
    work += [(f"{name}, one process", name, plan.peers, peer) for name in sides]
    work += [(row, row.removesuffix(f", {ALONE}"), plan.alone or 0, alone) for row in rows if row.endswith(ALONE)]
    work += [(OURS, OURS, plan.ours, ours)]
    for number in range(plan.peers):
        trial = {**trials[(2 * number + 1) * n // (2 * plan.peers)], "steps": plan.steps, "batch": batch}
        for row, name, times, measure in turned(work, number):
            if number < times:
                with _guarded(table, rows[row]):
                    measure(name, trial)


def _rows(table: Table, sides: dict[str, Side], plan: Sweep, what: str, about: Row) -> dict[str, Row]:
    """In the order of the table."""
    names = [f"{name}, one process" for name in sides]
    if plan.alone is not None:
        names += [f"{name}, {ALONE}" for name in sides if PEERS[name][0] == "trainer"]
    return {name: table.row(name, what, "s", **about, measured_trials=0) for name in (*names, OURS)}


def _told(table: Table, row: Row, seconds: float, trials: int = 1, **about: Any) -> None:
    table.add(row, [seconds], measured_trials=row["measured_trials"] + trials, **about)
    log.info("%s, %s: %.1f s", row["what"], row["name"], seconds)


@contextmanager
def opened(chosen: dict[str, tuple[str, bool]], ground: Ground, table: Table, unit: str) -> Iterator[dict[str, Side]]:
    """A process for each library, after a trial of two steps that is not counted; one that fails is a row's error."""
    with ExitStack() as stack:
        sides: dict[str, Side] = {}
        for name, (engine, medium) in chosen.items():
            try:
                side = Side(ground, engine, medium)
                stack.callback(side.close, kill=True)
                side.trial(one_trial(2, 1))
                sides[name] = side
            except Failed as error:
                table.fail(table.row(name, "start", unit), error)
        yield sides


@contextmanager
def _guarded(table: Table, row: Row) -> Iterator[None]:
    try:
        yield
    except Failed as error:
        log.warning("%s, %s: %s", row["what"], row["name"], error)
        table.fail(row, error)


def turned(items: Sequence[Any], number: int) -> list[Any]:
    """Every second round the other way round, so that none always comes after the same neighbour."""
    return list(items[::-1] if number % 2 else items)


def one_trial(steps: int, batch: int) -> Row:
    return {**grid((8,), (1e-3,), "all-linear")[0], "steps": steps, "batch": batch}


def grid(ranks: Sequence[int], rates: Sequence[float], targets: str) -> list[Row]:
    """lora_alpha = 2 r."""
    return [{"r": r, "lora_alpha": 2 * r, "lr": rate, "target_modules": targets} for r in ranks for rate in rates]


def sweep_words(trials: list[Row], steps: int, batch: int, folder: Path) -> list[str]:
    """The grid for loralab's command line."""
    ranks, rates = (",".join(str(one) for one in dict.fromkeys(trial[key] for trial in trials)) for key in ("r", "lr"))
    return [
        *(f"adapter.r={ranks}", f"optimizer.lr={rates}", "adapter.lora_alpha='${loralab.mul:2,${adapter.r}}'"),
        *(f"adapter.target_modules='{trials[0]['target_modules']}'", f"hydra.sweep.dir={folder}"),
        *(f"trainer.max_steps={steps}", f"data.batch_size={batch}"),
    ]
