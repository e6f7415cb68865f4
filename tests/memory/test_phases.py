"""Memory is observed phase by phase, on a CPU too, without a change to training."""

import io
import json
import logging
import os
import time

import pytest
import torch
from lightning.pytorch import Callback
from torch.autograd.profiler import profile, record_function

from loralab.errors import ConfigError
from loralab.memory import ledgers, phases, profiled
from loralab.memory.ledgers import Host, Reading
from loralab.memory.phases import HEAVIEST, PhaseMemory
from loralab.quantization.four_bit import FourBit
from loralab.records.wandb import Mirror
from loralab.running.runner import Runner
from loralab.training.module import FineTuner
from loralab.training.progress import ProgressLines, clock

PHASES = ("load", "forward", "backward", "optimizer", "evaluation")


def rows_of(spec):
    return [json.loads(line) for line in (spec.folder / "metrics.jsonl").read_text().splitlines()]


def test_resident_bytes_see_an_allocation():
    host = Host()
    before = host.resident()
    held = torch.ones(50_000_000)  # 200 MB
    assert host.resident() - before > 150e6
    del held


def test_the_host_says_how_much_it_could_give():
    assert 0 < Host().available() < 2**50


def test_every_phase_is_in_the_record_and_in_the_rows(make_spec, curve):
    spec = make_spec(callbacks={"memory": lambda: PhaseMemory(every_n_steps=2)})
    record = Runner().run([spec])[0]
    found = record["memory"]
    assert found["device"] == "cpu"
    assert all(found["resident_by_phase"][phase] > 2**20 for phase in PHASES)
    assert set(found["seconds_by_phase"]) == {"forward", "backward", "optimizer"}
    assert found["spikes"] == []
    for key in ("memory/backward_peak_gib", "memory/host_rss_gib", "memory/host_available_gib", "time/backward_s"):
        assert len(curve(spec.folder, key)) == 2, key
    assert curve(spec.folder, "batch/padded_tokens") == [50, 50]  # 2 rows of 24 bytes and </s>
    assert curve(spec.folder, "batch/tokens") == [50, 50]
    assert curve(spec.folder, "batch/longest") == [25, 25]


def test_what_is_reported_of_a_step_stands_at_its_number_in_a_pack_too(make_spec):
    observed = {"memory": lambda: PhaseMemory(every_n_steps=1)}
    specs = [make_spec(name, callbacks=observed, seed=seed) for seed, name in enumerate(("one", "two"))]
    for spec, record in zip(specs, Runner().run(specs), strict=True):
        assert record["pack"]["size"] == 2
        assert record["memory"]["by_phase"]["evaluation"] > 0
        told = {key: [row["step"] for row in rows_of(spec) if key in row] for key in ("train/loss", "batch/tokens")}
        assert told == {"train/loss": [1, 2, 3, 4], "batch/tokens": [1, 2, 3, 4]}


def test_batch_sizes_are_a_trials_own_in_a_pack(make_spec, make_data, curve):
    observed = {"memory": lambda: PhaseMemory(every_n_steps=2)}
    specs = [make_spec(f"of-{n}", callbacks=observed, data=make_data(batch_size=n)) for n in (1, 3)]
    records = Runner().run(specs)
    assert [record["pack"]["size"] for record in records] == [2, 2]
    assert [curve(spec.folder, "batch/rows") for spec in specs] == [[1, 1], [3, 3]]
    assert [curve(spec.folder, "batch/tokens") for spec in specs] == [[25, 25], [75, 75]]
    assert records[0]["memory"]["measured_batch"]["rows"] == 4  # what the pack's peak belongs to


def test_the_batch_is_the_largest_pass_of_the_step(make_spec, curve):
    spec = make_spec(kind="ragged", accumulate_grad_batches=3, callbacks={"memory": lambda: PhaseMemory(1)})
    Runner().run([spec])
    padded, longest = curve(spec.folder, "batch/padded_tokens"), curve(spec.folder, "batch/longest")
    assert padded == [2 * one for one in longest]
    assert all(real <= all_of_it for real, all_of_it in zip(curve(spec.folder, "batch/tokens"), padded, strict=True))


