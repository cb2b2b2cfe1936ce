"""A reward model beside the policy: what answers earn on each objective, without holding up the server.

Shapes: N answers, K objectives.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from dpalign.paper.objectives import Objective, head_indices, read_objectives
from dpalign.paper.prompts import RewardTemplate, render_reward_input, reward_input_frame
from dpalign.rewards.score import ModelScorer, load_scorer
from dpalign.rows import Message
from dpalign.train.contract import Contract

Array = NDArray[np.float64]

BATCH_TOKENS = 8192
"""Tokens a forward, padding included."""


class TooLong(ValueError):
    """A chat and answer that the reward model's context does not hold."""


class Rewards:
    """A scorer that reads the objectives of a policy's contract; one batch at a time, in a thread of its own.

    Args:
        source: a reward folder, a hub name or python:module:function.

    Raises:
        ValueError: an objective reads a head that the scorer lacks, or the contract does not say which it reads.
    """

    def __init__(self, source: str, contract: Contract, template: RewardTemplate, dtype: str = "float32") -> None:
        self.template = template
        unnamed = [name for name, heads in contract.objectives.items() if not heads]
        if unnamed:
            raise ValueError(f"dpa.json does not say which reward heads {unnamed[0]!r} reads; no --reward can score it")
        self.objectives = [Objective(name, heads) for name, heads in contract.objectives.items()]
        self.scorer = load_scorer(source, contract.heads, template=template, batch_tokens=BATCH_TOKENS, dtype=dtype)
        for objective in self.objectives:
            head_indices(objective, self.scorer.heads)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="rewards")

    async def score(self, messages: Sequence[Message], answers: Sequence[str]) -> Array:
        """What each answer to a chat earns: reward_NK, 0-100.

        Raises:
            TooLong: the reward model cannot read one of them.
            ValueError: a chat that does not alternate between user and assistant.
        """
        return await asyncio.get_running_loop().run_in_executor(self.thread, self._score, messages, answers)

    def _score(self, messages: Sequence[Message], answers: Sequence[str]) -> Array:
        reward_input_frame(messages, self.template)
        if isinstance(self.scorer, ModelScorer):
            longest = max((render_reward_input(messages, answer, self.template) for answer in answers), key=len)
            tokens = len(self.scorer.tokenizer(longest)["input_ids"])
            context = getattr(self.scorer.model.config, "max_position_embeddings", None)
            if context and tokens > context:
                raise TooLong(f"the chat with its answer is {tokens} tokens long for the reward model's {context}")
        reward_NH = self.scorer.score([(messages, answer) for answer in answers])
        return read_objectives(reward_NH, self.scorer.heads, self.objectives)

    def named(self, reward_K: Sequence[float]) -> dict[str, float]:
        return {o.name: round(float(r), 3) for o, r in zip(self.objectives, reward_K, strict=True)}

    def close(self) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)
