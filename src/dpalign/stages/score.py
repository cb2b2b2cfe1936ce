"""Scoring: every answer on every head, one shard at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpalign.paper.objectives import by_name
from dpalign.rewards.golden import ONLY, golden_for, require_golden
from dpalign.rewards.scale import known_scales, read_scales
from dpalign.rows import CANDIDATES, PROMPTS, SCORES, Message, read_rows, read_table, shards
from dpalign.runs.folder import Tally
from dpalign.runs.hub import local_model
from dpalign.runs.shards import make_shards
from dpalign.stages.cost import Costs, Load
from dpalign.stages.pools import KEYS
from dpalign.stages.sample import counted, start_vllm
from dpalign.stages.shards import PART, Output, Row, Shards
from dpalign.stages.stage import Job, Step, model_read, scorer_read, stage
from dpalign.stages.training import checkpoint_of

if TYPE_CHECKING:
    from dpalign.paper.prompts import RewardInput
    from dpalign.recipe import Recipe
    from dpalign.rewards.knobs import Scale
    from dpalign.rewards.score import Array, Pair, Scorer


def _cost(costs: Costs, step: Step) -> Load:
    source = costs.steps[str(step.inputs["candidates"])]
    prompts, conditions, n = counted(costs, source)
    return costs.score(prompts, conditions * n, costs.of_step(source).sampling.shard)


def scored_by(recipe: "Recipe") -> dict[str, str]:
    """The steps that a scoring step reads beside the answers."""
    return {"reward": "reward", "data": "data"} | ({"annotate": "annotate"} if recipe.fits_scales else {})


@stage(
    reads=lambda r: (r.heads, r.reward.ensemble, *model_read(r), *scorer_read(r)),
    inputs=("reward", "candidates", "data"),
    takes="candidates",
    optional=("annotate",),
    cost=_cost,
)
def score(job: Job) -> None:
    """Score answers on every head."""
    make_shards(job, scoring)


def scoring(job: Job) -> "Shards[Scorer]":
    """The candidates in the shards in which they were drawn."""
    files, asked = shards(job.inputs["candidates"]), Asked(job.inputs["data"])
    open_models = partial(open_scorer, job.recipe, job.inputs["reward"], job.inputs.get("annotate"), alone=True)
    return scores_of(job, len(files), lambda index: asked.shown(list(read_rows(files[index], CANDIDATES))), open_models)


class Asked:
    """The prompts of a run as users wrote them; a candidate's own chat also has its condition line."""

    def __init__(self, data: Path) -> None:
        prompts = read_table(data / "prompts", PROMPTS, ["prompt_id", "messages"])
        self.messages = prompts["messages"]
        self.place = {name: i for i, name in enumerate(prompts["prompt_id"].to_pylist())}

    def shown(self, candidates: Sequence[Row]) -> list[Row]:
        """The candidates with the chats that rewards may see.

        Raises:
            ValueError: a prompt is not in the data.
        """
        names = list(dict.fromkeys(row["prompt_id"] for row in candidates))
        if strange := [name for name in names if name not in self.place]:
            raise ValueError(f"prompt {strange[0]} is none of the data's; give the data that it was sampled from")
        chats = self.messages.take([self.place[name] for name in names]).to_pylist()
        return shown_as(dict(zip(names, chats, strict=True)), candidates)


def shown_as(chats: Mapping[str, Sequence[Message]], rows: Sequence[Row]) -> list[Row]:
    """The rows, each with its prompt's chat from `chats` (by prompt id) in place of its own."""
    return [row | {"messages": chats[row["prompt_id"]]} for row in rows]


def scores_of(
    job: Job,
    count: int,
    part: Callable[[int], list[Row]],
    open_models: "Callable[[], Scorer]",
    folder: str = "",
    name: str = PART,
) -> "Shards[Scorer]":
    """A scoring stage as shards of answers.

    Args:
        folder, name: where the scores go, if not to the stage's own folder and file names.
    """

    def work(scorer: "Scorer", _: int, answers: Sequence[Row], tally: Tally) -> Iterator[Output]:
        yield folder, SCORES, scored_rows(scorer, answers)
        tally.add(len(answers), len(answers), scored=len(answers))

    return Shards(job, name, count, part, open_models, work)