def test_telemetry_changes_no_number(make_spec, curve, weights):
    watched = make_spec("watched", callbacks={"memory": PhaseMemory, "progress": lambda: ProgressLines(0.0)})
    alone = make_spec("alone")
    Runner().run([watched])
    Runner().run([alone])
    assert curve(watched.folder) == curve(alone.folder)
    assert all(map(torch.equal, weights(watched.folder).values(), weights(alone.folder).values()))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("quantization", [None, FourBit()], ids=["none", "nf4"])
def test_a_profiled_step_gives_the_allocators_peak(make_spec, accumulate, quantization):
    changes = {} if quantization is None else {"quantization": quantization}
    observed = {"memory": lambda: PhaseMemory(profiled_step=3)}
    spec = make_spec(callbacks=observed, accumulate_grad_batches=accumulate, **changes)
    record = Runner().run([spec])[0]
    found, phases = record["memory"], record["memory"]["by_phase"]
    assert found["measured_peak_bytes"] == max(size for size in phases.values() if size)
    assert found["measured_batch"] == {"step": 3, "rows": 2, "padded_tokens": 50, "tokens": 50, "longest": 25}
    held = phases["load"]
    state, adapter = record["optimizer"]["state_bytes"], 4 * record["adapter"]["trainable_parameters"]
    assert held >= record["base"]["bytes"] + adapter + state
    assert phases["forward"] >= held + adapter  # the gradients of the step before are alive
    assert phases["optimizer"] >= held + adapter
    assert phases["backward"] > phases["optimizer"]
    assert held - state < phases["evaluation"] < phases["backward"]  # after the fit, whose optimizer is gone


def test_levels_are_added_up_and_addresses_of_an_earlier_profile_passed_over():
    happened = [
        *[("forward", 0, 0), ("", 1, 50), ("", 2, 30), ("", 2, -30), ("", 9, -1000), ("", 3, 5)],
        *[("backward", 0, 0), ("", 1, -50), ("", 4, 60), ("optimizer", 0, 0), ("", 4, -60), ("backward", 0, 0)],
    ]
    assert profiled.peaks(happened, 100, 10) == {"forward": 180, "backward": 155, "optimizer": 155}


def test_memory_that_tensors_share_is_counted_once():
    whole = torch.zeros(100)
    assert profiled.storage_bytes([whole, whole[10:], whole.view(10, 10), torch.zeros(5)]) == 420


def test_a_larger_batch_has_a_larger_peak(make_spec, make_data):
    peaks = [
        Runner().run([make_spec(f"{size}", data=make_data(batch_size=size), callbacks={"memory": PhaseMemory})])[0]
        for size in (1, 4)
    ]
    small, large = (record["memory"]["measured_peak_bytes"] for record in peaks)
    logits = 3 * 25 * 258 * 4  # of the three rows more, in float32
    assert large - small > logits


def test_the_profiled_step_is_in_no_timing(make_spec, monkeypatch):
    stop, passed = phases.ProfiledStep.stop, [0.0]

    def slow(self):
        passed[0] += 1000.0
        return stop(self)

    for name in ("monotonic", "perf_counter"):
        real = getattr(time, name)
        monkeypatch.setattr(time, name, lambda real=real: real() + passed[0])
    monkeypatch.setattr(phases.ProfiledStep, "stop", slow)
    for steps, left_out in ((3, 1), (HEAVIEST, 2)):  # the second and the one with the most targets of equal rows
        observed = {"memory": lambda steps=steps: PhaseMemory(profiled_step=steps)}
        record = Runner().run([make_spec(f"{steps}", callbacks=observed, val_check_interval=2)])[0]
        assert record["time"]["train_s"] < 500  # the validation within the fit is profiled too
        timed = record["time"]["tokens"] * (4 - left_out) / 4
        assert record["time"]["tokens_per_s"] == pytest.approx(timed / record["time"]["train_s"])
        assert max(record["memory"]["seconds_by_phase"].values()) < 500


def test_a_run_of_one_step_has_a_peak_and_no_speed(make_spec):
    record = Runner().run([make_spec(max_steps=1, callbacks={"memory": PhaseMemory})])[0]
    assert record["memory"]["by_phase"]["backward"] > 0
    assert record["time"]["tokens_per_s"] is None  # its only step was profiled


