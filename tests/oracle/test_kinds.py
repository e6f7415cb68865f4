"""What a model does behind its head, to its rows or to later tokens, stays in the loss, also once it matters."""

import plain
import pytest
from lab import run, same_scores

from loralab.optimizers import AdamW
from loralab.run import Runner

NEAR = {"wide": False, "hidden_size": 64, "initializer_range": 0.1}  # the cap is negligible before training
CAPPED = {"final_logit_softcapping": 30.0, **NEAR}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        pytest.param("gemma2", CAPPED, id="capped"),
        pytest.param("granite", {"logits_scaling": 4.0, "wide": False}, id="divided"),
        pytest.param("cohere", {"logit_scale": 0.25, "wide": False}, id="scaled"),
        pytest.param("phi", {}, id="biased"),
        pytest.param("gptj", {}, id="biased too", marks=pytest.mark.slow),
    ],
)
def test_what_a_model_does_to_its_logits_is_in_the_loss_after_training(lab, family, changes):
    case = lab("causal_lm", family, **changes)
    spec = case.spec("capped", 40, 4, optimizer=AdamW(lr=0.02))
    (record,) = run(spec)
    same_scores(record, plain.score(case.oracle(spec.folder / "adapter"), case.rows["validation"], "causal_lm"))


@pytest.mark.parametrize(("family", "key"), [("roberta", "is_decoder=False"), ("xlm", "causal=False")])
def test_a_model_that_sees_later_tokens_is_no_causal_language_model(lab, family, key):
    case = lab("causal_lm", family, **{key.partition("=")[0]: False})
    (record,) = Runner().run([case.spec("encoder", 2, 4)])
    assert record["exit_code"] == 2
    assert "model.task=causal_lm" in record["error"]
    assert key in record["error"]
    assert "sequence_classification" in record["error"]


@pytest.mark.parametrize("family", ["mamba", "rwkv"])
def test_layers_whose_weight_the_model_reads_itself_stay_dense_and_are_named(lab, family, caplog):
    case = lab("causal_lm", family, "nf4")
    (record,) = run(case.spec("start", 0, 4))
    assert "stay dense" in caplog.text
    assert {"mamba": "dt_proj", "rwkv": "attention.output"}[family] in caplog.text
    assert record["base"]["quantized_parameters"] > 0
    same_scores(record, plain.score(case.oracle(), case.rows["validation"], "causal_lm"))
    near = plain.score(plain.load(case.folder / "base", "causal_lm"), case.rows["validation"], "causal_lm")
    dense = sum(nll for nll, _, _ in near) / sum(count for _, _, count in near)
    assert record["metrics"]["val/loss"] == pytest.approx(dense, rel=0.1)


@pytest.mark.parametrize("padding", [7, None, -1])
@pytest.mark.parametrize("family", ["llama", "gpt2", pytest.param("opt", marks=pytest.mark.slow)])
def test_a_causal_classifier_pools_at_the_last_token_at_every_batch_size(lab, family, padding):
    case = lab("sequence_classification", family, pad_token_id=padding)
    losses = [run(case.spec(f"b{batch}", 0, batch))[0]["metrics"]["val/loss"] for batch in (1, 4)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    if padding == 7:
        expected = plain.score(case.oracle(), case.rows["validation"], "sequence_classification")
        assert losses[1] == pytest.approx(sum(nll for nll, _, _ in expected) / len(expected), rel=1e-4)
