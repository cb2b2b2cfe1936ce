"""The report stage: every evaluated system of a run into figures, tables and one page."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from dpalign.measure.bootstrap import Bootstrap
from dpalign.measure.comparison import comparison_pairs
from dpalign.measure.control import angles
from dpalign.measure.points import SystemRewards, senses_of
from dpalign.measure.quality import quality
from dpalign.measure.summary import Setting, claims, fewest_replicates, summarize
from dpalign.page.compared import comparison, feasibility, trust, tuning
from dpalign.page.entrants import Entrant, Evaluated, Trial, entrants, read
from dpalign.page.ledgers import cost, lineage, sweep_cost
from dpalign.page.reading import mean_answer_tokens, rewards, true_front
from dpalign.page.write import write_report
from dpalign.paper.direction import Preference, evaluation_grid
from dpalign.rows import CANDIDATES, read_table
from dpalign.run.folder import write_json
from dpalign.stages.pools import annotated, true_objectives
from dpalign.stages.stage import Job, objectives_read, stage

if TYPE_CHECKING:
    from dpalign.recipe import Recipe

Array = NDArray[np.float64]

SHOWN_PROMPTS: Final = 12
"""Validation prompts whose real answers the page shows."""


@stage(
    reads=lambda r: (r.seed, r.evaluation, r.preference, r.data.world, r.compare, *objectives_read(r)),
    inputs=("data", "reward", "annotate"),
    optional=("judge", "pairwise"),
    version=4,
    heavy=False,
    repeated=("evaluate", "tune", "feasible"),
)
def report(job: Job) -> None:
    """Measure the systems and write the page."""
    recipe = job.recipe
    if not any(name.startswith("evaluate-") for name in job.inputs):
        raise ValueError("nothing to report: give at least one evaluate- folder")
    grid_UK = evaluation_grid(recipe.preference.population(len(recipe.objectives)), recipe.evaluation.directions)
    chance = Bootstrap(seed=recipe.seed, replicates=recipe.evaluation.bootstrap)
    shown, trials = entrants(recipe, job.inputs, job.systems, grid_UK, chance)
    systems = [read(recipe, entrant) for entrant in shown]
    compared = any(system.compared for system in job.systems.values())
    pairs = compared_pairs(systems) if compared else claims([system.rewards for system in systems])
    chance = enough(job, chance, len(pairs)) if compared else chance
    front = true_front(recipe, shown[0].folder, grid_UK) if recipe.data.world else None
    if recipe.data.world and front is None:
        job.work.run.log("report: no true front: some objective has no truth, or a fault may pay (world/optimum.py)")
    senses = recipe.evaluation.senses or None
    reference_K = reference_point(job, systems, front, senses_of(grid_UK) if senses is None else np.array(senses))
    setting = Setting(tuple(recipe.objectives), grid_UK, reference_K, chance, senses=senses)
    ledgers = [made.ledger for made in lineage([entrant.folder for entrant in shown])]
    tokens = mean_answer_tokens(sft_of(systems, systems[0]).entrant.folder)
    summary = summarize(
        [system.rewards for system in systems],
        setting,
        front,
        pairs,
        costs={system.entrant.title: cost([system.entrant.folder], tokens) for system in systems},
        reward_model=_reward_model(job),
        counts={ledger["name"]: ledger["counts"] for ledger in ledgers},
        seeds={"seeds": [recipe.seed]},
    )
    add_what_entrants_are(summary, systems, trials, tokens)
    summary["trust"] = trust(systems, setting)
    summary["pairwise"] = _pairwise(job)
    if compared:
        summary |= {
            "comparison": comparison(recipe, job.inputs, systems, setting, summary["systems"]),
            "tuning": tuning(recipe, trials, setting),
            "feasibility": feasibility(recipe, job.inputs, systems),
        }
    page = {
        "quality": _quality(job, systems),
        "data_reports": json.loads((job.inputs["data"] / "reports.json").read_text()),
        "stages": ledgers,
        "recipe_text": recipe.to_toml(),
        "title": recipe.name,
    }
    write_report(job.out, summary, answers=list(shown_answers(recipe, shown)), **page)
    write_json(job.out / "page.json", page)
    job.work.tally.add(rows_in=len(systems), rows_out=len(systems))


def compared_pairs(systems: Sequence[Evaluated]) -> list[tuple[str, str]]:
    """Who is compared with whom in a comparison: what it needs and no more, for Holm pays for each pair."""
    iterated = sorted((s for s in systems if s.entrant.role == "iteration"), key=lambda s: s.entrant.iteration or 0)
    others = [s for s in systems if s.entrant.role not in ("iteration", "ablation")]
    rivals = [s for s in others if s.entrant.role in ("baseline", "soup") and s.rewards.reward_PVSK.shape[1] > 1]
    names = [[system.entrant.title for system in group] for group in (iterated, others, rivals)]
    return comparison_pairs(*names)


def enough(job: Job, bootstrap: Bootstrap, pairs: int) -> Bootstrap:
    """The bootstrap, with more replicates where a decision over the pairs needs more; the log says so."""
    needed = 2 * fewest_replicates(pairs, bootstrap.level)  # with the fewest a p-value just reaches the level
    if needed <= bootstrap.replicates or not pairs:
        return bootstrap
    job.work.run.log(f"report: {needed} bootstrap replicates to decide {pairs} pairs, not {bootstrap.replicates}")
    return Bootstrap(bootstrap.seed, needed, bootstrap.level)


def sft_of(systems: Sequence[Evaluated], otherwise: Evaluated) -> Evaluated:
    return next((system for system in systems if system.entrant.step == "evaluate-sft"), otherwise)


def add_what_entrants_are(
    summary: dict[str, Any],
    systems: Sequence[Evaluated],
    trials: Mapping[str, Sequence[Trial]],
    answer_tokens: float,
) -> None:
    """To each system of the summary: its role, its setting, what tuning it cost, and whose copy it is."""
    first: dict[Path, str] = {}
    for system in systems:
        entrant = system.entrant
        entry = summary["systems"][entrant.title]
        entry |= {"role": entrant.role, "setting": entrant.setting or None, "family": entrant.family or None}
        entry["trained_for"] = (
            float(angles(np.array([entrant.direction]))[0]) if len(entrant.direction or ()) == 2 else None
        )
        entry["same_as"] = first.get(entrant.folder)
        first.setdefault(entrant.folder, entrant.title)
        tried = trials.get(entrant.title, ())
        entry["sweep"] = sweep_cost([trial.tuned_in for trial in tried], answer_tokens) if tried else None


def reference_point(
    job: Job, systems: Sequence[Evaluated], front: SystemRewards | None, senses_K: Array
) -> Array | None:
    """Hypervolume's reference: the recipe's; or SFT's mean where more is better, and where less is better
    the true optimum's at the first direction, or without a truth the original answers' 95% quantile.

    None where the directions disagree about what is better.
    """
    recipe = job.recipe
    if not senses_K.all():
        return None
    if recipe.evaluation.reference:
        return np.array(recipe.evaluation.reference)
    sft = next((system.rewards for system in systems if system.entrant.step == "evaluate-sft"), None)
    if sft is None:
        raise ValueError("no SFT among the systems to take hypervolume's reference from; set evaluation.reference")
    if front is not None and sft.true_reward_PVSK is not None:
        low_K, high_K = sft.true_reward_PVSK.mean(axis=(0, 1, 2)), front.point_VK[0]
    else:
        originals = annotated(job.inputs["data"], job.inputs["annotate"], recipe, "both")
        low_K, high_K = sft.point_VK[0], np.quantile(np.array([r_K for _, r_K in originals]), 0.95, axis=0)
    return np.where(senses_K > 0, low_K, high_K)


def _reward_model(job: Job) -> dict[str, Any]:
    """The contract's short form: head -> r2, pearson, spearman, length_correlation."""
    path = job.inputs["reward"] / "quality.json"
    heads = json.loads(path.read_text())["heads"] if path.is_file() else {}
    short = ("r2", "pearson", "spearman", "length_correlation")
    return {head: {name: figures[name]["value"] for name in short} for head, figures in heads.items()}


