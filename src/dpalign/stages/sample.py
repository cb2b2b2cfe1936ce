"""Sampling: step 1 of section 2.2, before the scoring; under directions, reward targets or hints, or plainly."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from dpalign.chat import with_system_line
from dpalign.engines.engine import Engine, Request
from dpalign.paper.direction import rng_for
from dpalign.rows import CANDIDATES, HALVES, PROMPTS, Message, read_rows
from dpalign.runs.folder import Tally
from dpalign.runs.shards import make_shards
from dpalign.runs.tables import Table
from dpalign.stages.cost import Costs
from dpalign.stages.pools import annotation
from dpalign.stages.preference import directions_of, line
from dpalign.stages.shards import PART, Output, Row, Shards, parts_of
from dpalign.stages.stage import Job, Step, model_read, objectives_read, sampler_read, stage
from dpalign.stages.steerlm import condition_line, reward_targets
from dpalign.stages.training import Checkpoint, checkpoint_of
from dpalign.train.contract import require_same_dial

if TYPE_CHECKING:
    from dpalign.engines.tokens import PromptReader
    from dpalign.engines.vllm_engine import Vllm
    from dpalign.recipe import Recipe

Array = NDArray[np.float64]

FIRST_QUANTILE: Final = 0.9
"""The helpfulness of a target at t = 1, as a quantile among annotated answers of similar verbosity."""


class Sampling(Table):
    """Rejection sampling (section 3.1)."""

    n: int = Field(16, ge=1)
    """Answers for each direction."""
    first: int = Field(80, ge=1)
    """Answers to a prompt at t=1, over diverse reward targets."""
    first_targets: int = Field(16, ge=1)
    """Distinct reward targets among them (paper silent: "diverse reward combinations"). If `steerlm.template` can tell
    fewer apart in the annotated answers, these share the answers."""
    temperature: float = Field(1.0, ge=0)
    """True sampling: no top-k, no top-p."""
    prompt_tokens: int = Field(1024, ge=1)
    """Longest prompt in tokens; a longer one is left out and counted (paper silent)."""
    max_new_tokens: int = Field(2048, ge=1)
    """Longest answer in tokens (paper silent; the released policy's)."""
    prompts: int = Field(0, ge=0)
    """Prompts in an iteration, the first by hash; 0 takes the whole half, as the paper does."""
    rows: int = Field(256, ge=1)
    """Answers decoded side by side."""
    shard: int = Field(256, ge=1)
    """Prompts in a shard; a killed run resumes at a shard."""

    @model_validator(mode="after")
    def _each_target_has_an_answer(self) -> Self:
        if self.first < self.first_targets:
            raise ValueError(
                f"first is {self.first} answers, too few for first_targets {self.first_targets}; give at least one a "
                "target"
            )
        return self


def counted(costs: Costs, step: Step) -> tuple[float, float, float]:
    """A sample step's number of prompts, of conditions for each, and of answers under each condition."""
    recipe = costs.of_step(step)
    settings = recipe.sampling
    prompts = costs.sizes.prompts * (2 if step.half == "both" else 1)
    prompts = min(prompts, settings.prompts or prompts)
    match step.condition:
        case "targets":
            return prompts, settings.first_targets, settings.first / settings.first_targets
        case "plain":
            return prompts, 1, settings.n
        case "hints":
            return prompts, len(recipe.data.hints), settings.n
        case _:
            return prompts, recipe.preference.directions, settings.n


@stage(
    reads=lambda r: (r.seed, r.sampling.temperature, r.sampling.prompts, *sampler_read(r), *model_read(r)),
    reads_under={
        "directions": lambda r: (r.sampling.n, r.preference, r.objectives),
        "targets": lambda r: (
            *(r.sampling.first, r.sampling.first_targets, r.steerlm.template, r.preference.levels),
            *objectives_read(r),
        ),
        "plain": lambda r: (r.sampling.n,),
        "hints": lambda r: (r.sampling.n, r.data.hints),
    },
    inputs=("policy", "data"),
    optional=("annotate",),
    asks={"t": (), "half": (*HALVES, "both"), "condition": ("directions", "targets", "plain", "hints")},
    cost=lambda costs, step: costs.draw(*counted(costs, step), shard=costs.of_step(step).sampling.shard),
)
def sample(job: Job) -> None:
    """Draw answers from a policy: under reward targets (t = 1), under directions, under hints, or plainly."""
    make_shards(job, drawing)


@dataclass(frozen=True)
class Condition:
    """What answers are conditioned on: a direction, a reward target, or nothing; as numbers and as a system line.

    Answers under a hint count as plain answers.
    """

    kind: str
    value: tuple[float, ...]
    line: str | None
    hint: str = ""
    """Text after the user's message."""


PLAIN = Condition("plain", (), None)


def asked_policy(job: Job) -> Checkpoint:
    """The policy that a stage samples. Under directions its dial must be the recipe's.

    Raises:
        ValueError: a folder without weights, or a policy that was trained with another dial.
    """
    policy = checkpoint_of(job.inputs["policy"])
    if job.condition == "directions":
        require_same_dial(Path(policy.source), job.recipe)
    return policy


def open_engine(recipe: "Recipe", policy: Checkpoint, *, alone: bool = False) -> Engine:
    """The engine that the recipe samples with.

    Args:
        alone: no reward model shares the GPU, so vLLM may take all the memory that the recipe grants.

    Raises:
        ValueError: vLLM is asked for and cannot start.
    """
    model = recipe.model
    match recipe.engines.sampling:
        case "transformers":
            from dpalign.engines.transformers_engine import TransformersEngine

            return TransformersEngine(
                policy.source,
                model.own_chat,
                policy.style,
                rows=recipe.sampling.rows,
                dtype=model.dtype,
                place=model.dial_place,
                trust_remote_code=model.trust_remote_code,
            )
        case "vllm":
            from dpalign.engines.vllm_engine import VllmEngine

            share = 1.0 if alone else 0.5
            vllm = start_vllm(recipe, policy.source, share, trust_remote_code=model.trust_remote_code)
            return VllmEngine(vllm, model.own_chat, policy.style, model.dial_place)


def start_vllm(
    recipe: "Recipe", folder: str, share: float, *, trust_remote_code: bool, classifies: bool = False
) -> "Vllm":
    """Start vLLM on a model, with the recipe's limits."""
    from dpalign.engines.vllm_engine import Vllm

    return Vllm(
        folder,
        recipe.engines,
        rows=recipe.sampling.rows,
        prompt_tokens=recipe.sampling.prompt_tokens,
        max_new_tokens=recipe.sampling.max_new_tokens,
        share=share,
        dtype=recipe.model.dtype,
        trust_remote_code=trust_remote_code,
        classifies=classifies,
    )


def open_reader(recipe: "Recipe", policy: Checkpoint) -> "PromptReader":
    """A reader of prompts as `open_engine`'s engine reads them, without the model's weights."""
    from dpalign.engines.tokens import PromptReader

    model = recipe.model
    return PromptReader.load(
        policy.source,
        model.own_chat,
        policy.style,
        place=model.dial_place,
        trust_remote_code=model.trust_remote_code,
    )


def drawing(job: Job) -> Shards[Engine]:
    """A sampling stage as shards of prompts."""
    recipe, settings, t = job.recipe, job.recipe.sampling, job.t
    policy = asked_policy(job)
    halves = HALVES if job.half == "both" else (job.half,)
    prompts = [p for p in read_rows(job.inputs["data"] / "prompts", PROMPTS) if p["split"] in halves]
    prompts = within_limit(job, prompts, open_reader(recipe, policy))
    parts = parts_of(_own_prompts(prompts, settings.prompts, recipe.seed, t), settings.shard)
    match job.condition:
        case "targets":
            fixed = target_conditions(job, settings.first_targets, FIRST_QUANTILE)
            n = shares(settings.first, len(fixed))
        case "plain":
            fixed, n = [PLAIN], [settings.n]
        case "hints":
            fixed = [replace(PLAIN, hint=hint) for hint in recipe.data.hints]
            n = [settings.n] * len(fixed)
        case _:
            fixed = []  # each prompt's own directions
            n = [settings.n] * recipe.preference.directions

    def work(engine: Engine, _: int, prompts: Sequence[Row], tally: Tally) -> Iterator[Output]:
        asked = [(p, fixed or direction_conditions(recipe, p["prompt_id"], t)) for p in prompts]
        key = (recipe.seed, "sample", t)
        yield "", CANDIDATES, draw(engine, recipe, asked, n, settings.temperature, key=key, t=t, tally=tally)

    models = partial(open_engine, recipe, policy, alone=True)
    return Shards(job, PART, len(parts), parts.__getitem__, models, work, lambda _: dict(enumerate(n)))


def within_limit(job: Job, prompts: Sequence[dict[str, Any]], reader: "PromptReader") -> list[dict[str, Any]]:
    """The prompts of at most `sampling.prompt_tokens` tokens; the job's tally counts the longer ones.

    Raises:
        ValueError: all prompts are longer.
    """
    limit = job.recipe.sampling.prompt_tokens
    kept = [prompt for prompt in prompts if reader.prompt_tokens(prompt["messages"]) <= limit]
    if not kept:
        raise ValueError(f"none of {len(prompts)} prompts is at most {limit} tokens long; raise sampling.prompt_tokens")
    if long := len(prompts) - len(kept):
        job.work.tally.add(long, filtered={"prompt too long": long})
    return kept


def _own_prompts(prompts: Sequence[dict[str, Any]], count: int, seed: int, t: int) -> list[dict[str, Any]]:
    """The prompts of an iteration: the first `count` in an order keyed by t; 0 takes all."""
    order = sorted(prompts, key=lambda prompt: rng_for(seed, "prompts", t, prompt["prompt_id"]).random())
    return order[:count] if count else order


def direction_conditions(recipe: "Recipe", prompt_id: str, t: int) -> list[Condition]:
    """A prompt's directions in iteration t."""
    v_VK = directions_of(recipe.preference, len(recipe.objectives), recipe.seed, t, prompt_id)
    return [Condition("direction", tuple(v_K), line(recipe, v_K)) for v_K in v_VK.tolist()]


def target_conditions(job: Job, count: int, quantile: float) -> list[Condition]:
    """`count` reward targets from the annotated answers, or all distinct ones if there are fewer, with a log line."""
    recipe = job.recipe
    *_, reward_NK = annotation(job.inputs["data"], job.inputs["annotate"], recipe, "both")
    targets = reward_targets(recipe, reward_NK, count, quantile).tolist()
    if len(targets) < count:
        job.work.run.log(
            f"{job.out.stem}: {len(targets)} distinct reward targets, not {count}: condition lines of "
            f"{recipe.steerlm.template!r} cannot tell more annotated answers apart"
        )
    return [Condition("target", tuple(r_K), condition_line(recipe, r_K)) for r_K in targets]


def shares(answers: int, targets: int) -> list[int]:
    """The number of answers for each target, as even as possible; the first targets may have one more."""
    return [answers // targets + (target < answers % targets) for target in range(targets)]


def draw(
    engine: Engine,
    recipe: "Recipe",
    asked: Sequence[tuple[dict[str, Any], Sequence[Condition]]],
    n: int | Sequence[int],
    temperature: float,
    *,
    key: tuple[int | str, ...],
    t: int,
    tally: Tally,
    first: int = 0,
) -> Iterator[dict[str, Any]]:
    """CANDIDATES rows: n answers for each condition of each prompt, grouped by prompt.

    Args:
        n: one number for all conditions, or one for each.
        first: the index of the first condition, if a stage draws conditions in several calls.
    """
    keyed = [(p, c, condition) for p, conditions in asked for c, condition in enumerate(conditions, start=first)]
    requests = [
        Request(tuple(_chat(recipe, p, c)), n if isinstance(n, int) else n[i - first], (*key, p["prompt_id"], i))
        for p, i, c in keyed
    ]
    answers = engine.sample(requests, temperature=temperature, max_new_tokens=recipe.sampling.max_new_tokens)
    for (prompt, index, condition), request, drawn in zip(keyed, requests, answers, strict=True):
        tally.rows_in += request.n
        for sample_index, answer in enumerate(drawn):
            tally.rows_out += 1
            tally.sampled += answer.tokens
            yield {
                "prompt_id": prompt["prompt_id"],
                "t": t,
                "condition_index": index,
                "sample": sample_index,
                "condition_kind": condition.kind,
                "condition": condition.value,
                "messages": request.messages,
                "response": answer.text,
                "tokens": answer.tokens,
                "finished": answer.whole,
            }


def _chat(recipe: "Recipe", prompt: dict[str, Any], condition: Condition) -> list[Message]:
    messages: list[Message] = prompt["messages"]
    if condition.hint:
        *earlier, last = messages
        messages = [*earlier, {**last, "content": f"{last['content']}\n{condition.hint}"}]
    return messages if condition.line is None else with_system_line(messages, condition.line, recipe.model.chat)
