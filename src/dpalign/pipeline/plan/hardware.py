"""GPUs by their data sheets, the model that a recipe starts from, and what must be held in memory and on disk.

Memory and disk are estimates by formula, in bytes. Training holds weights, gradients and the optimizer's state in
float32, as it is done here (`training_dtype`), a LoRA's model in its own type, and with recomputed activations the
inputs of every layer and the inside of one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from dpalign.engines.architecture import KNOWN, Architecture, read_architecture
from dpalign.paper.direction import name_hint
from dpalign.pipeline.steps import recipe_of
from dpalign.recipe import Recipe
from dpalign.stages.cost import Load, Sizes, reward_models
from dpalign.stages.stage import Step
from dpalign.train.knobs import Training

GIB: Final = 2**30
USABLE: Final = 0.9
"""Of a GPU's memory; the rest is the libraries' and fragments."""
GROUPS: Final = (1, 2, 4, 8, 16, 32, 64)
WIDTHS: Final = {"bfloat16": 2, "float32": 4}
STATES: Final = {"adamw": 2, "rmsprop": 1}
"""Numbers a weight that an optimizer keeps."""
TRAININGS: Final = {
    "reward": "reward model",
    "sft": "SFT",
    "steerlm": "SteerLM",
    "finetune": "policy",
    "dpo": "DPO",
    "rl": "reinforcement",
}
"""The kinds of steps whose memory is told, and what they train."""
SCORE_BYTES: Final = 50
"""Of a scored answer: its rewards on all heads, and who it is."""


@dataclass(frozen=True)
class Gpu:
    """A kind of device."""

    name: str
    tflops: float
    """Peak of dense bfloat16 products (no sparsity), in 10^12 a second."""
    gib: float
    """Memory."""
    gb_s: float
    """Bandwidth of its memory, 10^9 bytes a second."""


GPUS: Final[Mapping[str, Gpu]] = {
    gpu.name: gpu
    for gpu in (
        Gpu("A6000", 154.8, 48, 768),
        Gpu("A100", 312.0, 80, 2039),
        Gpu("H100", 989.0, 80, 3350),
        Gpu("H200", 989.0, 141, 4800),
        Gpu("L40S", 362.0, 48, 864),
        Gpu("RTX4090", 165.2, 24, 1008),
        Gpu("cpu", 0.15, 16, 30),  # two cores with AVX2, in float32
    )
}
"""By the makers' data sheets; the A6000 is the paper's."""


def architecture_of(recipe: Recipe) -> Architecture:
    """The model that a recipe starts from.

    Raises:
        ValueError: neither a folder with a configuration nor a known name.
    """
    if not recipe.model.base:
        own = recipe.pretrain
        return Architecture(
            "the recipe's own",
            vocabulary=own.vocabulary,
            hidden=own.hidden,
            layers=own.layers,
            heads=own.heads,
            kv_heads=max(1, own.heads // 2),
            head_dim=own.hidden // own.heads,
            intermediate=own.hidden * 5 // 2,
            tied=True,
        )
    source = recipe.model.source
    if (Path(source) / "config.json").is_file():
        return read_architecture(Path(source), recipe.model.base)
    known = source.removesuffix("-Instruct")  # which has its base model's shape
    if known not in KNOWN:
        raise ValueError(
            f"model.base {source!r} is no folder with a config.json, and its shape is not known here "
            f"({name_hint(source, list(KNOWN))}); name a local folder of the model"
        )
    return replace(KNOWN[known], name=source)


@dataclass(frozen=True)
class Need:
    """What one kind of work holds, in bytes."""

    what: str
    model: float
    """Weights, and in training gradients and the optimizer's state: what several GPUs can divide."""
    beside: float
    """Activations, or keys and values: of each GPU in training; divided, too, in sampling and scoring."""
    divides: bool = False
    """Whether `beside` is divided with the model (tensor parallel)."""
    note: str = ""

    def on(self, gpus: int) -> float:
        """Bytes of each of so many."""
        return self.model / gpus + (self.beside / gpus if self.divides else self.beside)

    def least(self, gpu: Gpu) -> int | None:
        """The fewest GPUs that hold it; None: not even the most counted."""
        return next((n for n in GROUPS if self.on(n) <= USABLE * gpu.gib * GIB), None)

    def verdict(self, gpu: Gpu, gpus: int) -> str:
        """Whether it fits on so many, and how."""
        least = self.least(gpu)
        if least is None:
            return f"no: more than {GROUPS[-1]}"
        if least == 1:
            return "yes"
        needed = f"{least} by {'tensor parallel' if self.divides else 'FSDP or ZeRO-3'}"
        return f"yes: {needed}" if least <= gpus else f"no: {needed}" + ("" if self.divides else ", or a LoRA")


