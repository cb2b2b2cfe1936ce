"""The reward model (sections 2.1 and 3.1) and the judge: their training and their quality on held-out prompts.

Shapes: N answers, H heads, K objectives, F features.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from dpalign.data.ratings import labels_for, require_labels
from dpalign.measure.baseline import ridge_cross_validated, surface_features
from dpalign.measure.quality import quality
from dpalign.paper.ensemble import masked_labels, spread_of, with_members
from dpalign.paper.objectives import Objective, all_known, by_name, head_indices, own_name
from dpalign.rewards.golden import golden_of, write_golden
from dpalign.rewards.knobs import IDENTITY
from dpalign.rewards.scale import fit, to_points
from dpalign.rows import HEADS, PAIRS, RATED, read_rows
from dpalign.runs.environment import expanded, first_process
from dpalign.runs.folder import write_json
from dpalign.runs.hub import local_model
from dpalign.runs.tables import DataName, Table
from dpalign.stages.cost import Costs, Load, reward_models
from dpalign.stages.score import model_scorer, models_scorer
from dpalign.stages.stage import Job, Step, model_read, objectives_read, on_transformers, stage
from dpalign.stages.training import KEPT_MODEL, context_of, record_training
from dpalign.train.knobs import Training

if TYPE_CHECKING:
    from dpalign.recipe import Recipe
    from dpalign.rewards.score import Scorer
    from dpalign.train.trainer import Outcome

Array = NDArray[np.float64]

RESAMPLES: Final = 1000
"""Resamples of the held-out prompts, for the intervals of the reward model's quality."""
FEW_PAIRS: Final = 30
"""A head with fewer pairs of held-out answers gets no warning."""
HEAD_ROWS: Final = 2048
"""Rows of the head's first fit: `rewards.model.PROBE_ROWS`, which a plan cannot import because it needs torch."""


class Reward(Table):
    """The multi-objective reward model (sections 2.1 and 3.1)."""

    gone = {  # noqa: RUF012  # a class variable of the base
        "checkpoint": "is gone: a finished reward has a table of its own, such as\n"
        '[rewards.mine]\nmodel = "FOLDER or hub name"  # or function = "module:function"'
    }

    template: Literal["dpa-v1", "world-v1"] = "dpa-v1"
    """The text it reads; the default is the released model's."""
    lm_loss: float = Field(1.0, ge=0)
    """Weight of the language modelling loss (section 3.1 has one; its weight is unpublished)."""
    normalize: Literal["labels", "rows", "heads"] = "labels"
    """How the squared errors of Eq. 1 average: over observed labels, first within rows, or first within heads."""
    bradley_terry: float = Field(0.0, ge=0)
    """Weight of a Bradley-Terry term on preference pairs, by a further head that the folder does not keep (not in the
    paper; SMORM, arXiv 2507.07375). Pairs are the data's own, and rated answers to one prompt with different values of
    the first objective."""
    layers: int = Field(0, ge=0)
    """Keep only the backbone's first layers; 0 keeps all (not in the paper). States of the middle layers often tell
    more about an answer than the last, and cost less; best with `freeze`, or `lm_loss` 0."""
    freeze: bool = False
    """Fit only the heads, by ridge regression on the last hidden states of the unchanged backbone (not in the paper).
    The penalty is chosen on prompts that a fit has not seen. Of `training` only `context` counts."""
    ensemble: int = Field(0, ge=0, le=64)
    """Members of an ensemble (not in the paper; 8 suffice). Each has a copy of every head, learned from a random half
    of the prompts. All share one backbone. Their spread shows what the ratings leave open: see `selection.caution`."""
    probe: DataName = ""
    """A file of heads that `freeze` fitted on this backbone: a run's reward/probe.safetensors. They are used unchanged,
    so no ratings are needed (not in the paper)."""
    judge_probe: DataName = ""
    """The same for the judge, from ratings of other prompts."""
    training: Training = Training(epochs=1.0, packing=False, micro_batch=8)
    """Its training: learning rate, epochs and batch (paper silent)."""
    score_tokens: int = Field(16_384, ge=1)
    """Tokens a scoring batch, padding included."""
    share_prefix: bool = True
    """Read a prompt once for all its answers, if the model allows it. Scores differ only by rounding, so a change
    redoes nothing."""
    pairwise: str = ""
    """A local file of rows {prompt, chosen, rejected[, subset]} in RewardBench's form, to count how often the first
    objective rates the chosen answer higher; "" for none (not in the paper). With lists of answers, as in RewardBench
    2, each chosen answer must beat all rejected ones."""

    @model_validator(mode="after")
    def _a_finished_model_is_named_once(self) -> Self:
        if self.training.checkpoint:
            raise ValueError(
                f"training.checkpoint is {self.training.checkpoint!r}: a finished reward model is named in a table "
                "[rewards.NAME]"
            )
        return self

    @model_validator(mode="after")
    def _a_probe_reads_a_backbone_as_it_is(self) -> Self:
        if (self.probe or self.judge_probe) and not self.freeze:
            raise ValueError("probe needs the backbone that it was fitted on, as it is; set freeze = true")
        if self.judge_probe and not self.probe:
            raise ValueError("judge_probe stands beside a probe; name one in probe, or leave both out")
        return self

    @model_validator(mode="after")
    def _a_preference_needs_a_backbone_to_train(self) -> Self:
        if self.freeze and self.bradley_terry:
            raise ValueError(
                f"bradley_terry is {self.bradley_terry:g} and freeze is true: the term teaches the backbone, which is "
                "frozen; set one of the two"
            )
        return self


