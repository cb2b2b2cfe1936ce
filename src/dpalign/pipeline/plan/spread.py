"""How many GPUs a step runs on, and the knob that would give it more.

A training runs in `processes`, a GPU each. Drawing and scoring run in one process, or in the actors of [cluster]; each
actor makes whole shards (docs/scale.md).
"""

import math
from dataclasses import dataclass
from typing import Final

from dpalign.recipe import Recipe
from dpalign.stages.cost import Load, processes
from dpalign.stages.stage import Step

EVEN: Final = 0.9
"""Share of the GPUs' time below which uneven shards count as idle GPUs."""


@dataclass(frozen=True)
class Spread:
    """How a step is spread over GPUs."""

    gpus: int
    """GPUs that work on it."""
    speed: float
    """How many times faster than on one GPU: less than `gpus` if some wait for the last shards."""
    cure: str = ""
    """Why GPUs are idle, and what to set."""


def gpus_used(recipe: Recipe) -> int:
    """The GPUs that a recipe uses at once."""
    cluster = recipe.cluster
    actors = math.ceil(cluster.actors * cluster.gpus) if cluster.address else 1
    return max(processes(recipe), actors, recipe.engines.tensor_parallel)


def spread(recipe: Recipe, step: Step, load: Load, count: int) -> Spread:
    """How a step with this load is spread over so many GPUs."""
    if count == 1 or not load.flops:
        return Spread(1, 1)
    if step.stage.several:
        return _trained(recipe, step, load, count)
    engines = recipe.engines
    used = [engine for engine, work in ((engines.sampling, load.sampling), (engines.scoring, load.scoring)) if work]
    each = min(engines.tensor_parallel if "vllm" in used else 1, count)
    if not recipe.cluster.address:
        cure = f'one process: set cluster.address = "local", cluster.actors = {count // each}, cluster.gpus = {each}.0'
        return Spread(each, each, cure if count > each else "")
    return _by_actors(recipe, step, load, each, count)


def _trained(recipe: Recipe, step: Step, load: Load, count: int) -> Spread:
    if load.flops and load.flops == load.measuring:
        what = "reward.freeze: one process reads" if recipe.trains_reward else "one process measures the rewards"
        return Spread(1, 1, f"{what}; no knob spreads it")
    gpus = min(processes(recipe), count)
    if gpus < count:
        rank = step.stage.trains(recipe).lora_rank if step.stage.trains else 0
        how = 'launcher = "torchrun"' if rank else 'launcher = "accelerate", launch.config = "fsdp2"'
        several = recipe.launcher in ("torchrun", "accelerate")
        set_ = f"processes = {count}" if several else f"{how}, processes = {count}"
        return Spread(gpus, gpus, f"{gpus} process{'es' if gpus > 1 else ''}: set {set_}")
    if load.measuring:
        return Spread(gpus, gpus, "all fit the same head first, and one measures held-out answers last: data.heldout")
    return Spread(gpus, gpus)


def _by_actors(recipe: Recipe, step: Step, load: Load, each: int, count: int) -> Spread:
    """A pool of actors, each with a whole shard at a time."""
    cluster = recipe.cluster
    if not cluster.gpus:
        cure = f"cluster.gpus is 0, which is refused where there are GPUs: set cluster.gpus = {each}.0"
        return Spread(each, each, cure)
    room = math.floor(count / cluster.gpus)
    actors = max(1, min(cluster.actors, room))
    shards = max(1, math.ceil(load.parts))
    working = min(actors, shards)
    gpus = min(count, max(1, math.ceil(working * min(cluster.gpus, each))))
    rounds = math.ceil(shards / actors)
    speed = min(max(1.0, load.parts / rounds), working) * gpus / working
    if cluster.gpus > each:
        cure = f"an actor reserves {cluster.gpus:g} GPUs and uses {each}: set cluster.gpus = {each}.0"
    elif actors < room:
        cure = f"{actors} actors, and room for {room}: set cluster.actors = {room}"
    elif speed < EVEN * count:
        cure = f"{shards} shard{'s' if shards > 1 else ''} for {actors} actors: "
        if step.stage.name == "annotate":
            cure += "of 4,096 answers, which is fixed"
        else:
            evaluated = load.sampling and load.scoring
            cure += f"set evaluation.shards = {actors}" if evaluated else "set a smaller sampling.shard"
    else:
        cure = ""
    return Spread(gpus, speed, cure)
