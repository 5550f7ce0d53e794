import math

import numpy as np
import pytest
from scipy import stats

from wsss import claims, tables
from wsss.claims import paired, ranking

CLAIM = "more-12"


def by_seed(*values):
    return dict(enumerate(values))


@pytest.mark.parametrize(
    "a, b, claimed, verdict",
    [
        ((60, 61, 62), (50, 50.5, 52.5), ">", "supported"),
        ((60, 61, 62), (50, 50.5, 52.5), "<", "not supported"),
        ((50, 50.5, 52.5), (60, 61, 62), "<", "supported"),
        ((60, 61, 62), (59, 63, 60), ">", "inconclusive"),
        ((60, 61, 62), (59, 63, 60), "<", "inconclusive"),
        ((60, 61), (50, 50), ">", "inconclusive (n = 2)"),
        ((60,), (50,), ">", "inconclusive (n = 1)"),
        ((), (), ">", "inconclusive (n = 0)"),
        ((60, 60, 60), (60, 60, 60), ">", "inconclusive"),  # no difference at all lies on no side
        ((61, 61, 61), (60, 60, 60), ">", "supported"),
    ],
)
def test_paired_verdicts(a, b, claimed, verdict):
    assert paired(by_seed(*a), by_seed(*b), claimed, CLAIM).verdict == verdict


def test_the_interval_is_that_of_a_paired_t_test():
    a, b = np.array([60.0, 61, 63, 62]), np.array([58.0, 60.5, 60, 61])
    result = paired(by_seed(*a), by_seed(*b), ">", CLAIM)
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    np.testing.assert_allclose((result.low, result.high), interval, rtol=1e-12)
    assert result.effect == pytest.approx((a - b).mean()) and result.n == 4
    assert result.claim.startswith("Dropping L_cre")


def test_seeds_are_paired_by_number_not_by_order():
    result = paired({2: 62, 0: 60, 1: 61, 7: 99}, {0: 50, 1: 51, 2: 52, 5: 0}, ">", CLAIM)
    assert result.effect == 10 and result.n == 3 and result.verdict == "supported"
    assert "5, 7" in result.note


@pytest.mark.parametrize("margin, verdict", [(5, "supported"), (10, "inconclusive"), (20, "not supported")])
@pytest.mark.parametrize("claimed", ["<", ">"])
def test_a_margin_moves_the_border(claimed, margin, verdict):
    arms = [by_seed(60, 61, 62), by_seed(50, 50.5, 52.5)]
    assert paired(*(arms if claimed == ">" else arms[::-1]), claimed, CLAIM, margin=margin).verdict == verdict


# Half an interval is t(0.975, n - 1) s / sqrt(n): with differences m - 1, m, m + 1 that is 4.3027 / sqrt(3) = 2.484,
# with m - 1, m - 1, m + 1, m + 1 it is 3.1824 * 1.1547 / 2 = 1.837.
THREE, FOUR, NAN = (-1, 0, 1), (-1, -1, 1, 1), math.nan
KNOWN = [
    (THREE, 2.4, ">", 0, "inconclusive"),
    (THREE, 2.6, ">", 0, "supported"),
    (THREE, 2.6, "<", 0, "not supported"),
    (THREE, -2.6, ">", 0, "not supported"),
    (THREE, -2.6, "<", 0, "supported"),
    (THREE, -2.4, "<", 0, "inconclusive"),
    (FOUR, 1.8, ">", 0, "inconclusive"),
    (FOUR, 1.9, ">", 0, "supported"),
    (THREE, 7.4, ">", 5, "inconclusive"),  # the interval reaches to 4.9
    (THREE, 7.6, ">", 5, "supported"),
    (THREE, 2.6, ">", 5, "inconclusive"),  # to 5.1
    (THREE, 2.4, ">", 5, "not supported"),  # although better
    (THREE, -7.6, "<", 5, "supported"),
    (THREE, -7.4, "<", 5, "inconclusive"),
    (THREE, -2.4, "<", 5, "not supported"),
    (THREE, 7.6, "<", 5, "not supported"),
    ((0, 0, 0), 5, ">", 5, "inconclusive"),  # at least 5 is not more than 5
    ((0, 0, 0), -5, "<", 5, "inconclusive"),
    ((-1, 0, 1, NAN), 2.6, ">", 0, "supported"),
    ((-1, 0, 1, NAN), -2.6, ">", 0, "not supported"),
    ((-1, 0, 1, NAN), -7.6, "<", 5, "supported"),
    ((-1, 1, NAN, math.inf), 90, ">", 0, "inconclusive (n = 2)"),
    ((-1, 1), 90, "<", 0, "inconclusive (n = 2)"),
    ((-1, 1), -90, "<", 5, "inconclusive (n = 2)"),
    ((0, NAN, NAN), 90, "<", 0, "inconclusive (n = 1)"),
    ((NAN, NAN, NAN), 90, ">", 5, "inconclusive (n = 0)"),
]


