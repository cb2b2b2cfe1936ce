"""The training stages: base, SFT, SteerLM and each iteration's policy."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpalign.chat import chat_template, with_system_line
from dpalign.paper.prompts import render_condition
from dpalign.recipe import Recipe
from dpalign.rows import CONVERSATIONS, RATED, read_rows
from dpalign.stages.choose import annotated
from dpalign.stages.stage import Job
from dpalign.train.common import Fitted, first_process, require_weights
from dpalign.train.contract import Contract, write_contract
from dpalign.train.knobs import Training
from dpalign.train.pretrain import pretrain
from dpalign.train.sft import finetune
from dpalign.world.corpus import WORDS_TO_COME, documents


def base(job: Job) -> None:
    """A small model from scratch, on the world's text or on the run's own."""
    from dpalign.paper.direction import rng_for

    settings, seed = job.recipe.pretrain, job.recipe.seed
    texts: list[str] = []
    for source in settings.text:
        if source == "world":
            texts += documents(settings.documents, rng_for(seed, "pretrain"))
        elif source == "data":
            texts += itertools.islice(_data_texts(job.inputs["data"]), settings.documents)
        else:
            raise ValueError(f"pretrain.text names {source!r}; known: world, data")
    words = WORDS_TO_COME if "world" in settings.text else ()
    template = chat_template(job.recipe.model.chat)
    fitted = pretrain(
        texts, job.out / "model", settings, chat_template=template, seed=seed, resume=job.work.resume, words=words
    )
    count(job, fitted)


def _data_texts(data: Path) -> Iterator[str]:
    """All that the training split says: each prompt with each of its answers."""
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
    rows = (
        {
            "prompt_id": row["prompt_id"],
            "messages": with_system_line(row["messages"], _condition(recipe, reward_K), recipe.model.chat),
            "response": row["response"],
            "origin": "steerlm",
        }
        for row, reward_K in annotated(job.inputs["data"], job.inputs["annotate"], recipe, job.half)
    )
    _finetune(job, model_folder(job.inputs["sft"]), rows, recipe.steerlm.training)


def policy(job: Job) -> None:
    """Step 2 of section 2.2: fine-tune on the selected answers; the folder's chat template takes the preference."""
    recipe = job.recipe
    rows = read_rows(job.inputs["chosen"], CONVERSATIONS)
    _finetune(job, model_folder(job.inputs["start"]), rows, recipe.finetune, steered=True)
    if first_process():
        write_contract(job.out / "model", contract_of(recipe, job.t))


def contract_of(recipe: Recipe, iteration: int) -> Contract:
    """What the directions of an iteration's policy mean."""
    return Contract(
        recipe.preference.template,
        recipe.model.chat,
        recipe.objectives,
        recipe.heads,
        recipe.preference.population(len(recipe.objectives)),
        iteration,
        reward_template=recipe.reward.template,
    )


def specialist(job: Job) -> None:
    """Fine-tune on the answers selected for one fixed direction: a model without a dial."""
    rows = read_rows(job.inputs["chosen"], CONVERSATIONS)
    _finetune(job, model_folder(job.inputs["start"]), rows, job.recipe.finetune)


def model_folder(stage: Path) -> str:
    """The model that a training stage left: its folder, or the name of the checkpoint taken in its place.

    Raises:
        ValueError: a folder without weights.
    """
    named = stage / "checkpoint.txt"
    if named.is_file():
        return named.read_text().strip()
    folder = stage / "model" if (stage / "model").is_dir() else stage
    require_weights(folder)
    return str(folder)


def _condition(recipe: Recipe, reward_K: Iterable[float]) -> str:
    rewards = {name: float(r) for name, r in zip(recipe.objectives, reward_K, strict=True)}
    return render_condition(rewards, recipe.steerlm.template)


def _finetune(
    job: Job, start: str, rows: Iterable[Mapping[str, Any]], training: Training, steered: bool = False
) -> None:
    """Train, or note the checkpoint that the recipe names in place of training.

    Args:
        steered: the model's chat template is to take a preference.
    """
    if taken(job, training):
        return
    recipe = job.recipe
    tokenizer = policy_tokenizer(start, recipe, steered)
    fitted = finetune(
        start,
        rows,
        job.out / "model",
        training,
        tokenizer=tokenizer,
        dtype=recipe.model.dtype,
        seed=recipe.seed,
        resume=job.work.resume,
        trust_remote_code=recipe.model.trust_remote_code,
        kernels=recipe.kernels,
    )
    count(job, fitted)


def taken(job: Job, training: Training) -> bool:
    """Whether the recipe names a checkpoint in place of this training; it is noted where `model_folder` reads it."""
    if not training.checkpoint:
        return False
    if Path(training.checkpoint).exists():
        require_weights(Path(training.checkpoint))
    (job.out / "checkpoint.txt").write_text(training.checkpoint + "\n")
    return True


def policy_tokenizer(start: str, recipe: Recipe, steered: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a policy trained from `start`, with the recipe's chat template and a pad token.

    Args:
        steered: the chat template is to take a preference.
    """
    tokenizer = AutoTokenizer.from_pretrained(start, trust_remote_code=recipe.model.trust_remote_code)
    tokenizer.chat_template = chat_template(
        recipe.model.chat,
        recipe.preference.template if steered else None,
        tuple(recipe.objectives) if steered else None,
        eos=tokenizer.eos_token,
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def count(job: Job, fitted: Fitted) -> None:
    """Enter a training in the stage's ledger."""
    too_long = {"too long for the context": fitted.too_long} if fitted.too_long else {}
    job.work.tally.add(
        rows_in=fitted.rows + fitted.too_long, rows_out=fitted.rows, filtered=too_long, trained=fitted.tokens
    )
