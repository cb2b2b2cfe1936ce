"""What is fixed before any system is evaluated: objectives, directions, reference, bootstrap.

Shapes: U evaluation directions, K objectives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from dpalign.measure.bootstrap import Array, Bootstrap
from dpalign.measure.points import Rewards, senses_of
from dpalign.measure.reading import Reading, answer_rows
from dpalign.measure.system import System
from dpalign.paper.objectives import all_known
from dpalign.rows import HEADS

REFERENCE_SHIFTS: Final = (-5.0, 0.0, 5.0)
"""Reward points by which the sensitivity table moves each coordinate of the reference."""


@dataclass(frozen=True, eq=False)
class Setting:
    """What is fixed before any system is evaluated."""

    objectives: tuple[str, ...]
    directions_UK: Array
    """The evaluation directions, in the order of the dial."""
    reference_K: Array | None
    """Hypervolume's reference, in reward points: fixed before any DPA run. None leaves hypervolume out."""
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    senses: tuple[int, ...] | None = None
    """+1 for an objective to maximise, -1 for one to minimise; None: read from the directions."""

    def __post_init__(self) -> None:
        assert not (self.disputed and self.reference_K is not None), f"no front has a side: {self.disputed}"

    @property
    def senses_K(self) -> Array:
        """+1 for an objective to maximise, -1 for one to minimise, 0 for a disputed one: (K,)."""
        return senses_of(self.directions_UK) if self.senses is None else np.array(self.senses, dtype=float)

    @property
    def disputed(self) -> tuple[str, ...]:
        """The objectives that some directions want more of and others less, if no senses are given."""
        return tuple(name for name, sense in zip(self.objectives, self.senses_K, strict=True) if not sense)


def sft_of(systems: Sequence[Rewards]) -> Rewards | None:
    """The SFT model, whose rewards give hypervolume's reference; None if it is missing."""
    return next((one for one in systems if one.name.casefold() == "sft"), None)


def reference_point(
    systems: Sequence[Rewards], front: Rewards | None, senses_K: Array, originals: Callable[[], Array]
) -> Array | None:
    """Hypervolume's reference; None if the directions disagree about what is better.

    Where more is better: SFT's mean. Where less is better: the most that the true optimum has at any direction or,
    without a truth, the 95% quantile of the original answers.

    On an arc the true optimum has most at the first direction. A cone's first direction is its middle.

    Args:
        originals: gives the rewards of the original answers, (N, K); called only without a truth.

    Raises:
        ValueError: there is no SFT among the systems.
    """
    if not senses_K.all():
        return None
    sft = sft_of(systems)
    if sft is None:
        raise ValueError("no SFT among the systems to take hypervolume's reference from; set evaluation.reference")
    if front is not None and sft.true_reward_PVSK is not None:
        low_K, high_K = sft.true_reward_PVSK.mean(axis=(0, 1, 2)), front.point_VK.max(axis=0)
    else:
        low_K, high_K = sft.point_VK[0], np.quantile(originals(), 0.95, axis=0)
    return np.asarray(np.where(senses_K > 0, low_K, high_K))


def true_front(folder: Path, reading: Reading, grid_UK: Array, inner_IK: Array | None = None) -> Rewards | None:
    """The rewards of the world's best faultless answers to the prompts of an evaluate folder.

    None if an objective reads a head without a truth, or if a fault may pay.

    Args:
        inner_IK: the directions at which no fault may pay; None: at all of them.
    """
    from dpalign.world.language import read_prompt
    from dpalign.world.optimum import faultless_is_best, optimal_rewards

    objectives, heads = reading.objectives, reading.heads
    if not all_known(objectives, heads, HEADS):
        return None
    if not faultless_is_best(grid_UK if inner_IK is None else inner_IK, objectives, heads):
        return None
    prompts = {row["prompt_id"]: row["messages"] for row in answer_rows(folder, ["prompt_id", "messages"])}
    tasks = [read_prompt(messages[-1]["content"]) for messages in prompts.values()]
    best_PVSK = optimal_rewards(tasks, grid_UK, objectives, heads)[:, :, None, :]
    return Rewards(System("true front"), tuple(prompts), grid_UK, best_PVSK, best_PVSK)
