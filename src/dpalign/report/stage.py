"""The report stage: every evaluated system of a run into figures, tables and one page."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dpalign.choosing import annotated, objective_rewards
from dpalign.config import to_toml
from dpalign.evaluation.bootstrap import Bootstrap
from dpalign.evaluation.points import SystemRewards, senses_of
from dpalign.evaluation.summary import Setting, summarize
from dpalign.ledger import Ledger, read_ledger
from dpalign.preference import Preference, evaluation_grid
from dpalign.recipe import Recipe
from dpalign.records import CANDIDATES, HEADS, SCORES, read_table
from dpalign.report.write import write_report
from dpalign.reward.quality import quality
from dpalign.runs import write_json
from dpalign.stages import Job

Array = NDArray[np.float64]

SHOWN_PROMPTS: Final = 12
"""Validation prompts whose real answers the page shows."""

TITLES: Final = {
    "evaluate-sft": "SFT",
    "evaluate-steerlm": "SteerLM",
    "evaluate-dpo": "DPO",
    "evaluate-sft-asked": "SFT, asked",
    "evaluate-base-asked": "base, asked",
}


def report(job: Job) -> None:
    """Write index.html, summary.json, answers.json and the figures."""
    recipe = job.recipe
    folders = {name: path for name, path in job.inputs.items() if name.startswith("evaluate-")}
    if not folders:
        raise ValueError("nothing to report: give at least one evaluate- folder")
    systems = {name: read_system(recipe, name, path) for name, path in folders.items()}
    grid_UK = evaluation_grid(recipe.preference.population(len(recipe.objectives)), recipe.evaluation.directions)
    front = true_front(recipe, next(iter(folders.values())), grid_UK) if recipe.data.world else None
    setting = Setting(
        tuple(recipe.objectives),
        grid_UK,
        reference_point(job, systems, front, grid_UK),
        Bootstrap(seed=recipe.seed, replicates=recipe.evaluation.bootstrap),
    )
    data_reports = json.loads((job.inputs["data"] / "reports.json").read_text())
    ledgers = list(lineage(job.out.parent, list(folders)))
    summary = summarize(
        list(systems.values()),
        setting,
        front,
        costs={systems[name].name: cost(job.out.parent, name) for name in folders},
        reward_model=_reward_model(job),
        counts={ledger["name"]: ledger["counts"] for ledger in ledgers},
        seeds={"seeds": [recipe.seed]},
    )
    page = {
        "quality": _quality(job, systems),
        "data_reports": data_reports,
        "stages": ledgers,
        "recipe_text": to_toml(recipe),
        "title": recipe.name,
    }
    write_report(job.out, summary, answers=list(shown_answers(recipe, folders)), **page)
    write_json(job.out / "page.json", page)
    job.work.tally.add(rows_in=len(systems), rows_out=len(systems))


def title_of(step: str) -> str:
    """How a system is called on the page: by iteration, or by what it is."""
    if step in TITLES:
        return TITLES[step]
    return f"DPA t={iteration_of(step)}"


def iteration_of(step: str) -> int | None:
    """The iteration of an evaluated policy; pi_0, the SteerLM on D2, is t = 0 as in Fig. 4."""
    if step.startswith("evaluate-policy-"):
        return int(step.rsplit("-", 1)[1])
    return 0 if step == "evaluate-steerlm-d2" else None


def read_system(recipe: Recipe, step: str, folder: Path) -> SystemRewards:
    """The rewards of an evaluate folder as an array over prompts, conditions, samples and objectives."""
    keys = read_table(
        folder / "answers", CANDIDATES, ["prompt_id", "condition_index", "sample", "condition_kind", "condition"]
    )
    ids = list(dict.fromkeys(keys["prompt_id"].to_pylist()))
    conditions = max(keys["condition_index"].to_pylist()) + 1
    shape = (len(ids), conditions, recipe.evaluation.samples, len(recipe.objectives))
    directions = None
    if keys["condition_kind"][0].as_py() == "direction":
        directions = np.array(
            [_unit(v_K, recipe) for v_K in keys["condition"].to_pylist()[: shape[1] * shape[2] : shape[2]]]
        )
    truth = folder / "truth"
    return SystemRewards(
        title_of(step),
        iteration_of(step),
        tuple(ids),
        directions,
        _rewards(folder / "scores", recipe.heads, recipe).reshape(shape),
        _rewards(truth, HEADS, recipe).reshape(shape) if truth.exists() else None,
    )


def _unit(v_K: Sequence[float], recipe: Recipe) -> tuple[float, ...]:
    return Preference.from_vector(v_K, tuple(recipe.objectives)).v


def _rewards(folder: Path, heads: Sequence[str], recipe: Recipe) -> Array:
    rewards = read_table(folder, SCORES, ["rewards"])["rewards"].to_pylist()
    return objective_rewards(rewards, heads, recipe.objective_list, folder)


def true_front(recipe: Recipe, folder: Path, grid_UK: Array) -> SystemRewards:
    """The best answers of the world to the same prompts."""
    from dpalign.world.language import read_prompt
    from dpalign.world.optimum import optimal_rewards

    rows = read_table(folder / "answers", CANDIDATES, ["prompt_id", "messages"])
    prompts = dict(zip(rows["prompt_id"].to_pylist(), rows["messages"].to_pylist(), strict=True))
    reward_PVK = optimal_rewards([read_prompt(messages[-1]["content"]) for messages in prompts.values()], grid_UK)
    return SystemRewards(
        "true front", None, tuple(prompts), grid_UK, reward_PVK[:, :, None, :], reward_PVK[:, :, None, :]
    )


def reference_point(
    job: Job, systems: Mapping[str, SystemRewards], front: SystemRewards | None, grid_UK: Array
) -> Array:
    """Hypervolume's reference: the recipe's; or SFT's mean where more is better, and where less is better
    the true optimum's at the first direction, or without a truth the original answers' 95% quantile."""
    recipe = job.recipe
    if recipe.evaluation.reference:
        if len(recipe.evaluation.reference) != len(recipe.objectives):
            raise ValueError(
                f"evaluation.reference {recipe.evaluation.reference} needs one value an objective: "
                f"{', '.join(recipe.objectives)}"
            )
        return np.array(recipe.evaluation.reference)
    sft = systems.get("evaluate-sft")
    if sft is None:
        raise ValueError("no SFT among the systems to take hypervolume's reference from; set evaluation.reference")
    if front is not None and sft.true_reward_PVSK is not None:
        low_K, high_K = sft.true_reward_PVSK.mean(axis=(0, 1, 2)), front.point_VK[0]
    else:
        originals = annotated(job.inputs["data"], job.inputs["annotate"], recipe, "both")
        low_K, high_K = sft.point_VK[0], np.quantile(np.array([r_K for _, r_K in originals]), 0.95, axis=0)
    return np.where(senses_of(grid_UK) > 0, low_K, high_K)


def lineage(run: Path, steps: Sequence[str]) -> Iterator[Ledger]:
    """The ledgers of these steps and of all that they were made from, each once, the earliest first."""
    seen: set[str] = set()

    def visit(name: str) -> Iterator[Ledger]:
        if name in seen or not (run / name / "ledger.json").is_file():
            return
        seen.add(name)
        ledger = read_ledger(run / name)
        for entry in ledger["inputs"].values():
            yield from visit(entry["path"])
        yield ledger

    for step in steps:
        yield from visit(step)


def cost(run: Path, step: str) -> dict[str, float]:
    """What a system took to make, without its evaluation: tokens, scored responses, seconds."""
    made = [ledger for ledger in lineage(run, [step]) if not ledger["name"].startswith("evaluate-")]
    return {
        "sampled_tokens": sum(ledger["tokens"]["sampled"] for ledger in made),
        "scored_responses": sum(ledger["tokens"]["scored"] for ledger in made),
        "trained_tokens": sum(ledger["tokens"]["trained"] for ledger in made),
        "seconds": sum(ledger["seconds"] for ledger in made),
    }


def _reward_model(job: Job) -> dict[str, Any]:
    """The contract's short form: head -> r2, pearson, spearman, length_correlation."""
    path = job.inputs["reward"] / "quality.json"
    heads = json.loads(path.read_text())["heads"] if path.is_file() else {}
    short = ("r2", "pearson", "spearman", "length_correlation")
    return {head: {name: figures[name]["value"] for name in short} for head, figures in heads.items()}


