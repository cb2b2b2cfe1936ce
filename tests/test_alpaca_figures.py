"""Win rates, paired differences and length control, on preferences whose figures are known beforehand."""

import csv
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dpalign.measure.bootstrap import Array, Bootstrap
from dpalign.paper.direction import rng_for
from dpalign.stages.alpaca.length_control import Difficulty, features, fit, length_controlled, read_difficulty
from dpalign.stages.alpaca.report import fig_5, table
from dpalign.stages.alpaca.summary import RAW_ONLY, summarize
from dpalign.stages.alpaca.systems import Point
from dpalign.stages.alpaca.winrate import Answers, difference, mean_of, standard_error, win_rate

QUICK = Bootstrap(replicates=400)
FEW = Bootstrap(replicates=20)


def answers(preference: list[float] | Array, length: list[float] | Array | None = None, name: str = "dpa") -> Answers:
    preference_P = np.array(preference, dtype=float)
    length_P = np.full(len(preference_P), 100.0) if length is None else np.array(length, dtype=float)
    return Answers(name, preference_P, length_P, np.full(len(preference_P), 100.0))


def beside(reference: float, preference_P: Array, longer_P: Array) -> Answers:
    """Answers so much longer than references of one length."""
    return replace(answers(preference_P, reference + longer_P), reference_length_P=np.full(len(longer_P), reference))


def expit(z: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-z)))


def plain(difficulty_P: Array) -> Difficulty:
    return Difficulty("d.csv", difficulty_P, np.zeros((0, 3)), np.zeros(0))


def test_the_raw_win_rate_is_the_mean_of_preference_less_one() -> None:
    """(0 + 1 + 0.5 + 0.3) / 4 = 45%; their standard deviation is 0.4203, and half of it 21.0 points."""
    one = answers([1.0, 2.0, 1.5, 1.3])
    assert win_rate(one, QUICK).value == pytest.approx(45.0)
    assert standard_error(one) == pytest.approx(21.016, abs=1e-3)
    assert standard_error(answers([1.2])) is None
    assert win_rate(answers([1.2]), QUICK).low is None


def test_805_prompts_at_7_5_percent_say_no_more_than_1_8_points() -> None:
    """60 wins of 805: 1.96 sqrt(0.0745 x 0.9255 / 805) = 1.81 points either way."""
    found = win_rate(answers([2.0] * 60 + [1.0] * 745), Bootstrap(replicates=4000))
    assert found.low is not None
    assert found.high is not None
    assert (found.high - found.low) / 2 == pytest.approx(1.81, abs=0.12)


def test_what_failed_is_in_no_mean() -> None:
    some = answers([1.0, math.nan, 2.0, 1.5])
    assert win_rate(some, QUICK).value == 50.0
    assert some.judged_P.tolist() == [True, False, True, True]
    wins, length, judged = difference(some, answers([math.nan, 1.0, 1.0, 1.0], [90, 90, 90, 94]), QUICK)
    assert wins is not None
    assert wins.value == pytest.approx(75.0)  # on the last two: 100 - 0 and 50 - 0
    assert length.value == pytest.approx(9.0)  # lengths are known of all four
    assert judged == 2
    wins, _, judged = difference(some, answers([math.nan, 1.0, math.nan, math.nan]), QUICK)
    assert (wins, judged) == (None, 0)


def test_a_paired_difference_sees_what_two_intervals_hide() -> None:
    """b is a less 2 points on every instruction: the difference is exact, though either interval is 4 points wide."""
    rng = rng_for("paired")
    win_P = rng.random(805) * 0.6 + 0.1
    a, b = answers(1 + win_P), answers(1 + win_P - 0.02)
    wins, _, _ = difference(a, b, QUICK)
    assert wins is not None
    assert (wins.value, wins.low, wins.high) == pytest.approx((2.0, 2.0, 2.0))
    alone = win_rate(a, QUICK)
    assert alone.high is not None
    assert alone.low is not None
    assert alone.high - alone.low > 2.0


