"""How a model without a dial is asked: Zephyr's SFT and DPO as their authors wrote each of their training rows."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from dpalign.chat import PromptStyle, render_chat, styled_template
from dpalign.engines import tokens as engine_tokens
from dpalign.engines.transformers_engine import TransformersEngine
from dpalign.engines.vllm_engine import VllmEngine
from dpalign.pipeline.runner import take
from dpalign.pipeline.steps import STAGES, steps
from dpalign.recipe import Recipe, changed, from_mapping
from dpalign.rows import CANDIDATES, CONVERSATIONS, PAIRS, PROMPTS, Message, prompt_id, read_rows, write_rows
from dpalign.runs.folder import Run
from dpalign.runs.ledger import read_ledger
from dpalign.stages.stage import Step
from dpalign.stages.training import checkpoint_of
from tiny import tokenizer, write_model

HI: list[Message] = [{"role": "user", "content": "hi"}]
CHAT: list[Message] = [
    {"role": "system", "content": "be kind."},
    *HI,
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "why?"},
]
EMPTY = "<|system|>\n</s>\n"
ASKED = "<|user|>\nhi</s>\n<|assistant|>\n"
STYLES: dict[PromptStyle, str] = {"own": "", "zephyr-sft": "<s>" + EMPTY, "zephyr-dpo": EMPTY}
"""What each style writes before the user's turn."""

RECIPE = from_mapping(
    Recipe,
    {
        "name": "test",
        "launcher": "inprocess",
        "rewards": {"own": {"function": "test_prompt_styles:spoken", "heads": ["a", "b"], "scale": [1, 0]}},
        "objectives": {"helpfulness": ["a"], "verbosity": ["b"]},
        "model": {"dtype": "float32"},
        "preference": {"low": -45},
        "sampling": {"max_new_tokens": 4, "prompt_tokens": 100},
        "evaluation": {"directions": 2, "samples": 1, "brevity": "be brief."},
        "dpo": {"training": {"steps": 1, "batch": 1, "context": 128}},
        "finetune": {"steps": 1, "batch": 1, "context": 128, "packing": False},
    },
)


def spoken(prompts: list[str], responses: list[str]) -> list[list[float]]:
    return [[1.0, float(len(response))] for response in responses]


@pytest.fixture(scope="module")
def zephyr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with Zephyr's own template, which writes a system turn for a system message alone."""
    return write_model(tmp_path_factory.mktemp("zephyr"), tokenizer("zephyr"))


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every prompt that an engine reads, in order."""
    read: list[str] = []
    plain = engine_tokens.ids_of

    def remembering(tokens: PreTrainedTokenizerBase, text: str) -> list[int]:
        read.append(text)
        return plain(tokens, text)

    monkeypatch.setattr(engine_tokens, "ids_of", remembering)
    return read


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Takes a stage on one validation prompt, one of D1, and one chosen answer; returns its folder."""
    train: list[Message] = [{"role": "user", "content": "name tea."}]
    rows = [{"prompt_id": prompt_id(p), "messages": p, "split": s} for p, s in ((HI, "validation"), (train, "D1"))]
    write_rows(tmp_path / "data" / "prompts" / "part-00000.parquet", rows, PROMPTS)
    answer = {"prompt_id": prompt_id(train), "messages": train, "response": "tea is hot.", "origin": "sft"}
    write_rows(tmp_path / "data" / "chats" / "part-00000.parquet", [answer], CONVERSATIONS)
    write_rows(tmp_path / "chosen" / "part-00000.parquet", [answer], CONVERSATIONS)
    both = {"prompt_id": prompt_id(train), "messages": train, "chosen": "tea is hot.", "rejected": "no."}
    scores = {"chosen_score": 2.0, "rejected_score": 1.0, "origin": "ratings"}
    write_rows(tmp_path / "pairs" / "part-00000.parquet", [both | scores], PAIRS)

    def taken(name: str, stage: str, recipe: Recipe, condition: str = "", **inputs: Path) -> Path:
        with Run.open(tmp_path / "run", None, {}) as opened:
            take(recipe, opened, Step(name, STAGES[stage], inputs, condition=condition))
        return tmp_path / "run" / name

    return taken


def with_style(checkpoint: Path | str, style: PromptStyle) -> Recipe:
    return changed(RECIPE, {"sft.checkpoint": str(checkpoint), "sft.prompt": style})


