"""A base that mixes the rows of a batch is found out before the first step, and its trials run alone."""

import pytest
import torch

from loralab.adapters.lora import LoRA
from loralab.forward.stacked import in_tf32
from loralab.memory.phases import PhaseMemory
from loralab.running.runner import Runner
from loralab.training.first_batch import tolerance

DEBERTA = {
    **{"model_type": "deberta-v2", "vocab_size": 258, "hidden_size": 32, "intermediate_size": 64},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64, "relative_attention": True},
    **{"position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "pad_token_id": 0},
}


@pytest.fixture
def mixing(monkeypatch):
    """A Llama whose norms subtract a little of the batch's mean."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    real = LlamaRMSNorm.forward
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: real(self, x - 0.1 * x.mean(dim=0, keepdim=True)))


def alike(spec, prefix, vary, tmp_path):
    return [vary(spec, id=f"{prefix}{i}", folder=tmp_path / f"{prefix}{i}", seed=i) for i in range(3)]


def test_a_base_that_mixes_rows_dissolves_the_pack(mixing, make_spec, vary, tmp_path, curve, caplog):
    packed = alike(make_spec(), "packed", vary, tmp_path)
    records = Runner().run(packed)
    assert [one["status"] for one in records] == ["completed"] * 3, records[0]["error"]
    for one in records:
        assert {key: one["pack"][key] for key in ("size", "index")} == {"size": 1, "index": 0}
        assert "the base mixes rows" in one["pack"]["why"]
    assert "3 trials do not run together: the base mixes rows" in caplog.text
    assert "(packed0, packed1, packed2)" in caplog.text
    solo = alike(make_spec(), "solo", vary, tmp_path)
    assert [Runner().run([spec])[0]["metrics"] for spec in solo] == [one["metrics"] for one in records]
    assert [curve(spec.folder) for spec in solo] == [curve(spec.folder) for spec in packed]


def test_a_base_that_folds_the_batch_dissolves_the_pack(make_spec, make_model, vary, tmp_path):
    model = vary(make_model("roberta"), config=DEBERTA, attn_implementation="eager")
    spec = make_spec("trial", "roberta", model=model, adapter=LoRA(r=2, target_modules=["key_proj"]), max_steps=2)
    records = Runner().run(alike(spec, "packed", vary, tmp_path))
    assert [one["status"] for one in records] == ["completed"] * 3, records[0]["error"]
    assert all("stacked rows were fed" in one["pack"]["why"] for one in records)


@pytest.mark.parametrize("family", ["llama", "t5", "roberta"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_sound_base_keeps_its_pack_and_its_losses(make_spec, make_data, vary, tmp_path, family, precision, curve):
    kind = "labels" if family == "roberta" else "ragged"  # rows of unequal lengths
    adapter = LoRA(r=2, lora_dropout=0.2)
    spec = make_spec(data=make_data(kind), family=family, adapter=adapter, precision=precision, max_steps=2)
    records = Runner().run(alike(spec, "packed", vary, tmp_path))
    assert [one["status"] for one in records] == ["completed"] * 3, records[0]["error"]
    assert [one["pack"] for one in records] == [{"size": 3, "index": i} for i in range(3)]
    if precision == "32-true":
        solo = Runner().run([vary(spec, id="solo", folder=tmp_path / "solo", seed=1)])[0]
        assert solo["time"]["tokens"] == records[1]["time"]["tokens"]
        assert curve(tmp_path / "packed1")[0] == pytest.approx(curve(tmp_path / "solo")[0], rel=1e-5)


def test_the_comparison_does_not_reach_the_profiled_step(make_spec, vary, tmp_path):
    spec = make_spec(callbacks={"memory": PhaseMemory}, max_steps=4)
    records = Runner().run(alike(spec, "packed", vary, tmp_path))
    assert records[0]["memory"]["measured_peak_bytes"] > 0


def test_the_tolerance_follows_the_shortest_type(load_base):
    model = load_base().model
    assert tolerance(["32-true"], model) == 1e-4
    assert tolerance(["bf16-mixed"], model) == pytest.approx(0.0195, rel=0.01)
    assert tolerance(["16-mixed"], model) == pytest.approx(0.00244, rel=0.01)
    assert tolerance(["32-true"], torch.nn.Linear(2, 2, dtype=torch.bfloat16)) > 1e-2


@pytest.mark.parametrize(("products", "short"), [("highest", False), ("high", True), ("medium", True)])
def test_float32_products_of_a_card_are_as_short_as_torch_may_make_them(products, short):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(products)
    try:
        assert in_tf32("cuda") == short
        assert not in_tf32("cpu")
    finally:
        torch.set_float32_matmul_precision(before)