def test_means_over_parts_see_the_same_resamples_as_the_whole() -> None:
    value_P = rng_for("parts").random(50)
    counted_P = np.arange(50) < 30
    found = mean_of(value_P, counted_P, QUICK)
    weight_RP = QUICK.weights(50)
    by_hand_R = [np.average(value_P[:30], weights=weight_P[:30]) for weight_P in weight_RP]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(by_hand_R, [0.025, 0.975])))


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"preference_P": np.array([1.0, 2.5])}, "dpa: a preference is 2.5; it lies in"),
        ({"preference_P": np.array([1.0, 0.0])}, "dpa: a preference is 0.0"),
        ({"preference_P": np.array([math.nan, math.nan])}, "none of its 2 answers was judged: 2 times HTTP 400"),
        ({"preference_P": np.array([1.0, 2.0, 1.0])}, "each instruction has both"),
        ({"length_P": np.array([1.0, math.nan])}, "dpa: a length is nan; lengths are counted in characters"),
        ({"reference_length_P": np.array([-1.0, 3.0])}, "dpa: a length is -1.0"),
    ],
)
def test_what_is_no_preference_or_length_is_refused(broken: dict[str, Array], said: str) -> None:
    good = replace(answers([1.0, 2.0]), reasons=Counter({"HTTP 400": 2}))
    with pytest.raises(ValueError, match=said):
        replace(good, **broken)


def test_other_instructions_have_no_paired_difference() -> None:
    with pytest.raises(ValueError, match="dpa and b: 2 and 1 instructions; a paired difference needs the same"):
        difference(answers([1.0, 2.0]), answers([1.0], name="b"), QUICK)


def test_the_fit_finds_the_coefficients_that_made_the_preferences() -> None:
    """theta = -1.2, phi = 0.9, psi = -0.5 by construction; judged without noise, they come back exactly."""
    rng = rng_for("glm")
    gamma_P, longer_P = rng.standard_normal(805), 300 * rng.standard_normal(805) + 150
    wins_P = expit(features(longer_P, gamma_P) @ np.array([0.9, -0.5, -1.2]))
    found = length_controlled(beside(1500, 1 + wins_P, longer_P), plain(gamma_P), FEW)
    assert (found.phi, found.psi, found.theta) == pytest.approx((0.9, -0.5, -1.2), abs=1e-4)
    assert found.rate.value == pytest.approx(100 * expit(-1.2 - 0.5 * gamma_P).mean(), abs=1e-3)
    assert found.rate.value < win_rate(beside(1500, 1 + wins_P, longer_P), FEW).value  # length had helped it


def test_verdicts_of_one_and_two_find_them_within_their_noise() -> None:
    """20,000 verdicts: the standard errors of the three are about 0.03, 0.02 and 0.02."""
    rng = rng_for("glm verdicts")
    x_PF = features(rng.standard_normal(20_000), rng.standard_normal(20_000))
    verdict_P = (rng.random(20_000) < expit(x_PF @ np.array([0.9, -0.5, -1.2]))).astype(float)
    found_F = fit(x_PF, verdict_P, np.ones(20_000))
    assert found_F == pytest.approx([0.9, -0.5, -1.2], abs=0.1)


def test_a_system_that_wins_by_length_alone_is_even_once_lengths_are() -> None:
    """Preferred only for being 200 characters longer on average: raw 68%, length-controlled 50%."""
    rng = rng_for("by length")
    longer_P, gamma_P = 200 + 250 * rng.standard_normal(805), rng.standard_normal(805)
    wins_P = expit(features(longer_P, gamma_P) @ np.array([1.5, 0.0, 0.0]))
    long = beside(1100, 1 + wins_P, longer_P)
    found = length_controlled(long, plain(gamma_P), FEW)
    assert win_rate(long, QUICK).value == pytest.approx(66.8, abs=2.5)
    assert found.rate.value == pytest.approx(50.0, abs=0.2)
    assert not found.extrapolated
    # All of them longer: what holds at equal length is a guess, and said to be one.
    assert length_controlled(replace(long, reference_length_P=np.zeros(805)), plain(gamma_P), FEW).extrapolated


