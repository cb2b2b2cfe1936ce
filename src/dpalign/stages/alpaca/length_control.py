"""AlpacaEval's length-controlled win rate: what the judge would say if the answers were as long as the reference's.

After Dubois et al., "Length-Controlled AlpacaEval" (2024). For a system m against the baseline b, the
judge's preference p_i in [0, 1] on instruction i is modelled by a logistic regression without intercept,

    P(m wins on i) = logistic(theta + phi tanh(d_i / std(d)) + psi gamma_i)

with d_i = len(m's answer) - len(b's answer) in characters, std(d) over the instructions, and gamma_i the
benchmark's difficulty of instruction i, estimated once from many models and then fixed. The rate is the
mean over i of the prediction with the length term left out: 100 mean_i logistic(theta + psi gamma_i).

The benchmark's file is a path: `instruction_difficulty.csv` holds gamma alone. `df_gamed.csv` holds, beside
gamma, the judge's preferences for two length-gamed copies of the baseline, which the official fit
adds as rows without theta, at 0.2 / 2 of a row's weight: they hold phi to what length alone does.

The official code fits by an L1-penalised regression whose strength is cross-validated. We maximise the
likelihood, with a ridge of 1e-4 on the sum of the losses, which matters only where data are separable.

Shapes: P instructions, G gamed rows, F = 3 features (length, difficulty, system), R replicates.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from scipy.optimize import minimize  # type: ignore[import-untyped]
from scipy.special import expit, log_expit  # type: ignore[import-untyped]

from dpalign.data.sources import shorten
from dpalign.measure.bootstrap import Array, Bootstrap, Estimate
from dpalign.stages.alpaca.winrate import Answers

FORMULA: Final = "P(win) = logistic(theta + phi tanh(d / std(d)) + psi difficulty); the rate leaves phi out"
ONE_SIDED: Final = 0.05
"""A smaller share of answers on one side of the reference's length is too few to say what holds at equal length."""
GAMED_WEIGHT: Final = 0.2 / 2
RIDGE: Final = 1e-4


@dataclass(frozen=True, eq=False)
class Difficulty:
    """The benchmark's difficulty by instruction; where the file has them, the gamed baselines' rows too."""

    source: str
    difficulty_P: Array
    gamed_GF: Array
    gamed_win_G: Array

    @property
    def kind(self) -> str:
        return "regularised by the gamed baselines" if len(self.gamed_win_G) else "without gamed baselines"


@dataclass(frozen=True)
class LengthControlled:
    """The rate in %, the coefficients it comes from, and the rate's replicates for paired differences."""

    rate: Estimate
    theta: float
    phi: float
    psi: float
    rate_R: Array
    extrapolated: bool
    """Nearly all answers are longer than the reference's, or shorter: what holds at equal length is guessed."""


def length_controlled(answers: Answers, difficulty: Difficulty, bootstrap: Bootstrap) -> LengthControlled:
    """The length-controlled win rate of one system; the interval fits again on each resample of the instructions.

    Raises:
        ValueError: difficulties for another number of instructions.
    """
    if len(difficulty.difficulty_P) < len(answers.preference_P):
        raise ValueError(
            f"{difficulty.source}: difficulties of {len(difficulty.difficulty_P)} instructions, and {answers.name} "
            f"answers {len(answers.preference_P)}; take the file of this benchmark"
        )
    gamma_P = difficulty.difficulty_P[: len(answers.preference_P)]
    judged_P = answers.judged_P
    own_NF = features(answers.length_P - answers.reference_length_P, gamma_P)[judged_P]
    x_NF = np.concatenate([own_NF, difficulty.gamed_GF])
    win_N = np.concatenate([answers.win_P[judged_P] / 100, difficulty.gamed_win_G])
    gamed_G = np.full(len(difficulty.gamed_win_G), GAMED_WEIGHT)

    def fitted(weight_N: Array, start_F: Array) -> tuple[Array, float]:
        coefficient_F = fit(x_NF, win_N, np.concatenate([weight_N, gamed_G]), start_F)
        equal_N = expit(own_NF[:, 1:] @ coefficient_F[1:])
        return coefficient_F, float(100 * (weight_N @ equal_N) / weight_N.sum())

    coefficient_F, rate = fitted(np.ones(len(own_NF)), np.zeros(3))
    weight_RN = bootstrap.weights(len(judged_P))[:, judged_P] * len(judged_P)
    rate_R = np.array([fitted(weight_N, coefficient_F)[1] for weight_N in weight_RN if weight_N.any()])
    phi, psi, theta = coefficient_F.tolist()
    longer_P = answers.length_P - answers.reference_length_P
    one_sided = min((longer_P >= 0).mean(), (longer_P <= 0).mean()) < ONE_SIDED
    return LengthControlled(bootstrap.interval(rate, rate_R), theta, phi, psi, rate_R, bool(one_sided))


