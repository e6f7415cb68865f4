"""The peak of a trial by itself: at any rank what a trace of it says, at the price of two traces for all of them."""

from dataclasses import replace

import pytest

from loralab.adapters.lora import LoRA
from loralab.data.passes import BatchShape, Pass
from loralab.planning import alone, kept
from loralab.planning.geometry import Geometry
from loralab.planning.plan import predict_step
from loralab.quantization.four_bit import FourBit

GEOMETRY = Geometry((Pass(0, (BatchShape((32, 20), (32, 20), 30),)),), False)


@pytest.fixture
def traced(tmp_path, monkeypatch):
    """An empty folder for what is kept, and the ranks that were traced since."""
    monkeypatch.setattr(kept, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(kept, "_known", {})
    ranks, real = [], alone.trace
    monkeypatch.setattr(alone, "trace", lambda specs, *a: ranks.append(specs[0].adapter.r) or real(specs, *a))
    return ranks


@pytest.fixture
def make(make_spec, make_model):
    """A trial over a base of one layer, of the fields that differ."""
    model = make_model(config={"num_hidden_layers": 1})
    return lambda **changes: make_spec(model=model, **changes)


@pytest.mark.parametrize("quantization", [None, FourBit(double_quant=True)], ids=["none", "nf4_double"])
def test_any_rank_is_within_a_thousandth_of_its_own_trace(make, traced, quantization):
    changes = {} if quantization is None else {"quantization": quantization}
    for r in (1, 16, 128):
        spec = make(adapter=LoRA(r=r), **changes)
        whole = predict_step([spec], GEOMETRY).predicted_peak_bytes
        assert alone.peak(spec, GEOMETRY) == pytest.approx(whole, rel=0.001)
    assert traced == list(alone.RANKS)


def test_rate_seed_alpha_folder_and_rank_share_the_traces_and_another_process_too(make, traced, tmp_path):
    spec = make(adapter=LoRA(r=4))
    first = alone.peak(spec, GEOMETRY)
    other = replace(spec, seed=7, folder=tmp_path / "other", optimizer=replace(spec.optimizer, lr=1e-5))
    assert alone.peak(other, GEOMETRY) == first
    assert alone.peak(replace(spec, adapter=LoRA(r=4, lora_alpha=99.0)), GEOMETRY) == first
    kept._known.clear()  # as a new process begins
    assert alone.peak(spec, GEOMETRY) == first
    assert alone.peak(replace(spec, adapter=LoRA(r=8)), GEOMETRY) > first
    assert traced == list(alone.RANKS)
    alone.peak(replace(spec, adapter=LoRA(r=4, target_modules=["q_proj"])), GEOMETRY)
    assert len(traced) == 4