def test_separable_verdicts_give_a_finite_fit() -> None:
    found = length_controlled(answers([1.0] * 6), plain(np.arange(6.0)), FEW)
    assert 0 <= found.rate.value < 1
    assert all(map(math.isfinite, (found.theta, found.phi, found.psi)))
    assert features(np.zeros(3), np.zeros(3))[:, 0].tolist() == [0, 0, 0]  # equal lengths: no spread to divide by


def write_csv(path: Path, header: list[str], rows: list[list[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


GAMED = ["model", "index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline"]


def test_difficulties_are_read_from_either_of_the_benchmarks_files(tmp_path: Path) -> None:
    short = write_csv(tmp_path / "i.csv", ["", "instruction_difficulty"], [[1, 0.5], [0, -0.25], [2, 1e-3]])
    read = read_difficulty(short)
    assert read.difficulty_P.tolist() == [-0.25, 0.5, 1e-3]
    assert len(read.gamed_win_G) == 0
    rows = [
        ["short", 0, 0.125, 1.5, -0.25, False],
        ["short", 1, 0.25, 2.0, 0.5, False],
        ["long", 0, 0.6, -1, -0.25, False],
    ]
    read = read_difficulty(write_csv(tmp_path / "g.csv", GAMED, rows))
    assert read.difficulty_P.tolist() == [-0.25, 0.5]
    assert read.gamed_win_G.tolist() == [0.125, 0.25, 0.6]
    # std_delta_len is the baseline's length less the gamed answer's: 1.5 is a shorter one.
    assert read.gamed_GF.tolist() == [
        [pytest.approx(-math.tanh(1.5)), -0.25, 0.0],
        [pytest.approx(-math.tanh(2.0)), 0.5, 0.0],
        [pytest.approx(math.tanh(1.0)), -0.25, 0.0],
    ]


@pytest.mark.parametrize(
    ("header", "rows", "said"),
    [
        (["", "instruction_difficulty"], [[0, 1.0], [2, 1.0]], "no difficulty of instruction 1; the file may be cut"),
        (["", "instruction_difficulty"], [[0, 1.0], [1, "nan"]], "line 3: instruction_difficulty is 'nan'; a number"),
        (["a", "b", "c"], [[0, 1, 2]], "columns a, b, c; expected instruction_difficulty.csv"),
        (["", "instruction_difficulty"], [], "holds no rows"),
        (GAMED, [["short", 0, 1.5, 1.0, 0.1, False]], "line 2: not_gamed_baseline is 'False' and preference 1.5"),
        (GAMED, [["short", 0, 0.5, 1.0, 0.1, "maybe"]], "line 2: not_gamed_baseline is 'maybe'"),
    ],
)  # fmt: skip
def test_a_difficulty_file_that_is_none_is_refused(
    tmp_path: Path, header: list[str], rows: list[list[object]], said: str
) -> None:
    with pytest.raises(ValueError, match=said) as error:
        read_difficulty(write_csv(tmp_path / "d.csv", header, rows))
    assert str(error.value).startswith(str(tmp_path / "d.csv"))


def test_difficulties_of_too_few_instructions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"d.csv: difficulties of 2 instructions, and dpa answers 3"):
        length_controlled(answers([1.0, 1.2, 1.4]), plain(np.zeros(2)), QUICK)
    with pytest.raises(ValueError, match="not a readable CSV file"):
        read_difficulty(tmp_path / "none.csv")


POINTS = [Point("dpa", "0", angle=0.0), Point("dpa", "-45", angle=-45.0), Point("sft")]
ANSWERS = [
    answers([1.0, 1.4, math.nan], [200, 220, 240], "dpa@0"),
    answers([1.2, 1.8, 1.5], [80, 90, 100], "dpa@-45"),
    answers([1.0, 1.0, 1.3], [0, 110, 120], "sft"),
]
AROUND = {
    "reference": {"generator": "ref", "length": 100.0},
    "judge": {"name": "short"},
    "instructions": {"count": 3},
}


def test_all_numbers_are_there_for_every_point_and_every_pair() -> None:
    numbers = summarize(POINTS, ANSWERS, QUICK) | AROUND
    first, second = numbers["systems"]["dpa"]["points"]
    assert (first["win_rate"]["value"], first["length"]["value"]) == pytest.approx((20.0, 220.0))
    assert (first["judged"], first["wins"], first["draws"], first["empty"]) == (2, 0, 0, 0)
    assert (second["wins"], second["draws"]) == (1, 1)
    assert numbers["systems"]["sft"]["points"][0]["empty"] == 1
    assert [(row["a"], row["b"], row["instructions"]) for row in numbers["differences"]] == [
        ("dpa@0", "dpa@-45", 2),
        ("dpa@0", "sft", 2),
        ("dpa@-45", "sft", 3),
    ]
    assert numbers["differences"][0]["win_rate"]["value"] == pytest.approx(-30.0)
    assert first["length_controlled"] is None
    assert numbers["length_control"] == {"applied": False, "note": RAW_ONLY}
    assert numbers["paper"] is None


def test_the_table_says_what_was_judged_and_what_was_not_computed() -> None:
    reasons = replace(ANSWERS[0], reasons=Counter({"HTTP 400": 1}))
    said = table(summarize(POINTS, [reasons, *ANSWERS[1:]], QUICK) | AROUND)
    assert "| dpa | 0\N{DEGREE SIGN} | 220 (" in said
    assert "| dpa | \N{MINUS SIGN}45\N{DEGREE SIGN} | 90 (" in said
    assert "3 instructions; judge short, against ref (100 characters). 95% intervals" in said
    assert "Length-controlled win rates: not computed: they need the benchmark's own difficulty file" in said
    assert "Failed judgements, in no mean: 1 HTTP 400." in said
    assert "| dpa 0\N{DEGREE SIGN} less dpa \N{MINUS SIGN}45\N{DEGREE SIGN} | \N{MINUS SIGN}30.0 (" in said
    controlled = table(summarize(POINTS, ANSWERS, FEW, difficulty=plain(np.arange(3.0))) | AROUND)
    assert "length-controlled win rate, %" in controlled
    assert "their rate at equal length is extrapolated" in controlled


def test_the_figure_has_a_curve_a_steered_system_and_the_papers_behind() -> None:
    axes = fig_5(summarize(POINTS, ANSWERS, QUICK, paper=True) | AROUND).axes[0]
    drawn = {str(line.get_label()): line for line in axes.lines if not str(line.get_label()).startswith("_")}
    assert list(drawn) == ["dpa", "sft", "paper: DPA", "paper: SteerLM", "paper: SFT", "paper: DPO"]
    assert drawn["dpa"].get_xdata() == pytest.approx([220.0, 90.0])
    assert drawn["dpa"].get_ydata() == pytest.approx([20.0, 50.0])
    assert drawn["dpa"].get_linestyle() == "-"
    assert drawn["sft"].get_linestyle() == "None"
    assert drawn["paper: DPA"].get_zorder() < drawn["dpa"].get_zorder()
    assert {text.get_text() for text in axes.texts} == {"0\N{DEGREE SIGN}", "\N{MINUS SIGN}45\N{DEGREE SIGN}"}
    assert axes.get_ylabel() == "win rate against ref, %"
    controlled = summarize(POINTS, ANSWERS, FEW, difficulty=plain(np.arange(3.0)), paper=True) | AROUND
    axes = fig_5(controlled, "length_controlled").axes[0]
    assert not any(str(line.get_label()).startswith("paper") for line in axes.lines)  # theirs are raw
