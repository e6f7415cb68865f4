"""The sentence that answers a sweep's question, for outcomes that are known."""

import statistics
from dataclasses import replace

import pytest
from scipy import stats

from loralab.analysis.answer import answer
from loralab.analysis.arms import comparisons
from loralab.analysis.results import read_results
from loralab.records import record
from loralab.reporting.figures import axis_roles


@pytest.fixture
def answered(tmp_path, synthetic, write):
    """The sentence of runs with these losses: {(quantization, r, seed): loss}."""

    def build(losses):
        for (scheme, r, seed), loss in losses.items():
            write(tmp_path / f"{scheme}-{r}-{seed}", {**synthetic(scheme, r, seed), "metrics": {"val/loss": loss}})
        return answer(comparisons(read_results(tmp_path)))

    return build


NOISE = (0.0, 0.004, -0.003, 0.001)


def test_a_clear_effect_is_named_with_its_size_and_its_direction(answered):
    losses = {("none", 2, seed): 3.0 + 10 * noise for seed, noise in enumerate(NOISE)}
    losses |= {("none", 8, seed): 2.5 + 10 * noise + abs(noise) for seed, noise in enumerate(NOISE)}
    mean = statistics.fmean(losses["none", 8, seed] - losses["none", 2, seed] for seed in range(4))
    assert answered(losses) == f"By val/loss, r = 8 ({mean:+.4f}) is better than 2 (95%, 4 seeds)."


def test_what_the_intervals_cannot_tell_apart_is_said(answered):
    losses = {("none", 2, seed): 3.0 + noise for seed, noise in enumerate(NOISE)}
    losses |= {("none", 8, seed): 3.0 - noise for seed, noise in enumerate(NOISE)}
    assert answered(losses) == "By val/loss, r = 8 cannot be told apart from 2 (95%, 4 seeds)."


def test_one_seed_tells_nothing_from_chance(answered):
    text = answered({("none", 2, 0): 3.0, ("none", 8, 0): 2.5})
    assert "With one score a row nothing can be told from chance" in text
    assert "r = 8 (2.5000)" in text


def test_each_axis_is_held_against_its_first_value_all_else_equal(answered):
    """r = 8 is better in both, none too; the intervals hold together (Bonferroni over four)."""
    losses = {}
    for seed, noise in enumerate(NOISE):
        for r, of_rank in ((2, 0.0), (8, -0.5)):
            losses["none", r, seed] = 3.0 + of_rank + noise
            losses["nf4_double", r, seed] = 3.1 + of_rank + noise + 0.001 * (seed + r)
    text = answered(losses)
    assert text.startswith("By val/loss, ")
    assert "none (-0.1095 to -0.1035) is better than nf4_double" in text
    assert "r = 8 (-0.5000 to -0.4940) is better than 2" in text
    assert text.endswith("(95% for all 4 paired differences together, 4 seeds).")


@pytest.mark.parametrize(("p", "told"), [(0.04, False), (0.02, True)])
def test_an_interval_counts_for_all_differences_together(answered, p, told):
    """Two differences, so that each must be significant at 2.5%: at p = 0.04 by itself it is not told."""
    gaps = [-1.5, -0.5, 0.5, 1.5]
    shift = stats.t.ppf(1 - p / 2, 3) * stats.sem(gaps)
    losses = {("none", r, seed): 3.0 + seed / 7 for r in (2,) for seed in range(4)}
    losses |= {("none", 8, seed): 3.0 + seed / 7 + gap + shift for seed, gap in enumerate(gaps)}
    losses |= {("none", 16, seed): 3.0 + seed / 7 + gap for seed, gap in enumerate(gaps)}
    assert ("is worse than 2" in answered(losses)) == told


def test_nothing_completed_is_no_answer(answered, tmp_path, synthetic, write):
    write(tmp_path / "b", {**synthetic("none", 8, 0), "status": "failed", "metrics": {}, "error": "no room"})
    assert "no answer yet: only one row has a completed trial" in answered({("none", 2, 0): 3.0})


