"""The rewards of a system on the evaluation prompts, and its points: mean rewards a condition.

Two more figures are counted in the answers, so that anyone can count them again: words, and which are degenerate.

A system is sampled at V conditions: at directions (DPA), at reward targets (SteerLM), or plainly
(SFT and DPO: V = 1). Section 3.2 averages the rewards of a condition over prompts and samples; those
averages are the points of Fig. 4.

Shapes: P prompts, V conditions, S samples, K objectives. Rewards are 0-100.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from dpalign.measure.bootstrap import Array, Bootstrap, Estimate, Mask, replicate_means
from dpalign.measure.system import System


@dataclass(frozen=True, eq=False)
class Rewards:
    """Every reward of one system on the evaluation prompts."""

    system: System
    prompt_ids: tuple[str, ...]
    directions_VK: Array | None
    """The unit vector of each condition; None for a system that no direction steers."""
    reward_PVSK: Array
    """By the reward model."""
    true_reward_PVSK: Array | None = None
    """The world's truth, where it is known."""
    judge_PVSK: Array | None = None
    """By the judge, where there is one: a second reward model, which never selects."""
    spread_PVSK: Array | None = None
    """The standard deviation over the members of an ensemble, or over several reward models, where there are any."""
    folder: Path | None = None
    """The evaluate folder that they were read from."""
    words_PVS: Array | None = None
    """The words of each answer, where the texts were read."""
    degenerate_PVS: Mask | None = None
    """Whether each answer is degenerate (`degeneracy.py`), where the texts were read."""

    def __post_init__(self) -> None:
        # readers check the scores; this checks that our own code fits them together
        prompts, conditions, _, objectives = self.reward_PVSK.shape
        assert 0 not in self.reward_PVSK.shape, self.reward_PVSK.shape
        assert len(set(self.prompt_ids)) == len(self.prompt_ids) == prompts, (self.name, prompts)
        assert self.true_reward_PVSK is None or self.true_reward_PVSK.shape == self.reward_PVSK.shape, self.name
        assert self.directions_VK is None or self.directions_VK.shape == (conditions, objectives), self.name

    @property
    def name(self) -> str:
        """The system's name."""
        return self.system.name

    @property
    def source(self) -> Path:
        """The evaluate folder; an error if the rewards were not read from one."""
        assert self.folder is not None, f"the rewards of {self.name} were not read from a folder"
        return self.folder

    @cached_property
    def measured(self) -> "Rewards":
        """By the truth where it is known, else by the reward model."""
        return self if self.true_reward_PVSK is None else by_truth(self)

    @property
    def mean_PVK(self) -> Array:
        """Mean over a prompt's samples."""
        mean_PVK: Array = self.reward_PVSK.mean(axis=2)
        return mean_PVK

    @property
    def point_VK(self) -> Array:
        """The points: mean over prompts and samples."""
        point_VK: Array = self.mean_PVK.mean(axis=0)
        return point_VK


def by_truth(system: Rewards) -> Rewards:
    """The same system with the true rewards in place of the reward model's."""
    assert system.true_reward_PVSK is not None, f"system {system.name!r} has no true rewards"
    return replace(system, reward_PVSK=system.true_reward_PVSK)


def by_judge(system: Rewards) -> Rewards:
    """The same system with the judge's rewards in place of the reward model's."""
    assert system.judge_PVSK is not None, f"system {system.name!r} has no judge's rewards"
    return replace(system, reward_PVSK=system.judge_PVSK, true_reward_PVSK=None)


def require_same_prompts(systems: Sequence[Rewards]) -> None:
    """Check that systems have the same prompts in the same order, as paired comparisons need.

    Raises:
        ValueError: two systems differ; the message names them and the first position, or their numbers of prompts.
    """
    first = systems[0]
    for other in systems[1:]:
        if other.prompt_ids == first.prompt_ids:
            continue
        if len(other.prompt_ids) != len(first.prompt_ids):
            raise ValueError(
                f"systems {first.name!r} and {other.name!r} were sampled on {len(first.prompt_ids)} and "
                f"{len(other.prompt_ids)} prompts; evaluate both on the same ones"
            )
        at = next(i for i, (a, b) in enumerate(zip(first.prompt_ids, other.prompt_ids, strict=True)) if a != b)
        raise ValueError(
            f"systems {first.name!r} and {other.name!r} differ at prompt {at}: {first.prompt_ids[at]} against "
            f"{other.prompt_ids[at]}; evaluate both on the same prompts in the same order"
        )


def points(system: Rewards, bootstrap: Bootstrap) -> list[list[Estimate]]:
    """The system's points (Fig. 4) with intervals by prompt: one list a condition, one figure an objective."""
    replicate_RVK = replicate_means(bootstrap.weights(len(system.prompt_ids)), system.mean_PVK)
    point_VK = system.point_VK
    return [
        [bootstrap.interval(point_VK[v, k], replicate_RVK[:, v, k]) for k in range(point_VK.shape[1])]
        for v in range(point_VK.shape[0])
    ]


def by_condition(figure_PVS: Array | Mask, bootstrap: Bootstrap) -> list[Estimate]:
    """The mean of each condition's answers, with an interval by prompt."""
    return [bootstrap.mean(figure_P) for figure_P in figure_PVS.mean(axis=2).T]


def opinion_gap(system: Rewards, bootstrap: Bootstrap) -> list[Estimate]:
    """By how much the reward model's opinion exceeds the truth: one figure an objective, over all conditions."""
    gap_PK = (system.mean_PVK - by_truth(system).mean_PVK).mean(axis=1)
    return [bootstrap.mean(gap_P) for gap_P in gap_PK.T]


def senses_of(directions_UK: Array) -> Array:
    """+1 for an objective that the directions maximise, -1 for one they minimise, 0 where they disagree: (K,).

    On the paper's arc (v2 <= 0, section 3.1) that is (1, -1): more help, fewer words. An objective
    that no direction weighs counts as +1.
    """
    tiny = 1e-9
    wanted_K, unwanted_K = (directions_UK > tiny).any(axis=0), (directions_UK < -tiny).any(axis=0)
    return np.where(wanted_K & unwanted_K, 0.0, np.where(unwanted_K, -1.0, 1.0))
