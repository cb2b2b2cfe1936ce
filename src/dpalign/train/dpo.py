"""Direct preference optimisation over TRL: the paper's strongest baseline, as Zephyr trained it (section 3.1).

TRL gets token ids, so that DPO reads an answer as SFT and the sampler do. By itself TRL would tokenize again, keep the
newline that Zephyr's template writes after an answer, and cut long rows.

The reference is the model that training starts from. Its log-probabilities are computed once, before the first update,
so that memory holds no second model.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import DPOConfig, DPOTrainer

from dpalign.runs.progress import Progress
from dpalign.train.dataset import IDS, ByLength, Row, store_fitting
from dpalign.train.knobs import Training
from dpalign.train.sft import IGNORED, tokenize
from dpalign.train.trainer import Outcome, RunContext, arguments, load_model, logging_marks, lora, train

COLUMNS: Final = {"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS, "length": pa.int32()}


def tokenize_pairs(
    pairs: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, list[int]]]:
    """Token ids of each prompt and its two answers, under TRL's names: the tokens that SFT trains on, ends included."""
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


def longer_side(row: Row) -> int:
    """Tokens of the prompt with the longer of its answers."""
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def both_sides(row: Row) -> int:
    """Tokens that an update reads: the prompt with each of its answers."""
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


def by_length(pairs: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Iterator[Row]:
    """Tokenized pairs, the shortest first, each with its length: the reference reads them in this order."""
    for row in sorted(tokenize_pairs(pairs, tokenizer), key=longer_side):
        yield {**row, "length": longer_side(row)}


def optimise(
    context: RunContext, pairs: Iterable[Mapping[str, Any]], beta: float, knob: str = "dpo.training"
) -> Outcome:
    """Train a model on preference pairs.

    Args:
        pairs: rows of `rows.PAIRS`.
        beta: strength of the pull towards the model that training starts from.
        knob: the table of its settings, for messages.

    Raises:
        ValueError: no pair fits the training's context, or the training packs rows or has a loss on prompts.
    """
    training = context.training
    if training.packing or training.loss_on != "answer":
        raise ValueError(
            f"DPO compares whole answers, a pair a row: {knob} needs packing = false and loss_on = "
            f'"answer", not {str(training.packing).lower()} and "{training.loss_on}"'
        )
    rows = store_fitting(
        by_length(logging_marks(pairs, context), context.tokenizer),
        "pair",
        training.context,
        context.resume / "pairs.arrow",
        COLUMNS,
        longer_side,
        both_sides,
        f"{knob}.context",
    )
    set_seed(context.seed)
    model = load_model("policy", context)
    return train(dpo_trainer(model, rows.rows, beta, context), rows, context)


def dpo_trainer(model: PreTrainedModel, rows: Dataset, beta: float, context: RunContext) -> DPOTrainer:
    """TRL's DPOTrainer on pairs of token ids, with the log-probabilities of its reference, the untrained `model`.

    Args:
        rows: of COLUMNS. TRL keeps the log-probabilities beside their file, where the other processes find them.
    """
    config = DPOConfig(
        beta=beta,
        max_length=None,
        precompute_ref_log_probs=True,
        pad_to_multiple_of=None,
        **arguments(context),
    )
    if config.process_index == 0:
        sys.stderr.write(f"{context.name}: computing reference log-probs of {len(rows):,} pairs\n")
    return _Trainer(
        model=model,
        args=config,
        train_dataset=rows,
        processing_class=context.tokenizer,
        peft_config=lora(context.training.lora_rank),
    )


class _Trainer(ByLength, DPOTrainer):  # type: ignore[misc]
    """TRL's trainer for pairs that are token ids already. It shows progress while the reference reads them."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def row_lengths(self) -> list[int]:
        lengths: list[int] = self.train_dataset["length"][:]
        return lengths

    def _precompute_ref_logps(self, dataset: Dataset, *rest: Any) -> Dataset:
        with Progress(f"{self.args.run_name}: reference log-probs of pair", len(dataset)) as self.progress:
            return super()._precompute_ref_logps(dataset, *rest)

    def compute_ref_log_probs(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Any:
        log_probs = super().compute_ref_log_probs(model, inputs)
        self.progress.advance(len(inputs["input_ids"]) // 2 * self.args.world_size)  # both sides of a pair are rows
        return log_probs
