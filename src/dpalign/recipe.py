"""The experiment: every knob of a run, with the paper's value as its default.

A recipe is one TOML file, read strictly: an unknown key is an error that names the nearest known one.
The text under each field is its help; "paper silent" marks a value that the paper does not give.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from dpalign import config
from dpalign.engines import Engines
from dpalign.kernels import Kernels
from dpalign.objectives import PAPER_OBJECTIVES, Objective
from dpalign.preference import Arc, Cone, DirectionDistribution, Fixed, Grid, Simplex, Sphere
from dpalign.records import HEADS
from dpalign.scale.knobs import Cluster, Launch
from dpalign.selection import Selection

WORLD_BASE: Final = Path(__file__).parent / "world" / "base"
"""The base model of the embedded world, installed with the package."""


@dataclass(frozen=True)
class Model:
    """The model that everything starts from."""

    base: str = "mistralai/Mistral-7B-v0.1"
    """A folder or hub name (section 3.1; Zephyr's base); "world" is the world's own, installed with this package;
    "" trains one from scratch ([pretrain])."""
    chat: Literal["zephyr", "world-v1"] = "zephyr"
    """The chat template of every policy (the released checkpoints' own)."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Weights as stored, sampled and scored with (paper silent; bfloat16 as in Zephyr's recipe). In training they are
    float32 and computed with in this type: AdamW's steps of 1e-5 are lost in bfloat16 weights."""
    trust_remote_code: bool = False
    """Run code that a hub repository ships; never needed for the paper's models."""

    @property
    def source(self) -> str:
        """Where the base model is found."""
        return str(WORLD_BASE) if self.base == "world" else self.base


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
    """Preference pairs with overall scores only, in place of raw UltraFeedback."""
    splits: str = "HuggingFaceH4/ultrafeedback_binarized"
    """Names the training and validation prompts (section 3.1, footnote 3); "" draws them by hash."""
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
    """Share of HelpSteer prompts kept to judge the reward model (paper silent)."""
    judge: float = 0.0
    """Share of prompts whose ratings train the judge alone (paper silent: it has no second model)."""
    tuning: float = 0.0
    """Share of prompts that settings may be chosen on (paper silent); `dpa compare` needs some."""


@dataclass(frozen=True)
class Training:
    """Supervised fine-tuning, as section 3.1 does it for every t."""

    checkpoint: str = ""
    """Take this model, a folder or hub name, instead of training one."""
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    """Section 3.1 has AdamW. Zephyr's DPO was trained with RMSprop: its model card says Adam, its authors that the card
    is wrong (alignment-handbook, issue 43)."""
    learning_rate: float = 1e-5
    """The optimizer's peak (section 3.1)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate schedule (section 3.1)."""
    warmup_steps: int | float = 20
    """Updates of warm-up (section 3.1); below 1 they are a share of all updates."""
    epochs: float = 2.0
    """Passes over the rows (section 3.1)."""
    steps: int = 0
    """Updates, in place of epochs when above 0: small runs count updates."""
    batch: int = 64
    """Rows an update, over all processes (section 3.1)."""
    micro_batch: int = 1
    """Rows a forward. Packed rows stand alone without flash-attention, whatever this says: TRL makes one long row of a
    micro-batch, and its mask grows with the square of that."""
    context: int = 4096
    """Tokens a row (section 3.1); a longer conversation is left out, and counted."""
    packing: bool = True
    """Several conversations a row, blind to each other (section 3.1; best-fit decreasing)."""
    loss_on: Literal["text", "answer"] = "text"
    """Section 3.1 optimises the loss "across the text corpus"; "answer" leaves prompts out of it."""
    weight_decay: float = 0.0
    """The optimizer's (paper silent)."""
    lora_rank: int = 0
    """Train a LoRA of this rank and merge it; 0 trains all weights (section 3.1)."""
    save_every: int = 500
    """Updates between the checkpoints that an interrupted training resumes from."""


@dataclass(frozen=True)
class Reward:
    """The multi-objective reward model (sections 2.1 and 3.1)."""

    checkpoint: str = ""
    """Take this reward model, a folder or hub name, instead of training one."""
    template: Literal["dpa-v1", "world-v1"] = "dpa-v1"
    """The text it reads; the default is the released model's."""
    lm_loss: float = 1.0
    """Weight of the language modelling loss (section 3.1 has one; its weight is unpublished)."""
    normalize: Literal["labels", "rows", "heads"] = "labels"
    """How the squared errors of Eq. 1 average: over observed labels, first within rows, or first within heads."""
    training: Training = field(default_factory=lambda: Training(epochs=1.0, packing=False, micro_batch=8))
    """Its training: learning rate, epochs and batch (paper silent)."""
    score_tokens: int = 16_384
    """Tokens a scoring batch, padding included."""
    share_prefix: bool = True
    """Read a prompt once for all its answers, where the model allows it: the same scores but for rounding, so that a
    change redoes nothing."""
    pairwise: str = ""
    """A local file of rows {prompt, chosen, rejected[, subset]} in RewardBench's form, on which to count how often the
    chosen answer is rated higher on the first objective; "" for none (not in the paper)."""


@dataclass(frozen=True)
class SteerLM:
    """The reward-conditioned model: pi_0 on D2, and the baseline on D1 and D2 (sections 2.3, 3.1, 3.2)."""

    template: Literal["steerlm", "world-v1"] = "steerlm"
    """How reward targets are written (paper silent; the authors of SteerLM's own form)."""
    targets: int = 5
    """Verbosity values the baseline is asked for (section 3.2)."""
    quantile: float = 1.0
    """The helpfulness asked for with each: this quantile among the annotated answers nearest in verbosity; 1 is
    section 3.2's "highest corresponding"."""
    training: Training = field(default_factory=Training)
    """Its fine-tuning."""


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation, the paper's strongest baseline (section 3.1): Zephyr-beta's settings."""

    beta: float = 0.1
    """Strength of the pull towards SFT."""
    pairs: Literal["ratings", "candidates"] = "ratings"
    """Of the data's own ratings, the best answer and one of the others (Zephyr's); or the best and the worst of the
    run's first candidates by the reward model's first objective."""
    training: Training = field(
        default_factory=lambda: Training(
            optimizer="rmsprop",
            learning_rate=5e-7,
            schedule="linear",
            warmup_steps=0.1,
            epochs=3.0,
            batch=32,
            context=1024,
            packing=False,
            loss_on="answer",
        )
    )
    """Its training; `batch` counts pairs, and a pair of which either side is longer than `context` is left out, and
    counted."""


@dataclass(frozen=True)
class RL:
    """Online reinforcement learning of one scalar reward, for Table 1's row PPO (not run in the paper)."""

    algorithm: Literal["grpo", "rloo"] = "grpo"
    """TRL's online trainers; PPO itself left TRL after 1.12."""
    beta: float = 0.04
    """Weight of the KL divergence from SFT, against a reward of about unit spread."""
    samples: int = 8
    """Answers a prompt, which are each other's baseline."""
    temperature: float = 1.0
    """Sampling temperature, without top-k or top-p."""
    training: Training = field(
        default_factory=lambda: Training(learning_rate=1e-6, steps=500, batch=64, packing=False, loss_on="answer")
    )
    """Its training: `steps` counts updates and `batch` answers. `epochs`, `packing` and `loss_on` are not used, nor is
    `context`: prompts and answers are as long as [sampling] lets them be."""