def test_rows_are_held_against_the_row_that_differs_in_one_axis(tmp_path, synthetic, write):
    """nf4_double with r = 8 against none with r = 8, which is held against none with r = 2."""
    for scheme in ("none", "nf4_double"):
        for r in (2, 8):
            for seed in range(2):
                write(tmp_path / f"{scheme}-{r}-{seed}", synthetic(scheme, r, seed))
    (comparison,) = comparisons(read_results(tmp_path))
    against = {
        tuple(arm.values.values()): arm.against and tuple(arm.against.values.values()) for arm in comparison.arms
    }
    first = next(iter(against))
    assert against[first] is None
    assert [arm.baseline for arm in comparison.arms] == [True, False, False, False]
    for values, other in against.items():
        if values != first:
            assert sum(a != b for a, b in zip(values, other, strict=True)) == 1
    arm = comparison.arms[-1]
    gaps = [arm.by_seed[seed] - arm.against.by_seed[seed] for seed in arm.by_seed]
    assert arm.difference.mean == pytest.approx(statistics.fmean(gaps))


def test_axes_that_move_together_are_one(tmp_path, synthetic, write):
    losses = {("none", 2, seed): 3.0 + noise for seed, noise in enumerate(NOISE)}
    losses |= {("nf4_double", 8, seed): 2.5 + noise + 0.001 * seed for seed, noise in enumerate(NOISE)}
    for (scheme, r, seed), loss in losses.items():
        write(tmp_path / f"{scheme}-{seed}", {**synthetic(scheme, r, seed), "metrics": {"val/loss": loss}})
    trials = [{"folder": f"{scheme}-{seed}", "status": "completed"} for scheme, _, seed in losses]
    axes = {"quantization": ["none", "nf4_double"], "adapter.r": [2, 8], "seed": [0, 1, 2, 3]}
    sweep = {"name": "tied", "question": "?", "axes": axes, "trials": trials}
    record.write_sweep(tmp_path, sweep)
    assert answer(comparisons(read_results(tmp_path))).startswith("No two rows differ in one axis alone")
    record.write_sweep(tmp_path, {**sweep, "zip": ["quantization", "adapter.r"]})
    tied = read_results(tmp_path)
    mean = statistics.fmean(losses["nf4_double", 8, seed] - losses["none", 2, seed] for seed in range(4))
    assert answer(comparisons(tied)) == (
        f"By val/loss, quantization (and r with it) = nf4_double ({mean:+.4f}) is better than none (95%, 4 seeds)."
    )
    assert axis_roles(tied) == ("quantization", [])
    assert replace(tied, about={"zip": [["seed", "adapter.r"]]}).led == {}  # seed is no axis of a table


@pytest.mark.parametrize(
    ("words", "led"),
    [
        (["adapter.lora_alpha='${loralab.mul:2,${adapter.r}}'"], {"adapter.lora_alpha": "adapter.r"}),
        (["+adapter.lora_alpha=${adapter.r}", "optimizer.lr=1e-3"], {"adapter.lora_alpha": "adapter.r"}),
        (["adapter.r=2,8", "adapter.lora_alpha=4,16"], {}),  # written out, it is an axis of its own
        (["adapter.lora_alpha='${loralab.mul:${adapter.r},${quantization}}'"], {}),  # of two axes
        (["adapter.r='${adapter.lora_alpha}'"], {}),  # alpha = 4 does not say which r
        (None, {}),
    ],
)
def test_an_axis_written_as_an_interpolation_of_another_moves_with_it(tmp_path, synthetic, write, words, led):
    alphas = {(2, "none"): 4, (8, "none"): 16, (2, "nf4_double"): 4, (32, "none"): 4}
    if led:
        del alphas[32, "none"]
    for (r, scheme), alpha in alphas.items():
        stored = synthetic(scheme, r, 0)
        stored["config"]["adapter"]["lora_alpha"] = alpha
        write(tmp_path / f"{scheme}-{r}", stored)
    axes = {"adapter.r": [2, 8], "adapter.lora_alpha": [4, 16], "quantization": ["none", "nf4_double"]}
    trials = [{"folder": f"{scheme}-{r}", "status": "completed"} for r, scheme in alphas]
    record.write_sweep(tmp_path, {"name": "s", "question": "?", "axes": axes, "trials": trials, "overrides": words})
    assert read_results(tmp_path).led == led
