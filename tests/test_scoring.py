"""Scoring: the order of the answers, the make-up of the batches, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    MistralForSequenceClassification,
)

from dpalign.engines.memory import halvings
from dpalign.recipe import Recipe, changed
from dpalign.rewards.inputs import TooLong
from dpalign.rewards.score import FunctionScorer, ModelScorer
from dpalign.rows import user_prompt
from dpalign.stages.score import model_scorer, open_scorer, scored_rows

HEADS = ("helpfulness", "verbosity")
WORDS = ("fox", "is", "red.", "tea", "hot", "and", "owl", "wise.", "rain", "wet.")


def write_classifier(start: Path, folder: Path, **changes: Any) -> Path:
    """A random sequence classifier of two heads, its configuration changed."""
    config = AutoConfig.from_pretrained(start)
    config.update({"num_labels": 2, "id2label": dict(enumerate(HEADS)), "problem_type": "regression"} | changes)
    torch.manual_seed(0)
    MistralForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(start).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tiny_folder, tmp_path_factory.mktemp("classifier") / "model")


def scorer(folder: Path, batch_tokens: int = 4096, share_prefix: bool = True) -> ModelScorer:
    return ModelScorer(
        str(folder), template="world-v1", batch_tokens=batch_tokens, dtype="float32", share_prefix=share_prefix
    )


def pairs(count: int = 23) -> list[Any]:
    """Answers of 1 to 40 words, in no order of length."""
    rng = np.random.default_rng(0)
    return [(user_prompt("name fox."), " ".join(rng.choice(WORDS, size=rng.integers(1, 41)))) for _ in range(count)]


@pytest.mark.parametrize("batch_tokens", [1, 60, 300, 100_000])
def test_rewards_come_in_the_order_of_the_answers_whatever_the_batches(folder: Path, batch_tokens: int) -> None:
    """Each equals the reward of the answer scored alone: neither padding nor sorting shows."""
    asked = pairs()
    one_by_one_NH = np.concatenate([scorer(folder).score([pair]) for pair in asked])
    assert len(np.unique(one_by_one_NH[:, 0].round(4))) > 15  # the answers differ: a wrong order would show
    np.testing.assert_allclose(scorer(folder, batch_tokens).score(asked), one_by_one_NH, atol=1e-5)


@pytest.mark.parametrize("share", [True, False])
def test_no_forward_holds_more_tokens_than_allowed(folder: Path, share: bool) -> None:
    """Padding included; an answer longer than that goes alone. A shared prompt is read once, and nothing is padded."""
    model = scorer(folder, batch_tokens=100, share_prefix=share)
    shapes = []
    model.model.model.register_forward_pre_hook(
        lambda _, given, named: shapes.append((given[0] if given else named["input_ids"]).shape), with_kwargs=True
    )
    model.score(pairs())
    assert all(rows * width <= 100 for rows, width in shapes if rows > 1 or share)
    assert 1 < len(shapes) < 23
    if not share:
        assert sum(rows for rows, _ in shapes) == 23


@pytest.mark.parametrize("share", [True, False])
def test_out_of_memory_the_forwards_are_halved_and_each_reward_is_its_answers_own(
    folder: Path, caplog: pytest.LogCaptureFixture, share: bool
) -> None:
    """Room for 250 tokens of a forward: 700 go to 350 and 175."""
    asked = pairs()
    whole_NH = scorer(folder, share_prefix=share).score(asked)
    model = scorer(folder, batch_tokens=700, share_prefix=share)

    def require_memory(_: object, given: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
        if (given[0] if given else named["input_ids"]).numel() > 250:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory")

    model.model.model.register_forward_pre_hook(require_memory, with_kwargs=True)
    before = halvings()
    np.testing.assert_allclose(model.score(asked), whole_NH, atol=1e-5)
    assert (model.batch_tokens, halvings() - before) == (175, 2)
    assert sum("out of memory" in message for message in caplog.messages) == 2


@pytest.mark.parametrize("share", [True, False])
def test_a_bfloat16_model_scores_finer_than_bfloat16(tiny_folder: Path, tmp_path: Path, share: bool) -> None:
    """Between 64 and 128 bfloat16 knows halves alone; the head and its product are float32, whatever the rest is."""
    folder = write_classifier(tiny_folder, tmp_path / "model")
    model = MistralForSequenceClassification.from_pretrained(folder)
    hidden_D = model.model(torch.tensor([[5]])).last_hidden_state[0, -1].detach()
    with torch.no_grad():
        model.score.weight.copy_(model.score.weight + 90 * hidden_D / hidden_D.square().sum())
    model.save_pretrained(folder)
    loading = {"template": "world-v1", "batch_tokens": 4096, "share_prefix": share}
    halved = ModelScorer(str(folder), dtype="bfloat16", **loading)  # type: ignore[arg-type]
    whole = ModelScorer(str(folder), dtype="float32", **loading)  # type: ignore[arg-type]
    assert halved.shares == share
    found_NH, exact_NH = halved.score(pairs()), whole.score(pairs())
    high = np.abs(found_NH) >= 16  # where bfloat16 knows eighths at best
    assert high.sum() > 10
    assert (found_NH[high] * 8 % 1 != 0).mean() > 0.9
    np.testing.assert_allclose(found_NH, exact_NH, atol=0.02 * np.abs(exact_NH).max())


def test_scores_carry_the_names_of_their_answers(folder: Path) -> None:
    candidates = [
        {"prompt_id": f"p{i // 2}", "t": 1, "condition_index": i, "sample": 0, "messages": m, "response": r}
        for i, (m, r) in enumerate(pairs(4))
    ]
    rows = scored_rows(scorer(folder), candidates)
    assert [(row["prompt_id"], row["condition_index"]) for row in rows] == [("p0", 0), ("p0", 1), ("p1", 2), ("p1", 3)]
    expected_NH = scorer(folder).score(pairs(4))
    np.testing.assert_allclose([row["rewards"] for row in rows], expected_NH, atol=1e-6)


def test_a_score_that_is_no_number_shows_its_answer(folder: Path) -> None:
    broken = scorer(folder)
    assert broken.score([]).shape == (0, 2)
    with torch.no_grad():
        broken.model.score.weight[1, 0] = torch.nan
    with pytest.raises(ValueError, match=r"head 1 scored nan on answer 0 of 3") as error:
        broken.score(pairs(3))
    assert str(folder) in str(error.value)
    assert repr(pairs(3)[0][1][:80]) in str(error.value)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("pad", ["none", "eos", "unk"])
def test_scores_are_those_of_transformers_whatever_the_pad_token(
    tiny_folder: Path, tmp_path: Path, pad: str, share: bool
) -> None:
    """It reads a score at the last token that is no pad token. Where that ends a text, it is the one before."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    ids = {"none": None, "eos": tokenizer.eos_token_id, "unk": tokenizer.unk_token_id}
    write_classifier(tiny_folder, tmp_path / "model", pad_token_id=ids[pad])
    tokenizer.chat_template = "{{ messages[0].content }} {{ messages[1].content }}{{ eos_token }}"
    tokenizer.save_pretrained(tmp_path / "model")
    scores_NH = ModelScorer(
        str(tmp_path / "model"), template="chat", batch_tokens=100, dtype="float32", share_prefix=share
    ).score(pairs(9))
    model = MistralForSequenceClassification.from_pretrained(tmp_path / "model")
    rows = [tokenizer(f"name fox. {answer}{tokenizer.eos_token}", return_tensors="pt")["input_ids"]
            for _, answer in pairs(9)]  # fmt: skip
    with torch.no_grad():
        expected_NH = torch.cat([model(input_ids=row).logits for row in rows])
    np.testing.assert_allclose(scores_NH, expected_NH, atol=1e-5)


