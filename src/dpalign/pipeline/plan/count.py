"""What a recipe's steps compute and how long that takes: as assumed, or as a run has measured it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final

from dpalign.engines.architecture import Architecture
from dpalign.pipeline.plan.hardware import WIDTHS, Gpu, Need, architecture_of, disk, host, needs
from dpalign.pipeline.plan.measured import HOUR, Rates, elapsed, hours_of, ledgers_of, measure
from dpalign.pipeline.plan.spread import Spread, gpus_used, spread
from dpalign.pipeline.steps import recipe_of
from dpalign.pipeline.steps import steps as steps_of
from dpalign.recipe import Recipe
from dpalign.stages.cost import Costs, Load, Sizes
from dpalign.stages.stage import Step

SMALLEST: Final = 50e6
"""Parameters below which hours are not counted: such a model waits for Python and memory, not for arithmetic."""


@dataclass(frozen=True)
class Efficiency:
    """The share of a GPU's peak that a stage reaches (model FLOPs utilisation): assumed."""

    sampling: float = 0.4
    scoring: float = 0.5
    training: float = 0.25
    """The share that the paper's 60 A6000-hours imply, if they are its training (docs/plan.md)."""


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
    spreads: Mapping[str, Spread]
    rates: Rates | None = None
    run: str = ""
    taken: Mapping[str, float] = field(default_factory=dict)
    """Hours of each step, from the times of the run."""

    @property
    def counts_hours(self) -> bool:
        """Whether hours follow from FLOPs: not for a small model."""
        return self.model.parameters >= SMALLEST

    def hours(self, load: Load, gpu: Gpu) -> float:
        """GPU-hours: FLOPs at the assumed efficiency, and no less than memory bandwidth and kernel launches allow."""
        peak = gpu.peak(self.recipe.model.dtype)
        sampling = load.sampling / (peak * self.efficiency.sampling)
        seconds = max(sampling, self.streaming(load, gpu))
        seconds += (load.scoring - load.fitting) / (peak * self.efficiency.scoring)
        seconds += load.fitting / (gpu.peak("float32") * self.efficiency.scoring)
        seconds += load.training / (peak * self.efficiency.training)
        return max(seconds, load.forwards * self.model.layers * gpu.launch) / HOUR

    def streaming(self, load: Load, gpu: Gpu) -> float:
        """Seconds to read the weights once a step, and each answer's keys and values once a token."""
        width = WIDTHS[self.recipe.model.dtype]
        each = self.model.cache(self.sizes.prompt + self.sizes.answer / 2, width)
        weights = self.model.parameters * width
        return (load.decodes * weights + load.sampled * each) / (gpu.gb_s * 1e9)

    def busy(self, names: Iterable[str], gpu: Gpu) -> float:
        """GPU-hours of some steps."""
        return sum(self.hours(self.loads[name], gpu) for name in names)

    def elapsed(self, name: str, gpu: Gpu) -> float:
        """Hours of a step on the GPUs that it is spread over."""
        load = self.loads[name]
        alone = Load(scoring=load.measuring + load.fitting, fitting=load.fitting)
        one = self.hours(alone, gpu)
        return (self.hours(load, gpu) - one) / self.spreads[name].speed + one

    def wall(self, gpu: Gpu) -> float:
        """Hours of all steps, one after the other: steps side by side would share the GPUs."""
        return sum(self.elapsed(step.name, gpu) for step in self.steps)

    def peak_hours(self, load: Load, gpu: Gpu) -> float:
        """GPU-hours at 100% of the peak, which no run reaches."""
        return load.flops / gpu.peak(self.recipe.model.dtype) / HOUR

    @property
    def measured_wall(self) -> float:
        """Hours of all steps, from the times of the run, `jobs` of them side by side; NaN if a step's are unknown."""
        return elapsed(self.steps, self.taken, self.recipe.jobs)

    @property
    def needs(self) -> list[Need]:
        return needs(self.recipe, self.model, self.sizes, self.steps)

    @property
    def host(self) -> dict[str, float]:
        return host(self.recipe, self.model, self.steps, self.loads)

    @property
    def disk(self) -> dict[str, float]:
        return disk(self.recipe, self.model, self.sizes, self.steps, self.loads)


def make(
    recipe: Recipe,
    *,
    gpus: Sequence[Gpu] = (),
    count: int | None = None,
    run: Path | None = None,
    compared: bool = False,
    shared: bool = True,
    efficiency: Efficiency | None = None,
    assumed: Mapping[str, float] | None = None,
) -> Plan:
    """Count what a recipe costs.

    Args:
        count: the number of GPUs; None takes what the recipe asks for.
        shared: a prompt is read once for all its answers, not once an answer.

    Raises:
        ValueError: an unknown model, a run without finished stages, or a count or share out of range.
    """
    efficiency = efficiency or Efficiency()
    for name, share in asdict(efficiency).items():
        if not 0 < share <= 1:
            raise ValueError(f"--mfu {name}={share:g}: a share of the peak lies above 0 and is at most 1")
    count = gpus_used(recipe) if count is None else count
    if count < 1:
        raise ValueError(f"--gpus {count}: give at least 1")
    model, sizes, rates = architecture_of(recipe), sizes_of(recipe), None
    ledgers = {} if run is None else ledgers_of(run)
    if run is not None:
        sizes, rates = measure(run, ledgers, sizes)
    sizes = replace(sizes, **(assumed or {}))
    steps = steps_of(recipe, compared)
    by_name = {step.name: step for step in steps}
    costs = Costs(recipe, model, sizes, by_name, lambda step: recipe_of(recipe, step), shared)
    loads = {step.name: costs.load(step) for step in steps}
    spreads = {step.name: spread(recipe_of(recipe, step), step, loads[step.name], count) for step in steps}
    taken = {} if rates is None else hours_of(recipe, steps, loads, ledgers, rates)
    return Plan(
        recipe, model, sizes, efficiency, gpus, count, shared, steps, loads, spreads, rates, str(run or ""), taken
    )


def sizes_of(recipe: Recipe) -> Sizes:
    """The sizes that are assumed of a recipe's data before it is read."""
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
