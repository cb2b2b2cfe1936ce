"""What stands beside DPA: every system of Table 1 as a list of steps, tuned, evaluated and reported with it.

All systems share the run's data, SFT start, reward model and evaluation. A system with several settings
(DPO's beta, SteerLM's target grid, the soups' experts) is evaluated in each of them on the tuning prompts,
by the reward model alone; the report shows on the validation prompts the one that is best there. Steps
that would do the same work twice are one: the soups' experts are the specialists of scalar rejection sampling.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from dpalign.measure.points import senses_of
from dpalign.page.words import arithmetic, listed
from dpalign.paper.direction import Fixed, Grid, evaluation_grid
from dpalign.recipe import Recipe
from dpalign.recipe.config import changed
from dpalign.stages.stage import Step

ABLATIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    "no replay": {"replay": 0.0},
    "no restart": {"restart": False},
    "one half": {"alternate": False},
    "no LM loss": {"reward.lm_loss": 0.0},
}
"""The knobs of each ablation of the loop."""

SOUPS: Final = ("axes", "ends")
"""The choices of experts: one an objective, or one for each end of the dial."""

Vector = Sequence[float]


@dataclass(frozen=True)
class Contender:
    """A system in one of its settings: how it is made, and how it is asked."""

    name: str
    """Its steps are evaluate-NAME and, where the system has settings to choose among, tune-NAME."""
    system: str
    """What the page calls it."""
    setting: str = ""
    """What tells it from the system's other settings."""
    edge: bool = False
    """Its setting is the first or the last of a grid that could go on there."""
    made_by: tuple[Step, ...] = ()
    asked: Step = field(default_factory=lambda: Step("", "evaluate"))
    """Its evaluation, without a name, the data and the reward model."""


def contenders(recipe: Recipe) -> list[Contender]:
    """All systems that the recipe compares, in the order of the page."""
    wanted = recipe.compare.systems
    made: list[Contender] = []
    if "dpo" in wanted:
        made += _dpo(recipe, "", "DPO", "plain")
    if "brief" in wanted:
        asked = Step("", "evaluate", {"policy": "sft"}, condition="brief")
        made.append(Contender("sft-brief", "SFT, asked to be brief", asked=asked))
        made += _dpo(recipe, "-brief", "DPO, asked to be brief", "brief") if "dpo" in wanted else []
    if "steerlm" in wanted:
        made += _steerlm(recipe)
    if "rsf" in wanted:
        made += _specialists(recipe)
    if "rl" in wanted:
        made += _rl(recipe)
    if "soups" in wanted:
        made += _soups(recipe)
    if "best-of-n" in wanted:
        asked = Step("", "evaluate", {"policy": "sft"}, condition="best-of-n")
        made.append(Contender("sft-best-of-n", f"SFT, best of {recipe.evaluation.best_of}", asked=asked))
    return made


def evaluations(contender: Contender, inputs: Mapping[str, str], tuned: bool) -> Iterator[Step]:
    """A contender's evaluation on the validation prompts, and before it, if `tuned`, on the tuning prompts."""
    asked = contender.asked
    takes = {*asked.stage.inputs, *asked.stage.optional}
    given = {name: path for name, path in inputs.items() if name in takes} | dict(asked.inputs)

    def step(prefix: str, knobs: Mapping[str, Any]) -> Step:
        return Step(
            f"{prefix}-{contender.name}", asked.kind, given, condition=asked.condition, knobs={**asked.knobs, **knobs}
        )

    if tuned:
        yield step("tune", {"evaluation.split": "tuning"})
    yield step("evaluate", {})


def feasibility(recipe: Recipe, inputs: Mapping[str, str]) -> Iterator[Step]:
    """What the last policy, and SteerLM where it is compared, answer when they are asked for more than can be had.

    Beyond what a policy was trained on lies beyond the ends of an arc; other populations have no such ends.
    """
    given = {name: inputs[name] for name in ("data", "reward", "annotate")}
    if recipe.preference.distribution == "arc":
        policy = f"policy-{recipe.iterations}"
        asked = {"policy": policy} | given
        yield Step(f"feasible-{policy}", "feasibility", asked, recipe.iterations, condition="directions")
    if "steerlm" in recipe.compare.systems:
        yield Step("feasible-steerlm", "feasibility", {"policy": "steerlm"} | given, condition="targets")


