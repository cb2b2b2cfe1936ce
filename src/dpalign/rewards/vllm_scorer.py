"""Scoring with vLLM's pooling runner: the same reward folder, the same texts, raw values.

Its prefix cache reads a prompt once for neighbouring answers to it. Shapes: N answers, H heads.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from dpalign.engines.vllm_start import Vllm, show_progress
from dpalign.paper.prompts import RewardTemplate, render_reward_input
from dpalign.rewards.score import Pair, head_names, require_finite

Array = NDArray[np.float32]


class VllmScorer:
    """A `Scorer`: a sequence classifier on vLLM, started with `classifies`.

    Args:
        unnamed: head names for a model that only numbers its heads.
    """

    def __init__(self, vllm: Vllm, unnamed: Sequence[str] = (), *, template: RewardTemplate) -> None:
        self.vllm, self.close = vllm, vllm.close
        self.source, self.template = vllm.folder, template
        self.tokenizer = AutoTokenizer.from_pretrained(vllm.folder, trust_remote_code=vllm.trust_remote_code)
        self.heads = head_names(vllm.config, unnamed)

    def score(self, pairs: Sequence[Pair]) -> Array:
        """See `Scorer.score`.

        Raises:
            ValueError: an answer is too long, or its reward is no number; it is shown.
        """
        rows = [self.tokenizer(render_reward_input(*pair, self.template))["input_ids"] for pair in pairs]
        for n, ids in enumerate(rows):
            if len(ids) > self.vllm.context:
                raise ValueError(
                    f"{self.source}: answer {n} of {len(rows)} and its prompt are {len(ids)} tokens, and vLLM has room "
                    f"for {self.vllm.context}: {pairs[n][1][:80]!r}; filter by length, or score with transformers "
                    "(engines.scoring)"
                )
        rewards_NH = np.empty((len(rows), self.vllm.config.num_labels), dtype=np.float32)
        if rows:
            inputs = [{"prompt_token_ids": ids} for ids in rows]
            for n, output in enumerate(self.vllm.llm.classify(inputs, use_tqdm=show_progress())):
                rewards_NH[n] = output.outputs.probs
        return require_finite(rewards_NH, pairs, self.source)
