"""What a stage computes: tokens and FLOPs, from counts of rows and mean lengths.

Sampling reads each prompt once for each condition (or once for each answer), and decodes the answers. Scoring reads
all answers, and each prompt once (or once for each answer). Training costs three forwards a token, or two if only a
LoRA learns. As in MFU, recomputed activations are not counted.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Final

from dpalign.engines.architecture import Architecture

if TYPE_CHECKING:
    from dpalign.recipe import Recipe
    from dpalign.stages.stage import Step
    from dpalign.train.knobs import Training

FORWARDS: Final = 3.0
"""For each trained token: one forward, and a backward that costs two."""
FORWARDS_LORA: Final = 2.0
"""The frozen weights need no gradient of their own."""
ORIGINALS_EACH: Final = 4
"""Plain answers a prompt that replace rated ones if the data have none; UltraFeedback has four too."""


@dataclass(frozen=True)
class Sizes:
    """The number of rows and their lengths: assumed, unless a run has measured them."""

    prompt: float = 220.0
    """Tokens of a prompt, its system line included."""
    answer: float = 300.0
    """Tokens of an answer."""
    prompts: float = 32_000.0
    """Prompts of D1, and of D2 (half of UltraFeedback's 64k)."""
    rated: float = 4.0
    """Rated answers to each."""
    others: float = 35_000.0
    """Further rated answers, which only train the reward model (HelpSteer)."""
    chats: float = 200_000.0
    """Chats of SFT (UltraChat)."""
    chat: float = 1200.0
    """Tokens of a chat."""
    evaluated: float = 2000.0
    """Prompts of the evaluation (section 3.2)."""
    tuning: float = 0.0
    """Prompts that settings are chosen on."""
    text_bytes: float = 2.0
    """Compressed bytes on disk for each token of text."""


@dataclass(frozen=True)
class Load:
    """What a step computes."""

    answers: float = 0.0
    """Answers drawn."""
    sampled: float = 0.0
    """Their tokens."""
    scored: float = 0.0
    """Answers scored."""
    read: float = 0.0
    """Tokens of prompts and answers that sampling and scoring read in parallel; decoded tokens are not among them."""
    rows: float = 0.0
    """Rows trained on, each once."""
    trained: float = 0.0
    """Tokens trained on, over all epochs."""
    sampling: float = 0.0
    """FLOPs."""
    scoring: float = 0.0
    """FLOPs."""
    training: float = 0.0
    """FLOPs."""
    measuring: float = 0.0
    """FLOPs of scoring in the first process of a training, while the other processes wait."""
    fitting: float = 0.0
    """FLOPs of scoring that every process repeats in float32: the first fit of a reward model's head."""
    decodes: float = 0.0
    """Decoding steps; each gives one token to every answer of the batch."""
    forwards: float = 0.0
    """Forwards of the whole model that PyTorch launches kernel by kernel; vLLM replays graphs."""
    parts: float = 0.0
    """Shards of the sampling and scoring, a partly filled one as a fraction; 0 without shards."""

    def __add__(self, other: "Load") -> "Load":
        """The sum of two loads over the same shards."""
        total = Load(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Load)))
        return replace(total, parts=max(self.parts, other.parts))

    @property
    def flops(self) -> float:
        return self.sampling + self.scoring + self.training


def reward_models(recipe: "Recipe") -> int:
    """The number of reward models that score an answer; Python functions do not count."""
    return sum(1 for reward in recipe.rewards.values() if not reward.function) if recipe.rewards else 1


def processes(recipe: "Recipe") -> int:
    """The processes of a training, each on a GPU of its own."""
    return recipe.processes if recipe.launcher in ("torchrun", "accelerate") else 1


def rows_a_forward(recipe: "Recipe", training: "Training") -> int:
    """The rows of a training's forward: a packed row is alone in it without flash-attention, whatever `micro_batch`."""
    return 1 if training.packing and recipe.kernels.attention == "sdpa" else training.micro_batch


