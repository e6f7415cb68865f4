"""Optimizers say what they keep; schedules start, hold and end where they should."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loralab.adapters.lora import LoRA
from loralab.errors import ConfigError
from loralab.optim import optimizers
from loralab.optim.managed import PAGED_FROM, repage
from loralab.optim.optimizers import AdamW, Schedule, describe
from loralab.running.runner import Runner
from loralab.training.checkpoint import Checkpoint
from loralab.training.module import FineTuner


@pytest.mark.parametrize("name", ["adamw", "adamw_32bit", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_every_optimizer_trains_and_its_record_says_what_was_paged(make_spec, name):
    record = Runner().run([make_spec(optimizer=AdamW(name=name, lr=1e-2))])[0]
    assert record["status"] == "completed", record["error"]
    state = record["optimizer"]
    assert state["state_bytes"] > 0
    assert (state["paged_bytes"], state["paged_fraction"]) == (0, 0.0)  # a CPU pages nothing
    paged = name.startswith("paged_")
    assert state["paging"] == ("not applicable" if paged else "off")
    assert ("no CUDA device" in state["note"]) if paged else state["note"] is None
    assert state["effective_name"] == {"paged_adamw": "adamw_32bit"}.get(name, name.removeprefix("paged_"))


def test_torchs_state_is_two_float32_moments_a_parameter(make_spec):
    record = Runner().run([make_spec()])[0]
    assert record["optimizer"]["state_bytes"] == 8 * record["adapter"]["trainable_parameters"]


@pytest.mark.parametrize("name", ["adamw", "adamw_32bit", "paged_adamw"])
def test_one_flat_buffer_gives_the_loss_of_many_tensors(make_spec, curve, weights, name):
    found = {}
    for flat in (False, True):
        changes = {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2, "max_steps": 6}
        spec = make_spec(f"{flat}", optimizer=AdamW(name=name, lr=1e-2, weight_decay=0.1, flat=flat), **changes)
        record = Runner().run([spec])[0]
        assert record["status"] == "completed", record["error"]
        found[flat] = (curve(spec.folder), curve(spec.folder, "train/grad_norm"), weights(spec.folder), record)
    assert found[True][0] == pytest.approx(found[False][0], abs=1e-6)
    assert found[True][1] == pytest.approx(found[False][1], abs=1e-6)
    assert found[True][2].keys() == found[False][2].keys()
    for key, value in found[True][2].items():
        assert torch.allclose(value, found[False][2][key], atol=1e-6)
    assert found[True][3]["optimizer"]["state_bytes"] == found[False][3]["optimizer"]["state_bytes"]


def test_small_tensors_take_8_bits_only_in_a_flat_buffer(make_spec, curve):
    eight, losses = {}, {}
    for flat in (False, True):
        spec = make_spec(f"{flat}", adapter=LoRA(r=2), optimizer=AdamW("adamw_8bit", lr=1e-2, flat=flat))
        eight[flat] = Runner().run([spec])[0]["optimizer"]["eight_bit_bytes"]
        losses[flat] = curve(spec.folder)
    assert eight[False] == 0  # every tensor is under bitsandbytes' 4,096 elements
    assert eight[True] > 4096
    assert losses[True] == pytest.approx(losses[False], abs=0.05)  # other block borders: near, not equal


def test_trials_of_a_pack_with_flat_state_equal_solo_runs(make_spec, curve, weights):
    def two(prefix):
        kinds = (LoRA(r=4), LoRA(r=8))
        return [
            make_spec(f"{prefix}{i}", adapter=kind, optimizer=AdamW(lr=1e-2, flat=True), max_steps=3 + 2 * i)
            for i, kind in enumerate(kinds)
        ]

    packed, solo = two("packed"), two("solo")
    Runner().run(packed)
    for spec in solo:
        Runner().run([spec])
    for ours, theirs in zip(packed, solo, strict=True):
        assert curve(ours.folder) == curve(theirs.folder)
        assert all(map(torch.equal, weights(ours.folder).values(), weights(theirs.folder).values()))


def sections(made):
    return [{key: one[key] for key in ("adapter", "optimizer")} for one in made]


@pytest.mark.parametrize("flat", [False, True], ids=["each", "flat"])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw"])
def test_a_packed_record_has_the_state_of_its_own_trial_as_a_solo_one_has(make_spec, name, flat):
    def three(prefix):
        kinds = [LoRA(r=2), LoRA(r=16), LoRA(r=2, target_modules=["q_proj"])]
        optimizer = AdamW(name, lr=1e-3, flat=flat)
        return [make_spec(f"{prefix}{i}", adapter=kind, optimizer=optimizer) for i, kind in enumerate(kinds)]

    packed = Runner().run(three("packed"))
    solo = [Runner().run([spec])[0] for spec in three("solo")]
    assert sections(packed) == sections(solo)
    assert len({one["optimizer"]["state_bytes"] for one in packed}) == 3
    if name == "adamw":  # two moments in float32
        assert [one["optimizer"]["state_bytes"] for one in packed] == [
            8 * one["adapter"]["trainable_parameters"] for one in packed
        ]


def test_a_trial_of_a_divided_pack_has_the_state_of_its_own(make_spec, monkeypatch):
    real = FineTuner.training_step

    def step(self, batches, index):
        if len(self.trials) > 2 and self.trials[0].step == 1:
            raise torch.OutOfMemoryError("no room for so many")
        return real(self, batches, index)

    monkeypatch.setattr(FineTuner, "training_step", step)
    packed = Runner().run([make_spec(f"packed{r}", adapter=LoRA(r=r)) for r in (2, 4, 8, 16)])
    solo = [Runner().run([make_spec(f"solo{r}", adapter=LoRA(r=r))])[0] for r in (2, 4, 8, 16)]
    assert [one["pack"]["size"] for one in packed] == [2] * 4
    assert sections(packed) == sections(solo)


def test_a_trial_continued_from_its_last_step_has_its_state_in_the_record(make_spec, monkeypatch):
    def spec(name):
        return make_spec(name, callbacks={"checkpoint": lambda: Checkpoint(None, 1)})

    def broken(*_):
        raise RuntimeError("gone")

    whole, again = spec("whole"), spec("again")
    (expected,) = Runner().run([whole])
    with monkeypatch.context() as patched:
        patched.setattr(FineTuner, "on_validation_epoch_end", broken)
        assert Runner().run([again])[0]["status"] == "failed"
    (done,) = Runner().run([again])
    assert (done["status"], done["resumed_from"]) == ("completed", 4)
    assert sections([done]) == sections([expected])


def test_state_of_one_value_is_counted_and_shared_tables_once():
    optimizer = stepped([1, 5000, 5000], "adamw")
    assert describe(optimizer, "adamw")["state_bytes"] == 8 * 10_001
    eight = describe(stepped([5000, 5000], "adamw_8bit"), "adamw_8bit")
    blocks = 2 * 2 * -(-5000 // 256) * 4  # absmax in float32, of two moments of two tensors
    assert eight["state_bytes"] == 2 * 2 * 5000 + blocks + 2 * 256 * 4  # and one table of codes a moment


def test_loading_an_adapter_reaches_its_flat_buffer():
    layer = torch.nn.Linear(3, 2)
    (buffer,) = optimizers.flatten(layer.parameters())
    layer.load_state_dict({"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
    assert buffer.tolist() == [1.0] * 6 + [0.0] * 2
    assert list(layer.state_dict()) == ["weight", "bias"]


@pytest.fixture
def paging(monkeypatch):
    """A machine that can page, its managed memory played by ordinary tensors."""
    import bitsandbytes

    def get_paged(*shape, dtype, device):
        buffer = torch.zeros(*shape, dtype=dtype)
        buffer.is_paged, buffer.page_deviceid = True, 0
        return buffer

    monkeypatch.setattr(optimizers, "cannot_page", lambda: "")
    monkeypatch.setattr(bitsandbytes.functional, "get_paged", get_paged)
    monkeypatch.setattr(bitsandbytes.functional, "prefetch_tensor", lambda *_: None)
    manager = bitsandbytes.functional.GlobalPageManager.get_instance()
    monkeypatch.setattr(manager, "paged_tensors", [])


def stepped(sizes, name="paged_adamw"):
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    spec = AdamW(name, lr=1e-2)
    optimizer = spec.build([spec.group(parameters)])
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_a_restored_state_is_paged_again_and_keeps_its_values(paging, name):
    optimizer = stepped([PAGED_FROM, PAGED_FROM - 1], name)
    before = [state[key].clone() for state in optimizer.state.values() for key in ("state1", "state2")]
    assert describe(optimizer, name)["paged_bytes"] == 0
    assert repage(optimizer) == 2  # state1 and state2 of the large one
    found = describe(optimizer, name)
    assert found["paging"] == "on"
    assert found["effective_name"] == name
    assert found["paged_bytes"] == 2 * PAGED_FROM * (1 if "8bit" in name else 4)
    after = [state[key] for state in optimizer.state.values() for key in ("state1", "state2")]
    assert all(map(torch.equal, before, after))
    assert repage(optimizer) == 0


def test_a_copy_that_only_claims_to_be_paged_is_paged_again(paging):
    optimizer = stepped([PAGED_FROM])
    repage(optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()), move_to_device=False)
    state = next(iter(optimizer.state.values()))["state1"]
    state.is_paged = True
    assert repage(optimizer) == 2


def test_the_first_step_after_a_resume_pages_the_state(paging):
    saved = stepped([PAGED_FROM]).state_dict()
    parameter = torch.nn.Parameter(torch.zeros(PAGED_FROM))
    spec = AdamW("paged_adamw", lr=1e-2)
    optimizer = spec.build([spec.group([parameter])])
    optimizer.load_state_dict(saved)
    assert describe(optimizer, spec.name)["paged_bytes"] == 0
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert describe(optimizer, spec.name)["paged_fraction"] == 1.0


def test_a_paged_optimizer_that_pages_nothing_says_so_before_the_first_step(paging, caplog):
    optimizers._warn_once.cache_clear()
    optimizer = stepped([PAGED_FROM - 1, 10])
    assert "pages nothing: bitsandbytes pages no tensor under 100,000 elements" in caplog.text
    assert "99,999" in caplog.text
    found = describe(optimizer, "paged_adamw")
    assert found["paging"] == "nothing"
    assert found["effective_name"] == "adamw_32bit"
    assert "optimizer.flat=true" in found["note"]


def test_a_machine_that_cannot_page_runs_the_unpaged_optimizer_and_says_so_once(caplog):
    import bitsandbytes

    optimizers._warn_once.cache_clear()
    first, _ = stepped([10]), stepped([10])
    assert type(first) is bitsandbytes.optim.AdamW32bit
    assert caplog.text.count("no CUDA device") == 1


@pytest.mark.parametrize(("failed", "value", "says"), [(0, 1, ""), (0, 0, "cannot share"), (1, 0, "cannot share")])
def test_the_driver_decides_whether_memory_can_be_paged(monkeypatch, failed, value, says):
    class Driver:
        def cuInit(self, flags):
            return failed

        def cuDeviceGetAttribute(self, out, attribute, device):
            assert attribute == 89
            out._obj.value = value
            return 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(optimizers.ctypes, "CDLL", lambda name: Driver())
    found = optimizers.cannot_page.__wrapped__()
    assert says in found
    assert bool(found) == bool(says)


def test_the_learning_rate_in_the_rows_is_the_one_that_was_used(make_spec, curve):
    spec = make_spec(schedule=Schedule(kind="linear", warmup_steps=2), optimizer=AdamW(lr=1e-2), max_steps=6)
    Runner().run([spec])
    assert curve(spec.folder, "train/lr") == pytest.approx([0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025])


def test_warm_up_by_ratio_counts_steps_of_the_run():
    factor = Schedule(kind="constant", warmup_ratio=0.1).factor(100)
    assert [factor(step) for step in (0, 4, 9, 10, 99)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0])


def test_cosine_passes_its_middle_and_ends_at_zero():
    factor = Schedule(kind="cosine").factor(10)
    assert [factor(step) for step in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 30), st.integers(1, 60))
def test_a_factor_lies_in_0_to_1_rises_through_the_warm_up_and_never_again(kind, warmup, steps):
    factor = Schedule(kind=kind, warmup_steps=warmup).factor(steps)
    values = [factor(step) for step in range(steps)]
    assert all(0.0 < value <= 1.0 for value in values)
    rising, falling = values[: warmup + 1], values[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize(
    ("spec", "changes", "says"),
    [
        (AdamW, {"lr": 0.0}, "optimizer.lr"),
        (AdamW, {"lr": math.nan}, "optimizer.lr"),
        (AdamW, {"lr": math.inf}, "optimizer.lr"),
        (AdamW, {"lr": 1e31}, "optimizer.lr"),
        (AdamW, {"weight_decay": -0.1}, "optimizer.weight_decay"),
        (AdamW, {"weight_decay": math.nan}, "optimizer.weight_decay"),
        (AdamW, {"betas": [0.9]}, "optimizer.betas must be two numbers"),
        (AdamW, {"betas": [0.9, 1.0]}, "optimizer.betas"),
        (AdamW, {"eps": 0.0}, "optimizer.eps"),
        (AdamW, {"name": "adamw8bit"}, "did you mean adamw_8bit"),
        (Schedule, {"kind": "cosin"}, "did you mean cosine"),
        (Schedule, {"warmup_steps": -1}, "schedule.warmup_steps"),
        (Schedule, {"warmup_ratio": 1.0}, "schedule.warmup_ratio"),
        (Schedule, {"warmup_steps": 5, "warmup_ratio": 0.1}, "exclude each other"),
    ],
)
def test_nonsense_is_refused_with_its_key(spec, changes, says):
    with pytest.raises(ConfigError, match=says):
        spec(**changes)
