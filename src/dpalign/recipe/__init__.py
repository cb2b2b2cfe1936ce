"""The experiment: every knob of a run, with the paper's value as its default.

A recipe is one TOML file, read strictly: an unknown key is an error that names the nearest known one.
The text under each field is its help; "paper silent" marks a value that the paper does not give.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from dpalign.engines.knobs import Engines, Model
from dpalign.paper.direction import Arc, Cone, Fixed, Grid, Population, Simplex, Sphere
from dpalign.paper.objectives import PAPER_OBJECTIVES, Objective
from dpalign.paper.selection import Selection
from dpalign.recipe import config
from dpalign.recipe.knobs import DPO, RL, RSF, Compare, Feasibility, Reward, Soups, SteerLM
from dpalign.rows import HEADS
from dpalign.run.knobs import Cluster, Launch
from dpalign.train.knobs import Kernels, Training

__all__ = [
    "DPO",
    "RL",
    "RSF",
    "Compare",
    "Data",
    "Evaluation",
    "Feasibility",
    "Pretrain",
    "Recipe",
    "Reward",
    "Sampling",
    "Soups",
    "SteerLM",
    "Steering",
    "World",
    "load",
]


@dataclass(frozen=True)
class Pretrain:
    """A base model of one's own, for machines without a hub; used only when model.base is empty."""

    text: tuple[str, ...] = ("world",)
    """What it reads: `world`, or the run's own training text (`data`)."""
    documents: int = 150_000
    """Documents drawn from the world, or read at most (not in the paper)."""
    vocabulary: int = 1024
    """Largest size of the byte-level BPE."""
    split_digits: bool = True
    """A token a digit, as Mistral's tokenizer has it. A tiny model then reads little more of a direction than its
    first digit: false makes each number that is met often one token."""
    hidden: int = 128
    """Width of the Mistral architecture."""
    layers: int = 4
    """Depth."""
    heads: int = 4
    """Attention heads; half as many key-value heads."""
    context: int = 512
    """Longest position."""
    learning_rate: float = 3e-3
    """Peak of a cosine schedule."""
    batch: int = 32
    """Documents an update."""
    micro_batch: int = 32
    """Documents a forward: fewer where they are long."""
    steps: int = 9000
    """Updates: below a few thousand, a model of this size does not yet answer what it is asked."""


@dataclass(frozen=True)
class World:
    """How many tasks the embedded world draws for each role; used only when data.world is true."""

    helpsteer_prompts: int = 600
    """Prompts with four HelpSteer-form answers each."""
    ultrafeedback_prompts: int = 1200
    """Prompts with four UltraFeedback-form answers each; D1 and D2 are their halves."""
    sft_prompts: int = 4000
    """Prompts with one answer of mixed quality."""
    tuning_prompts: int = 150
    """Prompts that knobs are chosen on (`evaluation.split`)."""
    test_prompts: int = 300
    """Prompts that only the final evaluation sees."""


@dataclass(frozen=True)
class Data:
    """Where prompts and ratings come from: hub names, or local jsonl, json and parquet files."""

    world: bool = False
    """Take everything from the embedded world instead."""
    helpsteer: str = "nvidia/HelpSteer"
    """Rated answers with five attributes 0-4 (section 3.1); "" for none."""
    ultrafeedback: str = "openbmb/UltraFeedback"
    """Raw UltraFeedback: four answers a prompt, four aspects and an overall score (section 3.1)."""
    pairs: str = ""
    """Preference pairs with overall scores only, in place of raw UltraFeedback: rows of prompt, chosen, rejected and
    metadata, or ultrafeedback_binarized (on the hub its `train_prefs`)."""
    splits: str = "HuggingFaceH4/ultrafeedback_binarized"
    """Names the validation prompts, by its `test_prefs` (section 3.1, footnote 3); "" draws them by hash. All other
    prompts that have rated answers are for training, whether or not its `train_prefs` has them."""
    prompts: str = ""
    """A file of validation prompts of its own, in place of both."""
    tuning_prompts: str = ""
    """A file of prompts that settings may be chosen on, in place of a share of the training prompts."""
    sft: str = "HuggingFaceH4/ultrachat_200k"
    """Chats for SFT (section 3.1); a file may hold rows of instruction, input and output instead."""
    helpsteer_scale: Literal["20l+10", "25l"] = "20l+10"
    """HelpSteer's 0-4 to 0-100; the default is the released reward model's."""
    ultrafeedback_scale: Literal["20r-10", "25r-25"] = "20r-10"
    """UltraFeedback's 1-5 to 0-100 (paper silent; the analogue of the former)."""
    overall_scale: Literal["10s-5", "100/9(s-1)"] = "10s-5"
    """UltraFeedback's overall 1-10 to 0-100 (paper silent)."""
    validation_prompts: int = 2000
    """Prompts of the validation set (section 3.2)."""
    heldout: float = 0.05
    """Share of rated prompts kept out of all training, to measure the reward model on (paper silent)."""
    judge: float = 0.0
    """Share of prompts whose ratings train the judge alone (paper silent: it has no second model)."""
    tuning: float = 0.0
    """Share of prompts that settings may be chosen on (paper silent); `dpa compare` needs some."""


