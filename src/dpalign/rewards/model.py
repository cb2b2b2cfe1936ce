"""The k-head reward model: regression on observed labels plus a language modelling loss (Eq. 1, section 3.1).

It trains as a subclass of the stock sequence classifier that also has the language model's head. It is saved as the
stock class, so that `AutoModelForSequenceClassification`, pipelines and vLLM load the folder without this package.

A Bradley-Terry term on preference pairs is optional. So is a linear probe in place of the training.

Shapes: B texts of a batch, N rows, T tokens, H heads, D width, V vocabulary.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from dpalign.paper.prompts import RewardTemplate
from dpalign.rewards.inputs import InputReader
from dpalign.rewards.probe import FILE as PROBE_FILE
from dpalign.rewards.probe import Probe, take_probe, write_probe
from dpalign.rewards.ridge import ridge_heads
from dpalign.rewards.shared_prefix import cannot_share, score_shared
from dpalign.runs.environment import first_process
from dpalign.runs.errors import naming
from dpalign.runs.progress import Progress
from dpalign.train.dataset import IDS, ByLength, FairBatches, Row, Rows, column_lengths, store_fitting
from dpalign.train.trainer import (
    Outcome,
    RunContext,
    arguments,
    export,
    finish,
    fit,
    last_checkpoint,
    load_model,
    logging_marks,
    lora,
    whole_weights,
)

Normalize = Literal["labels", "rows", "heads"]

ERROR_UNIT = 25.0
"""Points of 0-100 that count as an error of 1, about a rating's standard deviation. This makes the regression and the
language modelling loss comparable at lm_loss = 1. The paper's weight is unpublished."""

COLUMNS: Final = {"input_ids": IDS, "targets": pa.list_(pa.float64()), "prompt_id": pa.string()}
PAIR_COLUMNS: Final = {**COLUMNS, "beaten_ids": IDS, "beaten_targets": pa.list_(pa.float64())}

PROBE_ROWS = 2048
"""Most rows for the new head's first fit, a ridge regression on their last hidden states. A random head without a bias,
at the paper's learning rate, would spend the training on reaching the mean rating."""


@dataclass(frozen=True)
class BradleyTerry:
    """A preference term beside the regression (SMORM, arXiv 2507.07375): a head of its own on the same backbone."""

    weight: float
    """The term's weight; the regression's is 1."""
    first: Sequence[int]
    """The heads that the first objective reads: they decide which of two rated answers is preferred."""
    pairs: Sequence[Mapping[str, Any]] = ()
    """Rows of `rows.PAIRS`, in addition to pairs of rated answers."""


def masked_mse(reward_BH: Tensor, target_BH: Tensor, normalize: Normalize) -> Tensor:
    """Squared error of Eq. 1 over observed labels (a missing one is NaN), in units of ERROR_UNIT squared.

    `labels` averages over all observed labels of the batch, `rows` first within each row, `heads` first within each
    head. They differ in the weight of a data set with few labels per row.
    """
    observed_BH = ~target_BH.isnan()
    error_BH = torch.where(observed_BH, (reward_BH - target_BH.nan_to_num()) / ERROR_UNIT, 0.0) ** 2
    if normalize == "labels":
        return error_BH.sum() / observed_BH.sum().clamp(min=1)
    within = 1 if normalize == "rows" else 0
    count = observed_BH.sum(dim=within)
    return (error_BH.sum(dim=within) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)


def preference_loss(score_B: Tensor, beaten_B: Tensor) -> Tensor:
    """-log sigma of a preferred answer's lead, in units of ERROR_UNIT: the mean over pairs, 0 without any.

    Args:
        beaten_B: the index in the batch of the answer that each text is preferred to; -1 for none.
    """
    preferred_B = beaten_B >= 0
    lead_P = (score_B[preferred_B] - score_B[beaten_B[preferred_B]]) / ERROR_UNIT
    return -F.logsigmoid(lead_P).sum() / preferred_B.sum().clamp(min=1)


