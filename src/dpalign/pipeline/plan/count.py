"""What a recipe's steps compute and how long that takes: as assumed, or as a run has measured it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from dpalign.engines.architecture import Architecture
from dpalign.pipeline.plan.hardware import WIDTHS, Gpu, Need, architecture_of, disk, needs
from dpalign.pipeline.steps import recipe_of
from dpalign.pipeline.steps import steps as steps_of
from dpalign.recipe import Recipe
from dpalign.rows import CANDIDATES, CONVERSATIONS, PROMPTS, RATED, read_table, shards
from dpalign.runs.ledger import LEDGER, Ledger, read_ledger
from dpalign.stages.cost import Costs, Load, Sizes
from dpalign.stages.stage import Step

HOUR: Final = 3600.0


@dataclass(frozen=True)
class Efficiency:
    """The share of a GPU's peak that a stage reaches (model FLOPs utilisation): assumed."""

    sampling: float = 0.4
    scoring: float = 0.5
    training: float = 0.25
    """What the paper's 60 A6000-hours come to, if they are its training (docs/plan.md)."""


@dataclass(frozen=True)
class Rates:
    """Per second, on the machine that made the run; 0 where it has not got so far."""

    sampling: float = 0.0
    """Tokens of answers drawn."""
    scoring: float = 0.0
    """Answers scored."""
    training: float = 0.0
    """Tokens trained on."""


@dataclass(frozen=True)
class Plan:
    """All that is printed."""

    recipe: Recipe
    model: Architecture
    sizes: Sizes
    efficiency: Efficiency
    gpus: Sequence[Gpu]
    count: int
    shared: bool
    steps: Sequence[Step]
    loads: Mapping[str, Load]
    rates: Rates | None = None
    run: str = ""

    def hours(self, load: Load, gpu: Gpu) -> float:
        """GPU-hours: FLOPs at the assumed efficiency, and of sampling no less than its memory's bandwidth allows."""
        peak = gpu.tflops * 1e12
        sampling = load.sampling / (peak * self.efficiency.sampling)
        seconds = max(sampling, self.streaming(load, gpu))
        seconds += load.scoring / (peak * self.efficiency.scoring)
        return (seconds + load.training / (peak * self.efficiency.training)) / HOUR

    def streaming(self, load: Load, gpu: Gpu) -> float:
        """Seconds to read the weights and each answer's keys and values once a token, at so many answers at once."""
        width = WIDTHS[self.recipe.model.dtype]
        each = self.model.cache(self.sizes.prompt + self.sizes.answer / 2, width)
        weights = self.model.parameters * width / self.recipe.sampling.rows
        return load.sampled * (weights + each) / (gpu.gb_s * 1e9)

    def peak_hours(self, load: Load, gpu: Gpu) -> float:
        """GPU-hours at 100% of the peak: a count, and nobody's rate."""
        return load.flops / (gpu.tflops * 1e12) / HOUR

    def measured_hours(self, load: Load) -> float:
        """Hours at the run's own rates; NaN where it has none of them."""
        assert self.rates is not None
        parts = ((load.sampled, "sampling"), (load.scored, "scoring"), (load.trained, "training"))
        seconds = [units / (getattr(self.rates, what) or math.nan) for units, what in parts if units]
        return sum(seconds) / HOUR

    @property
    def total(self) -> Load:
        return sum(self.loads.values(), Load())

    @property
    def needs(self) -> list[Need]:
        return needs(self.recipe, self.model, self.sizes, self.steps)

    @property
    def disk(self) -> dict[str, float]:
        return disk(self.recipe, self.model, self.sizes, self.steps, self.loads)


def make(
    recipe: Recipe,
    *,
    gpus: Sequence[Gpu] = (),
    count: int = 1,
    run: Path | None = None,
    compared: bool = False,
    shared: bool = True,
    efficiency: Efficiency | None = None,
    assumed: Mapping[str, float] | None = None,
) -> Plan:
    """Count what a recipe costs.

    Args:
        shared: a prompt is read once for all that follows it, not once an answer.

    Raises:
        ValueError: an unknown model, a run without finished stages, or a count or share out of range.
    """
    efficiency = efficiency or Efficiency()
    for name, share in asdict(efficiency).items():
        if not 0 < share <= 1:
            raise ValueError(f"--mfu {name}={share:g}: a share of the peak lies above 0 and is at most 1")
    if count < 1:
        raise ValueError(f"--gpus {count}: give at least 1")
    model, sizes, rates = architecture_of(recipe), sizes_of(recipe), None
    if run is not None:
        sizes, rates = measure(run, sizes)
    sizes = replace(sizes, **(assumed or {}))
    steps = steps_of(recipe, compared)
    by_name = {step.name: step for step in steps}
    costs = Costs(recipe, model, sizes, by_name, lambda step: recipe_of(recipe, step), shared)
    loads = {step.name: costs.load(step) for step in steps}
    return Plan(recipe, model, sizes, efficiency, gpus, count, shared, steps, loads, rates, str(run or ""))


def sizes_of(recipe: Recipe) -> Sizes:
    """What is assumed of a recipe's data before it is read."""
    sizes = Sizes(evaluated=float(recipe.data.validation_prompts))
    if recipe.data.world:
        world, kept = recipe.world, 1 - recipe.data.heldout - recipe.data.judge
        return Sizes(
            prompt=20.0,
            answer=22.0,
            prompts=world.ultrafeedback_prompts * kept / 2,
            others=4.0 * world.helpsteer_prompts,
            chats=float(world.sft_prompts),
            chat=42.0,
            evaluated=float(world.test_prompts),
            tuning=float(world.tuning_prompts),
        )
    return replace(sizes, tuning=2 * sizes.prompts * recipe.data.tuning)


KINDS: Final = {
    "sampling": (("sample",), "sampled"),
    "scoring": (("score",), "scored"),
    "training": (("reward", "judge", "sft", "steerlm", "policy"), "trained"),
}
"""How the loop's own steps begin, and what their ledgers count."""


def measure(run: Path, assumed: Sizes) -> tuple[Sizes, Rates]:
    """The sizes of a run's own data and answers, and its rates; what it has not made yet stays as assumed.

    Raises:
        ValueError: the folder holds no finished stage.
    """
    ledgers = {path.parent.name: read_ledger(path.parent) for path in sorted(run.glob(f"*/{LEDGER}"))}
    if not ledgers:
        raise ValueError(f"--run {run}: no finished stage in this folder; name a run folder, or leave --run out")
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
    """Rows by what they are for."""
    splits = read_table(data / "prompts", PROMPTS, ["split"])["split"].to_pylist()
    sources = read_table(data / "train", RATED, ["source"])["source"]
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
    """Tokens of answers as they were counted; of prompts by their letters, at as many a token as the answers have."""
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
    """Of all messages' contents."""
    return int(pc.sum(pc.utf8_length(pc.struct_field(pc.list_flatten(messages), "content"))).as_py() or 0)