@dataclass(frozen=True)
class Steering:
    """The directions users may ask for (section 3.1), and how a model reads them."""

    distribution: Literal["arc", "cone", "sphere", "simplex", "grid", "fixed"] = "arc"
    """P_v: angles uniform on an arc (section 3.1), or another population of users."""
    low: float = -45.0
    """Arc: degrees of its end of least verbosity (section 3.1)."""
    high: float = 0.0
    """Arc: degrees of its end of most helpfulness (section 3.1)."""
    stratified: bool = False
    """Arc: one angle from each of the equal slices, in place of independent draws (section 3.1)."""
    margin: float = 0.0
    """Arc: degrees beyond both ends that training directions may lie, so that a model has met both sides of what it is
    asked at an end. Evaluation and users keep to the arc (not in the paper: 0)."""
    center: tuple[float, ...] = ()
    """Cone: the direction in its middle, by objective."""
    angle: float = 45.0
    """Cone: degrees from its centre to its rim."""
    points: int = 10
    """Grid: evenly spread directions on the arc."""
    listed: tuple[tuple[float, ...], ...] = ()
    """Fixed: the directions themselves, by objective."""
    directions: int = 5
    """Directions a prompt and iteration (section 3.1)."""
    template: Literal["dpa-v1", "fig1", "world-v1"] = "dpa-v1"
    """The system line; the default is the released policy's."""

    def trained(self, objectives: int) -> Population:
        """What training directions are drawn from: P_v, with the margin around it.

        Raises:
            ValueError: a margin below zero, or around what is no arc.
        """
        population = self.population(objectives)
        if not self.margin:
            return population
        if self.margin < 0 or not isinstance(population, Arc):
            raise ValueError(
                f"preference.margin {self.margin:g} with a P_v of {self.distribution}: it widens an arc, by 0 or more"
            )
        return replace(population, low=self.low - self.margin, high=self.high + self.margin)

    def population(self, objectives: int) -> Population:
        """P_v over so many objectives (Eq. 4)."""
        match self.distribution:
            case "arc":
                return Arc(self.low, self.high, self.stratified)
            case "cone":
                return Cone(self.center, self.angle)
            case "sphere":
                return Sphere(objectives)
            case "simplex":
                return Simplex(objectives)
            case "grid":
                return Grid(Arc(self.low, self.high), self.points)
            case "fixed":
                return Fixed(self.listed)


@dataclass(frozen=True)
class Sampling:
    """Rejection sampling (section 3.1)."""

    n: int = 16
    """Answers a direction."""
    first: int = 80
    """Answers a prompt at t=1, over diverse reward targets."""
    first_targets: int = 16
    """Distinct reward targets among them (paper silent: "diverse reward combinations"). Where the
    annotated answers have fewer that `steerlm.template` can tell apart, all there are share the answers."""
    temperature: float = 1.0
    """True sampling: no top-k, no top-p."""
    prompt_tokens: int = 1024
    """A longer prompt is left out, and counted (paper silent)."""
    max_new_tokens: int = 2048
    """Paper silent; the released policy's."""
    prompts: int = 0
    """Prompts an iteration, the first by hash; 0 takes the whole half, as the paper does."""
    rows: int = 256
    """Answers decoded side by side."""
    shard: int = 256
    """Prompts a shard: the unit that a killed run resumes from."""


@dataclass(frozen=True)
class Evaluation:
    """Section 3.2's validation protocol, and its intervals."""

    split: Literal["validation", "tuning"] = "validation"
    """The prompts: the paper's, or those that knobs may be chosen on."""
    directions: int = 10
    """Even steps over the distribution."""
    samples: int = 2
    """Answers a prompt and direction."""
    temperature: float = 0.7
    """Sampling temperature."""
    dpo: str = ""
    """A DPO checkpoint to stand beside the others, a folder or hub name."""
    brevity: str = "Answer as briefly as you can."
    """What a model is told, in its system message, when it is merely asked for brevity (not in the paper)."""
    best_of: int = 16
    """Answers that the reward model chooses among in best-of-n at inference (not in the paper)."""
    controls: bool = False
    """Also ask SFT, and a base model that is a folder, for directions: what an untrained dial does."""
    reference: tuple[float, ...] = ()
    """Hypervolume's reference point, by objective; the world derives its own."""
    senses: tuple[int, ...] = ()
    """Fronts: 1 for an objective of which more is better, -1 for one of which less is. [] reads them off the
    directions, and leaves hypervolume out where these disagree."""
    bootstrap: int = 1000
    """Resamples of the prompts; `dpa compare` takes more where its pairs cannot be decided with so few."""


