"""Claims of every form against records: which arms they speak of, what is held against what, and with what numbers."""

import math
import statistics

import numpy as np
import pytest
from scipy import stats

from loralab.analysis.arms import comparisons
from loralab.analysis.claims import MORE_SEEDS, verdicts
from loralab.analysis.published import mark, published
from loralab.analysis.results import read_results
from loralab.records import record

SEEDS = range(5)
SCHEMES, RANKS = ("none", "nf4_double"), (2, 8, 32)
BITS, COUNT = "base.bits_per_parameter", "adapter.trainable_parameters"


def loss(scheme, r, seed):
    """nf4_double costs 0.1, each step of the rank saves 0.2; a seed moves all arms by much, each of them by little."""
    own = np.random.default_rng([SCHEMES.index(scheme), r, seed]).normal(0, 0.01)
    return 2.0 + 0.5 * seed + 0.1 * (scheme != "none") - 0.2 * RANKS.index(r) + own


@pytest.fixture
def judge(tmp_path, synthetic, write):
    """Verdicts on ``claims`` of a sweep of schemes, ranks and seeds; ``change`` is done to each record."""

    def run(claims, schemes=SCHEMES, ranks=RANKS, seeds=SEEDS, change=lambda trial, scheme, r: None, more=None, **said):
        trials = []
        for scheme, r, seed in ((s, r, seed) for s in schemes for r in ranks for seed in seeds):
            trial = synthetic(scheme, r, seed)
            trial["metrics"] = {"val/loss": loss(scheme, r, seed)}
            change(trial, scheme, r)
            write(tmp_path / trial["trial"], trial)
            trials.append({"trial": trial["trial"], "folder": trial["trial"]})
        axes = {"quantization": schemes, "adapter.r": ranks, **(more or {})}
        axes = {axis: list(values) for axis, values in axes.items() if len(values) > 1}
        record.write_sweep(tmp_path, {"name": "s", "axes": axes, "trials": trials, "claims": claims, **said})
        results = read_results(tmp_path)
        return verdicts(results, comparisons(results))

    return run


def scores(scheme, r, seeds=SEEDS):
    return np.array([loss(scheme, r, seed) for seed in seeds])


def interval(gaps):
    return stats.t.interval(0.95, len(gaps) - 1, np.mean(gaps), stats.sem(gaps))


def test_an_arm_may_be_named_by_several_axes_or_by_one_with_a_verdict_for_each_setting_of_the_others(judge):
    one, *each = judge(["r=8 & quantization=none <= adapter.r=2 & quantization=none", "r=8 <= r=2"])
    gaps = scores("none", 8) - scores("none", 2)
    assert one.verdict == "holds"
    assert (one.estimate, one.interval) == (pytest.approx(gaps.mean()), pytest.approx(interval(gaps)))
    assert one.p == pytest.approx(stats.ttest_rel(scores("none", 8), scores("none", 2)).pvalue)
    assert one.p_permutation == pytest.approx(2 / 2**5)
    assert one.interval_bootstrap[0] < gaps.mean() < one.interval_bootstrap[1]
    assert one.seeds == tuple(map(str, SEEDS))
    assert [verdict.claim for verdict in each] == [
        "r=8 <= r=2 (quantization = none)",
        "r=8 <= r=2 (quantization = nf4_double)",
    ]
    assert each[0].estimate == one.estimate


def test_a_setting_names_what_either_arm_alone_has(judge):
    def change(trial, scheme, r):
        if scheme == "none":
            trial["config"]["quantization"].pop("block_size", None)
        else:
            trial["config"]["quantization"]["block_size"] = 32 * r
            del trial["config"]["adapter"]["r"]

    found = judge(["none <= nf4_double"], ranks=(2, 8), change=change, more={"quantization.block_size": (64, 256)})
    assert [one.claim for one in found] == [
        f"none <= nf4_double (r = {r}, block_size = {32 * r})"
        for r in (2, 8)  # they move together
    ]


def test_where_keeps_a_claim_to_some_arms(judge):
    (found,) = judge([{"claim": "none <= nf4_double", "where": {"r": 8}, "source": "table 3"}])
    gaps = scores("none", 8) - scores("nf4_double", 8)
    assert (found.claim, found.verdict, found.estimate) == ("none <= nf4_double", "holds", pytest.approx(gaps.mean()))
    assert found.text.startswith("Claim none <= nf4_double [r = 8]: holds; ")
    assert found.text.endswith(" Source: table 3.")


