"""Tokens trained a second: ours, against TRL's SFTTrainer with its own defaults, on the same conversations.

Its defaults that are not of speed are set as ours on both sides: float32 on a CPU, no limit below the longest row. Ours
are rows of like length side by side, or packed rows.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerBase, PrinterCallback, set_seed
from trl import SFTConfig, SFTTrainer

from dpalign.chat import chat_template
from dpalign.train.knobs import Training
from dpalign.train.pretrain import train_tokenizer
from dpalign.train.sft import sft_trainer
from dpalign.train.trainer import RunContext, fit, mean_loss, quiet
from harness import Row, equal, main, ratio_of, timed

COMMAND = "python bench/training.py"
VOCABULARY, HIDDEN, LAYERS, LONGEST = 1024, 128, 4, 1024
Rows = Sequence[dict[str, list[int]]]


def rows(quick: bool) -> Iterator[Row]:
    quiet()
    count, rounds = (16, 1) if quick else (256, 3)  # of fewer than 64 rows the grouping by length has nothing to group
    tokens = train_tokenizer([f"word {i}" for i in range(500)], 400, chat_template("zephyr"))
    given = conversations(count)
    total = sum(len(row["input_ids"]) for row in given)
    grouped = Training(packing=False, micro_batch=8, batch=8, epochs=1.0, context=LONGEST, warmup_steps=0)
    packing = grouped.model_copy(update={"packing": True, "micro_batch": 1, "batch": 1})
    for training in (grouped, packing):
        ours, theirs = loss(tokens, given, training), their_loss(tokens, given)
        equal(ours, theirs, 1e-4, "loss of one update on all conversations")
    kept = {"activation_checkpointing": False}
    own = {
        name: _side(ours_once, tokens, given, how) for name, how in (("of like length", grouped), ("packed", packing))
    }
    peers = {
        "TRL's SFTTrainer by default: shuffled padded batches of 8, activations recomputed": {},
        "TRL's SFTTrainer by default, but with activations kept": kept,
    }
    seconds = timed([*own.values(), *(_side(theirs_once, tokens, given, how) for how in peers.values())], rounds)
    for i, name in enumerate(own):
        for j, peer in enumerate(peers, start=len(own)):
            ratio, low, high = ratio_of(seconds[:, j], seconds[:, i])
            what = f"trained tokens/s, rows {name}, against defaults{' with activations kept' if j > len(own) else ''}"
            note = f"{count} rows of {total / count:.0f} tokens on average, model {HIDDEN} x {LAYERS}"
            yield Row(what, ratio, low, high, None, peer, COMMAND, note)


def conversations(count: int) -> Rows:
    """Random tokens; most rows of 70 to 300, as long as a tenth of the paper's context at the most."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(5.0, 0.7, count).astype(int).clip(16, LONGEST).tolist()
    ids = [rng.integers(4, VOCABULARY, size=n).tolist() for n in lengths]
    return [{"input_ids": row, "labels": row} for row in ids]


def model() -> MistralForCausalLM:
    set_seed(0)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=HIDDEN * 5 // 2,
            max_position_embeddings=LONGEST,
            sliding_window=None,
            pad_token_id=0,
        )
    )


def ours_once(tokens: PreTrainedTokenizerBase, given: Rows, training: Training, folder: Path) -> float:
    trainer = sft_trainer(model(), given, RunContext("", training, tokens, folder, seed=0, resume=folder))
    fit(trainer)
    return mean_loss(trainer)


def theirs_once(tokens: PreTrainedTokenizerBase, given: Rows, changes: dict[str, Any], folder: Path) -> float:
    quiet_and_plain = {"bf16": False, "use_cpu": True, "save_strategy": "no", "logging_strategy": "no"}
    args = SFTConfig(
        output_dir=str(folder),
        max_length=LONGEST,
        num_train_epochs=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **quiet_and_plain | changes,
    )
    trainer = SFTTrainer(
        model=model(), args=args, train_dataset=Dataset.from_list([dict(row) for row in given]), processing_class=tokens
    )
    trainer.remove_callback(PrinterCallback)
    return float(trainer.train().training_loss)


def loss(tokens: PreTrainedTokenizerBase, given: Rows, training: Training) -> float:
    """Of one update on everything, before it changes the model."""
    count = len(given) // training.micro_batch * training.micro_batch
    return _side(ours_once, tokens, given, training.model_copy(update={"batch": count, "steps": 1}))()


def their_loss(tokens: PreTrainedTokenizerBase, given: Rows) -> float:
    return _side(theirs_once, tokens, given, {"gradient_accumulation_steps": len(given) // 8, "max_steps": 1})()


def _side(once: Callable[..., float], *words: Any) -> Callable[[], float]:
    """One side, in a folder of its own that is taken away after it."""

    def run() -> float:
        folder = Path(tempfile.mkdtemp())
        try:
            return once(*words, folder)
        finally:
            shutil.rmtree(folder)

    return run


if __name__ == "__main__":
    main(rows, "training")
