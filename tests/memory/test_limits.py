"""Ballast, cap and snapshots through stand-ins of torch.cuda; lengthened batches for real."""

from contextlib import contextmanager

import pytest
import torch

from loralab.errors import ConfigError
from loralab.memory import limits
from loralab.memory.ledgers import GIB
from loralab.memory.limits import Ballast, MemorySpec, Snapshots, auto_ballast
from loralab.memory.phases import PhaseMemory
from loralab.memory.spikes import Spike
from loralab.running.fit import Fit
from loralab.running.runner import Runner

SPIKE = Spike(8, "backward", 2, 1, 1, 1, 1.0, "other", 0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ballast": "much"}, "memory.ballast must be null, auto or a positive number of GiB, got 'much'"),
        ({"ballast": -1}, "memory.ballast must be .*, got -1"),
        ({"ballast": True}, "memory.ballast must be .*, got True"),
        ({"cap": 0.0}, "memory.cap must be a positive number of GiB or null, got 0.0"),
        ({"spiky_every": 0}, "memory.spiky_every"),
        ({"spiky_length": 0}, "memory.spiky_length"),
    ],
)
def test_nonsense_is_refused_with_its_key(changes, says):
    with pytest.raises(ConfigError, match=says):
        MemorySpec(**changes)


@pytest.mark.parametrize("changes", [{"ballast": "auto"}, {"ballast": 2}, {"cap": 24.0}, {"snapshot": "there"}])
def test_what_only_a_card_can_do_is_refused_on_a_cpu(make_spec, changes):
    record = Runner().run([make_spec(memory=MemorySpec(**changes))])[0]
    assert (record["status"], record["exit_code"]) == ("failed", 2)
    assert f"memory.{next(iter(changes))}=" in record["error"]
    assert "CUDA" in record["error"]


@pytest.mark.parametrize("changes", [{"solo": True}, {"spiky_every": 2}, {"cap": 1.0}])
def test_a_measured_trial_shares_its_pass_with_nobody(make_spec, changes):
    records = Runner().run([make_spec("one"), make_spec("two", memory=MemorySpec(**changes))])
    assert [r["exit_code"] for r in records] == [2, 2]
    assert (
        f"memory.{next(iter(changes))} is set, and a trial whose memory is limited or measured runs alone"
        in records[0]["error"]
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "distilbert"])
def test_lengthened_batches_need_more_memory_and_train_alike(make_spec, curve, family):
    observed = {"memory": lambda: PhaseMemory(every_n_steps=1, profiled_step=3)}
    found = {}
    for name, memory in {"normal": MemorySpec(), "spiky": MemorySpec(spiky_every=3, spiky_length=120)}.items():
        spec = make_spec(name, family, memory=memory, callbacks=observed, accumulate_grad_batches=2, max_steps=6)
        record = Runner().run([spec])[0]
        assert record["status"] == "completed", record["error"]
        found[name] = (curve(spec.folder), curve(spec.folder, "batch/longest"), record)
    assert found["spiky"][0] == pytest.approx(found["normal"][0], rel=1e-5)
    usual = found["normal"][1]
    assert found["spiky"][1] == [*usual[:2], 120, *usual[3:5], 120]
    normal, spiky = (found[name][2]["memory"]["measured_peak_bytes"] for name in ("normal", "spiky"))
    assert spiky > 1.2 * normal
    assert found["spiky"][2]["time"]["tokens"] == found["normal"][2]["time"]["tokens"]


def test_the_length_of_a_spike_is_four_rows_within_the_bases_positions(make_spec, curve):
    for name, length, seen in (("default", None, 128), ("given", 100, 100)):
        spec = make_spec(
            name,
            callbacks={"memory": lambda: PhaseMemory(every_n_steps=1)},
            memory=MemorySpec(spiky_every=4, spiky_length=length),
        )
        assert Runner().run([spec])[0]["status"] == "completed"
        assert curve(spec.folder, "batch/longest")[-1] == seen
    for length in (64, 129):
        record = Runner().run([make_spec(f"{length}", memory=MemorySpec(spiky_every=4, spiky_length=length))])[0]
        assert record["exit_code"] == 2
        assert f"memory.spiky_length={length} must be more than model.max_length=64" in record["error"]


def test_the_automatic_ballast_leaves_the_need_and_half_of_the_state():
    assert auto_ballast(room=100, need=30, state=20) == 60
    assert auto_ballast(room=30, need=30, state=20) == 0


class Card:
    """torch.cuda with 80 GiB, of which ``used`` are."""

    def __init__(self, monkeypatch, used, reserved):
        self.used, self.reserved, self.taken, self.fractions = used, reserved, [], []
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int((80 - self.used) * GIB), 80 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: int(self.reserved * GIB))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self.fractions.append)
        monkeypatch.setattr(limits.torch, "empty", self.empty)

    def empty(self, size, **where):
        if size / GIB > 80 - self.used:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.taken.append(size / GIB)
        return torch.zeros(0)


@pytest.mark.parametrize("paged", [False, True], ids=["unpaged", "paged"])
def test_both_arms_get_the_same_automatic_ballast(monkeypatch, paged):
    """30 GiB beside 4 GiB of state, which is torch's or managed; 1 GiB of context: 80 - 1 - 30 - 2 are taken."""
    monkeypatch.setattr(limits, "state_bytes", lambda optimizers: 4 * GIB)
    monkeypatch.setattr(limits, "managed_bytes", lambda optimizers: 4 * GIB if paged else 0)
    card = Card(monkeypatch, used=1 + 20 + 4, reserved=20 if paged else 24)
    ballast = Ballast("auto")
    ballast._allocate((30 if paged else 34) * GIB, [])
    assert card.taken == [47.0]
    assert ballast.summary() == {"ballast_bytes": 47 * GIB}


