"""Ridge regression of the reward heads: its penalty, missing labels, and both Gram matrices."""

import numpy as np
import pytest

from dpalign.rewards import ridge
from dpalign.rewards.ridge import PENALTIES, ridge_heads, ridge_path

SLIGHT = tuple(float(x) for x in 10.0 ** np.arange(-4, 2.1, 0.5))
"""Penalties that leave labels without noise nearly as they are; the least of `PENALTIES` takes 1%."""


@pytest.fixture
def slight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "PENALTIES", SLIGHT)


def rows(n: int, d: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Features, the true weights, labels of two heads, and two answers a prompt."""
    rng = np.random.default_rng(seed)
    x_ND, weight_DH = rng.normal(size=(n, d)), rng.normal(size=(d, 2))
    return x_ND, weight_DH, x_ND @ weight_DH + noise * rng.normal(size=(n, 2)), [f"p{i // 2}" for i in range(n)]


@pytest.mark.usefixtures("slight")
@pytest.mark.parametrize("n", [40, 400])
def test_without_noise_the_weights_are_found_and_the_penalty_is_the_least(n: int) -> None:
    """As many rows as features, and ten times as many: the one Gram matrix or the other."""
    x_ND, weight_DH, y_NH, prompts = rows(n, 40 if n > 40 else 20, noise=0.0)
    fitted = ridge_heads(x_ND, y_NH, prompts)
    assert fitted.penalties == {0: SLIGHT[0], 1: SLIGHT[0]}
    np.testing.assert_allclose(fitted.weights[0], weight_DH[:, 0], atol=0.01)
    assert fitted.error < 1e-3


def test_noise_asks_for_a_penalty_and_the_error_is_that_of_unseen_prompts() -> None:
    x_ND, _, y_NH, prompts = rows(60, 50, noise=20.0)
    fitted = ridge_heads(x_ND, y_NH, prompts)
    assert min(fitted.penalties.values()) >= 1
    inside = np.mean([(x_ND @ fitted.weights[h] - y_NH[:, h]) ** 2 for h in (0, 1)])
    assert inside < fitted.error < 1.2 * y_NH.var()


@pytest.mark.usefixtures("slight")
def test_both_gram_matrices_give_the_same_weights() -> None:
    x_ND, _, y_NH, _ = rows(30, 30, noise=1.0)
    wide = np.hstack([x_ND, np.zeros((30, 1))])  # one feature more, which says nothing
    tall_PDH, wide_PDH = ridge_path(np.vstack([x_ND, x_ND]), np.vstack([y_NH, y_NH])), ridge_path(wide, y_NH)
    np.testing.assert_allclose(wide_PDH[4, :30], np.array(tall_PDH)[4], rtol=0.1, atol=0.05)


def test_features_of_other_units_change_nothing() -> None:
    x_ND, _, y_NH, prompts = rows(60, 20, noise=3.0)
    units_D = 10.0 ** np.arange(-10, 10)
    plain, other = ridge_heads(x_ND, y_NH, prompts), ridge_heads(x_ND * units_D, y_NH, prompts)
    np.testing.assert_allclose(other.weights[1] * units_D, plain.weights[1], rtol=1e-6)


@pytest.mark.usefixtures("slight")
def test_each_head_learns_from_its_own_labels() -> None:
    x_ND, weight_DH, y_NH, prompts = rows(80, 10, noise=0.0)
    y_NH[::2, 0] = np.nan
    missing_NH = np.hstack([y_NH, np.full((80, 1), np.nan)])
    fitted = ridge_heads(x_ND, missing_NH, prompts)
    assert set(fitted.weights) == {0, 1}
    np.testing.assert_allclose(fitted.weights[0], weight_DH[:, 0], atol=0.01)


def test_one_prompt_is_judged_on_its_own_rows() -> None:
    x_ND, _, y_NH, _ = rows(8, 3, noise=0.1)
    assert ridge_heads(x_ND, y_NH, ["p"] * 8).penalties == {0: PENALTIES[0], 1: PENALTIES[0]}
