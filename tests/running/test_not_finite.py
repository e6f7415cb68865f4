"""A number that is not finite is no result: the trial has diverged, and nothing counts it as finished."""

import json
import math
from dataclasses import replace

import pytest
import torch

from loralab.cli import main
from loralab.errors import DataError
from loralab.forward.metrics import SplitMetrics
from loralab.optim.optimizers import AdamW
from loralab.records import record
from loralab.running.inputs import check_splits
from loralab.running.runner import Runner

WILD = AdamW(lr=1e30)  # one update, and the base computes nothing finite any more


def test_a_validation_loss_that_is_nan_is_diverged_not_completed(make_spec, curve):
    spec = make_spec(optimizer=WILD, max_steps=1)
    (done,) = Runner().run([spec])
    assert math.isfinite(curve(spec.folder)[0])  # training itself has seen nothing
    assert (done["status"], done["exit_code"]) == ("diverged", 5)
    assert "val/loss is nan after step 1" in done["error"]
    assert "optimizer.lr (now 1e+30)" in done["error"]
    assert record.read(spec.folder)["metrics"]["val/loss"] is None
    assert not (spec.folder / "adapter").exists()


def test_a_validation_on_the_way_ends_the_trial_at_its_step(make_spec):
    (done,) = Runner().run([make_spec(optimizer=WILD, max_steps=4, val_check_interval=1)])
    assert (done["status"], done["time"]["steps"]) == ("diverged", 1)
    assert "val/loss is nan after step 1" in done["error"]


def test_in_a_pack_only_that_trial_diverges(make_spec, curve, weights):
    def two(prefix):
        return [make_spec(f"{prefix}{i}", optimizer=one, max_steps=1) for i, one in enumerate([WILD, AdamW(lr=1e-2)])]

    packed, (_, solo) = two("packed"), two("solo")
    broken, sound = Runner().run(packed)
    (alone,) = Runner().run([solo])
    assert (broken["status"], sound["status"]) == ("diverged", "completed")
    assert sound["metrics"] == alone["metrics"]
    assert curve(packed[1].folder) == curve(solo.folder)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["val/loss", "test/loss"])
def test_nan_and_both_infinities_in_either_split(make_spec, make_data, rows, monkeypatch, key, value):
    real = SplitMetrics.compute

    def compute(self, split):
        found = real(self, split)
        return {**found, key: value} if key in found else found

    monkeypatch.setattr(SplitMetrics, "compute", compute)
    data = make_data(test=str(rows["pairs", "validation"]))
    (done,) = Runner().run([make_spec(max_steps=1, test=True, data=data)])
    assert (done["status"], done["exit_code"]) == ("diverged", 5)
    assert f"{key} is {value:g}" in done["error"]


def test_a_score_by_generation_that_is_not_finite(make_spec, make_data, monkeypatch):
    monkeypatch.setattr("loralab.forward.texts.rouge_l", lambda *_: math.nan)
    spec = make_spec(max_steps=1, data=make_data(generate_rows=2), metric="val/rouge_l", metric_mode="max")
    (done,) = Runner().run([spec])
    assert (done["status"], done["exit_code"]) == ("diverged", 5)


def test_a_perplexity_too_large_to_write_is_no_result_only_where_it_is_the_metric(make_spec, monkeypatch):
    real = SplitMetrics.compute
    monkeypatch.setattr(SplitMetrics, "compute", lambda self, split: {**real(self, split), "val/perplexity": math.inf})
    assert Runner().run([make_spec("loss", max_steps=1)])[0]["status"] == "completed"
    assert Runner().run([make_spec("perplexity", max_steps=1, metric="val/perplexity")])[0]["status"] == "diverged"


def test_the_base_alone_is_not_told_to_lower_its_rate(make_spec, monkeypatch):
    monkeypatch.setattr(SplitMetrics, "compute", lambda self, split: {"val/loss": math.nan})
    (done,) = Runner().run([make_spec(max_steps=0)])
    assert done["status"] == "diverged"
    assert "the base itself gives it" in done["error"]
    assert "optimizer.lr" not in done["error"]