def add_lm_loss(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Subclass the stock classifier with a forward that computes the losses in one pass of the backbone."""

    class RewardModel(stock):  # type: ignore[misc, valid-type]
        accepts_loss_kwargs = False  # or the stock Trainer multiplies the loss by the accumulation steps
        lm_head: nn.Linear | None  # None: the embeddings' weights. A default here would hide the module
        lm_loss: float
        normalize: Normalize
        bradley_terry: float

        def forward(
            self,
            input_ids: Tensor,
            attention_mask: Tensor,
            targets: Tensor,
            beaten: Tensor | None = None,
            **_: Any,  # PEFT also passes a stock classifier's arguments
        ) -> SequenceClassifierOutput:
            hidden_BTD = self.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
            last_B = attention_mask.sum(dim=1) - 1
            last_BD = hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B]
            # In the head's own type, which is float32 in training: bfloat16 would round a reward of 70 to halves.
            with torch.autocast(input_ids.device.type, enabled=False):
                reward_BH = self.score(last_BD.to(self.score.weight.dtype)).float()
            loss = masked_mse(reward_BH[:, : targets.shape[1]], targets, self.normalize)
            if beaten is not None:
                loss = loss + self.bradley_terry * preference_loss(reward_BH[:, -1], beaten)
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
    layers: int = 0,
    preference: BradleyTerry | None = None,
) -> Outcome:
    """Train a k-head reward model on rows of `rows.RATED`; its folder is a stock classifier.

    Args:
        template: the text that the model reads.
        lm_loss: weight of the language modelling loss.
        normalize: see `masked_mse`.
        layers: see `load_classifier`.
        preference: one more term, on preference pairs; its head is not in the folder.

    Raises:
        ValueError: no row fits the context; a row does not have `len(heads)` labels; there is no pair to learn a
            preference from.
    """
    tokenizer, training = context.tokenizer, context.training
    rows = _fitting(context, rated, len(heads), template)
    set_seed(context.seed)
    model, collate = load_classifier(context, heads, layers), collator(tokenizer)
    stock = type(model)
    if last_checkpoint(context.resume) is None:
        probed = rows.rows.select(range(0, len(rows.rows), -(-len(rows.rows) // PROBE_ROWS)))
        fit_head(_placed(model), list(probed), collate, context.name)
    add_losses(model, context, lm_loss=lm_loss, normalize=normalize)
    if preference:
        rows = _with_pairs(rows, preference, len(heads), template, context)
        _add_preference_head(model, preference)
    if training.lora_rank:
        model = _under_lora(model, training.lora_rank)
    trainer = RewardTrainer(
        model=model,
        args=TrainingArguments(remove_unused_columns=False, label_names=["targets"], **arguments(context)),
        train_dataset=rows.rows,
        data_collator=collate,
    )
    trained = fit(trainer)
    weights = whole_weights(trainer) or trained.state_dict()
    trained.__class__, trained.lm_head = stock, None
    own_weights = {name: x for name, x in weights.items() if not name.startswith("lm_head.")}
    own_weights["score.weight"] = own_weights["score.weight"][: len(heads)]
    export(trained, context, own_weights)
    return finish(trainer, rows)


def probe_reward_model(
    context: RunContext,
    rated: Iterable[Mapping[str, Any]],
    heads: Sequence[str],
    *,
    template: RewardTemplate,
    layers: int = 0,
) -> Outcome:
    """Fit the heads alone, by ridge regression on the backbone as it is; the folder is a stock classifier.

    The last hidden states are saved in `context.resume` as they are read, so a killed run resumes there. Only the first
    of several processes works. No token is trained on. The loss is on prompts that the fit has not seen.

    Raises:
        ValueError: see `train_reward_model`.
    """
    rows = _fitting(context, rated, len(heads), template)
    outcome = Outcome(len(rows.rows), rows.too_long, 0, 0, 0.0, {"step": [], "loss": [], "learning_rate": []})
    if not first_process():
        return outcome
    set_seed(context.seed)
    model = _placed(load_classifier(context, heads, layers, frozen=True))
    loss = fit_head(model, list(rows.rows), collator(context.tokenizer), context.name, context.resume)
    export(model, context)
    write_probe(context.output.parent / PROBE_FILE, model, Probe(tuple(heads), layers, template))
    shutil.rmtree(context.resume, ignore_errors=True)
    return replace(outcome, loss=loss)


def given_reward_model(
    context: RunContext, probe: Path, heads: Sequence[str], *, template: RewardTemplate, layers: int = 0
) -> Outcome:
    """Put a probe's heads on the backbone that they were fitted on; the folder is a stock classifier.

    Raises:
        ValueError: see `probe.take_probe`.
    """
    if first_process():
        model = load_classifier(context, heads, layers, frozen=True)
        take_probe(probe, model, Probe(tuple(heads), layers, template))
        export(model, context)
    return Outcome(0, 0, 0, 0, 0.0, {"step": [], "loss": [], "learning_rate": []})


class RewardTrainer(ByLength):
    """Reads rows of one text or two in fair batches."""

    sampler = FairBatches

    def row_lengths(self) -> list[int]:
        columns = [name for name in ("input_ids", "beaten_ids") if name in self.train_dataset.column_names]
        return list(map(max, zip(*(column_lengths(self.train_dataset, name) for name in columns), strict=True)))


def _length(row: Row) -> int:
    """Tokens of a row's longest text."""
    return max(len(row["input_ids"]), len(row["beaten_ids"]))


def _fitting(context: RunContext, rated: Iterable[Mapping[str, Any]], n_heads: int, template: RewardTemplate) -> Rows:
    told = logging_marks(rated, context, InputReader(context.tokenizer, template, "").guard)
    return store_fitting(
        tokenize_rated(told, n_heads, template, context.tokenizer),
        "rated row",
        context.training.context,
        context.resume / "rows.arrow",
        COLUMNS,
        knob="reward.training.context",
    )


def _placed(model: PreTrainedModel) -> PreTrainedModel:
    """Move the model to this process's GPU, if there is one."""
    if torch.cuda.is_available():
        model.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
    return model


def _under_lora(model: PreTrainedModel, rank: int) -> PeftModel:
    adapted = get_peft_model(model, lora(rank, "SEQ_CLS"))
    for weight in adapted.parameters():
        if weight.requires_grad:  # also the head's, which is trained in full
            weight.data = weight.data.float()
    return adapted


def load_classifier(
    context: RunContext, heads: Sequence[str], layers: int = 0, *, frozen: bool = False
) -> PreTrainedModel:
    """Load a causal language model as a stock k-head classifier with a random head.

    Args:
        layers: keep only this many first layers of the backbone; 0 keeps all.
        frozen: the model is read and not trained.

    Raises:
        ValueError: the backbone has fewer layers.
    """
    model = load_model(
        "reward model",
        context,
        frozen,
        new_head=True,
        num_labels=len(heads),
        problem_type="regression",
        id2label=dict(enumerate(heads)),
        label2id={head: i for i, head in enumerate(heads)},
    )
    model.config.pad_token_id = context.tokenizer.pad_token_id
    if layers:
        _keep_layers(model, layers)
    return model


def _keep_layers(model: PreTrainedModel, layers: int) -> None:
    backbone, config = model.base_model, model.config
    if layers > len(backbone.layers):
        raise ValueError(f"reward.layers is {layers}, and {config.name_or_path} has {len(backbone.layers)}; give fewer")
    backbone.layers = backbone.layers[:layers]
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def add_losses(model: PreTrainedModel, context: RunContext, *, lm_loss: float, normalize: Normalize = "labels") -> None:
    """Make a stock classifier compute the losses, and add the language model's head that one of them needs."""
    model.__class__ = add_lm_loss(type(model))
    model.lm_loss, model.normalize, model.lm_head = lm_loss, normalize, None
    if lm_loss and not model.config.tie_word_embeddings:
        model.lm_head = load_model("policy", context).get_output_embeddings()
    elif lm_loss and not context.training.lora_rank:  # LoRA would treat a tied head as one more layer
        _tie_head(model)


def _tie_head(model: PreTrainedModel) -> None:
    """Add a head module that shares the embeddings' weights: FSDP and ZeRO gather weights when a module is called."""
    embedding = model.get_input_embeddings()
    (name,) = (name for name, module in model.named_modules() if module is embedding)
    model.lm_head = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False, device="meta")
    model.lm_head.weight = embedding.weight
    model._tied_weights_keys = model.all_tied_weights_keys = {"lm_head.weight": f"{name}.weight"}