def _quality(job: Job, systems: Mapping[str, SystemRewards]) -> dict[str, Any]:
    """Held-out quality, and how well the reward model ranks each system's own answers."""
    path = job.inputs["reward"] / "quality.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    on_policy = {}
    for name, system in systems.items():
        label = system.true_reward_PVSK
        if label is None and (judged := job.inputs[name] / "judged").exists():
            label = _rewards(judged, job.recipe.heads, job.recipe).reshape(system.reward_PVSK.shape)
        if label is not None:
            on_policy[system.name] = _on_policy(job, name, system, label)
    return found | {"on_policy": on_policy}


def _on_policy(job: Job, step: str, system: SystemRewards, label_PVSK: Array) -> dict[str, Any]:
    rows = read_table(job.inputs[step] / "answers", CANDIDATES, ["prompt_id", "response"])
    k = len(job.recipe.objectives)
    figures: dict[str, Any] = quality(
        system.reward_PVSK.reshape(-1, k),
        label_PVSK.reshape(-1, k),
        list(job.recipe.objectives),
        rows["prompt_id"].to_pylist(),
        [len(text) for text in rows["response"].to_pylist()],
        resamples=min(200, job.recipe.evaluation.bootstrap),
        seed=job.recipe.seed,
    ).to_json()["heads"]
    return figures


def shown_answers(recipe: Recipe, folders: Mapping[str, Path]) -> Iterator[dict[str, Any]]:
    """One answer a condition to the first prompts, of the last two policies and of what stands beside them."""
    policies = [name for name in folders if (iteration_of(name) or 0) > 0]
    for step in ("evaluate-sft", "evaluate-dpo", "evaluate-sft-asked", *policies[-2:]):
        if step not in folders:
            continue
        folder = folders[step]
        rows = read_table(folder / "answers", CANDIDATES).to_pylist()
        judged_NK = _rewards(folder / "scores", recipe.heads, recipe)
        truth_NK = _rewards(folder / "truth", HEADS, recipe) if (folder / "truth").exists() else None
        shown = list(dict.fromkeys(row["prompt_id"] for row in rows))[:SHOWN_PROMPTS]
        names = list(recipe.objectives)
        for n, row in enumerate(rows):
            if row["sample"] or row["prompt_id"] not in shown:
                continue
            direction = (
                Preference.from_vector(row["condition"], tuple(names)) if row["condition_kind"] == "direction" else None
            )
            yield {
                "prompt": row["messages"][-1]["content"],
                "system": title_of(step),
                "iteration": iteration_of(step),
                "condition": direction.weights if direction else None,
                "angle": direction.angle if direction and len(names) == 2 else None,
                "response": row["response"],
                "rewards": dict(zip(names, judged_NK[n].tolist(), strict=True)),
                "true_rewards": dict(zip(names, truth_NK[n].tolist(), strict=True)) if truth_NK is not None else None,
            }
