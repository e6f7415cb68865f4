"""A tall stack from two short ones: no phase's peak is missed where its moment changes with the height."""

from dataclasses import replace
from pathlib import Path

import pytest

from loralab.config import compose
from loralab.config.build import trial_spec
from loralab.planning import plan as planning
from loralab.planning.plan import predict

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


@pytest.mark.parametrize(
    ("device", "layers", "vocabulary", "keys"),
    [
        pytest.param("cpu", 24, 2000, {**SMALL, "intermediate_size": 768}, id="narrow"),  # CUDA rounds to 512 bytes
        pytest.param("cuda", 32, 32_000, {"hidden_size": 4096, "intermediate_size": 11_008}, id="7B"),
    ],
)
def test_loading_holds_one_dense_layer_at_a_time(device, layers, vocabulary, keys):
    # 4-bit codes and their statistics, two matrices over the vocabulary and the norms in bf16; A and B in float32
    width, ffn = keys["hidden_size"], keys["intermediate_size"]
    linear, doubled = layers * (4 * width**2 + 3 * width * ffn), 4 + 8 / 64 + 32 / (64 * 256)
    dense = 2 * vocabulary * width + (2 * layers + 1) * width
    adapters = 64 * layers * (4 * 2 * width + 3 * (width + ffn))
    by_hand = linear * doubled / 8 + 2 * dense + 4 * adapters
    spec = llama(layers, "quantization=nf4_double", "adapter.r=64", vocab_size=vocabulary, **keys)
    assert predict(spec, device, length=64).by_phase["load"] == pytest.approx(by_hand, rel=0.01)


@pytest.mark.parametrize(
    ("groups", "precision", "larger"), [(1, "32-true", "plain"), (4, "32-true", "masked"), (1, "bf16-mixed", "masked")]
)
def test_a_plan_of_full_rows_is_the_larger_of_those_with_a_mask_and_without(groups, precision, larger):
    words = ("model.dtype=float32", "data.batch_size=2", "adapter.r=2", f"trainer.precision={precision}")
    spec = llama(2, *words, **{**SMALL, "num_key_value_heads": groups})
    peaks = {name: predict(spec, ragged=name == "masked").predicted_peak_bytes for name in ("plain", "masked")}
    assert predict(spec).predicted_peak_bytes == peaks[larger] == max(peaks.values())
