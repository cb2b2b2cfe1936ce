"""What a stage is: a function that reads finished folders and writes one, and what it says about itself.

A stage's file declares its knobs, what it reads, its function and its cost. `pipeline/steps.py` lists them all,
and knows their order. Heavy imports wait until a stage runs.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast

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
    """The iteration, where there is one."""
    half: str = ""
    """D1, D2, or both: the prompts it may use."""
    condition: str = ""
    """What the answers are conditioned on: directions, targets, nothing (plain), or a wish in words (brief)."""
    systems: Mapping[str, System] = field(default_factory=dict)
    """What the inputs of a report are, by input."""

    @property
    def out(self) -> Path:
        return self.work.folder

    def warn(self, text: str) -> None:
        """Say what may spoil the result: in the log, in the ledger and on the report's page."""
        self.work.run.log(f"{self.out.stem}: warning: {text}")
        self.work.tally.warnings.append(text)


Law = Literal["sifts", "chooses", "makes"]


@dataclass(frozen=True)
class Stage:
    """What a stage says about itself; `@stage(reads=...)` above a function of a `Job` makes it one."""

    reads: "Reads"
    """The knobs it reads: leaves, or whole tables. A change of any of them redoes it."""
    reads_under: Mapping[str, "Reads"] = field(default_factory=dict)
    """The knobs that it reads under one condition alone, beside those."""
    reads_figures: bool = False
    """Also reads what its inputs measured of themselves (`runs.ledger.FIGURES`)."""
    inputs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    """Inputs of any number, each under a name of its own: `expert` stands for expert-NAME."""
    asks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What a step must say beside its inputs (t, half, condition), and the allowed values; empty means any."""
    version: int = 1
    """Raised when the code changes what the stage means."""
    heavy: bool = True
    """Needs torch, and runs in a process of its own where the recipe says so."""
    several: bool = False
    """Runs in one process per GPU where the recipe says so."""
    trains: "Callable[[Recipe], Training] | None" = None
    """How it trains a model, where it does."""
    measure_tables: "Callable[[Recipe], tuple[str, ...]]" = lambda recipe: ()
    """Of a training: tables of knobs that it reads to measure its model, and not to train it. A change of these alone
    keeps the model."""
    cost: "Cost | None" = None
    """What it computes, for `dpa plan`; None computes nothing worth counting."""
    law: Law = "sifts"
    """How its counts must add up. sifts: every row in is a row out, or filtered for a reason. chooses: so is every row
    in, but one may be written more than once, and others be added. makes: no rows come in."""
    takes: str = ""
    """The input whose rows are its rows in, every one; "" where rows of several kinds are read."""
    name: str = ""
    """That of its function."""
    function: Callable[[Job], None] = lambda job: None

    def __call__(self, function: Callable[[Job], None]) -> "Stage":
        """Decorate the function that does the work."""
        return replace(self, name=function.__name__, function=function)

    def knobs(self, recipe: "Recipe", condition: str | None = None) -> dict[str, Any]:
        """The knobs it reads with their values, by dotted name; None: under any condition."""
        values = recipe.as_mapping()
        read: dict[str, Any] = {}
        for pattern in self.knob_names(condition):
            for name, value in _named(values, pattern):
                read.update(leaves(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
        return read

    def knob_names(self, condition: str | None = None) -> list[str]:
        """The dotted names of the tables and leaves that it reads; None: under any condition."""
        under = [reads for name, reads in self.reads_under.items() if condition in (None, name)]
        names = [str(name) for reads in (self.reads, *under) for name in reads(cast("Recipe", _Name()))]
        return list(dict.fromkeys(names))

    def require_conserved(self, total: Tally, source: Path, rows: int | None) -> None:
        """Check what a stage counted against its law.

        Args:
            source: the folder that `takes` names.
            rows: that its own stage wrote; None where no ledger says so.

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
        """The table of the recipe that says how it trains, by dotted name."""
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
    """Turn the lack of a package into a ValueError that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).startswith("dpalign"):
            raise
        raise ValueError(f"this needs {error.name}; install it: pip install -e '.[train]'") from error


def _named(values: Any, pattern: str) -> Iterator[tuple[str, Any]]:
    """The values of a dotted name, of which `*` stands for every key."""
    first, _, rest = pattern.partition(".")
    for key in values if first == "*" else [first]:
        if rest:
            yield from ((f"{key}.{name}", value) for name, value in _named(values[key], rest))
        else:
            yield key, values[key]


class _Name:
    """Stands for a recipe, and gives the dotted name of what is taken from it in place of the value."""

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
    """A stage in a run: under which name, on which earlier folders, for which iteration."""

    name: str
    stage: Stage
    inputs: Mapping[str, str | Path] = field(default_factory=dict)
    """Names of earlier steps, or paths, by the stage's own names for them."""
    t: int = 0
    half: str = ""
    condition: str = ""
    knobs: Mapping[str, Any] = field(default_factory=dict)
    """Knobs that differ from the recipe's for this step alone, by dotted name."""
    systems: Mapping[str, System] = field(default_factory=dict)
    """Of a report: what its inputs are, by input."""

    @property
    def particulars(self) -> dict[str, Any]:
        """What distinguishes this step from others of its stage, beside its inputs."""
        given = {"t": self.t, "half": self.half, "condition": self.condition}
        systems = {f"step.systems.{name}": list(vars(system).values()) for name, system in self.systems.items()}
        return {f"step.{name}": value for name, value in given.items() if value} | systems


def on_transformers(recipe: "Recipe") -> "Recipe":
    """The recipe without vLLM: for a stage that trains in the same process, and so has taken the GPU."""
    return recipe.model_copy(update={"engines": recipe.engines.on_transformers()})


# What several stages read.


def model_read(r: "Recipe") -> tuple[object, ...]:
    """How a model is loaded."""
    return (r.model.dtype, r.model.trust_remote_code, r.threads)


def chat_read(r: "Recipe") -> tuple[object, ...]:
    """How a chat is written."""
    return (r.model.chat, r.model.chat_kwargs, r.model.place)


def objectives_read(r: "Recipe") -> tuple[object, ...]:
    """What an objective is: named readings of heads. How a reward scores is `scorer_read`."""
    every = r.rewards["*"]
    return (r.objectives, r.heads, r.reward.ensemble, every.heads, every.model, every.input, every.trained)


def scorer_read(r: "Recipe") -> tuple[object, ...]:
    """What scores answers, and how."""
    return (
        r.reward.template, r.reward.score_tokens, r.rewards,
        r.engines.scoring, r.engines.tensor_parallel,
    )  # fmt: skip


def sampler_read(r: "Recipe") -> tuple[object, ...]:
    """What draws answers, and how long they may be."""
    return (
        r.sampling.rows, r.sampling.max_new_tokens, r.sampling.prompt_tokens, r.sampling.shard,
        r.engines.sampling, r.engines.tensor_parallel, *chat_read(r),
    )  # fmt: skip


D1_D2: Final = ("D1", "D2")
