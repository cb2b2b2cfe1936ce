"""Direct preference optimisation over TRL: the paper's strongest baseline, as Zephyr trained it (section 3.1).

TRL is handed token ids, so that an answer is trained on as SFT trained it and as the sampler reads it: left to itself
it tokenizes anew, keeps the newline that Zephyr's template writes after an answer, and cuts what is too long.

The reference is the model that training starts from. Its log-probabilities are taken once, before the first update,
in place of keeping a second model beside the one in training.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, load_from_disk
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed
from trl import DPOConfig, DPOTrainer

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
from dpalign.train.knobs import Training
from dpalign.train.sft import IGNORED, tokenize

if TYPE_CHECKING:
    from dpalign.stages.dpo import DPO


def tokenize_pairs(
    pairs: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, list[int]]]:
    """Token ids of each prompt and of its two answers, in TRL's names: those that SFT trains on, end of text included.

    What the chat template writes after an answer's end of text is left out: no sampled answer reaches it.
    """
    answers_alone = Training(loss_on="answer")
    for pair in pairs:
        sides = ({"messages": pair["messages"], "response": pair[side]} for side in ("chosen", "rejected"))
        chosen, rejected = tokenize(sides, tokenizer, answers_alone)
        prompt = next(i for i, label in enumerate(chosen["labels"]) if label != IGNORED)
        yield {
            "prompt_ids": chosen["input_ids"][:prompt],
            "chosen_ids": [label for label in chosen["labels"] if label != IGNORED],
            "rejected_ids": [label for label in rejected["labels"] if label != IGNORED],
        }


def longer_side(row: Mapping[str, list[int]]) -> int:
    """Tokens of the prompt with the longer of its answers."""
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def optimise(
    start: str,
    pairs: Iterable[Mapping[str, Any]],
    output: Path,
    settings: "DPO",
    *,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    seed: int,
    resume: Path,
    trust_remote_code: bool = False,
) -> Fitted:
    """Train the model `start` on preference pairs and leave a plain checkpoint folder at `output`.

    Args:
        pairs: rows of `records.PAIRS`.
        resume: scratch folder; an interrupted call continues from it with the same result.

    Raises:
        ValueError: no pair fits `training.context`; or the training packs rows, or has a loss on prompts.
    """
    training = settings.training
    if training.packing or training.loss_on != "answer":
        raise ValueError(
            "DPO compares whole answers, a pair a row: dpo.training needs packing = false and loss_on = "
            f'"answer", not {str(training.packing).lower()} and "{training.loss_on}"'
        )
    rows = list(tokenize_pairs(pairs, tokenizer))
    fitting = [row for row in rows if longer_side(row) <= training.context]
    if not fitting:
        raise ValueError(
            f"no pair of {len(rows)} fits a context of {training.context} tokens; raise it, or check the data"
        )
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(
        start,
        dtype=training_dtype(dtype, training.lora_rank),
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
    )
    fitted = fit(model, fitting, settings, tokenizer=tokenizer, dtype=dtype, seed=seed, resume=resume)
    export(fitted.model, tokenizer, output, dtype, fitted.state)
    forget(resume)
    return Fitted(
        rows=len(fitting),
        too_long=len(rows) - len(fitting),
        tokens=fitted.tokens,
        updates=fitted.updates,
        loss=fitted.loss,
    )


class _Trainer(DPOTrainer):
    """TRL's, for pairs that are token ids already."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _get_train_sampler(self, _: Dataset | None = None) -> RowsByLength:
        return RowsByLength(self, self.train_dataset["length"][:])


def fit(
    model: PreTrainedModel,
    rows: Sequence[Mapping[str, list[int]]],
    settings: "DPO",
    *,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    seed: int,
    resume: Path,
) -> Trained:
    """Train a model in memory on pairs of token ids with TRL's DPOTrainer; the model as it comes is the reference."""
    quiet()
    training = settings.training
    args = DPOConfig(
        output_dir=str(resume),
        beta=settings.beta,
        max_length=None,
        precompute_ref_log_probs=True,
        pad_to_multiple_of=None,
        **arguments(training, seed, dtype),
    )
    if args.process_index == 0:
        sys.stderr.write(f"  the reference's log-probabilities of {len(rows)} pairs\n")
    trainer = _Trainer(
        model=model,
        args=args,
        train_dataset=_on_disk(rows, resume / "pairs", args),
        processing_class=tokenizer,
        peft_config=lora(training.lora_rank, "CAUSAL_LM"),
        callbacks=[ProgressCallback()],
    )
    trainer.remove_callback(PrinterCallback)
    require_spread(trainer)
    result = trainer.train(resume_from_checkpoint=last_checkpoint(resume))
    tokens = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    return Trained(
        model=trainer.model.merge_and_unload() if training.lora_rank else trainer.model,
        state=whole_weights(trainer),
        tokens=math.ceil((trainer.state.epoch or 0.0) * tokens),
        updates=trainer.state.global_step,
        loss=mean_loss(trainer, result.training_loss),
    )


def _on_disk(rows: Sequence[Mapping[str, list[int]]], folder: Path, args: DPOConfig) -> Dataset:
    """The rows as a data set in files, which the first of several processes writes.

    TRL keeps the reference's log-probabilities beside them: of a data set in memory, where no other process looks.
    Rows of like length stand together, since the reference reads them in this order and the trainer in its own.
    """
    with args.main_process_first(local=False):
        if args.process_index == 0:
            ordered = sorted(rows, key=longer_side)
            Dataset.from_list([{**row, "length": longer_side(row)} for row in ordered]).save_to_disk(folder)
        return load_from_disk(folder)
