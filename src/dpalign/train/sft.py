"""Supervised fine-tuning over TRL: SFT, SteerLM and every policy of the loop (section 3.1).

Packing is best-fit decreasing over all rows at once, and packed conversations do not see each other: TRL
restarts the position ids at each, and the model runs without a key-value cache, with which attention leaks.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed
from trl import SFTConfig, SFTTrainer, pack_dataset

from dpalign.train.common import (
    Fitted,
    ProgressCallback,
    RowsByLength,
    Trained,
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
from dpalign.train.knobs import Kernels, Training

IGNORED = -100
STOCK: Final = Kernels()


def tokenize(
    conversations: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, training: Training
) -> Iterator[dict[str, list[int]]]:
    """Token ids and labels of each conversation; the answer ends with the chat template's own end.

    With `loss_on = "answer"` the labels of everything before the answer are ignored, and of what the template
    writes after the answer's end of text (Zephyr's newline), which no sampled answer reaches.
    """
    for row in conversations:
        prompt: str = tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
        whole: str = tokenizer.apply_chat_template(
            [*row["messages"], {"role": "assistant", "content": row["response"]}], tokenize=False
        )
        assert whole.startswith(prompt), "the chat template must extend its own generation prompt"
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
        labels = prompt_ids + answer_ids
        if training.loss_on == "answer":
            after = answer_ids[::-1].index(tokenizer.eos_token_id)
            labels = [IGNORED] * len(prompt_ids) + answer_ids[: len(answer_ids) - after] + [IGNORED] * after
        yield {"input_ids": prompt_ids + answer_ids, "labels": labels}


def finetune(
    start: str,
    conversations: Iterable[Mapping[str, Any]],
    output: Path,
    training: Training,
    *,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    seed: int,
    resume: Path,
    trust_remote_code: bool = False,
    kernels: Kernels = STOCK,
) -> Fitted:
    """Train the model `start` on conversations and leave a plain checkpoint folder at `output`.

    Args:
        conversations: rows of `records.CONVERSATIONS`.
        resume: scratch folder; an interrupted call continues from it with the same result.

    Raises:
        ValueError: no conversation fits `training.context`, or this machine lacks the kernels.
    """
    kernels.require(torch.cuda.is_available())
    rows = list(tokenize(conversations, tokenizer, training))
    fitting = [row for row in rows if len(row["input_ids"]) <= training.context]
    if not fitting:
        raise ValueError(
            f"no conversation of {len(rows)} fits a context of {training.context} tokens; raise it, or check the data"
        )
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(
        start,
        dtype=training_dtype(dtype, training.lora_rank),
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        attn_implementation=kernels.attention,
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    fitted = fit(
        model, fitting, training, tokenizer=tokenizer, dtype=dtype, seed=seed, resume=resume, liger=kernels.liger
    )
    export(fitted.model, tokenizer, output, dtype, fitted.state)
    forget(resume)
    return Fitted(
        rows=len(fitting),
        too_long=len(rows) - len(fitting),
        tokens=fitted.tokens,
        updates=fitted.updates,
        loss=fitted.loss,
    )


class _Trainer(SFTTrainer):
    """TRL's, with an order of unpacked rows that a resumed training finds again, and rows packed all at once."""

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler[int]:
        if self.args.packing:
            return super()._get_train_sampler(dataset)
        return RowsByLength(self, [len(ids) for ids in self.train_dataset["input_ids"]])

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: SFTConfig, packing: bool, *rest: Any
    ) -> Dataset:
        if packing:
            return packed(dataset, args.max_length)
        return super()._prepare_dataset(dataset, processing_class, args, packing, *rest)


def packed(rows: Dataset, room: int) -> Dataset:
    """Token rows in rows of at most `room` tokens, none split, by best-fit decreasing.

    TRL's own trainer packs a thousand at a time, and leaves as many last rows half empty.
    """
    return pack_dataset(rows.select_columns(["input_ids", "labels"]), room, "bfd", {"batch_size": len(rows)})


def alone(training: Training, model: PreTrainedModel) -> Training:
    """The training with packed rows one at a time, unless the model's attention knows where each ends.

    TRL lays a micro-batch of packed rows end to end: with a mask, attention costs the square of that length. So many
    more forwards are accumulated, and the update is the same.
    """
    if not training.packing or training.micro_batch == 1 or "flash" in model.config._attn_implementation:
        return training
    sys.stderr.write(
        f"  packed rows go one at a time without flash-attention, not {training.micro_batch} (micro_batch): their mask "
        "would grow with the square of that\n"
    )
    return training.model_copy(update={"micro_batch": 1})


def fit(
    model: PreTrainedModel,
    rows: Sequence[Mapping[str, list[int]]],
    training: Training,
    *,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    seed: int,
    resume: Path,
    liger: bool = False,
) -> Trained:
    """Train a model in memory on token rows with TRL's SFTTrainer."""
    quiet()
    training = alone(training, model)
    trainer = _Trainer(
        model=model,
        args=SFTConfig(
            output_dir=str(resume),
            max_length=training.context,
            packing=training.packing,
            pad_to_multiple_of=1,
            use_liger_kernel=liger,
            **arguments(training, seed, dtype),
        ),
        train_dataset=Dataset.from_list([dict(row) for row in rows]),
        processing_class=tokenizer,
        peft_config=lora(training.lora_rank, "CAUSAL_LM"),
        callbacks=[ProgressCallback()],
    )
    trainer.remove_callback(PrinterCallback)
    require_spread(trainer)
    result = trainer.train(resume_from_checkpoint=last_checkpoint(resume))
    trained = trainer.model.merge_and_unload() if training.lora_rank else trainer.model
    epochs = trainer.state.epoch or 0.0
    return Trained(
        model=trained,
        state=whole_weights(trainer),
        tokens=math.ceil(epochs * sum(len(row["input_ids"]) for row in rows)),
        updates=trainer.state.global_step,
        loss=mean_loss(trainer, result.training_loss),
    )
