"""The share of full fine-tuning's improvement that a row reaches, and the difference to it where there is no share."""

import json

import pandas as pd
import pytest
from scipy import stats

from loralab.records import record
from loralab.reporting.report import report

SCORES = {
    "untrained": [5.0, 5.0, 5.0],
    "lora": [3.1, 3.2, 3.15],
    "full": [3.0, 3.05, 2.9],
    "last_layer": [4.0, 4.2, 3.9],
}


@pytest.fixture
def write_methods(tmp_path, synthetic):
    """A sweep over methods with ``scores`` {name: by seed}; untrained: lora without a step."""

    def build(scores, metric="val/loss", mode="min"):
        trials = []
        for name, values in scores.items():
            for seed, value in enumerate(values):
                stored = synthetic("none", 2, seed)
                method = "lora" if name == "untrained" else name
                stored["config"] |= {"metric": metric, "metric_mode": mode}
                stored["config"]["trainer"]["max_steps"] = 0 if name == "untrained" else 60
                stored["choices"]["adapter"] = stored["adapter"]["method"] = method
                stored["time"]["steps"] = 0 if name == "untrained" else 60
                stored.update(metrics={metric: value}, trial=f"{name}-{seed}")
                record.write(tmp_path / f"{name}-{seed}", stored)
                trials.append({"trial": stored["trial"], "folder": f"{name}-{seed}"})
        axes = {"adapter": ["lora", *(name for name in scores if name not in ("lora", "untrained"))], "seed": [0, 1, 2]}
        record.write_sweep(tmp_path, {"name": "methods", "question": "?", "axes": axes, "trials": trials})
        return report(tmp_path)

    return build


def told(done):
    """The report's terminal, Markdown and page, blanks made one."""
    texts = [done.table, done.files["report.md"].read_text(), done.index.read_text().replace("<wbr>", "")]
    return [" ".join(text.replace("&#39;", "'").split()) for text in texts]


def arms(done):
    return {arm["trials"][0][:-2]: arm for arm in json.loads(done.files["results.json"].read_text())["arms"]}


@pytest.mark.parametrize(("metric", "mode", "sign"), [("val/loss", "min", 1), ("val/accuracy", "max", -1)])
def test_the_share_is_of_the_improvement_over_the_untrained_row(write_methods, metric, mode, sign):
    done = write_methods({name: [sign * value for value in values] for name, values in SCORES.items()}, metric, mode)
    frame = pd.read_csv(done.files["results.csv"])
    means = frame.groupby(frame["trial"].str[:-2])[metric].mean()
    found = arms(done)
    for name, arm in found.items():
        share = (means["untrained"] - means[name]) / (means["untrained"] - means["full"])
        assert arm["share_of_full"] == pytest.approx(share)
        assert all(f"{share:.1%}".replace("-0.0", "0.0") in text for text in told(done)), name
    assert [round(found[name]["share_of_full"], 3) for name in ("untrained", "full", "lora")] == [0, 1, 0.917]
    assert all("(untrained - row) / (untrained - full)" in text for text in told(done))


def test_without_an_untrained_row_there_is_the_paired_difference_to_full(write_methods):
    done = write_methods({name: values for name, values in SCORES.items() if name != "untrained"})
    found = arms(done)
    for name, arm in found.items():
        assert arm["share_of_full"] is None
        gaps = [a - b for a, b in zip(SCORES[name], SCORES["full"], strict=True)]
        assert arm["difference_to_full"]["mean"] == pytest.approx(sum(gaps) / 3)
        if name != "full":
            low, high = stats.ttest_rel(SCORES[name], SCORES["full"]).confidence_interval(0.95)
            assert (arm["difference_to_full"]["low"], arm["difference_to_full"]["high"]) == pytest.approx((low, high))
            if name == "last_layer":
                assert all(f"{sum(gaps) / 3:+.4f} [{low:+.4f}, {high:+.4f}]" in text for text in told(done)[1:])
    assert all("a row with trainer.max_steps=0 would give it" in text for text in told(done))


def test_an_improvement_of_full_that_is_not_told_from_0_has_no_share(write_methods):
    done = write_methods({**SCORES, "full": [4.0, 5.5, 5.2]})
    assert {arm["share_of_full"] for arm in arms(done).values()} == {None}
    assert all("improvement over the untrained base is not told from 0 by its interval" in text for text in told(done))


def test_without_full_fine_tuning_there_is_no_such_column(write_methods):
    done = write_methods({name: SCORES[name] for name in ("lora", "last_layer", "untrained")})
    assert not any("of full" in text or "vs full" in text for text in told(done))
    assert not any("share_of_full" in arm for arm in arms(done).values())


def test_an_untrained_row_of_full_is_no_full_fine_tuning(write_methods, tmp_path):
    write_methods({**SCORES, "full": [5.0, 5.0, 5.0]})
    for path in tmp_path.glob("full-*/result.json"):
        stored = json.loads(path.read_text())
        stored["time"]["steps"] = 0
        path.write_text(json.dumps(stored))
    assert "full:" not in report(tmp_path).table
