"""GPUs by their data sheets, the model that a recipe starts from, and the memory and disk that its steps need.

Memory and disk are estimates by formula, in bytes. Training holds weights, gradients and the optimizer's state in
float32 (`training_dtype`), and a LoRA's model in its own type. Activations are recomputed: it holds the inputs of every
layer and the inside of one. TRL computes the losses of its trainers without all logits (`kernels/`); the reward model
and the base model from scratch hold them in float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from dpalign.engines.architecture import KNOWN, Architecture, read_architecture
from dpalign.paper.direction import name_hint
from dpalign.pipeline.steps import recipe_of
from dpalign.recipe import Recipe
from dpalign.runs.hub import revised
from dpalign.stages.cost import Load, Sizes, processes, reward_models, rows_a_forward
from dpalign.stages.rl import Reinforcing, online
from dpalign.stages.stage import Step
from dpalign.train.knobs import Training

GIB: Final = 2**30
USABLE: Final = 0.9
"""Share of a GPU's memory; libraries and fragments take the rest."""
GROUPS: Final = (1, 2, 4, 8, 16, 32, 64)
WIDTHS: Final = {"bfloat16": 2, "float32": 4}
LOGITS: Final = 3
"""Float32 numbers a logit in training: the logit, its log-softmax and a gradient."""
DRAWN_LOGIT: Final = 3 * 8
"""Bytes a logit when the transformers engine draws: the logit, its probability and their running sum, in float64."""
READ_TOKENS: Final = 16_384
"""Tokens of a forward in the first fit of the reward model's head (`rewards.model.READ_TOKENS`)."""
TOKEN_BYTES: Final = 2 * 4
"""Bytes on disk of a token that is trained on: its id and its label."""
STATES: Final = {"adamw": 2, "rmsprop": 1}
"""Numbers that an optimizer keeps for each weight."""
TRAININGS: Final = {
    "base": "base model",
    "reward": "reward model",
    "sft": "SFT",
    "steerlm": "SteerLM",
    "finetune": "policy",
    "dpo": "DPO",
    "rl": "reinforcement",
    "prefer": "policy (DPO)",
    "reinforce": "policy (GRPO)",
}
"""The trainings in the table of memory: the stage, and what it trains."""
SCORE_BYTES: Final = 50
"""Bytes on disk of a scored answer: its rewards on all heads, and its ids."""


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
    float32: float
    """Peak of float32 products without TF32, in 10^12 a second."""
    launch: float = 8e-4
    """The least seconds of a layer's forward that PyTorch launches kernel by kernel, assumed for any GPU. (7B models
    are known to decode at about 40 forwards a second in transformers, on a GPU of any speed.)"""

    def peak(self, dtype: str) -> float:
        """The peak of products a second in a recipe's `model.dtype`."""
        return 1e12 * (self.tflops if dtype == "bfloat16" else self.float32)


