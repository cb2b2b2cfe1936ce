"""A small base model from scratch, for machines without a model hub."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast, set_seed

from dpalign.train.common import Fitted, export, forget
from dpalign.train.knobs import Training
from dpalign.train.sft import fit

if TYPE_CHECKING:
    from dpalign.stages.base import Pretrain

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>")


def train_tokenizer(
    texts: Iterable[str], vocabulary: int, chat_template: str | None = None, split_digits: bool = True
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the tokens of a chat.

    Every text, and every turn of a chat, is read as if a space stood before it: a word is the same token
    at its start and in its middle. Decoding takes that space away.

    Args:
        split_digits: a token a digit, so that any number can be read; else a number met often is one token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d" if split_digits else r"\d+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = chat_template
    return fast


def pretrain(
    documents: Sequence[str],
    output: Path,
    settings: "Pretrain",
    *,
    chat_template: str,
    seed: int,
    resume: Path,
    words: Sequence[str] = (),
) -> Fitted:
    """Train a tokenizer and a Mistral-architecture model on documents.

    Args:
        words: text that the tokenizer alone sees, to keep it short later.

    Raises:
        ValueError: no document fits `settings.context`; a longer one is left out, and counted.
    """
    texts = [*documents, *list(words) * 1000]
    tokenizer = train_tokenizer(texts, settings.vocabulary, chat_template, settings.split_digits)
    set_seed(seed)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=max(1, settings.heads // 2),
            intermediate_size=settings.hidden * 5 // 2,
            max_position_embeddings=settings.context,
            sliding_window=None,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    encoded = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in documents]
    rows = [{"input_ids": ids, "labels": ids} for ids in encoded if len(ids) <= settings.context]
    if not rows:
        raise ValueError(f"no document of {len(encoded)} fits pretrain.context, {settings.context} tokens; raise it")
    training = Training(
        learning_rate=settings.learning_rate,
        warmup_steps=settings.steps // 20,
        steps=settings.steps,
        batch=settings.batch,
        micro_batch=settings.micro_batch,
        context=settings.context,
        packing=False,
    )
    run = fit(model, rows, training, tokenizer=tokenizer, dtype="float32", seed=seed, resume=resume)
    export(run.model, tokenizer, output, "bfloat16", run.state)  # half the size; training goes on in float32
    forget(resume)
    return Fitted(
        rows=len(rows),
        too_long=len(encoded) - len(rows),
        tokens=run.tokens,
        updates=run.updates,
        loss=run.loss,
    )