@pytest.mark.parametrize(
    ("claim", "verdict"),
    [
        ("nf4_double = none within 0.2", "holds"),
        ("nf4_double = none within 0.05", "does not hold"),
        ("nf4_double = none within 0.101", "cannot tell"),
        ("nf4_double - none = 0.1 within 0.05", "holds"),
        ("none - nf4_double = 0.1 within 0.05", "does not hold"),
        ("nf4_double / none <= 1.1", "holds"),
        ("nf4_double / none >= 1.1", "does not hold"),
        ("none / nf4_double = 0.96 within 0.03", "holds"),
        ("none = 3 within 2", "holds"),
        ("none = 9 within 2", "does not hold"),
    ],
)
def test_margins_differences_ratios_and_numbers(judge, claim, verdict):
    assert [found.verdict for found in judge([claim], ranks=[2])] == [verdict]


def test_equality_has_the_p_of_two_one_sided_tests(judge):
    (found,) = judge(["nf4_double = none within 0.2"], ranks=[2])
    gaps = scores("nf4_double", 2) - scores("none", 2)
    tests = [(-0.2, "greater"), (0.2, "less")]
    assert found.p == pytest.approx(max(stats.ttest_1samp(gaps, at, alternative=side).pvalue for at, side in tests))
    assert "TOST p = " in found.why


def test_a_ratio_is_that_of_geometric_means(judge):
    (found,) = judge(["nf4_double / none <= 1.1"], ranks=[2])
    ratios = scores("nf4_double", 2) / scores("none", 2)
    assert found.estimate == pytest.approx(statistics.geometric_mean(ratios))
    assert found.interval == pytest.approx(np.exp(interval(np.log(ratios))))
    assert found.p == pytest.approx(stats.ttest_1samp(np.log(ratios), math.log(1.1)).pvalue)
    (below,) = judge(["nf4_double / none <= 1.1"], change=lambda t, s, r: t["metrics"].update({"val/loss": -1.0}))[:1]
    assert (below.verdict, "a ratio needs numbers above 0" in below.why) == ("cannot tell", True)


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ({"claim": "r=8 = 49152", "metric": COUNT}, "holds"),
        ({"claim": "r=8 = 49153", "metric": COUNT}, "does not hold"),
        ({"claim": "r=8 = r=8", "metric": COUNT}, "not comparable"),
        ({"claim": "r=8 / r=2 = 4", "metric": COUNT}, "holds"),
        ({"claim": "r=8 / r=2 >= 4.1", "metric": COUNT}, "does not hold"),
        ({"claim": "r=2 <= r=8", "metric": COUNT}, "holds"),
        ({"claim": "r=8 <= r=2", "metric": COUNT}, "does not hold"),
        ({"claim": "rises with r", "metric": COUNT}, "holds"),
        ({"claim": "falls with adapter.r", "metric": COUNT}, "does not hold"),
        ({"claim": "flat in r within 1", "metric": COUNT}, "does not hold"),
        ({"claim": "flat in r within 0.5", "metric": BITS}, "holds"),
        ({"claim": "r=8 = r=2", "metric": BITS}, "holds"),
    ],
)
def test_numbers_that_no_seed_moves_need_one_seed(judge, said, verdict):
    (found,) = judge([said], schemes=["nf4_double"], seeds=[0])
    assert (found.verdict, found.p, found.interval) == (verdict, None, None)


def test_the_bits_that_double_quantization_saves(judge):
    (found,) = judge([{"claim": "none - nf4_double = 27.873 within 0.001", "metric": BITS}], ranks=[2], seeds=[0])
    assert (found.verdict, found.estimate) == ("holds", pytest.approx(32 - 4.127))


@pytest.mark.parametrize(
    ("claim", "verdict"),
    [
        ("falls with adapter.r", "holds"),
        ("rises with r", "does not hold"),
        ("flat in r within 0.5", "holds"),
        ("flat in r within 0.1", "does not hold"),
    ],
)
def test_along_an_axis(judge, claim, verdict):
    found = judge([claim])
    assert [one.verdict for one in found] == [verdict] * 2
    assert [one.claim for one in found] == [f"{claim} (quantization = none)", f"{claim} (quantization = nf4_double)"]
    values = np.array([[loss("none", r, seed) for r in RANKS] for seed in SEEDS])
    gaps = values[:, 0] - values[:, 2] if "flat" in claim else (values[:, 2] - values[:, 0]) / 2
    assert found[0].estimate == pytest.approx(gaps.mean())
    assert found[0].interval == pytest.approx(interval(gaps))
    assert "r = 2: " in found[0].why