def test_a_run_without_the_step_asked_for_or_that_wants_no_profile_has_no_peak_of_training(make_spec):
    for steps, third in ((2, 3), (4, None)):
        observed = {"memory": lambda third=third: PhaseMemory(profiled_step=third)}
        record = Runner().run([make_spec(max_steps=steps, callbacks=observed)])[0]
        assert record["memory"]["by_phase"]["backward"] is None
        assert (record["memory"]["by_phase"]["evaluation"] is None) == (third is None)
        assert record["memory"]["measured_peak_bytes"] is None  # a validation's is not the run's


def test_a_profiled_step_that_fails_gives_stderr_back(make_spec, capfd):
    class Failing(PhaseMemory):
        def on_after_backward(self, trainer, module):
            super().on_after_backward(trainer, module)
            if self._profile is not None:
                os.write(2, b"said before\n")
                raise RuntimeError("boom")

    record = Runner().run([make_spec(callbacks={"memory": Failing})])[0]
    assert "boom" in record["error"]
    assert record["time"]["steps"] == 1
    assert record["memory"]["resident_by_phase"]["backward"] > 0  # a failed run's record has what was seen
    os.write(2, b"said after\n")
    said = capfd.readouterr().err
    assert "said before" in said
    assert "said after" in said


@pytest.mark.parametrize("family", ["llama", "t5", "gpt2"])
def test_the_measured_peak_is_that_of_a_profile_from_the_first_allocation_on(make_spec, family):
    measured = Runner().run([make_spec("one", family, callbacks={"memory": PhaseMemory})])[0]["memory"]

    class Third(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == measured["measured_batch"]["step"] - 1:
                with record_function("loralab/third"):
                    pass
            elif trainer.global_step == measured["measured_batch"]["step"]:
                with record_function("loralab/after"):
                    pass

        def on_train_end(self, *_):
            with record_function("loralab/end"):
                pass

    with profile(profile_memory=True) as whole:
        Runner().run([make_spec("two", family, callbacks={"third": Third})])
    truth = profiled.peaks(profiled.events(whole), 0, 0)["third"]
    assert measured["measured_peak_bytes"] == pytest.approx(truth, rel=0.005)


def test_the_profilers_own_lines_stay_away_and_all_others_come_through(make_spec, capfd):
    class Loud(PhaseMemory):
        def on_after_backward(self, *arguments):
            super().on_after_backward(*arguments)
            os.write(2, b"a native warning\n")

    Runner().run([make_spec(callbacks={"memory": Loud})])
    said = capfd.readouterr().err
    assert said.count("a native warning") == 4
    assert "USDT" not in said
    assert "profiling started" not in said


class Card(Host):
    """A stand-in for CUDA: 1 MiB a token, except where ``script`` says otherwise; times are known a step late."""

    device, instrument, others = "cuda", "torch allocator peak", 0

    def __init__(self, script=None):
        super().__init__()
        self.script, self.marks, self.waited = script or {}, 0, False
        self.step = self.rebased = self.given_back = 0

    def read(self, driver=True):
        self.step += 1
        peak = self.script.get(self.step, 2**30)
        return Reading(peak, peak + 2**20, 3 * 2**30 if driver else None)

    def rebase(self):
        self.rebased = self.rebased or self.step

    def give_back(self):
        self.given_back += 1

    def mark(self):
        self.marks += 1
        return self.marks

    def passed(self, mark):
        return self.waited or mark < self.marks - 5

    def seconds(self, start, end):
        return float(end - start)

    def wait(self):
        self.waited = True

    def managed_resident(self, managed):
        return managed // 2


@pytest.fixture
def card(monkeypatch):
    def make(script=None):
        made = Card(script)
        monkeypatch.setattr(ledgers, "Host", lambda: made)
        return made

    return make


def test_a_spike_is_in_record_rows_and_table_with_its_phase_and_batch(make_spec, card, monkeypatch, curve):
    # readings: load, then forward, backward and optimizer of each step: 1 + 3 * 7 + 2 is step 8's backward
    made, tables = card({24: 3 * 2**30}), []
    monkeypatch.setattr(Mirror, "table", lambda self, *given: tables.append(given))
    monkeypatch.setattr(ledgers, "managed_bytes", lambda optimizers: 2**29)
    spec = make_spec(callbacks={"memory": PhaseMemory}, max_steps=12)
    record = Runner().run([spec])[0]
    assert record["status"] == "completed", record["error"]
    (spike,) = record["memory"]["spikes"]
    assert (spike["step"], spike["phase"]) == (8, "backward")
    assert spike["excess_bytes"] == 2 * 2**30
    assert (spike["rows"], spike["tokens"], spike["cause"]) == (2, 50, "other")
    assert spike["optimizer_time_ratio"] == 1.0  # known a step later, and still recorded
    assert made.waited
    assert (made.given_back, made.rebased) == (1, 0)  # once a spike; a resumed state is paged before the first update
    (row,) = [row for row in rows_of(spec) if "memory/spike_excess_gib" in row]
    assert (row["step"], row["memory/spike_excess_gib"], row["memory/spike_by_length"]) == (8, 2.0, 0.0)
    assert row["memory/backward_peak_gib"] == 3.0
    ((name, columns, cells),) = tables
    assert name == "memory/spikes"
    assert dict(zip(columns, cells[0], strict=True)) == spike
    found = record["memory"]
    assert found["measured_peak_bytes"] == found["by_phase"]["backward"] == 3 * 2**30
    assert found["reserved_by_phase"]["backward"] == 3 * 2**30 + 2**20
    assert (found["managed_peak_bytes"], found["managed_resident_peak_bytes"]) == (2**29, 2**28)
    assert found["device_used_peak_bytes"] == 3 * 2**30
    assert set(found["seconds_by_phase"]) == {"forward", "backward", "optimizer"}


@pytest.mark.parametrize(("every", "counted"), [(1, [1, 2, 3, 4]), (3, [3, 4])])
def test_the_drivers_count_is_read_at_the_steps_with_a_row_and_its_base_before_the_first_update(
    make_spec, card, curve, every, counted
):
    made = card()
    spec = make_spec(callbacks={"memory": lambda: PhaseMemory(every_n_steps=every)})
    Runner().run([spec])
    assert made.rebased == 2 + 1  # load, forward, backward
    assert made.given_back == 0
    assert [row["step"] for row in rows_of(spec) if "memory/device_used_gib" in row] == counted


def test_progress_lines_say_where_a_run_stands(make_spec, caplog):
    caplog.set_level("INFO", "loralab.training.progress")
    Runner().run([make_spec(callbacks={"progress": lambda: ProgressLines(0.0)})])
    lines = [r.message for r in caplog.records if r.message.startswith("step ")]
    assert len(lines) == 4
    assert lines[1].startswith("step 2/4  loss ")


@pytest.mark.parametrize(("seconds", "text"), [(3.9, "3s"), (95, "1m35s"), (3600, "60m00s")])
def test_clock(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be at least 1"),
        ({"spike_window": 0}, "spike_window must be at least 1"),
        ({"profiled_step": 1}, "no optimizer state"),
        ({"profiled_step": "heavy"}, "must be heaviest, null or a number"),
        ({"spike_factor": 0.5}, "spike_factor must be a number of at least 1"),
        ({"spike_floor_mib": -1}, "spike_floor_mib must be a number of MiB from 0"),
    ],
)
def test_nonsense_is_refused(changes, says):
    with pytest.raises(ConfigError, match=says):
        PhaseMemory(**changes)


@pytest.mark.parametrize("ends", ["well", "by an error"])
def test_the_live_line_of_a_terminal_is_taken_off_however_a_fit_ends(make_spec, monkeypatch, ends):
    made, streams = [], [handler.stream for handler in logging.getLogger().handlers if hasattr(handler, "stream")]

    def callback():
        made.append(ProgressLines(0.0))
        return made[-1]

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def step(self, batches, index):
        assert made[-1]._live is not None
        if ends == "well":
            return real(self, batches, index)
        raise torch.OutOfMemoryError("no memory")

    real = FineTuner.training_step
    monkeypatch.setattr(FineTuner, "training_step", step)
    monkeypatch.setattr("sys.stderr", Terminal())
    (stored,) = Runner().run([make_spec(callbacks={"progress": callback})])
    assert stored["exit_code"] == (0 if ends == "well" else 6)
    assert made[-1]._live is None
    assert [h.stream for h in logging.getLogger().handlers if hasattr(h, "stream")] == streams
