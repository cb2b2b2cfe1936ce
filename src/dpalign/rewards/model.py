"""The k-head reward model: regression on observed labels plus a language modelling loss (Eq. 1, section 3.1).

Trained as a subclass of the stock sequence classifier that also has the language model's head; saved as
the stock class, so that `AutoModelForSequenceClassification`, pipelines and vLLM load the folder without
this package.

Shapes: B rows of a batch, T tokens, H heads, D width, V vocabulary.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from dpalign.paper.prompts import render_reward_input
from dpalign.train.common import (
    Fitted,
    ProgressCallback,
    RowsByLength,
    arguments,
    export,
    forget,
    last_checkpoint,
    lora,
    mean_loss,
    quiet,
    require_spread,
    training_dtype,
    whole_weights,
)

if TYPE_CHECKING:
    from dpalign.stages.reward import Reward

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
    start: str,
    rated: Sequence[Mapping[str, Any]],
    heads: Sequence[str],
    output: Path,
    settings: "Reward",
    *,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    seed: int,
    resume: Path,
    trust_remote_code: bool = False,
) -> Fitted:
    """Train a k-head reward model on rows of `records.RATED` and leave a stock classifier at `output`.

    Raises:
        ValueError: no row fits the context; a row has other than `len(heads)` labels.
    """
    quiet()
    rows, too_long = _tokenize(rated, len(heads), settings, tokenizer)
    set_seed(seed)
    loaded = training_dtype(dtype, settings.training.lora_rank)
    model = load_trainable(start, heads, settings, tokenizer, dtype=loaded, trust_remote_code=trust_remote_code)
    stock = type(model).__mro__[1]
    collate = _collator(tokenizer.pad_token_id)
    if last_checkpoint(resume) is None:
        if torch.cuda.is_available():
            model.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
        fit_head(model, rows[:: -(-len(rows) // PROBE_ROWS)], collate)
    if settings.training.lora_rank:
        model = _under_lora(model, settings.training.lora_rank)
    trainer = _Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(resume),
            remove_unused_columns=False,
            label_names=["targets"],
            **arguments(settings.training, seed, dtype),
        ),
        train_dataset=Dataset.from_list(rows),
        data_collator=collate,
        callbacks=[ProgressCallback()],
    )
    trainer.remove_callback(PrinterCallback)
    require_spread(trainer)
    result = trainer.train(resume_from_checkpoint=last_checkpoint(resume))
    trained = trainer.model.merge_and_unload() if settings.training.lora_rank else trainer.model
    weights = whole_weights(trainer) or trained.state_dict()
    trained.__class__, trained.lm_head = stock, None
    kept = {name: x for name, x in weights.items() if not name.startswith("lm_head.")}
    export(trained, tokenizer, output, dtype, kept)
    forget(resume)
    tokens = sum(len(row["input_ids"]) for row in rows)
    return Fitted(
        rows=len(rows),
        too_long=too_long,
        tokens=round(tokens * (trainer.state.epoch or 0.0)),
        updates=trainer.state.global_step,
        loss=mean_loss(trainer, result.training_loss),
    )


def _under_lora(model: PreTrainedModel, rank: int) -> PeftModel:
    adapted = get_peft_model(model, lora(rank, "SEQ_CLS"))
    for weight in adapted.parameters():
        if weight.requires_grad:  # of the head, too, which is trained in full
            weight.data = weight.data.float()
    return adapted


class _Trainer(Trainer):
    """transformers', with an order of rows that a resumed training finds again."""

    def _get_train_sampler(self, _: Dataset | None = None) -> RowsByLength:
        return RowsByLength(self, [len(ids) for ids in self.train_dataset["input_ids"]])


def load_trainable(
    start: str,
    heads: Sequence[str],
    settings: "Reward",
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: str,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """A causal language model as a k-head classifier that keeps its language model head."""
    loading = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": trust_remote_code}
    model = AutoModelForSequenceClassification.from_pretrained(
        start,
        num_labels=len(heads),
        problem_type="regression",
        id2label=dict(enumerate(heads)),
        label2id={head: i for i, head in enumerate(heads)},
        **loading,
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    model.__class__ = add_lm_loss(type(model))
    model.lm_loss, model.normalize, model.lm_head = settings.lm_loss, settings.normalize, None
    if settings.lm_loss and not model.config.tie_word_embeddings:
        model.lm_head = AutoModelForCausalLM.from_pretrained(start, **loading).get_output_embeddings()
    elif settings.lm_loss and not settings.training.lora_rank:  # which would take a tied head for one more layer
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
    rows: Sequence[Mapping[str, Any]],
    collate: Callable[[Sequence[Mapping[str, Any]]], Batch],
    ridge: float = 1e-2,
) -> None:
    """Start the regression head at the ridge solution on the backbone's last hidden states."""
    hidden = []
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))  # or every batch would be as wide as the longest row
    for start in range(0, len(rows), 32):
        batch = {name: x.to(model.device) for name, x in collate(rows[start : start + 32]).items()}
        states_BTD = model.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]
        last_B = batch["attention_mask"].sum(dim=1) - 1
        hidden.append(states_BTD[torch.arange(len(last_B), device=last_B.device), last_B])
    hidden_ND = torch.cat(hidden).double().cpu().numpy()
    target_NH = np.array([row["targets"] for row in rows], dtype=float)
    penalty_DD = ridge * len(hidden_ND) * np.eye(hidden_ND.shape[1]) * np.square(hidden_ND).mean()
    for h in range(target_NH.shape[1]):
        seen_N = ~np.isnan(target_NH[:, h])
        if seen_N.any():
            x, y = hidden_ND[seen_N], target_NH[seen_N, h]
            model.score.weight[h] = torch.from_numpy(np.linalg.solve(x.T @ x + penalty_DD, x.T @ y)).to(
                model.score.weight
            )


def _tokenize(
    rated: Iterable[Mapping[str, Any]], n_heads: int, settings: "Reward", tokenizer: PreTrainedTokenizerBase
) -> tuple[list[dict[str, Any]], int]:
    rows, too_long = [], 0
    for row in rated:
        if len(row["labels"]) != n_heads:
            raise ValueError(f"prompt {row['prompt_id']}: {len(row['labels'])} labels for {n_heads} heads")
        ids = tokenizer(render_reward_input(row["messages"], row["response"], settings.template))["input_ids"]
        if len(ids) > settings.training.context:
            too_long += 1
            continue
        rows.append({"input_ids": ids, "targets": [float("nan") if x is None else x for x in row["labels"]]})
    if not rows:
        raise ValueError(
            f"no rated row of {too_long} fits a context of {settings.training.context} tokens; "
            "raise reward.training.context, or check the data"
        )
    return rows, too_long


def _collator(pad: int) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
    """Right padding: under causal attention no real token sees it."""

    def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
        width = max(len(row["input_ids"]) for row in rows)
        lengths_B1 = torch.tensor([[len(row["input_ids"])] for row in rows])
        return {
            "input_ids": torch.tensor([row["input_ids"] + [pad] * (width - len(row["input_ids"])) for row in rows]),
            "attention_mask": (torch.arange(width) < lengths_B1).long(),
            "targets": torch.tensor([row["targets"] for row in rows], dtype=torch.float32),
        }

    return collate