def test_a_ballast_larger_than_what_is_free_takes_what_is_free_and_says_so(monkeypatch, caplog):
    card = Card(monkeypatch, used=70, reserved=60)
    ballast = Ballast(50)
    ballast._allocate(0, [])
    assert card.taken == [9.75]
    assert "50.00 GiB are configured and 10.00 GiB are free; 9.75 GiB are allocated" in caplog.text


def test_a_ballast_that_cannot_be_had_is_a_warning(monkeypatch, caplog):
    Card(monkeypatch, used=0, reserved=0)
    monkeypatch.setattr(limits, "SPARE", -90 * GIB)
    ballast = Ballast(85)
    ballast._allocate(0, [])
    assert ballast.bytes == 0
    assert "could not be allocated" in caplog.text


def test_the_ballast_comes_after_the_warm_up_once_and_goes_with_the_fit(make_spec, monkeypatch):
    seen = []

    class Watched(Ballast):
        def _allocate(self, peak, optimizers):
            assert len(optimizers[0].state) > 0  # managed state first
            seen.append(peak)
            self._block = torch.zeros(1)

    for size, every, expected in ((1, 0, 2), ("auto", 3, 3)):
        made, steps = Watched(size, every), []

        class Steps(PhaseMemory):
            def on_train_batch_end(self, trainer, *rest):
                super().on_train_batch_end(trainer, *rest)
                steps.append((trainer.global_step, len(seen)))  # noqa: B023 - read within the loop's turn

        seen.clear()
        record = Runner().run([make_spec(f"{size}", callbacks={"m": Steps, "ballast": lambda made=made: made})])[0]
        assert record["status"] == "completed", record["error"]
        assert [taken for _, taken in steps] == [int(step > expected) for step, _ in steps]
        assert seen[0] > 2**20
        assert made._block is None


def test_a_cap_holds_within_the_fit_and_is_called_simulated(monkeypatch, caplog):
    card = Card(monkeypatch, used=1, reserved=0)
    spec = MemorySpec(cap=24.0)
    with spec.capped():
        assert card.fractions == [0.3]
    assert card.fractions == [0.3, 1.0]
    assert spec.record() == {"cap_bytes": 24 * GIB, "simulated": True}
    with MemorySpec(cap=200.0).capped():
        assert card.fractions[-1] == 1.0
    assert "no less than the card's 80.0 GiB" in caplog.text


def test_a_cap_holds_in_the_final_validation_too(make_spec, monkeypatch):
    capped, within = [], []

    @contextmanager
    def cap(self):
        capped.append(True)
        yield
        capped.clear()

    real = Fit._score
    monkeypatch.setattr(MemorySpec, "capped", cap)
    monkeypatch.setattr(Fit, "_score", lambda self, *given: [within.append(bool(capped)), real(self, *given)][1])
    (stored,) = Runner().run([make_spec(max_steps=1)])
    assert (stored["status"], within, capped) == ("completed", [True], [])


@pytest.fixture
def dumps(monkeypatch):
    """The paths that torch was asked to write, and the states of its recording."""
    written, recording = [], []
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", written.append)
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda **how: recording.append(how.get("enabled", "all"))
    )
    return written, recording


class Trainer:
    def __init__(self, *callbacks):
        self.callbacks, self.global_step = list(callbacks), 8


def test_at_most_three_spikes_are_dumped_and_an_end_without_memory_always(tmp_path, dumps):
    observer, shots = PhaseMemory(), Snapshots(tmp_path / "shots")
    trainer = Trainer(observer, shots)
    shots.on_fit_start(trainer, None)
    for _ in range(5):
        for tell in observer.on_spike:
            tell(SPIKE)
    assert len(dumps[0]) == 3
    shots.on_exception(trainer, None, torch.OutOfMemoryError("CUDA out of memory"))
    assert dumps[0][-1] == str(tmp_path / "shots" / "step9_out_of_memory.pickle")
    assert shots.summary() == {"snapshots": dumps[0]}
    assert dumps[1] == ["all", None]  # recorded, and stopped
    shots.spike(SPIKE)
    assert len(dumps[0]) == 4


def test_other_failures_are_not_dumped(tmp_path, dumps):
    shots = Snapshots(tmp_path)
    shots.on_fit_start(Trainer(), None)
    shots.on_exception(Trainer(), None, ValueError("no"))
    assert dumps == ([], ["all", None])


def test_a_folder_that_cannot_be_written_is_a_warning_and_nothing_is_recorded(tmp_path, dumps, caplog):
    (tmp_path / "file").touch()
    shots = Snapshots(tmp_path / "file" / "below")
    shots.on_fit_start(Trainer(PhaseMemory()), None)
    shots.spike(SPIKE)
    shots.on_train_end(Trainer(), None)
    assert "cannot be written" in caplog.text
    assert dumps == ([], [])


def test_a_dump_that_fails_is_a_warning(tmp_path, dumps, monkeypatch, caplog):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", full)
    shots = Snapshots(tmp_path)
    shots.on_fit_start(Trainer(), None)
    shots.spike(SPIKE)
    assert "training goes on" in caplog.text
    assert shots.summary() == {"snapshots": []}
