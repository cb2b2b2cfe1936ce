"""How each system of Table 1 is told what is wanted, and how its second objective follows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpalign.measure.bootstrap import Array
from dpalign.measure.control import angles, following, following_lead, is_dial
from dpalign.measure.points import SystemRewards
from dpalign.measure.summary import Setting
from dpalign.page.entrants import Evaluated
from dpalign.page.reading import asked_targets
from dpalign.run.ledger import LEDGER, read_ledger

if TYPE_CHECKING:
    from dpalign.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Steered:
    """A system, or the specialists of a method as one."""

    told_by: str
    rewards: SystemRewards
    asked_V: Array | None
    """What each condition asks of the second objective, an angle or reward points; None where there is no dial."""


def steered(recipe: "Recipe", members: Sequence[Evaluated], setting: Setting) -> Steered:
    """How a system is told, and what it is asked for; of several members, each is another model to take."""
    system, entrant = members[0].measured, members[0].entrant
    if entrant.direction is not None:
        told = f"a model a direction ({len(members)} trained)"
        system = _together(members)
    elif system.directions_VK is not None:
        told = "weights of a mixture" if entrant.role == "soup" else "a direction"
        if answers_a_reply(recipe, entrant.folder) > 1:
            told = "a direction, which chooses"
    elif (asked_VK := asked_targets(recipe, entrant.folder)) is not None:
        several = len(setting.objectives) > 1 and len(asked_VK) > 1
        return Steered("reward targets", system, asked_VK[:, 1] if several else None)
    else:
        told = "words alone" if "brief" in entrant.step else "nothing"
    asked_V = angles(system.directions_VK) if is_dial(system.directions_VK) else None
    return Steered(told, system, asked_V)


def _together(members: Sequence[Evaluated]) -> SystemRewards:
    """The specialists of a method as one system that is steered by taking another model."""
    in_order = sorted(members, key=lambda member: tuple(-w for w in reversed(member.entrant.direction or ())))
    first = in_order[0].measured
    return replace(
        first,
        directions_VK=np.array([member.entrant.direction for member in in_order]),
        reward_PVSK=np.concatenate([member.measured.reward_PVSK for member in in_order], axis=1),
        true_reward_PVSK=None,
    )


def answers_a_reply(recipe: "Recipe", folder: Path) -> int:
    """Answers that are sampled for each that a user reads."""
    ledger = read_ledger(folder) if (folder / LEDGER).is_file() else None
    best_of_n = ledger is not None and ledger["knobs"].get("step.condition") == "best-of-n"
    return recipe.evaluation.best_of if best_of_n else 1


def control_of(found: Steered, setting: Setting) -> dict[str, Any]:
    """Table 1's figures of control: how the second objective follows what is asked; None where nothing is."""
    conditions = found.rewards.reward_PVSK.shape[1]
    names = ("kendall_tau", "kendall_tau_common", "spearman", "span")
    if found.asked_V is None:
        return {"told_by": found.told_by, "conditions": conditions} | dict.fromkeys(names)
    figures = following(found.rewards, found.asked_V, setting.bootstrap)
    return {"told_by": found.told_by, "conditions": conditions} | {name: getattr(figures, name) for name in names}


def control_leads(last: Steered, others: Mapping[str, Steered], setting: Setting) -> list[dict[str, Any]]:
    """By how much the last iteration follows better than each other system that is asked for anything.

    Returns:
        [{system, kendall_tau, span}], tau at as many conditions of each.
    """
    rows = []
    for name, other in others.items():
        if last.asked_V is not None and other.asked_V is not None:
            lead = following_lead(last.rewards, last.asked_V, other.rewards, other.asked_V, setting.bootstrap)
            rows.append({"system": name, "kendall_tau": lead.kendall_tau, "span": lead.span})
    return rows
