"""The reward model: both losses, missing labels, and the stock folder it leaves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    pipeline,
)

import tiny
from dpalign.paper.prompts import render_reward_input
from dpalign.rewards import model as reward_model
from dpalign.rewards.model import collator, fit_head, load_trainable, masked_mse, tokenize_rated
from dpalign.rewards.score import ModelScorer
from dpalign.train.knobs import Training
from tiny import changed
from trainings import HEADS, RATED, SMALL, context, run

NAN = float("nan")
TEXT = changed(SMALL, loss_on="text")


@pytest.fixture(scope="module")
def untied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("untied") / "model", tiny.tokenizer(), tied=False)


def trainable(
    start: Path, tokens: PreTrainedTokenizerBase, scratch: Path, training: Training = TEXT, **own: Any
) -> PreTrainedModel:
    torch.manual_seed(0)
    return load_trainable(context(scratch, training, start, tokens), HEADS, **{"lm_loss": 1.0} | own)


def batch_of(tokens: PreTrainedTokenizerBase) -> tuple[list[dict[str, Any]], Any]:
    """The rated rows as token ids, and the collator."""
    return [dict(row) for row in tokenize_rated(RATED, len(HEADS), "world-v1", tokens)], collator(tokens)


# The loss


@pytest.mark.parametrize(
    ("normalize", "expected"), [("labels", 9 / 3), ("rows", (1 + 4) / 2), ("heads", (2.5 + 4) / 2)]
)
def test_the_three_ways_to_average_squared_errors(normalize: Any, expected: float) -> None:
    """In units of 25 points the errors are 1 and none in the first row, 2 and 2 in the second."""
    reward_BH = torch.tensor([[25.0, 90.0], [0.0, 0.0]])
    target_BH = torch.tensor([[0.0, NAN], [50.0, 50.0]])
    assert masked_mse(reward_BH, target_BH, normalize).item() == pytest.approx(expected)


@pytest.mark.parametrize("normalize", ["labels", "rows", "heads"])
def test_a_missing_label_takes_no_part(normalize: Any) -> None:
    """Neither its prediction nor a row or head without any label moves the loss, and no gradient flows there."""
    target_BH = torch.tensor([[NAN, 40.0, NAN], [NAN, NAN, NAN], [NAN, 60.0, NAN]])
    rewards = [torch.full((3, 3), value) for value in (0.0, 1e6)]
    for reward_BH in rewards:
        reward_BH[0, 1], reward_BH[2, 1] = 50.0, 50.0
        reward_BH.requires_grad_()
    losses = [masked_mse(reward_BH, target_BH, normalize) for reward_BH in rewards]
    assert losses[0].item() == losses[1].item() == pytest.approx(0.16)
    losses[1].backward()
    assert (rewards[1].grad != 0).nonzero().tolist() == [[0, 1], [2, 1]]


@pytest.mark.parametrize("tied", [True, False])
def test_one_forward_has_both_losses(
    tiny_folder: Path, untied_folder: Path, tokens: PreTrainedTokenizerBase, tmp_path: Path, tied: bool
) -> None:
    """The stock classifier's squared error plus lm_loss times the stock language model's cross-entropy."""
    start = tiny_folder if tied else untied_folder
    model = trainable(start, tokens, tmp_path, lm_loss=0.3).eval()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    rows, collate = batch_of(tokens)
    batch = collate(rows)
    with torch.inference_mode():
        both = model(**batch)
        stock = type(model).__mro__[1]
        reward_BH = stock.forward(model, batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        language = AutoModelForCausalLM.from_pretrained(start, dtype="float32").eval()
        cross_entropy = language(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    assert tiny.same(both.logits, reward_BH, within=1e-5)
    expected = masked_mse(reward_BH, batch["targets"], "labels") + 0.3 * cross_entropy
    assert both.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert cross_entropy > 1


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_accumulating_gradients_scales_nothing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora_rank: int
) -> None:
    """One update on four rows at once, and on four times one row: the same loss, the same gradient."""
    monkeypatch.setattr(reward_model, "fit_head", lambda *_: None)
    losses, gradients = [], []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: gradients.append(
            [weight.grad.clone() for group in optimizer.param_groups for weight in group["params"]]
        )
    )
    full = [row for row in RATED if None not in row["labels"]] * 4
    small = [row | {"labels": [0.5, -0.5, 0.25]} for row in full]  # errors so small that nothing is clipped
    try:
        for micro in (4, 1):
            once = changed(TEXT, steps=1, micro_batch=micro, lora_rank=lora_rank)
            losses.append(run("reward", tiny_folder, tmp_path / str(micro) / "m", once, rows=small, lm_loss=0.1).loss)
    finally:
        hook.remove()
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert all(tiny.same(a, b, within=1e-5) for a, b in zip(*gradients, strict=True))
    assert 0.01 < torch.cat([x.flatten() for x in gradients[0]]).norm() < 0.999


def test_the_fitted_head_starts_below_a_random_ones_error(
    tiny_folder: Path, tokens: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """On twelve answers it even comes below the spread of the labels; a head without any label is left alone."""
    rows, collate = batch_of(tokens)
    rows = [row | {"targets": [*row["targets"][:2], NAN]} for row in rows]
    model = trainable(tiny_folder, tokens, tmp_path, lm_loss=0.0).eval()
    before = model.score.weight.clone()
    with torch.inference_mode():
        random = model(**collate(rows)).loss.item()
        fit_head(model, rows, collate)
        fitted = model(**collate(rows)).loss.item()
    labels = np.array([row["targets"][:2] for row in rows])
    spread = np.nanmean((labels - np.nanmean(labels, axis=0)) ** 2) / reward_model.ERROR_UNIT**2
    assert fitted < spread < random
    assert torch.equal(model.score.weight[2], before[2])
    assert not torch.equal(model.score.weight[:2], before[:2])


# What is left


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward") / "model"
    run("reward", tiny_folder, folder, TEXT)
    return folder


def scorer(folder: Path, batch_tokens: int = 4096) -> ModelScorer:
    return ModelScorer(str(folder), template="world-v1", batch_tokens=batch_tokens, dtype="float32")


PAIRS = [(row["messages"], row["response"]) for row in RATED]
TEXTS = [render_reward_input(*pair, "world-v1") for pair in PAIRS]


def test_the_folder_is_the_stock_classifier_with_named_heads(trained: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    assert config["architectures"] == ["MistralForSequenceClassification"]
    assert config["id2label"] == {"0": "helpfulness", "1": "verbosity", "2": "care"}
    assert config["label2id"] == {"helpfulness": 0, "verbosity": 1, "care": 2}
    assert config["problem_type"] == "regression"
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name for path in trained.iterdir()} == names
    model = AutoModelForSequenceClassification.from_pretrained(trained)
    assert type(model).__name__ == "MistralForSequenceClassification"
    assert type(model).__module__.startswith("transformers.")
    assert list(scorer(trained).heads) == list(HEADS)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_stock_classes_give_the_scorers_raw_scores(trained: Path, side: str) -> None:
    expected_NH = scorer(trained).score(PAIRS)
    tokens = AutoTokenizer.from_pretrained(trained, padding_side=side)
    model = AutoModelForSequenceClassification.from_pretrained(trained, dtype="float32").eval()
    with torch.inference_mode():
        stock_NH = model(**tokens(TEXTS, padding=True, return_tensors="pt")).logits.numpy()
    np.testing.assert_allclose(stock_NH, expected_NH, atol=1e-4)
    classify = pipeline("text-classification", model=model, tokenizer=tokens)
    for batch_size in (1, 6):
        told = classify(TEXTS, top_k=None, function_to_apply="none", batch_size=batch_size)
        for row, reward_H in zip(told, expected_NH, strict=True):
            assert {entry["label"]: entry["score"] for entry in row} == pytest.approx(
                dict(zip(HEADS, reward_H.tolist(), strict=True)), abs=1e-4
            )


def test_training_lowers_the_error_on_the_rows_trained_on(tiny_folder: Path, tmp_path: Path, trained: Path) -> None:
    run("reward", tiny_folder, tmp_path / "model", changed(TEXT, steps=60, learning_rate=3e-3))
    label_NH = np.array([[NAN if x is None else x for x in row["labels"]] for row in RATED])
    early, late = (np.nanmean((scorer(f).score(PAIRS) - label_NH) ** 2) for f in (trained, tmp_path / "model"))
    assert late < early / 4


def test_untied_embeddings_keep_their_own_head_while_training_and_drop_it_after(
    untied_folder: Path, tokens: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    head = AutoModelForCausalLM.from_pretrained(untied_folder, dtype="float32").lm_head.weight
    model = trainable(untied_folder, tokens, tmp_path)
    assert torch.equal(model.lm_head.weight, head)
    assert trainable(untied_folder, tokens, tmp_path, lm_loss=0.0).lm_head is None  # nothing to train it with
    run("reward", untied_folder, tmp_path / "model", TEXT)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(stock[1].values())
    assert not any("lm_head" in name for name in stock[0].state_dict())


def test_a_lora_is_trained_with_its_head_in_full_and_merged(tiny_folder: Path, tmp_path: Path) -> None:
    run("reward", tiny_folder, tmp_path / "model", changed(TEXT, lora_rank=2, learning_rate=1e-2))
    model, loading = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(loading.values())
    assert type(model).__name__ == "MistralForSequenceClassification"
    start = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype="float32").state_dict()
    after = model.state_dict()
    moved = {name for name in after if name in start and not torch.equal(after[name], start[name])}
    assert moved == {name for name in after if "_proj" in name}
    label_NH = np.array([[NAN if x is None else x for x in row["labels"]] for row in RATED])
    assert np.nanmean(np.abs(scorer(tmp_path / "model").score(PAIRS) - label_NH)) < 30  # the head was kept


def test_a_row_of_other_heads_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    two = [row | {"labels": row["labels"][:2]} for row in RATED]
    with pytest.raises(ValueError, match=f"prompt {RATED[0]['prompt_id']}: 2 labels for 3 heads"):
        run("reward", tiny_folder, tmp_path / "model", rows=two)


def test_padding_is_not_read(tiny_folder: Path, tokens: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """A batch of its own and one beside a longer row give the same reward and the same next-token loss."""
    rows, collate = batch_of(tokens)
    model = trainable(tiny_folder, tokens, tmp_path, lm_loss=0.0).eval()
    with torch.inference_mode():
        together = model(**collate(rows)).logits
        for i, row in enumerate(rows):
            assert tiny.same(model(**collate([row])).logits[0], together[i], within=1e-5)
        hidden = model.model(**{k: v for k, v in collate(rows[:1]).items() if k != "targets"}).last_hidden_state
        assert tiny.same(F.linear(hidden[0, -1], model.score.weight), together[0], within=1e-5)
