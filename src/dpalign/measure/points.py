"""The rewards of a system on the evaluation prompts, and its points: mean rewards a condition.

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

from dpalign.measure.bootstrap import Array, Bootstrap, Estimate, replicate_means
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
    folder: Path | None = None
    """The evaluate folder that they were read from."""

    def __post_init__(self) -> None:
        _check_rewards(self, "reward", self.reward_PVSK)
        if self.true_reward_PVSK is not None:
            _check_rewards(self, "true reward", self.true_reward_PVSK)
            if self.true_reward_PVSK.shape != self.reward_PVSK.shape:
                raise ValueError(
                    f"system {self.name!r}: true rewards of shape {self.true_reward_PVSK.shape} beside rewards of "
                    f"shape {self.reward_PVSK.shape}; both are (prompts, conditions, samples, objectives)"
                )
        if len(set(self.prompt_ids)) != len(self.prompt_ids):
            raise ValueError(f"system {self.name!r}: a prompt id occurs twice; give each prompt's samples together")
        if self.directions_VK is not None:
            _check_directions(self.name, self.directions_VK, self.reward_PVSK.shape)

    @property
    def name(self) -> str:
        """The system's name."""
        return self.system.name

    @property
    def source(self) -> Path:
        """The evaluate folder, of rewards that were read from one."""
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


def _check_rewards(system: Rewards, what: str, reward_PVSK: Array) -> None:
    shape = reward_PVSK.shape
    if len(shape) != 4 or 0 in shape:
        raise ValueError(
            f"system {system.name!r}: {what} has shape {shape}; "
            "(prompts, conditions, samples, objectives) is needed, none of them 0"
        )
    if shape[0] != len(system.prompt_ids):
        raise ValueError(f"system {system.name!r}: {what} of {shape[0]} prompts for {len(system.prompt_ids)} ids")
    bad = np.argwhere(~np.isfinite(reward_PVSK))
    if len(bad):
        p, v, s, k = bad[0].tolist()
        raise ValueError(
            f"system {system.name!r}: {what} is {reward_PVSK[p, v, s, k]} at prompt {system.prompt_ids[p]}, "
            f"condition {v}, sample {s}, objective {k}; score that response again"
        )


def _check_directions(name: str, directions_VK: Array, shape: tuple[int, ...]) -> None:
    if directions_VK.shape != (shape[1], shape[3]):
        raise ValueError(
            f"system {name!r}: directions of shape {directions_VK.shape} for {shape[1]} conditions "
            f"and {shape[3]} objectives"
        )
    norm_V = np.linalg.norm(directions_VK, axis=1)
    if not np.allclose(norm_V, 1, atol=1e-6):
        worst = int(np.abs(norm_V - 1).argmax())
        raise ValueError(
            f"system {name!r}: direction {worst} is {directions_VK[worst].tolist()} of norm {norm_V[worst]:.4f}; "
            "normalise it"
        )


def by_truth(system: Rewards) -> Rewards:
    """The same system with the true rewards in place of the reward model's."""
    if system.true_reward_PVSK is None:
        raise ValueError(f"system {system.name!r} has no true rewards; only a world with a rule for them gives any")
    return replace(system, reward_PVSK=system.true_reward_PVSK)


def require_same_prompts(systems: Sequence[Rewards]) -> None:
    """Paired comparisons need the same prompts in the same order.

    Raises:
        ValueError: naming two systems and the first position at which their prompts differ.
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


def opinion_gap(system: Rewards, bootstrap: Bootstrap) -> list[Estimate]:
    """How far the reward model's opinion lies above the truth, a figure an objective, over all conditions."""
    gap_PVK = system.mean_PVK - by_truth(system).mean_PVK
    gap_PK = gap_PVK.mean(axis=1)
    replicate_RK = bootstrap.weights(len(system.prompt_ids)) @ gap_PK
    return [bootstrap.interval(value, replicate_RK[:, k]) for k, value in enumerate(gap_PK.mean(axis=0))]


def senses_of(directions_UK: Array) -> Array:
    """+1 for an objective that the directions maximise, -1 for one they minimise, 0 where they disagree: (K,).

    On the paper's arc (v2 <= 0, section 3.1) that is (1, -1): more help, fewer words. An objective
    that no direction weighs counts as +1.
    """
    tiny = 1e-9
    wanted_K, unwanted_K = (directions_UK > tiny).any(axis=0), (directions_UK < -tiny).any(axis=0)
    return np.where(wanted_K & unwanted_K, 0.0, np.where(unwanted_K, -1.0, 1.0))
