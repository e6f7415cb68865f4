"""Heat maps: the numbers of results.csv, grouped by pandas, in the cells; the best one framed."""

import json

import numpy as np
import pandas as pd
import pytest
from grids import write_grid
from stored import figure_of

from loralab.analysis.arms import comparisons
from loralab.analysis.results import read_results
from loralab.reporting import heat
from loralab.reporting.report import report

ALPHA = {"adapter.r": [2, 8, 32], "adapter.lora_alpha": [4, 16, 64, 256]}
RATES = {"adapter.r": [2, 8], "optimizer.lr": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]}


def maps(done):
    page = done.index.read_text()
    names = [f"heat{end}" for end in ("", *(f"_{number}" for number in range(2, 20))) if f'"heat{end}"' in page]
    return [figure_of(page, name) for name in names]


def drawn(root):
    """The maps without a page around them."""
    return [*heat.figures(comparisons(read_results(root))[0])]


def shown(figure):
    """{(x, y): value} and the framed cell."""
    rows = figure["spec"]["datasets"]["cells"]
    (best,) = (row for row in rows if row["best"])
    return {(float(row["x"]), float(row["y"])): row["value"] for row in rows}, (float(best["x"]), float(best["y"]))


def means_of(done, metric, by, where=None):
    frame = pd.read_csv(done.files["results.csv"]).query(where or "index >= 0")
    return frame.dropna(subset=[metric]).groupby(by)[metric].mean()


def test_a_cell_is_the_mean_over_seeds_of_its_pair_and_the_least_loss_is_framed(tmp_path, synthetic):
    done = report(write_grid(tmp_path / "s", synthetic, ALPHA))
    (figure,) = maps(done)
    cells, best = shown(figure)
    expected = means_of(done, "val/loss", ["adapter.r", "adapter.lora_alpha"])
    assert cells == pytest.approx(expected.to_dict())
    assert len(cells) == 12
    assert best == expected.idxmin()
    for row in figure["spec"]["datasets"]["cells"]:
        assert float(row["text"]) == pytest.approx(row["value"], abs=5e-5)
    assert figure["title"] == "val/loss over r and lora_alpha"


def test_target_sets_have_maps_of_their_own(tmp_path, synthetic):
    axes = {"adapter.target_modules": ["q_proj", "v_proj"], **ALPHA}
    done = report(write_grid(tmp_path / "s", synthetic, axes))
    figures = maps(done)
    assert [figure["title"].partition("(")[2] for figure in figures] == [
        "target_modules = q_proj)",
        "target_modules = v_proj)",
    ]
    for figure, modules in zip(figures, axes["adapter.target_modules"], strict=True):
        where = f"`adapter.target_modules` == '{modules}'"
        expected = means_of(done, "val/loss", ["adapter.r", "adapter.lora_alpha"], where)
        assert shown(figure)[0] == pytest.approx(expected.to_dict())


def test_a_tuned_sweep_shows_all_rates_on_the_validation_split_and_says_so(tmp_path, synthetic):
    done = report(write_grid(tmp_path / "s", synthetic, RATES, tune=["optimizer.lr"]))
    (figure,) = maps(done)
    expected = means_of(done, "val/loss", ["adapter.r", "optimizer.lr"])
    assert shown(figure) == (pytest.approx(expected.to_dict()), expected.idxmin())
    page = done.index.read_text()
    assert "on the validation split, by which each row&#39;s value is chosen; the table&#39;s test/loss" in page


def test_a_cell_that_lacks_a_seed_is_not_framed_and_one_without_a_trial_is_empty(tmp_path, synthetic):
    def lacking(values, seed):
        if values["optimizer.lr"] == 1e-4:
            return "pruned"
        return "failed" if values == {"adapter.r": 8, "optimizer.lr": 1e-3} and seed == 1 else None

    root = write_grid(tmp_path / "s", synthetic, RATES, lacking=lacking)
    path = root / "adapter.r=8,optimizer.lr=0.001,seed=0" / "result.json"
    stored = json.loads(path.read_text())
    stored["metrics"]["val/loss"] = 0.5
    path.write_text(json.dumps(stored))
    done = report(root)
    (figure,) = maps(done)
    cells, best = shown(figure)
    assert cells[8, 1e-3] == 0.5
    assert best == means_of(done, "val/loss", ["adapter.r", "optimizer.lr"]).drop((8, 1e-3)).idxmin()
    caption = done.index.read_text().partition("Framed: the best mean of those with every seed")[2]
    assert "1 of 8 cells lack a seed that others have" in caption
    assert "2 of 10 cells, 2 of them ended early by the sweep" in caption


@pytest.mark.parametrize(
    "axes",
    [
        {"adapter.r": [2, 8], "adapter.lora_alpha": [4, 16]},  # too small
        {"adapter.r": [2, 8, 32], "adapter.target_modules": ["q_proj", "v_proj"]},  # names
    ],
)
def test_there_is_none_without_two_axes_of_numbers_or_with_few_values(tmp_path, synthetic, axes):
    assert drawn(write_grid(tmp_path / "s", synthetic, axes)) == []


def test_values_that_move_together_make_no_map(tmp_path, synthetic, write):
    for r in (2, 8, 32, 64):
        stored = synthetic("none", r, 0)
        stored["config"]["adapter"]["lora_alpha"] = 2 * r
        write(tmp_path / str(r), stored)
    assert drawn(tmp_path) == []


def test_numbers_stand_in_at_most_64_cells(tmp_path, synthetic):
    axes = {"adapter.r": list(range(1, 9)), "adapter.lora_alpha": list(range(1, 10))}
    layers = [
        [layer["mark"]["type"] for layer in figure.spec["layer"]]
        for root in (
            write_grid(tmp_path / "a", synthetic, {**axes, "adapter.lora_alpha": list(range(1, 9))}, seeds=[0]),
            write_grid(tmp_path / "b", synthetic, axes, seeds=[0]),
        )
        for figure in drawn(root)
    ]
    assert layers == [["rect", "text", "rect"], ["rect", "rect"]]
    assert heat.MOST_NUMBERS == 64


def luminance(colour):
    """Relative luminance, as WCAG 2 defines it, of red, green and blue in [0, 1]."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_lighter_is_better_without_any_sense_of_hue_and_numbers_are_legible():
    stops = [[int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)] for colour in heat.COLOURS]
    shares = np.linspace(0, 1, 101)
    columns = [np.interp(shares * 4, range(5), channel) for channel in zip(*stops, strict=True)]
    found = [luminance(colour) for colour in zip(*columns, strict=True)]
    assert np.all(np.diff(found) > 0)
    for share, background in zip(shares, found, strict=True):
        low, high = sorted((background, 0.0 if heat.ink(share) == "#000000" else 1.0))
        assert (high + 0.05) / (low + 0.05) >= 4
