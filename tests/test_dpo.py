"""DPO: the tokens it compares, its loss and gradient by hand, and what the stage leaves behind."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import tiny
from dpalign.recipe import Recipe
from dpalign.rows import PAIRS as SCHEMA
from dpalign.rows import write_rows
from dpalign.runs.folder import Tally
from dpalign.runs.ledger import SCRATCH
from dpalign.stages.dpo import dpo
from dpalign.stages.stage import Job
from dpalign.train.dpo import by_length, dpo_trainer, tokenize_pairs
from dpalign.train.knobs import Training
from dpalign.train.sft import IGNORED, tokenize
from tiny import changed, same
from trainings import PAIRS, PLAIN_FOLDER, SMALL, Update, context, load, one_update, run

BETA = 0.25
ONE_RATE = changed(SMALL, schedule="constant")


def margins(model: PreTrainedModel, tokens: PreTrainedTokenizerBase) -> torch.Tensor:
    """log p(chosen) - log p(rejected) of each pair, by one forward a side without padding."""
    each = []
    for row in PAIRS:
        sides = [{"messages": row["messages"], "response": row[side]} for side in ("chosen", "rejected")]
        chosen, rejected = tokenize(sides, tokens, Training(loss_on="answer"))
        logps = []
        for side in (chosen, rejected):
            logits = model(torch.tensor([side["input_ids"]]), use_cache=False).logits[0, :-1]
            labels = torch.tensor(side["labels"][1:])
            trained = labels != IGNORED
            logps.append(logits.log_softmax(-1)[trained].gather(1, labels[trained, None]).sum())
        each.append(logps[0] - logps[1])
    return torch.stack(each)


# What is compared


@pytest.mark.parametrize("style", ["zephyr", "world-v1"])
def test_both_answers_are_the_tokens_that_sft_trains_on(style: Any) -> None:
    """One beginning, the answer's own end of text, and nothing of what the template writes after it."""
    tokens = tiny.tokenizer(style)
    for row, given in zip(tokenize_pairs(PAIRS, tokens), PAIRS, strict=True):
        asked = tokens.apply_chat_template(given["messages"], add_generation_prompt=True, return_dict=False)
        assert row["prompt_ids"] == asked
        for side in ("chosen", "rejected"):
            conversation = {"messages": given["messages"], "response": given[side]}
            (sft,) = tokenize([conversation], tokens, Training(loss_on="answer"))
            assert row[f"{side}_ids"] == [label for label in sft["labels"] if label != IGNORED]
            assert row["prompt_ids"] + row[f"{side}_ids"] == sft["input_ids"]
            assert row[f"{side}_ids"].count(tokens.eos_token_id) == 1
            assert tokens.decode(row[f"{side}_ids"]) == f"{given[side]}</s>"


def updated(folder: Path, training: Training, scratch: Path, beta: float = BETA) -> Update:
    how = context(scratch / "model", training, folder)
    rows = Dataset.from_list([dict(row) for row in by_length(PAIRS, how.tokenizer)])
    return one_update(folder, lambda model: dpo_trainer(model, rows, beta, how))