def _pairwise(job: Job) -> dict[str, Any] | None:
    """The reward model on a file of preference pairs, where the recipe names one."""
    if "pairwise" not in job.inputs:
        return None
    found: dict[str, Any] = json.loads((job.inputs["pairwise"] / "accuracy.json").read_text())
    return found


def _quality(job: Job, systems: Sequence[Evaluated]) -> dict[str, Any]:
    """Held-out quality, and how well the reward model ranks systems' own answers; not specialists' and ablations'."""
    systems = [s for s in systems if s.entrant.role not in ("specialist", "ablation")]
    path = job.inputs["reward"] / "quality.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    labels = {s.entrant.title: s.rewards.true_reward_PVSK for s in systems}
    labels |= {s.entrant.title: s.judged_PVSK for s in systems if labels[s.entrant.title] is None}
    on_policy = {
        system.entrant.title: _on_policy(job, system, label)
        for system in systems
        if (label := labels[system.entrant.title]) is not None
    }
    return found | {"on_policy": on_policy}


def _on_policy(job: Job, system: Evaluated, label_PVSK: Array) -> dict[str, Any]:
    rows = read_table(system.entrant.folder / "answers", CANDIDATES, ["prompt_id", "response"])
    k = len(job.recipe.objectives)
    figures: dict[str, Any] = quality(
        system.rewards.reward_PVSK.reshape(-1, k),
        label_PVSK.reshape(-1, k),
        list(job.recipe.objectives),
        rows["prompt_id"].to_pylist(),
        [len(text) for text in rows["response"].to_pylist()],
        resamples=min(200, job.recipe.evaluation.bootstrap),
        seed=job.recipe.seed,
    ).to_json()["heads"]
    return figures


