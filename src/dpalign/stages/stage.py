"""The stages of a run: each reads finished folders and writes one, and is a command of its own.

A stage is a plain function of a `Job`: where its inputs are, which recipe holds, and the folder to fill.
`STAGES` says what each one reads, so that the run folder knows when it must be redone; the order in
which they follow each other is `align.py`'s affair. Heavy imports wait until a stage runs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from dpalign.recipe import Recipe, config
from dpalign.run.environment import settle_threads
from dpalign.run.folder import Work


@dataclass(frozen=True)
class Job:
    """One stage at work."""

    recipe: Recipe
    work: Work
    inputs: Mapping[str, Path]
    """Finished folders, by the names in `Stage.inputs`; an optional one may be missing."""
    t: int = 0
    """The iteration, where there is one."""
    half: str = ""
    """D1, D2, or both: the prompts it may use."""
    condition: str = ""
    """What the answers are conditioned on: directions, targets, nothing (plain), or a wish in words (brief)."""

    @property
    def out(self) -> Path:
        return self.work.folder


@dataclass(frozen=True)
class StageKind:
    """What a stage is made of."""

    function: str
    """`module:function`, imported when the stage runs."""
    help: str
    knobs: tuple[str, ...]
    """The recipe's knobs it reads: a change of any of them redoes it."""
    inputs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    version: int = 1
    """Raised when the code changes what the stage means."""
    heavy: bool = True
    """Runs in a process of its own where the recipe says so; needs torch."""
    several: bool = False
    """Runs in one process per GPU where the recipe says so."""
    repeated: tuple[str, ...] = ()
    """Inputs of which it takes any number, each under a name of its own: `expert` stands for expert-NAME."""
    asks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What it must be told beside its inputs (t, half, condition), and the choices; of t there are no fixed ones."""

    def run(self, job: Job) -> None:
        """Do the work.

        Raises:
            ValueError: bad input, or a package that is not installed.
        """
        module, name = self.function.split(":")
        try:
            settle_threads(job.recipe.threads, for_torch=self.heavy)
            work: Callable[[Job], None] = getattr(import_module(module), name)
            work(job)
        except ModuleNotFoundError as error:
            if str(error.name).startswith("dpalign"):
                raise
            raise ValueError(f"this stage needs {error.name}; install it: pip install 'dpalign[train]'") from error


EVALUATED_UNDER: Final = ("directions", "targets", "plain", "brief", "best-of-n")
"""What a system may be asked for when it is evaluated; best-of-n answers plainly, and the reward model chooses."""

_MODEL = ("model.dtype", "model.trust_remote_code", "threads")
_OBJECTIVES = ("objectives", "heads")
_TARGETS = ("steerlm.template", "steerlm.targets", "steerlm.quantile")
_REWARD_TRAINING = (
    *("seed", "reward.checkpoint", "reward.template", "reward.lm_loss", "reward.normalize", "reward.training"),
    "reward.score_tokens",
)
_SAMPLED_BY = ("engines.sampling", "engines.tensor_parallel")
_SCORED_BY = ("engines.scoring", "engines.tensor_parallel")
EVALUATION: Final = (
    *("seed", "evaluation.split", "evaluation.directions", "evaluation.samples", "evaluation.temperature"),
    *("sampling.rows", "sampling.max_new_tokens", "sampling.prompt_tokens", "sampling.shard", "preference"),
    *("reward.template", "reward.score_tokens", "reward.checkpoint", "model.chat", "data.world"),
    *(*_MODEL, *_OBJECTIVES, *_SAMPLED_BY, *_SCORED_BY),
)
"""The knobs of section 3.2's protocol, whatever is evaluated."""

LATER: Final[Mapping[str, Any]] = {
    "preference.margin": 0.0,
    "selection.pool": "direction",
    "selection.distinct": False,
    "engines.sampling": "transformers",
    "engines.scoring": "transformers",
    "engines.tensor_parallel": 1,
    "evaluation.senses": [],
}
"""Knobs that came after the first runs, with the value that those had: no ledger names one that has it still."""


def knobs_read(recipe: Recipe, names: Sequence[str]) -> dict[str, Any]:
    """The knobs that a stage read, for its ledger."""
    read = config.knobs(recipe, *names)
    return {name: value for name, value in read.items() if name not in LATER or value != LATER[name]}


