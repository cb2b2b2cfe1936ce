"""J(v) and E_v J(v), Eqs. 3 and 4."""

import numpy as np
import pytest

from dpalign.measure.bootstrap import Array, Bootstrap
from dpalign.measure.objective import expected_objective, objective_by_direction, objective_difference, objective_lead
from dpalign.measure.points import Rewards
from dpalign.measure.system import System

DIRECTIONS = np.array([[1.0, 0.0], [0.8, -0.6]])
FEW = Bootstrap(replicates=200)


def system(name: str, reward_PVK: Array, directions_VK: Array | None = None) -> Rewards:
    prompt_ids = tuple(f"prompt {p}" for p in range(len(reward_PVK)))
    return Rewards(System(name), prompt_ids, directions_VK, reward_PVK[:, :, None, :])


def test_a_steered_system_is_judged_where_it_was_asked() -> None:
    # sampled at (1, 0): (80, 60), worth 80; sampled at (0.8, -0.6): (70, 30), worth 56 - 18 = 38
    dpa = system("t1", np.array([[[80.0, 60.0], [70.0, 30.0]]]), DIRECTIONS)
    assert [j.value for j in objective_by_direction(dpa, DIRECTIONS, FEW)] == pytest.approx([80, 38])
    assert expected_objective(dpa, DIRECTIONS, FEW).value == pytest.approx(59)


def test_a_steered_system_gets_no_credit_for_what_another_direction_gives() -> None:
    deaf = system("t1", np.array([[[70.0, 30.0], [80.0, 60.0]]]), DIRECTIONS)  # the two answers swapped
    # 70 at (1, 0); 64 - 36 = 28 at (0.8, -0.6)
    assert expected_objective(deaf, DIRECTIONS, FEW).value == pytest.approx(49)


def test_an_undirected_system_offers_its_points_to_every_direction() -> None:
    sft = system("sft", np.array([[[66.0, 50.0]]]))
    # 66, and 52.8 - 30 = 22.8
    assert [j.value for j in objective_by_direction(sft, DIRECTIONS, FEW)] == pytest.approx([66, 22.8])
    steerlm = system("steerlm", np.array([[[70.0, 30.0], [80.0, 60.0]]]))  # the best target for each
    assert [j.value for j in objective_by_direction(steerlm, DIRECTIONS, FEW)] == pytest.approx([80, 38])


def test_a_difference_on_the_same_prompts_cancels_what_they_share() -> None:
    rng = np.random.default_rng(5)
    shared_P = rng.normal(0, 20, 30)
    before = np.stack([60 + shared_P, 50 + 0 * shared_P], axis=-1)[:, None]
    after = before + np.array([4.0, 0.0])
    gain = objective_difference(system("t2", after), system("t1", before), DIRECTIONS, FEW)
    alone = expected_objective(system("t1", before), DIRECTIONS, FEW)
    # helpfulness + 4, worth 4 at (1, 0) and 3.2 at (0.8, -0.6), for every prompt alike
    assert (gain.value, gain.low, gain.high) == pytest.approx((3.6, 3.6, 3.6))
    assert alone.high is not None
    assert alone.low is not None
    assert alone.high - alone.low > 5


def test_a_leads_p_value_is_two_sided() -> None:
    before = np.full((2, 1, 2), 50.0)
    after = before + np.array([[[1.0, 0.0]], [[3.0, 0.0]]])
    mixed = before + np.array([[[-1.0, 0.0]], [[3.0, 0.0]]])
    base = system("t1", before)
    for a, b in (("t2", after), ("t2", before)), (("t2", before), ("t2", after)):
        assert objective_lead(system(*a), system(*b), DIRECTIONS, FEW)[1] == pytest.approx(2 / 201)
    assert objective_lead(base, system("t2", before), DIRECTIONS, FEW)[1] == 1
    # a quarter of the replicates hold the first prompt alone
    assert objective_lead(system("t2", mixed), base, DIRECTIONS, FEW)[1] == pytest.approx(2 / 4, abs=0.15)


def test_a_system_sampled_at_other_directions_has_no_objective_here() -> None:
    dpa = system("t1", np.array([[[80.0, 60.0], [70.0, 30.0]]]), DIRECTIONS)
    with pytest.raises(ValueError, match=r"'t1' was sampled at 2 directions that are not the 1 evaluation directions"):
        expected_objective(dpa, DIRECTIONS[:1], FEW)