def _add_preference_head(model: PreTrainedModel, preference: BradleyTerry) -> None:
    """Add one output to the head, which the folder leaves out. It starts as the mean of the first objective's heads."""
    fitted = model.score.weight.detach()
    model.score = nn.Linear(fitted.shape[1], len(fitted) + 1, bias=False, device=fitted.device, dtype=fitted.dtype)
    model.score.weight.data = torch.cat([fitted, fitted[list(preference.first)].mean(dim=0, keepdim=True)])
    model.bradley_terry = preference.weight


Batch = dict[str, Tensor]

BLOCK = 256
"""Rows whose last hidden states are read and saved together."""
READ_TOKENS = 16_384
"""Tokens per forward that reads hidden states."""


@torch.no_grad()
def fit_head(
    model: PreTrainedModel,
    rows: Sequence[Row],
    collate: Callable[[Sequence[Row]], Batch],
    name: str = "reward",
    scratch: Path | None = None,
) -> float:
    """Set the regression head to the ridge solution on the backbone's last hidden states; see `ridge_heads`.

    Args:
        scratch: the folder that keeps the hidden states; states that are there already are not computed again.

    Returns:
        The squared error on prompts that the fit has not seen, in units of ERROR_UNIT squared.
    """
    hidden_ND = last_hidden_states(model, rows, collate, name, scratch)
    target_NH = np.array([row["targets"] for row in rows], dtype=float)
    fitted = ridge_heads(hidden_ND, target_NH, [row["prompt_id"] for row in rows])
    for h, weight_D in fitted.weights.items():
        model.score.weight[h] = torch.from_numpy(weight_D).to(model.score.weight)
    return fitted.error / ERROR_UNIT**2


