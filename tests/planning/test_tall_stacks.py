"""A tall stack from two short ones: no phase's peak is missed where its moment changes with the height."""

from dataclasses import replace
from pathlib import Path

import pytest

from loralab.config import compose
from loralab.config.build import trial_spec
from loralab.planning import plan as planning
from loralab.planning.plan import GIB, predict

SMALL = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "num_key_value_heads": 4}


def llama(layers, *words, **keys):
    words = ("model=llama2_7b", "data.batch_size=1", *words)
    spec = trial_spec(compose.compose(list(words)), Path("nowhere"))
    changed = {**spec.model.config, **keys, "num_hidden_layers": layers}
    return replace(spec, model=replace(spec.model, config=changed))


CASES = [
    pytest.param(
        20, ["quantization=int8_absmax", "adapter.r=16", "optimizer=adamw_8bit"], id="8bit", marks=pytest.mark.slow
    ),
    *(
        pytest.param(layers, ["quantization=nf4_double", "adapter.r=4"], id=f"nf4 {layers}", marks=pytest.mark.slow)
        for layers in (2, 7, 24)
    ),
    pytest.param(
        24,
        ["quantization=nf4_double", "adapter.r=4", "optimizer=adamw_32bit", "optimizer.flat=true"],
        id="flat",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("layers", "words"), CASES)
def test_every_phase_is_within_a_percent_of_a_full_trace(layers, words, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")  # which would hide all else in a stack as narrow as this
    spec = llama(layers, *words, vocab_size=2000, **SMALL)
    found = predict(spec, length=16)
    monkeypatch.setattr(planning, "homogeneous_layers", lambda _: None)
    whole = predict(spec, length=16)
    assert found.by_phase == pytest.approx(whole.by_phase, rel=0.01)
    assert found.by_kind == pytest.approx(whole.by_kind, rel=0.01)


@pytest.mark.slow
def test_seven_billion_parameters_are_loaded_with_their_adapter():
    # 4-bit codes and their statistics, two matrices of 32000 x 4096 and the norms in bf16; A and B of r=64 in float32
    linear, doubled = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 4 + 8 / 64 + 32 / (64 * 256)
    dense = 2 * 32000 * 4096 + 65 * 4096
    by_hand = linear * doubled / 8 + 2 * dense + 4 * 159_907_840
    found = predict(llama(32, "quantization=nf4_double", "adapter.r=64"), length=64).by_phase["load"]
    assert by_hand == pytest.approx(4.196 * GIB, rel=0.001)
    assert found == pytest.approx(by_hand, rel=0.01)
