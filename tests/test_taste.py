"""A person's own direction, from choices between two answers: simulated people, the verb, the chat and the server."""

import io
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import fake_run
from dpalign.cli import main
from dpalign.dial.dial import Dial
from dpalign.dial.taste import Estimate, TakenBack, ask, pairs_of
from dpalign.measure.taste import Taste
from dpalign.paper.direction import Arc, Fixed, Population, Preference, Simplex, Sphere, draw_directions, rng_for
from dpalign.train.contract import Contract, FrontPoint, write_contract
from people import Person, sharpness_of

NAMES = ("helpfulness", "verbosity")


def errors(
    population: Population, mean_VK: np.ndarray, *, people: int, choices: int, prompts: int = 30, agree: float = 0.8
) -> np.ndarray:
    """By how many degrees the directions of simulated people are missed.

    A policy's answers scatter around its front, as real ones do. A person takes the better one in a share of all pairs.
    """
    reward_RK = (mean_VK + rng_for("pool").normal(0, 8.0, (prompts, *mean_VK.shape))).reshape(-1, mean_VK.shape[1])
    ids = np.repeat(np.arange(prompts), len(mean_VK)).astype(str).tolist()
    pairs = pairs_of(ids, list(map(str, range(len(ids)))), [True] * len(ids), reward_RK)
    missed = []
    for number in range(people):
        rng = rng_for("person", number)
        v_K = draw_directions(population, 1, rng)[0]
        person = Person(v_K, sharpness_of(np.abs(pairs.gain_NK @ v_K), agree), rng)
        taste = ask(pairs, Taste.of_anyone(population), choices, partial(person.choose, reward_RK), seed=number)
        missed.append(np.degrees(np.arccos(np.clip(taste.v_K @ v_K, -1, 1))))
    return np.array(missed)


FRONT = np.stack([97 - 27 * np.linspace(0, 1, 6) ** 1.8, 62 - 30 * np.linspace(0, 1, 6)], axis=1)


def test_twelve_choices_of_noisy_people_find_their_direction_within_eight_degrees() -> None:
    assert errors(Arc(), FRONT, people=24, choices=12).mean() < 6.0  # 11 for who guesses the middle of the arc


def test_three_objectives_are_found_too() -> None:
    front = np.array([[90.0, 40, 40], [40, 90, 40], [40, 40, 90], [70, 70, 30], [30, 70, 70]])
    before, after = (errors(Simplex(3), front, people=4, choices=n, prompts=12).mean() for n in (0, 12))
    assert after < 0.6 * before


def test_a_choice_for_brevity_turns_the_dial_to_brevity_and_makes_it_surer() -> None:
    before = Taste.of_anyone(Arc())
    after = before.after(np.array([-10.0, -20.0]))  # 10 points less helpful, 20 less verbose
    assert np.degrees(np.arctan2(before.v_K[1], before.v_K[0])) == pytest.approx(-22.5, abs=0.1)
    assert np.degrees(np.arctan2(after.v_K[1], after.v_K[0])) < -25
    assert after.within() < before.within()
    assert after.mass_PS.sum() == pytest.approx(1)


def test_a_pair_that_differs_in_nothing_says_nothing_and_one_on_the_border_says_most() -> None:
    taste = Taste.of_anyone(Arc())
    # who stands at the middle of the arc is torn between the second pair's answers; anyone takes the third's first
    middle = np.tan(np.radians(22.5)) * 20
    none, border, obvious = taste.information(np.array([[0.0, 0.0], [middle, 20.0], [20.0, -20.0]]))
    assert none == pytest.approx(0, abs=1e-9)
    assert border > 5 * obvious > 0


def test_even_a_mad_choice_leaves_a_posterior() -> None:
    taste = Taste.of_anyone(Arc()).after(np.array([-1e6, 1e6]))
    assert np.isfinite(taste.v_K).all()
    assert taste.mass_PS.sum() == pytest.approx(1)


@pytest.mark.parametrize("population", [Sphere(2), Sphere(3), Fixed(((1.0, 0.0), (1.0, -1.0)))])
def test_any_population_has_a_direction_before_the_first_choice(population: Population) -> None:
    taste = Taste.of_anyone(population)
    assert np.linalg.norm(taste.v_K) == pytest.approx(1)
    assert 0 < taste.within() <= 180


