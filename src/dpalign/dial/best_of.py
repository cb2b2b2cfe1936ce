"""Robust inference: draw answers near the user's direction, and let the reward model choose one at that direction.

An answer drawn a few degrees away may serve v better than any drawn at v itself: the dial of a trained policy is
slightly off in places, and neighbours bring other answers. The paper has no such step. RPS (arXiv 2510.20498) pools
neighbouring directions at inference.

Shapes: N answers, K objectives.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from dpalign.dial.dial import Dial
from dpalign.dial.server.engine import Delta
from dpalign.paper.direction import Cone, Preference, evaluation_grid, rng_for
from dpalign.paper.selection import best_of_n, scalarize

Array = NDArray[np.float64]

SPREAD: Final = 10.0
"""Default degrees around the direction (paper silent)."""


class BestOf(BaseModel):
    """How the best answer was drawn, and its worth beside the others: the field `best_of` of a completion."""

    model_config = ConfigDict(frozen=True)
    drawn: int
    angle_spread: float
    drawn_at: Mapping[str, float]
    """The direction in this answer's prompt."""
    rewards: Mapping[str, float]
    value: float
    """v . r of this answer at the user's direction (Eq. 2)."""
    mean_value: float
    """The mean v . r of all answers."""


async def draw_best(
    dial: Dial,
    direction: Preference,
    n: int,
    spread: float,
    seed: int,
    *,
    draw: Callable[[Preference, int, int], Awaitable[Sequence[Delta]]],
    score: Callable[[Sequence[str]], Awaitable[Array]],
) -> Delta:
    """Draw n answers around a direction; return the one that the reward model rates best at the direction itself.

    Args:
        draw: draws n answers at a direction with a seed: (direction, n, seed). An error in one draw cancels the others.
        score: returns the answers' rewards, reward_NK.

    Returns:
        The whole answer with its report; `tokens` counts those of all n.
    """
    around = neighbours(direction, n, spread, dial.arc)
    lines = {dial.line(near): near for near in around}
    copies = Counter(map(dial.line, around))  # neighbours with the same line share a prompt
    tasks = []
    for i, (line, near) in enumerate(lines.items()):
        own = int(rng_for("best of", seed, i).integers(2**62))
        tasks.append(asyncio.ensure_future(draw(near, copies[line], own)))
    try:
        groups = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    answers = [(near, answer) for near, group in zip(lines.values(), groups, strict=True) for answer in group]
    reward_NK = await score([answer.text for _, answer in answers])
    whole_N = [answer.finish == "stop" and bool(answer.text.strip()) for _, answer in answers]
    best = best_answer(reward_NK, whole_N, direction)
    near, answer = answers[best]
    report = BestOf(
        drawn=n,
        angle_spread=spread,
        drawn_at={name: round(w, 6) for name, w in near.weights.items()},
        rewards={name: round(float(r), 3) for name, r in zip(direction.objectives, reward_NK[best], strict=True)},
        value=round(float(reward_NK[best] @ direction.v_K), 3),
        mean_value=round(float((reward_NK @ direction.v_K).mean()), 3),
    )
    return replace(answer, index=0, tokens=sum(answer.tokens for _, answer in answers), report=report)


def neighbours(
    direction: Preference, n: int, spread: float, arc: tuple[float, float] | None = None
) -> list[Preference]:
    """Return n directions around one, at most `spread` degrees away; the same at every call.

    With two objectives they are the middles of n even slices of the arc of 2 x spread degrees; an odd n includes the
    direction itself. With more, they are the direction and those farthest apart within the cone.

    Args:
        arc: the trained range in degrees. Neighbours are clipped to it, unless the direction lies outside.

    Raises:
        ValueError: n < 1, or a spread that is negative or above 180 degrees.
    """
    if n < 1:
        raise ValueError(f"the best of {n} answers: give at least 1")
    if not 0 <= spread <= 180:
        raise ValueError(f"a spread of {spread} degrees; give 0 to 180")
    names = direction.objectives
    if spread == 0 or len(names) == 1:
        return [direction] * n
    if len(names) > 2:
        grid_NK = evaluation_grid(Cone(direction.v, spread), n)
        return [Preference.from_vector(v_K, names) for v_K in grid_NK.tolist()]
    angles_N = direction.angle + spread * ((2 * np.arange(n) + 1) / n - 1)
    if arc is not None and arc[0] <= direction.angle <= arc[1]:
        angles_N = np.clip(angles_N, *arc)
    return [Preference.from_angle(float(angle), names) for angle in angles_N]


def best_answer(reward_NK: Array, whole_N: Sequence[bool], direction: Preference) -> int:
    """Return the index of the best answer by v . r (Eq. 2); a cut or empty one only if all are cut or empty."""
    among = [i for i, whole in enumerate(whole_N) if whole] or list(range(len(whole_N)))
    return among[int(best_of_n(scalarize(reward_NK[among][None], direction.v_K[None]))[0])]
