"""What a run has measured: its lengths, its rates, and the hours of each of its steps."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from dpalign.pipeline.steps import knobs_of
from dpalign.recipe import Recipe
from dpalign.rows import CANDIDATES, CONVERSATIONS, PROMPTS, RATED, read_table, shards
from dpalign.runs.ledger import LEDGER, Ledger, read_ledger
from dpalign.stages.cost import Load, Sizes
from dpalign.stages.stage import Step

HOUR: Final = 3600.0
UNITS: Final = ("sampled", "scored", "trained")
"""The units of a step's length; the first that a step has counts."""


@dataclass(frozen=True)
class Rates:
    """Rates per second on the machine that made the run; 0 if it has not got so far."""

    sampling: float = 0.0
    """Tokens of answers drawn."""
    scoring: float = 0.0
    """Answers scored."""
    training: float = 0.0
    """Tokens trained on."""

    def hours(self, load: Load) -> float:
        """Hours at these rates; NaN if one is not known."""
        parts = ((load.sampled, self.sampling), (load.scored, self.scoring), (load.trained, self.training))
        return sum(units / (rate or math.nan) for units, rate in parts if units) / HOUR


KINDS: Final = {
    "sampling": (("sample",), "sampled"),
    "scoring": (("score",), "scored"),
    "training": (("reward", "judge", "sft", "steerlm", "policy"), "trained"),
}
"""For each rate: how the names of the loop's own steps begin, and the unit that their ledgers count."""


def ledgers_of(run: Path) -> dict[str, Ledger]:
    """The ledgers of a run's finished steps.

    Raises:
        ValueError: the folder holds none.
    """
    ledgers = {path.parent.name: read_ledger(path.parent) for path in sorted(run.glob(f"[!.]*/{LEDGER}"))}
    if not ledgers:
        raise ValueError(f"--run {run}: no finished stage in this folder; name a run folder, or leave --run out")
    return ledgers


def hours_of(
    recipe: Recipe,
    steps: Sequence[Step],
    loads: Mapping[str, Load],
    ledgers: Mapping[str, Ledger],
    rates: Rates,
) -> dict[str, float]:
    """Hours of each step. A step that the run took with the same knobs has its hours there.

    The others scale the hours of the run's steps of the same stage by tokens or answers. Without such steps they go at
    the run's rates. NaN if the run does not tell.
    """
    hours = {}
    for step in steps:
        own, load = ledgers.get(step.name), loads[step.name]
        if own is not None and own["knobs"] == json.loads(json.dumps(knobs_of(recipe, step))):
            hours[step.name] = own["seconds"] / HOUR
            continue
        unit = next((unit for unit in UNITS if getattr(load, unit)), None)
        like = [ledgers[other.name] for other in steps if other.stage == step.stage and other.name in ledgers]
        there = sum(ledger["tokens"].get(unit or "", 0) for ledger in like)
        seconds = sum(ledger["seconds"] for ledger in like)
        if unit is None:
            hours[step.name] = seconds / len(like) / HOUR if like else 0.0
        else:
            hours[step.name] = seconds / there * getattr(load, unit) / HOUR if there else rates.hours(load)
    return hours


def elapsed(steps: Sequence[Step], hours: Mapping[str, float], jobs: int) -> float:
    """Hours until all steps are taken, up to `jobs` side by side, in the order of `runner.take_all`."""
    if any(math.isnan(hours[step.name]) for step in steps):
        return math.nan
    ends: dict[str, float] = {}
    now, waiting, names = 0.0, list(steps), {step.name for step in steps}
    while waiting:
        done = {name for name, end in ends.items() if end <= now}
        ready = [step for step in waiting if names & {str(value) for value in step.inputs.values()} <= done]
        for step in ready[: jobs - (len(ends) - len(done))]:
            waiting.remove(step)
            ends[step.name] = now + hours[step.name]
        now = min((end for end in ends.values() if end > now), default=now)
    return max(ends.values(), default=0.0)


def measure(run: Path, ledgers: Mapping[str, Ledger], assumed: Sizes) -> tuple[Sizes, Rates]:
    """The sizes of a run's own data and answers, and its rates; what it has not made yet stays as assumed."""
    sizes = _of_data(run / "data", assumed) if "data" in ledgers else assumed
    if samples := [name for name in ledgers if name.partition("-")[0] == "sample"]:
        first = shards(run / samples[0])[0]
        sizes = _of_answers(first, [ledgers[name] for name in samples], sizes)
        if (run / "data" / "chats").exists():
            chats = read_table(run / "data" / "chats", CONVERSATIONS, ["messages", "response"])
            letters = _letters(chats["messages"]) + int(pc.sum(pc.utf8_length(chats["response"])).as_py())
            sizes = replace(sizes, chat=letters / chats.num_rows * _tokens_a_letter(first))
    rates: dict[str, float] = {}
    for what, (kinds, unit) in KINDS.items():
        own = [ledger for name, ledger in ledgers.items() if name.partition("-")[0] in kinds]
        worked = [ledger for ledger in own if ledger["tokens"].get(unit) and ledger["seconds"] > 0]
        seconds = sum(ledger["seconds"] for ledger in worked)
        rates[what] = sum(ledger["tokens"][unit] for ledger in worked) / seconds if seconds else 0.0
    return sizes, Rates(**rates)


def _of_data(data: Path, sizes: Sizes) -> Sizes:
    """The sizes with the numbers of rows in a run's data."""
    splits = read_table(data / "prompts", PROMPTS, ["split"])["split"].to_pylist()
    rated = data / "train"  # a run on prompts alone has none
    sources = read_table(rated, RATED, ["source"])["source"] if rated.exists() else pa.chunked_array([[]], pa.string())
    others = int(pc.sum(pc.equal(sources, "helpsteer")).as_py() or 0)
    prompts = (splits.count("D1") + splits.count("D2")) / 2
    chats = data / "chats"
    return replace(
        sizes,
        prompts=prompts,
        rated=(len(sources) - others) / (2 * prompts) if prompts else sizes.rated,
        others=float(others),
        chats=float(read_table(chats, CONVERSATIONS, ["origin"]).num_rows) if chats.exists() else sizes.chats,
        evaluated=float(splits.count("validation")),
        tuning=float(splits.count("tuning")),
    )


def _of_answers(shard: Path, ledgers: Sequence[Ledger], sizes: Sizes) -> Sizes:
    """The sizes with mean tokens: of answers as counted, of prompts by letters at the answers' tokens a letter."""
    rows = sum(ledger["counts"]["out"] for ledger in ledgers)
    tokens = sum(ledger["tokens"]["sampled"] for ledger in ledgers)
    written = sum(sum(ledger["sizes"].values()) for ledger in ledgers)
    table = read_table(shard, CANDIDATES, ["messages"])
    prompt = _letters(table["messages"]) / table.num_rows * _tokens_a_letter(shard)
    return replace(sizes, answer=tokens / rows, prompt=prompt, text_bytes=written / tokens)


def _tokens_a_letter(shard: Path) -> float:
    table = read_table(shard, CANDIDATES, ["response", "tokens"])
    letters = pc.sum(pc.utf8_length(table["response"])).as_py()
    return float(pc.sum(table["tokens"]).as_py()) / max(1, int(letters))


def _letters(messages: pa.ChunkedArray) -> int:
    """The number of letters in all messages' contents."""
    return int(pc.sum(pc.utf8_length(pc.struct_field(pc.list_flatten(messages), "content"))).as_py() or 0)
