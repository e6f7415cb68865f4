"""Scores against figures worked out by hand."""

import math

import pytest
import torch

from loralab.forward.metrics import SplitMetrics, nll
from loralab.running.runner import Runner


@pytest.mark.parametrize("classes", [3, 50])
def test_accuracy_macro_f1_and_matthews_correlation_equal_the_hand_computed_ones_over_uneven_batches(classes):
    predictions = torch.tensor([0, 0, 1, 2, 2, 1, 0])
    targets = torch.tensor([0, 1, 1, 2, 0, 1, 0])
    scores = SplitMetrics("sequence_classification", classes, torch.device("cpu"))
    scores.update(torch.tensor(4.0), predictions[:5], targets[:5])
    scores.update(torch.tensor(3.0), predictions[5:], targets[5:])
    values = scores.compute("val")
    f1 = ((2 * 2) / (3 + 3) + (2 * 2) / (2 + 3) + (2 * 1) / (2 + 1)) / 3  # 2 tp / (predicted + true) of each class
    matthews = (5 * 7 - (3 * 3 + 2 * 3 + 2 * 1)) / (
        (7**2 - 3**2 - 2 * 2**2) * (7**2 - 2 * 3**2 - 1)
    ) ** 0.5  # Gorodkin's
    wanted = {"val/loss": 1.0, "val/accuracy": 5 / 7, "val/f1": f1, "val/matthews": matthews}
    assert values == pytest.approx(wanted)


def test_a_splits_loss_weighs_tokens_not_batches():
    scores = SplitMetrics("causal_lm", 2, torch.device("cpu"))
    scores.update(torch.tensor(2.0), torch.tensor([1]), torch.tensor([1]))
    scores.update(torch.tensor(3.0), torch.tensor([1, 2, 3, 4]), torch.tensor([1, 0, 0, 0]))
    expected = {"test/loss": 1.0, "test/token_accuracy": 2 / 5, "test/perplexity": math.e}
    assert scores.compute("test") == pytest.approx(expected)


def test_a_batch_without_targets_counts_nothing():
    logits, labels = torch.randn(2, 4, 7, requires_grad=True), torch.full((2, 4), -100)
    total, predictions, targets = nll(logits, labels, "causal_lm")
    assert float(total) == 0.0
    scores = SplitMetrics("causal_lm", 2, torch.device("cpu"))
    scores.update(total, predictions, targets)
    scores.update(torch.tensor(2.0), torch.tensor([1]), torch.tensor([1]))
    assert scores.compute("val")["val/loss"] == 2.0


def test_a_head_of_more_classes_than_the_data_has_is_scored(make_spec, make_model, make_data):
    model = make_model("distilbert", num_labels=50)
    spec = make_spec("labels", "distilbert", model=model, data=make_data("labels"), max_steps=20)
    record = Runner().run([spec])[0]
    assert record["status"] == "completed", record["error"]
    assert 0.0 < record["metrics"]["val/accuracy"] <= 1.0
