"""What a stage computes: tokens and FLOPs, from counts of rows and mean lengths.

Sampling reads each prompt once for each condition (or once an answer) and decodes answers; scoring reads a prompt with
all its answers, the prompt once or once an answer; training costs three forwards a token, or two where only a LoRA
learns. Recomputed activations are not counted, as MFU has it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Final

from dpalign.engines.architecture import Architecture

if TYPE_CHECKING:
    from dpalign.recipe import Recipe
    from dpalign.stages.stage import Step

FORWARDS: Final = 3.0
"""Of a trained token: one, and a backward of two."""
FORWARDS_LORA: Final = 2.0
"""The frozen weights need no gradient of their own."""


ORIGINALS: Final = 4
"""Plain answers a prompt that stand for rated ones where the data have none: as many as UltraFeedback's."""


@dataclass(frozen=True)
class Sizes:
    """How many rows there are, and how long: assumed, unless a run has measured it."""

    prompt: float = 220.0
    """Tokens of a prompt, its system line included."""
    answer: float = 300.0
    """Tokens of an answer."""
    prompts: float = 32_000.0
    """Prompts of D1, and of D2 (half of UltraFeedback's 64k)."""
    rated: float = 4.0
    """Rated answers to each."""
    others: float = 35_000.0
    """Rated answers besides, which train the reward model alone (HelpSteer)."""
    chats: float = 200_000.0
    """Chats of SFT (UltraChat)."""
    chat: float = 1200.0
    """Tokens of one."""
    evaluated: float = 2000.0
    """Prompts of the evaluation (section 3.2)."""
    tuning: float = 0.0
    """Prompts that settings are chosen on."""
    text_bytes: float = 2.0
    """Bytes on disk of a token of text, compressed."""


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
    """Tokens of prompts and answers that sampling and scoring read at once, beside those decoded one by one."""
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
    """FLOPs of the scoring that the first process of a training does while the others wait."""
    fitting: float = 0.0
    """FLOPs of the scoring that every process does for itself, in float32: the first fit of a reward model's head."""
    decodes: float = 0.0
    """Steps in which all answers side by side get a token each."""
    forwards: float = 0.0
    """Forwards of the whole model that PyTorch launches kernel by kernel; vLLM replays graphs."""
    parts: float = 0.0
    """Shards of the drawing and scoring, the last one as the share that it fills; 0 where there are none."""

    def __add__(self, other: "Load") -> "Load":
        """Both, over the same shards."""
        total = Load(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Load)))
        return replace(total, parts=max(self.parts, other.parts))

    @property
    def flops(self) -> float:
        return self.sampling + self.scoring + self.training


def reward_models(recipe: "Recipe") -> int:
    """The models that score an answer; a Python function is none."""
    return sum(1 for reward in recipe.rewards.values() if not reward.function) if recipe.rewards else 1


def processes(recipe: "Recipe") -> int:
    """The processes of a training, each on a GPU of its own."""
    return recipe.processes if recipe.launcher in ("torchrun", "accelerate") else 1


@dataclass(frozen=True)
class Costs:
    """What the stages of a recipe cost, told by what they draw, score and train on.

    Args:
        of_step: the recipe as a step reads it, with the knobs that the step sets for itself.
        shared: a prompt is read once for all that follows it, not once an answer.
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
        """The prompts of both halves that have original answers, and how many each has."""
        prompts = 2 * self.sizes.prompts
        if self.recipe.data.answered:
            return prompts, self.sizes.rated
        return min(prompts, 2 * self.recipe.sampling.prompts or prompts), len(self.recipe.data.hints) or ORIGINALS

    def draw(self, prompts: float, conditions: float, n: float, shard: float = 0.0, rows: float = 0.0) -> Load:
        """n answers to each prompt under each condition.

        Args:
            shard: prompts of a shard; 0 where the work has none.
            rows: answers side by side in a training's process, which draws by transformers; 0: as [sampling] and
                [engines] say.
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
        """So many answers to each prompt, by every reward; each model is taken to be as large as the base model.

        Args:
            shard: prompts of a shard; 0 where the work has none.
            models: those that score, if not all rewards.
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
        """Rows of so many tokens, for the step's epochs or updates.

        Args:
            forwards: of a reference model beside it, for each token.
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
        """What one step computes; what needs no model costs nothing here."""
        return step.stage.cost(self, step) if step.stage.cost is not None else Load()
