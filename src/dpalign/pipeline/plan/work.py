"""What each step of a recipe computes: tokens and FLOPs, from counts of rows and mean lengths.

Sampling reads each prompt once for each condition (or once an answer) and decodes answers; scoring reads a prompt with
all its answers, the prompt once or once an answer; training costs three forwards a token, or two where only a LoRA
learns. Recomputed activations are not counted, as MFU has it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Final

from dpalign.pipeline import align
from dpalign.pipeline.plan.hardware import Architecture
from dpalign.recipe import Recipe
from dpalign.stages.stage import Step
from dpalign.train.knobs import Training

FORWARDS: Final = 3.0
"""Of a trained token: one, and a backward of two."""
FORWARDS_LORA: Final = 2.0
"""The frozen weights need no gradient of their own."""


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

    def __add__(self, other: "Load") -> "Load":
        return Load(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Load)))

    @property
    def flops(self) -> float:
        return self.sampling + self.scoring + self.training


@dataclass(frozen=True)
class Counting:
    """A recipe's steps as loads.

    Args:
        shared: a prompt is read once for all that follows it, not once an answer.
    """

    recipe: Recipe
    model: Architecture
    sizes: Sizes
    shared: bool = True

    def draw(self, prompts: float, conditions: float, n: float) -> Load:
        """n answers to each prompt under each condition."""
        sizes, model = self.sizes, self.model
        answers = prompts * conditions * n
        read = prompts * conditions * (1 if self.shared else n) * sizes.prompt
        decoded = model.forward(answers * sizes.answer, sizes.prompt + sizes.answer / 2, logits=True)
        prefilled = model.forward(read, sizes.prompt / 2, logits=False)
        return Load(answers=answers, sampled=answers * sizes.answer, read=read, sampling=decoded + prefilled)

    def score(self, prompts: float, answers: float) -> Load:
        """So many answers to each prompt."""
        sizes, model = self.sizes, self.model
        if self.shared and self.recipe.reward.share_prefix:
            read = prompts * (sizes.prompt + answers * sizes.answer)
            flops = model.forward(prompts * sizes.prompt, sizes.prompt / 2, logits=False)
            flops += model.forward(prompts * answers * sizes.answer, sizes.prompt + sizes.answer / 2, logits=False)
        else:
            whole = sizes.prompt + sizes.answer
            read = prompts * answers * whole
            flops = model.forward(read, whole / 2, logits=False)
        return Load(scored=prompts * answers, read=read, scoring=flops)

    def train(self, step: Step, rows: float, tokens: float, *, forwards: float = 0.0) -> Load:
        """Rows of so many tokens, for the step's epochs or updates.

        Args:
            forwards: of a reference model beside it, for each token.
        """
        training = training_of(align.recipe_of(self.recipe, step), step.kind)
        tokens = min(tokens, float(training.context))
        if training.checkpoint:
            return Load()
        if training.steps:
            filled = float(training.context) if training.packing else tokens
            trained = training.steps * training.batch * filled
        else:
            trained = rows * tokens * training.epochs
        costs = (FORWARDS_LORA if training.lora_rank else FORWARDS) + forwards
        flops = costs * self.model.forward(trained, tokens / 2, logits=True)
        return Load(rows=rows, trained=trained, training=flops)

    def loads(self, steps: Sequence[Step]) -> dict[str, Load]:
        """By step, in order."""
        by_name = {step.name: step for step in steps}
        return {step.name: self.load(step, by_name) for step in steps}

    def load(self, step: Step, steps: Mapping[str, Step]) -> Load:
        """What one step computes; what needs no model costs nothing here."""
        recipe, sizes = align.recipe_of(self.recipe, step), self.sizes
        row = sizes.prompt + sizes.answer
        match step.kind:
            case "base":
                return self.train(step, 0, recipe.pretrain.context)
            case "reward":
                return self.train(step, 2 * sizes.prompts * sizes.rated + sizes.others, row)
            case "judge":
                share = recipe.data.judge / (1 - recipe.data.judge)
                rated = 2 * sizes.prompts * sizes.rated + sizes.others
                return self.train(step, share * rated, row)
            case "annotate":
                return self.score(2 * sizes.prompts, sizes.rated)
            case "sft":
                return self.train(step, sizes.chats, sizes.chat)
            case "steerlm":
                halves = 2 if step.half == "both" else 1
                return self.train(step, halves * sizes.prompts * sizes.rated, row)
            case "sample":
                prompts, conditions, n = drawn(recipe, sizes, step)
                return self.draw(prompts, conditions, n)
            case "score":
                source = steps[str(step.inputs["candidates"])]
                prompts, conditions, n = drawn(align.recipe_of(self.recipe, source), sizes, source)
                return self.score(prompts, conditions * n)
            case "finetune" | "specialist":
                return self.train(step, self.selected(step, steps), row)
            case "dpo":
                return self.train(step, 2 * 2 * sizes.prompts, row, forwards=1 / max(1.0, recipe.dpo.training.epochs))
            case "rl":
                return self.reinforced(recipe, step)
            case "evaluate" | "soup" | "feasibility":
                return self.evaluated(recipe, step)
            case _:
                return Load()

    def selected(self, step: Step, steps: Mapping[str, Step]) -> float:
        """Conversations that a policy learns: a prompt's directions, and the replay (section 3.1)."""
        select = steps[str(step.inputs["chosen"])]
        recipe = align.recipe_of(self.recipe, select)
        source = steps[str(select.inputs["candidates"])]
        prompts, _, _ = drawn(align.recipe_of(self.recipe, source), self.sizes, source)
        return prompts * recipe.preference.directions / (1 - recipe.replay)

    def reinforced(self, recipe: Recipe, step: Step) -> Load:
        """RL: each update draws answers, scores them, and learns from them beside a reference."""
        settings, sizes = recipe.rl, self.sizes
        prompts = settings.training.steps * settings.training.batch / settings.samples
        row = sizes.prompt + sizes.answer
        learned = self.train(step, 0, row, forwards=1.0 if settings.beta else 0.0)
        return self.draw(prompts, 1, settings.samples) + self.score(prompts, settings.samples) + learned

    def evaluated(self, recipe: Recipe, step: Step) -> Load:
        """Answers to the evaluation's prompts, scored by the reward model and the judge."""
        settings = recipe.evaluation
        prompts = self.sizes.tuning if settings.split == "tuning" else self.sizes.evaluated
        conditions, samples = float(settings.directions), float(settings.samples)
        match step.kind, step.condition:
            case "feasibility", condition:
                asked = recipe.feasibility
                prompts = min(prompts, asked.prompts or prompts)
                conditions = float(len(asked.angles))
                if condition == "targets":
                    conditions = float(recipe.steerlm.targets * len(asked.reach))
                samples = float(asked.samples)
            case _, "targets":
                conditions = float(recipe.steerlm.targets)
            case _, "plain" | "brief":
                conditions = 1.0
            case _, "best-of-n":
                conditions, samples = 1.0, samples * settings.best_of
        load = self.draw(prompts, conditions, samples) + self.score(prompts, conditions * samples)
        return load + self.score(prompts, conditions * samples) if "judge" in step.inputs else load