def test_an_encoder_sees_no_padding(tokens: Any, tmp_path: Path) -> None:
    """A classifier that looks both ways and reads its score at the first token."""
    config = BertConfig(
        vocab_size=len(tokens), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=128, num_labels=1, pad_token_id=tokens.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "encoder")
    tokens.save_pretrained(tmp_path / "encoder")
    loaded = ModelScorer(str(tmp_path / "encoder"), template="world-v1", batch_tokens=4096, dtype="float32")
    one_by_one_NH = np.concatenate([loaded.score([pair]) for pair in pairs(9)])
    assert not loaded.shares
    np.testing.assert_allclose(loaded.score(pairs(9)), one_by_one_NH, atol=1e-5)


def test_an_answer_beyond_the_models_context_is_refused_and_shown(folder: Path) -> None:
    with pytest.raises(TooLong, match=r"answer 1 of 2 and its prompt are \d+ tokens long, .* room for 256: 'red red"):
        scorer(folder).score([(user_prompt("name fox."), "red"), (user_prompt("name fox."), "red " * 300)])


def lengths(prompts: list[str], responses: list[str]) -> list[list[float]]:
    """A reward function: the lengths of answer and prompt."""
    return [[len(response), len(prompt)] for prompt, response in zip(prompts, responses, strict=True)]


def only_one_head(prompts: list[str], responses: list[str]) -> list[float]:
    return [0.0 for _ in prompts]


def no_number(prompts: list[str], responses: list[str]) -> list[list[float]]:
    return [[1.0, 2.0], *[[1.0, float("inf")] for _ in prompts[1:]]]


def test_a_python_function_is_a_scorer() -> None:
    asked = [(user_prompt("why?"), "so."), (user_prompt("how come?"), "because.")]
    given = FunctionScorer("test_scoring:lengths", HEADS)
    assert given.heads == HEADS
    assert given.score(asked).tolist() == [[3.0, 4.0], [8.0, 9.0]]


def test_a_function_of_another_shape_or_without_numbers_is_refused() -> None:
    asked = pairs(3)
    with pytest.raises(ValueError, match=r"test_scoring:only_one_head: .*\(3,\) .* 2 heads"):
        FunctionScorer("test_scoring:only_one_head", HEADS).score(asked)
    with pytest.raises(ValueError, match="test_scoring:no_number: head 1 scored inf on answer 1 of 3"):
        FunctionScorer("test_scoring:no_number", HEADS).score(asked)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("no_such_module:rate", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("test_scoring:rate", "AttributeError: module 'test_scoring' has no attribute 'rate'"),
        ("test_scoring:HEADS", "is a tuple"),
    ],
)
def test_a_function_that_is_not_there_is_told_by_its_name(source: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"function {source}: {reason}"):
        FunctionScorer(source, HEADS)


def test_a_stage_without_weights_is_refused_and_a_named_checkpoint_taken(folder: Path, tmp_path: Path) -> None:
    objectives = {head: (head,) for head in HEADS}
    knobs = {"heads": HEADS, "objectives": objectives, "reward.template": "world-v1", "model.dtype": "float32"}
    recipe = changed(Recipe(name="test"), knobs)
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="holds no weights") as error:
        model_scorer(recipe, tmp_path)
    assert str(tmp_path / "model") in str(error.value)
    given = {"model": str(folder), "input": "world-v1"}
    named = changed(recipe, {"rewards": {"given": given}})
    assert list(open_scorer(named, tmp_path).heads) == ["given/helpfulness", "given/verbosity"]
    assert open_scorer(recipe, folder.parent).score(pairs(2)).shape == (2, 2)