@pytest.mark.parametrize("spread, effect, claimed, margin, verdict", KNOWN)
def test_verdicts_worked_out_by_hand(spread, effect, claimed, margin, verdict):
    b = by_seed(*range(40, 40 + len(spread)))
    a = {seed: b[seed] + effect + part for seed, part in enumerate(spread)}
    result = paired(a, b, claimed, CLAIM, margin)
    assert result.verdict == verdict and result.n == sum(map(math.isfinite, spread))
    if result.n >= 3:
        half = {THREE: 2.484, FOUR: 1.837, (0, 0, 0): 0}[spread[: result.n]]
        found = (result.effect, result.low, result.high)
        assert found == pytest.approx((effect, effect - half, effect + half), abs=1e-3)


def test_every_verdict_is_among_those_worked_out_by_hand():
    assert {verdict.partition(" (n")[0] for *_, verdict in KNOWN} == {"supported", "not supported", "inconclusive"}


def test_paired_refuses_what_it_cannot_judge():
    with pytest.raises(ValueError, match="claimed"):
        paired({}, {}, "=", CLAIM)
    with pytest.raises(ValueError, match="margin"):
        paired({}, {}, ">", CLAIM, margin=-1)
    with pytest.raises(ValueError, match="no claim 'more-99'"):
        paired({}, {}, ">", "more-99")


def test_a_seed_with_an_undefined_value_does_not_count_and_the_note_says_so():
    result = paired(by_seed(60, math.nan, 62, 63), by_seed(50, 51, 52, 53), ">", CLAIM)
    assert (result.n, result.verdict, result.effect) == (3, "supported", 10) and "undefined in seeds: 1" in result.note
    assert paired(by_seed(math.nan, 61, 62), by_seed(50, 51, 52), ">", CLAIM).verdict == "inconclusive (n = 2)"


def test_seeds_to_support_an_effect_are_as_many_as_a_simulation_needs():
    n = claims.seeds_to_support(1.3, 1.5)
    draw = np.random.default_rng(0).normal(1.3, 1.5, (20000, n))
    share = lambda runs: (stats.ttest_1samp(runs, 0, axis=1).confidence_interval(0.95).low > 0).mean()
    assert share(draw) > 0.79 and share(draw[:, 1:]) < 0.81 and share(draw[:, 2:]) < 0.79
    assert claims.seeds_to_support(1.3, 3.0) > 3 * n > claims.seeds_to_support(1.3, 1.5, power=0.5)
    assert claims.seeds_to_support(50, 0.01) == claims.SEEDS_NEEDED
    with pytest.raises(ValueError, match="above 0"):
        claims.seeds_to_support(1.3, 0.0)


def test_seeds_to_decide_takes_the_spread_from_the_interval():
    a, b = by_seed(61, 60.5, 63), by_seed(60, 61, 60.5)
    result = paired(a, b, ">", CLAIM)
    spread = np.std([a[seed] - b[seed] for seed in a], ddof=1)
    needed = claims.seeds_to_decide(result.effect, result.low, result.high, 3)
    assert result.verdict == "inconclusive" and needed == claims.seeds_to_support(result.effect, spread) > 3
    assert claims.seeds_to_decide(-result.effect, -result.high, -result.low, 3) == needed, "the side does not matter"
    assert claims.seeds_to_decide(result.effect, result.low, result.high, 3, most=needed) == needed
    assert claims.seeds_to_decide(result.effect, result.low, result.high, 3, most=needed - 1) == math.inf
    assert claims.seeds_to_decide(0.0, -1.0, 1.0, 3) == math.inf