def training_of(recipe: Recipe, kind: str) -> Training:
    """How a kind of step trains; one that names a checkpoint takes that, and trains nothing.

    Raises:
        KeyError: a kind that trains no model.
    """
    match kind:
        case "base":
            own = recipe.pretrain
            return Training(steps=own.steps, batch=own.batch, context=own.context, packing=False)
        case "reward" if recipe.reward.checkpoint:
            return Training(checkpoint=recipe.reward.checkpoint)
        case "reward" | "judge":
            return recipe.reward.training
        case "sft":
            return recipe.sft
        case "steerlm":
            return recipe.steerlm.training
        case "finetune" | "specialist":
            return recipe.finetune
        case "dpo":
            return recipe.dpo.training
        case "rl":
            return recipe.rl.training
        case _:
            raise KeyError(kind)


def drawn(recipe: Recipe, sizes: Sizes, step: Step) -> tuple[float, float, float]:
    """Prompts, conditions of each, and answers to each of a sample step."""
    settings = recipe.sampling
    prompts = min(sizes.prompts, settings.prompts or sizes.prompts)
    match step.condition:
        case "targets":
            return prompts, settings.first_targets, settings.first / settings.first_targets
        case "plain":
            return prompts, 1, settings.n
        case _:
            return prompts, recipe.preference.directions, settings.n