def test_the_model_is_fed_those_tokens_and_trained_on_the_answers_alone(
    tiny_folder: Path, tokens: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    forwards = updated(tiny_folder, changed(ONE_RATE, steps=1), tmp_path).forwards
    fed, trained = [], []
    for given in forwards:
        for ids, mask, labels in zip(given["input_ids"], given["attention_mask"], given["labels"], strict=True):
            fed.append(ids[mask == 1].tolist())
            trained.append(labels[labels != IGNORED].tolist())
    wanted = list(tokenize_pairs(PAIRS, tokens))
    sides = ("chosen_ids", "rejected_ids")
    assert sorted(fed) == sorted(row["prompt_ids"] + row[side] for row in wanted for side in sides)
    assert sorted(trained) == sorted(row[side] for row in wanted for side in sides)
    assert len(forwards) == 2
    assert all(given["use_cache"] is False for given in forwards)


# The loss


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_the_first_update_is_the_papers_by_hand_however_the_batch_is_cut(
    tiny_folder: Path, tokens: PreTrainedTokenizerBase, tmp_path: Path, micro_batch: int
) -> None:
    """The policy is its reference: the loss is log 2, and its gradient -beta / 2 of the mean margin's."""
    beta, once = 0.01, changed(ONE_RATE, steps=1, micro_batch=micro_batch)
    update = updated(tiny_folder, once, tmp_path, beta)
    assert update.loss == pytest.approx(math.log(2), abs=1e-6)
    model = load(tiny_folder)
    (-beta / 2 * margins(model, tokens).mean()).backward()
    wanted = {name: weight.grad for name, weight in model.named_parameters()}
    assert 0.01 < torch.stack([gradient.norm() for gradient in wanted.values()]).norm() < 1.0  # else it is clipped
    assert all(same(update.gradients[name], wanted[name], within=1e-6) for name in wanted)
    assert max(gradient.abs().max() for gradient in wanted.values()) > 1e-3


def test_the_reference_stays_the_model_that_training_started_from(
    tiny_folder: Path, tokens: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The mean loss of two updates on all pairs: log 2, then -log sigmoid(beta x what the margins have gained)."""
    run("dpo", tiny_folder, tmp_path / "one", changed(ONE_RATE, steps=1))
    with torch.inference_mode():
        gained = margins(load(tmp_path / "one"), tokens) - margins(load(tiny_folder), tokens)
    second = -torch.nn.functional.logsigmoid(BETA * gained).mean().item()
    assert second < math.log(2) - 0.05
    outcome = run("dpo", tiny_folder, tmp_path / "two", changed(ONE_RATE, steps=2))
    assert outcome.loss == pytest.approx((math.log(2) + second) / 2, abs=1e-5)


@pytest.mark.parametrize("change", [{}, {"optimizer": "rmsprop"}, {"lora_rank": 2, "learning_rate": 1e-2}])
def test_the_chosen_answers_gain_on_the_rejected_ones(
    tiny_folder: Path, tokens: PreTrainedTokenizerBase, tmp_path: Path, change: dict[str, Any]
) -> None:
    run("dpo", tiny_folder, tmp_path / "model", changed(ONE_RATE, **change))
    with torch.inference_mode():
        gained = margins(load(tmp_path / "model"), tokens) - margins(load(tiny_folder), tokens)
    assert bool((gained > 0).all())
    assert gained.mean() > 2.0


def test_the_optimizer_is_the_recipes(tiny_folder: Path, tmp_path: Path) -> None:
    assert Recipe(name="test").dpo.training.optimizer == "rmsprop"
    for name, optimizer in (("adamw", torch.optim.AdamW), ("rmsprop", torch.optim.RMSprop)):
        training = changed(ONE_RATE, steps=1, optimizer=name)
        assert updated(tiny_folder, training, tmp_path / name).optimizer is optimizer


@pytest.mark.parametrize("change", [{"packing": True}, {"loss_on": "text"}])
def test_packed_rows_and_a_loss_on_prompts_are_refused(
    tiny_folder: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r'needs packing = false and loss_on = "answer", not (true|false and "text")'):
        run("dpo", tiny_folder, tmp_path / "model", changed(SMALL, **change))


# The stage


def stage(folder: Path, start: Path, training: Training) -> Job:
    """The stage's job, on a pairs folder."""
    write_rows(folder / "pairs" / "part-00000.parquet", PAIRS, SCHEMA)
    base = Recipe(name="test")
    recipe = changed(
        base, dpo=changed(base.dpo, training=training), model=changed(base.model, chat="world-v1", dtype="float32")
    )
    (folder / "dpo").mkdir()
    work: Any = SimpleNamespace(folder=folder / "dpo", resume=folder / "dpo" / "resume", tally=Tally())
    return Job(recipe, work, {"start": start, "pairs": folder / "pairs"})


def test_the_stage_leaves_a_plain_folder_and_counts_the_tokens_of_both_answers(
    tiny_folder: Path, tokens: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Two updates of four pairs are two passes: each pair's prompt is read twice a pass, and each answer once."""
    work = stage(tmp_path, tiny_folder, changed(SMALL, steps=2))
    dpo.function(work)
    assert {path.name for path in (tmp_path / "dpo").iterdir()} - {*SCRATCH} == {"model", "curve.json"}
    assert {path.name for path in (tmp_path / "dpo" / "model").iterdir()} == PLAIN_FOLDER
    assert json.loads((tmp_path / "dpo" / "curve.json").read_text())["step"] == [1, 2]
    rows = list(tokenize_pairs(PAIRS, tokens))
    once = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    tally = work.work.tally
    assert (tally.rows_in, tally.rows_out, tally.trained) == (4, 4, 2 * once)
    again = AutoTokenizer.from_pretrained(tmp_path / "dpo" / "model")
    plain = again.apply_chat_template(PAIRS[0]["messages"], tokenize=False, add_generation_prompt=True)
    assert plain == "<|user|>explain fox and tea.<|assistant|>"
    assert load(tmp_path / "dpo" / "model").config.use_cache


def test_a_checkpoint_named_in_the_recipe_is_taken_in_place_of_training(tiny_folder: Path, tmp_path: Path) -> None:
    dpo.function(stage(tmp_path, tiny_folder, changed(SMALL, checkpoint="HuggingFaceH4/zephyr-7b-beta")))
    assert (tmp_path / "dpo" / "checkpoint.txt").read_text() == "HuggingFaceH4/zephyr-7b-beta\n"