def needs(recipe: Recipe, model: Architecture, sizes: Sizes, steps: Sequence[Step]) -> list[Need]:
    """What each kind of work in these steps holds."""
    width = WIDTHS[recipe.model.dtype]
    weights = float(model.parameters * width)
    settings = recipe.sampling
    longest = settings.prompt_tokens + settings.max_new_tokens
    cache = model.cache(settings.rows * (sizes.prompt + sizes.answer), width)
    full = model.cache(longest, width) * settings.rows / GIB
    widest = 4 * model.hidden + 2 * model.intermediate
    scoring = float(recipe.reward.score_tokens * widest * width)
    at_once = f"{settings.rows} answers at once of mean length; all at their longest: {full:.3g} GiB"
    needs = [
        Need("sampling", weights, cache, divides=True, note=at_once),
    ]
    if models := reward_models(recipe):
        each = f", {models} models, each as large as the base model" if models > 1 else ""
        note = f"{recipe.reward.score_tokens} tokens at once{each}"
        needs.append(Need("scoring", models * weights, scoring, divides=True, note=note))
    stages = {step.stage.name: step.stage for step in steps}
    for kind in TRAININGS:
        trains = stages[kind].trains if kind in stages else None
        if trains is not None and not trains(recipe).checkpoint:
            need = _trained(kind, trains(recipe), recipe, model)
            needs.append(_reinforced(need, recipe, model, sizes) if kind == "rl" else need)
    return needs


def _reinforced(need: Need, recipe: Recipe, model: Architecture, sizes: Sizes) -> Need:
    """A training beside which stand the model that it diverges from, the reward model, and what its sampling keeps."""
    width, training = WIDTHS[recipe.model.dtype], recipe.rl.training
    reference = 0 if training.lora_rank or not recipe.rl.beta else WIDTHS["float32"] * model.parameters
    cache = model.cache(training.batch * (sizes.prompt + sizes.answer), width)
    note = f"{need.note}; {training.batch} answers drawn at once, models beside"
    rewards = reward_models(recipe) * model.parameters * width
    return replace(need, beside=float(need.beside + reference + rewards + cache), note=note)


def _trained(kind: str, training: Training, recipe: Recipe, model: Architecture) -> Need:
    width = WIDTHS[recipe.model.dtype]
    states = 1 + STATES[training.optimizer]  # with the gradient
    trained = WIDTHS["float32"] * (1 + states)
    held = _learned(training, model) * trained + (model.parameters * width if training.lora_rank else 0)
    rows = 1 if training.packing else training.micro_batch * (2 if kind == "dpo" else 1)
    longest = recipe.sampling.prompt_tokens + recipe.sampling.max_new_tokens
    context = longest if kind == "rl" else training.context
    tokens = rows * context
    inside = tokens * (8 * model.hidden + 3 * model.intermediate) * width
    activations = model.layers * tokens * model.hidden * width + inside
    per_weight = f"{trained} bytes a weight" if not training.lora_rank else f"LoRA of rank {training.lora_rank}"
    note = f"{per_weight}; {rows} x {context} tokens at once"
    return Need(f"training, {TRAININGS[kind]}", float(held), float(activations), note=note)


def _learned(training: Training, model: Architecture) -> int:
    """Weights that a training changes."""
    return model.lora(training.lora_rank) if training.lora_rank else model.parameters


def disk(
    recipe: Recipe, model: Architecture, sizes: Sizes, steps: Sequence[Step], loads: Mapping[str, Load]
) -> dict[str, float]:
    """Bytes that a run leaves, by what they are, and what it needs besides while it trains.

    A LoRA is merged at the end: the model that it leaves is whole, and only its checkpoints are small.
    """
    width = WIDTHS[recipe.model.dtype]
    weights = float(model.parameters * width)
    trained = [step for step in steps if loads[step.name].trained]
    row = (sizes.prompt + sizes.answer) * sizes.text_bytes
    trainings = [step.stage.trains(recipe_of(recipe, step)) for step in trained if step.stage.trains is not None]
    # What a training resumes from: the weights that learn, and the optimizer's state, in float32.
    checkpoints = [_learned(t, model) * WIDTHS["float32"] * (1 + STATES[t.optimizer]) for t in trainings]
    answers = sum(loads[step.name].answers for step in steps)
    scored = sum(loads[step.name].scored for step in steps)
    return {
        "data": (2 * sizes.prompts * sizes.rated + sizes.others) * row + sizes.chats * sizes.chat * sizes.text_bytes,
        "answers": answers * sizes.answer * sizes.text_bytes,
        "scores": scored * SCORE_BYTES,
        "selected": sum(loads[step.name].rows for step in steps if step.stage.name in ("finetune", "specialist")) * row,
        f"{len(trained)} trained models": len(trained) * weights,
        "while training (two checkpoints)": 2.0 * max(checkpoints, default=0),
    }
