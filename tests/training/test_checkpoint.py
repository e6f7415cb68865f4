"""A run that was killed goes on from its checkpoint, bit for bit; one that cannot begins anew."""

import json
import shlex
import signal
import time
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from forked import Forked
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins.precision import Precision
from torch.utils._pytree import tree_flatten

from loralab.adapters.lora import LoRA
from loralab.cli import main
from loralab.errors import ConfigError, Interrupted
from loralab.optim.optimizers import AdamW, Schedule
from loralab.records import record
from loralab.running.runner import Runner
from loralab.training import checkpoint
from loralab.training.checkpoint import Checkpoint, path
from loralab.training.module import FineTuner


@pytest.fixture
def three(make_spec, make_data):
    """Three unlike trials of nine, seven and nine steps; their data repeats itself on the way."""

    def make(prefix, optimizer="adamw", every=1, **changes):
        shared = {"accumulate_grad_batches": 2, "val_check_interval": 3, **changes}
        return [
            make_spec(
                f"{prefix}{index}",
                seed=index,
                adapter=LoRA(r=4 * (index + 1), lora_dropout=0.1 * index),
                optimizer=AdamW(name=optimizer, lr=1e-2 / (index + 1)),
                schedule=Schedule(kind="cosine", warmup_steps=index),
                max_steps=7 if index == 1 else 9,
                data=make_data(batch_size=2, limit=6),
                callbacks={"checkpoint": lambda: Checkpoint(minutes=None, every_n_steps=every)},
                **shared,
            )
            for index in range(3)
        ]

    return make


@pytest.fixture
def stop(monkeypatch):
    """Breaks training off once, in the last pass of a step (counted from zero)."""
    real = FineTuner.training_step

    def at(step, error):
        left = [error]

        def broken(self, batches, index):
            last = max(self.trials[i].step for i in batches)
            micro = self.trials[0].spec.trainer.accumulate_grad_batches - 1
            if left and last == step and next(iter(batches.values()))["micro"] == micro:
                raise left.pop()
            return real(self, batches, index)

        monkeypatch.setattr(FineTuner, "training_step", broken)

    return at


@pytest.fixture(scope="module")
def finished():
    """{settings: trials that ran without a break}, for the tests of this file that compare with the same ones."""
    return {}


@pytest.fixture
def uninterrupted(three, finished):
    def run(optimizer="adamw", **changes):
        key = (optimizer, *changes.items())
        if key not in finished:
            finished[key] = three("whole", optimizer, **changes)
            Runner().run(finished[key])
        return finished[key]

    return run


def rows(spec):
    return (spec.folder / "metrics.jsonl").read_text()


def assert_same(found, expected, weights):
    for ours, theirs in zip(found, expected, strict=True):
        assert rows(ours) == rows(theirs)
        one, other = weights(ours.folder), weights(theirs.folder)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


PLACES = [(0, 1, None), (3, 1, 3), (5, 2, 4), (8, 1, 8)]


@pytest.mark.parametrize(
    ("optimizer", "step", "every", "at"),
    [
        *(("adamw", *place) for place in PLACES),
        ("adamw_8bit", 3, 1, 3),
        *(pytest.param("adamw_8bit", *place, marks=pytest.mark.slow) for place in PLACES if place[0] != 3),
    ],
)
def test_a_pack_that_broke_off_goes_on_bit_for_bit(three, uninterrupted, stop, weights, optimizer, step, every, at):
    whole = uninterrupted(optimizer)
    stop(step, RuntimeError("gone"))
    again = three("again", optimizer, every)
    assert {one["status"] for one in Runner().run(again)} == {"failed"}
    done = Runner().run(again)
    assert {one["status"] for one in done} == {"completed"}, [one["error"] for one in done]
    assert [one.get("resumed_from") for one in done] == [at, 7 if at == 8 else at, at]
    assert_same(again, whole, weights)
    assert not any((spec.folder / "checkpoints").exists() for spec in again)
    assert done[0]["time"]["tokens"] == record.read(whole[0].folder)["time"]["tokens"]


