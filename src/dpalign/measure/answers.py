"""Figures that need the answers' texts: words, degenerate answers, answers for the page, the reward model's quality.

Shapes: P prompts, V conditions, S samples.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from dpalign.measure.bootstrap import Array
from dpalign.measure.degeneracy import faults
from dpalign.measure.points import Rewards
from dpalign.measure.quality import HeadQuality, quality
from dpalign.measure.reading import answer_rows
from dpalign.measure.summary import Answer, RewardQuality

SHOWN_PROMPTS: Final = 24
"""Validation prompts whose real answers the page shows."""


def with_texts(rewards: Rewards, most_repetition: float) -> Rewards:
    """Add the words of each answer, split at white space, and whether it is degenerate.

    Args:
        most_repetition: the largest share of repeated runs in a sound answer.
    """
    rows, shape_PVS = answer_rows(rewards.source, ["response", "finished"]), rewards.reward_PVSK.shape[:3]
    words = [len(row["response"].split()) for row in rows]
    degenerate = [bool(faults(row["response"], row["finished"], most_repetition)) for row in rows]
    return replace(
        rewards,
        words_PVS=np.array(words, dtype=float).reshape(shape_PVS),
        degenerate_PVS=np.array(degenerate).reshape(shape_PVS),
    )


def shown_answers(systems: Sequence[Rewards], objectives: Sequence[str]) -> Iterator[Answer]:
    """Yield one answer a condition to the first prompts: of baselines, soups, the first control, the last two policies.

    Systems that answer to reward targets are left out: the dial has no place for targets.
    """
    policies = [one for one in systems if one.system.role == "iteration" and one.system.iteration]
    policies.sort(key=lambda one: one.system.iteration or 0)
    beside = [one for one in systems if one.system.role in ("baseline", "soup")]
    beside += [one for one in systems if one.system.role == "control"][:1]
    for one in (*beside, *policies[-2:]):
        prompts, conditions, samples, k = one.reward_PVSK.shape
        rows = answer_rows(one.source)
        if rows[0]["condition_kind"] == "target":
            continue
        judged_NK = one.reward_PVSK.reshape(-1, k).tolist()
        true_NK = None if one.true_reward_PVSK is None else one.true_reward_PVSK.reshape(-1, k).tolist()
        for n in range(0, min(SHOWN_PROMPTS, prompts) * conditions * samples, samples):
            direction_VK = one.directions_VK
            yield Answer(
                prompt=rows[n]["messages"][-1]["content"],
                system=one.name,
                direction=None
                if direction_VK is None
                else dict(zip(objectives, direction_VK[n // samples % conditions].tolist(), strict=True)),
                response=rows[n]["response"],
                rewards=dict(zip(objectives, judged_NK[n], strict=True)),
                true_rewards=None if true_NK is None else dict(zip(objectives, true_NK[n], strict=True)),
            )


def reward_quality(
    reward: Path, systems: Sequence[Rewards], objectives: Sequence[str], resamples: int, seed: int
) -> RewardQuality:
    """How well the reward model predicts held-out ratings (its stage measured that), and the systems' own answers.

    The systems' answers are checked by the truth, else by the judge; specialists and ablations are left out. With an
    ensemble or several rewards, it also measures how well their spread predicts the size of the error.
    """
    path = reward / "quality.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found, doubted = {}, {}
    for one in systems:
        label_PVSK = one.judge_PVSK if one.true_reward_PVSK is None else one.true_reward_PVSK
        if label_PVSK is None or one.system.role in ("specialist", "ablation"):
            continue
        against = partial(_by_objective, one, list(objectives), resamples=resamples, seed=seed)
        found[one.name] = against(one.reward_PVSK, label_PVSK)
        if one.spread_PVSK is not None:
            doubted[one.name] = against(one.spread_PVSK, abs(one.reward_PVSK - label_PVSK))
    parts = {
        name: values.get(name, {}) for name in ("heads", "objectives", "baseline", "truth", "spread", "spread_truth")
    }
    return RewardQuality.model_validate(parts | {"on_policy": found, "spread_on_policy": doubted})


def _by_objective(
    system: Rewards, names: list[str], predicted_PVSK: Array, label_PVSK: Array, *, resamples: int, seed: int
) -> dict[str, HeadQuality]:
    """How well one figure of a system's answers predicts another, by objective."""
    rows = answer_rows(system.source, ["prompt_id", "response"])
    ids, lengths = [row["prompt_id"] for row in rows], [len(row["response"]) for row in rows]
    predicted_NK, label_NK = (figure_PVSK.reshape(-1, len(names)) for figure_PVSK in (predicted_PVSK, label_PVSK))
    measured = quality(predicted_NK, label_NK, names, ids, lengths, resamples=resamples, seed=seed)
    return {head.name: head for head in measured.heads}