def features(longer_P: Array, difficulty_P: Array) -> Array:
    """(tanh of the standardised difference in length, difficulty, 1): (P, F). Equal differences say nothing: 0."""
    spread = longer_P.std(ddof=1) if len(longer_P) > 1 else 0.0
    length_P = np.tanh(longer_P / spread) if spread > 0 else np.zeros_like(longer_P)
    return np.stack([length_P, difficulty_P, np.ones_like(difficulty_P)], axis=1)


def fit(x_NF: Array, win_N: Array, weight_N: Array, start_F: Array | None = None) -> Array:
    """Logistic regression on soft labels by maximum likelihood: the coefficients (F,).

    Raises:
        ValueError: the optimiser found none.
    """

    def loss(c_F: Array) -> float:
        z_N = x_NF @ c_F
        likelihood_N = win_N * log_expit(z_N) + (1 - win_N) * log_expit(-z_N)
        return float(-(weight_N @ likelihood_N) + RIDGE / 2 * c_F @ c_F)

    def slope(c_F: Array) -> Array:
        return np.asarray(x_NF.T @ (weight_N * (expit(x_NF @ c_F) - win_N)) + RIDGE * c_F)

    def curvature(c_F: Array) -> Array:
        p_N = expit(x_NF @ c_F)
        return np.asarray((x_NF * (weight_N * p_N * (1 - p_N))[:, None]).T @ x_NF + RIDGE * np.eye(len(c_F)))

    start_F = np.zeros(x_NF.shape[1]) if start_F is None else start_F
    found = minimize(
        loss, start_F, jac=slope, hess=curvature, method="trust-exact", options={"gtol": 1e-7, "maxiter": 500}
    )
    if not np.isfinite(found.x).all() or np.abs(slope(found.x)).max() > 1e-3:
        raise ValueError(f"the length-controlled fit did not converge: {found.message}")
    return np.asarray(found.x, dtype=np.float64)


def read_difficulty(path: Path) -> Difficulty:
    """The benchmark's `instruction_difficulty.csv`, or its `df_gamed.csv`; rows by the instruction's index.

    Raises:
        ValueError: no such file, a column that is missing, a number that is none, or an index without a row.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a readable CSV file ({error})") from error
    if not rows:
        raise ValueError(f"{path}: holds no rows")
    columns = [name or "" for name in rows[0]]
    if "instruction_difficulty" in columns and "index" in columns:
        index, value = "index", "instruction_difficulty"
    elif len(columns) == 2:
        index, value = columns
    else:
        raise ValueError(
            f"{path}: columns {', '.join(columns)}; expected instruction_difficulty.csv (an index and a difficulty) or "
            "df_gamed.csv (index, instruction_difficulty, preference, std_delta_len, not_gamed_baseline)"
        )
    of_index: dict[int, float] = {}
    for number, row in enumerate(rows, start=2):
        of_index.setdefault(int(_number(path, number, row, index)), _number(path, number, row, value))
    missing = [i for i in range(max(of_index) + 1) if i not in of_index]
    if missing:
        raise ValueError(f"{path}: no difficulty of instruction {missing[0]}; the file may be cut short")
    gamed_GF, gamed_win_G = _gamed(path, rows) if "not_gamed_baseline" in columns else (np.zeros((0, 3)), np.zeros(0))
    return Difficulty(str(path), np.array([of_index[i] for i in range(len(of_index))]), gamed_GF, gamed_win_G)


def _gamed(path: Path, rows: Sequence[Mapping[str, str]]) -> tuple[Array, Array]:
    """The gamed baselines' features and preferences in [0, 1]; std_delta_len is the baseline's length less theirs."""
    x_GF, win_G = [], []
    for number, row in enumerate(rows, start=2):
        known, win = row["not_gamed_baseline"], _number(path, number, row, "preference")
        if known not in ("True", "False", "0", "1") or not 0 <= win <= 1:
            raise ValueError(
                f"{path}, line {number}: not_gamed_baseline is {known!r} and preference {win}; take True or "
                "False, and a preference in [0, 1]"
            )
        longer = -_number(path, number, row, "std_delta_len")
        x_GF.append(
            [math.tanh(longer), _number(path, number, row, "instruction_difficulty"), float(known in ("True", "1"))]
        )
        win_G.append(win)
    return np.array(x_GF), np.array(win_G)


def _number(path: Path, line: int, row: Mapping[str, str], column: str) -> float:
    try:
        value = float(row[column])
    except (KeyError, TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"{path}, line {line}: {column or 'its index'} is {shorten(repr(row.get(column)))}; a number is needed"
        )
    return value
