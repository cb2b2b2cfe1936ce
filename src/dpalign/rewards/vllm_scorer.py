"""Scoring with vLLM's pooling runner: the same reward folder, the same texts, raw values.

Its prefix cache reads a prompt once for the answers to it that stand together. Shapes: N answers, H heads.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig, AutoTokenizer

from dpalign.engines.knobs import Engines, longest
from dpalign.engines.vllm_start import bar, start, stop
from dpalign.paper.prompts import RewardTemplate, render_reward_input
from dpalign.rewards.score import Pair, checked, head_names

Array = NDArray[np.float32]


class VllmScorer:
    """A `Scorer`: a sequence classifier on vLLM.

    Args:
        source: a folder or hub name.
        unnamed: names for a model that only numbers as many.
        rows: answers scored side by side.
        prompt_tokens, max_new_tokens: what the recipe allows; room is made for more where the model has it.
        share: of the GPU memory that the recipe grants, for this engine.

    Raises:
        ValueError: vLLM is not installed, or cannot start.
    """

    def __init__(
        self,
        source: str,
        unnamed: Sequence[str] = (),
        *,
        template: RewardTemplate,
        rows: int,
        settings: Engines,
        prompt_tokens: int,
        max_new_tokens: int,
        share: float = 1.0,
        dtype: str = "float32",
        trust_remote_code: bool = False,
    ) -> None:
        self.source, self.template = source, template
        self.tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        self.config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        self.heads = head_names(self.config, unnamed)
        own = getattr(self.config, "max_position_embeddings", None)
        self.context = longest(own, prompt_tokens, max_new_tokens)
        self.llm: Any = start(
            source,
            settings,
            share=share,
            context=self.context,
            sequences=rows,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            options={"runner": "pooling", "pooler_config": {"task": "classify", "use_activation": False}},
        )
        self._end = weakref.finalize(self, stop, self.llm)

    def score(self, pairs: Sequence[Pair]) -> Array:
        """See `Scorer.score`.

        Raises:
            ValueError: an answer is too long, or its reward is no number; it is shown.
        """
        rows = [self.tokenizer(render_reward_input(*pair, self.template))["input_ids"] for pair in pairs]
        for n, ids in enumerate(rows):
            if len(ids) > self.context:
                raise ValueError(
                    f"{self.source}: answer {n} of {len(rows)} and its prompt are {len(ids)} tokens, and vLLM has room "
                    f"for {self.context}: {pairs[n][1][:80]!r}; filter by length, or score with transformers "
                    "(engines.scoring)"
                )
        rewards_NH = np.empty((len(rows), self.config.num_labels), dtype=np.float32)
        if rows:
            found = self.llm.classify([{"prompt_token_ids": ids} for ids in rows], use_tqdm=bar("scored"))
            for n, output in enumerate(found):
                rewards_NH[n] = output.outputs.probs
        return checked(rewards_NH, pairs, self.source)

    def close(self) -> None:
        """End vLLM, and give its memory back; it happens by itself when nothing holds the scorer any more."""
        self._end()