@dataclass(frozen=True)
class Costs:
    """What the stages of a recipe cost, from the answers they draw and score and the rows they train on.

    Args:
        of_step: the recipe as a step reads it, with the knobs that the step sets for itself.
        shared: a prompt is read once for all its answers, not once for each.
    """

    recipe: "Recipe"
    model: Architecture
    sizes: Sizes
    steps: "Mapping[str, Step]"
    of_step: "Callable[[Step], Recipe]"
    shared: bool = True

    @property
    def row(self) -> float:
        """Tokens of a prompt with an answer."""
        return self.sizes.prompt + self.sizes.answer

    @property
    def originals(self) -> tuple[float, float]:
        """The number of prompts of both halves with original answers, and of answers to each."""
        prompts = 2 * self.sizes.prompts
        if self.recipe.data.answered:
            return prompts, self.sizes.rated
        return min(prompts, 2 * self.recipe.sampling.prompts or prompts), len(self.recipe.data.hints) or ORIGINALS_EACH

    def draw(self, prompts: float, conditions: float, n: float, shard: float = 0.0, rows: float = 0.0) -> Load:
        """n answers to each prompt under each condition.

        Args:
            shard: prompts in a shard; 0 without shards.
            rows: answers decoded side by side by a training, which samples with transformers; 0 takes [sampling] and
                [engines].
        """
        sizes, model, recipe = self.sizes, self.model, self.recipe
        answers = prompts * conditions * n
        tokens = answers * sizes.answer
        read = prompts * conditions * (1 if self.shared else n) * sizes.prompt
        decoded = model.forward(tokens, sizes.prompt + sizes.answer / 2, logits=True)
        prefilled = model.forward(read, sizes.prompt / 2, logits=False)
        decodes = tokens / (rows or recipe.sampling.rows)
        return Load(
            answers=answers,
            sampled=tokens,
            read=read,
            sampling=decoded + prefilled,
            decodes=decodes,
            forwards=decodes if rows or recipe.engines.sampling == "transformers" else 0.0,
            parts=prompts / shard if shard else 0.0,
        )

    def score(self, prompts: float, answers: float, shard: float = 0.0, models: int | None = None) -> Load:
        """Scores of `answers` answers to each prompt; each reward model is assumed as large as the base model.

        Args:
            shard: prompts in a shard; 0 without shards.
            models: the number of models that score; None counts all rewards.
        """
        sizes, model = self.sizes, self.model
        models = reward_models(self.recipe) if models is None else models
        if self.shared and self.recipe.reward.share_prefix:
            read = prompts * (sizes.prompt + answers * sizes.answer)
            flops = model.forward(prompts * sizes.prompt, sizes.prompt / 2, logits=False)
            flops += model.forward(prompts * answers * sizes.answer, sizes.prompt + sizes.answer / 2, logits=False)
        else:
            whole = sizes.prompt + sizes.answer
            read = prompts * answers * whole
            flops = model.forward(read, whole / 2, logits=False)
        parts = prompts / shard if shard else 0.0
        eager = self.recipe.engines.scoring == "transformers"
        forwards = models * read / self.recipe.reward.score_tokens if eager else 0.0
        return Load(
            scored=prompts * answers, read=models * read, scoring=models * flops, forwards=forwards, parts=parts
        )

    def train(self, step: "Step", rows: float, tokens: float, *, forwards: float = 0.0) -> Load:
        """A training on rows of `tokens` tokens, for the step's epochs or updates.

        Args:
            forwards: further forwards a token, by a reference model.
        """
        assert step.stage.trains is not None
        training = step.stage.trains(self.of_step(step))
        tokens = min(tokens, float(training.context))
        if training.checkpoint:
            return Load()
        if training.steps:
            filled = float(training.context) if training.packing else tokens
            trained = training.steps * training.batch * filled
        else:
            trained = rows * tokens * training.epochs
        at_once = float(training.context) if training.packing else training.micro_batch * tokens
        factor = (FORWARDS_LORA if training.lora_rank else FORWARDS) + forwards
        flops = factor * self.model.forward(trained, tokens / 2, logits=True)
        return Load(rows=rows, trained=trained, training=flops, forwards=FORWARDS * trained / at_once)

    def load(self, step: "Step") -> Load:
        """What one step computes; a step without a model costs nothing here."""
        return step.stage.cost(self, step) if step.stage.cost is not None else Load()