def test_figures_of_an_earlier_state_are_no_metrics_of_a_diverged_trial(make_spec, monkeypatch, curve):
    from loralab.training.module import FineTuner

    real = FineTuner.training_step

    def breaks(self, batches, index):
        if self.trials[0].step == 3:
            self.trials[0].fail_on_infinite("the training loss")
        return real(self, batches, index)

    monkeypatch.setattr(FineTuner, "training_step", breaks)
    spec = make_spec(max_steps=6, val_check_interval=2)
    (done,) = Runner().run([spec])
    assert (done["status"], done["time"]["steps"], done["metrics"]) == ("diverged", 3, {})
    assert len(curve(spec.folder, "val/loss")) == 1  # what was measured on the way is kept there


def test_one_batch_that_is_nan_is_not_left_out_of_the_mean():
    scores = SplitMetrics("causal_lm", 2, torch.device("cpu"))
    targets = torch.tensor([1, 1])
    for loss in (2.0, math.nan, 4.0):
        scores.update(torch.tensor(loss), targets, targets)
    assert math.isnan(scores.compute("val")["val/loss"])


def test_a_split_without_a_target_is_a_data_error_and_no_divergence(make_spec):
    spec = make_spec()
    encoded = Runner().inputs.rows(spec)
    tokens = {**encoded.tokens, "validation": {**encoded.tokens["validation"], "target_tokens": 0}}
    with pytest.raises(DataError, match=r"validation split of .* has not one token to predict; model.max_length=64"):
        check_splits(spec, replace(encoded, tokens=tokens))


def test_a_test_metric_without_test_rows_is_refused_before_training(make_spec):
    (done,) = Runner().run([make_spec(test=True, metric="test/loss")])
    assert (done["exit_code"], done["time"]["steps"]) == (3, None)
    assert "the test split of" in done["error"]


def test_in_a_pack_a_trial_is_tested_whatever_the_others_have(make_spec, make_data, rows):
    tested = make_data(test=str(rows["pairs", "validation"]))
    one, two = Runner().run([make_spec("one", test=True, data=tested), make_spec("two", test=True)])
    assert (one["status"], two["status"]) == ("completed", "completed")
    assert one["metrics"]["test/loss"] == one["metrics"]["val/loss"]  # the same rows
    assert "test/loss" not in two["metrics"]


def written(folder, **changes):
    """A record of an earlier version that says completed."""
    entry = record.blank("a", config={"metric": "val/loss", "seed": 0})
    entry.update(schema=1, status="completed", exit_code=0, **changes)
    record.replace(folder / record.RESULT, entry)
    return record.read(folder)


def test_a_record_of_an_earlier_version_that_says_completed_without_a_number_is_read_as_diverged(tmp_path):
    for name, metrics in (("own", {"val/loss": None}), ("other", {"val/loss": 1.0, "test/loss": None})):
        found = written(tmp_path / name, metrics=metrics)
        assert (found["status"], found["exit_code"]) == ("diverged", 5)
        assert "is not finite" in found["error"]
    sound = written(tmp_path / "sound", metrics={"val/loss": 1.0, "val/perplexity": None})
    assert sound["status"] == "completed"


def test_a_rerun_counts_no_record_without_a_number_as_finished(tiny_arguments, tmp_path, capsys):
    words = ["train", *tiny_arguments, f"hydra.run.dir={tmp_path / 'run'}"]
    assert main.run(words) == 0
    path = tmp_path / "run" / record.RESULT
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "metrics": {**stored["metrics"], "val/loss": None}}))
    assert main.run(words) == 0
    assert "finished before" not in capsys.readouterr().err
    assert record.read(tmp_path / "run")["metrics"] == stored["metrics"]


def test_a_sweep_with_a_diverged_trial_ends_with_5_and_averages_it_nowhere(tiny_arguments, tmp_path, capsys):
    words = ["train", "-m", *tiny_arguments, f"hydra.sweep.dir={tmp_path / 's'}", "trainer.max_steps=1"]
    words += ["hydra/launcher=packed", "optimizer.lr=1e-3,1e30", "trainer.gradient_clip_val=null"]
    assert main.run(words) == 5
    assert "without the metric" not in capsys.readouterr().out
    assert sorted(one["status"] for one in record.read_sweep(tmp_path / "s")["trials"]) == ["completed", "diverged"]
    assert main.run(words) == 5
    assert capsys.readouterr().err.count("finished before") == 1
