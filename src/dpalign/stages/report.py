"""The report stage: every evaluated system of a run into one Summary and one page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dpalign.measure.answers import on_policy_quality, shown_answers
from dpalign.measure.beyond import Feasibility, with_margin
from dpalign.measure.bootstrap import Array, Bootstrap
from dpalign.measure.comparison import Sources, choose_settings, comparison, comparison_pairs, tuned_settings
from dpalign.measure.lineage import cost, curves, knobs_set, lineage, machine, stage_facts, sweep_cost
from dpalign.measure.points import Rewards, senses_of
from dpalign.measure.reading import Reading, answer_rows, mean_answer_tokens, read_rewards
from dpalign.measure.record import rounded
from dpalign.measure.setting import Setting
from dpalign.measure.summarize import claims, fewest_replicates, summarize
from dpalign.measure.summary import DataReport, Pairwise, RewardQuality
from dpalign.measure.system import System, read_system_description
from dpalign.measure.trust import trust
from dpalign.page.words import arithmetic, listed
from dpalign.page.write import write_report
from dpalign.paper.direction import Arc, DirectionDistribution, evaluation_grid
from dpalign.paper.objectives import all_known
from dpalign.recipe import Recipe, Steering, config
from dpalign.rows import HEADS
from dpalign.stages.choose import annotated
from dpalign.stages.stage import Job


def report(job: Job) -> None:
    """Write index.html, summary.json and the figures."""
    recipe, k = job.recipe, len(job.recipe.objectives)
    reading = Reading(tuple(recipe.heads), tuple(recipe.objective_list))
    grid_UK = evaluation_grid(recipe.preference.population(k), recipe.evaluation.directions)
    senses_K = np.array(recipe.evaluation.senses) if recipe.evaluation.senses else senses_of(grid_UK)
    bootstrap = Bootstrap(seed=recipe.seed, replicates=recipe.evaluation.bootstrap)

    evaluated, tuning = evaluations(job.inputs, reading, senses_K)
    systems, tried = choose_settings(evaluated, tuning, grid_UK, bootstrap)
    feasible = {name: path for name, path in job.inputs.items() if name.startswith("feasible-")}
    compared = bool(feasible) or any(one.system.compared for one in systems)
    pairs = comparison_pairs(systems) if compared else claims(systems)
    final = enough(job, bootstrap, len(pairs)) if compared else bootstrap
    front = true_front(recipe, systems[0].folder, grid_UK) if recipe.data.world else None
    if recipe.data.world and front is None:
        job.work.run.log("report: no true front: some objective has no truth, or a fault may pay (world/optimum.py)")
    reference_K = reference_point(job, systems, front, senses_K)
    setting = Setting(reading.names, grid_UK, reference_K, final, senses=recipe.evaluation.senses or None)

    stages = list(lineage(one.folder for one in systems if one.folder))
    tokens = mean_answer_tokens((sft_of(systems) or systems[0]).folder)
    costs = {one.name: cost([one.folder], tokens) for one in systems}
    sweeps = {name: sweep_cost([rewards.folder for _, rewards in all_], tokens) for name, all_ in tried.items()}
    copies = copies_of(systems)
    summary = summarize(systems, setting, front, pairs, costs)
    text = config.to_toml(recipe)
    beside = None
    if compared:
        sources = Sources(reading, tuple(one.folder for _, one in evaluated), recipe.evaluation.best_of, partial(population, k))
        beside = comparison(systems, copies, setting, sources).model_copy(
            update={
                "knobs_set": knobs_set(stages, text),
                "paper_curves": recipe.compare.paper_curves,
                "tuning": {name: tuned_settings(all_, grid_UK, bootstrap, final) for name, all_ in tried.items()},
                "feasibility": feasibility(recipe, feasible, systems, reading, bootstrap),
            }
        )
    facts = {
        "title": recipe.name,
        "world": recipe.data.world,
        "systems": {
            name: one.model_copy(update={"same_as": copies.get(name), "sweep": sweeps.get(name)})
            for name, one in summary.systems.items()
        },
        "reward_model": reward_quality(job, systems),
        "pairwise": pairwise(job),
        "trust": trust(systems, grid_UK, final),
        "comparison": beside,
        "seed": recipe.seed,
        "stages": tuple(map(stage_facts, stages)),
        "curves": tuple(curves(stages)),
        "data_reports": tuple(data_reports(job.inputs["data"])),
        "answers": tuple(shown_answers(systems, reading.names)),
        "recipe_text": text,
        "machine": machine(job.work.run.folder),
    }
    write_report(job.out, rounded(summary.model_copy(update=facts)))
    job.work.tally.add(rows_in=len(systems), rows_out=len(systems))


def evaluations(
    inputs: Mapping[str, Path], reading: Reading, senses_K: Array
) -> tuple[list[tuple[str, Rewards]], dict[str, Rewards]]:
    """The evaluated systems by name, and those on the tuning prompts.

    Raises:
        ValueError: there are none.
    """
    found: list[tuple[str, Rewards]] = []
    tuning: dict[str, Rewards] = {}
    for step, folder in inputs.items():
        kind, _, name = step.partition("-")
        if kind != "evaluate":
            continue
        # one folder may serve two systems; then the tuning evaluation tells which this is
        tuned = inputs.get(f"tune-{name}")
        system = read_system_description(tuned or folder, step)
        if (folder / "soup.json").is_file():
            system = replace(system, setting=experts_of(folder, reading, senses_K))
        found.append((name, read_rewards(folder, system, reading)))
        if tuned is not None:
            tuning[name] = read_rewards(tuned, system, reading, truth=False)
    if not found:
        raise ValueError("nothing to report: give at least one evaluate- folder")
    return found, tuning


def experts_of(folder: Path, reading: Reading, senses_K: Array) -> str:
    """What a soup's experts were trained for, as its evaluation mixed them."""
    mixed = json.loads((folder / "soup.json").read_text(encoding="utf-8"))
    return listed([arithmetic(dict(zip(reading.names, v_K, strict=True)), senses_K) for v_K in mixed["experts"]])


