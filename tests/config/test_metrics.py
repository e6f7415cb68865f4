"""The metrics group: any torchmetrics class, given what the task predicts."""

import json

import pytest
import torch
from torchmetrics.classification import MulticlassAUROC, MulticlassConfusionMatrix
from torchmetrics.text import CHRFScore

from loralab.cli import main
from loralab.config.build import trial_id, trial_spec
from loralab.config.compose import compose
from loralab.errors import ConfigError
from loralab.forward.metrics import SplitMetrics
from loralab.records import record
from loralab.running.runner import Runner

CLASSIFIER = ["model=distilbert", "data=files", "data.train=a.jsonl", "data.text={t}", "data.label=y"]
GENERATED = ["data.generate_rows=2"]


def given(target, name="own", **options):
    return [f"+metrics.{name}._target_={target}", *(f"+metrics.{name}.{key}={value}" for key, value in options.items())]


AUROC = given("torchmetrics.classification.MulticlassAUROC", num_classes=2)
CHRF = given("torchmetrics.text.CHRFScore")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*CLASSIFIER, *given("torchmetrics.classification.MulticlassAUROC")], r"metrics\.own: .*num_classes"),
        ([*CLASSIFIER, *AUROC, "+metrics.own.colour=red"], r"metrics\.own: .*colour"),
        ([*CLASSIFIER, *given("torchmetrics.classification.Nothing")], r"metrics\.own\._target_=.* cannot be found"),
        ([*CLASSIFIER, *given("torch.nn.Linear")], r"is not a torchmetrics metric"),
        ([*CLASSIFIER, "+metrics.own=3"], r"metrics\.own must be"),
        ([*CLASSIFIER, *given("torchmetrics.classification.MulticlassConfusionMatrix", num_classes=2)], "no single"),
        ([*CLASSIFIER, *given("torchmetrics.MetricCollection")], "is several metrics; valid: each by a metrics.NAME"),
        ([*CLASSIFIER, *given("torchmetrics.MeanMetric")], "MeanMetric aggregates a value by weights"),
        ([*CLASSIFIER, *given("torchmetrics.classification.BinaryAUROC")], r"BinaryAUROC cannot be used: .*logits"),
        ([*CLASSIFIER, *given("torchmetrics.classification.MulticlassROC", num_classes=2)], "no single number"),
        ([*CLASSIFIER, *given("torchmetrics.wrappers.MinMaxMetric")], r"MinMaxMetric cannot be used: .*base_metric"),
        (["metrics=none", *CHRF], r"CHRFScore scores generated texts.*data\.generate_rows"),
        (
            [*CLASSIFIER, *given("torchmetrics.classification.MulticlassAccuracy", "accuracy", num_classes=2)],
            "val/accuracy is measured already",
        ),
        ([*GENERATED, *given("torchmetrics.text.Perplexity")], r"metrics\.own: "),
        ([*CLASSIFIER, *AUROC, "metric=val/own"], "higher is better"),
        ([*CLASSIFIER, "metric=val/own"], "is not measured by this run"),
        (
            [
                *GENERATED,
                *CHRF,
                "metric=val/own",
                "metric_mode=max",
                "trainer.patience=1",
                "trainer.val_check_interval=1",
            ],
            "no validation on the way",
        ),
    ],
)
def test_what_is_no_metric_of_the_run_is_refused_before_anything_loads(words, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        trial_spec(compose(words), tmp_path)


def test_a_metric_of_ones_own_may_be_the_metric(tmp_path):
    spec = trial_spec(compose([*CLASSIFIER, *AUROC, "metric=val/own", "metric_mode=max"]), tmp_path)
    assert isinstance(spec.own_metrics(texts=False)["own"], MulticlassAUROC)
    assert spec.own_metrics(texts=True) == {}
    assert trial_id(compose([*CLASSIFIER, *AUROC])) != trial_id(compose(CLASSIFIER))


def test_a_classifiers_logits_are_scored():
    logits, labels = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2] * 3)
    scores = SplitMetrics("sequence_classification", 3, torch.device("cpu"), own={"auroc": MulticlassAUROC(3)})
    for part in (slice(0, 5), slice(5, 9)):
        scores.update(torch.tensor(1.0), logits[part], labels[part])
    values = scores.compute("val")
    pairs = [
        [float(a > b) for a in logits.softmax(-1)[labels == k, k] for b in logits.softmax(-1)[labels != k, k]]
        for k in range(3)
    ]
    assert values["val/auroc"] == pytest.approx(sum(sum(one) / len(one) for one in pairs) / 3)
    assert values["val/accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))


def test_another_number_of_classes_than_the_heads_is_said_to_be_that():
    scores = SplitMetrics("sequence_classification", 3, torch.device("cpu"), own={"own": MulticlassConfusionMatrix(2)})
    with pytest.raises(ConfigError, match=r"metrics\.own: .*classes"):
        scores.update(torch.tensor(1.0), torch.eye(3), torch.tensor([0, 1, 2]))


def test_a_run_ends_with_them(make_spec, make_data):
    spec = make_spec(data=make_data(generate_rows=3), max_steps=1, metrics={"chrf": CHRFScore})
    record = Runner().run([spec])[0]
    assert record["status"] == "completed", record["error"]
    lines = (spec.folder / "predictions.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    again = CHRFScore()
    again.update([one["prediction"] for one in kept], [one["target"] for one in kept])
    assert record["metrics"]["val/chrf"] == pytest.approx(float(again.compute()))


def test_a_classifiers_run_ends_with_them(make_spec, make_data):
    spec = make_spec("labels", "distilbert", data=make_data("labels"), metrics={"auroc": lambda: MulticlassAUROC(3)})
    record = Runner().run([spec])[0]
    assert record["status"] == "completed", record["error"]
    assert 0.0 <= record["metrics"]["val/auroc"] <= 1.0


def test_one_for_another_number_of_classes_is_refused_before_training(make_spec, make_data):
    spec = make_spec("labels", "distilbert", data=make_data("labels"), metrics={"auroc": lambda: MulticlassAUROC(7)})
    record = Runner().run([spec])[0]
    assert record["error"] == "metrics.auroc.num_classes=7, and the base tells 3 apart; valid: 3"
    assert not record["time"]["steps"]


def test_trials_of_one_pass_have_metrics_of_their_own(make_spec, make_data):
    data = make_data("labels")
    one = make_spec("one", "distilbert", data=data, metrics={"auroc": lambda: MulticlassAUROC(3)})
    records = Runner().run([one, make_spec("two", "distilbert", data=data)])
    assert [one["status"] for one in records] == ["completed"] * 2, [one["error"] for one in records]
    assert ["val/auroc" in one["metrics"] for one in records] == [True, False]


def test_the_command_line_takes_one_and_refuses_wrong_arguments(tiny_arguments, tmp_path, capsys):
    words = ["train", *tiny_arguments, f"hydra.run.dir={tmp_path / 'run'}", "data.generate_rows=2", *CHRF]
    assert main.run([*words, "+metrics.own.n_word_order=-1"]) == 2
    assert "metrics.own: " in capsys.readouterr().err
    assert main.run([*words, "+metrics.own.n_word_order=0", "metric=val/own", "metric_mode=max"]) == 0
    assert 0.0 <= record.read(tmp_path / "run")["metrics"]["val/own"] <= 1.0