@pytest.mark.parametrize("style", ["zephyr-sft", "zephyr-dpo"])
def test_zephyr_s_training_rows_character_by_character(style: PromptStyle) -> None:
    """The handbook puts an empty system message into every row without one; its packed SFT has BOS before each chat."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    template, bos = styled_template(style, "<s>", "</s>"), "<s>" if style == "zephyr-sft" else ""
    rest = "yo</s>\n<|user|>\nwhy?</s>\n<|assistant|>\n"
    golden = {
        f"{bos}{EMPTY}{ASKED}": HI,
        f"{bos}<|system|>\nbe kind.</s>\n{ASKED}{rest}": CHAT,
        f"{bos}{EMPTY}{ASKED}{rest}": CHAT[1:],
    }
    for text, messages in golden.items():
        written, _ = utils.render_jinja_template([messages], chat_template=template, add_generation_prompt=True)
        rendered = render_chat(messages, "zephyr", empty_system=True, bos=bos, add_generation_prompt=True)
        assert written[0] == rendered == text


def test_a_style_is_one_of_zephyr_s_and_sft_s_needs_a_bos() -> None:
    with pytest.raises(ValueError, match=r"'zephyr-sft'.*bos_token is None"):
        styled_template("zephyr-sft", None, "</s>")
    for name in ("sft", "dpo"):
        with pytest.raises(ValueError, match=rf'{name}\.prompt is "zephyr-dpo".*model\.chat is "world-v1"'):
            changed(RECIPE, {"model.chat": "world-v1", f"{name}.prompt": "zephyr-dpo"})


@pytest.mark.parametrize("style", list(STYLES))
def test_both_engines_read_a_named_checkpoint_in_the_style_that_its_stage_keeps(
    style: PromptStyle, zephyr: Path, run: Callable[..., Path], tmp_path: Path
) -> None:
    found = checkpoint_of(run("sft", "sft", with_style(zephyr, style), data=tmp_path / "data"))
    assert (found.source, found.style) == (str(zephyr), style)
    vllm: Any = SimpleNamespace(folder=found.source, close=None, trust_remote_code=False)
    readers = (
        TransformersEngine(found.source, None, found.style, rows=1).reader,
        VllmEngine(vllm, None, found.style).reader,
    )
    ids = [reader.prompt_ids(HI) for reader in readers]
    assert ids[0] == ids[1]
    tokens = readers[0].tokenizer
    assert ids[0] == engine_tokens.ids_of(tokens, STYLES[style] + ASKED)
    assert ids[0].count(tokens.bos_token_id) == (style == "zephyr-sft")


def test_sft_and_dpo_of_zephyr_are_evaluated_and_asked_to_be_brief_in_their_own_form(
    zephyr: Path, run: Callable[..., Path], tmp_path: Path, texts: list[str]
) -> None:
    recipe = changed(with_style(zephyr, "zephyr-sft"), {"evaluation.dpo": str(zephyr), "dpo.prompt": "zephyr-dpo"})
    inputs = {"data": tmp_path / "data", "reward": tmp_path}
    sft = run("sft", "sft", recipe, data=inputs["data"])

    def asked(stage: str, condition: str, policy: Path | None) -> Sequence[str]:
        """Prompts are measured, and then read."""
        texts.clear()
        name = f"evaluate-{len(list(tmp_path.glob('run/evaluate-*')))}"
        given = inputs | ({"policy": policy} if policy else {})
        folder = run(name, stage, recipe, condition, **given)
        rows = read_rows(folder / "answers", CANDIDATES)
        assert {row["messages"][-1]["content"] for row in rows} == {"hi"}
        (knob,) = {read_ledger(folder)["knobs"].get("dpo.prompt", "zephyr-dpo")}
        assert knob == "zephyr-dpo"
        return list(dict.fromkeys(texts))

    plain = f"<s>{EMPTY}{ASKED}"
    assert asked("evaluate", "plain", sft) == asked("best_of_n", "best-of-n", sft) == [plain]
    assert asked("evaluate", "brief", sft) == [plain, f"<s><|system|>\nbe brief.</s>\n{ASKED}"]
    assert asked("evaluate", "plain", None) == [EMPTY + ASKED]


def test_what_learns_from_sft_without_a_dial_keeps_its_form_and_a_policy_with_one_its_own(
    zephyr: Path, run: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = changed(with_style(zephyr, "zephyr-sft"), {"dpo.prompt": "zephyr-dpo"})
    sft = run("sft", "sft", recipe, data=tmp_path / "data")
    trained = {
        "dpo": run("dpo-1", "dpo", recipe, start=sft, pairs=tmp_path / "pairs"),
        "specialist": run("rsf-1", "specialist", recipe, start=sft, chosen=tmp_path / "chosen"),
        "finetune": run("policy-1", "finetune", recipe, start=sft, chosen=tmp_path / "chosen"),
    }
    written = {}
    for name, folder in trained.items():
        found = checkpoint_of(folder)
        assert found.style == "own"  # its folder's chat template has it
        written[name] = engine_tokens.chat_text(engine_tokens.PromptReader.load(found.source).tokenizer, HI)
    assert written == {"dpo": EMPTY + ASKED, "specialist": f"<s>{EMPTY}{ASKED}", "finetune": ASKED}


def test_sft_that_the_run_trains_keeps_the_recipes_form(zephyr: Path, run: Callable[..., Path], tmp_path: Path) -> None:
    small = {"model.base": str(zephyr), "sft": {"steps": 1, "batch": 1, "context": 128, "packing": False}}
    own = checkpoint_of(run("sft", "sft", changed(RECIPE, small), data=tmp_path / "data"))
    assert engine_tokens.chat_text(engine_tokens.PromptReader.load(own.source).tokenizer, HI) == ASKED


def test_a_style_that_is_none_is_refused_by_file(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.txt").write_text("some/model\n")
    (tmp_path / "prompt.txt").write_text("zephir\n")
    with pytest.raises(ValueError, match=r"prompt\.txt: 'zephir' is no prompt style"):
        checkpoint_of(tmp_path)


def test_tuning_asks_as_evaluation_does() -> None:
    """A system's form lies in the folder of its model, which both read."""
    planned = {step.name: step for step in steps(changed(Recipe(name="x"), {"data.tuning": 0.02}), compared=True)}
    for name in ("dpo-1", "dpo-1-brief"):
        assert planned[f"tune-{name}"].inputs["policy"] == planned[f"evaluate-{name}"].inputs["policy"] == "dpo-1"