def sft_of(systems: Sequence[Rewards]) -> Rewards | None:
    """The SFT model, which others are measured from."""
    return next((one for one in systems if one.name.casefold() == "sft"), None)


def copies_of(systems: Sequence[Rewards]) -> dict[str, str]:
    """The systems that share their evaluation with an earlier one, and that one's name."""
    first: dict[Path | None, str] = {}
    for one in systems:
        first.setdefault(one.folder, one.name)
    return {one.name: first[one.folder] for one in systems if first[one.folder] != one.name}


def enough(job: Job, bootstrap: Bootstrap, pairs: int) -> Bootstrap:
    """The bootstrap, with more replicates where a decision over the pairs needs more; the log says so."""
    needed = 2 * fewest_replicates(pairs, bootstrap.level)  # with the fewest a p-value just reaches the level
    if needed <= bootstrap.replicates or not pairs:
        return bootstrap
    job.work.run.log(f"report: {needed} bootstrap replicates to decide {pairs} pairs, not {bootstrap.replicates}")
    return replace(bootstrap, replicates=needed)


def reference_point(
    job: Job, systems: Sequence[Rewards], front: Rewards | None, senses_K: Array
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
    sft = sft_of(systems)
    if sft is None:
        raise ValueError("no SFT among the systems to take hypervolume's reference from; set evaluation.reference")
    if front is not None and sft.true_reward_PVSK is not None:
        low_K, high_K = sft.true_reward_PVSK.mean(axis=(0, 1, 2)), front.point_VK[0]
    else:
        originals = annotated(job.inputs["data"], job.inputs["annotate"], recipe, "both")
        low_K, high_K = sft.point_VK[0], np.quantile(np.array([r_K for _, r_K in originals]), 0.95, axis=0)
    return np.where(senses_K > 0, low_K, high_K)


def true_front(recipe: Recipe, folder: Path | None, grid_UK: Array) -> Rewards | None:
    """The best answers of the world to the same prompts.

    None where nobody can say which they are: an objective reads a head without a truth, or a fault may pay.
    """
    from dpalign.world.language import read_prompt
    from dpalign.world.optimum import faultless_is_best, optimal_rewards

    objectives, heads = recipe.objective_list, recipe.heads
    if not all_known(objectives, heads, HEADS) or not faultless_is_best(grid_UK, objectives, heads):
        return None
    assert folder is not None
    prompts = {row["prompt_id"]: row["messages"] for row in answer_rows(folder, ["prompt_id", "messages"])}
    tasks = [read_prompt(messages[-1]["content"]) for messages in prompts.values()]
    best_PVSK = optimal_rewards(tasks, grid_UK, objectives, heads)[:, :, None, :]
    return Rewards(System("true front"), tuple(prompts), grid_UK, best_PVSK, best_PVSK)


def population(objectives: int, knobs: Mapping[str, Any]) -> DirectionDistribution:
    """The users that a stage's knobs state."""
    section = "preference."
    mapping = {key.removeprefix(section): value for key, value in knobs.items() if key.startswith(section)}
    return config.from_mapping(Steering, mapping, "ledger").population(objectives)


def feasibility(
    recipe: Recipe, folders: Mapping[str, Path], systems: Sequence[Rewards], reading: Reading, bootstrap: Bootstrap
) -> dict[str, Feasibility]:
    """What each feasibility step measured, by the name of its system; the training's margin apart."""
    found = {}
    for step, folder in folders.items():
        figures = Feasibility.model_validate_json((folder / "feasibility.json").read_text(encoding="utf-8"))
        arc = recipe.preference.population(len(reading.names))
        if isinstance(arc, Arc):
            figures = with_margin(figures, folder, reading, arc, recipe.preference.margin, bootstrap)
        found[read_system_description(folder, step).name] = figures
    return found


def reward_quality(job: Job, systems: Sequence[Rewards]) -> RewardQuality:
    """Held-out quality, and how well the reward model ranks the systems' own answers."""
    path, recipe = job.inputs["reward"] / "quality.json", job.recipe
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    parts = {name: values.get(name, {}) for name in ("heads", "objectives", "baseline", "truth")}
    own = on_policy_quality(systems, tuple(recipe.objectives), min(200, recipe.evaluation.bootstrap), recipe.seed)
    return RewardQuality.model_validate(parts | {"on_policy": own})


def pairwise(job: Job) -> Pairwise | None:
    """The reward model on a file of preference pairs, where the recipe names one."""
    if "pairwise" not in job.inputs:
        return None
    return Pairwise.model_validate_json((job.inputs["pairwise"] / "accuracy.json").read_text(encoding="utf-8"))


def data_reports(data: Path) -> list[DataReport]:
    """What was read of each data file."""
    found = json.loads((data / "reports.json").read_text(encoding="utf-8"))
    return [
        DataReport(
            source=one["source"], file=Path(one["file"]).name, read=one["in"], kept=one["out"],
            filtered=one["filtered"], notes=one["notes"],
        )
        for one in found
    ]  # fmt: skip