def _reads(r: "Recipe") -> tuple[object, ...]:
    return (
        *(r.seed, r.reward.template, r.reward.lm_loss, r.reward.normalize, r.reward.training),
        *(r.reward.bradley_terry, r.reward.layers, r.reward.freeze, r.reward.ensemble),
        *(r.reward.score_tokens, r.model.base, r.data.world, *model_read(r), *objectives_read(r)),
    )


def _measure_tables(r: "Recipe") -> tuple[str, ...]:
    """The tables that only measure the model. With a Bradley-Terry term the first objective also makes its pairs."""
    return () if r.reward.bradley_terry else ("objectives", "rewards")


def _cost(costs: Costs, step: Step, rows: float, *, trained: bool, models: int) -> Load:
    """A training on rated rows, or a probe that reads each row once; then the measurement on held-out prompts.

    Args:
        trained: whether a model is trained at all.
        models: the number of measured models.
    """
    if not costs.recipe.data.rated:  # finished rewards and probes, with no ratings to measure them on
        return Load()
    each = costs.sizes.rated
    load = costs.score(_held_out(costs) / each, each, models=models)
    alone = load.scoring
    if trained and costs.recipe.reward.freeze:
        load += costs.score(rows, 1.0, models=1)
        alone = load.scoring
    elif trained:
        head = costs.score(min(rows, HEAD_ROWS), 1.0, models=1)
        load += costs.train(step, rows, costs.row) + replace(head, fitting=head.scoring)
    return replace(load, measuring=alone)


def _rated(costs: Costs) -> float:
    """The number of rated answers that train the reward model."""
    data, answers = costs.recipe.data, 2 * costs.sizes.prompts * costs.sizes.rated + costs.sizes.others
    return answers * (1 - data.judge) if data.judge_takes == "ratings" else answers


def _judged(costs: Costs) -> float:
    """The number of rated answers that train the judge."""
    share = costs.recipe.data.judge
    return share / (1 - share) * _rated(costs)


def _held_out(costs: Costs) -> float:
    """The number of rated answers that measure the model."""
    share = costs.recipe.data.heldout
    return share / (1 - share) * _rated(costs)


@stage(
    reads=lambda r: (*_reads(r), r.reward.probe),
    inputs=("data",),
    optional=("base",),
    several=True,
    trains=lambda r: r.reward.training if r.trains_reward else Training(checkpoint="given"),
    measure_tables=_measure_tables,
    cost=lambda costs, step: _cost(
        costs, step, _rated(costs), trained=costs.recipe.learns_rewards, models=reward_models(costs.recipe)
    ),
)
def reward(job: Job) -> None:
    """Train the multi-objective reward model; load all reward models, and measure them on held-out prompts."""
    recipe = on_transformers(job.recipe)  # training holds the GPU, and few rows are scored
    if recipe.trains_reward:
        _train(job, "train", recipe.seed)
    if not first_process():  # the other training processes are done
        return
    scorer = models_scorer(recipe, job.out)
    write_golden(job.out, {} if scorer is None else golden_of(scorer, recipe.model.dtype))
    # Python functions are not measured: they are rules, and were tried before the run began.
    if scorer is not None and (job.inputs["data"] / "heldout").exists():
        figures = measure(recipe, scorer, job.inputs["data"])
        write_json(job.out / "quality.json", figures)
        _warn(job, figures)


def no_better_than_chance(figures: Mapping[str, Any]) -> dict[str, float]:
    """Heads that order at most half of the pairs of held-out answers as their labels do, with the share of pairs."""
    shares = {}
    for head, measured in figures["heads"].items():
        accuracy = measured["within_prompt_accuracy"]
        if measured["pairs"] >= FEW_PAIRS and accuracy is not None and accuracy["value"] <= 0.5:
            shares[head] = accuracy["value"]
    return shares


