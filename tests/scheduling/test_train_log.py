"""train.log of each member of a pack tells its own story, and sweep.json the truth while a pack trains."""

import json
import logging
import time

import pytest

from loralab.cli import main
from loralab.records import record
from loralab.scheduling.sweep_file import SweepFile
from loralab.training.module import FineTuner

WORDS = ["logger=none", "callbacks=default", "callbacks.progress.seconds=0", "hydra.sweep.dir=s"]


@pytest.fixture
def sweep(tiny_arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = main.run(["train", "-m", *tiny_arguments, *WORDS, *words])
        return code, {stored["trial"]: stored for stored in map(record.read, record.find(tmp_path / "s"))}

    return run


def test_each_member_of_a_pack_has_its_own_lines_and_the_packs(sweep, tmp_path):
    _, records = sweep("seed=0,1,2")
    assert len(records) == 3
    logs = {trial: (tmp_path / "s" / trial / "train.log").read_text().splitlines() for trial in records}
    assert all(stored["pack"]["size"] == 3 for stored in records.values())
    for trial, lines in logs.items():
        steps = [line for line in lines if "  loss " in line and "trials  step" not in line]
        assert [line.split("step ")[1].split()[0] for line in steps] == ["1/2", "2/2"]
        rows = [json.loads(row) for row in (tmp_path / "s" / trial / "metrics.jsonl").read_text().splitlines()]
        losses = [row["train/loss"] for row in rows if "train/loss" in row]
        assert [float(line.split("loss ")[1].split()[0]) for line in steps] == pytest.approx(losses, abs=1e-4)
        assert any("3 trials  step 2/2" in line for line in lines)
        assert sum("val/loss" in line and f"seed={records[trial]['seed']}" in line for line in lines) == 1


def test_a_pack_says_on_the_terminal_where_it_stands(sweep, capsys):
    sweep("seed=0,1,2")
    message = capsys.readouterr().err
    assert "3 trials  step 2/2  loss " in message
    assert " to " in message.split("3 trials  step 2/2  loss ")[1].splitlines()[0]
    assert "  lr " not in message  # a member's own lines are in its train.log


def test_sweep_json_says_that_a_pack_runs(sweep, tmp_path, monkeypatch):
    seen = []
    real = FineTuner.training_step

    def step(self, batches, index):
        seen.append([entry["status"] for entry in record.read_sweep(tmp_path / "s")["trials"]])
        return real(self, batches, index)

    monkeypatch.setattr(FineTuner, "training_step", step)
    monkeypatch.setattr("loralab.scheduling.sweep_file.WRITTEN_EVERY", 0.0)
    sweep("seed=0,1", "adapter.r=2,3")
    assert ["running"] * 4 in seen
    assert {entry["status"] for entry in record.read_sweep(tmp_path / "s")["trials"]} == {"completed"}


def test_an_entry_of_ten_thousand_takes_less_than_five_milliseconds(tmp_path):
    trials = [{"trial": f"{n:010x}", "folder": f"{n:010x}", "status": "pending", "overrides": []} for n in range(10000)]
    file = SweepFile(tmp_path, {"name": "x", "question": "", "overrides": []}, [])
    file.content["trials"], file._entries = trials, {entry["trial"]: entry for entry in trials}
    begun = time.monotonic()
    for entry in trials:
        file.set(entry["trial"], "completed")
    file.flush()
    assert (time.monotonic() - begun) / len(trials) < 0.005
    assert {entry["status"] for entry in record.read_sweep(tmp_path)["trials"]} == {"completed"}


def test_a_sweep_of_another_launcher_has_its_file_too(sweep, tmp_path):
    code, records = sweep("seed=0,1", "hydra/launcher=basic")
    assert code == 0
    listed = record.read_sweep(tmp_path / "s")["trials"]
    assert {entry["trial"]: entry["status"] for entry in listed} == dict.fromkeys(records, "completed")
    gone = next(iter(records))
    (tmp_path / "s" / gone / "result.json").unlink()
    assert main.run(["sweep", "--resume", "s"]) == 0
    assert record.read(tmp_path / "s" / gone)["status"] == "completed"
    assert all(stored["pack"]["size"] == 1 for stored in records.values())


@pytest.fixture(autouse=True)
def _levels():
    """What a sweep sets in this process."""
    before = logging.getLogger("loralab").level
    yield
    logging.getLogger("loralab").setLevel(before)
