"""A small base model from scratch, for machines without a model hub."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast, set_seed

from dpalign.train.dataset import store_fitting
from dpalign.train.knobs import Kernels
from dpalign.train.sft import COLUMNS, sft_trainer
from dpalign.train.trainer import Outcome, RunContext, train

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>")


def train_tokenizer(
    texts: Iterable[str], vocabulary: int, chat_template: str | None = None, split_digits: bool = True
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the tokens of a chat.

    Every text, and every turn of a chat, is read as if a space stood before it: a word is the same token
    at its start and in its middle. Decoding takes that space away.

    Args:
        split_digits: one token a digit, so that any number can be read; else a frequent number is one token.
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


def pretrain(context: RunContext, documents: Sequence[str], *, hidden: int, layers: int, heads: int) -> Outcome:
    """Train a Mistral-architecture model on documents, in float32, and store it in bfloat16.

    Args:
        heads: attention heads; half as many key-value heads.

    Raises:
        ValueError: no document fits the training's context. Longer documents are left out and counted.
    """
    tokenizer, room = context.tokenizer, context.training.context
    set_seed(context.seed)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 2),
            intermediate_size=hidden * 5 // 2,
            max_position_embeddings=room,
            sliding_window=None,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    encoded = ([*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in documents)
    labelled = ({"input_ids": ids, "labels": ids} for ids in encoded)
    rows = store_fitting(labelled, "document", room, context.resume / "rows.arrow", COLUMNS, knob="pretrain.context")
    trainer = sft_trainer(model, rows.rows, replace(context, dtype="float32", kernels=Kernels()))
    # Stored at half the size; later trainings load it as float32.
    return train(trainer, rows, replace(context, dtype="bfloat16"))
