"""What a model does behind its head, to its rows or to later tokens, stays in the loss, also once it matters."""

import families
import plain
import pytest
import torch
import transformers
from lab import STEPS, Watch, run, same_gradients, same_scores

from loralab.adapters.lora import LoRA
from loralab.optim.optimizers import AdamW
from loralab.running.runner import Runner

NEAR = {"wide": False, "hidden_size": 64, "initializer_range": 0.1}  # the cap is negligible before training
CAPPED = {"final_logit_softcapping": 30.0, **NEAR}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        pytest.param("gemma2", CAPPED, id="capped"),
        pytest.param("granite", {"logits_scaling": 4.0, "wide": False}, id="divided"),
        pytest.param("cohere", {"logit_scale": 0.25, "wide": False}, id="scaled", marks=pytest.mark.slow),
        pytest.param("phi", {}, id="biased", marks=pytest.mark.slow),
        pytest.param("gptj", {}, id="biased too", marks=pytest.mark.slow),
    ],
)
def test_what_a_model_does_to_its_logits_is_in_the_loss_after_training(lab, family, changes):
    case = lab("causal_lm", family, **changes)
    spec = case.spec("capped", 40, 4, optimizer=AdamW(lr=0.02))
    (record,) = run(spec)
    same_scores(record, plain.score(case.oracle(spec.folder / "adapter"), case.rows["validation"], "causal_lm"))


@pytest.mark.parametrize(
    ("family", "key"), [("roberta", "is_decoder=False"), pytest.param("xlm", "causal=False", marks=pytest.mark.slow)]
)
def test_a_model_that_sees_later_tokens_is_no_causal_language_model(lab, family, key):
    case = lab("causal_lm", family, **{key.partition("=")[0]: False})
    (record,) = Runner().run([case.spec("encoder", 2, 4)])
    assert record["exit_code"] == 2
    assert "model.task=causal_lm" in record["error"]
    assert key in record["error"]
    assert "sequence_classification" in record["error"]


@pytest.mark.parametrize("family", ["mamba", pytest.param("rwkv", marks=pytest.mark.slow)])
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


@pytest.mark.parametrize(
    ("family", "padding"),
    [
        ("llama", 7),
        *(pytest.param(f, p, marks=pytest.mark.slow) for f in ("gpt2", "opt", "llama") for p in (7, None, -1)),
    ],
)
def test_a_causal_classifier_pools_at_the_last_token_at_every_batch_size(lab, family, padding):
    case = lab("sequence_classification", family, pad_token_id=padding)
    losses = [run(case.spec(f"b{batch}", 0, batch))[0]["metrics"]["val/loss"] for batch in (1, 4)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    if padding == 7:
        expected = plain.score(case.oracle(), case.rows["validation"], "sequence_classification")
        assert losses[1] == pytest.approx(sum(nll for nll, _, _ in expected) / len(expected), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_embeddings_are_trained_whole_as_peft_does(lab, family):
    case = lab("causal_lm", family)
    watch = Watch()
    adapter = LoRA(r=4, modules_to_save=["embed_tokens"])
    spec = case.spec("whole", STEPS, 4, adapter=adapter, callbacks={"watch": lambda: watch})
    (record,) = run(spec)
    model = case.oracle(spec.folder / "adapter")
    same_scores(record, plain.score(model, case.rows["validation"], "causal_lm"))
    chosen, values, grads = watch.seen[spec.id, STEPS - 1]
    plain.put(model, case.folder, values)
    same_gradients(grads, plain.gradients(model, [case.rows["train"][i] for i in chosen], "causal_lm"))
    assert any("embed_tokens" in name and grad.abs().sum() > 0 for name, grad in grads.items())


def test_a_head_tied_to_the_embeddings_may_be_adapted_and_is_named(lab, caplog):
    case = lab("causal_lm", "llama", tie_word_embeddings=True)
    adapter = LoRA(r=4, target_modules=["q_proj", "lm_head"])
    spec = case.spec("head", STEPS, 4, adapter=adapter)
    (record,) = run(spec)
    assert "the weight of lm_head is also that of model.embed_tokens" in caplog.text
    same_scores(record, plain.score(case.oracle(spec.folder / "adapter"), case.rows["validation"], "causal_lm"))


def test_a_masked_language_model_gets_a_pooler_that_is_drawn_trained_and_exported(lab, caplog):
    case = lab("sequence_classification", "bert")
    config = families.config_of("bert", "sequence_classification")
    masked = transformers.AutoModelForMaskedLM.from_config(config)
    masked.save_pretrained(case.folder / "base")
    caplog.set_level("INFO")
    starts = {}
    for seed in (1, 1, 2):
        watch = Watch()
        spec = case.spec(f"s{seed}", STEPS, 4, seed, callbacks={"watch": lambda w=watch: w})
        (record,) = run(spec)
        starts.setdefault(seed, []).append(watch.seen[spec.id, 0][1]["base_model.model.bert.pooler.dense.weight"])
        assert watch.seen[spec.id, 0][2]["base_model.model.bert.pooler.dense.weight"].abs().sum() > 0
    assert "has no bert.pooler.dense.bias, bert.pooler.dense.weight, classifier" in caplog.text
    assert torch.equal(*starts[1])
    assert not torch.equal(starts[1][0], starts[2][0])
    assert {"bert.pooler", "classifier"} <= set(record["adapter"]["modules"])
    model = case.oracle(spec.folder / "adapter")
    same_scores(record, plain.score(model, case.rows["validation"], "sequence_classification"))


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f in ("fnet", "convbert") else pytest.mark.slow) for f in families.READ_PADDING],
)
def test_a_base_whose_rows_depend_on_their_padding_is_refused_by_name_and_runs_row_by_row(lab, family):
    case = lab("sequence_classification", family)
    (record,) = Runner().run([case.spec("batched", 2, 4)])
    assert record["exit_code"] == 2, record["error"]
    assert f"data.batch_size=4: {type(case.oracle()).__name__} (model_type={family}) computes" in record["error"]
    (record,) = run(case.spec("alone", 3, 1))
    if family != "yoso":  # it hashes at random
        expected = plain.score(case.oracle(case.folder / "alone" / "adapter"), case.rows["validation"], case.task)
        same_scores(record, expected)


@pytest.mark.parametrize(
    ("task", "family"),
    [("sequence_classification", "xlnet"), pytest.param("seq2seq_lm", "prophetnet", marks=pytest.mark.slow)],
)
def test_a_model_whose_rows_depend_on_their_padding_is_refused_by_name(lab, task, family):
    (record,) = Runner().run([lab(task, family).spec("padded", 2, 4)])
    assert record["exit_code"] == 2
    assert f"model_type={family}" in record["error"]
    assert "where it is padded" in record["error"]