def require_plan(recipe: Recipe) -> None:
    """What a comparison would otherwise miss after all trainings.

    Raises:
        ValueError: experts that cannot be mixed for every evaluation direction; settings to choose among, and no
            tuning prompts.
    """
    for choice in recipe.compare.soups if "soups" in recipe.compare.systems else ():
        if why := unserved(recipe, choice):
            raise ValueError(f'compare.soups has "{choice}", which cannot serve every direction: {why}')
    tuned = sorted(tuned_systems(contenders(recipe)))
    data = recipe.data
    held_out = recipe.world.tuning_prompts if data.world else data.tuning_prompts or data.tuning
    if tuned and not held_out:
        key = "world.tuning_prompts is 0; give 150" if data.world else "data.tuning is 0; give a share such as 0.02"
        raise ValueError(
            f"no tuning prompts to choose the settings of {listed([name.replace(',', '') for name in tuned])} on: {key}"
            f"{'' if data.world else ', or name a file in data.tuning_prompts'}"
        )


def notes(recipe: Recipe) -> list[str]:
    """What a comparison leaves out by itself, and why."""
    if recipe.compare.soups or "soups" not in recipe.compare.systems:
        return []
    missing = [(choice, why) for choice in SOUPS if (why := unserved(recipe, choice))]
    return [f'compare.soups: "{choice}" is left out: {why}' for choice, why in missing]


def tuned_systems(compared: Sequence[Contender]) -> set[str]:
    """The systems with more than one setting."""
    systems = [contender.system for contender in compared]
    return {system for system in systems if systems.count(system) > 1}


def knobs_set(compared: Sequence[Contender]) -> list[str]:
    """The knobs that some steps of these systems set for themselves, whatever the recipe says."""
    steps = [step for contender in compared for step in (*contender.made_by, contender.asked)]
    return sorted({name for step in steps for name in step.knobs})


def _dpo(recipe: Recipe, suffix: str, title: str, condition: str) -> Iterator[Contender]:
    pairs: dict[str, str | Any] = {"data": "data"}
    if recipe.dpo.pairs == "candidates":
        pairs |= {"candidates": "sample-1", "scores": "score-1"}
    for i, beta in enumerate(recipe.compare.dpo_betas, start=1):
        policy = f"dpo-{i}"
        yield Contender(
            f"{policy}{suffix}",
            title,
            f"beta {beta:g}",
            edge=_at_the_edge(beta, recipe.compare.dpo_betas),
            made_by=(
                Step("pairs", "pairs", pairs),
                Step(policy, "dpo", {"start": "sft", "pairs": "pairs"}, knobs={"dpo.beta": beta}),
            ),
            asked=Step("", "evaluate", {"policy": policy}, condition=condition),
        )


def _steerlm(recipe: Recipe) -> Iterator[Contender]:
    for i, quantile in enumerate(recipe.compare.steerlm_quantiles, start=1):
        asked = Step(
            "", "evaluate", {"policy": "steerlm"}, condition="targets", knobs={"steerlm.quantile": float(quantile)}
        )
        edge = quantile < 1 and _at_the_edge(quantile, recipe.compare.steerlm_quantiles)  # 1 is the highest there is
        setting = f"helpfulness at its {quantile:g} quantile"
        yield Contender(f"steerlm-{i}", "SteerLM, tuned", setting, edge=edge, asked=asked)


def _specialists(recipe: Recipe) -> Iterator[Contender]:
    for i, v_K in enumerate(_grid(recipe, recipe.compare.rsf_directions), start=1):
        made_by = tuple(scalar_rejection_sampling(recipe, f"rsf-{i}", v_K))
        asked = Step("", "evaluate", {"policy": made_by[-1].name}, condition="plain")
        yield Contender(f"rsf-{i}", f"RSF at {spelled(recipe, v_K)}", made_by=made_by, asked=asked)


def _rl(recipe: Recipe) -> Iterator[Contender]:
    for i, v_K in enumerate(_grid(recipe, recipe.compare.rl_directions), start=1):
        for j, beta in enumerate(recipe.compare.rl_betas, start=1):
            name = f"rl-{i}-{j}"
            knobs = fixed(v_K) | {"rl.beta": beta}
            made = Step(name, "rl", {"start": "sft", "data": "data", "reward": "reward"}, knobs=knobs)
            asked = Step("", "evaluate", {"policy": name}, condition="plain")
            title = f"{recipe.rl.algorithm.upper()} at {spelled(recipe, v_K)}"
            edge = _at_the_edge(beta, recipe.compare.rl_betas)
            yield Contender(name, title, f"beta {beta:g}", edge=edge, made_by=(made,), asked=asked)


def _at_the_edge(value: float, grid: Sequence[float]) -> bool:
    return value in (min(grid), max(grid))


def _soups(recipe: Recipe) -> Iterator[Contender]:
    for i, choice in enumerate(soups_mixed(recipe), start=1):
        experts = experts_of(recipe, choice)
        made_by: list[Step] = []
        inputs: dict[str, str | Any] = {}
        for j, v_K in enumerate(experts, start=1):
            steps = list(scalar_rejection_sampling(recipe, f"soup-{i}-expert-{j}", v_K))
            made_by += steps
            inputs[f"expert-{j}"] = steps[-1].name
        names = listed([spelled(recipe, v_K) for v_K in experts])
        knobs = {"soups.experts": [list(v_K) for v_K in experts]}
        asked = Step("", "soup", inputs, knobs=knobs)
        yield Contender(f"soup-{i}", "rewarded soups", names, made_by=tuple(made_by), asked=asked)


