"""The page of few and of very many trials: small, whole, and equal to results.csv; hostile names stay texts."""

import csv
import json
import random
import shutil

import pytest
from stored import bare, figure_of, trials_of

from loralab.analysis.arms import comparisons
from loralab.analysis.results import read_results
from loralab.records import record
from loralab.reporting.figures import figures
from loralab.reporting.report import report

MOST_BYTES = 2_000_000


def write_sweep(root, synthetic, count, seeds=4):
    """``count`` made-up trials with curves of 120 steps, of schemes and learning rates, ``seeds`` of each."""
    trials = []
    for index in range(count):
        arm, seed = divmod(index, seeds)
        scheme = ("none", "int8_absmax", "nf4_double")[arm % 3]
        stored = synthetic(scheme, 8, seed)
        noise = random.Random(index)
        stored["trial"] = f"{noise.getrandbits(40):010x}"
        stored["config"]["optimizer"]["lr"] = 0.001 * (1 + arm // 3)
        loss = 3 + 0.001 * arm + noise.gauss(0, 0.01)
        stored["metrics"] = {"val/loss": loss, "val/perplexity": 2.718**loss}
        stored["time"] |= {"train_s": 10 + noise.random(), "wall_s": 12 + noise.random()}
        folder = root / stored["trial"]
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(stored))
        rows = [{"step": step, "train/loss": 3 + 1 / step + noise.gauss(0, 0.1)} for step in range(1, 121)]
        rows[70]["train/loss"] = 9.5 + arm  # a spike
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        trials.append({"trial": stored["trial"], "folder": stored["trial"], "status": "completed"})
    axes = {"quantization": ["none", "int8_absmax", "nf4_double"], "optimizer.lr": [], "seed": list(range(seeds))}
    axes["optimizer.lr"] = [0.001 * (1 + arm) for arm in range(-(-count // (3 * seeds)))]
    record.write_sweep(root, {"name": "many", "question": "?", "axes": axes, "trials": trials})
    return root


@pytest.mark.parametrize(
    "count", [10, 200, 201, pytest.param(10_000, marks=pytest.mark.slow)], ids=lambda count: f"{count} trials"
)
def test_the_page_is_small_and_its_data_are_those_of_results_csv(tmp_path, synthetic, count):
    done = report(write_sweep(tmp_path / "s", synthetic, count))
    page = done.index.read_text()
    assert len(page.encode()) < MOST_BYTES
    lines = list(csv.DictReader(done.files["results.csv"].read_text().splitlines()))
    trials = trials_of(page)
    assert len(lines) == count
    for key in lines[0]:
        told = [line[key] for line in lines]
        shown = ["" if value is None else str(value) for value in trials[key]]
        if count > 2000 and key.startswith("time."):  # six digits
            assert [float(value) for value in shown if value] == pytest.approx([float(v) for v in told if v], rel=1e-5)
        else:
            assert shown == told, key


@pytest.mark.parametrize(("count", "kind"), [(12, "seeds"), (204, "means")])
def test_curves_have_at_most_100_points_with_the_spikes_and_very_many_become_means(tmp_path, synthetic, count, kind):
    page = report(write_sweep(tmp_path / "s", synthetic, count)).index.read_text()
    store = figure_of(page, "curve_train_loss")["store"]["metrics"]["train/loss"]
    assert len(store["seeds"]) == (count if kind == "seeds" else 0)
    for line in store[kind]:
        assert len(line["step"]) <= 100
        assert (line["step"][0], line["step"][-1]) == (1, 120)
        assert max(line["value"]) >= 9.5
    if kind == "means":
        assert len(store["means"]) == count // 4
        assert all(
            low <= mean <= high
            for line in store["means"]
            for low, mean, high in zip(line["low"], line["value"], line["high"], strict=True)
        )


def test_drawn_values_are_the_records(synthetic_sweep, tmp_path):
    shutil.copytree(synthetic_sweep, tmp_path / "s")
    done = report(tmp_path / "s")
    page, arms = done.index.read_text(), json.loads(done.files["results.json"].read_text())["arms"]
    means = {row["name"]: row for row in figure_of(page, "metric")["spec"]["datasets"]["means"] if row["name"]}
    differences = {row["name"]: row for row in figure_of(page, "differences")["spec"]["datasets"]["rows"]}
    assert len(means) == len(arms)
    for arm in arms:
        row, difference = means[arm["name"]], arm["difference"]
        assert row["value"] == arm["mean"]
        if arm["name"] in differences:
            drawn = differences[arm["name"]]
            assert (drawn["value"], drawn["low"], drawn["high"]) == tuple(
                difference[k] for k in ("mean", "low", "high")
            )
            assert drawn["against"] == arm["against"]
            half = (difference["high"] - difference["low"]) / 2
            if "low" in row:
                assert (row["low"], row["high"]) == pytest.approx((arm["mean"] - half, arm["mean"] + half))


def test_a_line_of_the_explorer_joins_what_no_other_row_beats(synthetic_sweep, tmp_path):
    shutil.copytree(synthetic_sweep, tmp_path / "s")
    (figure,) = (one for one in figures(comparisons(read_results(tmp_path / "s"))[0]) if one.name == "explorer")
    rows, front = (figure.spec["datasets"][name] for name in ("points", "front"))
    beaten = [any(a["x"] <= b["x"] and a["y"] <= b["y"] and a != b for a in rows) for b in rows]
    assert sorted(row["name"] for row in front) == sorted(
        row["name"] for row, is_beaten in zip(rows, beaten, strict=True) if not is_beaten
    )


def test_names_with_markup_end_no_script(tmp_path, synthetic, write):
    evil = "</script><script>alert(1)</script>'\"&"
    for r in (2, 8):
        stored = synthetic("none", r, 0)
        stored["choices"]["quantization"] = evil + str(r)
        stored["overrides"] = [f"x={evil}"]
        write(tmp_path / str(r), stored)
    page = report(tmp_path).index.read_text()
    assert "<script>alert" not in page
    assert "alert(1)</script>" not in page
    assert evil + "2" in [*trials_of(page)["quantization"]]
    assert figure_of(page, "metric")["spec"]["datasets"]["means"]
    assert "alert(1)" in bare(page)
