"""Directions, their distributions, and randomness keyed by meaning."""

import math
import subprocess
import sys

import numpy as np
import pytest

from dpalign.paper.direction import (
    Arc,
    Cone,
    Fixed,
    Grid,
    Population,
    Preference,
    Simplex,
    Sphere,
    draw_directions,
    evaluation_grid,
    middle_of,
    objective_count,
    rng_for,
    stretched,
)

NAMES = ("helpfulness", "verbosity")
POPULATIONS: list[Population] = [
    Arc(),
    Arc(stratified=True),
    Cone((2.0, -1.0), 30.0),
    Cone((1.0, 0.0, -1.0), 20.0),
    Sphere(2),
    Sphere(4),
    Simplex(2),
    Simplex(3),
    Grid(-45, 0, 10),
    Fixed(((3.0, -4.0), (1.0, 0.0))),
]


def angles(v_N2: np.ndarray) -> np.ndarray:
    return np.degrees(np.arctan2(v_N2[:, 1], v_N2[:, 0]))


def test_an_angle_of_minus_15_degrees_weighs_97_to_minus_26_hundredths() -> None:
    preference = Preference.from_angle(-15, NAMES)
    assert [round(100 * w) for w in preference.v] == [97, -26]
    assert preference.angle == pytest.approx(-15)
    assert preference.weights == dict(zip(NAMES, preference.v, strict=True))


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_weights_are_normalised_whatever_their_length(scale: float) -> None:
    weights = {"verbosity": -3 * scale, "helpfulness": 4 * scale}
    assert Preference.from_weights(weights, NAMES).v == pytest.approx((0.8, -0.6))
    assert Preference.from_weights({"helpfulness": 2}, NAMES) == Preference.from_weights({"helpfulness": 1}, NAMES)


