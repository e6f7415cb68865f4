"""What a run says of its memory before it starts, and what it refuses."""

import json
import logging
import types
from dataclasses import replace

import pytest
import torch

from loralab.cli import main
from loralab.data.passes import BatchShape, Pass
from loralab.errors import OutOfMemory
from loralab.memory import cards
from loralab.memory.budget import PlanSpec
from loralab.memory.phases import PhaseMemory
from loralab.planning import foresee, kept
from loralab.planning.foresee import Foresight
from loralab.planning.geometry import Geometry
from loralab.planning.plan import CONTEXT, FRAGMENTATION, GIB, device_bytes, predict_step
from loralab.records import record
from loralab.running.inputs import encoded_data
from loralab.running.runner import Runner
from loralab.scheduling import members

MIB = 2**20


@pytest.fixture
def trial(make_spec, make_model):
    """A spec of one layer that is planned, and its data."""
    spec = replace(make_spec(model=make_model(config={"num_hidden_layers": 1})), plan=PlanSpec())
    return spec, [encoded_data(spec.data, spec.model, spec.model.load_tokenizer(), "cpu")]


@pytest.fixture(autouse=True)
def plans(tmp_path, monkeypatch):
    """The folder of the cached plans; nothing is known of an earlier process or test."""
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "_known", {})
    return tmp_path / "cache" / "plans"