GPUS: Final[Mapping[str, Gpu]] = {
    gpu.name: gpu
    for gpu in (
        Gpu("A6000", 154.8, 48, 768, 38.7),
        Gpu("A100", 312.0, 80, 2039, 19.5),
        Gpu("H100", 989.0, 80, 3350, 66.9),
        Gpu("H200", 989.0, 141, 4800, 66.9),
        Gpu("L40S", 362.0, 48, 864, 91.6),
        Gpu("RTX4090", 165.2, 24, 1008, 82.6),
        Gpu("cpu", 0.15, 16, 30, 0.15, 0.0),  # two cores with AVX2, in float32
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
    known = revised(source)[0].removesuffix("-Instruct")  # which has its base model's shape
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
    """Activations, or keys and values: each GPU's own in training, divided in sampling and scoring."""
    divides: bool = False
    """Whether `beside` is divided with the model (tensor parallel)."""
    note: str = ""
    logits: float = 0.0
    """On each GPU."""
    gradients: float = 0.0
    """Undivided gradients on each GPU: FSDP2 adds up an update's micro-batches before it divides them."""
    room: float = 0.0
    """The least memory of a GPU in which vLLM's shares hold their engines."""
    undivided: bool = False
    """Whether one GPU must hold it all."""

    def on(self, gpus: int) -> float:
        """Bytes on each of so many GPUs."""
        parts = 1 if self.undivided else gpus
        beside = self.beside / parts if self.divides else self.beside
        return self.model / parts + beside + self.logits + self.gradients

    def fits(self, gpu: Gpu, gpus: int) -> bool:
        """Whether so many GPUs hold it."""
        return self.on(gpus) <= USABLE * gpu.gib * GIB and self.room / gpus <= gpu.gib * GIB

    def least(self, gpu: Gpu) -> int | None:
        """The fewest GPUs that hold it; None if not even the largest of GROUPS does."""
        return next((n for n in ((1,) if self.undivided else GROUPS) if self.fits(gpu, n)), None)

    def verdict(self, gpu: Gpu, gpus: int) -> str:
        """Whether it fits on so many GPUs, and how."""
        least = self.least(gpu)
        if least is None:
            return "no: one must hold it" if self.undivided else f"no: more than {GROUPS[-1]}"
        if least == 1:
            return "yes"
        needed = f"{least} by {'tensor parallel' if self.divides else 'FSDP or ZeRO-3'}"
        return f"yes: {needed}" if least <= gpus else f"no: {needed}" + ("" if self.divides else ", or a LoRA")


def needs(recipe: Recipe, model: Architecture, sizes: Sizes, steps: Sequence[Step]) -> list[Need]:
    """What each kind of work in these steps holds."""
    needs = [_sampling(recipe, model, sizes)]
    if reward_models(recipe):
        needs.append(_scoring(recipe, model))
    judged = [step for step in steps if {"policy", "reward"} <= {*step.inputs}]
    if judged:
        needs.append(_evaluating(recipe, model, sizes, judge=any("judge" in step.inputs for step in judged)))
    stages = {step.stage.name: step.stage for step in steps}
    for kind in TRAININGS:
        trains = stages[kind].trains if kind in stages else None
        if trains is None or trains(recipe).checkpoint:
            continue
        if kind == "reward":
            needs.append(_fitted(recipe, model))
            if recipe.reward.freeze:
                continue
        need = _trained(kind, trains(recipe), recipe, model)
        settings = online(recipe, kind)
        needs.append(_reinforced(need, recipe, settings, model, sizes) if settings else need)
    return needs


def _sampling(recipe: Recipe, model: Architecture, sizes: Sizes) -> Need:
    """A policy with the keys and values of its answers. vLLM takes all that it may, and needs those of one answer."""
    width, settings = WIDTHS[recipe.model.dtype], recipe.sampling
    weights, longest = float(model.parameters * width), settings.prompt_tokens + settings.max_new_tokens
    if recipe.engines.sampling == "vllm":
        share = recipe.engines.gpu_memory
        one = model.cache(longest, width)
        note = f"vLLM takes {share:.0%} of a GPU; least: one answer of {longest} tokens"
        return Need("sampling", weights, one, divides=True, note=note, room=(weights + one) / share)
    cache = model.cache(settings.rows * (sizes.prompt + sizes.answer), width)
    full = model.cache(longest, width) * settings.rows / GIB
    note = f"{settings.rows} answers at once of mean length; all at their longest: {full:.3g} GiB"
    return Need("sampling", weights, cache, divides=True, note=note, logits=_drawn(recipe, model))


def _drawn(recipe: Recipe, model: Architecture) -> float:
    """Bytes of the logits from which the transformers engine draws a token for each answer."""
    return float(recipe.sampling.rows * model.vocabulary * DRAWN_LOGIT)


def _read(recipe: Recipe, model: Architecture, tokens: int, width: int) -> float:
    """Bytes of a forward without gradients over so many tokens."""
    return float(tokens * (4 * model.hidden + 2 * model.intermediate) * width)


def _scoring(recipe: Recipe, model: Architecture) -> Need:
    width, models, tokens = WIDTHS[recipe.model.dtype], reward_models(recipe), recipe.reward.score_tokens
    weights = float(models * model.parameters * width)
    each = f"{models} models, each as large as the base model" if models > 1 else ""
    if recipe.engines.scoring == "vllm":
        share = recipe.engines.gpu_memory
        note = "; ".join(filter(None, [f"vLLM takes {share:.0%} of a GPU", each]))
        return Need("scoring", weights, 0.0, divides=True, note=note, room=weights / share)
    note = "; ".join(filter(None, [f"{tokens} tokens at once", each]))
    return Need("scoring", weights, _read(recipe, model, tokens, width), divides=True, note=note)


def _evaluating(recipe: Recipe, model: Architecture, sizes: Sizes, *, judge: bool) -> Need:
    """The policy, the rewards and the judge, all loaded.

    Under vLLM the policy has half of the granted memory, the rewards a quarter together, and the judge another.
    """
    width, rewards = WIDTHS[recipe.model.dtype], reward_models(recipe)
    by_vllm, scored_by_vllm = recipe.engines.sampling == "vllm", recipe.engines.scoring == "vllm"
    weights = float(model.parameters * width)
    drawing, scoring = _sampling(recipe, model, sizes), _read(recipe, model, recipe.reward.score_tokens, width)
    scorers = [0.25 / max(1, rewards)] * rewards + [0.25] * judge
    shares = [0.5] * by_vllm + scorers * scored_by_vllm
    room = 0.0
    if shares:  # the smallest share must hold an engine, and the rest the models of transformers
        room = (weights + drawing.beside * by_vllm) / (recipe.engines.gpu_memory * min(shares))
        others = 0.0 if by_vllm else drawing.on(1)
        others += 0.0 if scored_by_vllm else len(scorers) * weights + scoring
        room = max(room, others / max(USABLE - recipe.engines.gpu_memory * sum(shares), 0.01))
    note = f"policy + {rewards} reward{'s' if rewards > 1 else ''}{' + judge' if judge else ''}, all loaded"
    if by_vllm and scored_by_vllm:
        note += "; vLLM: a half and quarters of a GPU"
    return Need(
        "evaluation",
        (1 + len(scorers)) * weights,
        max(drawing.beside, 0.0 if scored_by_vllm else scoring),
        divides=True,
        note=note,
        logits=drawing.logits,
        room=room,
    )


def _reinforced(need: Need, recipe: Recipe, settings: Reinforcing, model: Architecture, sizes: Sizes) -> Need:
    """A training with its reference model, the reward models, and the keys and values of its sampling beside it."""
    width, training = WIDTHS[recipe.model.dtype], settings.training
    reference = 0.0 if training.lora_rank or not settings.beta else float(WIDTHS["float32"] * model.parameters)
    rows = max(1, training.batch // processes(recipe))
    beside = need.beside + reward_models(recipe) * model.parameters * width
    beside += model.cache(rows * (sizes.prompt + sizes.answer), width)
    note = f"{need.note}; {rows} answers drawn at once, the reference and the rewards beside"
    if _shared(recipe) in ("fsdp2", "zero3"):  # TRL divides the reference as it does the model
        return replace(need, model=need.model + reference, beside=beside, note=note)
    return replace(need, beside=beside + reference, note=note)


def _shared(recipe: Recipe) -> str:
    """The configuration by which a training's processes share a model; "" if each has its own."""
    return recipe.launch.config if recipe.launcher == "accelerate" else ""


def _fitted(recipe: Recipe, model: Architecture) -> Need:
    """The first fit of the reward model's head: each process holds the whole model, before it is divided."""
    training = recipe.reward.training
    width = WIDTHS[recipe.model.dtype if training.lora_rank or recipe.reward.freeze else "float32"]
    note = f"{width} bytes a weight, whole in each process; {READ_TOKENS} tokens at once"
    read = _read(recipe, model, READ_TOKENS, width)
    return Need("fit of the reward head", float(model.parameters * width), read, note=note, undivided=True)


def _trained(kind: str, training: Training, recipe: Recipe, model: Architecture) -> Need:
    width = WIDTHS[recipe.model.dtype]
    states = 1 + STATES[training.optimizer]  # with the gradient
    trained = WIDTHS["float32"] * (1 + states)
    held = _learned(training, model) * trained + (model.parameters * width if training.lora_rank else 0)
    micro = rows_a_forward(recipe, training)
    rows = micro * (2 if kind in ("dpo", "prefer") else 1)
    longest = recipe.sampling.prompt_tokens + recipe.sampling.max_new_tokens
    context = longest if kind in ("rl", "reinforce") else training.context
    tokens = rows * context
    inside = tokens * (8 * model.hidden + 3 * model.intermediate) * width
    activations = float(model.layers * tokens * model.hidden * width + inside)
    per_weight = f"{trained} bytes a weight" if not training.lora_rank else f"LoRA of rank {training.lora_rank}"
    note = f"{per_weight}; {rows} x {context} tokens at once"
    upcast = kind == "base" or (kind == "reward" and recipe.reward.lm_loss > 0)
    logits = float(tokens * model.vocabulary * LOGITS * WIDTHS["float32"]) if upcast else 0.0
    config = _shared(recipe)
    if config in ("fsdp2", "zero3"):  # two layers are gathered at a time, and the embeddings
        gathered = 2 * model.linear / model.layers + model.embedding * (1 if model.tied else 2)
        activations += gathered * width
    forwards = training.batch // (micro * processes(recipe))
    whole = config == "fsdp2" and forwards > 1
    if whole:
        note += f"; FSDP2 holds gradients whole over {forwards} forwards, ZeRO does not"
    gradients = float(_learned(training, model) * WIDTHS["float32"]) if whole else 0.0
    what = f"training, {TRAININGS[kind]}"
    return Need(what, float(held), activations, note=note, logits=logits, gradients=gradients)


def _learned(training: Training, model: Architecture) -> int:
    """Weights that a training changes."""
    return model.lora(training.lora_rank) if training.lora_rank else model.parameters


def disk(
    recipe: Recipe, model: Architecture, sizes: Sizes, steps: Sequence[Step], loads: Mapping[str, Load]
) -> dict[str, float]:
    """Bytes that a run leaves, by kind, and those that it needs only while it trains.

    A LoRA is merged at the end: its model is whole, and only its checkpoints are small.
    """
    width = WIDTHS[recipe.model.dtype]
    weights = float(model.parameters * width)
    trained = [step for step in steps if loads[step.name].trained]
    row = (sizes.prompt + sizes.answer) * sizes.text_bytes
    trainings = [step.stage.trains(recipe_of(recipe, step)) for step in trained if step.stage.trains is not None]
    # A checkpoint holds the weights that learn and the optimizer's state, in float32. Two are kept while a third is
    # written.
    checkpoints = [_learned(t, model) * WIDTHS["float32"] * (1 + STATES[t.optimizer]) for t in trainings]
    answers = sum(loads[step.name].answers for step in steps)
    scored = sum(loads[step.name].scored for step in steps)
    # A training keeps its rows as tokens, and a second time if it packs them.
    tokens = [
        loads[step.name].rows
        * (sizes.chat if step.stage.name == "sft" else sizes.prompt + sizes.answer)
        * (1 + t.packing)
        for step, t in zip(trained, trainings, strict=True)
    ]
    # A pair is a prompt with two answers, and counts as two rows; trainings of one set of pairs share it.
    paired = {step.inputs["pairs"]: loads[step.name].rows for step in trained if "pairs" in step.inputs}
    pair = (sizes.prompt + 2 * sizes.answer) * sizes.text_bytes
    return {
        "data": (2 * sizes.prompts * sizes.rated + sizes.others) * row + sizes.chats * sizes.chat * sizes.text_bytes,
        "answers": answers * sizes.answer * sizes.text_bytes,
        "scores": scored * SCORE_BYTES,
        "selected": sum(loads[step.name].rows for step in steps if step.stage.name in ("finetune", "specialist")) * row,
        **({"pairs": sum(paired.values()) / 2 * pair} if paired else {}),
        f"{len(trained)} trained models": len(trained) * weights,
        "while training (three checkpoints)": 3.0 * max(checkpoints, default=0),
        "while training (rows as tokens)": TOKEN_BYTES * max(tokens, default=0.0),
    }


def host(recipe: Recipe, model: Architecture, steps: Sequence[Step], loads: Mapping[str, Load]) -> dict[str, float]:
    """Bytes of host memory, by kind of work. Each process of a training loads the whole model there before it is
    divided, and each actor its own. Rows are in mapped files and take none."""
    width, held = WIDTHS[recipe.model.dtype], dict[str, float]()
    actors = recipe.cluster.actors if recipe.cluster.address else 1
    held["sampling, scoring"] = float(actors * model.parameters * width)
    for step in steps:
        if step.stage.trains is not None and loads[step.name].trained:
            lora = step.stage.trains(recipe_of(recipe, step)).lora_rank
            weights = model.parameters * (width if lora else WIDTHS["float32"])
            what = "training, LoRA" if lora else "training"
            held[what] = float(processes(recipe) * weights)
    return held