def scored_rows(scorer: "Scorer", candidates: Sequence[Row]) -> list[Row]:
    """The SCORES rows of CANDIDATES rows."""
    reward_NH = scorer.score([(row["messages"], row["response"]) for row in candidates])
    return [
        {key: row[key] for key in KEYS} | {"rewards": reward_H}
        for row, reward_H in zip(candidates, reward_NH.tolist(), strict=True)
    ]


def open_scorer(
    recipe: "Recipe", reward_stage: Path, annotate: Path | None = None, *, alone: bool = False, raw: bool = False
) -> "Scorer":
    """The scorer of a run: all its rewards in points, or the one model that the reward stage trained.

    Args:
        annotate: the annotation, which holds the fitted scales; needed if any scale is fitted.
        alone: no policy shares the GPU, so vLLM may take all the memory that the recipe grants.
        raw: leave rewards raw if their scale is still to be fitted.

    Raises:
        ValueError: a folder without weights or scales; a reward with other heads; vLLM is chosen and cannot start.
    """
    if not recipe.rewards:
        return model_scorer(recipe, reward_stage, alone=alone)
    from dpalign.rewards.score import CombinedScorer, FunctionScorer

    scales = known_scales(recipe.rewards, recipe.reward_heads) if raw else scales_of(recipe, annotate)
    models = dict(_models(recipe, reward_stage, 1.0 if alone else 0.25))
    parts = [
        (_called(name), models.get(name) or FunctionScorer(reward.function, reward.own_heads(recipe.reward_heads)))
        for name, reward in recipe.rewards.items()
    ]
    return CombinedScorer(recipe.scored_heads, parts, scales)


def models_scorer(recipe: "Recipe", reward_stage: Path) -> "Scorer | None":
    """A scorer of a run's reward models, with raw rewards; None if all rewards are functions."""
    if not recipe.rewards:
        return model_scorer(recipe, reward_stage)
    from dpalign.rewards.score import CombinedScorer

    parts = [(name, scorer) for name, scorer in _models(recipe, reward_stage, 0.25)]
    heads = [f"{name}/{head}" for name, _ in parts for head in recipe.rewards[name].own_heads(recipe.reward_heads)]
    return CombinedScorer(heads, [(_called(name), one) for name, one in parts], [None] * len(heads)) if parts else None


def _called(name: str) -> str:
    return f"[rewards.{name}]"


def _models(recipe: "Recipe", reward_stage: Path, share: float) -> "Iterator[tuple[str, Scorer]]":
    """The rewards that are models, by name.

    Args:
        share: all models' share of the GPU memory that the recipe grants to vLLM.
    """
    models = {name: reward for name, reward in recipe.rewards.items() if reward.model or reward.trained}
    for name, reward in models.items():
        heads = reward.own_heads(recipe.reward_heads)
        trusted = bool(reward.model) and recipe.model.trust_remote_code
        form = reward.input if reward.model else recipe.reward.template
        source = local_model(reward.model) if reward.model else checkpoint_of(reward_stage).source
        scorer = _loaded(recipe, source, heads, form, share / len(models), trusted)
        require_heads(_called(name), scorer, heads, named=bool(reward.heads) or reward.trained)
        require_golden(_called(name), scorer, golden_for(reward_stage, name), recipe.model.dtype)
        if reward.model:
            require_golden(_called(name), scorer, golden_for(Path(source), ONLY), recipe.model.dtype)
        yield name, scorer


def scales_of(recipe: "Recipe", annotate: Path | None) -> list["Scale"]:
    """The run's map to points for each head.

    Raises:
        ValueError: a map is fitted, and no annotation is given.
    """
    known = known_scales(recipe.rewards, recipe.reward_heads)
    if None not in known:
        return [scale for scale in known if scale is not None]
    if annotate is None:
        lacking = next(name for name, one in recipe.rewards.items() if None in one.known_scales(recipe.reward_heads))
        raise ValueError(
            f"[rewards.{lacking}] has no scale, and its annotation holds what was fitted: give --annotate DIR, or "
            f"rewards.{lacking}.scale = [slope, offset]"
        )
    return read_scales(annotate, recipe.scored_heads)


