"""Losses are what they say: sums over target tokens, the same however a batch is cut."""

import math

import pytest
import torch
import torch.nn.functional as F

from loralab import models
from loralab.data.encoding import encode
from loralab.metrics import SplitMetrics, names, nll
from loralab.optimizers import AdamW, Schedule
from loralab.quantization.none import NoQuantization
from loralab.run import Runner


def close(a, b, tolerance=1e-6):
    return all(math.isclose(x, y, rel_tol=tolerance) for x, y in zip(a, b, strict=True))


def test_accumulating_two_batches_equals_one_of_twice_the_size(make_spec, make_data, curve, weights):
    """Rows differ in their number of targets, so a mean of means would differ from the mean."""
    whole = make_spec("whole", data=make_data("pairs", batch_size=4), max_steps=5)
    halves = make_spec("halves", data=make_data("pairs", batch_size=2), max_steps=5, accumulate_grad_batches=2)
    for spec in (whole, halves):
        assert Runner().run([spec])[0]["status"] == "completed"
    assert close(curve(whole.folder), curve(halves.folder), 1e-5)
    a, b = weights(whole.folder), weights(halves.folder)
    assert all(torch.allclose(a[key], b[key], rtol=1e-3, atol=1e-5) for key in a)
    assert any((tensor != 0).any() for key, tensor in a.items() if "lora_B" in key)


def test_the_validation_loss_is_the_sum_over_targets_of_the_whole_split(make_spec):
    spec = make_spec("trial", optimizer=AdamW(lr=1e-30), kind="ragged")
    record = Runner().run([spec])[0]
    tokenizer = spec.model.load_tokenizer()
    model = models.load(spec.model, NoQuantization(), tokenizer).model
    data = encode(spec.data.splits(), tokenizer, "causal_lm", spec.model.max_length)
    total, count = 0.0, 0
    for example in data.validation:  # one by one: no padding, no batch
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0, :-1]
        labels = torch.tensor(example.labels[1:])
        total += float(F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    assert record["metrics"]["val/loss"] == pytest.approx(total / count, rel=1e-5)
    assert record["metrics"]["val/perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "t5", "distilbert"])
def test_losses_are_those_of_transformers(load_base, inputs, family):
    base = load_base(family)
    task = base.spec.task
    given = inputs(task)
    given.pop("decoder_input_ids", None)
    labels = torch.tensor([0, 2]) if task == "sequence_classification" else given["input_ids"].clone()
    if labels.dim() == 2:
        labels[given["attention_mask"] == 0] = -100
        labels[:, :4] = -100
    theirs = base.model.eval()(**given, labels=labels).loss
    extra = {"decoder_input_ids": base.model.prepare_decoder_input_ids_from_labels(labels)} if family == "t5" else {}
    total, _, targets = nll(base.model(**given, **extra).logits, labels, task)
    assert float(total / targets.numel()) == pytest.approx(float(theirs), rel=1e-5)


def test_accuracy_and_f1_of_labels_by_hand():
    scores = SplitMetrics("sequence_classification", 3, torch.device("cpu"))
    predicted, targets = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1])
    scores.update(torch.tensor(4.0), predicted, targets)
    found = scores.compute("val")
    f1 = (2 / 3 + 2 * 1 * (1 / 3) / (1 + 1 / 3) + 0.0) / 3  # class by class: 2PR / (P + R)
    assert found["val/accuracy"] == pytest.approx(0.5)
    assert found["val/f1"] == pytest.approx(f1)
    assert found["val/loss"] == pytest.approx(1.0)


def test_a_batch_of_which_every_target_is_masked_adds_nothing():
    scores = SplitMetrics("causal_lm", 2, torch.device("cpu"))
    logits, labels = torch.zeros(1, 3, 5), torch.full((1, 3), -100)
    scores.update(*nll(logits, labels, "causal_lm"))
    scores.update(*nll(torch.zeros(1, 3, 5), torch.tensor([[0, 1, 2]]), "causal_lm"))
    assert scores.compute("val")["val/loss"] == pytest.approx(math.log(5))


