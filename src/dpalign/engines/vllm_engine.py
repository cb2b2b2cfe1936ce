"""Sampling with vLLM: each prompt is read once, its n answers are drawn in one request.

True sampling, as in the transformers engine: no top-k, no top-p, whatever the folder's generation_config says. The seed
of a request is a hash of the draw's meaning, and vLLM gives answer i the seed + i. An answer then depends neither on
its neighbours nor on their number, as far as the arithmetic allows: in float32 on a CPU always; on a GPU the rounding
of a large batch may change a draw.
"""

from collections.abc import Iterator, Sequence

from dpalign.engines.engine import Answer, Request, require_room
from dpalign.engines.transformers_engine import PromptReader
from dpalign.engines.vllm_start import Vllm, show_progress
from dpalign.paper.direction import rng_for


class VllmEngine:
    """An `Engine` on vLLM, started with a policy."""

    def __init__(self, vllm: Vllm) -> None:
        self.vllm, self.close = vllm, vllm.close
        self.reader = PromptReader(vllm.folder, trust_remote_code=vllm.trust_remote_code)
        self.tokenizer = self.reader.tokenizer

    def sample(self, requests: Sequence[Request], *, temperature: float, max_new_tokens: int) -> Iterator[list[Answer]]:
        """See `Engine.sample`.

        Raises:
            ValueError: a prompt leaves no room for an answer in the model's context; a temperature beyond vLLM's.
        """
        from vllm import SamplingParams

        if not 0 <= temperature <= 2:
            raise ValueError(f"vLLM draws at temperatures of 0 to 2, not {temperature:g}; use the transformers engine")

        prompts = [self.reader.prompt_ids(request.messages) for request in requests]
        require_room(requests, prompts, max_new_tokens, self.vllm.context)
        eos = self.tokenizer.eos_token_id
        params = [
            SamplingParams(
                n=request.n if temperature else 1,  # vLLM refuses several greedy answers
                temperature=temperature,
                top_p=1.0,
                top_k=0,
                min_p=0.0,
                seed=seed_of(request),
                max_tokens=max_new_tokens,
                stop_token_ids=[eos],
                ignore_eos=True,  # stops at the tokenizer's end of text alone, as the transformers engine does
                detokenize=False,
            )
            for request in requests
        ]
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = self.vllm.llm.generate(inputs, params, use_tqdm=show_progress())
        for request, output in zip(requests, outputs, strict=True):
            in_order = sorted(output.outputs, key=lambda answer: answer.index)
            answers = [self._answer(list(answer.token_ids), eos) for answer in in_order]
            answers = answers if temperature else answers * request.n
            assert len(answers) == request.n, request.key
            yield answers

    def _answer(self, ids: list[int], eos: int) -> Answer:
        finished = bool(ids) and ids[-1] == eos
        text = self.tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True)
        return Answer(text, len(ids), finished)


def seed_of(request: Request) -> int:
    """The seed of a request's first answer: of 62 bits, so that the seeds of two requests do not meet."""
    return int(rng_for(*request.key, "vllm").integers(2**62))
