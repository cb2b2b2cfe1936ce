"""The knobs of what is trained and of what stands beside it: the trainings themselves, DPA's rivals, their comparison.

`recipe.py` has the whole recipe, and these names too.
"""

from dataclasses import dataclass, field
from typing import Literal

from dpalign.train.knobs import Training


@dataclass(frozen=True)
class Reward:
    """The multi-objective reward model (sections 2.1 and 3.1)."""

    checkpoint: str = ""
    """Take this reward instead of training a model: a folder, a hub name, or `python:module:function`, a function of
    prompts and responses that returns an array, an answer a row and a head a column. `heads` names its heads, and
    `objectives` what reads them; the data need no labels for them."""
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
    """Verbosity values the baseline is asked for (section 3.2); fewer where the annotated answers have fewer that the
    template can tell apart, such as labels 0..4."""
    quantile: float = 1.0
    """The helpfulness asked for with each: this quantile among the annotated answers nearest in verbosity, or with the
    same label of it; 1 is section 3.2's "highest corresponding"."""
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
    soups: tuple[Literal["axes", "ends"], ...] = ()
    """Experts of the soups: one an objective (axes), or one for each end of the dial. [] takes both, or axes alone
    where two ends cannot be mixed for every direction, as of three objectives."""
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

    def __post_init__(self) -> None:
        for name, wrong, needed in (
            ("dpo_betas", [beta for beta in self.dpo_betas if not beta > 0], "numbers above 0"),
            ("rl_betas", [beta for beta in self.rl_betas if not beta >= 0], "numbers of 0 or more"),
            ("steerlm_quantiles", [q for q in self.steerlm_quantiles if not 0 < q <= 1], "numbers above 0, 1 at most"),
        ):
            if wrong:
                raise ValueError(f"compare.{name} has {wrong[0]:g}; give {needed}")
        for name in ("rsf_directions", "rl_directions"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"compare.{name} is {getattr(self, name)}; give at least 1, or leave it out of systems"
                )


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
