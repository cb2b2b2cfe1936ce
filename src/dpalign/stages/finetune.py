"""The training stages: base, SFT, SteerLM and each iteration's policy."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dpalign.chat import chat_template, with_system_line
from dpalign.paper.direction import rng_for
from dpalign.paper.prompts import render_condition
from dpalign.rows import CONVERSATIONS, RATED, read_rows
from dpalign.stages.choose import annotated
from dpalign.stages.stage import Job
from dpalign.stages.training import context_of, count, model_folder, named_checkpoint, policy_tokenizer
from dpalign.train.knobs import Training


def base(job: Job) -> None:
    """A small model from scratch, on the world's text or on the run's own."""
    from dpalign.train.pretrain import pretrain, train_tokenizer
    from dpalign.world.corpus import WORDS_TO_COME, documents

    settings = job.recipe.pretrain
    texts: list[str] = []
    for source in settings.text:
        if source == "world":
            texts += documents(settings.documents, rng_for(job.recipe.seed, "pretrain"))
        elif source == "data":
            texts += itertools.islice(_data_texts(job.inputs["data"]), settings.documents)
        else:
            raise ValueError(f"pretrain.text names {source!r}; known: world, data")
    # The tokenizer alone reads the words of later prompts, often, which keeps them short.
    words = list(WORDS_TO_COME) * 1000 if "world" in settings.text else []
    template = chat_template(job.recipe.model.chat)
    training = Training(
        learning_rate=settings.learning_rate,
        warmup_steps=settings.steps // 20,
        steps=settings.steps,
        batch=settings.batch,
        micro_batch=settings.micro_batch,
        context=settings.context,
        packing=False,
    )
    outcome = pretrain(
        texts,
        job.out / "model",
        training,
        train_tokenizer([*texts, *words], settings.vocabulary, template, settings.split_digits),
        context_of(job),
        hidden=settings.hidden,
        layers=settings.layers,
        heads=settings.heads,
    )
    count(job, outcome)


def _data_texts(data: Path) -> Iterator[str]:
    """Every text of the training split: each prompt with each of its answers."""
    for folder, schema in ((data / "train", RATED), (data / "chats", CONVERSATIONS)):
        if folder.exists():
            for row in read_rows(folder, schema):
                yield "\n".join([*(message["content"] for message in row["messages"]), row["response"]])


def sft(job: Job) -> None:
    """Supervised fine-tuning on chats (section 3.1; Zephyr's)."""
    start = str(job.inputs["base"] / "model") if "base" in job.inputs else job.recipe.model.source
    chats = job.inputs["data"] / "chats"
    if not job.recipe.sft.checkpoint and not chats.exists():
        raise ValueError("no chats to fine-tune on: set data.sft, or name a finished model in sft.checkpoint")
    rows = [] if job.recipe.sft.checkpoint else read_rows(chats, CONVERSATIONS)
    _finetune(job, start, rows, job.recipe.sft)


def steerlm(job: Job) -> None:
    """SFT fine-tuned on original answers that state their own rewards: pi_0 on D2, the baseline on both halves."""
    recipe = job.recipe

    def condition(reward_K: Iterable[float]) -> str:
        rewards = {name: float(r) for name, r in zip(recipe.objectives, reward_K, strict=True)}
        return render_condition(rewards, recipe.steerlm.template)

    rows = (
        {
            "prompt_id": row["prompt_id"],
            "messages": with_system_line(row["messages"], condition(reward_K), recipe.model.chat),
            "response": row["response"],
            "origin": "steerlm",
        }
        for row, reward_K in annotated(job.inputs["data"], job.inputs["annotate"], recipe, job.half)
    )
    _finetune(job, model_folder(job.inputs["sft"]), rows, recipe.steerlm.training)


def policy(job: Job) -> None:
    """Step 2 of section 2.2: fine-tune on the selected answers; the folder's chat template takes the preference."""
    from dpalign.train.contract import contract_of, write_contract
    from dpalign.train.trainer import first_process

    rows = read_rows(job.inputs["chosen"], CONVERSATIONS)
    _finetune(job, model_folder(job.inputs["start"]), rows, job.recipe.finetune, steered=True)
    if first_process():
        write_contract(job.out / "model", contract_of(job.recipe, job.t))


def specialist(job: Job) -> None:
    """Fine-tune on the answers selected for one fixed direction: a model without a dial."""
    rows = read_rows(job.inputs["chosen"], CONVERSATIONS)
    _finetune(job, model_folder(job.inputs["start"]), rows, job.recipe.finetune)


def _finetune(
    job: Job, start: str, rows: Iterable[Mapping[str, Any]], training: Training, steered: bool = False
) -> None:
    """Train, unless the recipe names a checkpoint.

    Args:
        steered: the model's chat template takes a preference.
    """
    from dpalign.train.sft import finetune

    if named_checkpoint(job, training):
        return
    tokenizer = policy_tokenizer(start, job.recipe, steered)
    count(job, finetune(start, rows, job.out / "model", training, tokenizer, context_of(job)))
