"""quantization.dequantize=auto: dense weights are kept where they easily fit, and no number of a run depends on it."""

import json
from dataclasses import replace

import pytest
import torch

from loralab.cli import main
from loralab.cli.plan import render
from loralab.errors import OutOfMemory
from loralab.memory.budget import PlanSpec
from loralab.memory.limits import MemorySpec
from loralab.planning import foresee, kept, resident
from loralab.planning.foresee import Foresight
from loralab.planning.plan import GIB, Plan, estimate, predict
from loralab.quantization.four_bit import FourBit
from loralab.quantization.linear import FrozenLinear
from loralab.records import record
from loralab.running.inputs import encoded_data
from loralab.running.runner import Runner
from loralab.training.module import FineTuner
from loralab.training.trainer import TrainerSpec

WEIGHTS = 2 * (4 * 64 * 64 + 3 * 64 * 128)  # of the linear layers of the small Llama, by hand


@pytest.fixture
def spec(make_spec):
    return make_spec(quantization=FourBit())


@pytest.fixture
def free(monkeypatch):
    """Sets the bytes that the device has free."""

    def install(size):
        monkeypatch.setattr(foresee, "free_bytes", lambda device: float(size))

    return install


def test_the_bytes_are_those_of_the_weights_in_the_dtype_of_the_products(spec):
    def dense(**changes):
        return resident.dense_bytes(replace(spec, **changes), device)

    device = "cuda"  # where auto computes in bfloat16
    assert dense() == 2 * WEIGHTS
    assert dense(trainer=TrainerSpec(precision="tf32")) == 4 * WEIGHTS
    device = "cpu"
    assert dense() == 4 * WEIGHTS
    assert dense(trainer=TrainerSpec(accelerator="cpu", precision="bf16-mixed")) == 2 * WEIGHTS
    assert dense(model=replace(spec.model, dtype="bfloat16")) == 2 * WEIGHTS
    assert dense(quantization=FourBit(compute_dtype="float16")) == 2 * WEIGHTS
    assert dense(quantization=FourBit(skip_modules=["down_proj"])) == 4 * (WEIGHTS - 2 * 64 * 128)


@pytest.mark.parametrize(
    ("room", "changes", "kept"),
    [
        (16 * WEIGHTS, {}, True),  # a quarter, to the byte
        (16 * WEIGHTS - 1, {}, False),
        (float("inf"), {}, False),  # nobody knows
        (float("inf"), {"plan": PlanSpec(budget_gib=16 * WEIGHTS / GIB)}, True),
        (GIB, {"plan": PlanSpec(budget_gib=(16 * WEIGHTS - 1) / GIB)}, False),
        (GIB, {"memory": MemorySpec(cap=(16 * WEIGHTS - 1) / GIB)}, False),
        (GIB, {"memory": MemorySpec(cap=16 * WEIGHTS / GIB)}, True),
        (GIB, {"memory": MemorySpec(ballast=1.0)}, False),
        (GIB, {"trainer": TrainerSpec(accelerator="cpu", passed={"strategy": "fsdp", "devices": 2})}, False),
        (2 * 16 * WEIGHTS, {"trainer": TrainerSpec(accelerator="cpu", passed={"strategy": "ddp", "devices": 2})}, True),
        (2 * 16 * WEIGHTS - 2, {"trainer": TrainerSpec(accelerator="cpu", passed={"strategy": "ddp", "devices": 2})},
         False),
    ],
)  # fmt: skip
def test_they_are_kept_in_a_quarter_of_what_there_is(spec, room, changes, kept):
    assert resident.easily_fits(replace(spec, **changes), "cpu", room) == kept