@pytest.mark.parametrize("step", [5, 6])  # 6: the validation before it is made again, and judged once
def test_an_interrupted_run_writes_where_it_stands(three, uninterrupted, stop, weights, step):
    whole, again = uninterrupted(patience=1), three("again", every=100, patience=1)
    stop(step, Interrupted(signal.SIGTERM))
    with pytest.raises(Interrupted):
        Runner().run(again)
    done = Runner().run(again)
    assert [one["resumed_from"] for one in done] == [step] * 3
    assert_same(again, whole, weights)


def test_an_interruption_stays_one_where_no_checkpoint_can_be_written(three, stop, caplog, monkeypatch):
    def full(*_):
        raise RuntimeError("no space left")

    again = three("again", every=100)
    stop(2, Interrupted(signal.SIGTERM))
    monkeypatch.setattr("loralab.training.checkpoint.torch.save", full)
    with pytest.raises(Interrupted):
        Runner().run(again)
    assert "has no checkpoint at step 2: no space left" in caplog.text
    assert not list((again[0].folder / "checkpoints").iterdir())


def test_a_trial_alone_goes_on_from_what_its_pack_wrote(three, uninterrupted, stop, weights):
    whole, again = uninterrupted(), three("again")
    stop(4, RuntimeError("gone"))
    Runner().run(again)
    checkpoint.forget(again[0].folder)  # as if killed between two of the files: they go on at different steps
    records = Runner().run(again[:2]) + Runner().run(again[2:])
    assert [one.get("resumed_from") for one in records] == [None, 4, 4]
    assert [one["pack"] for one in records[:2]] == [{"size": 1, "index": 0}] * 2
    assert_same(again, whole, weights)


def test_what_fails_while_an_interruption_is_dealt_with_does_not_hide_it(three, stop):
    class Clumsy(Callback):
        pack_aware = True

        def on_exception(self, trainer, pl_module, exception):
            raise OSError("bad file descriptor")

    again = [replace(one, callbacks={"clumsy": Clumsy}) for one in three("again")]
    stop(2, Interrupted(signal.SIGTERM))
    with pytest.raises(Interrupted) as stopped:
        Runner().run(again)
    assert stopped.value.exit_code == 143
    assert {record.read(one.folder)["status"] for one in again} == {"interrupted"}


def test_what_cannot_be_removed_hurts_no_trial(three, uninterrupted, weights, caplog):
    whole, again = uninterrupted(), three("again")
    again[0].folder.mkdir()
    (again[0].folder / "checkpoints").write_text("a file")
    done = Runner().run(again)
    assert [one["pack"]["size"] for one in done] == [3, 3, 3]
    assert "again0 has no checkpoint at step 1" in caplog.text
    assert_same(again, whole, weights)


@pytest.fixture
def killed(make_spec, stop):
    """A trial of four steps with a checkpoint after each, that broke off after two."""
    spec = make_spec(callbacks={"checkpoint": lambda: Checkpoint(None, 1)})
    stop(2, RuntimeError("gone"))
    (broken,) = Runner().run([spec])
    assert broken["status"] == "failed"
    return spec


def flip(file, place):
    """Changes one bit of ``file`` at this share of its length."""
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1 << int(1000 * place) % 8
    file.write_bytes(content)


