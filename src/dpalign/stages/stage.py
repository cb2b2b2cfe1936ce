"""A stage: a function that reads finished folders and writes one, with a declaration of what it reads and costs.

A stage's file declares its knobs, what it reads, its function and its cost. `pipeline/steps.py` lists all stages in
order. Heavy imports wait until a stage runs.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from dpalign.measure.system import System
from dpalign.runs.environment import keep_freed_memory, settle_threads
from dpalign.runs.folder import Tally, Work
from dpalign.runs.tables import leaves

if TYPE_CHECKING:
    from dpalign.recipe import Recipe
    from dpalign.stages.cost import Costs, Load
    from dpalign.train.knobs import Training

    Reads = Callable[[Recipe], tuple[object, ...]]
    Cost = Callable[[Costs, "Step"], Load]


@dataclass(frozen=True)
class Job:
    """One stage at work."""

    recipe: "Recipe"
    work: Work
    inputs: Mapping[str, Path]
    """Finished folders, by the names in `Stage.inputs`; an optional one may be missing."""
    t: int = 0
    """The iteration; 0 if there is none."""
    half: str = ""
    """The prompts it may use: D1, D2 or both."""
    condition: str = ""
    """What the answers are conditioned on: directions, targets, hints, nothing (plain), or a wish in words (brief)."""
    systems: Mapping[str, System] = field(default_factory=dict)
    """For a report: the system that each of its inputs evaluates, by input."""

    @property
    def out(self) -> Path:
        return self.work.folder

    def warn(self, text: str) -> None:
        """Write a warning about the result to the log, the ledger and the report's page."""
        self.work.run.log(f"{self.out.stem}: warning: {text}")
        self.work.tally.warnings.append(text)


Law = Literal["sifts", "chooses", "makes"]