def test_it_is_decided_once_for_a_base_and_what_was_asked_for_is_not_decided(spec, free):
    foresight = Foresight()
    free(GIB)
    assert foresight.dequantize([spec], [], "cpu") == "resident"
    free(0)
    assert foresight.dequantize([replace(spec, seed=4)], [], "cpu") == "resident"
    assert Foresight().dequantize([spec], [], "cpu") == "per_use"
    assert Foresight().dequantize([spec], [], "cpu", held=GIB) == "resident"
    for asked in ("per_use", "resident"):
        assert Foresight().dequantize([replace(spec, quantization=FourBit(dequantize=asked))], [], "cpu") == asked
    foresight.keep_no_more(spec)
    assert foresight.dequantize([spec], [], "cpu") == "per_use"


@pytest.fixture
def planned(spec, tmp_path, monkeypatch):
    """A trial that is planned, and its rows."""
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "_known", {})
    spec = replace(spec, plan=PlanSpec())
    return spec, [encoded_data(spec.data, spec.model, spec.model.load_tokenizer(), "cpu")]


def test_a_run_that_fits_fits_with_auto_and_its_plan_holds_what_is_kept(planned, free, monkeypatch):
    monkeypatch.setattr(resident, "SHARE", 1.0)
    spec, data = planned
    lean, whole = (
        Foresight().plan(resident.settled([spec], how), data, "cpu").device_bytes for how in ("per_use", "resident")
    )
    assert lean < whole
    foresight = Foresight()
    for room, how in ((whole, "resident"), (whole - 1, "per_use"), (lean, "per_use")):
        free(room)
        found = foresight.dequantize([spec], data, "cpu")
        assert found == how
        assert foresight.check(resident.settled([spec], found), data, "cpu").device_bytes <= room
    free(lean - 1)
    with pytest.raises(OutOfMemory):
        foresight.check(resident.settled([spec], "per_use"), data, "cpu")


def test_the_plan_has_the_dense_weights_in_its_base(spec):
    device, spec = "cuda", replace(spec, trainer=TrainerSpec(precision="32-true"))
    lean, whole = (predict(resident.settled([spec], how)[0], device) for how in ("per_use", "resident"))
    assert (lean.resident_bytes, whole.resident_bytes) == (0, 4 * WEIGHTS)
    assert whole.by_kind["base"] - lean.by_kind["base"] == 4 * WEIGHTS
    more = whole.predicted_peak_bytes - lean.predicted_peak_bytes
    assert 4 * WEIGHTS - 4 * 64 * 128 <= more <= 4 * WEIGHTS  # at each use one layer's are there anyway
    rough = [estimate(resident.settled([spec], how), device) for how in ("per_use", "resident")]
    assert rough[1] - rough[0] == 4 * (WEIGHTS - 64 * 128)