@pytest.fixture
def calls(monkeypatch):
    """One entry for each step that is traced."""
    calls, real = [], foresee.predict_step
    monkeypatch.setattr(foresee, "predict_step", lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


def test_a_pack_is_traced_once(trial, calls):
    spec, data = trial
    foresight = Foresight()
    plans = [foresight.check([spec], data, "cpu") for _ in range(3)]
    assert len(calls) == 1
    assert plans[0] == plans[2]
    two = foresight.check([spec, replace(spec, id="other")], data * 2, "cpu")
    assert len(calls) == 2
    assert two.predicted_peak_bytes > plans[0].predicted_peak_bytes


def test_what_cannot_fit_is_refused_or_warned_of(trial, caplog):
    spec, data = trial
    small = replace(spec, plan=PlanSpec(budget_gib=0.1 * MIB / GIB))
    with pytest.raises(OutOfMemory, match="predicted to need"):
        Foresight().check([small], data, "cpu")
    warned = replace(spec, plan=PlanSpec(budget_gib=0.1 * MIB / GIB, enforce=False))
    with caplog.at_level(logging.WARNING):
        assert Foresight().check([warned], data, "cpu") is not None
    assert "plan.enforce=false" in caplog.text


def test_room_is_what_is_free_and_what_is_held_already(trial, monkeypatch):
    spec, data = trial
    need = Foresight().plan([spec], data, "cpu").device_bytes
    monkeypatch.setattr(foresee, "free_bytes", lambda device: need - 1.0)
    with pytest.raises(OutOfMemory):
        Foresight().check([spec], data, "cpu")
    assert Foresight().check([spec], data, "cpu", held=1) is not None


def test_a_fault_of_the_planner_stops_no_run(trial, monkeypatch):
    spec, data = trial
    monkeypatch.setattr(foresee, "predict_step", lambda *a, **k: 1 / 0)
    assert Foresight().check([spec], data, "cpu") is None


def test_the_record_holds_predicted_beside_measured(trial, tmp_path):
    spec, _ = trial
    (done,) = Runner().run([spec])
    assert done["status"] == "completed"
    assert done["memory"]["predicted_peak_bytes"] > 0


def test_a_run_that_cannot_fit_is_exit_6_and_loads_nothing(tiny_arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [word for word in tiny_arguments if not word.startswith("plan.")]
    assert main.run(["train", *words, "plan.budget_gib=0.0001", "hydra.run.dir=run"]) == 6
    assert "predicted to need" in capsys.readouterr().err
    stored = record.read(tmp_path / "run")
    assert (stored["status"], stored["base"]["fingerprint"]) == ("out_of_memory", None)


def test_plan_gives_one_json_object_of_the_contract(tiny_arguments, capsys):
    words = [word for word in tiny_arguments if not word.startswith("data.train")]
    assert main.run(["plan", "--json", *words, "data.train=nowhere.jsonl", "plan.device=cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"device", "predicted_peak_bytes", "device_bytes", "by_phase", "by_kind", "fits"} <= found.keys()
    assert found["predicted_peak_bytes"] == max(found["by_phase"].values()) == sum(found["by_kind"].values())
    assert main.run(["plan", *words]) == 0
    assert "predicted peak" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("peak", "unit", "message"), [(14.4, 2**20, "14 MiB (base 10, adapter 4)"), (2, 2**30, "2.00 GiB")]
)
def test_a_pass_is_told_in_one_unit(peak, unit, message):
    plan = types.SimpleNamespace(
        predicted_peak_bytes=int(peak * unit), by_kind={"base": 10 * unit, "adapter": int(4.4 * unit), "other": 0}
    )
    sentence = foresee.sentence(1, plan)
    assert sentence.startswith(f"largest pass (1 trial): predicted peak {message}")
    assert ("MiB" in sentence) != ("GiB" in sentence)


def _geometry(fed, **changes):
    return Geometry((Pass(3, (fed,)),), False, Pass(1, (BatchShape((9, 20), (9, 20), 8),)), **changes)


DEPTH = {"gpt2": "n_layer", "t5": "num_layers", "distilbert": "n_layers"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "t5", "distilbert"])
def test_a_step_in_the_mode_that_a_trace_chose_needs_that_trace_alone(make_spec, make_model, calls, family):
    spec = make_spec(family=family, model=make_model(family, config={DEPTH.get(family, "num_hidden_layers"): 1}))
    geometry = _geometry(BatchShape((32, 20), (1, 1) if family == "distilbert" else (32, 20), 2))
    foresight = Foresight()
    chosen = foresight.of([spec], geometry)
    measured = replace(geometry, mode=chosen.mode)
    assert foresight.of([spec], measured) is chosen
    assert len(calls) == 1
    assert predict_step([spec], measured) == chosen  # what a trace of its own says


def test_a_run_traces_the_step_that_it_predicts_and_measures_once(make_spec, calls):
    spec = make_spec(kind="ragged", plan=PlanSpec(), callbacks={"phases": PhaseMemory})
    (done,) = Runner().run([spec])
    assert len(calls) == 1
    assert done["memory"]["predicted_peak_bytes"] > 0


def test_the_next_process_reads_the_plan_and_traces_what_differs(trial, calls, monkeypatch):
    spec, _ = trial
    geometry = _geometry(BatchShape((32, 20), (32, 20), 30))
    plan = Foresight().of([spec], geometry)
    monkeypatch.setattr(kept, "_known", {})  # as a new process begins
    assert Foresight().of([replace(spec, seed=5, optimizer=replace(spec.optimizer, lr=1e-5))], geometry) == plan
    assert len(calls) == 1
    others = [
        replace(spec, adapter=replace(spec.adapter, r=5)),
        replace(spec, trainer=replace(spec.trainer, gradient_clip_val=None)),
        replace(spec, optimizer=replace(spec.optimizer, lr_ratio=4.0)),
        replace(spec, optimizer=replace(spec.optimizer, flat=True)),
        replace(spec, model=replace(spec.model, config={**spec.model.config, "hidden_size": 32})),
    ]
    for number, other in enumerate(others):
        Foresight().of([other], geometry)
        assert len(calls) == number + 2
    Foresight().of([spec], replace(geometry, first=True))
    assert len(calls) == len(others) + 2


def test_a_damaged_plan_is_traced_again(trial, calls, plans, monkeypatch):
    geometry = _geometry(BatchShape((32, 20), (32, 20), 30))
    plan = Foresight().of([trial[0]], geometry)
    (stored,) = plans.iterdir()
    stored.write_text(stored.read_text().replace("predicted_peak_bytes", "predicted_bytes"))
    monkeypatch.setattr(kept, "_known", {})
    assert Foresight().of([trial[0]], geometry) == plan
    assert len(calls) == 2


def test_one_card_is_asked_here_and_its_context_is_not_counted_twice(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * GIB, 80 * GIB))
    assert foresee.free_bytes("cuda") == 10 * GIB + CONTEXT
    # a run that needs all of it with its context just fits
    allocated = int((foresee.free_bytes("cuda") - CONTEXT) / FRAGMENTATION)
    assert device_bytes(allocated) <= foresee.free_bytes("cuda") < device_bytes(allocated + 2)


def test_several_cards_are_asked_by_a_process_of_its_own_and_the_fullest_decides(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: pytest.fail("this process made a context"))
    monkeypatch.setattr(cards, "ASK", "print([7 * 2**30, 3 * 2**30])")
    cards.free_of_each.cache_clear()
    try:
        assert foresee.free_bytes("cuda") == 3 * GIB + CONTEXT
        assert members.room("cuda", None) == pytest.approx((0.9 * (3 * GIB + CONTEXT) - CONTEXT) / FRAGMENTATION)
        monkeypatch.setattr(cards, "ASK", "raise SystemExit(3)")
        cards.free_of_each.cache_clear()
        assert foresee.free_bytes("cuda") == float("inf")
    finally:
        cards.free_of_each.cache_clear()