@dataclass(frozen=True)
class Recipe:
    """One experiment."""

    name: str
    """Names the run folder, runs/NAME."""
    seed: int = 42
    """Paper silent; Zephyr's."""
    iterations: int = 4
    """T (section 3.1)."""
    replay: float = 0.15
    """Share of original answers among the rows of each fine-tuning (section 3.1)."""
    alternate: bool = True
    """D1 and D2 take turns (section 3.1); false samples D1 at every t."""
    restart: bool = True
    """Each fine-tuning starts from SFT, not from the last policy (section 3.1)."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch. Results are equal bytes only at equal threads."""
    launcher: Literal["inprocess", "process", "torchrun", "accelerate"] = "process"
    """Heavy stages run here, or in a process of their own; torchrun and accelerate train in one per GPU."""
    jobs: int = 1
    """Steps that do not wait for each other, side by side, each in a process of its own with `threads` of the CPU: the
    same results, sooner. For machines without a GPU, which several steps would share."""
    processes: int = 1
    """Processes of torchrun or accelerate, over all machines."""
    launch: Launch = field(default_factory=Launch)
    """How they share a model."""
    cluster: Cluster = field(default_factory=Cluster)
    """A cluster to sample and score with."""
    model: Model = field(default_factory=Model)
    """Model."""
    pretrain: Pretrain = field(default_factory=Pretrain)
    """A base model from scratch."""
    world: World = field(default_factory=World)
    """The embedded world."""
    data: Data = field(default_factory=Data)
    """Data."""
    objectives: dict[str, tuple[str, ...]] = field(default_factory=lambda: {o.name: o.heads for o in PAPER_OBJECTIVES})
    """Each objective is the mean of the reward heads listed (section 3.1)."""
    heads: tuple[str, ...] = HEADS
    """The reward model's heads, in order (section 3.1). Names of one's own go with a reward that is given
    (`reward.checkpoint`): a model can be trained only on what the data label."""
    reward: Reward = field(default_factory=Reward)
    """Reward model."""
    sft: Training = field(default_factory=lambda: Training(learning_rate=2e-5, epochs=1.0, context=2048, batch=128))
    """SFT as in Zephyr's recipe (section 3.1 starts from its checkpoint)."""
    steerlm: SteerLM = field(default_factory=SteerLM)
    """SteerLM."""
    preference: Steering = field(default_factory=Steering)
    """Directional preferences."""
    sampling: Sampling = field(default_factory=Sampling)
    """Rejection sampling."""
    selection: Selection = field(default_factory=Selection)
    """The choice among scored answers."""
    engines: Engines = field(default_factory=Engines)
    """What samples and what scores."""
    finetune: Training = field(default_factory=Training)
    """Fine-tuning of each policy."""
    kernels: Kernels = field(default_factory=Kernels)
    """What all fine-tuning computes with."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    """Evaluation."""
    compare: Compare = field(default_factory=Compare)
    """Comparison."""
    feasibility: Feasibility = field(default_factory=Feasibility)
    """Feasibility."""
    dpo: DPO = field(default_factory=DPO)
    """DPO."""
    rl: RL = field(default_factory=RL)
    """RL."""
    rsf: RSF = field(default_factory=RSF)
    """Scalar rejection sampling."""
    soups: Soups = field(default_factory=Soups)
    """Rewarded soups."""

    def __post_init__(self) -> None:
        spread = self.engines.tensor_parallel
        if self.cluster.address and spread > 1 and self.cluster.gpus < spread:
            raise ValueError(
                f"cluster.gpus is {self.cluster.gpus:g}, and engines.tensor_parallel spreads an engine over {spread} "
                "GPUs; an actor reserves as many"
            )
        senses = self.evaluation.senses
        if senses and (len(senses) != len(self.objectives) or not set(senses) <= {1, -1}):
            raise ValueError(
                f"evaluation.senses is {list(senses)}: give one of 1 and -1 for each of {', '.join(self.objectives)}, "
                "or none"
            )

    @property
    def objective_list(self) -> tuple[Objective, ...]:
        return tuple(Objective(name, heads) for name, heads in self.objectives.items())


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, with command-line overrides such as `--sampling.n 8`.

    Raises:
        ValueError: bad TOML, an unknown key, a wrong type; names the file, the key and the nearest known name.
    """
    return config.load(Recipe, path, overrides)
