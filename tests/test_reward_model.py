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
from dpalign.engines.tokens import spare_token
from dpalign.paper.prompts import render_reward_input
from dpalign.rewards import model as reward_model
from dpalign.rewards.model import (
    BradleyTerry,
    add_losses,
    collator,
    fit_head,
    load_classifier,
    masked_mse,
    paired,
    preference_loss,
    probe_reward_model,
    tokenize_rated,
)
from dpalign.rewards.score import ModelScorer
from dpalign.stages.reward import Reward
from dpalign.train.knobs import Training
from tiny import changed
from trainings import HEADS, RATED, SMALL, context, rated, run
from trainings import PAIRS as PREFERENCES

NAN = float("nan")
TEXT = changed(SMALL, loss_on="text")


@pytest.fixture(scope="module")
def untied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("untied") / "model", tiny.tokenizer(), tied=False)


def trainable(
    start: Path, tokens: PreTrainedTokenizerBase, scratch: Path, training: Training = TEXT, **own: Any
) -> PreTrainedModel:
    torch.manual_seed(0)
    how = context(scratch, training, start, tokens)
    model = load_classifier(how, HEADS)
    add_losses(model, how, **{"lm_loss": 1.0} | own)
    return model


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
    torch.manual_seed(0)
    model = load_classifier(context(tmp_path, TEXT, tiny_folder, tokens), HEADS).eval()
    before = model.score.weight.clone()

    def loss() -> float:
        batch = collate(rows)
        reward_BH = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return masked_mse(reward_BH, batch["targets"], "labels").item()

    with torch.inference_mode():
        random = loss()
        fit_head(model, rows, collate)
        fitted = loss()
    labels = np.array([row["targets"][:2] for row in rows])
    spread = np.nanmean((labels - np.nanmean(labels, axis=0)) ** 2) / reward_model.ERROR_UNIT**2
    assert fitted < spread < random
    assert torch.equal(model.score.weight[2], before[2])
    assert not torch.equal(model.score.weight[:2], before[:2])


# A preference beside the regression


def test_the_preference_term_by_hand() -> None:
    """Leads of 25 and -50 points are 1 and -2 units: log(1 + 1/e) = 0.3133 and log(1 + e^2) = 2.1269."""
    score_B = torch.tensor([75.0, 10.0, 99.0, 50.0, 60.0])
    beaten_B = torch.tensor([3, 4, -1, -1, -1])
    assert preference_loss(score_B, beaten_B).item() == pytest.approx((0.3133 + 2.1269) / 2, abs=1e-4)
    assert preference_loss(score_B, torch.full((5,), -1)).item() == 0


def test_rated_answers_pair_the_best_with_the_worst_and_none_twice(tokens: PreTrainedTokenizerBase) -> None:
    labels = [("a", 30.0), ("a", 90.0), ("a", 10.0), ("a", 50.0), ("b", 50.0), ("b", 50.0), ("c", NAN)]
    rows = [
        {"input_ids": [n], "targets": [label, 0.0], "prompt_id": prompt} for n, (prompt, label) in enumerate(labels)
    ]
    units = [(row["input_ids"][0], *row["beaten_ids"]) for row in paired(rows, (0,))]
    assert sorted(units) == [(1, 2), (3, 0), (4,), (5,), (6,)]
    batch = collator(tokens)(paired(rows, (0,)))
    first = {ids: place for place, ids in enumerate(batch["input_ids"][:, 0].tolist())}
    beaten = {ids: batch["beaten"][place].item() for ids, place in first.items()}
    assert beaten == {1: first[2], 3: first[0]} | dict.fromkeys((0, 2, 4, 5, 6), -1)
    assert batch["targets"][first[2]].tolist() == [10.0, 0.0]


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_preference_is_learned_and_leaves_a_stock_folder_of_the_same_heads(
    tiny_folder: Path, tmp_path: Path, lora_rank: int
) -> None:
    """Its head is not in the folder. No rated answers make a pair here: all pairs are the data's own."""
    training = changed(TEXT, steps=30, learning_rate=1e-2, lora_rank=lora_rank)
    alone = [rated(f"name {thing}.", f"{thing} is red.", 50.0, 50.0, 50.0) for thing in ("fox", "tea", "owl")]
    own = {"rows": alone, "lm_loss": 0.0}
    without = run("reward", tiny_folder, tmp_path / "without" / "model", training, **own)
    beside = run(
        "reward", tiny_folder, tmp_path / "with" / "model", training,
        preference=BradleyTerry(1.0, (0,), PREFERENCES), **own,
    )  # fmt: skip
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "with" / "model", output_loading_info=True
    )
    assert not any(loading.values())
    assert model.score.weight.shape == (len(HEADS), 32)
    assert model.config.num_labels == len(HEADS)
    assert beside.rows == without.rows + len(PREFERENCES)
    first, last = beside.curve["loss"][0], np.mean(beside.curve["loss"][-4:])
    assert last < first / 3  # from about log 2 a pair