@pytest.mark.parametrize(
    ("back", "noise", "verdict", "says"),
    [
        (0.30, 0.01, "does not hold", "the other way round from 8 to 32"),
        (0.30, 0.174, "cannot tell", "a trend, but a step that likely goes the other way"),
        (0.01, 0.10, "holds", "the other way round from 8 to 32"),
    ],
)
def test_a_step_back_takes_a_trend_away_where_it_is_more_than_chance(judge, back, noise, verdict, says):
    steps = np.array([-1, 1, -1, 1, 0]) * noise

    def change(trial, scheme, r):
        own = steps[trial["seed"]] if r == 32 else 0.0
        trial["metrics"]["val/loss"] = 1.0 + trial["seed"] - {2: 0.0, 8: 1.0, 32: 1.0 - back}[r] + own

    (found,) = judge(["falls with r"], schemes=["none"], change=change)
    assert (found.verdict, says in found.why) == (verdict, True), found.why
    assert found.seeds_needed is None


def test_claims_are_corrected_together_and_what_is_not_told_says_how_many_seeds_would_tell(judge):
    weak = ["nf4_double - none = 0.1 within 0.012"]
    (alone,) = judge(weak, ranks=[2])
    together = judge([*weak, *["none <= nf4_double"] * 3], ranks=[2])
    assert alone.p_holm == alone.p == together[0].p
    ps = sorted(one.p for one in together)
    assert together[0].p_holm == pytest.approx(max((4 - place) * p for place, p in enumerate(ps)))
    assert (alone.verdict, together[0].verdict) == ("cannot tell", "cannot tell")
    assert len(SEEDS) < alone.seeds_needed < together[0].seeds_needed
    assert f"about {alone.seeds_needed} seeds are needed (80% power at 0.05" in alone.why
    assert all(one.seeds_needed is None for one in together[1:])


def test_one_seed_tells_nothing_and_says_how_seeds_are_added(judge):
    (found,) = judge(["none <= nf4_double"], ranks=[2], seeds=[0])
    assert (found.verdict, found.p, found.seeds) == ("cannot tell", None, ("0",))
    assert MORE_SEEDS in found.why


@pytest.mark.parametrize(
    ("claim", "verdict", "why"),
    [
        ("none <= fp4", "not comparable", "fp4 not measured here"),
        ("r=4 <= r=2", "not comparable", "r=4 not measured here"),
        ("rank=4 <= rank=2", "cannot tell", "there is no axis rank"),
        ("rises with quantization", "cannot tell", "has the value none, which is no number"),
        ("none <= r=2", "cannot tell", "for one of its arms alone"),
        ("none is better", "cannot tell", "has no form that is known"),
        (3, "cannot tell", "is neither a text nor a mapping"),
        ({"claim": "none <= nf4_double", "metric": "val/rouge_l"}, "cannot tell", "has no val/rouge_l in its records"),
        ({"claim": "none <= nf4_double", "metric": "base.nonsense"}, "cannot tell", "nothing that a record measures"),
    ],
)
def test_on_reading_a_folder_a_wrong_claim_is_one_that_cannot_be_told(judge, claim, verdict, why):
    found = judge([claim])
    assert {one.verdict for one in found} == {verdict}
    assert all(why in one.why for one in found)


def test_an_axis_of_which_one_value_is_left_still_names_its_arm(judge):
    number, order, along = judge(
        [{"claim": "nf4_double = 4.127 within 0.001", "metric": BITS}, "none <= nf4_double", "falls with r"],
        schemes=["nf4_double"],
        ranks=[2],
    )
    assert number.verdict == "holds"
    assert (order.verdict, order.why) == ("not comparable", "none not measured here")
    assert (along.verdict, along.why) == ("not comparable", "fewer than two values of r were measured here")


def test_an_arm_without_a_completed_trial_is_awaited(judge):
    def fail(trial, scheme, r):
        if scheme == "none":
            trial.update(status="failed", error="no memory", metrics={})

    (found,) = judge(["none <= nf4_double"], ranks=[2], change=fail)
    assert (found.verdict, found.why) == ("cannot tell", "none has no completed trial (failed)")


