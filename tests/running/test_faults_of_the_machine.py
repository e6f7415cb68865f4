"""A machine that fails in the middle of a run: what was written before stays whole, and the record says what happened.

/dev/full stands in for a full disk: it can be opened, and a write to it fails with ENOSPC.
"""

import errno
import json
import logging
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch.optim import AdamW

from loralab import signals
from loralab.adapters.hooks import AdapterHooks
from loralab.errors import Interrupted
from loralab.records import record
from loralab.running.runner import Runner
from loralab.scheduling.train_log import train_logs
from loralab.training import checkpoint
from loralab.training.checkpoint import Checkpoint
from loralab.training.module import FineTuner
from loralab.training.trial import Trial

FULL = Path("/dev/full")
NEEDS_FULL = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


@pytest.fixture
def at_step(monkeypatch):
    """Calls ``action(module)`` before the pass behind so many optimizer steps."""
    real = FineTuner.training_step

    def install(step, action):
        def watched(self, batches, index):
            if self.trials[0].step == step:
                action(self)
            return real(self, batches, index)

        monkeypatch.setattr(FineTuner, "training_step", watched)

    return install


def losses(spec):
    rows = map(json.loads, (spec.folder / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]


@pytest.fixture
def kept(make_spec):
    """A trial of four steps with a checkpoint after each."""
    return make_spec(callbacks={"checkpoint": lambda: Checkpoint(minutes=None, every_n_steps=1)})


def stop(module):
    raise RuntimeError("gone")


def state(spec):
    return torch.load(checkpoint.path(spec.folder), weights_only=True)


@NEEDS_FULL
def test_a_disk_that_is_full_for_metrics_is_exit_7(make_spec):
    spec = make_spec()
    spec.folder.mkdir()
    (spec.folder / "metrics.jsonl").symlink_to(FULL)
    (stored,) = Runner().run([spec])
    assert (stored["status"], stored["exit_code"]) == ("failed", 7)
    assert "metrics.jsonl cannot be written: No space left on device" in stored["error"]
    assert record.read(spec.folder)["error"] == stored["error"]


@NEEDS_FULL
def test_a_file_that_cannot_be_closed_leaves_no_adapter_on_the_base(make_spec):
    specs, runner = [make_spec(name, max_steps=1) for name in ("one", "two")], Runner()
    for spec in specs:
        spec.folder.mkdir()
        (spec.folder / "metrics.jsonl").symlink_to(FULL)
    assert [stored["exit_code"] for stored in runner.run(specs)] == [7, 7]
    assert not AdapterHooks.of(runner.inputs._base.model)._hooks


@NEEDS_FULL
def test_a_disk_that_is_full_for_the_log_is_said_once_and_stops_nothing(make_spec, capsys):
    spec = make_spec()
    spec.folder.mkdir()
    (spec.folder / "train.log").symlink_to(FULL)
    with train_logs({spec.id: spec.folder}):
        for _ in range(3):
            logging.getLogger("loralab").warning("a line")
        (stored,) = Runner().run([spec])
    assert stored["status"] == "completed"
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.count("train.log cannot be written: No space left on device") == 1


def test_a_disk_that_fills_up_keeps_the_checkpoint_before(kept, at_step, monkeypatch, caplog):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at_step(2, lambda module: monkeypatch.setattr(os, "fsync", full))
    (stored,) = Runner().run([kept])
    assert (stored["status"], stored["exit_code"]) == ("failed", 7), stored["error"]
    assert "No space left on device" in stored["error"]
    assert re.search(r"has no checkpoint at step 3: .*No space left on device", caplog.text)
    assert state(kept)["step"] == 2
    assert sorted(path.name for path in (kept.folder / "checkpoints").iterdir()) == ["last.pt", "previous.pt"]


def test_a_batch_that_is_nan_ends_the_trial_and_leaves_the_finite_checkpoint(kept, at_step):
    def spoil(module):
        next(iter(module.trials[0].adapter.parameters())).data.fill_(float("nan"))

    at_step(2, spoil)
    (stored,) = Runner().run([kept])
    assert (stored["status"], stored["exit_code"]) == ("diverged", 5)
    assert "not finite" in stored["error"]
    assert state(kept)["step"] == 2
    assert all(bool(value.isfinite().all()) for value in state(kept)["adapter"].values())
    assert not (kept.folder / "adapter").exists()


@pytest.mark.parametrize("watched", [False, True], ids=["alone", "with another callback"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("owner", "method"),
    [(AdamW, "step"), (Trial, "finish_step"), (Trial, "log"), (FineTuner, "lr_scheduler_step")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_signal_between_the_update_and_the_end_of_its_step_loses_no_step(
    make_spec, monkeypatch, handlers, owner, method, number, watched
):
    """It is answered once the step can be written, and the run that goes on makes the same bits."""
    more = {"own": Callback} if watched else {}
    whole, kept = (make_spec(name, callbacks={"checkpoint": Checkpoint, **more}) for name in ("whole", "kept"))
    Runner().run([whole])
    real, calls = getattr(owner, method), []

    def interrupted(*given, **more):
        result = real(*given, **more)
        calls.append(given)
        if len(calls) == 2:
            signal.raise_signal(number)
        return result

    monkeypatch.setattr(owner, method, interrupted)
    signals.listen()
    with pytest.raises(Interrupted) as stopped:
        Runner().run([kept])
    assert stopped.value.exit_code == 128 + number
    assert state(kept)["step"] == 2
    signals.listen()
    (done,) = Runner().run([kept])
    assert done["status"] == "completed"
    one, other = (load_file(spec.folder / "adapter" / "adapter_model.safetensors") for spec in (whole, kept))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert losses(kept) == losses(whole)


def test_a_second_signal_does_not_wait_for_the_end_of_the_step(kept, monkeypatch, handlers):
    def hangs(self):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it goes on")

    monkeypatch.setattr(Trial, "finish_step", hangs)
    signals.listen()
    with pytest.raises(Interrupted):
        Runner().run([kept])
    assert not checkpoint.path(kept.folder).exists()


def test_a_signal_in_a_step_that_fails_is_not_lost(kept, monkeypatch, handlers):
    def fails(self):
        signal.raise_signal(signal.SIGTERM)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Trial, "finish_step", fails)
    signals.listen()
    with pytest.raises(Interrupted) as stopped:
        Runner().run([kept])
    assert stopped.value.exit_code == 143


def test_a_second_interruption_does_not_tear_what_the_first_one_writes(kept, at_step, monkeypatch, handlers):
    real = torch.save

    def impatient(*given, **more):
        signal.raise_signal(signal.SIGINT)
        real(*given, **more)

    def interrupt(module):
        monkeypatch.setattr(torch, "save", impatient)
        signal.raise_signal(signal.SIGINT)

    at_step(2, interrupt)
    signals.listen()
    with pytest.raises(Interrupted) as stopped:
        Runner().run([kept])
    assert stopped.value.exit_code == 130
    assert record.read(kept.folder)["status"] == "interrupted"
    assert state(kept)["step"] == 2
    monkeypatch.setattr(torch, "save", real)
    monkeypatch.undo()
    (done,) = Runner().run([kept])
    assert (done["status"], done["resumed_from"]) == ("completed", 2)


class Code:
    """Makes a folder when it is unpickled by a reader that runs code."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_code_in_a_checkpoint_is_never_run(kept, at_step, tmp_path, caplog):
    at_step(2, stop)
    Runner().run([kept])
    path = checkpoint.path(kept.folder)
    torch.save({**state(kept), "more": Code(tmp_path / "made")}, path)
    at_step(99, stop)
    (done,) = Runner().run([kept])
    assert (done["status"], done["resumed_from"]) == ("completed", 1)
    said = f"{path} holds more than tensors, such as code, which is never run: the one before it, previous.pt, is tried"
    assert said in caplog.text
    assert "weights_only" not in caplog.text
    assert not (tmp_path / "made").exists()


def test_a_checkpoint_of_a_newer_version_is_refused_and_kept(kept, at_step):
    at_step(2, stop)
    Runner().run([kept])
    path = checkpoint.path(kept.folder)
    torch.save({**state(kept), "format": checkpoint.FORMAT + 1}, path)
    before = path.read_bytes()
    (done,) = Runner().run([kept])
    assert (done["status"], done["exit_code"]) == ("failed", 4)
    assert f"{path} has format 3, and this loralab reads up to 2; valid: a newer loralab, or --fresh" in done["error"]
    assert path.read_bytes() == before


def test_a_clock_that_jumps_back_a_day_changes_no_duration_and_no_checkpoint(kept, at_step, monkeypatch):
    real = time.time
    at_step(2, lambda module: monkeypatch.setattr(time, "time", lambda: real() - 86400))
    (done,) = Runner().run([kept])
    assert done["status"] == "completed"
    assert 0 < done["time"]["train_s"] <= done["time"]["wall_s"] < 3600
    assert done["time"]["startup_s"] >= 0


def test_data_that_is_deleted_in_the_middle_of_a_run_costs_nothing(make_spec, make_data, rows, tmp_path, at_step):
    copies = {
        split: shutil.copy(rows["pairs", split], tmp_path / f"{split}.jsonl") for split in ("train", "validation")
    }
    spec = make_spec(data=make_data(**{split: str(path) for split, path in copies.items()}))
    at_step(2, lambda module: [Path(path).unlink(missing_ok=True) for path in copies.values()])
    (done,) = Runner().run([spec])
    assert done["status"] == "completed", done["error"]
    assert done["data"]["fingerprint"]


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be removed there")
def test_a_folder_that_is_deleted_in_the_middle_of_a_run_has_all_rows_at_its_end(make_spec, at_step, curve, caplog):
    spec = make_spec()
    at_step(2, lambda module: shutil.rmtree(spec.folder, ignore_errors=True))
    (done,) = Runner().run([spec])
    assert done["status"] == "completed", done["error"]
    assert len(curve(spec.folder)) == 4
    assert f"{spec.folder / 'metrics.jsonl'} was removed while the run wrote it: its rows are" in caplog.text
    assert record.read(spec.folder)["status"] == "completed"