def shown_answers(recipe: "Recipe", shown: Sequence[Entrant]) -> Iterator[dict[str, Any]]:
    """One answer a condition to the first prompts, of the last two policies and of what stands beside them.

    Of systems that answer to reward targets none is shown: the dial has no place for targets.
    """
    policies = [entrant for entrant in shown if (entrant.iteration or 0) > 0][-2:]
    beside = [
        entrant for entrant in shown if entrant.role in ("baseline", "soup") or entrant.step.endswith("-sft-asked")
    ]
    names = list(recipe.objectives)
    for entrant in (*beside, *policies):
        rows = read_table(entrant.folder / "answers", CANDIDATES).to_pylist()
        if rows[0]["condition_kind"] == "target":
            continue
        judged_NK = rewards(entrant.folder / "scores", recipe)
        truth_NK = true_objectives(entrant.folder / "truth", recipe)
        prompts = list(dict.fromkeys(row["prompt_id"] for row in rows))[:SHOWN_PROMPTS]
        for n, row in enumerate(rows):
            if row["sample"] or row["prompt_id"] not in prompts:
                continue
            direction = (
                Preference.from_vector(row["condition"], tuple(names)) if row["condition_kind"] == "direction" else None
            )
            yield {
                "prompt": row["messages"][-1]["content"],
                "system": entrant.title,
                "iteration": entrant.iteration,
                "condition": direction.weights if direction else None,
                "angle": direction.angle if direction and len(names) == 2 else None,
                "response": row["response"],
                "rewards": dict(zip(names, judged_NK[n].tolist(), strict=True)),
                "true_rewards": dict(zip(names, truth_NK[n].tolist(), strict=True)) if truth_NK is not None else None,
            }
