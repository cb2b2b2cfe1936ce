"""A base model from scratch, for machines without a hub."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from dpalign.chat import chat_template
from dpalign.paper.direction import rng_for
from dpalign.rows import CONVERSATIONS, RATED, read_rows
from dpalign.runs.tables import Table
from dpalign.stages.stage import Job, model_read, stage
from dpalign.stages.training import context_of, record_training
from dpalign.train.knobs import Training

if TYPE_CHECKING:
    from dpalign.train.trainer import Outcome


class Pretrain(Table):
    """A small base model, trained here, for machines without a hub; used only when model.base is empty."""

    text: tuple[Literal["world", "data"], ...] = ("world",)
    """The text it is trained on: the world's (`world`), the run's own training text (`data`), or both."""
    documents: int = Field(150_000, ge=1)
    """Documents drawn from the world, and the most that are read from the data (not in the paper)."""
    vocabulary: int = Field(1024, ge=1, le=1_000_000)
    """Largest size of the byte-level BPE."""
    split_digits: bool = True
    """One token a digit, as in Mistral's tokenizer. A tiny model then reads little more of a direction than its first
    digit. false makes each frequent number one token."""
    hidden: int = Field(128, ge=1, le=65_536)
    """Width of the Mistral architecture."""
    layers: int = Field(4, ge=1, le=1000)
    """Depth."""
    heads: int = Field(4, ge=1)
    """Attention heads; half as many key-value heads."""
    context: int = Field(512, ge=1)
    """Longest position."""
    learning_rate: float = Field(3e-3, gt=0, le=1)
    """Peak of a cosine schedule."""
    batch: int = Field(32, ge=1)
    """Documents an update."""
    micro_batch: int = Field(32, ge=1)
    """Documents a forward; give fewer if they are long."""
    steps: int = Field(9000, ge=1)
    """Updates. Below a few thousand, a model of this size does not yet answer the question."""

    @model_validator(mode="after")
    def _updates_are_whole(self) -> Self:
        if self.batch % self.micro_batch:
            raise ValueError(
                f"batch is {self.batch}, and micro_batch {self.micro_batch}; give a batch that is a multiple of it"
            )
        return self

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Self:
        if self.hidden % (2 * self.heads) or self.heads % max(1, self.heads // 2):
            raise ValueError(
                f"hidden is {self.hidden}, and heads {self.heads}; give 1, 3 or an even number of heads, and a hidden "
                "that is a multiple of twice that"
            )
        return self

    @property
    def training(self) -> Training:
        """The same settings as a `Training`."""
        return Training(
            learning_rate=self.learning_rate,
            warmup_steps=self.steps // 20,
            steps=self.steps,
            batch=self.batch,
            micro_batch=self.micro_batch,
            context=self.context,
            packing=False,
        )


@stage(
    reads=lambda r: (r.seed, r.pretrain, r.model.chat, *model_read(r)),
    inputs=("data",),
    several=True,
    trains=lambda r: r.pretrain.training,
    cost=lambda costs, step: costs.train(step, 0, costs.of_step(step).pretrain.context),
)
def base(job: Job) -> None:
    """Train a small base model from scratch, on the world's text or on the run's own."""
    record_training(job, lambda: _pretrain(job))


def _pretrain(job: Job) -> "Outcome":
    from dpalign.train.pretrain import pretrain, train_tokenizer
    from dpalign.world.corpus import WORDS_TO_COME, documents

    settings = job.recipe.pretrain
    texts: list[str] = []
    for source in settings.text:
        if source == "world":
            texts += documents(settings.documents, rng_for(job.recipe.seed, "pretrain"))
        else:
            texts += itertools.islice(_data_texts(job.inputs["data"]), settings.documents)
    # Lines of later prompts, repeated for the tokenizer alone, so that they become few tokens.
    words = list(WORDS_TO_COME) * 1000 if "world" in settings.text else []
    template = chat_template(job.recipe.model.chat)
    tokenizer = train_tokenizer([*texts, *words], settings.vocabulary, template, settings.split_digits)
    context = context_of(job, "", settings.training, tokenizer)
    return pretrain(context, texts, hidden=settings.hidden, layers=settings.layers, heads=settings.heads)


def _data_texts(data: Path) -> Iterator[str]:
    """Every text of the training split: each prompt with each of its answers."""
    for folder, schema in ((data / "train", RATED), (data / "chats", CONVERSATIONS)):
        if folder.exists():
            for row in read_rows(folder, schema):
                yield "\n".join([*(message["content"] for message in row["messages"]), row["response"]])
