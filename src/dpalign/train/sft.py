"""Supervised fine-tuning over TRL: SFT, SteerLM and every policy of the loop (section 3.1).

Packing is best-fit decreasing over all rows at once. Packed conversations do not see each other: TRL restarts the
position ids at each, and the model runs without a key-value cache, since attention would leak with one.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from datasets import Dataset
from torch.nn import functional
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed
from trl import SFTConfig, SFTTrainer, pack_dataset

from dpalign.engines.tokens import row_ids, turn_of
from dpalign.train.dataset import IDS, ByLength, Row, make_once, store_fitting
from dpalign.train.knobs import Training
from dpalign.train.trainer import (
    Outcome,
    RunContext,
    arguments,
    load_model,
    logging_marks,
    lora,
    train,
    wants_whole_logits,
)

IGNORED = -100
COLUMNS: Final = {"input_ids": IDS, "labels": IDS}


def tokenize(
    conversations: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, training: Training
) -> Iterator[dict[str, list[int]]]:
    """Token ids and labels of each conversation: the prompt as sampling reads it, the answer, and the answer's end.

    With `loss_on = "answer"` the labels of the prompt are ignored. What the chat template writes after the answer's
    end (Zephyr's newline) is left out: no sampled answer reaches it.

    Raises:
        ValueError: the chat template refuses a conversation, or has no place for an answer.
    """
    turn = turn_of(tokenizer)
    for row in conversations:
        prompt_ids, answer_ids = row_ids(tokenizer, turn, row)
        asked = [IGNORED] * len(prompt_ids) if training.loss_on == "answer" else prompt_ids
        yield {"input_ids": prompt_ids + answer_ids, "labels": asked + answer_ids}


def finetune(context: RunContext, conversations: Iterable[Mapping[str, Any]]) -> Outcome:
    """Train a model on conversations.

    Args:
        conversations: rows of `rows.CONVERSATIONS`.

    Raises:
        ValueError: no conversation fits the training's context, or this machine lacks the kernels.
    """
    context.kernels.require(torch.cuda.is_available())
    tokenizer, training = context.tokenizer, context.training
    tokenized = tokenize(logging_marks(conversations, context), tokenizer, training)
    rows = store_fitting(tokenized, "conversation", training.context, context.resume / "rows.arrow", COLUMNS)
    set_seed(context.seed)
    attention = context.kernels.attention
    model = load_model("policy", context, attn_implementation=attention)
    model.config.pad_token_id = tokenizer.pad_token_id
    return train(sft_trainer(model, rows.rows, context), rows, context)


def sft_trainer(model: PreTrainedModel, rows: Dataset | Sequence[Row], context: RunContext) -> SFTTrainer:
    """TRL's SFTTrainer on rows of token ids and labels."""
    training = one_packed_row(context.training, model)
    config = SFTConfig(
        max_length=training.context,
        packing=training.packing,
        pad_to_multiple_of=1,
        use_liger_kernel=context.kernels.liger,
        **arguments(replace(context, training=training)),
    )
    trainer = _CpuTrainer if wants_whole_logits(model) else _Trainer
    return trainer(
        model=model,
        args=config,
        train_dataset=rows if isinstance(rows, Dataset) else Dataset.from_list([dict(row) for row in rows]),
        processing_class=context.tokenizer,
        peft_config=lora(training.lora_rank),
    )


class _Trainer(ByLength, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer, but it orders unpacked rows by length, and packs all rows at once."""

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler[int]:
        if self.args.packing:
            return SFTTrainer._get_train_sampler(self, dataset)
        return super()._get_train_sampler(dataset)

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: SFTConfig, packing: bool, *rest: Any
    ) -> Dataset:
        return packed(dataset, args.max_length) if packing else dataset


class _CpuTrainer(_Trainer):
    """Computes the same loss from whole logits, only at positions where some row has a label.

    TRL computes logits in tiles, which saves GPU memory. Without a GPU it computes them for every position.

    Shapes: B rows of a micro-batch, T tokens, S positions with a label.
    """

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        target_BT = functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
        position_S = (target_BT != IGNORED).any(dim=0).nonzero().flatten()
        keywords = {"use_cache": False, "logits_to_keep": position_S, "shift_labels": target_BT[:, position_S]}
        return Trainer.compute_loss(self, model, inputs | keywords, return_outputs, num_items_in_batch)


def packed(rows: Dataset, room: int) -> Dataset:
    """Pack token rows into rows of at most `room` tokens by best-fit decreasing, and split none.

    TRL's own trainer packs a thousand at a time, and leaves a half-empty row after each thousand. Rows of a file are
    packed into a file beside it, only by the first of a training's processes.
    """

    def pack(file: Path | None = None) -> Dataset:
        how = {"batch_size": len(rows), "cache_file_name": file and str(file), "load_from_cache_file": False}
        return pack_dataset(rows.select_columns([*COLUMNS]), room, "bfd", how)

    if not rows.cache_files:
        return pack()
    file = Path(rows.cache_files[0]["filename"]).with_name("packed.arrow")
    make_once(file, pack)
    return Dataset.from_file(str(file))


def one_packed_row(training: Training, model: PreTrainedModel) -> Training:
    """The training with one packed row a forward, unless the model's attention knows where each conversation ends.

    TRL joins a micro-batch of packed rows into one row. With a mask, attention costs the square of its length.
    Instead the training accumulates more forwards; the update is the same.
    """
    if not training.packing or training.micro_batch == 1 or "flash" in model.config._attn_implementation:
        return training
    sys.stderr.write(
        f"one packed row a forward, not {training.micro_batch} (micro_batch): without flash-attention the mask of "
        "several grows with the square of their number\n"
    )
    return training.model_copy(update={"micro_batch": 1})