def test_a_missing_name_weighs_nothing() -> None:
    assert Preference.from_weights({"c": -2}, ("a", "b", "c")).v == (0.0, 0.0, -1.0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"helpfulness": 0.8, "verbosty": -0.6}, "unknown objective 'verbosty' \\(nearest: 'verbosity'; known: help"),
        ({"helpfulness": math.nan}, "weight of 'helpfulness' is nan; give a finite"),
        ({"verbosity": -math.inf}, "weight of 'verbosity' is -inf"),
        ({"verbosity": 10**400}, "weight of 'verbosity' is inf"),
        ({"verbosity": "low"}, "weight of 'verbosity' is 'low', a str; give a number"),
        ({"verbosity": True}, "weight of 'verbosity' is True, a bool"),
        ({"helpfulness": 0, "verbosity": 0.0}, "all weights of \\(helpfulness, verbosity\\) are zero"),
        ({}, "are zero: that is no direction"),
    ],
)
def test_weights_that_are_no_direction_are_refused_by_name(weights: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preference.from_weights(weights, NAMES)


def test_an_angle_needs_two_objectives_and_a_finite_number() -> None:
    with pytest.raises(ValueError, match="two objectives, not of 3"):
        Preference.from_angle(-15, ("a", "b", "c"))
    with pytest.raises(ValueError, match="angle is nan"):
        Preference.from_angle(math.nan, NAMES)
    with pytest.raises(ValueError, match="3 objectives has no single angle"):
        _ = Preference.from_weights({"a": 1}, ("a", "b", "c")).angle


def test_a_vector_that_is_no_unit_vector_is_not_taken_as_a_direction() -> None:
    with pytest.raises(ValueError, match="no unit vector; build it with"):
        Preference(NAMES, (1.0, -1.0))
    with pytest.raises(ValueError, match="no unit vector"):
        Preference(NAMES, (math.nan, 0.0))


@pytest.mark.parametrize("names", [("a", "a"), ("a b",), ("a*",), (), ("9lives",), ("",)])
def test_objective_names_are_distinct_words(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"named twice|a name is a letter|no objectives"):
        Preference.from_vector([1.0] * len(names), names)


def test_the_evaluation_grid_is_the_papers_ten_even_angles() -> None:
    grid_VK = evaluation_grid(Arc(), 10)
    assert angles(grid_VK) == pytest.approx([0, -5, -10, -15, -20, -25, -30, -35, -40, -45])
    assert grid_VK[0].tolist() == [1.0, 0.0]
    assert grid_VK[-1] == pytest.approx([math.sqrt(2) / 2, -math.sqrt(2) / 2])


@pytest.mark.parametrize("population", POPULATIONS, ids=repr)
def test_every_population_draws_unit_vectors_that_repeat_with_the_key(population: Population) -> None:
    v_NK = draw_directions(population, 50, rng_for(7, "directions"))
    assert v_NK.shape == (50, objective_count(population))
    assert np.linalg.norm(v_NK, axis=1) == pytest.approx(np.ones(50))
    assert np.array_equal(v_NK, draw_directions(population, 50, rng_for(7, "directions")))
    assert not np.array_equal(v_NK, draw_directions(population, 50, rng_for(8, "directions")))
    assert draw_directions(population, 0, rng_for(7)).shape == (0, objective_count(population))


def test_the_papers_arc_is_uniform_between_minus_45_and_0_degrees() -> None:
    angle_N = angles(draw_directions(Arc(), 20_000, rng_for(0)))
    assert angle_N.min() >= -45
    assert angle_N.max() <= 0
    # Each ninth of the arc expects 2222 draws, with a standard deviation of 44.
    assert np.histogram(angle_N, bins=9, range=(-45, 0))[0] == pytest.approx([2222] * 9, abs=220)


def test_stratified_draws_fall_one_into_each_equal_slice() -> None:
    for seed in range(5):
        angle_N = angles(draw_directions(Arc(stratified=True), 5, rng_for(seed)))
        assert np.floor(-angle_N / 9).tolist() == [0, 1, 2, 3, 4]


def test_a_cone_of_two_objectives_is_uniform_in_angle() -> None:
    angle_N = angles(draw_directions(Cone((1.0, -1.0), 20.0), 20_000, rng_for(0)))
    assert np.histogram(angle_N, bins=8, range=(-65, -25))[0] == pytest.approx([2500] * 8, abs=250)


def test_a_cone_of_three_objectives_is_uniform_in_the_cosine() -> None:
    v_NK = draw_directions(Cone((0.0, 5.0, 0.0), 60.0), 20_000, rng_for(0))
    # On the sphere in 3 dimensions equal steps of the cosine, here from 1 to cos 60 = 0.5, have equal area.
    assert np.histogram(v_NK[:, 1], bins=5, range=(0.5, 1.0))[0] == pytest.approx([4000] * 5, abs=350)
    assert v_NK[:, [0, 2]].mean(axis=0) == pytest.approx([0, 0], abs=0.02)


def test_the_sphere_favours_no_side_and_the_simplex_is_uniform_over_weights() -> None:
    assert draw_directions(Sphere(5), 20_000, rng_for(0)).mean(axis=0) == pytest.approx(np.zeros(5), abs=0.02)
    v_NK = draw_directions(Simplex(2), 20_000, rng_for(0))
    assert (v_NK >= 0).all()
    share_N = v_NK[:, 0] / v_NK.sum(axis=1)
    assert np.histogram(share_N, bins=4, range=(0, 1))[0] == pytest.approx([5000] * 4, abs=350)


def test_a_prompts_directions_from_a_list_differ_until_the_list_is_used_up() -> None:
    grid = Grid(-45, 0, 5)
    for seed in range(10):
        angle_N = angles(draw_directions(grid, 7, rng_for(seed))).round(6) + 0.0
        assert sorted(angle_N[:5]) == [-45, -33.75, -22.5, -11.25, 0]
        assert set(angle_N[5:]) <= set(angle_N[:5])
        assert angle_N[5] != angle_N[6]


def test_two_objective_grids_are_even_angles() -> None:
    assert angles(evaluation_grid(Sphere(2), 4)) == pytest.approx([0, -90, -180, 90])
    assert angles(evaluation_grid(Simplex(2), 4)) == pytest.approx([0, 30, 60, 90])
    assert angles(evaluation_grid(Cone((2.0, -2.0), 10.0), 3)) == pytest.approx([-35, -45, -55])
    assert evaluation_grid(Fixed(((3.0, -4.0), (2.0, 0.0))), 2).tolist() == [[0.6, -0.8], [1.0, 0.0]]


@pytest.mark.parametrize("center", [(2.0, -2.0), (1.0, 2.0, 2.0)])
def test_a_cones_only_evaluation_direction_is_its_centre(center: tuple[float, ...]) -> None:
    length = math.sqrt(sum(w * w for w in center))
    assert evaluation_grid(Cone(center, 10.0), 1)[0] == pytest.approx([w / length for w in center])


def test_directions_are_stretched_away_from_the_middle_of_a_cone_and_keep_their_plane() -> None:
    """10 degrees from the axis become 15; what points at right angles to it keeps its way; the axis stays."""
    middle_K = middle_of(Cone((0.0, 0.0, 2.0), 20.0))
    assert middle_K is not None
    tilt = math.radians(10)
    v_NK = np.array([[math.sin(tilt), 0.0, math.cos(tilt)], [0.0, -math.sin(tilt), math.cos(tilt)], [0.0, 0.0, 1.0]])
    wider = math.radians(15)
    expected = [[math.sin(wider), 0.0, math.cos(wider)], [0.0, -math.sin(wider), math.cos(wider)], [0.0, 0.0, 1.0]]
    assert stretched(v_NK, middle_K, 1.5) == pytest.approx(np.array(expected), abs=1e-9)
    assert stretched(v_NK, middle_K, 1.0) == pytest.approx(v_NK)
    assert middle_of(Sphere(3)) is None


@pytest.mark.parametrize(
    ("population", "apart"), [(Sphere(3), 33), (Sphere(4), 40), (Simplex(3), 20), (Cone((1.0, 1.0, 1.0), 40.0), 20)]
)
def test_a_grid_of_three_and_more_objectives_keeps_its_directions_apart(population: Population, apart: float) -> None:
    # The best ten points on the spheres lie 66 and 80 degrees apart, and a farthest-point choice is never worse than
    # half of the best; a triangular lattice of ten over the simplex has 26.6.
    grid_VK = evaluation_grid(population, 10)
    assert np.linalg.norm(grid_VK, axis=1) == pytest.approx(np.ones(10))
    cosines = (grid_VK @ grid_VK.T)[np.triu_indices(10, k=1)]
    assert np.degrees(np.arccos(cosines.max())) > apart
    assert np.array_equal(grid_VK, evaluation_grid(population, 10))


def test_the_grid_of_a_simplex_starts_with_its_corners() -> None:
    assert evaluation_grid(Simplex(3), 10)[:3].tolist() == np.eye(3).tolist()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Arc(0, -45), "from 0.0 to -45.0 degrees: it needs low < high"),
        (lambda: Arc(-200, 200), "at most 360 apart"),
        (lambda: Arc(math.nan, 0), "arc.low is nan"),
        (lambda: Cone((0.0, 0.0), 10), "cone.center: direction 0 is \\[0.0, 0.0\\]"),
        (lambda: Cone((1.0, 0.0), 0), "cone.angle is 0 degrees"),
        (lambda: Sphere(1), "sphere over 1 objectives"),
        (lambda: Simplex(0), "simplex over 0 objectives"),
        (lambda: Grid(-45, 0, 0), "grid.points is 0"),
        (lambda: Grid(0, -45, 3), "it needs low < high"),
        (lambda: Fixed(()), "lists no directions"),
        (lambda: Fixed(((1.0, 0.0), (1.0,))), "rows of one length"),
        (lambda: Fixed(((1.0, 0.0), (math.nan, 1.0))), "direction 1 is \\[nan, 1.0\\]"),
        (lambda: evaluation_grid(Fixed(((1.0, 0.0),)), 10), "10 evaluation directions of a list of 1"),
        (lambda: evaluation_grid(Arc(), 0), "at least one direction, not 0"),
    ],
)
def test_a_population_that_cannot_be_drawn_from_is_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_randomness_depends_on_the_meaning_alone() -> None:
    def draw(*meaning: int | str) -> float:
        return float(rng_for(*meaning).random())

    assert draw(1, "a", 2) == draw(1, "a", 2) == draw(np.int64(1), "a", 2)
    assert len({draw(1, "a", 2), draw(1, 2, "a"), draw("1", "a", 2), draw(1, "a2"), draw(-1, "a", 2), draw()}) == 6
    code = "from dpalign.paper.direction import rng_for; print(rng_for(1, 'a', 2).random())"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(elsewhere.stdout) == draw(1, "a", 2)


@pytest.mark.parametrize("word", [0.5, True, None])
def test_randomness_is_not_named_by_floats(word: object) -> None:
    with pytest.raises(ValueError, match="named by integers and strings"):
        rng_for(1, word)  # type: ignore[arg-type]
