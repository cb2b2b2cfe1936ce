"""The k-head reward model: regression on observed labels plus a language modelling loss (Eq. 1, section 3.1).

Trained as a subclass of the stock sequence classifier that also has the language model's head; saved as
the stock class, so that `AutoModelForSequenceClassification`, pipelines and vLLM load the folder without
this package.

Shapes: B rows of a batch, T tokens, H heads, D width, V vocabulary.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from dpalign.paper.prompts import RewardTemplate, render_reward_input
from dpalign.runs.progress import Progress
from dpalign.train.trainer import (
    ByLength,
    Outcome,
    Row,
    RunContext,
    arguments,
    export,
    finish,
    fit,
    fitting,
    last_checkpoint,
    load_model,
    lora,
    whole_weights,
)

Normalize = Literal["labels", "rows", "heads"]

ERROR_UNIT = 25.0
"""Points of 0-100 that count as an error of 1: about a rating's standard deviation, which makes the
regression and the language modelling loss comparable at lm_loss = 1. The paper's weight is unpublished."""

PROBE_ROWS = 2048
"""Rows on whose last hidden states the new head is first fitted by ridge regression: a random head
without a bias, at the paper's learning rate, would spend the training on reaching the mean rating."""


def masked_mse(reward_BH: Tensor, target_BH: Tensor, normalize: Normalize) -> Tensor:
    """Squared error of Eq. 1 over observed labels (a missing one is NaN), in units of ERROR_UNIT squared.

    `labels` averages over all observed labels of the batch, `rows` first within each row, `heads` first
    within each head: they differ in how much a data set with few labels a row counts.
    """
    observed_BH = ~target_BH.isnan()
    error_BH = torch.where(observed_BH, (reward_BH - target_BH.nan_to_num()) / ERROR_UNIT, 0.0) ** 2
    if normalize == "labels":
        return error_BH.sum() / observed_BH.sum().clamp(min=1)
    within = 1 if normalize == "rows" else 0
    count = observed_BH.sum(dim=within)
    return (error_BH.sum(dim=within) / count.clamp(min=1))[count > 0].mean()


def add_lm_loss(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The stock classifier's class, with a forward that computes both losses in one pass of the backbone."""

    class RewardModel(stock):  # type: ignore[misc, valid-type]
        accepts_loss_kwargs = False  # or the stock Trainer multiplies the loss by the accumulation steps
        lm_head: nn.Linear | None  # None: the embeddings' weights; no default, which would hide the module itself
        lm_loss: float
        normalize: Normalize

        def forward(
            self,
            input_ids: Tensor,
            attention_mask: Tensor,
            targets: Tensor,
            **_: Any,  # PEFT passes on what a stock classifier takes
        ) -> SequenceClassifierOutput:
            hidden_BTD = self.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
            last_B = attention_mask.sum(dim=1) - 1
            last_BD = hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B]
            # In the head's own type, which is float32 in training: bfloat16 would round a reward of 70 to halves.
            with torch.autocast(input_ids.device.type, enabled=False):
                reward_BH = self.score(last_BD.to(self.score.weight.dtype)).float()
            loss = masked_mse(reward_BH, targets, self.normalize)
            if self.lm_loss:
                logits_BTV = self.lm_logits(hidden_BTD[:, :-1]).float()
                next_BT = input_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, -100)
                loss = loss + self.lm_loss * F.cross_entropy(logits_BTV.flatten(0, 1), next_BT.flatten())
            return SequenceClassifierOutput(loss=loss, logits=reward_BH)

        def lm_logits(self, hidden_BTD: Tensor) -> Tensor:
            if self.lm_head is None:
                return F.linear(hidden_BTD, self.get_input_embeddings().weight)
            return self.lm_head(hidden_BTD)

    RewardModel.__name__ = RewardModel.__qualname__ = stock.__name__
    return RewardModel


