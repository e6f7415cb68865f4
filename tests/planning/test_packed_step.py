"""What a pack holds on a card alone, and the plan counts: its gradients once more, side by side; the masks of dropout;
a copy of its factors in half precision."""

import pytest

from loralab.adapters.bottleneck import Bottleneck
from loralab.adapters.lora import LoRA
from loralab.data.passes import BatchShape, Pass
from loralab.numerics.shadows import Shadowed
from loralab.planning.geometry import Geometry
from loralab.planning.plan import predict_step

LENGTH = 8
BATCH = BatchShape((LENGTH,), (LENGTH,), LENGTH - 1)


def test_the_plan_of_a_pack_on_a_card_counts_the_rows_of_gradients(make_spec, load_base):
    specs = [make_spec(f"{i}", adapter=LoRA(r=64)) for i in range(4)]
    adapter = LoRA(r=64).attach(load_base("llama").model)
    gradients = 4 * 4 * sum(parameter.numel() for parameter in adapter.parameters())
    plan = predict_step(specs, Geometry((Pass(0, (BATCH,) * 4),), cuda=True))
    assert plan.by_phase["optimizer"] == plan.predicted_peak_bytes  # so that ``by_kind`` is of this phase
    found = [plan.by_kind[kind] / gradients for kind in ("adapter", "gradients", "optimizer", "transient")]
    assert found == pytest.approx([1, 1, 2, 1], rel=0.01)


def test_the_plan_of_a_pack_on_a_card_counts_the_masks_that_are_kept_for_the_gradients(make_spec):
    plans = [
        predict_step(
            [make_spec(f"{p}-{i}", adapter=LoRA(r=2, lora_dropout=p)) for i in range(4)],
            Geometry((Pass(0, (BATCH,) * 4),), cuda=True),
        )
        for p in (0.0, 0.1)
    ]
    assert [plan.by_phase["forward"] for plan in plans] == [plan.predicted_peak_bytes for plan in plans]
    dry, wet = (plan.by_kind["activations"] for plan in plans)
    inputs = 2 * (6 * 64 + 128)  # of the layers of two blocks, an element each at a position
    assert wet - dry == 4 * LENGTH * inputs  # a byte for each


@pytest.mark.parametrize("trials", [1, 4])
def test_the_plan_for_a_card_counts_the_masks_of_bottleneck_adapters(make_spec, trials):
    dry, wet = (
        predict_step(
            [make_spec(f"{p}-{i}", adapter=Bottleneck(bottleneck_size=2, dropout=p)) for i in range(trials)],
            Geometry((Pass(0, (BATCH,) * trials),), cuda=True),
        ).by_phase["forward"]
        for p in (0.0, 0.1)
    )
    added = trials * LENGTH * 64 * 4  # elements, by two adapters in each of two blocks
    assert wet - dry == added  # a byte for each


def test_the_plan_of_a_pack_on_a_card_counts_its_factors_in_half_precision(make_spec, monkeypatch):
    specs = [make_spec(f"{i}", adapter=LoRA(r=64), precision="bf16-mixed") for i in range(4)]
    shared = predict_step(specs, Geometry((Pass(0, (BATCH,) * 4),), cuda=True))
    monkeypatch.setattr(Shadowed, "over", lambda tensor: None)
    apart = predict_step(specs, Geometry((Pass(0, (BATCH,) * 4),), cuda=True))
    more = shared.by_phase["backward"] - apart.by_phase["backward"]
    assert more == pytest.approx(shared.by_kind["adapter"] / 2, rel=0.07)  # less a layer's casts, which are not made
    assert shared.by_phase["optimizer"] == shared.predicted_peak_bytes
    assert shared.by_kind["activations"] < 0.01 * shared.by_kind["adapter"]  # the copy is gone by then


def test_the_plan_for_a_card_pads_as_a_card_does(make_spec):
    def activations(*lengths, padded_to=None):
        shape = Pass(0, (BatchShape(lengths, lengths, 60),), padded_to)
        spec = make_spec(precision="32-true")  # in bfloat16 a card leaves the padding out
        return predict_step([spec], Geometry((shape,), cuda=True)).by_kind["activations"]

    ragged = activations(40, 30)
    assert ragged == pytest.approx(activations(40, 30, padded_to=64), rel=0.01)
    assert ragged > 1.3 * activations(40, 40)  # without padding it stays as it is