def soups_mixed(recipe: Recipe) -> list[str]:
    """The choices of experts: the recipe's, or where it leaves that open all that serve every direction."""
    return list(recipe.compare.soups) or [choice for choice in SOUPS if not unserved(recipe, choice)]


def experts_of(recipe: Recipe, choice: str) -> tuple[Vector, ...]:
    """The directions that the experts of a soup are trained for."""
    grid_UK = _grid(recipe, recipe.evaluation.directions)
    return axes(grid_UK) if choice == "axes" else (grid_UK[0], grid_UK[-1])


def unserved(recipe: Recipe, choice: str) -> str:
    """Why the experts cannot be mixed for some evaluation direction; nothing where they serve all."""
    from dpalign.train.mixtures import spanned

    experts = experts_of(recipe, choice)
    for v_K in _grid(recipe, recipe.evaluation.directions):
        try:
            spanned(v_K, experts)
        except ValueError as error:
            return str(error)
    return ""


def scalar_rejection_sampling(recipe: Recipe, name: str, v_K: Vector) -> Iterator[Step]:
    """DPA's loop at one fixed direction, without a dial: as many iterations, the halves in turn, each from SFT."""
    drawn = {"sampling.n": recipe.rsf.n, "sampling.prompts": recipe.rsf.prompts}  # of SFT, the same for all directions
    trained = {"finetune.steps": recipe.rsf.steps} if recipe.rsf.steps else {}
    annotated = {"data": "data", "annotate": "annotate"}
    policy = "sft"
    for t in range(1, recipe.iterations + 1):
        half = "D2" if recipe.alternate and t % 2 == 0 else "D1"
        candidates, scores, chosen = (f"{name}-{verb}-{t}" for verb in ("sample", "score", "select"))
        yield Step(candidates, "sample", {"policy": policy} | annotated, t, half, "plain", drawn)
        yield Step(scores, "score", {"reward": "reward", "candidates": candidates}, t)
        yield Step(
            chosen, "select", {"candidates": candidates, "scores": scores} | annotated, t, half, knobs=fixed(v_K)
        )
        policy = f"{name}-policy-{t}"
        yield Step(policy, "specialist", {"start": "sft", "chosen": chosen}, t, knobs=trained)


def fixed(v_K: Vector) -> dict[str, Any]:
    """The knobs of a population of users that all want the same."""
    return {
        "preference.distribution": "fixed",
        "preference.margin": 0.0,
        "preference.listed": [[float(w) for w in v_K]],
        "preference.directions": 1,
    }


def axes(grid_UK: Sequence[Vector]) -> tuple[Vector, ...]:
    """One direction an objective, more of it or less, as the population has it; both where that disagrees."""
    senses_K = senses_of(np.array(grid_UK)).tolist()
    signs = [(k, sign) for k, sense in enumerate(senses_K) for sign in ((sense,) if sense else (1.0, -1.0))]
    return tuple(tuple(sign if i == k else 0.0 for i in range(len(senses_K))) for k, sign in signs)


def spelled(recipe: Recipe, v_K: Vector) -> str:
    """A direction as the paper writes it, for a title."""
    senses_K = senses_of(np.array(_grid(recipe, recipe.evaluation.directions))).tolist()
    return arithmetic(dict(zip(recipe.objectives, v_K, strict=True)), senses_K)


def _grid(recipe: Recipe, n: int) -> list[Vector]:
    """n even steps over the population; of a population that is a list, n of its directions."""
    population = recipe.preference.population(len(recipe.objectives))
    if isinstance(population, Grid | Fixed):
        every_VK = evaluation_grid(population, recipe.evaluation.directions)
        grid_UK = every_VK[np.linspace(0, len(every_VK) - 1, min(n, len(every_VK))).round().astype(int)]
    else:
        grid_UK = evaluation_grid(population, n)
    return [tuple(v_K) for v_K in (grid_UK.round(12) + 0.0).tolist()]


def ablated(recipe: Recipe) -> Iterator[tuple[str, Recipe, Mapping[str, Any]]]:
    """Each ablation that the recipe asks for: its name, its recipe, and the knobs that make it."""
    for name in recipe.compare.ablations:
        yield name, changed(recipe, ABLATIONS[name]), ABLATIONS[name]


def ablation_step(ablation: str, step: str) -> str:
    """What an ablation calls its own of one of the loop's steps."""
    return f"{ablation.lower().replace(' ', '-')}-{step}"
