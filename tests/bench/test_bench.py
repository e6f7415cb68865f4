"""The benchmark measures what it says it measures; how fast that is no test asks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from loralab.bench import ours, peers, run
from loralab.bench import setup as setups
from loralab.bench.layer import PEER, _step, layers, timed
from loralab.bench.measurements import Table, interleaved, render, summary
from loralab.bench.parts import ALONE, LIGHTNING, MEDIUM, OURS, PER_USE, TRAINER, BenchmarkSize, SweepSize, one_trial
from loralab.bench.processes import ProcessError
from loralab.bench.setup import BenchmarkSetup, physical_cores, prepare
from loralab.cli import main
from loralab.errors import Interrupted
from loralab.records import record

TINY = BenchmarkSize(
    *(1, 2, 4, (1, 2), (SweepSize(2, 2, 1, 1), SweepSize(3, 1, 0, 1, share=2)), SweepSize(2, 1, None, 1), ()),
    ranks=(2, 4),
    rates=(1e-3, 2e-3),
)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("setup"), "cpu", 1)


class StandIn:
    """A worker whose trials take as long as they have steps, and a second to start."""

    startup_s = 1.0
    broken: tuple = ()
    answers = 10**6

    def __init__(self, engine, **options):
        self.engine = engine

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait_until_ready(self):
        pass

    def finish(self):
        pass

    def ask(self, trial):
        if self.engine in StandIn.broken:
            raise ProcessError(self.engine, 1, "gone")
        StandIn.answers -= 1
        if StandIn.answers < 0:
            raise Interrupted(15)
        steps = trial["steps"]
        pace = 0.002 if self.engine == "loralab.bench.ours.Loralab" else 0.003
        losses = [1.0 + (self.engine == "loralab.bench.peers.WithLightning") / 8] * steps
        return {"seconds": steps, "steps": [pace] * (steps - 1), "losses": losses, "trainable_parameters": 5}


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """The parts over stand-ins, as bench.json has them."""

    def measure(*names, broken=(), answers=10**6, size=TINY):
        StandIn.broken, StandIn.answers = broken, answers
        stand_in = BenchmarkSetup(tmp_path, 1, "cpu", {"words": []}, [10] * 100, 3)
        monkeypatch.setattr(run, "prepare", lambda *_: stand_in)
        monkeypatch.setattr(BenchmarkSetup, "start", StandIn)
        monkeypatch.setattr(BenchmarkSetup, "sweep", lambda self, words: 2.0)
        run.measure(names, size, tmp_path / "bench.json", tmp_path, "cpu", 1)
        return json.loads((tmp_path / "bench.json").read_text())

    return measure


def by_name(part, what):
    return {row["name"]: row for row in part["rows"] if row["what"] == what}


def test_both_layers_hold_the_same_weights_and_every_round_is_timed():
    table = Table(lambda: None)
    layers(table, 3, ((64, 128),), (4,))
    assert {row["name"] for row in table.rows} == {PEER, OURS}
    assert all(row["output_difference"] < 1e-6 and row["median"] > 0 for row in table.rows)
    assert all((row["measurements"], row["what"]) == (3, "128 -> 64, 4 rows") for row in table.rows)


def test_work_is_done_in_turn_and_warmed_up():
    order = []
    times = timed({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, "cpu", rounds=3)
    assert order == ["a", "b", "b", "a"] * 2 + ["a", "b"]
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3}
    assert list(interleaved("abc", 2)) == [(0, "a"), (0, "b"), (0, "c"), (1, "c"), (1, "b"), (1, "a")]


def test_a_step_reaches_the_input():
    layer = torch.nn.Linear(4, 2)
    seen = []
    layer.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_in[0]))
    _step(layer, torch.ones(3, 4))()
    assert torch.equal(seen[0], layer.weight.sum(dim=0).expand(3, -1))


def test_a_ratio_is_a_median_over_loralabs_at_the_same_task():
    table = Table(lambda: None)
    for name, what, values in (("peer", "x", [3.0, 9.0, 6.0]), (OURS, "x", [2.0]), (OURS, "y", [100.0])):
        table.add(table.row(name, what, "s"), values)
    assert [row["ratio"] for row in table.rows] == [3.0, 1.0, 1.0]
    table.add(table.row(OURS, "x", "s"), [4.0])
    assert [row["ratio"] for row in table.rows] == [2.0, 1.0, 1.0]
    assert summary([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "quartiles": [2.0, 4.0], "measurements": 5}
    assert summary([7.0]) == {"median": 7.0, "quartiles": [7.0, 7.0], "measurements": 1}


def test_five_steps_of_every_library_have_the_same_losses(setup):
    trial = {**one_trial(5, 2), "same_start": True}
    done = [engine(setup.worker).answer(trial) for engine in (ours.Loralab, peers.WithTrainer, peers.WithLightning)]
    mine = done[0]["losses"]
    assert len(set(mine)) == 5
    for one in done:
        assert len(one["steps"]) == 4
        assert one["trainable_parameters"] == done[0]["trainable_parameters"]
        apart = [abs(a - b) for a, b in zip(one["losses"], mine, strict=True)]
        assert apart[0] < 1e-4
        assert max(apart) < 1e-3


def test_a_trial_leaves_the_peers_base_as_it_was(setup):
    peer = peers.WithTrainer(setup.worker)
    trial = {**one_trial(2, 1), "same_start": True}
    assert peer.answer(trial)["losses"] == peer.answer(trial)["losses"]


def test_the_step_part_leaves_warm_up_out_and_compares_losses(measured):
    rows = by_name(measured("step")["parts"]["step"], "one step, batch 2")
    assert list(rows) == [TRAINER, MEDIUM, LIGHTNING, OURS, PER_USE]
    assert rows[TRAINER]["median"] == pytest.approx(3.0)
    assert rows[TRAINER]["ratio"] == pytest.approx(1.5)
    assert all(row["measurements"] == TINY.rounds * TINY.steps for row in rows.values())
    assert rows[LIGHTNING]["loss_difference"] == {"first": 0.125, "largest": 0.125}
    assert rows[TRAINER]["tokens"] == 20


def test_a_peers_sweep_is_one_start_and_its_trials_and_ours_is_whole(measured):
    found = measured("sweep", "prefix")
    part = found["parts"]["sweep"]
    rows = by_name(part, "4 trials x 2 steps, batch 1")
    assert next(iter(rows)) == f"{TRAINER}, one process"
    assert rows[f"{LIGHTNING}, one process"]["median"] == 1 + 4 * 2
    assert (rows[f"{TRAINER}, one process"]["measured_trials"], rows[f"{TRAINER}, {ALONE}"]["measured_trials"]) == (
        2,
        1,
    )
    assert (rows[OURS]["median"], rows[OURS]["measured_trials"], rows[OURS]["tokens"]) == (2.0, 4, 80)
    assert f"{LIGHTNING}, {ALONE}" not in rows
    long = by_name(part, "4 trials x 3 steps, batch 2")
    assert long[f"{TRAINER}, {ALONE}"]["median"] == 4 * (1 + 3)
    assert long[f"{TRAINER}, {ALONE}"]["computed"] is True
    assert (long[OURS]["median"], long[OURS]["measured_trials"]) == (4.0, 2)
    last = by_name(found["parts"]["prefix"], "4 trials x 2 steps, batch 2")
    assert list(last) == [f"{TRAINER}, one process", OURS]
    assert all(part["status"] == "completed" for part in found["parts"].values())


def test_the_json_says_where_it_was_measured_and_the_table_is_markdown(measured):
    found = measured("step")
    assert {"cpu", "gpu", "threads", "versions", "dtype", "parts"} <= set(found)
    assert found["versions"]["peft"]
    assert {"name", "what", "unit", "median", "quartiles", "ratio", "trials", "steps", "batch", "tokens"} <= set(
        found["parts"]["step"]["rows"][0]
    )
    lines = render(found).splitlines()
    assert f"| one step, batch 1 | {TRAINER} | 3 ms | 3 to 3 ms | 1.50 |" in lines


def test_an_interruption_keeps_what_was_measured(measured, tmp_path):
    with pytest.raises(Interrupted):
        measured("step", "sweep", answers=7)  # five that warm up and two that count
    found = json.loads((tmp_path / "bench.json").read_text())
    assert list(found["parts"]) == ["step"]
    assert found["parts"]["step"]["status"] == "interrupted"
    assert [row["name"] for row in found["parts"]["step"]["rows"] if row["median"]] == [TRAINER, MEDIUM]


def test_a_library_that_fails_says_so_and_the_others_go_on(measured):
    part = measured("step", broken=("loralab.bench.peers.WithLightning",))["parts"]["step"]
    assert (part["status"], part["error"]) == ("failed", f"start, {LIGHTNING}")
    assert [row["error"] for row in part["rows"] if "error" in row] == [
        "loralab.bench.peers.WithLightning ended with exit code 1: gone"
    ]
    assert set(by_name(part, "one step, batch 2")) == {TRAINER, MEDIUM, OURS, PER_USE}


def test_an_unknown_part_is_refused_with_the_nearest(capsys):
    assert main.run(["bench", "stepp"]) == 2
    assert "step" in capsys.readouterr().err
    assert main.run(["train", "--quick"]) == 2


def test_physical_cores_are_at_least_one_and_at_most_the_logical(monkeypatch):
    monkeypatch.setattr(setups.os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert physical_cores() == 1


@pytest.mark.slow
def test_every_part_runs_in_processes_of_its_own(tmp_path):
    size = BenchmarkSize(1, 1, 2, (1,), (SweepSize(2, 1, 1, 1),), SweepSize(2, 1, None, 1), (2, 4), (1e-3,))
    found = run.measure(("step", "sweep", "prefix"), size, tmp_path / "b.json", tmp_path, "cpu", 1)
    for name, part in found["parts"].items():
        assert (part["status"], part["error"]) == ("completed", None), name
        assert all(row["median"] and row["ratio"] for row in part["rows"]), part["rows"]
    for row in found["parts"]["step"]["rows"]:
        exact = "medium" not in row["name"]  # whose products are bfloat16 where the processor has them
        assert row["loss_difference"]["first"] < (1e-4 if exact else 1e-2)
        assert row["loss_difference"]["largest"] < (1e-3 if exact else 1e-2)


def test_a_decision_is_compared_with_the_full_grids_and_peers_are_scaled_from_a_sample(measured, monkeypatch):
    """The sweeps are stood in for by their folders: what they leave is read, as a real one's is."""
    sizes = replace(TINY, decisions=(4,), arms=(2, 4), tuned_rates=(1e-3, 2e-3), seeds=2)

    def command(self, words):
        folder = Path(next(word for word in words if word.startswith("hydra.sweep.dir=")).partition("=")[2])
        asked = json.loads(Path(words[1]).read_text().partition("\n")[2])
        halving, rates = asked["sweep"]["halving"], asked["sweep"]["tune"]["optimizer.lr"]
        assert (rates, asked["hydra"]["sweeper"]["params"]["seed"]) == ([1e-3, 2e-3], [0, 1])
        decisions = [
            {
                "arm": ["+sweeps=x", f"adapter.r={r}"],
                "chosen": f"optimizer.lr={2e-3 if r == 4 and halving else 1e-3:g}",
                "means": {"optimizer.lr=0.001": 1.0, "optimizer.lr=0.002": 1.25},
            }
            for r in (2, 4)
        ]
        record.write_sweep(folder, {"name": "d", "axes": {}, "trials": [], "decisions": decisions})
        for number in range(8):
            stored = record.blank(str(number))
            stored["time"]["steps"] = 1 if halving and number % 2 else 4
            record.write(folder / str(number), stored)
        return 3.0 if halving else 5.0

    monkeypatch.setattr(BenchmarkSetup, "command", command)
    rows = {row["name"]: row for row in measured("decision", size=sizes)["parts"]["decision"]["rows"]}
    ours = rows[OURS]
    assert (ours["median"], ours["trained_steps"], ours["same_rates"], ours["arms"]) == (3.0, 20, 1, 2)
    assert ours["largest_loss"] == pytest.approx(0.25)
    # a trial of the stand-in takes as many seconds as it has steps, and its start one: 8 trials of 4 steps
    assert rows[f"{TRAINER}, {ALONE}"]["median"] == 8 * (1 + 4)
    assert rows[f"{TRAINER}, one process"]["median"] == 1 + 8 * 4
    assert rows[f"{TRAINER}, one process, the same steps ended early"]["median"] == pytest.approx(1 + 8 * 4 * 20 / 32)
    assert rows["loralab, the full grid"]["ratio"] == pytest.approx(5 / 3)