@dataclass(frozen=True)
class Stage:
    """The declaration of a stage. `@stage(reads=...)` above a function of a `Job` makes that function a stage."""

    reads: "Reads"
    """The knobs it reads, as leaves or whole tables. A change of any of them redoes the stage."""
    reads_under: Mapping[str, "Reads"] = field(default_factory=dict)
    """More knobs by condition: each set is read only under that condition."""
    reads_figures: bool = False
    """It also reads the figures that its inputs measured of themselves (`runs.ledger.FIGURES`)."""
    inputs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    """Inputs that may occur any number of times, each with its own name: `expert` means expert-NAME."""
    asks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Further options that the stage's verb requires (t, half, condition), with the allowed values; empty means any."""
    version: int = 1
    """Raise it when the code changes what the stage means."""
    heavy: bool = True
    """It needs torch, and runs in its own process if the recipe says so."""
    several: bool = False
    """It runs in one process per GPU if the recipe says so."""
    trains: "Callable[[Recipe], Training] | None" = None
    """The settings of its training; None if it trains no model."""
    measure_tables: "Callable[[Recipe], tuple[str, ...]]" = lambda recipe: ()
    """For a training: tables of knobs that only measure its model. A change of these alone keeps the model."""
    cost: "Cost | None" = None
    """What it computes, for `dpa plan`; None computes nothing worth counting."""
    law: Law = "sifts"
    """How its counts must add up. sifts: every row in is a row out, or filtered for a reason. chooses: as sifts, but a
    row may be written more than once, and other rows may be added. makes: no rows come in."""
    takes: str = ""
    """The input whose rows are exactly its rows in; "" if it reads rows of several kinds."""
    name: str = ""
    """The name of its function."""
    function: Callable[[Job], None] = lambda job: None

    def __call__(self, function: Callable[[Job], None]) -> "Stage":
        """Decorate the function that does the work."""
        return replace(self, name=function.__name__, function=function)

    def knobs(self, recipe: "Recipe", condition: str | None = None) -> dict[str, Any]:
        """The knobs that it reads under a condition (None: under any), with their values, by dotted name."""
        values = recipe.as_mapping()
        read: dict[str, Any] = {}
        for pattern in self.knob_names(condition):
            for name, value in _named(values, pattern):
                read.update(leaves(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
        return read

    def knob_names(self, condition: str | None = None) -> list[str]:
        """The dotted names of the tables and leaves that it reads under a condition (None: under any)."""
        under = [reads for name, reads in self.reads_under.items() if condition in (None, name)]
        names = [str(name) for reads in (self.reads, *under) for name in reads(cast("Recipe", _Name()))]
        return list(dict.fromkeys(names))

    def require_conserved(self, total: Tally, source: Path, rows: int | None) -> None:
        """Check a stage's counts against its law.

        Args:
            source: the folder of the input `takes`.
            rows: the rows in that folder by its ledger; None without a ledger.

        Raises:
            ValueError: rows were lost, or came from nowhere.
        """
        left, counts = total.rows_in - total.filtered.total(), f"{total.rows_in} rows in, {total.rows_out} out"
        counts += "".join(f", {number} {reason}" for reason, number in total.filtered.items())
        kept = {"sifts": total.rows_out == left, "chooses": total.rows_out >= left >= 0, "makes": not total.rows_in}
        cure = "delete its unfinished folder and run again"
        if not kept[self.law]:
            raise ValueError(f"stage {self.name}: its counts do not add up: {counts}; {cure}")
        if rows is not None and total.rows_in != rows:
            raise ValueError(f"stage {self.name}: {counts}, and {source} has {rows} rows to take; {cure}")

    @property
    def training_table(self) -> str:
        """The dotted name of the recipe's table with its training settings."""
        assert self.trains is not None
        return str(self.trains(cast("Recipe", _Name()))).replace("pretrain.training", "pretrain")

    def run(self, job: Job) -> None:
        """Do the work.

        Raises:
            ValueError: bad input, or a package that is not installed.
        """
        with installed():
            settle_threads(job.recipe.threads, for_torch=self.heavy)
            if self.heavy:
                keep_freed_memory()
            self.function(job)


@contextmanager
def installed() -> Iterator[None]:
    """Turn a missing package into a ValueError that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).startswith("dpalign"):
            raise
        raise ValueError(f"this needs {error.name}; install it: pip install -e '.[train]'") from error


def _named(values: Any, pattern: str) -> Iterator[tuple[str, Any]]:
    """The values of a dotted name; `*` in it matches every key."""
    first, _, rest = pattern.partition(".")
    for key in values if first == "*" else [first]:
        if rest:
            yield from ((f"{key}.{name}", value) for name, value in _named(values[key], rest))
        else:
            yield key, values[key]


class _Name:
    """A stand-in for a recipe: each attribute or key gives its dotted name in place of its value."""

    def __init__(self, path: str = "") -> None:
        self._path = path

    def __getattr__(self, name: str) -> "_Name":
        return _Name(f"{self._path}.{name}" if self._path else name)

    def __getitem__(self, key: str) -> "_Name":
        return _Name(f"{self._path}.{key}")

    def __str__(self) -> str:
        return self._path


stage = Stage
"""The decorator."""


@dataclass(frozen=True)
class Step:
    """A stage in a run: its name there, its inputs and its iteration."""

    name: str
    stage: Stage
    inputs: Mapping[str, str | Path] = field(default_factory=dict)
    """Names of earlier steps, or paths, by the names in `Stage.inputs`."""
    t: int = 0
    half: str = ""
    condition: str = ""
    knobs: Mapping[str, Any] = field(default_factory=dict)
    """Knobs that this step sets for itself, by dotted name."""
    systems: Mapping[str, System] = field(default_factory=dict)
    """For a report: the system that each of its inputs evaluates, by input."""

    @property
    def particulars(self) -> dict[str, Any]:
        """What else distinguishes this step from other steps of its stage, beside inputs and knobs."""
        given = {"t": self.t, "half": self.half, "condition": self.condition}
        systems = {f"step.systems.{name}": list(vars(system).values()) for name, system in self.systems.items()}
        return {f"step.{name}": value for name, value in given.items() if value} | systems


def on_transformers(recipe: "Recipe") -> "Recipe":
    """The recipe without vLLM, for a stage whose training already holds the GPU in the same process."""
    return recipe.model_copy(update={"engines": recipe.engines.on_transformers()})


# What several stages read.


def model_read(r: "Recipe") -> tuple[object, ...]:
    """How a model is loaded."""
    return (r.model.dtype, r.model.trust_remote_code, r.threads)


def chat_read(r: "Recipe") -> tuple[object, ...]:
    """How a chat is written."""
    return (r.model.chat, r.model.chat_kwargs, r.model.place)


def objectives_read(r: "Recipe") -> tuple[object, ...]:
    """What defines the objectives: readings of named heads. `scorer_read` has how a reward scores."""
    every = r.rewards["*"]
    return (r.objectives, r.heads, r.reward.ensemble, every.heads, every.model, every.input, every.trained)


def scorer_read(r: "Recipe") -> tuple[object, ...]:
    """What scores answers, and how."""
    return (
        r.reward.template, r.reward.score_tokens, r.rewards,
        r.engines.scoring, r.engines.tensor_parallel,
    )  # fmt: skip


def sampler_read(r: "Recipe") -> tuple[object, ...]:
    """What draws answers, and their longest length."""
    return (
        r.sampling.rows, r.sampling.max_new_tokens, r.sampling.prompt_tokens, r.sampling.shard,
        r.engines.sampling, r.engines.tensor_parallel, *chat_read(r),
    )  # fmt: skip