@pytest.mark.parametrize("family", ["llama", "t5", "distilbert"])
def test_a_run_ends_with_exactly_the_metrics_it_promises(make_spec, make_data, family):
    kind = "labels" if family == "distilbert" else "pairs"
    spec = make_spec(family, family, data=make_data(kind, generate_rows=2))
    record = Runner().run([spec])[0]
    assert record["status"] == "completed", record["error"]
    assert set(record["metrics"]) == set(names(spec.model.task, generated=True, tested=False))


def test_the_test_split_is_scored_where_it_is_asked_for(make_spec, make_data, rows):
    spec = make_spec(data=make_data(test=str(rows["pairs", "validation"])), test=True)
    metrics = Runner().run([spec])[0]["metrics"]
    assert metrics["test/loss"] == pytest.approx(metrics["val/loss"])


def test_gradient_checkpointing_changes_no_loss(make_spec, make_model, curve):
    plain = make_spec("plain", model=make_model(max_length=64))
    saving = make_spec("saving", model=make_model(max_length=64, gradient_checkpointing=True))
    for spec in (plain, saving):
        Runner().run([spec])
    assert close(curve(plain.folder), curve(saving.folder), 1e-6)


def test_the_bases_own_dropout_acts_in_training_and_follows_the_seed(make_spec, make_model, curve):
    loud = make_model("distilbert", dropout=0.5)
    specs = [make_spec(name, "distilbert", model=loud, seed=seed) for name, seed in (("a", 1), ("b", 1))]
    quiet = make_spec("quiet", "distilbert", seed=1)
    for spec in (*specs, quiet):
        assert Runner().run([spec])[0]["status"] == "completed"
    assert curve(specs[0].folder) == curve(specs[1].folder)
    assert curve(specs[0].folder)[0] != curve(quiet.folder)[0]


def test_the_learning_rate_in_the_rows_is_the_one_that_was_used(make_spec, curve):
    spec = make_spec(schedule=Schedule(kind="linear", warmup_steps=2), optimizer=AdamW(lr=1e-2), max_steps=6)
    Runner().run([spec])
    assert curve(spec.folder, "train/lr") == pytest.approx([0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025])


def test_a_constant_schedule_with_warm_up_really_warms_up():
    factor = Schedule(kind="constant", warmup_ratio=0.1).factor(100)
    assert [factor(step) for step in (0, 4, 9, 10, 99)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0])


def test_cosine_ends_at_zero():
    factor = Schedule(kind="cosine").factor(10)
    assert factor(0) == 1.0
    assert factor(5) == pytest.approx(0.5)
    assert factor(10) == pytest.approx(0.0)


@pytest.mark.parametrize("name", ["adamw", "adamw_32bit", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_every_optimizer_trains_and_its_record_says_what_was_paged(make_spec, name):
    spec = make_spec(optimizer=AdamW(name=name, lr=1e-2))
    record = Runner().run([spec])[0]
    assert record["status"] == "completed", record["error"]
    state = record["optimizer"]
    assert state["state_bytes"] > 0
    assert (state["paged_bytes"], state["paged_fraction"]) == (0, 0.0)  # a CPU pages nothing
    assert state["effective_name"] == {"paged_adamw": "adamw_32bit"}.get(name, name.removeprefix("paged_"))


@pytest.mark.parametrize("clip", [1e-3, None])
def test_a_trial_is_clipped_to_its_own_norm(make_spec, curve, weights, clip):
    """With an eps far above any gradient one Adam step is lr / eps times the gradient, so its norm shows."""
    spec = make_spec(gradient_clip_val=clip, max_steps=1, optimizer=AdamW(lr=1e4, eps=1e4))
    Runner().run([spec])
    norm = curve(spec.folder, "train/grad_norm")[0]  # before clipping
    moved = math.sqrt(sum(float((b**2).sum()) for key, b in weights(spec.folder).items() if "lora_B" in key))
    assert norm > 1e-2
    assert moved == pytest.approx(clip or norm, rel=1e-2)