def weight_in(file):
    """Where in ``file`` the middle of its largest tensor lies, as a share of its length."""
    content = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        weights = archive.read(max(archive.infolist(), key=lambda one: one.file_size))
    return (content.index(weights) + len(weights) // 2 + 0.5) / len(content)


@pytest.mark.parametrize("what", ["other data", "other trial"])
def test_what_does_not_belong_to_the_trial_is_not_taken_up_and_goes(killed, make_data, stop, curve, what):
    changes = {"other data": {"data": make_data(limit=5)}, "other trial": {"id": "another"}}[what]
    other = replace(killed, **changes)
    stop(0, RuntimeError("gone"))
    assert Runner().run([other])[0]["status"] == "failed"  # its rows are written anew, and the old file's are gone
    assert not list(killed.folder.glob("checkpoints/*"))
    (done,) = Runner().run([killed])
    assert done["status"] == "completed"
    assert "resumed_from" not in done
    assert len(curve(killed.folder)) == 4


@pytest.mark.parametrize("what", ["cut short", "empty", "one bit", "gone"])
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(killed, make_spec, weights, curve, caplog, what):
    last = path(killed.folder)
    assert sorted(file.name for file in last.parent.iterdir()) == ["last.pt", "previous.pt"]
    {
        "cut short": lambda: last.write_bytes(last.read_bytes()[:-100]),
        "empty": lambda: last.write_bytes(b""),
        "one bit": lambda: flip(last, weight_in(last)),
        "gone": last.unlink,  # as between the two renamings of a write
    }[what]()
    (done,) = Runner().run([killed])
    assert (done["status"], done["resumed_from"]) == ("completed", 1)
    assert what == "gone" or f"{last} cannot be used" in caplog.text
    whole = make_spec("whole")
    Runner().run([whole])
    assert curve(killed.folder) == curve(whole.folder)
    assert all(torch.equal(weights(killed.folder)[name], value) for name, value in weights(whole.folder).items())


def test_where_both_are_damaged_the_trial_begins_anew(killed, curve, caplog):
    for file in path(killed.folder).parent.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    (done,) = Runner().run([killed])
    assert (done["status"], "resumed_from" in done) == ("completed", False)
    assert "last.pt cannot be used" in caplog.text
    assert "previous.pt cannot be used" in caplog.text
    assert "the one before it, previous.pt, is tried" in caplog.text
    assert "the trial begins anew" in caplog.text
    assert len(curve(killed.folder)) == 4


@pytest.mark.parametrize("said", [True, False])
def test_a_checkpoint_of_another_precision_is_kept_and_not_gone_on_from(killed, monkeypatch, curve, said):
    """trainer.precision=auto is another one on a card; an older checkpoint does not say that it was float32."""
    if not said:
        state = torch.load(path(killed.folder), weights_only=True)
        del state["precision"]
        torch.save(state, path(killed.folder))
    kept = path(killed.folder).read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(type(killed.trainer), "precision_on", lambda self, device: "bf16-mixed")
        (refused,) = Runner().run([killed])
    assert (refused["status"], refused["exit_code"]) == ("failed", 4)
    assert "was computed in 32-true, and trainer.precision=auto is bf16-mixed on this device" in refused["error"]
    assert path(killed.folder).read_bytes() == kept
    (done,) = Runner().run([killed])
    assert (done["status"], done["base"]["precision"]) == ("completed", "32-true")
    assert len(curve(killed.folder)) == 4


def test_no_flipped_bit_changes_what_is_read_in_silence(killed, monkeypatch):
    """Wherever it lies, the file is refused, or all that is read is as before: it fills a space between tensors."""
    last, kept = path(killed.folder), path(killed.folder).read_bytes()
    whole, read = torch.load(last, weights_only=True), []
    monkeypatch.setattr(checkpoint, "_made_on", lambda trial: whole["made_on"])
    trial = SimpleNamespace(spec=killed, step=0, max_steps=4, load_state_dict=read.append)
    trial.adapter = SimpleNamespace(state_dict=lambda: whole["adapter"])
    last.with_name("previous.pt").unlink()
    places = [number / 211 for number in range(211)]
    for place in places:
        last.write_bytes(kept)
        flip(last, place)
        checkpoint.resume(trial)
    assert len(read) < len(places) / 2
    assert all(same(state, whole) for state in read)


def same(one, other):
    (leaves, structure), (others, like) = tree_flatten(one), tree_flatten(other)
    equal = [torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(leaves, others, strict=True)]
    return structure == like and all(equal)


def test_a_loss_scaler_goes_on_where_it_stood(make_spec, break_off, monkeypatch):
    """A stand-in for 16-mixed, which needs a GPU: what its plugin says of itself comes back to the next one."""
    given = []
    monkeypatch.setattr(Precision, "state_dict", lambda self: {"scale": 1024.0, "_growth_tracker": 3})
    monkeypatch.setattr(Precision, "load_state_dict", lambda self, state: given.append(state))
    spec = make_spec(callbacks={"checkpoint": lambda: Checkpoint(None, 1)})
    break_off([spec], step=2)
    assert given == []
    (done,) = Runner().run([spec])
    assert (done["status"], done["resumed_from"]) == ("completed", 2)
    assert given == [{"scale": 1024.0, "_growth_tracker": 3}]


def test_the_times_of_a_trial_are_the_sum_of_its_processes(make_spec, stop, monkeypatch):
    """Each step takes a second of a clock that stands still in between; a killed process loses what it did behind its
    last checkpoint."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    real = FineTuner.optimizer_step

    def slow(self, *given):
        real(self, *given)
        now[0] += 1.0

    monkeypatch.setattr(FineTuner, "optimizer_step", slow)
    specs = [make_spec(name, max_steps=6, callbacks={"checkpoint": lambda: Checkpoint(None, 2)}) for name in "ab"]
    for step in (3, 5):
        stop(step, RuntimeError("gone"))
        assert {one["status"] for one in Runner().run(specs)} == {"failed"}
    done = Runner().run(specs)
    assert [one["resumed_from"] for one in done] == [4, 4]
    times = [one["time"] for one in done]
    assert [(one["train_s"], one["wall_s"], one["startup_s"]) for one in times] == [(6.0, 6.0, 0.0)] * 2
    assert times[0]["tokens_per_s"] == pytest.approx(times[0]["tokens"] / 6.0)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_32bit", "adamw_8bit"])
def test_a_file_holds_no_more_than_its_tensors_and_one_that_does_is_named(make_spec, optimizer, caplog, monkeypatch):
    sizes = []
    whole = checkpoint._check_size
    monkeypatch.setattr(checkpoint, "_check_size", lambda *args: (sizes.append(args), whole(*args)))
    every = {"checkpoint": lambda: Checkpoint(minutes=None, every_n_steps=1)}
    specs = [make_spec(f"{r}", adapter=LoRA(r=r), optimizer=AdamW(name=optimizer), callbacks=every) for r in (4, 32)]
    records = Runner().run(specs)
    assert [one["status"] for one in records] == ["completed"] * 2, records
    assert sizes
    assert "written whole" not in caplog.text
    folder = specs[0].folder / "checkpoints"
    folder.mkdir(exist_ok=True)
    state = {"adapter": {"a": torch.zeros(2**20)[:16]}}
    torch.save(state, folder / "last.pt")
    whole(folder / "last.pt", state)
    assert f"{folder / 'last.pt'} has 4,19" in caplog.text
    assert "and the tensors in it 64: some are parts of larger ones" in caplog.text


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="minutes"):
        Checkpoint(minutes=0)
    with pytest.raises(ConfigError, match="every_n_steps"):
        Checkpoint(every_n_steps=0)
    with pytest.raises(ConfigError, match="'abc'"):
        Checkpoint(minutes="abc")
    with pytest.raises(ConfigError, match="whole number"):
        Checkpoint(every_n_steps=1.5)


def test_a_trial_without_patience_left_ends_and_the_others_do_not_notice(three, weights, curve):
    whole = three("whole", val_check_interval=1)
    Runner().run(whole)
    again = three("again", val_check_interval=1)
    # its loss falls, so that a wish for larger ones is disappointed at once
    again[2] = replace(again[2], metric_mode="max", trainer=replace(again[2].trainer, patience=2))
    done = Runner().run(again)
    assert_same(again[:2], whole[:2], weights)
    assert [one["status"] for one in done] == ["completed"] * 3
    assert done[2]["time"]["steps"] == done[2]["stopped_early"]["step"] == 3
    assert curve(again[2].folder) == curve(whole[2].folder)[:3]
    assert curve(again[2].folder, "val/loss") == curve(whole[2].folder, "val/loss")[:3]
    assert done[2]["metrics"]["val/loss"] == curve(whole[2].folder, "val/loss")[2]


def test_lightnings_own_early_stopping_sees_a_lone_trials_metrics(make_spec):
    watch = lambda: EarlyStopping("val/loss", mode="max", patience=2)  # noqa: E731
    (done,) = Runner().run([make_spec(max_steps=9, val_check_interval=1, callbacks={"stop": watch})])
    assert (done["status"], done["time"]["steps"]) == ("completed", 3), done["error"]


class Counts(Callback):
    """Stops the run after five steps that it has counted itself."""

    def __init__(self):
        self.count = 0

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.count += 1
        self.log("counted", float(self.count))
        trainer.should_stop = trainer.should_stop or self.count == 5


class KeptCounts(Counts):
    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


@pytest.mark.parametrize(("kind", "goes_on"), [(Counts, False), (KeptCounts, True)])
def test_a_trial_with_callbacks_of_the_users_own_goes_on_where_they_have_a_state(make_spec, stop, curve, kind, goes_on):
    def mine(name):
        callbacks = {"mine": kind, "checkpoint": lambda: Checkpoint(None, 1)}
        return make_spec(name, max_steps=9, val_check_interval=1, callbacks=callbacks)

    whole, again = mine("whole"), mine("again")
    Runner().run([whole])
    stop(3, RuntimeError("gone"))
    Runner().run([again])
    (done,) = Runner().run([again])
    assert (done["status"], done["time"]["steps"], "resumed_from" in done) == ("completed", 5, goes_on)
    for key in ("train/loss", "val/loss", "counted"):
        assert curve(again.folder, key) == curve(whole.folder, key)


def test_killed_hard_and_called_again(tiny_arguments, tmp_path):
    words = ["train", *tiny_arguments, "callbacks=default", "trainer.max_steps=100"]
    words += ["callbacks.checkpoint.every_n_steps=1", f"hydra.run.dir={tmp_path / 'run'}"]
    process = Forked(lambda: main.run(words))
    kept, metrics = path(tmp_path / "run"), tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (kept.is_file() and metrics.read_text().count("\n") >= 4):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert main.run(words) == 0
    done = record.read(tmp_path / "run")
    assert done["resumed_from"] >= 1
    steps = [row["step"] for row in map(json.loads, metrics.read_text().splitlines()) if "train/loss" in row]
    assert steps == list(range(1, 101))


@pytest.mark.parametrize(("every", "way"), [("1", "goes on from its checkpoint"), ("null", "begins anew")])
def test_a_run_that_is_told_to_stop_says_the_command_that_goes_on(tiny_arguments, tmp_path, stop, capsys, every, way):
    words = [*tiny_arguments, "trainer.max_steps=3", "+callbacks.checkpoint.minutes=null"]
    words += ["+callbacks.checkpoint._target_=loralab.training.checkpoint.Checkpoint"]
    words = [word for word in words if word != "trainer.max_steps=2"]
    folder = tmp_path / "a folder, with words"
    stop(2, Interrupted(signal.SIGTERM))
    words += [f"+callbacks.checkpoint.every_n_steps={every}", f"hydra.run.dir={folder}"]
    assert main.run(["train", *words]) == 143
    said = capsys.readouterr().err.strip().splitlines()[-1]
    begin, _, command = said.partition(" with: loralab ")
    assert begin == f"loralab: stopped by signal 15; it {way}"
    assert main.run(shlex.split(command)) == 0
    done = record.read(folder)
    assert (done["status"], done.get("resumed_from")) == ("completed", 2 if every == "1" else None)