def test_loralab_plan_says_what_a_run_here_would_keep(tiny_arguments, free, capsys):
    words = ["plan", *tiny_arguments, "quantization=nf4", "plan.device=cpu"]
    free(GIB)
    assert main.run([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["resident_bytes"] == 4 * WEIGHTS
    assert "dense weights" in render(Plan.of(found))
    free(0)
    assert main.run(words) == 0
    assert "dense weights" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said", "unsaid"),
    [
        (["model.dtype=float32"], "trainer.precision=bf16-mixed (auto): the base computes in bfloat16", "dequantize"),
        (["model.dtype=bfloat16", "trainer.precision=32-true"], "=32-true: the base computes in bfloat16", "(auto)"),
        (["quantization=nf4"], "also keeps {dense} GiB of dense weights", "kept beside the codes"),
        (["quantization=nf4", "quantization.dequantize=per_use"], "one trial", "dense weights"),
        (["quantization=nf4", "plan.device=cpu"], "trainer.precision=32-true (auto)", "also keeps"),
    ],
)
def test_a_plan_says_for_which_precision_it_is_and_what_a_larger_card_would_keep(
    tiny_arguments, capsys, monkeypatch, words, said, unsaid
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kept = [word for word in tiny_arguments if not word.startswith(("plan.", "trainer=", "trainer.precision"))]
    assert main.run(["plan", *kept, *words]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert said.format(dense=f"{2 * WEIGHTS / GIB:.3g}") in printed
    assert unsaid not in printed


def test_where_no_card_is_a_plan_of_one_keeps_nothing_but_within_a_budget(spec, monkeypatch):
    made = []
    monkeypatch.setattr(foresee, "predict", lambda spec, device: made.append(spec[0].quantization.dequantize) or LEAN)
    assert foresee.plan_here(spec, "cuda") == LEAN
    assert foresee.plan_here(replace(spec, plan=PlanSpec(budget_gib=1.0)), "cuda") == LEAN
    assert made == ["per_use", "per_use", "resident"]


LEAN = Plan("cuda", 1, 1, {}, {}, {})


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_has_the_same_bits_kept_or_not_and_its_record_says_which(make_spec, weights, free, curve, precision):
    def run(name, room, size, **changes):
        free(room)
        made = [make_spec(f"{name}{i}", seed=i, precision=precision, quantization=FourBit(**changes))
                for i in range(size)]  # fmt: skip
        runner = Runner()
        done = runner.run(made)
        assert [one["status"] for one in done] == ["completed"] * size, done[0]["error"]
        layers = [layer for layer in runner.inputs._base.model.modules() if isinstance(layer, FrozenLinear)]
        found = {one["base"]["dequantize"] for one in done}
        return made, [one["metrics"] for one in done], found, {layer.resident is not None for layer in layers}

    asked = run("asked", 0, 1, dequantize="resident")
    lean, kept_ones = run("lean", 0, 1), run("kept", GIB, 1)
    packed = run("packed", GIB, 2)
    assert [one[2] for one in (asked, lean, kept_ones, packed)] == [{"resident"}, {"per_use"}, *[{"resident"}] * 2]
    assert [one[3] for one in (asked, lean, kept_ones, packed)] == [{True}, {False}, {True}, {True}]
    for made, metrics, *_ in (asked, kept_ones, packed):
        assert metrics[0] == lean[1][0]
        assert curve(made[0].folder) == curve(lean[0][0].folder)
        left, right = weights(made[0].folder), weights(lean[0][0].folder)
        assert all(torch.equal(left[name], right[name]) for name in right)


def test_memory_that_is_full_after_all_costs_the_dense_weights_first(make_spec, weights, free, curve, monkeypatch):
    free(GIB)
    made = {name: [make_spec(f"{name}{i}", seed=i, quantization=FourBit()) for i in range(2)] for name in ("a", "b")}
    expected, real = Runner().run(made["a"]), FineTuner.training_step

    def step(self, batches, index):
        if self.trials[0].step == 2 and any(layer.resident is not None for layer in _layers(self)):
            raise torch.OutOfMemoryError("no room for so many")
        return real(self, batches, index)

    monkeypatch.setattr(FineTuner, "training_step", step)
    runner = Runner()
    done = runner.run(made["b"])
    for one, other, spec, twin in zip(done, expected, made["b"], made["a"], strict=True):
        assert (one["status"], one["pack"]) == ("completed", {"size": 2, "index": one["seed"]}), one["error"]
        assert (one["base"]["dequantize"], other["base"]["dequantize"]) == ("per_use", "resident")
        assert one["metrics"] == other["metrics"]
        assert curve(spec.folder) == curve(twin.folder)
        left, right = weights(spec.folder), weights(twin.folder)
        assert all(torch.equal(left[name], right[name]) for name in right)
    (later,) = runner.run([make_spec("later", quantization=FourBit())])
    assert (later["status"], later["base"]["dequantize"]) == ("completed", "per_use")


def _layers(module):
    return [layer for layer in module.modules() if isinstance(layer, FrozenLinear)]


def test_a_base_without_quantization_has_nothing_to_keep(make_spec, free):
    free(GIB)
    spec = make_spec(max_steps=1)
    assert Foresight().dequantize([spec], [], "cpu") == "per_use"
    assert not resident.easily_fits(spec, "cpu", GIB)
    (done,) = Runner().run([spec])
    assert done["base"]["dequantize"] is None
    assert record.read(spec.folder)["base"]["dequantize"] is None