@dataclass(frozen=True)
class RSF:
    """Scalar rejection sampling at one fixed direction (RAFT): about the ceiling of DPA there."""

    n: int = 16
    """Answers a prompt, of which the best is kept: as for one of DPA's directions."""
    prompts: int = 0
    """Prompts an iteration; 0 takes the whole half."""
    steps: int = 0
    """Updates of each fine-tuning; 0 takes finetune's steps or epochs. A specialist has fewer rows than DPA."""


@dataclass(frozen=True)
class Soups:
    """Rewarded soups (section 2.3): experts whose weights are mixed for each direction."""

    experts: tuple[tuple[float, ...], ...] = ((1.0, 0.0), (0.0, -1.0))
    """The direction each expert was trained for, in the order of the experts."""


@dataclass(frozen=True)
class Compare:
    """What stands beside DPA in `dpa compare`, and the settings it may choose among on the tuning prompts."""

    systems: tuple[Literal["dpo", "steerlm", "soups", "rsf", "rl", "brief", "best-of-n"], ...] = (
        "dpo",
        "steerlm",
        "soups",
        "rsf",
        "rl",
        "brief",
        "best-of-n",
    )
    """Every system of the paper's Table 1, and what users try first."""
    dpo_betas: tuple[float, ...] = (0.05, 0.1, 0.5)
    """DPO's settings."""
    steerlm_quantiles: tuple[float, ...] = (1.0, 0.9, 0.75)
    """SteerLM's target grids (`steerlm.quantile`); 1 is the paper's."""
    soups: tuple[Literal["axes", "ends"], ...] = ("axes", "ends")
    """Pairs of experts: one an objective, or one for each end of the dial."""
    rsf_directions: int = 3
    """Even steps over the distribution, each with a specialist of its own."""
    rl_directions: int = 2
    """The same for RL."""
    rl_betas: tuple[float, ...] = (0.04,)
    """RL's settings, at each of its directions."""
    ablations: tuple[Literal["no replay", "no restart", "one half", "no LM loss"], ...] = ()
    """The loop again, each time without one of its parts; each costs about as much as the loop."""
    paper_curves: bool = False
    """Draw the paper's Fig. 4 beside the run's own: only with a reward model of the same scale can they be compared."""


@dataclass(frozen=True)
class Feasibility:
    """Asked for what cannot be had (section 2.3; Table 1's last column): `dpa compare` measures what the paper says."""

    prompts: int = 200
    """Evaluation prompts, the first by hash; 0 takes all."""
    samples: int = 1
    """Answers a prompt and condition."""
    angles: tuple[float, ...] = (15.0, 7.5, 0.0, -15.0, -30.0, -45.0, -52.5, -60.0, -75.0)
    """Degrees that the last policy is asked for: over its arc, and beyond both ends."""
    reach: tuple[float, ...] = (0.0, 0.5, 1.0)
    """SteerLM is asked for the first objective this share of the way from the highest annotated near each target to the
    top of the scale; 0 asks for section 3.2's targets."""
    repetition: float = 0.3
    """Share of an answer's runs of four words that occurred in it before, above which it counts as degenerate."""


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

    def trained(self, objectives: int) -> DirectionDistribution:
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

    def population(self, objectives: int) -> DirectionDistribution:
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
    """Distinct reward targets among them (paper silent: "diverse reward combinations")."""
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
    """Also ask the base and SFT models for directions: what an untrained dial does."""
    reference: tuple[float, ...] = ()
    """Hypervolume's reference point, by objective; the world derives its own."""
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
    """The reward model's heads, in order (section 3.1)."""
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

    @property
    def objective_list(self) -> tuple[Objective, ...]:
        return tuple(Objective(name, heads) for name, heads in self.objectives.items())


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, with command-line overrides such as `--sampling.n 8`.

    Raises:
        ValueError: bad TOML, an unknown key, a wrong type; names the file, the key and the nearest known name.
    """
    return config.load(Recipe, path, overrides)
