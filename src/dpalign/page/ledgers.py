"""What the ledgers of a run tell of a system: what it took to make, what it read, what must be kept to serve it."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpalign.paper.direction import draw_directions, rng_for
from dpalign.run.ledger import LEDGER, TIMES, Ledger, read_ledger

OVERALL = "overall score"
"""What a data set's own preference pairs are ranked by."""


class Made(NamedTuple):
    """A finished stage among those that a system was made by."""

    folder: Path
    ledger: Ledger


def lineage(folders: Iterable[Path]) -> Iterator[Made]:
    """These stages and all that they were made from, each once, the earliest first."""
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


def made_from(folder: Path) -> dict[str, Path]:
    """The stages that made what an evaluate folder evaluated, and that a user of it must keep.

    Its policy, or a soup's experts; for best-of-n the reward model too, which chooses at inference. What else the
    evaluation read (reward model, judge, data) served to measure it alone.
    """
    if not (folder / LEDGER).is_file():
        return {}
    ledger = read_ledger(folder)
    chooses = ledger["knobs"].get("step.condition") == "best-of-n"
    return {
        name: _stage_at(folder, entry["path"])
        for name, entry in ledger["inputs"].items()
        if name == "policy" or name.startswith("expert-") or (name == "reward" and chooses)
    }


def _stage_at(folder: Path, path: str) -> Path:
    """Where the input of a stage lies: a name within its run, or a path."""
    return (folder.parent / path).resolve()


def cost(folders: Sequence[Path], answer_tokens: float) -> dict[str, float]:
    """What the systems of some evaluate folders took to make, stages that they share counted once.

    Trained tokens include prompts; sampled and scored ones are those of answers alone. Of original answers, which
    `annotate` scores, the run counts the number alone: each is taken to be as long as SFT's mean answer.

    Args:
        answer_tokens: of SFT's mean answer.
    """
    return _sum(list(lineage(stage for folder in folders for stage in made_from(folder).values())), answer_tokens)


def sweep_cost(folders: Sequence[Path], answer_tokens: float) -> dict[str, float]:
    """What it took to make all settings of a system and to choose among them: their tuning evaluations included,
    and the reward model by which it was chosen."""
    evaluated = [Made(folder, read_ledger(folder)) for folder in folders if (folder / LEDGER).is_file()]
    roots = [stage for folder in folders for stage in made_from(folder).values()]
    roots += [_stage_at(one.folder, one.ledger["inputs"]["reward"]["path"]) for one in evaluated]
    return _sum([*lineage(roots), *evaluated], answer_tokens)


def _sum(made: Sequence[Made], answer_tokens: float) -> dict[str, float]:
    sampled, scored, trained = (
        sum(one.ledger["tokens"][unit] for one in made) for unit in ("sampled", "scored", "trained")
    )
    read = sum(_scored_tokens(one, answer_tokens) for one in made)
    return {
        "sampled_tokens": sampled,
        "scored_responses": scored,
        "scored_tokens": round(read),
        "trained_tokens": trained,
        "total_tokens": round(sampled + read + trained),
        "seconds": sum(one.ledger["seconds"] for one in made),
    }


def _scored_tokens(made: Made, answer_tokens: float) -> float:
    tokens, inputs = made.ledger["tokens"], made.ledger["inputs"]
    if not tokens["scored"]:
        return 0.0
    if "candidates" in inputs:
        return read_ledger(_stage_at(made.folder, inputs["candidates"]["path"]))["tokens"]["sampled"]
    return tokens["sampled"] or tokens["scored"] * answer_tokens


def objectives_read(folder: Path, objectives: Sequence[str]) -> list[str]:
    """The objectives that a system's training looked at: those that some direction or target of it weighed."""
    found: set[str] = set()
    for _, ledger in lineage(made_from(folder).values()):
        knobs, inputs = ledger["knobs"], ledger["inputs"]
        if {"sft", "annotate"} <= inputs.keys():  # SteerLM: answers that state all their rewards
            found.update(objectives)
        elif "rl.algorithm" in knobs or ({"candidates", "scores"} <= inputs.keys() and "replay" in knobs):
            found.update(weighed(knobs, objectives))
        elif "dpo.pairs" in knobs:
            found.add(OVERALL if knobs["dpo.pairs"] == "ratings" else objectives[0])
    return [name for name in (*objectives, OVERALL) if name in found]


def weighed(knobs: Mapping[str, Any], objectives: Sequence[str]) -> list[str]:
    """The objectives that the population of users in a stage's knobs weighs at all."""
    section = "preference."
    mapping = {key.removeprefix(section): value for key, value in knobs.items() if key.startswith(section)}
    from dpalign.stages.preference import Steering

    population = Steering.model_validate_json(json.dumps(mapping)).population(len(objectives))
    drawn_NK = draw_directions(population, 64, rng_for("objectives read"))
    return [name for name, weight in zip(objectives, np.abs(drawn_NK).max(axis=0), strict=True) if weight > 1e-9]


class Footprint(NamedTuple):
    """What must be kept to serve a system in all directions that it can serve."""

    models: int
    bytes: int | None
    """Of their weights; None where a model is no local folder."""
    switch_seconds: float | None
    """To go from one direction to the next, where the evaluation timed it."""


def footprint(folder: Path) -> Footprint:
    """The models behind an evaluate folder."""
    sizes = [weight_bytes(stage) for stage in made_from(folder).values()]
    if not sizes and (folder / LEDGER).is_file():  # a checkpoint that the recipe names
        sizes = [_named_bytes(read_ledger(folder)["knobs"].get("evaluation.dpo"))]
    whole = None if None in sizes or not sizes else sum(size for size in sizes if size is not None)
    return Footprint(max(1, len(sizes)), whole, _switch_seconds(folder))


def _switch_seconds(folder: Path) -> float | None:
    """The mean time of a switch to another direction; None where none was timed."""
    if not (folder / TIMES).is_file():
        return None
    times: dict[str, float] = json.loads((folder / TIMES).read_text(encoding="utf-8")).get("switch_seconds", {})
    return sum(times.values()) / len(times) if times else None


def weight_bytes(stage: Path) -> int | None:
    """The bytes of the weights that a training stage left; None where it took a checkpoint that is not on this disk."""
    named = stage / "checkpoint.txt"
    if named.is_file():
        return _named_bytes(named.read_text(encoding="utf-8").strip())
    sizes = [file.stat().st_size for file in stage.rglob("*.safetensors")]
    return sum(sizes) if sizes else None


def _named_bytes(source: str | None) -> int | None:
    return weight_bytes(Path(source)) if source and Path(source).is_dir() else None
