"""Memory is observed phase by phase, on a CPU too, without a change to training."""

import json

import pytest
import torch

from loralab.run import Runner
from loralab.telemetry.memory import PhaseMemory, resident_bytes
from loralab.telemetry.progress import ProgressLines, clock


def test_resident_bytes_see_an_allocation():
    before = resident_bytes()
    held = torch.ones(50_000_000)  # 200 MB
    assert resident_bytes() - before > 150e6
    del held


def test_every_phase_is_in_the_record_and_in_the_rows(make_spec, curve):
    spec = make_spec(callbacks={"memory": lambda: PhaseMemory(every_n_steps=2)})
    record = Runner().run([spec])[0]
    phases = record["memory"]["by_phase"]
    assert {phase for phase, size in phases.items() if size} == {
        *("load", "forward", "backward", "optimizer", "evaluation")
    }
    assert record["memory"]["device"] == "cpu"
    assert record["memory"]["measured_peak_bytes"] is None  # torch keeps no allocator peak on a CPU
    assert len(curve(spec.folder, "memory/backward_peak_gib")) == 2


def test_telemetry_changes_no_number(make_spec, curve):
    watched = make_spec("watched", callbacks={"memory": PhaseMemory, "progress": lambda: ProgressLines(0.0)})
    alone = make_spec("alone")
    Runner().run([watched])
    Runner().run([alone])
    assert curve(watched.folder) == curve(alone.folder)


def test_progress_lines_say_where_a_run_stands(make_spec, caplog):
    caplog.set_level("INFO")
    Runner().run([make_spec(callbacks={"progress": lambda: ProgressLines(0.0)})])
    lines = [r.message for r in caplog.records if r.message.startswith("step ")]
    assert len(lines) == 4
    assert lines[1].startswith("step 2/4  loss ")


def test_the_phases_of_cuda_come_from_the_allocators_peak(monkeypatch):
    """The CUDA branch through a stand-in of the allocator; not run on a card here."""
    peaks = iter([10, 30, 20])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    memory = PhaseMemory()
    for phase in ("forward", "backward", "optimizer"):
        memory._close(phase)
    summary = memory.summary()
    assert summary["measured_peak_bytes"] == 30
    assert summary["by_phase"] == {"forward": 10, "backward": 30, "optimizer": 20}
    assert json.dumps(summary)


@pytest.mark.parametrize(("seconds", "text"), [(3.9, "3s"), (95, "1m35s"), (3600, "60m00s")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_a_step_count_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        PhaseMemory(every_n_steps=0)
