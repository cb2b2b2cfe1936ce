"""What a run's ledgers say about a system: its cost, the objectives it read, the models needed to serve it."""

import json
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from dpalign.measure.summary import Cost, Curve, Machine, StageFacts
from dpalign.paper.direction import Population, draw_directions, rng_for
from dpalign.runs.ledger import LEDGER, TIMES, Ledger, read_ledger
from dpalign.runs.tables import leaves

OVERALL: Final = "overall score"
"""The score that ranks a data set's own preference pairs."""
CURVE: Final = "curve.json"
"""The file in which a training keeps its loss."""


class Made(NamedTuple):
    """A finished stage and its ledger."""

    folder: Path
    ledger: Ledger


def lineage(folders: Iterable[Path]) -> Iterator[Made]:
    """Yield these stages and all stages that they were made from, each once, inputs first."""
    seen: set[Path] = set()

    def visit(folder: Path) -> Iterator[Made]:
        if folder in seen or not (folder / LEDGER).is_file():
            return
        seen.add(folder)
        ledger = read_ledger(folder)
        for entry in ledger["inputs"].values():
            yield from visit(_stage_at(folder, entry["path"]))
        yield Made(folder, ledger)

    for folder in folders:
        yield from visit(folder.resolve())


def stage_facts(made: Made) -> StageFacts:
    """The counts of a stage's ledger."""
    counts, tokens = made.ledger["counts"], made.ledger["tokens"]
    return StageFacts(
        name=made.ledger["name"],
        seconds=made.ledger["seconds"],
        sampled=tokens["sampled"],
        scored=tokens["scored"],
        trained=tokens["trained"],
        rows_in=counts["in"],
        rows_out=counts["out"],
        filtered=counts["filtered"],
        warnings=tuple(made.ledger.get("warnings", ())),
    )


def curves(stages: Iterable[Made]) -> list[Curve]:
    """The loss curve of each training that kept one."""
    found = []
    for made in stages:
        path = made.folder / CURVE
        if path.is_file():
            values = json.loads(path.read_text(encoding="utf-8"))  # RL also keeps the reward and the divergence
            shown = {name: column for name, column in values.items() if name in Curve.model_fields}
            found.append(Curve(stage=made.ledger["name"], **shown))
    return found


def machine(run: Path) -> Machine:
    """Read where a run was made from its environment.json."""
    path = run / "environment.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return Machine(**{key: values[key] for key in Machine.model_fields if values.get(key) is not None})


def condition_of(folder: Path) -> str:
    """The condition of an evaluate folder: directions, plain, brief, best-of-n, ...; "" if there is none."""
    return str(read_ledger(folder)["knobs"].get("step.condition", "")) if (folder / LEDGER).is_file() else ""


def unasked_twin(folder: Path, others: Iterable[Path]) -> Path | None:
    """The plain evaluation of the same model, if a folder's system was asked in words to be brief; else None."""
    if condition_of(folder) != "brief":
        return None
    policy = read_ledger(folder)["inputs"].get("policy")
    for other in others:
        if policy and condition_of(other) == "plain" and read_ledger(other)["inputs"].get("policy") == policy:
            return other
    return None


def knobs_set(stages: Iterable[Made], recipe_text: str) -> tuple[str, ...]:
    """The knobs for which some stage used another value than the recipe's."""
    recipe = dict(leaves(tomllib.loads(recipe_text)))
    return tuple(
        sorted(
            {key for made in stages for key, value in made.ledger["knobs"].items() if recipe.get(key, value) != value}
        )
    )


def made_from(folder: Path) -> dict[str, Path]:
    """The stages that made an evaluate folder's system, and whose models a user of it must keep.

    These are its policy or a soup's experts. Best-of-n also needs the reward model, which chooses at inference. The
    evaluation's other inputs (reward model, judge, data) only measure the system.
    """
    if not (folder / LEDGER).is_file():
        return {}
    ledger, chooses = read_ledger(folder), condition_of(folder) == "best-of-n"
    return {
        name: _stage_at(folder, entry["path"])
        for name, entry in ledger["inputs"].items()
        if name == "policy" or name.startswith("expert-") or (name == "reward" and chooses)
    }


def _stage_at(folder: Path, path: str) -> Path:
    """Resolve an input of a stage: a name within its run, or a path."""
    return (folder.parent / path).resolve()


def cost(folders: Sequence[Path], answer_tokens: float) -> Cost:
    """The cost to make the systems of some evaluate folders; shared stages count once.

    Trained tokens include prompts; sampled and scored tokens are those of answers only. For original answers, which
    `annotate` scores, the run knows only their number. Each is assumed to be as long as SFT's mean answer.

    Args:
        answer_tokens: tokens of SFT's mean answer.
    """
    return _sum(list(lineage(stage for folder in folders for stage in made_from(folder).values())), answer_tokens)


