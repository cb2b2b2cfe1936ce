"""Sampling with vLLM: each prompt is read once, its n answers are drawn in one request.

True sampling, as the transformers engine has it: no top-k, no top-p, whatever the folder's generation_config says.
Each request's seed is a hash of what the draw means, and vLLM gives answer i the seed + i: an answer depends neither
on its neighbours nor on how many are asked for, as far as the machine's arithmetic does not (float32 on a CPU: not at
all; on a GPU the rounding of a large batch may turn a draw).
"""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import AutoConfig

from dpalign.engines.engine import Answer, Request, require_room
from dpalign.engines.knobs import Engines, longest
from dpalign.engines.transformers_engine import PromptReader
from dpalign.engines.vllm_start import bar, start, stop
from dpalign.paper.direction import rng_for
from dpalign.rows import Message


class VllmEngine:
    """An `Engine` on vLLM.

    Args:
        folder: a policy folder or hub name.
        rows: answers decoded side by side.
        prompt_tokens, max_new_tokens: what the recipe allows; room is made for more where the model has it.
        share: of the GPU memory that the recipe grants, for this engine.

    Raises:
        ValueError: vLLM is not installed, or cannot start.
    """

    def __init__(
        self,
        folder: str,
        *,
        rows: int,
        settings: Engines,
        prompt_tokens: int,
        max_new_tokens: int,
        share: float = 1.0,
        dtype: str = "float32",
        trust_remote_code: bool = False,
    ) -> None:
        self.reader = PromptReader(folder, trust_remote_code=trust_remote_code)
        self.tokenizer = self.reader.tokenizer
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        self.context = longest(getattr(config, "max_position_embeddings", None), prompt_tokens, max_new_tokens)
        self.llm: Any = start(
            folder,
            settings,
            share=share,
            context=self.context,
            sequences=rows,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            options={},
        )
        self._end = weakref.finalize(self, stop, self.llm)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        return self.reader.prompt_ids(messages)

    def prompt_tokens(self, messages: Sequence[Message]) -> int:
        return self.reader.prompt_tokens(messages)

    def sample(self, requests: Sequence[Request], *, temperature: float, max_new_tokens: int) -> Iterator[list[Answer]]:
        """See `Engine.sample`.

        Raises:
            ValueError: a prompt leaves no room for an answer in the model's context; a temperature beyond vLLM's.
        """
        from vllm import SamplingParams

        if not 0 <= temperature <= 2:
            raise ValueError(f"vLLM draws at temperatures of 0 to 2, not {temperature:g}; use the transformers engine")

        prompts = [self.prompt_ids(request.messages) for request in requests]
        require_room(requests, prompts, max_new_tokens, self.context)
        eos = self.tokenizer.eos_token_id
        params = [
            SamplingParams(
                n=request.n if temperature else 1,  # it refuses to be greedy twice
                temperature=temperature,
                top_p=1.0,
                top_k=0,
                min_p=0.0,
                seed=seed_of(request),
                max_tokens=max_new_tokens,
                stop_token_ids=[eos],
                ignore_eos=True,  # the tokenizer's own end of text, and no other, as the transformers engine has it
                detokenize=False,
            )
            for request in requests
        ]
        finished = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=bar("answers"))
        for request, output in zip(requests, finished, strict=True):
            drawn = sorted(output.outputs, key=lambda answer: answer.index)
            answers = [self._answer(list(answer.token_ids), eos) for answer in drawn]
            answers = answers if temperature else answers * request.n
            assert len(answers) == request.n, request.key
            yield answers

    def _answer(self, ids: list[int], eos: int) -> Answer:
        finished = bool(ids) and ids[-1] == eos
        text = self.tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True)
        return Answer(text, len(ids), finished)

    def close(self) -> None:
        """End vLLM, and give its memory back; it happens by itself when nothing holds the engine any more."""
        self._end()


def seed_of(request: Request) -> int:
    """The seed of a request's first answer: 62 bits, so that the ranges of two requests do not meet."""
    return int(rng_for(*request.key, "vllm").integers(2**62))
