"""The engine on vLLM: its asynchronous engine, in its own process, behind our API.

Prompts are rendered here, by the model's own chat template, and go to vLLM as tokens. They are the same as with the
transformers engine, and so are the checks before them. The text is made here too, because vLLM's own keeps the space
that the prompt leaves before a first word. vLLM still gets the stop strings, so that it ends its work at them.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import torch
from transformers import AutoConfig, AutoTokenizer

from dpalign.dial.server.engine import (
    Closing,
    Delta,
    Finish,
    GenerationError,
    Sampling,
    require_embedded,
    require_known,
)
from dpalign.dial.server.text import AnswerText, Detokenizer, Prompts, decoder_of
from dpalign.engines.knobs import Engines
from dpalign.engines.loading import require_tensors
from dpalign.engines.tokens import end_ids, generation_config
from dpalign.engines.vllm_engine import CPU_BLOCK, require_vllm
from dpalign.paper.direction import rng_for

ENVIRONMENT: Final = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""vLLM reads these when it is imported; a value that is set already stays."""

_CPU_CACHE: Final = 1 << 30
"""Bytes of keys and values without a GPU. vLLM's own default takes nearly all memory there."""


class VllmGenerator:
    """A `Generator` on vLLM.

    Args:
        folder: a policy folder or hub name.
        rows: answers decoded side by side.
        settings: GPUs to split the model over, and the share of each that vLLM may take.
        max_model_len: tokens of a prompt and its answer; None: what the model's context holds.

    Raises:
        ValueError: vLLM is not installed, does not fit this machine, or cannot start with this model; or the folder
            lacks tensors.
    """

    def __init__(
        self,
        folder: str,
        *,
        rows: int,
        settings: Engines,
        dtype: str = "auto",
        max_model_len: int | None = None,
    ) -> None:
        require_vllm(ENVIRONMENT)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.prompts = Prompts(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.decode = decoder_of(tokenizer)
        self.ends = end_ids(tokenizer, generation_config(folder))
        self.special = frozenset([*tokenizer.all_special_ids, *self.ends])
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        self.embedded = int(config.get_text_config().vocab_size)
        require_embedded(folder, tokenizer.get_vocab(), self.embedded)
        stored = str(getattr(config, "dtype", None) or "auto").removeprefix("torch.")
        arguments: dict[str, Any] = {
            "model": folder,
            "dtype": stored if dtype == "auto" else dtype,  # vLLM's own "auto" rounds float32 weights
            "max_num_seqs": rows,
            "max_model_len": max_model_len,
            "tensor_parallel_size": settings.tensor_parallel,
            "enable_prefix_caching": True,
            "generation_config": "vllm",  # otherwise the folder's own top_k would cut the distribution
            "trust_remote_code": False,
            "disable_log_stats": True,
        }
        if torch.cuda.is_available():
            arguments["gpu_memory_utilization"] = settings.gpu_memory
        else:  # vLLM's CPU engine dies if the prefill of a seeded request is split
            context = max_model_len or int(getattr(config, "max_position_embeddings", 0) or 4096)
            arguments |= {"enforce_eager": True, "enable_chunked_prefill": False, "block_size": CPU_BLOCK}
            arguments |= {"kv_cache_memory_bytes": _CPU_CACHE, "max_num_batched_tokens": max(context, 4096)}
        if Path(folder).is_dir():
            require_tensors("policy", folder)
        try:
            self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"{folder}: vLLM cannot start with it: {error}") from error
        self.context = int(self.engine.model_config.max_model_len)
        self.closed = False
        self.waits: set[asyncio.Timeout] = set()
        """A wait for vLLM's next output each; `close` ends them."""

    @property
    def load(self) -> Mapping[str, float]:
        return {"rows": self.engine.get_num_unfinished_requests()}

    @property
    def failed(self) -> bool:
        return bool(self.engine.errored)

    async def start(self) -> None:
        """The engine's own process runs already."""

    async def close(self) -> None:
        self.closed = True
        for wait in self.waits:
            if not wait.expired():
                wait.reschedule(0)
        while self.waits:  # a shutdown tells vLLM's streams nothing: they would hang
            await asyncio.sleep(0.01)
        self.engine.shutdown()
        self.prompts.close()

    async def stream(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[list[Delta], None]:
        """See `Generator.stream`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        require_known(prompt, self.embedded)
        copies = 1 if sampling.temperature else sampling.n  # vLLM refuses to be greedy twice
        params = SamplingParams(
            n=sampling.n // copies,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=0,
            min_p=0.0,
            seed=int(rng_for("serve", sampling.seed).integers(2**62)),  # vLLM gives answer i this seed + i
            max_tokens=sampling.max_tokens,
            stop=list(sampling.stop),
            stop_token_ids=self.ends,
            output_kind=RequestOutputKind.DELTA,
        )
        outputs = self.engine.generate({"prompt_token_ids": list(prompt)}, params, uuid4().hex)
        answers = [
            _VllmAnswer(AnswerText(Detokenizer(self.decode, self.special), sampling.stop)) for _ in range(params.n)
        ]
        try:
            async with aclosing(outputs):
                while not all(answer.finished for answer in answers):
                    output = await self._next(outputs)
                    deltas = [delta for new in output.outputs if (delta := answers[new.index].delta(new))]
                    if deltas:
                        yield [replace(delta, index=delta.index + i) for delta in deltas for i in range(copies)]
        except GenerationError:
            raise
        except Exception as error:  # the request was checked before, so the engine is closed or has failed
            if self.closed:
                raise Closing from error
            raise GenerationError("vLLM could not go on; see the server's log") from error

    async def _next(self, outputs: AsyncGenerator[Any, None]) -> Any:
        """vLLM's next output.

        Raises:
            Closing, TimeoutError: the engine is closed, or is closed before it comes.
        """
        if self.closed:
            raise Closing
        async with asyncio.timeout(None) as wait:
            self.waits.add(wait)
            try:
                return await anext(outputs)
            finally:
                self.waits.discard(wait)


@dataclass
class _VllmAnswer:
    """An answer that vLLM is drawing."""

    text: AnswerText
    finished: bool = False

    def delta(self, new: Any) -> Delta | None:
        """The new piece; None if a stop string that vLLM does not see has ended the answer already."""
        if self.finished:
            return None
        reasons: dict[str | None, Finish | None] = {None: None, "stop": "stop", "length": "length"}
        if new.finish_reason not in reasons:
            raise GenerationError(f"vLLM ended an answer: {new.finish_reason}")
        finish = reasons[new.finish_reason]
        text, stopped = self.text.push(new.token_ids, last=finish is not None)
        self.finished = stopped or finish is not None
        return Delta(new.index, text, len(new.token_ids), "stop" if stopped else finish)