def train_reward_model(
    context: RunContext,
    rated: Iterable[Mapping[str, Any]],
    heads: Sequence[str],
    *,
    template: RewardTemplate,
    lm_loss: float = 1.0,
    normalize: Normalize = "labels",
) -> Outcome:
    """Train a k-head reward model on rows of `rows.RATED`; its folder is a stock classifier.

    Args:
        template: the text that the model reads.
        lm_loss: weight of the language modelling loss.
        normalize: see `masked_mse`.

    Raises:
        ValueError: no row fits the context; a row has other than `len(heads)` labels.
    """
    tokenizer, training = context.tokenizer, context.training
    rows = fitting(
        tokenize_rated(rated, len(heads), template, tokenizer),
        "rated row",
        training.context,
        knob="reward.training.context",
    )
    set_seed(context.seed)
    model = load_trainable(context, heads, lm_loss=lm_loss, normalize=normalize)
    stock = type(model).__mro__[1]
    collate = collator(tokenizer)
    if last_checkpoint(context.resume) is None:
        if torch.cuda.is_available():
            model.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
        fit_head(model, rows.rows[:: -(-len(rows.rows) // PROBE_ROWS)], collate, context.name)
    if training.lora_rank:
        model = _under_lora(model, training.lora_rank)
    trainer = ByLength(
        model=model,
        args=TrainingArguments(remove_unused_columns=False, label_names=["targets"], **arguments(context)),
        train_dataset=Dataset.from_list([dict(row) for row in rows.rows]),
        data_collator=collate,
    )
    trained = fit(trainer)
    weights = whole_weights(trainer) or trained.state_dict()
    trained.__class__, trained.lm_head = stock, None
    own_weights = {name: x for name, x in weights.items() if not name.startswith("lm_head.")}
    export(trained, context, own_weights)
    return finish(trainer, rows)


def _under_lora(model: PreTrainedModel, rank: int) -> PeftModel:
    adapted = get_peft_model(model, lora(rank, "SEQ_CLS"))
    for weight in adapted.parameters():
        if weight.requires_grad:  # of the head, too, which is trained in full
            weight.data = weight.data.float()
    return adapted


def load_trainable(
    context: RunContext, heads: Sequence[str], *, lm_loss: float, normalize: Normalize = "labels"
) -> PreTrainedModel:
    """A causal language model as a k-head classifier that keeps its language model head."""
    model = load_model(
        AutoModelForSequenceClassification,
        context,
        num_labels=len(heads),
        problem_type="regression",
        id2label=dict(enumerate(heads)),
        label2id={head: i for i, head in enumerate(heads)},
    )
    model.config.pad_token_id = context.tokenizer.pad_token_id
    model.__class__ = add_lm_loss(type(model))
    model.lm_loss, model.normalize, model.lm_head = lm_loss, normalize, None
    if lm_loss and not model.config.tie_word_embeddings:
        model.lm_head = load_model(AutoModelForCausalLM, context).get_output_embeddings()
    elif lm_loss and not context.training.lora_rank:  # which would take a tied head for one more layer
        _tie_head(model)
    return model


def _tie_head(model: PreTrainedModel) -> None:
    """Give the embeddings' weights a module that reads them out: FSDP and ZeRO gather weights as a module is called."""
    embedding = model.get_input_embeddings()
    (name,) = (name for name, module in model.named_modules() if module is embedding)
    model.lm_head = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False, device="meta")
    model.lm_head.weight = embedding.weight
    model._tied_weights_keys = model.all_tied_weights_keys = {"lm_head.weight": f"{name}.weight"}


Batch = dict[str, Tensor]


@torch.no_grad()
def fit_head(
    model: PreTrainedModel,
    rows: Sequence[Row],
    collate: Callable[[Sequence[Row]], Batch],
    name: str = "reward",
    ridge: float = 1e-2,
) -> None:
    """Start the regression head at the ridge solution on the backbone's last hidden states."""
    hidden = []
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))  # or every batch would be as wide as the longest row
    with Progress(f"{name}: fitting the head on answer", len(rows)) as progress:
        for start in range(0, len(rows), 32):
            batch = {name: x.to(model.device) for name, x in collate(rows[start : start + 32]).items()}
            states_BTD = model.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]
            last_B = batch["attention_mask"].sum(dim=1) - 1
            hidden.append(states_BTD[torch.arange(len(last_B), device=last_B.device), last_B])
            progress.advance(len(last_B))
    hidden_ND = torch.cat(hidden).double().cpu().numpy()
    target_NH = np.array([row["targets"] for row in rows], dtype=float)
    penalty_DD = ridge * len(hidden_ND) * np.eye(hidden_ND.shape[1]) * np.square(hidden_ND).mean()
    # Head by head, because each has other rows with a label.
    for h in range(target_NH.shape[1]):
        observed_N = ~np.isnan(target_NH[:, h])
        if observed_N.any():
            x, y = hidden_ND[observed_N], target_NH[observed_N, h]
            weight_D = np.linalg.solve(x.T @ x + penalty_DD, x.T @ y)
            model.score.weight[h] = torch.from_numpy(weight_D).to(model.score.weight)


def tokenize_rated(
    rated: Iterable[Mapping[str, Any]], n_heads: int, template: RewardTemplate, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Row]:
    """Token ids and targets of each rated answer; a missing label is NaN."""
    for row in rated:
        if len(row["labels"]) != n_heads:
            raise ValueError(f"prompt {row['prompt_id']}: {len(row['labels'])} labels for {n_heads} heads")
        ids = tokenizer(render_reward_input(row["messages"], row["response"], template))["input_ids"]
        yield {"input_ids": ids, "targets": [float("nan") if x is None else x for x in row["labels"]]}


def collator(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[Row]], Batch]:
    """Rows as a batch, padded on the right: under causal attention no real token sees the padding."""
    return lambda rows: tokenizer.pad([dict(row) for row in rows], padding_side="right", return_tensors="pt").data
