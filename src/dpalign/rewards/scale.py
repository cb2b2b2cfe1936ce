"""From raw rewards to points: one affine map per head, fixed for the run.

Fitted maps bring rewards in different units to a similar spread, so that an angle weighs them alike. Training,
evaluation and use share the recorded maps.

Shapes: N answers, H heads.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpalign.paper.ensemble import head_of
from dpalign.rewards.knobs import IDENTITY, RewardTable, Scale
from dpalign.runs.folder import write_json

Array = NDArray[np.float64]

FILE: Final = "scales.json"
"""Beside the annotation: {head: [slope, offset]}, for all heads in order."""
QUANTILES: Final = (0.05, 0.95)
POINTS: Final = (10.0, 90.0)
"""The points of these quantiles of the annotated answers (paper silent)."""
STRAYS: Final = 0.05
"""The largest share of annotated answers outside 0-100, for a model whose rewards are taken as points."""


def fit(reward_N: ArrayLike) -> Scale:
    """Fit the map that takes the 5th and 95th percentile to 10 and 90 points.

    Raises:
        ValueError: the two percentiles are the same.
    """
    low, high = (float(x) for x in np.quantile(np.asarray(reward_N, dtype=np.float64), QUANTILES))
    if not high > low:
        raise ValueError(f"its 5th and 95th percentile are both {low:g}")
    slope = (POINTS[1] - POINTS[0]) / (high - low)
    return slope, POINTS[0] - slope * low


def to_points(reward_NH: ArrayLike, scales: Sequence[Scale]) -> Array:
    """Convert raw rewards to points: (N, H)."""
    slope_H, offset_H = np.array(scales, dtype=np.float64).reshape(-1, 2).T
    return np.asarray(np.asarray(reward_NH, dtype=np.float64) * slope_H + offset_H)


def known_scales(rewards: Mapping[str, RewardTable], trained: Sequence[str]) -> list[Scale | None]:
    """Return each head's map, None if it must be fitted, in the order of `heads_of`."""
    return [scale for reward in rewards.values() for scale in reward.known_scales(trained)]


def fitted_scales(rewards: Mapping[str, RewardTable], trained: Sequence[str], raw_NH: Array) -> list[Scale]:
    """Return each head's map; fit the unknown ones to the annotated answers.

    Args:
        raw_NH: the annotated answers' rewards, raw in the heads without a scale.

    Raises:
        ValueError: a head has no spread to fit; or a model's rewards are taken as points of 0-100 and lie outside.
    """
    scales: list[Scale] = []
    for name, reward in rewards.items():
        fitted: dict[str, Scale] = {}
        for head, known in zip(reward.own_heads(trained), reward.known_scales(trained), strict=True):
            reward_N = raw_NH[:, len(scales)]
            # an ensemble's members share their head's units
            scales.append(known or fitted.get(head_of(head)) or _fitted(name, head, reward_N))
            fitted.setdefault(head, scales[-1])
            if reward.model and known == IDENTITY and not reward.scale:
                _require_points(name, head, reward, reward_N)
    return scales


def _fitted(name: str, head: str, reward_N: Array) -> Scale:
    try:
        return fit(reward_N)
    except ValueError as error:
        raise ValueError(
            f"[rewards.{name}] head {head!r}: no scale can be fitted to {len(reward_N)} annotated answers: {error}; "
            "give scale = [slope, offset]"
        ) from None


def _require_points(name: str, head: str, reward: RewardTable, reward_N: Array) -> None:
    outside_N = (reward_N < 0) | (reward_N > 100)
    if outside_N.mean() > STRAYS:
        raise ValueError(
            f"[rewards.{name}] head {head!r}: {outside_N.mean():.0%} of {len(reward_N)} annotated answers earn less "
            f"than 0 or more than 100 (such as {reward_N[outside_N][0]:.4g}), and input {reward.input!r} stands for "
            "points of 0-100; give scale = [slope, offset]"
        )


def write_scales(folder: Path, heads: Sequence[str], scales: Sequence[Scale]) -> None:
    """Record the run's maps."""
    write_json(folder / FILE, {head: list(scale) for head, scale in zip(heads, scales, strict=True)})


def read_scales(folder: Path, heads: Sequence[str]) -> list[Scale]:
    """Read the maps that an annotation recorded, in the order of `heads`.

    Raises:
        ValueError: there are none, or they are of other heads.
    """
    path = folder / FILE
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        return [(float(recorded[head][0]), float(recorded[head][1])) for head in heads]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{path}: no scales of {', '.join(heads)} here ({type(error).__name__}: {error}); run the annotate stage"
        ) from error
