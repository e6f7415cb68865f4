"""Shares of the variance of a factorial sweep, against scipy, least squares and designs whose effects are known."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from loralab.analysis.arms import comparisons
from loralab.analysis.effects import decomposed, effects
from loralab.analysis.results import read_results


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def parts(found):
    return {part.axes: part for part in found.parts}


def test_one_axis_has_the_f_test_of_scipy_and_a_share_that_follows_from_it():
    scores = noise(4, 6) + 0.5 * np.arange(4)[:, None]
    (part,) = decomposed(scores, ["r"]).parts
    theirs = stats.f_oneway(*scores)
    assert part.p == pytest.approx(theirs.pvalue)
    # epsilon squared is that of the adjusted R squared: 3 and 20 degrees of freedom
    f = theirs.statistic
    assert part.share == pytest.approx(1 - (1 - f * 3 / (f * 3 + 20)) * 23 / 20)


def test_two_axes_by_hand():
    # cells' means 1 2 / 3 8 over two seeds at +-1: grand mean 3.5, rows 1.5 and 5.5, columns 2 and 5, each cell twice
    scores = np.array([[1.0, 2.0], [3.0, 8.0]])[..., None] + np.array([-1.0, 1.0])
    found = decomposed(scores, ["a", "b"])
    rows, columns, both, within = 8 * 4.0, 8 * 2.25, 8 * 1.0, 8 * 1.0
    total, chance = rows + columns + both + within, within / 4
    assert {axes: part.share for axes, part in parts(found).items()} == pytest.approx(
        {("a",): (rows - chance) / total, ("b",): (columns - chance) / total, ("a", "b"): (both - chance) / total}
    )
    assert (found.seeds, found.n) == (pytest.approx(7 * chance / total), 2)
    assert parts(found)["a",].p == pytest.approx(stats.f.sf(rows / chance, 1, 4))
    assert found.importance == [("a", pytest.approx(36 / total)), ("b", pytest.approx(22 / total))]
    assert found.text == "Shares of the variance: a 45%, b 24%, a x b 9%, seeds 21%"


def explained(scores, terms):
    """Residual squares of a least-squares fit of indicator columns for every combination of values of each term."""
    places = np.array(list(np.ndindex(scores.shape)))
    columns = [np.ones(len(places))]
    for term in terms:
        _, codes = np.unique(places[:, term], axis=0, return_inverse=True)
        columns += [(codes.ravel() == code).astype(float) for code in range(codes.max() + 1)]
    design = np.stack(columns, axis=1)
    fitted = design @ np.linalg.lstsq(design, scores.ravel(), rcond=None)[0]
    return ((scores.ravel() - fitted) ** 2).sum()


def test_three_axes_have_the_squares_of_least_squares_fits():
    scores = noise(2, 3, 4, 3) + noise(2, 1, 1, 1, seed=1) + noise(1, 3, 4, 1, seed=2)
    found = decomposed(scores, ["a", "b", "c"])
    total, fitted = explained(scores, []), []
    chance = explained(scores, [[0, 1, 2]]) / (24 * 2)
    for of in [(0,), (1,), (2,), *combinations(range(3), 2)]:
        before = explained(scores, fitted)
        fitted.append(list(of))
        freedom = np.prod([scores.shape[i] - 1 for i in of])
        share = (before - explained(scores, fitted) - freedom * chance) / total
        assert parts(found)[tuple("abc"[i] for i in of)].share == pytest.approx(share)
    assert found.seeds == pytest.approx(71 * chance / total)
    assert found.higher == pytest.approx(
        (explained(scores, fitted) - explained(scores, [[0, 1, 2]]) - 6 * chance) / total
    )
    assert sum(part.share for part in found.parts) + found.seeds + found.higher == pytest.approx(1)


def test_the_f_test_errs_in_5_of_100_designs_and_finds_what_is_there():
    draws = noise(1000, 3, 2, 3)
    told = [[part.p <= 0.05 for part in decomposed(scores, ["a", "b"]).parts] for scores in draws]
    assert np.mean(told, axis=0) == pytest.approx([0.05] * 3, abs=0.02)
    effect = np.array([0.0, 2.0, 4.0])[:, None, None]
    assert np.mean([decomposed(scores + effect, ["a", "b"]).parts[0].p <= 0.05 for scores in draws[:100]]) > 0.95


def test_intervals_are_by_seeds_and_the_same_at_every_call():
    scores = noise(3, 2, 8) + np.array([0.0, 2.0, 4.0])[:, None, None]
    found = decomposed(scores, ["a", "b"])
    low, high = found.parts[0].interval
    assert low < found.parts[0].share < high
    assert decomposed(scores, ["a", "b"]) == found
    assert decomposed(scores[..., :4], ["a", "b"]).parts[0].interval is None


@pytest.mark.parametrize("n", [5, 10])
def test_shares_are_right_in_the_mean_and_their_intervals_cover(n):
    true = np.array([8 / 3 / (8 / 3 + 1), 0, 0])  # variance of the effect over that and the noise's
    effect = np.array([0.0, 2.0, 4.0])[:, None, None]
    found = [decomposed(noise(3, 2, n, seed=seed) + effect, ["a", "b"]).parts for seed in range(100)]
    assert np.mean([[part.share for part in of] for of in found], axis=0) == pytest.approx(true, abs=0.02)
    covered = np.mean(
        [[part.interval[0] <= t <= part.interval[1] for part, t in zip(of, true, strict=True)] for of in found], axis=0
    )
    assert covered[0] > 0.8
    assert (covered[1:] > 0.9).all()


def test_of_a_sweep_it_takes_the_seeds_that_all_rows_have(paper):
    losses = {"none": [1.0, 2.0, 3.0], "int8_absmax": [1.5, 2.51], "nf4_double": [1.51, 2.49, 3.5]}
    (comparison,) = comparisons(read_results(paper(losses, [])))
    found = effects(comparison)
    scores = np.array([values[:2] for values in losses.values()])
    assert found.n == 2
    assert found.parts == decomposed(scores, ["quantization"]).parts


def test_an_incomplete_design_has_none_and_says_what_lacks(write_runs):
    losses = {(r, seed): 1.0 + r + 0.1 * seed for r in (2, 4) for seed in (0, 1)}

    def two_alphas(trial, r, seed):
        trial["config"]["adapter"]["lora_alpha"] = 16 if r == 2 else 32
        trial["config"]["optimizer"]["lr"] = 0.1 if seed else 0.2

    (alone,) = comparisons(read_results(write_runs({(2, 0): 1.0})))
    assert (effects(alone).parts, effects(alone).why) == ([], "no axis has several values")
    for (r, seed), loss in list(losses.items())[:3]:
        write_runs({(r, seed): loss}, two_alphas, name="incomplete")
    (comparison,) = comparisons(read_results(write_runs({}) / "incomplete"))
    assert "1 of 4 combinations of adapter.r and optimizer.lr have no score" in effects(comparison).why


def test_without_several_scores_the_seeds_have_no_share():
    found = decomposed(noise(3, 2, 1), ["a", "b"])
    assert (found.seeds, [part.p for part in found.parts]) == (0, [None] * 3)
    assert "seeds" not in found.text
    assert decomposed(np.ones((2, 2, 3)), ["a", "b"]).why == "all scores are equal"