def sweep_cost(folders: Sequence[Path], answer_tokens: float) -> Cost:
    """The cost to make all settings of a system and to choose among them.

    Includes the settings' tuning evaluations, and the reward model that chose. A judge's scores are left out: it never
    chooses.
    """
    evaluated = [Made(folder, read_ledger(folder)) for folder in folders if (folder / LEDGER).is_file()]
    roots = [stage for folder in folders for stage in made_from(folder).values()]
    roots += [_stage_at(one.folder, one.ledger["inputs"]["reward"]["path"]) for one in evaluated]
    return _sum([*lineage(roots), *evaluated], answer_tokens)


def _sum(made: Sequence[Made], answer_tokens: float) -> Cost:
    sampled, trained = (sum(one.ledger["tokens"][unit] for one in made) for unit in ("sampled", "trained"))
    read = sum(_scored_tokens(one, answer_tokens) for one in made)
    return Cost(
        sampled_tokens=sampled,
        scored_responses=sum(map(_scored_responses, made)),
        scored_tokens=round(read),
        trained_tokens=trained,
        total_tokens=round(sampled + read + trained),
        seconds=sum(one.ledger["seconds"] for one in made),
    )


def _scored_responses(made: Made) -> int:
    """The answers that a stage scored, without the judge's scores: it scores the answers that an evaluation keeps."""
    scored = made.ledger["tokens"]["scored"]
    return scored - made.ledger["counts"]["out"] if scored and "judge" in made.ledger["inputs"] else scored


def _scored_tokens(made: Made, answer_tokens: float) -> float:
    tokens, inputs = made.ledger["tokens"], made.ledger["inputs"]
    if not tokens["scored"]:
        return 0.0
    if "candidates" in inputs:
        return read_ledger(_stage_at(made.folder, inputs["candidates"]["path"]))["tokens"]["sampled"]
    return tokens["sampled"] or tokens["scored"] * answer_tokens


def objectives_read(
    folder: Path, objectives: Sequence[str], population: Callable[[Mapping[str, Any]], Population]
) -> list[str]:
    """The objectives that a system's training read: those that some direction or target of it weighed.

    Args:
        population: gives the population that a stage's knobs state.
    """
    found: set[str] = set()
    for _, ledger in lineage(made_from(folder).values()):
        knobs, inputs = ledger["knobs"], ledger["inputs"]
        if {"sft", "annotate"} <= inputs.keys():  # SteerLM trains on answers that state all their rewards
            found.update(objectives)
        elif {"rl.algorithm", "policy.grpo.beta"} & knobs.keys() or (
            {"candidates", "scores"} <= inputs.keys() and "preference.distribution" in knobs
        ):
            weight_NK = np.abs(draw_directions(population(knobs), 64, rng_for("objectives read")))
            found.update(objectives[k] for k in np.flatnonzero(weight_NK.max(axis=0) > 1e-9).tolist())
        elif "dpo.pairs" in knobs:
            found.add(OVERALL if knobs["dpo.pairs"] == "ratings" else objectives[0])
    return [name for name in (*objectives, OVERALL) if name in found]


class Footprint(NamedTuple):
    """What a user must keep to serve a system in all its directions."""

    models: int
    bytes: int | None
    """Bytes of the models' weights; None if a model is not a local folder."""
    switch_seconds: float | None
    """Time to switch from one direction to the next, if the evaluation measured it."""


def footprint(folder: Path) -> Footprint:
    """Measure the models that serve an evaluate folder's system."""
    sizes = [weight_bytes(stage) for stage in made_from(folder).values()]
    if not sizes and (folder / LEDGER).is_file():  # a checkpoint that the recipe names
        sizes = [_named_bytes(read_ledger(folder)["knobs"].get("evaluation.dpo"))]
    whole = None if None in sizes or not sizes else sum(size for size in sizes if size is not None)
    return Footprint(max(1, len(sizes)), whole, _switch_seconds(folder))


def _switch_seconds(folder: Path) -> float | None:
    """The mean time of a switch to another direction; None if none was timed."""
    if not (folder / TIMES).is_file():
        return None
    times: dict[str, float] = json.loads((folder / TIMES).read_text(encoding="utf-8")).get("switch_seconds", {})
    return sum(times.values()) / len(times) if times else None


def weight_bytes(stage: Path) -> int | None:
    """The bytes of a training stage's weights; None if it names a checkpoint that is not on this disk, or has none."""
    named = stage / "checkpoint.txt"
    if named.is_file():
        return _named_bytes(named.read_text(encoding="utf-8").strip())
    sizes = [file.stat().st_size for file in stage.rglob("*.safetensors")]
    return sum(sizes) if sizes else None


def _named_bytes(source: str | None) -> int | None:
    return weight_bytes(Path(source)) if source and Path(source).is_dir() else None