@torch.no_grad()
def last_hidden_states(
    model: PreTrainedModel,
    rows: Sequence[Row],
    collate: Callable[[Sequence[Row]], Batch],
    name: str,
    scratch: Path | None = None,
) -> NDArray[np.float64]:
    """Return a stock classifier's last hidden state at each row's end, (N, D): the input of its head.

    A prompt is read once for all its answers, if the model allows it.
    """
    shares = cannot_share(model) is None
    order = sorted(range(len(rows)), key=lambda n: (rows[n]["prompt_id"] if shares else "", len(rows[n]["input_ids"])))
    hidden_ND = np.empty((len(rows), model.config.hidden_size))
    with Progress(f"{name}: reading answer", len(rows)) as progress:
        for start in range(0, len(rows), BLOCK):
            block = order[start : start + BLOCK]
            kept = scratch / f"hidden-{start:08d}.npy" if scratch else None
            if kept and kept.exists():
                hidden_ND[block] = np.load(kept)
            else:
                hidden_ND[block] = _read(model, [rows[n] for n in block], collate, shares).float().cpu().numpy()
                if kept:
                    _save(kept, hidden_ND[block])
            progress.advance(len(block))
    return hidden_ND


def _read(
    model: PreTrainedModel, rows: Sequence[Row], collate: Callable[[Sequence[Row]], Batch], shares: bool
) -> Tensor:
    """The last hidden states of a block, (N, D)."""
    if shares:
        ids, prompts = [row["input_ids"] for row in rows], [row["prompt_id"] for row in rows]
        return score_shared(model, ids, prompts, READ_TOKENS, nn.Identity())
    hidden = []
    for start in range(0, len(rows), 32):
        batch = {key: x.to(model.device) for key, x in collate(rows[start : start + 32]).items()}
        hidden_BTD = model.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]
        last_B = batch["attention_mask"].sum(dim=1) - 1
        hidden.append(hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B])
    return torch.cat(hidden)


