"""What a model does behind its head, to its rows or to later tokens, stays in the loss, also once it matters."""

import plain
import pytest
from lab import run, same_scores

from loralab.optimizers import AdamW
from loralab.run import Runner

CAPPED = {"final_logit_softcapping": 30.0, "wide": False}


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
    spec = case.spec("capped", 40, 4, optimizer=AdamW(lr=0.05))
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