HIGH, MIDDLE, LOW = by_seed(70, 71, 72), by_seed(60, 61.5, 62), by_seed(50, 51, 52.5)


def test_a_ranking_needs_every_step():
    assert ranking({"a": HIGH, "b": MIDDLE, "c": LOW}, "apc-09").verdict == "supported"
    close = {seed: value + offset for (seed, value), offset in zip(HIGH.items(), (1, -1, 0.5))}
    result = ranking({"a": HIGH, "b": close, "c": LOW}, "apc-09")
    assert result.verdict == "inconclusive" and abs(result.effect) < 1, "the step that decides is shown"
    assert "a > b" in result.note and "b > c" in result.note
    result = ranking({"a": HIGH, "b": LOW, "c": MIDDLE}, "apc-09")
    assert result.verdict == "not supported" and result.effect < 0


def test_a_ranking_with_few_seeds():
    assert ranking({"a": HIGH, "b": MIDDLE, "c": by_seed(50)}, "apc-09").verdict == "inconclusive (n = 1)"
    assert ranking({"a": LOW, "b": HIGH, "c": {}}, "apc-09").verdict == "not supported", "one refuted step is enough"
    with pytest.raises(ValueError, match="two arms"):
        ranking({"a": HIGH}, "apc-09")


def test_a_ranking_leaves_out_a_seed_of_the_step_where_it_is_undefined():
    four = lambda level: {seed: level + 0.1 * seed for seed in range(4)}
    result = ranking({"a": four(70), "b": four(60) | {1: math.nan}, "c": four(50)}, "apc-09")
    assert (result.verdict, result.n) == ("supported", 3)
    result = ranking({"a": four(70), "b": by_seed(60, math.nan, 61), "c": four(50)}, "apc-09")
    assert (result.verdict, result.n) == ("inconclusive (n = 2)", 2)


def test_a_ranking_shows_the_step_with_the_least_room():
    result = ranking({"a": by_seed(70, 71, 72), "b": by_seed(67, 68, 69.3), "c": by_seed(50, 51, 52)}, "apc-09")
    assert result.verdict == "supported" and result.effect == pytest.approx(2.9) and 0 < result.low < 2.9
    refuted = ranking({"a": by_seed(60, 61, 62.2), "b": by_seed(61, 62, 63), "c": by_seed(70, 71, 72.1)}, "apc-09")
    assert refuted.verdict == "not supported" and refuted.effect == pytest.approx(-9.0333, abs=1e-3)


def test_not_testable_says_why():
    result = claims.not_testable("more-09", "COCO is not at hand")
    assert result.verdict == "not testable here" and result.note == "COCO is not at hand" and math.isnan(result.effect)


def test_claims_of_each_paper():
    assert {paper: len(claims.claims(paper)) for paper in ("more", "seco", "apc", "bnr")} == {
        "more": 35, "seco": 32, "apc": 29, "bnr": 20
    }  # fmt: skip
    with pytest.raises(ValueError, match="more, seco, apc, bnr"):
        claims.claims("toco")


def test_the_table_of_verdicts():
    verdicts = [paired(HIGH, LOW, ">", CLAIM), claims.not_testable("more-09", "no data")]
    table = claims.table(verdicts)
    assert table["effect"].tolist() == ["+19.83", ""] and table["seeds"].tolist() == ["3", ""]
    assert table.loc[0, "95 % interval"].startswith("[+") and table.loc[1, "95 % interval"] == ""
    assert tables.show(table, "claims", claims.RULE).data.count("supported") >= 1
    assert claims.table([]).empty


def test_values_by_seed_of_a_frame():
    from test_tables import scored

    rows = tables.frame([scored("full", 0, 0.5), scored("full", 1, 0.75), scored("x", 0, 0.1)])
    assert claims.by_seed(rows, arm="full", quantity="miou") == {0: 50.0, 1: 75.0}
    with pytest.raises(ValueError, match="arm"):
        claims.by_seed(rows)


def test_the_rule_says_what_matters():
    for part in ("95 %", "fewer than 3 seeds", "about a million parameters", "fixed before the runs", "direction"):
        assert part in claims.RULE