def _save(path: Path, array: NDArray[np.float64]) -> None:
    """Write beside, then rename: a block appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    with naming(path), beside.open("wb") as file:
        np.save(file, array.astype(np.float32))
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


# Rows


def tokenize_rated(
    rated: Iterable[Mapping[str, Any]], n_heads: int, template: RewardTemplate, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Row]:
    """Yield the token ids and targets of each rated answer; a missing label is NaN."""
    reader = InputReader(tokenizer, template, "")
    for row in rated:
        if len(row["labels"]) != n_heads:
            raise ValueError(f"prompt {row['prompt_id']}: {len(row['labels'])} labels for {n_heads} heads")
        ids = reader.ids((row["messages"], row["response"]))
        targets = [float("nan") if x is None else x for x in row["labels"]]
        yield {"input_ids": ids, "targets": targets, "prompt_id": row["prompt_id"]}


def _with_pairs(
    rated: Rows, preference: BradleyTerry, n_heads: int, template: RewardTemplate, context: RunContext
) -> Rows:
    """Put rated answers and pairs into rows of one text or two; the first text is preferred to the second.

    Each rated answer is in one row, so the regression reads it once.
    """

    def units() -> Iterator[Row]:
        rows = [
            *paired(list(rated.rows), preference.first),
            *_plain_pairs(preference.pairs, n_heads, template, context),
        ]
        if not any(row["beaten_ids"] for row in rows):
            raise ValueError(
                "reward.bradley_terry is above 0, and there is no pair to learn from: the first objective's labels "
                "tell no two answers to a prompt apart; give pairs, or set it to 0"
            )
        yield from rows

    both = store_fitting(
        units(),
        "preference pair",
        context.training.context,
        context.resume / "pairs.arrow",
        PAIR_COLUMNS,
        length=_length,
        tokens=lambda row: len(row["input_ids"]) + len(row["beaten_ids"]),
        knob="reward.training.context",
    )
    return replace(both, too_long=rated.too_long + both.too_long)


def _plain_pairs(
    pairs: Sequence[Mapping[str, Any]], n_heads: int, template: RewardTemplate, context: RunContext
) -> Iterator[Row]:
    """Yield preference pairs as rows of two texts without labels."""
    nothing = [float("nan")] * n_heads
    reader = InputReader(context.tokenizer, template, "")
    for pair in logging_marks(pairs, context, reader.guard):
        chosen, rejected = (reader.ids((pair["messages"], pair[side])) for side in ("chosen", "rejected"))
        row = {"input_ids": chosen, "targets": nothing, "prompt_id": pair["prompt_id"]}
        yield row | {"beaten_ids": rejected, "beaten_targets": nothing}


def paired(rows: Sequence[Row], first: Sequence[int]) -> list[Row]:
    """Pair rated answers to a prompt whose labels of the first objective differ; leave the others single.

    The best meets the worst, the second best the second worst: the clearest pairs. No answer is in two pairs.

    Args:
        first: the heads that the first objective reads.
    """
    alone: dict[str, Any] = {"beaten_ids": [], "beaten_targets": []}
    of_prompt: dict[str, list[tuple[float, Row]]] = {}
    units: list[Row] = []
    for row in rows:
        value = float(np.mean([row["targets"][h] for h in first]))
        if np.isnan(value):
            units.append({**row, **alone})
        else:
            of_prompt.setdefault(row["prompt_id"], []).append((value, row))
    for answers in of_prompt.values():
        answers.sort(key=lambda answer: answer[0])
        while len(answers) > 1 and answers[-1][0] > answers[0][0]:
            (_, best), (_, worst) = answers.pop(), answers.pop(0)
            units.append({**best, "beaten_ids": worst["input_ids"], "beaten_targets": worst["targets"]})
        units += [{**row, **alone} for _, row in answers]
    return units


def collator(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[Row]], Batch]:
    """Return a function that makes a batch of rows, padded on the right.

    Under causal attention no real token sees the padding. The second texts of pairs come after all first texts.
    """

    def collate(rows: Sequence[Row]) -> Batch:
        texts = [{"input_ids": row["input_ids"], "targets": row["targets"]} for row in rows]
        two = [i for i, row in enumerate(rows) if row.get("beaten_ids")]
        texts += [{"input_ids": rows[i]["beaten_ids"], "targets": rows[i]["beaten_targets"]} for i in two]
        batch: Batch = tokenizer.pad(texts, padding_side="right", return_tensors="pt").data
        if "beaten_ids" in rows[0]:
            batch["beaten"] = torch.full((len(texts),), -1)
            batch["beaten"][two] = torch.arange(len(rows), len(texts))
        return batch

    return collate