def model_scorer(recipe: "Recipe", stage: Path, *, alone: bool = False) -> "Scorer":
    """A scorer on the model that a stage trained; [rewards.NAME] is ignored."""
    folder, heads = checkpoint_of(stage).source, recipe.reward_heads
    scorer = _loaded(recipe, folder, heads, recipe.reward.template, 1.0 if alone else 0.25, False)
    require_heads(folder, scorer, heads, named=True)
    require_golden(folder, scorer, golden_for(stage, ONLY), recipe.model.dtype)
    return scorer


def judge_scorer(recipe: "Recipe", stage: Path, annotate: Path | None = None) -> "Scorer":
    """The judge, in the columns of the run's rewards: its heads replace a reward model's heads of the same name.

    All rewards are in comparable units. Functions rate as they do for the run.
    """
    judge = model_scorer(recipe.judged(), stage)
    if not recipe.rewards:
        return NamedColumns(judge, recipe.scored_heads) if recipe.reward.ensemble else judge
    from dpalign.rewards.score import CombinedScorer, FunctionScorer

    parts: list[tuple[str, Scorer]] = []
    for name, reward in recipe.rewards.items():
        heads = reward.own_heads(recipe.reward_heads)
        rates = FunctionScorer(reward.function, heads) if reward.function else NamedColumns(judge, heads)
        parts.append((_called(name), rates))
    # The judge is trained as [reward] is, so the trained model's scales fit it. A given model has units of its own: in
    # its columns the judge's rewards are taken as points.
    same = {name for name, reward in recipe.rewards.items() if not reward.model}
    scales = zip(recipe.scored_heads, scales_of(recipe, annotate), strict=True)
    own = [scale if head.partition("/")[0] in same else None for head, scale in scales]
    return CombinedScorer(recipe.scored_heads, parts, own)


@dataclass(frozen=True)
class NamedColumns:
    """A scorer's rewards in the columns of other heads, matched by the heads' own names; NaN for a head it lacks."""

    scorer: "Scorer"
    heads: Sequence[str]

    def score(self, pairs: "Sequence[Pair]") -> "Array":
        """See `Scorer.score`."""
        return by_name(self.scorer.score(pairs), self.scorer.heads, self.heads).astype(np.float32)


def require_heads(source: str, scorer: "Scorer", heads: Sequence[str], *, named: bool) -> None:
    """Refuse a reward model whose heads are not the recipe's: rewards are stored in the recipe's order, without names.

    Args:
        named: the recipe names the heads; otherwise the head of a one-head model may have any name.

    Raises:
        ValueError: the heads differ; the message shows both lists.
    """
    if list(scorer.heads) == list(heads) or (not named and len(scorer.heads) == len(heads) == 1):
        return
    raise ValueError(
        f"{source}: this reward model has the heads {list(scorer.heads)}, and the recipe says {list(heads)}; set "
        "`heads` to the model's, in its order"
    )


def _loaded(
    recipe: "Recipe", source: str, heads: Sequence[str], form: "RewardInput", share: float, trust_remote_code: bool
) -> "Scorer":
    """A classifier on the engine that the recipe scores with.

    Args:
        share: of the GPU memory that the recipe grants to vLLM; a policy has half, and a judge may need some.
    """
    from dpalign.rewards.score import ModelScorer, VllmScorer

    if recipe.engines.scoring == "transformers":
        return ModelScorer(
            source,
            heads,
            template=form,
            batch_tokens=recipe.reward.score_tokens,
            dtype=recipe.model.dtype,
            share_prefix=recipe.reward.share_prefix,
            trust_remote_code=trust_remote_code,
        )
    vllm = start_vllm(recipe, source, share, trust_remote_code=trust_remote_code, classifies=True)
    return VllmScorer(vllm, heads, template=form)