def test_a_preference_without_pairs_or_with_a_frozen_backbone_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    alone = [row for row in RATED if row["prompt_id"] == RATED[2]["prompt_id"]]
    with pytest.raises(ValueError, match=r"bradley_terry is above 0, and there is no pair to learn from"):
        run("reward", tiny_folder, tmp_path / "model", rows=alone, preference=BradleyTerry(1.0, (0,)))
    with pytest.raises(ValueError, match=r"bradley_terry is 0\.5 and freeze is true"):
        Reward(bradley_terry=0.5, freeze=True)


# A probe


def probe(start: Path, folder: Path, **own: Any) -> Any:
    return probe_reward_model(context(folder, TEXT, start), RATED, HEADS, template="world-v1", **own)


def test_a_probe_moves_the_heads_alone(tiny_folder: Path, tmp_path: Path) -> None:
    outcome = probe(tiny_folder, tmp_path / "model")
    model, loading = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(loading.values())
    assert type(model).__module__.startswith("transformers.")
    start = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype="float32").state_dict()
    assert all(torch.equal(x, start[name]) for name, x in model.state_dict().items() if name != "score.weight")
    label_NH = np.array([[NAN if x is None else x for x in row["labels"]] for row in RATED])
    error = np.nanmean((scorer(tmp_path / "model").score(PAIRS) - label_NH) ** 2)
    assert error < np.nanvar(label_NH)
    assert outcome.loss > error / reward_model.ERROR_UNIT**2  # that one is of prompts not seen
    assert (outcome.rows, outcome.updates, outcome.tokens) == (len(RATED), 0, 0)


def test_a_probe_that_was_killed_reads_on_where_it_was(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_model, "BLOCK", 2)
    probe(tiny_folder, tmp_path / "whole" / "model")
    read = reward_model.score_shared
    blocks: list[int] = []

    def until(last: int) -> Any:
        def one_more(model: Any, rows: Any, *more: Any) -> Any:
            blocks.append(len(rows))
            if len(blocks) == last:
                raise KeyboardInterrupt
            return read(model, rows, *more)

        return one_more

    monkeypatch.setattr(reward_model, "score_shared", until(3))
    with pytest.raises(KeyboardInterrupt):
        probe(tiny_folder, tmp_path / "killed" / "model")
    assert len(list((tmp_path / "killed" / "resume").glob("hidden-*.npy"))) == 2
    monkeypatch.setattr(reward_model, "score_shared", until(0))
    probe(tiny_folder, tmp_path / "killed" / "model")
    assert blocks == [2, 2, 2, 2]  # the third block again, and none before it
    assert tiny.weights(tmp_path / "killed" / "model") == tiny.weights(tmp_path / "whole" / "model")
    assert not (tmp_path / "killed" / "resume").exists()


def test_a_backbone_without_shared_reading_gives_the_same_heads(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe(tiny_folder, tmp_path / "shared" / "model")
    monkeypatch.setattr(reward_model, "cannot_share", lambda _: "a test says so")
    probe(tiny_folder, tmp_path / "apart" / "model")
    scores = [scorer(tmp_path / name / "model").score(PAIRS) for name in ("shared", "apart")]
    np.testing.assert_allclose(*scores, atol=1e-2)


def test_the_first_layers_alone_are_a_stock_classifier_too(tiny_folder: Path, tmp_path: Path) -> None:
    probe(tiny_folder, tmp_path / "model", layers=1)
    model, loading = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(loading.values())
    assert len(model.model.layers) == model.config.num_hidden_layers == 1
    run("reward", tiny_folder, tmp_path / "trained" / "model", TEXT, layers=1)
    assert scorer(tmp_path / "trained" / "model").score(PAIRS).shape == (len(PAIRS), len(HEADS))
    with pytest.raises(ValueError, match=r"reward\.layers is 3, and .* has 2"):
        probe(tiny_folder, tmp_path / "model", layers=3)


def test_a_pad_token_that_ends_texts_is_replaced(tokens: PreTrainedTokenizerBase) -> None:
    assert spare_token(tokens) not in {tokens.eos_token, tokens.bos_token}
    bare = AutoTokenizer.from_pretrained(tokens.name_or_path) if tokens.name_or_path else tiny.tokenizer()
    bare.unk_token = None
    assert spare_token(bare) not in {None, bare.eos_token, bare.bos_token}


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
    run("reward", tiny_folder, tmp_path / "model", changed(TEXT, steps=120, learning_rate=3e-3))
    label_NH = np.array([[NAN if x is None else x for x in row["labels"]] for row in RATED])
    early, late = (np.nanmean((scorer(f).score(PAIRS) - label_NH) ** 2) for f in (trained, tmp_path / "model"))
    assert late < early / 3


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