STAGES: Final[Mapping[str, StageKind]] = {
    "world": StageKind(
        "dpalign.stages.data:write_world_files",
        "write the embedded world's prompts and ratings in the real data sets' forms",
        ("seed", "world"),
        heavy=False,
    ),
    "data": StageKind(
        "dpalign.stages.data:read_data",
        "read prompts and ratings, rescale them, join them under the heads, and split them by prompt",
        ("seed", "data", *_OBJECTIVES),
        optional=("world",),
        heavy=False,
    ),
    "base": StageKind(
        "dpalign.stages.finetune:base",
        "train a small base model from scratch",
        ("seed", "pretrain", "model.chat", "threads"),
        inputs=("data",),
        several=True,
    ),
    "reward": StageKind(
        "dpalign.stages.reward:reward",
        "train the multi-objective reward model, and measure it on held-out prompts",
        (*_REWARD_TRAINING, "model.base", *_MODEL, *_OBJECTIVES),
        inputs=("data",),
        optional=("base",),
        several=True,
    ),
    "judge": StageKind(
        "dpalign.stages.reward:judge",
        "train a second reward model on disjoint prompts, which judges and never selects",
        (*_REWARD_TRAINING, "model.base", *_MODEL, *_OBJECTIVES),
        inputs=("data",),
        optional=("base",),
        several=True,
    ),
    "annotate": StageKind(
        "dpalign.stages.reward:annotate",
        "score all training answers with the reward model",
        ("reward.template", "reward.score_tokens", "reward.checkpoint", "heads", *_MODEL, *_SCORED_BY),
        inputs=("data", "reward"),
    ),
    "sft": StageKind(
        "dpalign.stages.finetune:sft",
        "fine-tune the base model on chats",
        ("seed", "sft", "model.base", "model.chat", *_MODEL),
        inputs=("data",),
        optional=("base",),
        several=True,
    ),
    "steerlm": StageKind(
        "dpalign.stages.finetune:steerlm",
        "fine-tune SFT on answers that state their own rewards",
        ("seed", "steerlm.template", "steerlm.training", "sft.checkpoint", "model.chat", *_MODEL, *_OBJECTIVES),
        inputs=("sft", "data", "annotate"),
        several=True,
        asks={"half": ("D1", "D2", "both")},
    ),
    "sample": StageKind(
        "dpalign.stages.sample:sample",
        "draw answers from a policy, under directions or reward targets",
        ("seed", "sampling", "preference", "steerlm.template", "model.chat", *_SAMPLED_BY, *_MODEL, *_OBJECTIVES),
        inputs=("policy", "data"),
        optional=("annotate",),
        asks={"t": (), "half": ("D1", "D2"), "condition": ("directions", "targets", "plain")},
    ),
    "score": StageKind(
        "dpalign.stages.reward:score",
        "score answers on every head",
        ("reward.template", "reward.score_tokens", "reward.checkpoint", "heads", *_MODEL, *_SCORED_BY),
        inputs=("reward", "candidates"),
    ),
    "select": StageKind(
        "dpalign.stages.choose:select",
        "keep the best answer for each direction, and replay original ones",
        ("seed", "replay", "preference", "selection", "model.chat", *_OBJECTIVES),
        inputs=("candidates", "scores", "data", "annotate"),
        heavy=False,
        asks={"t": (), "half": ("D1", "D2")},
    ),
    "finetune": StageKind(
        "dpalign.stages.finetune:policy",
        "fine-tune on the selected answers, from SFT",
        ("seed", "finetune", "sft.checkpoint", "preference", "model.chat", *_MODEL, *_OBJECTIVES),
        inputs=("start", "chosen"),
        several=True,
        asks={"t": ()},
    ),
    "specialist": StageKind(
        "dpalign.stages.finetune:specialist",
        "fine-tune on the answers selected for one fixed direction, from SFT: scalar rejection sampling",
        ("seed", "finetune", "sft.checkpoint", "model.chat", *_MODEL),
        inputs=("start", "chosen"),
        several=True,
        asks={"t": ()},
    ),
    "pairs": StageKind(
        "dpalign.stages.pairs:pairs",
        "make preference pairs of rated answers, or of scored candidates",
        ("seed", "dpo.pairs", *_OBJECTIVES),
        inputs=("data",),
        optional=("candidates", "scores"),
        heavy=False,
    ),
    "dpo": StageKind(
        "dpalign.stages.dpo:dpo",
        "train a policy on preference pairs, from SFT",
        ("seed", "dpo.beta", "dpo.training", "sft.checkpoint", "model.chat", *_MODEL),
        inputs=("start", "pairs"),
        several=True,
    ),
    "rl": StageKind(
        "dpalign.stages.rl:rl",
        "train a policy by reinforcement at one fixed direction, from SFT",
        (
            *("seed", "rl", "preference", "sampling.max_new_tokens", "sampling.prompt_tokens", "reward.template"),
            *("reward.score_tokens", "reward.checkpoint", "sft.checkpoint", "model.chat", *_MODEL, *_OBJECTIVES),
        ),
        inputs=("start", "data", "reward"),
        several=True,
        version=2,
    ),
    "evaluate": StageKind(
        "dpalign.stages.evaluate:evaluate",
        "sample a system on the validation prompts and score its answers",
        (*EVALUATION, "evaluation.dpo", "evaluation.brevity", "evaluation.best_of", *_TARGETS),
        inputs=("policy", "data", "reward"),
        optional=("judge", "annotate"),
        asks={"t": (), "condition": EVALUATED_UNDER},
    ),
    "soup": StageKind(
        "dpalign.stages.soup:evaluate_soup",
        "mix experts for each direction, sample the mixtures on the validation prompts and score their answers",
        ("soups.experts", *EVALUATION),
        inputs=("data", "reward"),
        optional=("judge",),
        repeated=("expert",),
    ),
    "feasibility": StageKind(
        "dpalign.stages.feasibility:feasibility",
        "ask a system for what it can give and for more, and count degenerate answers",
        (
            *("seed", "feasibility", "evaluation.split", "evaluation.temperature", "evaluation.bootstrap"),
            *("sampling.rows", "sampling.max_new_tokens", "sampling.prompt_tokens", "sampling.shard", "preference"),
            *("reward.template", "reward.score_tokens", "reward.checkpoint", "model.chat", "data.world"),
            *("steerlm.template", "steerlm.targets", *_SAMPLED_BY, *_SCORED_BY, *_MODEL, *_OBJECTIVES),
        ),
        inputs=("policy", "data", "reward"),
        optional=("annotate",),
        asks={"t": (), "condition": ("directions", "targets")},
    ),
    "pairwise": StageKind(
        "dpalign.stages.pairwise:pairwise",
        "count how often the reward model rates the chosen answer of a pair higher (RewardBench's form)",
        ("seed", "reward.template", "reward.score_tokens", "reward.checkpoint", *_SCORED_BY, *_MODEL, *_OBJECTIVES),
        inputs=("reward", "pairs"),
    ),
    "report": StageKind(
        "dpalign.stages.report:report",
        "measure the systems and write the page",
        ("seed", "evaluation", "preference", "data.world", "compare", *_OBJECTIVES),
        inputs=("data", "reward", "annotate"),
        optional=("judge", "pairwise"),
        version=4,
        heavy=False,
        repeated=("evaluate", "tune", "feasible"),
    ),
}


@dataclass(frozen=True)
class Step:
    """A stage in a run: under which name, on which earlier folders, for which iteration."""

    name: str
    kind: str
    inputs: Mapping[str, str | Path] = field(default_factory=dict)
    """Names of earlier steps, or paths, by the stage's own names for them."""
    t: int = 0
    half: str = ""
    condition: str = ""
    knobs: Mapping[str, Any] = field(default_factory=dict)
    """Knobs that differ from the recipe's for this step alone, by dotted name."""

    @property
    def stage(self) -> StageKind:
        return STAGES[self.kind]

    @property
    def particulars(self) -> dict[str, Any]:
        """What distinguishes this step from others of its kind, beside its inputs."""
        given = {"t": self.t, "half": self.half, "condition": self.condition}
        return {f"step.{name}": value for name, value in given.items() if value}


def uses(steps: Sequence[Step], kind: str) -> list[Step]:
    """The steps of a kind, in order."""
    return [step for step in steps if step.kind == kind]
