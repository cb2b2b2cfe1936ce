"""The shape of a model: all that its cost depends on, from a configuration file or a known name."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final


@dataclass(frozen=True)
class Architecture:
    """A decoder of the Llama family (Mistral, Qwen2 and 3, SmolLM): all that its cost depends on."""

    name: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    tied: bool = False
    """Whether the output shares the input's embeddings."""
    qkv_bias: bool = False
    qk_norm: bool = False
    """Whether queries and keys are normalised, head by head (Qwen3)."""

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def linear(self) -> int:
        """Weights of the layers' matrices, which multiply every token; the output's are not counted."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def parameters(self) -> int:
        biases = self.layers * self.head_dim * (self.heads + 2 * self.kv_heads) if self.qkv_bias else 0
        norms = self.hidden * (2 * self.layers + 1) + (2 * self.layers * self.head_dim if self.qk_norm else 0)
        return self.linear + biases + norms + self.embedding * (1 if self.tied else 2)

    def forward(self, tokens: float, context: float, logits: bool) -> float:
        """FLOPs of a forward: two per weight and token, and attention to `context` tokens on average.

        Args:
            logits: include the logits of every token; a prompt and a scored answer need none.
        """
        products = 2.0 * (self.linear + (self.embedding if logits else 0))
        return tokens * (products + 4.0 * self.layers * self.heads * self.head_dim * context)

    def cache(self, tokens: float, width: int) -> float:
        """Bytes of the keys and values of `tokens` tokens, at `width` bytes a number."""
        return 2.0 * self.layers * self.kv_heads * self.head_dim * width * tokens

    def lora(self, rank: int) -> int:
        """Weights of a LoRA on every linear layer."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = [(self.hidden, query), (self.hidden, key), (self.hidden, key), (query, self.hidden)]
        shapes += [(self.hidden, self.intermediate)] * 2 + [(self.intermediate, self.hidden)]
        return self.layers * rank * sum(a + b for a, b in shapes)


_MISTRAL: Final = (32000, 4096, 32, 32, 8, 128, 14336)


KNOWN: Final[Mapping[str, Architecture]] = {
    model.name: model
    for model in (
        *(
            Architecture(name, *_MISTRAL)
            for name in (
                "mistralai/Mistral-7B-v0.1",
                "HuggingFaceH4/mistral-7b-sft-beta",
                "HuggingFaceH4/zephyr-7b-beta",
                "RLHFlow/DPA-v1-Mistral-7B",
            )
        ),
        Architecture("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", 32000, 2048, 22, 32, 4, 64, 5632),
        Architecture("meta-llama/Llama-3.1-8B", 128256, 4096, 32, 32, 8, 128, 14336),
        Architecture("meta-llama/Llama-3.2-1B", 128256, 2048, 16, 32, 8, 64, 8192, tied=True),
        Architecture("Qwen/Qwen2.5-0.5B", 151936, 896, 24, 14, 2, 64, 4864, tied=True, qkv_bias=True),
        Architecture("Qwen/Qwen2.5-1.5B", 151936, 1536, 28, 12, 2, 128, 8960, tied=True, qkv_bias=True),
        Architecture("Qwen/Qwen2.5-7B", 152064, 3584, 28, 28, 4, 128, 18944, qkv_bias=True),
        Architecture("Qwen/Qwen3-0.6B", 151936, 1024, 28, 16, 8, 128, 3072, tied=True, qk_norm=True),
        Architecture("Qwen/Qwen3-1.7B", 151936, 2048, 28, 16, 8, 128, 6144, tied=True, qk_norm=True),
        Architecture("Qwen/Qwen3-4B", 151936, 2560, 36, 32, 8, 128, 9728, tied=True, qk_norm=True),
        Architecture("Qwen/Qwen3-8B", 151936, 4096, 36, 32, 8, 128, 12288, qk_norm=True),
        Architecture("google/gemma-3-1b-it", 262144, 1152, 26, 4, 1, 256, 6912, tied=True, qk_norm=True),
        Architecture("HuggingFaceTB/SmolLM2-135M", 49152, 576, 30, 9, 3, 64, 1536, tied=True),
        Architecture("runs/smollm2", 49152, 576, 30, 9, 3, 64, 1536, tied=True),  # the same, written by `dpa smollm2`
        Architecture("HuggingFaceTB/SmolLM2-360M", 49152, 960, 32, 15, 5, 64, 2560, tied=True),
        Architecture("HuggingFaceTB/SmolLM2-1.7B", 49152, 2048, 24, 32, 32, 64, 8192, tied=True),
    )
}
"""Models whose shape is known without asking the hub, or before they are fetched."""


def read_architecture(folder: Path, name: str = "") -> Architecture:
    """A model's shape, from the config.json of its folder.

    Raises:
        ValueError: the file is not JSON, or lacks a size; names the file and the key.
    """
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        heads = int(config["num_attention_heads"])
        return Architecture(
            name=name or folder.name,
            vocabulary=int(config["vocab_size"]),
            hidden=int(config["hidden_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
            intermediate=int(config["intermediate_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=bool(config.get("attention_bias", config.get("model_type") == "qwen2")),
            qk_norm=config.get("model_type") == "qwen3",
        )
    except KeyError as error:
        raise ValueError(f"{path}: no key {error}; only decoders of the Llama family are counted") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}; it should be the configuration of a model") from error