def test_no_question_comes_twice_and_a_skipped_one_teaches_nothing() -> None:
    ids = np.repeat(np.arange(5), len(FRONT)).astype(str).tolist()
    pairs = pairs_of(ids, list(map(str, range(len(ids)))), [True] * len(ids), np.tile(FRONT, (5, 1)))
    seen: list[int] = []

    def skip(first: int, second: int, _: Taste) -> None:
        assert first // len(FRONT) == second // len(FRONT)  # two answers to one question
        seen.append(first // len(FRONT))

    assert ask(pairs, Taste.of_anyone(Arc()), 12, skip).choices == 0
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_answers_that_are_cut_or_alike_make_no_pair() -> None:
    reward_NK = np.zeros((4, 2))
    pairs = pairs_of(["q", "q", "q", "q"], ["a", "a", "b", "c"], [True, True, True, False], reward_NK)
    assert list(zip(pairs.first_N.tolist(), pairs.second_N.tolist(), strict=True)) == [(0, 2), (1, 2)]
    with pytest.raises(ValueError, match="no question"):
        pairs_of(["q", "q"], ["a", "a"], [True, True], reward_NK[:2])


def dial() -> Dial:
    front = tuple(
        FrontPoint(Preference.from_angle(angle, NAMES), {"helpfulness": h, "verbosity": v})
        for angle, (h, v) in zip((0, -9, -18, -27, -36, -45), FRONT.tolist(), strict=True)
    )
    return Dial(NAMES, "fig1", "zephyr", Arc(), front)


def test_the_next_two_directions_are_those_whose_answers_divide_the_people_left() -> None:
    brief = [({"helpfulness": 70.0, "verbosity": 32.0}, {"helpfulness": 85.0, "verbosity": 47.0})] * 4
    pair = Estimate.of(dial(), brief).next
    assert pair is not None
    taste = Taste.of_anyone(Arc())
    for _ in brief:
        taste = taste.after(np.array([-15.0, -15.0]))
    first, second = (dict(zip((0, -9, -18, -27, -36, -45), FRONT, strict=True))[round(one.angle)] for one in pair)
    gain_K = first - second
    assert taste.information(gain_K[None])[0] >= taste.information((FRONT[0] - FRONT[1])[None])[0]
    with pytest.raises(ValueError, match=r"choice 0.*beauty.*helpfulness, verbosity"):
        Estimate.of(dial(), [({"beauty": 1.0}, {"beauty": 2.0})])


def test_without_a_measured_front_the_next_directions_still_lie_about_the_estimate() -> None:
    brief = [({"helpfulness": 70.0, "verbosity": 32.0}, {"helpfulness": 85.0, "verbosity": 47.0})] * 4
    unmeasured = Dial(NAMES, "fig1", "zephyr", Arc())
    for choices in ([], brief):
        own = Estimate.of(unmeasured, choices)
        assert own.next is not None
        low, high = sorted(one.angle for one in own.next)
        assert -45.001 <= low < own.direction.angle < high <= 0.001
    assert Estimate.of(Dial(NAMES, "fig1", "zephyr", Fixed(((1.0, 0.0),)))).next is None


def test_which_of_the_next_two_stands_left_changes() -> None:
    brief = ({"helpfulness": 70.0, "verbosity": 32.0}, {"helpfulness": 85.0, "verbosity": 47.0})
    pairs = [Estimate.of(dial(), [brief] * n).next for n in range(12)]
    assert {pair is not None and pair[0].angle > pair[1].angle for pair in pairs} == {True, False}


def test_a_choice_that_is_taken_back_leaves_no_trace_and_its_question_comes_again() -> None:
    ids = np.repeat(np.arange(5), len(FRONT)).astype(str).tolist()
    pairs = pairs_of(ids, list(map(str, range(len(ids)))), [True] * len(ids), np.tile(FRONT, (5, 1)))
    seen: list[tuple[int, int]] = []

    def choose(first: int, second: int, _: Taste) -> int:
        seen.append((first, second))
        if len(seen) in (1, 3):
            raise TakenBack  # at first there is nothing to take back
        if len(seen) == 5:
            raise StopIteration
        return 0

    taken = ask(pairs, Taste.of_anyone(Arc()), 12, choose)
    assert seen[0] == seen[1] == seen[3]
    once = ask(pairs, Taste.of_anyone(Arc()), 1, lambda *_: 0)
    assert taken.choices == 1
    assert taken.mass_PS == pytest.approx(once.mass_PS)


# --- the verb ---


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of made-up answers whose second policy has a dial."""
    given = fake_run.recipe()
    folder = fake_run.fake_run(tmp_path_factory.mktemp("taste") / "run", given, prompts=14, compared=False)
    (folder / "recipe.toml").write_text(given.to_toml())
    heads = {objective.name: objective.heads for objective in given.objective_list}
    contract = Contract("world-v1", "world-v1", heads, tuple(given.scored_heads), Arc(), iteration=2)
    for policy in folder.glob("policy-[1-9]"):
        write_contract(policy / "model", contract)
        (policy / "model" / "config.json").write_text("{}")
    return folder


def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Path, text: str) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    monkeypatch.setattr("builtins.input", lambda prompt="": _line())
    main(["taste", str(run)])
    written = capsys.readouterr()
    return written.out, written.err


def _line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def test_a_run_asks_which_of_its_answers_are_preferred_and_says_how_to_use_the_direction(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = typed(monkeypatch, capsys, run, "a\ns\nhm\nB\n")
    assert "2 choices: helpfulness*" in out
    assert f"dpa chat {run} --dial helpfulness=" in out


def test_who_chooses_nothing_gets_no_direction(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--dial" not in typed(monkeypatch, capsys, run, "q\n")[0]


def test_a_recipe_of_another_version_is_named_as_the_reason(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "old")
    (tmp_path / "old" / "recipe.toml").write_text('[selection]\npool = "direction"\n')
    with pytest.raises(SystemExit):
        main(["taste", str(tmp_path / "old")])
    assert "selection.pool" in capsys.readouterr().err


def test_a_folder_without_an_evaluation_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["taste", str(tmp_path / "none")])
    assert left.value.code == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
