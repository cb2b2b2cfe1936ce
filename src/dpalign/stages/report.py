"""The report stage: puts every evaluated system of a run into one Summary and one page."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dpalign.measure import comparison as compare
from dpalign.measure import lineage
from dpalign.measure.answers import reward_quality, shown_answers, with_texts
from dpalign.measure.bootstrap import Array, Bootstrap
from dpalign.measure.divergence import divergences
from dpalign.measure.feasibility import Rule, read_feasibility
from dpalign.measure.points import Rewards, senses_of
from dpalign.measure.reading import Reading, evaluations, mean_answer_tokens, system_of
from dpalign.measure.record import rounded
from dpalign.measure.setting import Setting, reference_point, sft_of, true_front
from dpalign.measure.summarize import claims, summarize
from dpalign.measure.summary import DataReport, Pairwise, RewardFacts
from dpalign.measure.trust import trust
from dpalign.paper.direction import Arc, Population, evaluation_grid
from dpalign.stages.pools import annotation
from dpalign.stages.preference import Steering
from dpalign.stages.score import scales_of
from dpalign.stages.stage import Job, objectives_read, stage


@stage(
    reads=lambda r: (
        *(r.seed, r.evaluation, r.preference, r.data.world, r.compare, r.rewards, r.feasibility.repetition),
        *objectives_read(r),
    ),
    reads_figures=True,
    inputs=("data", "reward", "annotate"),
    optional=("judge", "pairwise"),
    version=7,
    heavy=False,
    repeated=("evaluate", "tune", "feasible", "divergence"),
)
def report(job: Job) -> None:
    """Measure the systems and write the page."""
    from dpalign.page.write import write_report  # loads matplotlib

    recipe, inputs, log = job.recipe, job.inputs, job.work.run.log
    reading = Reading(tuple(recipe.scored_heads), tuple(recipe.objective_list))
    grid_UK = evaluation_grid(recipe.preference.population(len(reading.names)), recipe.evaluation.directions)
    chance = Bootstrap(seed=recipe.seed, replicates=recipe.evaluation.bootstrap)
    senses_K = np.array(recipe.evaluation.senses) if recipe.evaluation.senses else senses_of(grid_UK)

    # each system once, in the setting that tuning chose
    evaluated, tuning = evaluations(inputs, job.systems, reading, senses_K)
    systems, tried = compare.choose_settings(evaluated, tuning, grid_UK, chance)
    systems = [with_texts(one, recipe.feasibility.repetition) for one in systems]
    compared = any(step.startswith("feasible-") for step in inputs) or any(one.system.compared for one in systems)
    pairs = compare.comparison_pairs(systems) if compared else claims(systems)
    final = compare.enough_replicates(chance, len(pairs)) if compared else chance
    if final != chance:
        log(f"report: {final.replicates} bootstrap replicates to decide {len(pairs)} pairs, not {chance.replicates}")

    # the references: the true front, and the hypervolume's reference point
    front = true_front(systems[0].source, reading, grid_UK) if recipe.data.world else None
    if recipe.data.world and front is None:
        log("report: no true front: some objective has no truth, or a fault may pay (world/optimum.py)")
    stated = recipe.evaluation.reference
    reference_K = np.array(stated) if stated else None
    if not stated or not senses_K.all():
        reference_K = reference_point(systems, front, senses_K, partial(original_rewards, job))
    setting = Setting(reading.names, grid_UK, reference_K, final, senses=recipe.evaluation.senses or None)

    # the figures, and facts from the ledgers
    tokens = mean_answer_tokens((sft_of(systems) or systems[0]).source)
    costs = {one.name: lineage.cost([one.source], tokens) for one in systems}
    sweeps = {name: lineage.sweep_cost([tuned.source for _, tuned in own], tokens) for name, own in tried.items()}
    summary, copies = summarize(systems, setting, front, pairs, costs), compare.copies_of(systems)
    away = divergences(inputs, systems, final)
    measured = {
        name: one.model_copy(
            update={"same_as": copies.get(name), "sweep": sweeps.get(name), "divergence": away.get(name)}
        )
        for name, one in summary.systems.items()
    }
    comparison = None
    if compared:
        tuned = {name: compare.tuned_settings(own, grid_UK, chance, final) for name, own in tried.items()}
        folders = tuple(one.source for _, one in evaluated)
        sources = compare.Sources(reading, folders, recipe.evaluation.best_of, partial(population, len(reading.names)))
        beside = compare.comparison(systems, copies, setting, sources)
        comparison = beside.model_copy(update={"tuning": tuned, **comparison_facts(job, systems, reading, chance)})
    update = {"systems": measured, "trust": trust(systems, grid_UK, final), "comparison": comparison}
    write_report(job.out, rounded(summary.model_copy(update=update | facts(job, systems, reading))))
    job.work.tally.add(rows_in=len(systems), rows_out=len(systems))


def original_rewards(job: Job) -> Array:
    """The rewards of the original answers: (N, K)."""
    return annotation(job.inputs["data"], job.inputs["annotate"], job.recipe, "both")[2]


def facts(job: Job, systems: Sequence[Rewards], reading: Reading) -> dict[str, Any]:
    """Facts from ledgers and other stages: the run, its stages, data, trainings, reward model and answers."""
    recipe, inputs, stages = job.recipe, job.inputs, list(lineage.lineage(one.source for one in systems))
    resamples = min(200, recipe.evaluation.bootstrap)
    return {
        "title": recipe.name,
        "degenerate_rule": Rule(repetition=recipe.feasibility.repetition),
        "world": recipe.data.world,
        "rewards": tuple(reward_facts(job)),
        "reward_model": reward_quality(inputs["reward"], systems, reading.names, resamples, recipe.seed),
        "pairwise": Pairwise(**_read(inputs["pairwise"] / "accuracy.json")) if "pairwise" in inputs else None,
        "seed": recipe.seed,
        "stages": tuple(map(lineage.stage_facts, stages)),
        "curves": tuple(lineage.curves(stages)),
        "data_reports": tuple(map(DataReport.of, _read(inputs["data"] / "reports.json"))),
        "answers": tuple(shown_answers(systems, reading.names)),
        "recipe_text": recipe.to_toml(),
        "machine": lineage.machine(job.work.run.folder),
    }


def reward_facts(job: Job) -> Iterator[RewardFacts]:
    """The reward behind each head and its scale, in the order of the heads; nothing without [rewards.NAME]."""
    recipe = job.recipe
    scales = iter(scales_of(recipe, job.inputs["annotate"]))
    for name, reward in recipe.rewards.items():
        for head in reward.own_heads(recipe.reward_heads):
            slope, offset = next(scales)
            source, fitted = reward.source or "trained in this run", None in reward.known_scales(recipe.reward_heads)
            yield RewardFacts(head=f"{name}/{head}", source=source, slope=slope, offset=offset, fitted=fitted)


def comparison_facts(job: Job, systems: Sequence[Rewards], reading: Reading, chance: Bootstrap) -> dict[str, Any]:
    """Further facts of a comparison: the knobs that its steps set, and the feasibility figures."""
    steering, stages = job.recipe.preference, lineage.lineage(one.source for one in systems)
    users = steering.population(len(reading.names))
    arc = users if isinstance(users, Arc) else None
    measured = {}
    for step, folder in job.inputs.items():
        kind, _, name = step.partition("-")
        if kind == "feasible":  # its evaluation names the system
            system = system_of(job.systems, f"evaluate-{name}", folder)
            measured[system.name] = read_feasibility(folder, reading, arc, steering.margin, chance)
    return {
        "knobs_set": lineage.knobs_set(stages, job.recipe.to_toml()),
        "paper_curves": job.recipe.compare.paper_curves,
        "feasibility": measured,
    }


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def population(objectives: int, knobs: Mapping[str, Any]) -> Population:
    """P_v by a stage's knobs."""
    section = "preference."
    mapping = {key.removeprefix(section): value for key, value in knobs.items() if key.startswith(section)}
    return Steering.model_validate_json(json.dumps(mapping)).population(objectives)