def _warn(job: Job, figures: Mapping[str, Any]) -> None:
    if shares := no_better_than_chance(figures):
        said = ", ".join(f"{head} ({share:.0%})" for head, share in shares.items())
        job.warn(
            f"no more than half of the pairs of held-out answers are in the order of their labels by {said}; a trained "
            "model has learned too little; of a given one, look at its `input` and the order of its heads"
        )


@stage(
    reads=lambda r: (*_reads(r), r.reward.judge_probe),
    inputs=("data",),
    optional=("base",),
    several=True,
    trains=lambda r: r.reward.training,
    measure_tables=_measure_tables,
    cost=lambda costs, step: _cost(costs, step, _judged(costs), trained=not costs.recipe.reward.judge_probe, models=1),
)
def judge(job: Job) -> None:
    """Train a second reward model on disjoint prompts: it judges and never selects."""
    recipe = on_transformers(job.recipe).judged()
    _train(job, "judge", recipe.seed + 1)
    if first_process() and (job.inputs["data"] / "heldout").exists():
        figures = measure(recipe, model_scorer(recipe, job.out), job.inputs["data"])
        write_json(job.out / "quality.json", figures)
        _warn(job, figures)


def _train(job: Job, part: str, seed: int) -> None:
    _require_labels(job, part)
    if not (job.out / KEPT_MODEL).is_file():
        record_training(job, lambda: _fit(job, part, seed))


def _require_labels(job: Job, part: str) -> None:
    recipe = job.recipe
    if not (recipe.reward.probe if part == "train" else recipe.reward.judge_probe):
        require_labels(_labelled(job, part), _objectives(recipe, part), recipe.heads, part)


def _objectives(recipe: "Recipe", part: str) -> tuple[Objective, ...]:
    """The objectives, with only the heads of the trained model."""
    return recipe.trained_objectives if part == "train" else recipe.judged().objective_list


def _fit(job: Job, part: str, seed: int) -> "Outcome":
    from transformers import AutoTokenizer

    from dpalign.engines.tokens import spare_token
    from dpalign.rewards.inputs import template_for
    from dpalign.rewards.model import BradleyTerry, given_reward_model, probe_reward_model, train_reward_model

    recipe, knobs = job.recipe, job.recipe.reward
    members = knobs.ensemble if part == "train" else 0
    heads = with_members(recipe.heads, members)
    knob = "probe" if part == "train" else "judge_probe"
    given: str = getattr(knobs, knob)
    start = str(job.inputs["base"] / "model") if "base" in job.inputs else local_model(recipe.model.source)
    tokenizer = AutoTokenizer.from_pretrained(start, trust_remote_code=recipe.model.trust_remote_code)
    tokenizer.pad_token = spare_token(tokenizer)
    tokenizer.chat_template = template_for(tokenizer, knobs.template)
    context = context_of(job, start, knobs.training, tokenizer, seed)
    if given:
        file = Path(expanded(f"reward.{knob}", given))
        return given_reward_model(context, file, heads, template=knobs.template, layers=knobs.layers)
    rated = (
        row | {"labels": masked_labels(labels_for(row["labels"], recipe.heads), row["prompt_id"], members, seed)}
        for row in _labelled(job, part)
    )
    if knobs.freeze:
        return probe_reward_model(context, rated, heads, template=knobs.template, layers=knobs.layers)
    preference = None
    if knobs.bradley_terry:
        own = job.inputs["data"] / "pairs"
        pairs = list(read_rows(own, PAIRS)) if part == "train" and own.exists() else []  # the judge has none
        first = head_indices(_objectives(recipe, part)[0], recipe.heads)
        preference = BradleyTerry(knobs.bradley_terry, first, pairs)
    return train_reward_model(
        context,
        rated,
        heads,
        template=knobs.template,
        lm_loss=knobs.lm_loss,
        normalize=knobs.normalize,
        layers=knobs.layers,
        preference=preference,
    )


def _labelled(job: Job, part: str) -> Iterator[dict[str, Any]]:
    return (row for row in read_rows(job.inputs["data"] / part, RATED) if row["labels"])


