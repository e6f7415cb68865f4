"""Scores against figures worked out by hand."""

import math

import pytest
import torch

from loralab.forward.metrics import SplitMetrics, nll, rouge_l
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


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    # LCS of (the cat sat, the dog sat) is 2 of 3 words each way; the second pair is equal
    assert rouge_l(["the cat sat", "same words"], ["the dog sat", "same words"]) == pytest.approx((2 / 3 + 1) / 2)


def test_rouge_l_of_equal_texts_is_one_and_of_strangers_zero():
    assert rouge_l(["a b c"], ["a b c"]) == pytest.approx(1.0)
    assert rouge_l(["a b c"], ["d e f"]) == 0.0
    assert rouge_l(["a b c d"], ["a c"]) == pytest.approx(2 * 0.5 * 1.0 / 1.5)  # longest common: a c


SCRIPTS = [
    *(
        "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
        "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
        "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
        "\u4f60\u597d\u4e16\u754c",
        "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
        "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440",
        "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c",
        "\u03b3\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5",
    ),
    *("\U0001f600 \U0001f600", "\u2192 \u2211 \u2264", "...", "$$$", "12.5", "\u2014", "\u00e9", "don't stop"),
]


@pytest.mark.parametrize("text", SCRIPTS)
def test_a_text_is_equal_to_itself_in_every_script(text):
    assert rouge_l([text], [text]) == pytest.approx(1.0)
    assert rouge_l([text, "a"], [text, "b"]) == pytest.approx(0.5)
    assert rouge_l(["xyz"], [text]) == 0.0


@pytest.mark.parametrize(
    ("one", "other", "right"),
    [
        ("\u4f60\u597d\u4e16\u754c", "\u4f60\u597d", 2 / 3),
        ("\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd", "\u05e9\u05dc\u05d5\u05dd", 2 / 3),
    ],
)
def test_a_part_of_a_text_scores_in_every_script(one, other, right):
    assert rouge_l([one], [other]) == pytest.approx(right)


def test_one_letter_in_two_forms_is_one():
    assert rouge_l(["caf\u00e9 noir"], ["cafe\u0301 noir"]) == pytest.approx(1.0)


def test_the_published_scorer_counts_a_to_z_and_digits_alone():
    assert rouge_l(["\u05e9\u05dc\u05d5\u05dd"], ["\u05e9\u05dc\u05d5\u05dd"], "published") == 0.0
    plain = ["The cat_sat on: the mat, 3 times!", "it's $5 + 7", "a-b c"]
    other = ["the Cat sat on a mat 3 Times", "its 5 7", "A b"]
    published = rouge_l(plain, other, "published")
    assert rouge_l(plain, other) == pytest.approx(published)
    from torchmetrics.text.rouge import ROUGEScore

    scorer = ROUGEScore(rouge_keys="rougeL")
    scorer.update(plain, other)
    assert published == pytest.approx(float(scorer.compute()["rougeL_fmeasure"]))
