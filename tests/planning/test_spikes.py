"""Memory by step of a run with long batches, for a card that nobody has asked."""

from dataclasses import replace

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from loralab.data.passes import Feed, Pass
from loralab.memory.budget import PlanSpec
from loralab.memory.limits import MemorySpec
from loralab.optim.optimizers import AdamW
from loralab.planning import spikes
from loralab.planning.foresee import Foresight
from loralab.planning.geometry import Geometry
from loralab.planning.plan import predict_step
from loralab.planning.trace import build
from loralab.running.inputs import encoded_data
from loralab.running.runner import Runner

LONG, STEPS = 96, 6


@pytest.fixture
def spiky(make_spec, make_model):
    """A spec of one layer, every third of whose batches is padded to LONG tokens, and its data."""

    def build(name="adamw_32bit", **changes):
        spec = make_spec(
            name, model=make_model(config={"num_hidden_layers": 1}), max_steps=STEPS, optimizer=AdamW(name, flat=True)
        )
        memory = MemorySpec(spiky_every=3, spiky_length=LONG, solo=True)
        spec = replace(spec, plan=PlanSpec(), memory=memory, **changes)
        return spec, encoded_data(spec.data, spec.model, spec.model.load_tokenizer(), "cpu")

    return build


def test_every_third_step_is_as_long_as_it_is_made_and_the_others_as_their_rows(spiky):
    spec, data = spiky()
    found = spikes.by_step(spec, data, Foresight())
    assert found["step"] == list(range(1, STEPS + 1))
    chosen = Feed.of(spec, data.train).chosen()
    expected = [LONG if not (i + 1) % 3 else max(chosen.shape(i).inputs) for i in range(STEPS)]
    assert found["length"] == expected
    assert min(found["peak_bytes"][2::3]) > max(found["peak_bytes"][0:2])


def test_the_steps_that_are_traced_are_a_plans_and_those_between_lie_between(spiky):
    spec, data = spiky()
    found = spikes.by_step(spec, data, Foresight())
    chosen = Feed.of(spec, data.train).chosen()
    for step in (found["length"].index(min(found["length"])), 2):
        shape = Pass(step + 1, (chosen.shape(step),), LONG if step == 2 else None)
        planned = predict_step([spec], Geometry((shape,), cuda=True, scored=False))
        assert found["peak_bytes"][step] == planned.predicted_peak_bytes
    ordered = sorted(zip(found["length"], found["peak_bytes"], strict=True))
    assert [peak for _, peak in ordered] == sorted(found["peak_bytes"])


def test_paged_state_is_in_no_step_and_the_unpaged_is_in_all(spiky, monkeypatch):
    monkeypatch.setattr("loralab.planning.trace.PAGED_FROM", 10)  # elements: this adapter is small
    (plain, data), (paged, _) = spiky(), spiky("paged_adamw")
    without, with_paging = (spikes.by_step(spec, data, Foresight()) for spec in (plain, paged))
    size = with_paging["paged_bytes"]
    assert without["paged_bytes"] == 0
    assert size == 2 * 4 * sum(p.numel() for p in _trained(plain))  # two moments in float32
    gaps = [a - b for a, b in zip(without["peak_bytes"], with_paging["peak_bytes"], strict=True)]
    assert gaps == pytest.approx([size] * STEPS, rel=0.05)


def _trained(spec):
    with FakeTensorMode(allow_non_fake_inputs=True):
        return list(spec.adapter.attach(build(spec.model, None), 0).parameters())


def test_a_run_with_long_batches_has_it_in_its_record_and_any_other_has_not(spiky, make_spec):
    spec, data = spiky()
    (stored,) = Runner().run([spec])
    assert stored["memory"]["predicted_on_card"] == spikes.by_step(spec, data, Foresight())
    (other,) = Runner().run([make_spec("other", max_steps=1)])
    assert not other["memory"].get("predicted_on_card")