def test_what_is_measured_of_a_pack_compares_with_nothing(judge):
    claims = [{"claim": "none <= nf4_double", "metric": "time.train_s"}]
    packed = judge(claims, ranks=[2], change=lambda trial, scheme, r: trial["pack"].update(size=2))
    assert [one.verdict for one in packed] == ["not comparable"]
    assert "hydra.launcher.pack=off" in packed[0].why
    (alone,) = judge(claims, ranks=[2])
    assert alone.p is not None


def test_axes_that_move_together_are_named_by_either(judge):
    def rate(trial, scheme, r):
        trial["config"]["optimizer"]["lr"] = 0.01 / r
        trial["overrides"].append(f"optimizer.lr={0.01 / r}")

    claims, rates = ["r=8 <= r=2", "lr=0.00125 <= lr=0.005"], {"optimizer.lr": [0.005, 0.00125]}
    apart = judge(claims, schemes=["none"], ranks=[2, 8], change=rate, more=rates)
    assert [one.verdict for one in apart] == ["not comparable"] * 2  # nothing says that they belong together
    zipped = judge(claims, schemes=["none"], ranks=[2, 8], change=rate, more=rates, zip=["adapter.r", "optimizer.lr"])
    assert [one.verdict for one in zipped] == ["holds"] * 2


def test_the_first_axis_of_a_sweep_file_stays_the_first_where_one_of_its_values_is_left(judge):
    # 2 is a rank; of the second axis, which alone has several values here, it must not be taken for an arm's name
    *numbers, order = judge(["none = 2 within 3", "2 <= 8"], schemes=["none"], named_by="quantization")
    assert [one.verdict for one in numbers] == ["holds"] * 3
    assert (order.verdict, order.why) == ("not comparable", "2 and 8 not measured here")


def test_what_is_published_of_a_rank_is_not_shown_at_a_rate_of_the_same_number(judge, tmp_path):
    judge([], ranks=[2, 8], published={"2": [5.0], "8.0": [6.0]}, marks={"2": "unconfirmed"})
    whole = comparisons(read_results(tmp_path))[0].arms
    assert [published(arm) for arm in whole] == [[]] * 4  # the first axis is the quantization
    about = {**record.read_sweep(tmp_path), "named_by": "adapter.r"}
    record.write_sweep(tmp_path, about)
    found = comparisons(read_results(tmp_path))[0].arms
    assert [(published(arm), mark(arm)) for arm in found] == [([5.0], "unconfirmed"), ([6.0], None)] * 2


def test_a_number_that_is_also_an_arm_is_not_taken_for_either(judge):
    (found,) = judge(["2 = 8 within 0.1"], schemes=["none"])
    assert (found.verdict, "8 is a number and an arm; valid: r=8 for the arm" in found.why) == ("cannot tell", True)


def test_a_tuned_arm_is_judged_by_the_test_scores_of_its_own_rate(judge):
    def tried(trial, scheme, r):
        # the rank stands for the rate: validation prefers 8 for none and 32 for nf4_double
        trial["config"]["optimizer"]["lr"] = r / 1000
        trial["config"]["adapter"]["r"] = 2
        trial["overrides"] = [f"quantization={scheme}", f"optimizer.lr={r / 1000}", f"seed={trial['seed']}"]
        best = r == (8 if scheme == "none" else 32)
        noise = np.random.default_rng([r, trial["seed"]]).normal(0, 0.01)
        trial["metrics"] = {"val/loss": 1.0 - best + noise, "test/loss": 3.0 - best + 0.2 * (scheme == "none") + noise}

    found = judge(
        ["nf4_double <= none", "falls with optimizer.lr", {"claim": "nf4_double <= none", "metric": "val/loss"}],
        change=tried,
        tune={"optimizer.lr": [0.002, 0.008, 0.032]},
    )
    assert [one.verdict for one in found] == ["holds", "cannot tell", "not comparable"]
    noise = [[np.random.default_rng([r, seed]).normal(0, 0.01) for seed in SEEDS] for r in (32, 8)]
    assert found[0].estimate == pytest.approx(-0.2 + np.mean(noise[0]) - np.mean(noise[1]))
    assert "each row has its own best" in found[1].why
    assert "val/loss chose each row's" in found[2].why
