"""Objectives: named linear readings of reward heads (section 3.1).

A reward model scores every answer on all its heads; an objective names the heads that a user weighs. All values are
in 0-100 units.

Shapes: N scored answers, H heads of the reward model, K objectives.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpalign.paper.direction import check_objective_names, name_hint

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Objective:
    """A named linear reading of reward heads: their mean, or their weighted sum."""

    name: str
    heads: tuple[str, ...]
    """Heads by name, or by index in the reward model's list ("4")."""
    weights: tuple[float, ...] | None = None
    """One weight a head; None takes the mean. The reading stays within 0-100 when the weights sum to 1."""

    def __post_init__(self) -> None:
        check_objective_names([self.name])
        if not self.heads:
            raise ValueError(f"objective {self.name!r} reads no head; name at least one")
        if self.weights is None:
            return
        if len(self.weights) != len(self.heads):
            raise ValueError(f"objective {self.name!r}: {len(self.weights)} weights for {len(self.heads)} heads")
        if not all(math.isfinite(w) for w in self.weights) or not any(self.weights):
            raise ValueError(f"objective {self.name!r}: weights {self.weights}; give finite numbers, not all zero")


PAPER_OBJECTIVES: Final = (
    Objective(
        "helpfulness",
        (
            "ultrafeedback-instruction_following",
            "ultrafeedback-truthfulness",
            "ultrafeedback-honesty",
            "ultrafeedback-helpfulness",
        ),
    ),
    Objective("verbosity", ("helpsteer-verbosity",)),
)
"""Section 3.1: the mean of UltraFeedback's four aspects (heads 6-9), and HelpSteer's verbosity (head 4)."""


def own_name(head: str) -> str:
    """A head's name within its reward: `verbosity` of `quality/verbosity`."""
    return head.rpartition("/")[2]


def head_indices(objective: Objective, heads: Sequence[str]) -> tuple[int, ...]:
    """Indices of the objective's heads in a list of heads.

    A head of one reward among several is called REWARD/HEAD. HEAD suffices if no other reward has a head of that name.
    REWARD suffices if that reward has one head.

    Raises:
        ValueError: there is no such head, several go by that name, or the objective names one twice.
    """
    indices: list[int] = []
    for head in objective.heads:
        meant = _meant(head, heads)
        if len(meant) > 1:
            raise ValueError(
                f"objective {objective.name!r} reads head {head!r}, and several go by that name; write one of "
                f"{', '.join(heads[index] for index in meant)}"
            )
        if meant:
            index = meant[0]
        elif head.isdecimal() and int(head) < len(heads):
            index = int(head)
        else:
            raise ValueError(
                f"objective {objective.name!r} reads head {head!r}, which this reward model lacks "
                f"({name_hint(head, heads)})"
            )
        if index in indices:
            raise ValueError(f"objective {objective.name!r} names head {head!r} ({heads[index]!r}) twice")
        indices.append(index)
    return tuple(indices)


def _meant(name: str, heads: Sequence[str]) -> list[int]:
    """Indices of the heads that a name can mean: as a full name, else as a head's own, else as its reward's."""
    if name in heads:
        return [list(heads).index(name)]
    own = [i for i, head in enumerate(heads) if "/" in head and own_name(head) == name]
    return own or [i for i, head in enumerate(heads) if "/" in head and head.partition("/")[0] == name]


def by_name(table_NG: ArrayLike, names: Sequence[str], heads: Sequence[str]) -> Array:
    """Reorder a table's columns from `names` to `heads`, matched by the heads' own names: (N, H).

    A head without a column is NaN.
    """
    values_NG = np.asarray(table_NG, dtype=np.float64)
    column = {own_name(name): values_N for name, values_N in zip(names, values_NG.T, strict=True)}
    return np.stack([column.get(own_name(head), np.full(len(values_NG), np.nan)) for head in heads], axis=1)


def all_known(objectives: Sequence[Objective], heads: Sequence[str], known: Sequence[str]) -> bool:
    """Whether every head that the objectives read from the reward model is in `known`."""
    return all(own_name(heads[index]) in known for objective in objectives for index in head_indices(objective, heads))


def read_objectives(rewards_NH: ArrayLike, heads: Sequence[str], objectives: Sequence[Objective]) -> Array:
    """rewards_NK: the objectives of each answer, in 0-100 units.

    Heads that no objective reads may be NaN (unlabelled).

    Raises:
        ValueError: an unknown head; two objectives of one name; a table whose width is not the number of heads; a NaN
            or infinite score in a head that an objective reads.
    """
    check_objective_names([objective.name for objective in objectives])
    scores_NH = np.asarray(rewards_NH, dtype=np.float64)
    if scores_NH.ndim != 2 or scores_NH.shape[1] != len(heads):
        raise ValueError(f"rewards of shape {scores_NH.shape} for {len(heads)} heads; give (answers, {len(heads)})")
    columns = [_read(scores_NH, heads, objective) for objective in objectives]
    return np.stack(columns, axis=1)


def _read(scores_NH: Array, heads: Sequence[str], objective: Objective) -> Array:
    indices = head_indices(objective, heads)
    read_NR = scores_NH[:, list(indices)]
    bad = np.argwhere(~np.isfinite(read_NR))
    if len(bad):
        row, column = bad[0]
        raise ValueError(
            f"row {row}: head {heads[indices[column]]!r} scored {read_NR[row, column]} and objective "
            f"{objective.name!r} reads it; score the answer again or leave it out"
        )
    if objective.weights is None:
        return np.asarray(read_NR.mean(axis=1))
    return np.asarray(read_NR @ np.array(objective.weights, dtype=np.float64))
