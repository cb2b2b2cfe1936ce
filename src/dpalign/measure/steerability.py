"""How well one model is steered: the report's figures, and two that need a whole dial.

Calibration: half a turn of the dial should give half of the change. Side effects: heads that no objective reads also
change along the dial.

Shapes: P prompts, V directions (in the order of the dial), S samples, K objectives, H heads.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from dpalign.measure.bootstrap import Array, Bootstrap, Estimate
from dpalign.measure.control import dial_angles, is_dial, way_of
from dpalign.measure.points import Rewards, senses_of
from dpalign.measure.record import Record
from dpalign.measure.setting import Setting
from dpalign.measure.summarize import summarize
from dpalign.measure.summary import Summary

REFERENCE: Final = (0.0, 100.0)
"""Hypervolume's reference where more is better, and where less is better: the ends of the scale."""


class SideEffect(Record):
    """A head that no objective reads, along the dial."""

    head: str
    first: Estimate
    """Mean points at the first direction."""
    last: Estimate
    change: Estimate
    """The last minus the first, paired by prompt."""


class Steerability(Record):
    """All figures of one model, as steerability.json holds them."""

    summary: Summary
    """The Summary of that model alone."""
    miscalibration: Estimate | None
    """See `miscalibration`."""
    side_effects: tuple[SideEffect, ...]
    how: str
    """How the direction was given: the model's own dial, or a line in words."""
    model: str
    rewards: tuple[str, ...]
    """The heads that scored."""


def steerability(
    rewards: Rewards,
    head_PVSH: Array,
    heads: Sequence[str],
    read: Sequence[str],
    objectives: Sequence[str],
    bootstrap: Bootstrap,
    about: Mapping[str, str],
) -> Steerability:
    """Compute all figures of one model.

    Args:
        head_PVSH: reward points of the same answers on every head.
        read: the heads that objectives read.
        about: the values of `how` and `model`.
    """
    assert rewards.directions_VK is not None
    senses_K = senses_of(rewards.directions_VK)
    reference_K = np.where(senses_K > 0, *REFERENCE) if senses_K.all() else None
    setting = Setting(tuple(objectives), rewards.directions_VK, reference_K, bootstrap)
    return Steerability(
        summary=summarize([rewards], setting, pairs=[]),
        miscalibration=miscalibration(rewards, bootstrap),
        side_effects=tuple(
            side_effect(head, head_PVSH[..., h].mean(axis=2), bootstrap)
            for h, head in enumerate(heads)
            if head not in read
        ),
        how=about["how"],
        model=about["model"],
        rewards=tuple(heads),
    )


def miscalibration(rewards: Rewards, bootstrap: Bootstrap) -> Estimate | None:
    """The mean over directions of |delivered share - asked share| of the dial's way.

    At a third of the arc, a calibrated model gives a third of the second objective's change from the first direction
    to the last. A dial that turns evenly has 0. A model that jumps at one end has up to 0.5. A change against the way
    that was asked counts as negative, so a dial that turns evenly the wrong way has 1. An overshoot between the ends
    can exceed 1.

    None without a dial of three directions, or if the change has another sign in some resample, or is 0.
    """
    directions_VK = rewards.directions_VK
    if not is_dial(directions_VK) or len(directions_VK) < 3:
        return None
    angle_V, way = dial_angles(directions_VK), way_of(directions_VK)
    asked_V = (angle_V - angle_V[0]) / (angle_V[-1] - angle_V[0])
    second_PV = rewards.mean_PVK[:, :, 1]
    mean_V, mean_RV = second_PV.mean(axis=0), bootstrap.weights(len(second_PV)) @ second_PV
    span, span_R = mean_V[-1] - mean_V[0], mean_RV[:, -1] - mean_RV[:, 0]
    if span == 0 or not (np.sign(span_R) == np.sign(span)).all():
        return None  # the sign of the change is uncertain: no share of it is defined
    away = np.abs(way * (mean_V - mean_V[0]) / abs(span) - asked_V).mean()
    away_R = np.abs(way * (mean_RV - mean_RV[:, :1]) / np.abs(span_R[:, None]) - asked_V).mean(axis=1)
    return bootstrap.interval(float(away), away_R)


def side_effect(head: str, point_PV: Array, bootstrap: Bootstrap) -> SideEffect:
    """Measure a head at both ends of the dial."""
    first_P, last_P = point_PV[:, 0], point_PV[:, -1]
    return SideEffect(
        head=head,
        first=bootstrap.mean(first_P),
        last=bootstrap.mean(last_P),
        change=bootstrap.mean(last_P - first_P),
    )