def measure(recipe: "Recipe", scorer: "Scorer", data: Path) -> dict[str, Any]:
    """The quality on held-out prompts: heads and objectives against ratings, and in the world against the truth.

    Rewards are compared with labels of the same head name; heads without labels are left out.
    """
    rows = list(read_rows(data / "heldout", RATED))
    answers = [(row["messages"], row["response"]) for row in rows]
    heads = scorer.heads
    own = [own_name(head) for head in heads]
    label_NH = np.array([labels_for(row["labels"], own) for row in rows], dtype=np.float64).reshape(-1, len(heads))
    predicted_NH = scaled(recipe, scorer.score(answers).astype(np.float64), label_NH, heads)
    objectives = objectives_of(recipe, heads)
    names = [objective.name for objective in objectives]
    figures: dict[str, Any] = _quality(recipe, rows, predicted_NH, label_NH, heads)
    read_NK, rated_NK = means_of(predicted_NH, heads, objectives), means_of(label_NH, heads, objectives)
    figures["objectives"] = _quality(recipe, rows, read_NK, rated_NK, names)["heads"]
    figures["baseline"] = surface_baseline(recipe, rows, rated_NK, names)
    spread_NK = spread_of(predicted_NH, heads, objectives)
    if spread_NK is not None:  # is the error larger where the members disagree?
        figures["spread"] = _quality(recipe, rows, spread_NK, np.abs(read_NK - rated_NK), names)["heads"]
    if recipe.data.world and all_known(objectives, heads, HEADS):
        from dpalign.world.truth import score as true_score

        true_NH = by_name(
            true_score([asked[-1]["content"] for asked, _ in answers], [a for _, a in answers]), HEADS, heads
        )
        truth_NK = means_of(true_NH, heads, objectives)
        figures["truth"] = _quality(recipe, rows, read_NK, truth_NK, names)["heads"]
        if spread_NK is not None:
            figures["spread_truth"] = _quality(recipe, rows, spread_NK, np.abs(read_NK - truth_NK), names)["heads"]
    return figures


def objectives_of(recipe: "Recipe", heads: Sequence[str]) -> list[Objective]:
    """The objectives that read only these heads."""
    read = [Objective(o.name, recipe.heads_read(o)) if recipe.rewards else o for o in recipe.objective_list]
    return [objective for objective in read if not recipe.rewards or {*objective.heads} <= {*heads}]


def scaled(recipe: "Recipe", reward_NH: Array, label_NH: Array, heads: Sequence[str]) -> Array:
    """Rewards in points: those of labelled heads in a model's own units are scaled by a fit to these answers."""
    scales = [IDENTITY] * reward_NH.shape[1]
    for h, head in enumerate(heads):
        reward = recipe.rewards.get(head.partition("/")[0])
        if reward is not None and not reward.in_points and not np.isnan(label_NH[:, h]).all():
            with suppress(ValueError):  # equal rewards have no figures in any units
                scales[h] = fit(reward_NH[:, h])
    return to_points(reward_NH, scales)


def _quality(
    recipe: "Recipe", rows: Sequence[dict[str, Any]], predicted_NH: Array, label_NH: Array, names: Sequence[str]
) -> dict[str, Any]:
    """`Quality.to_json` of the columns with labels."""
    labelled: list[int] = np.flatnonzero(~np.isnan(label_NH).all(axis=0)).tolist()
    return quality(
        predicted_NH[:, labelled],
        label_NH[:, labelled],
        [names[column] for column in labelled],
        [row["prompt_id"] for row in rows],
        [len(row["response"]) for row in rows],
        seed=recipe.seed,
        resamples=RESAMPLES,
    ).to_json()


def means_of(reward_NH: Array, heads: Sequence[str], objectives: Sequence[Objective]) -> Array:
    """The means of the objectives' heads, NaN where a label is missing: (N, K)."""
    columns = [reward_NH[:, list(head_indices(o, heads))].mean(axis=1) for o in objectives]
    return np.stack(columns, axis=1) if columns else np.empty((len(reward_NH), 0))


def surface_baseline(
    recipe: "Recipe", rows: Sequence[dict[str, Any]], label_NK: Array, names: Sequence[str]
) -> dict[str, Any]:
    """The quality of ridge regression on length and punctuation on the same rows, cross-validated by prompt.

    Empty if fewer than five prompts are held out. An objective with too few labels in a fold is left out.
    """
    groups = [row["prompt_id"] for row in rows]
    if len(set(groups)) < 5 or not names:
        return {}
    feature_NF = np.stack([surface_features(row["messages"][-1]["content"], row["response"]) for row in rows])
    predicted_NK = ridge_cross_validated(feature_NF, label_NK, groups)
    usable = [k for k in range(len(names)) if not np.isnan(predicted_NK[~np.isnan(label_NK[:, k]), k]).any()]
    by_objective: dict[str, Any] = _quality(
        recipe, rows, predicted_NK[:, usable], label_NK[:, usable], [names[k] for k in usable]
    )["heads"]
    return by_objective
