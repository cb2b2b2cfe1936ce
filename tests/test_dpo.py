"""DPO: the tokens it compares, its loss and gradient by hand, resuming, and what is left behind."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from dpalign.train.common import Fitted, RowsByLength, arguments, last_checkpoint
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import tiny
from dpalign.recipe import DPO, Recipe
from dpalign.rows import PAIRS, prompt_id, write_rows
from dpalign.run.folder import Tally
from dpalign.stages.stage import Job
from dpalign.train import common, dpo
from dpalign.train.dpo import longer_side, optimise, tokenize_pairs
from dpalign.train.knobs import Training
from dpalign.train.sft import IGNORED, tokenize
from tiny import chat, same

BETA = 0.25
PAIR = DPO(
    beta=BETA,
    training=Training(
        learning_rate=1e-3,
        warmup_steps=0,
        schedule="constant",
        steps=6,
        batch=4,
        micro_batch=2,
        context=64,
        packing=False,
        loss_on="answer",
        save_every=4,
    ),
)


def pair(question: str, chosen: str, rejected: str, system: str | None = None) -> dict[str, Any]:
    """A row of `records.PAIRS`."""
    messages = chat(question, chosen, system)["messages"]
    row = {"prompt_id": prompt_id(messages), "messages": messages, "chosen": chosen, "rejected": rejected}
    return row | {"chosen_score": 80.0, "rejected_score": 20.0, "origin": "ratings"}


ROWS = [
    pair("explain fox and tea.", "fox is red. tea is hot and helps people wake.", "fox is red."),
    pair("name owl and rain.", "owl is wise.", "owl is wise. rain is wet. rain is wet. rain is wet."),
    pair("explain rain.", "rain is wet.", "that is a good question.", system="be kind"),
    pair("name moon, tea and fox.", "tea is hot. fox is red and hunts mice.", "moon is hot."),
]
"""Four short pairs of unequal length; either side may be the longer."""


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def with_training(**changes: Any) -> DPO:
    return replace(PAIR, training=replace(PAIR.training, **changes))


def tuned(
    start: Path, output: Path, settings: DPO, tokens: PreTrainedTokenizerBase, rows: Sequence[Any] = ROWS
) -> Fitted:
    given = {"tokenizer": tokens, "dtype": "float32", "seed": 1, "resume": output.parent / "resume"}
    return optimise(str(start), rows, output, settings, **given)


def margins(model: PreTrainedModel, tokens: PreTrainedTokenizerBase) -> torch.Tensor:
    """log p(chosen) - log p(rejected) of each pair, by one forward a side without padding."""
    each = []
    for row in ROWS:
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
    for row, given in zip(tokenize_pairs(ROWS, tokens), ROWS, strict=True):
        asked = tokens.apply_chat_template(given["messages"], add_generation_prompt=True, return_dict=False)
        assert row["prompt_ids"] == asked
        for side in ("chosen", "rejected"):
            conversation = {"messages": given["messages"], "response": given[side]}
            (sft,) = tokenize([conversation], tokens, Training(loss_on="answer"))
            assert row[f"{side}_ids"] == [label for label in sft["labels"] if label != IGNORED]
            whole = row["prompt_ids"] + row[f"{side}_ids"]
            assert whole == sft["input_ids"][: len(whole)]
            assert tokens.decode(sft["input_ids"][len(whole) :]).strip(" ") == ("\n" if style == "zephyr" else "")
            assert row[f"{side}_ids"].count(tokens.eos_token_id) == 1
            assert tokens.decode(row[f"{side}_ids"]) == f"{given[side]}</s>"


def one_update(
    folder: Path, settings: DPO, scratch: Path
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], float, type]:
    """The gradients of one update through `fit`, what each training forward was given, the loss and the optimizer."""
    tokens, model = AutoTokenizer.from_pretrained(folder), load(folder)
    gradients: dict[str, torch.Tensor] = {}
    forwards: list[dict[str, Any]] = []
    optimizers: list[type] = []

    def before_step(optimizer: Any, *_: Any) -> None:
        optimizers.append(type(getattr(optimizer, "optimizer", optimizer)))
        gradients.update({name: weight.grad.clone() for name, weight in model.named_parameters()})

    def before_forward(_: Any, __: Any, given: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            forwards.append({name: x.clone() if torch.is_tensor(x) else x for name, x in given.items()})

    forward = model.register_forward_pre_hook(before_forward, with_kwargs=True)
    step = register_optimizer_step_pre_hook(before_step)
    rows = list(tokenize_pairs(ROWS, tokens))
    try:
        run = dpo.fit(model, rows, settings, tokenizer=tokens, dtype="float32", seed=1, resume=scratch)
    finally:
        forward.remove()
        step.remove()
    return gradients, forwards, run.loss, optimizers[-1]


def test_the_model_is_fed_those_tokens_and_trained_on_the_answers_alone(
    tiny_folder: Path, tokens: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    _, forwards, *_ = one_update(tiny_folder, with_training(steps=1), tmp_path)
    fed, trained = [], []
    for given in forwards:
        for ids, mask, labels in zip(given["input_ids"], given["attention_mask"], given["labels"], strict=True):
            fed.append(ids[mask == 1].tolist())
            trained.append(labels[labels != IGNORED].tolist())
    wanted = list(tokenize_pairs(ROWS, tokens))
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
    settings = replace(with_training(steps=1, micro_batch=micro_batch), beta=0.01)
    found, _, loss, _ = one_update(tiny_folder, settings, tmp_path)
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    model = load(tiny_folder)
    (-settings.beta / 2 * margins(model, tokens).mean()).backward()
    wanted = {name: weight.grad for name, weight in model.named_parameters()}
    assert 0.01 < torch.stack([gradient.norm() for gradient in wanted.values()]).norm() < 1.0  # else it is clipped
    assert all(same(found[name], wanted[name], within=1e-6) for name in wanted)
    assert max(gradient.abs().max() for gradient in wanted.values()) > 1e-3


def test_the_reference_stays_the_model_that_training_started_from(
    tiny_folder: Path, tokens: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The mean loss of two updates on all pairs: log 2, then -log sigmoid(beta x what the margins have gained)."""
    tuned(tiny_folder, tmp_path / "one", with_training(steps=1), tokens)
    with torch.inference_mode():
        gained = margins(load(tmp_path / "one"), tokens) - margins(load(tiny_folder), tokens)
    second = -torch.nn.functional.logsigmoid(BETA * gained).mean().item()
    assert second < math.log(2) - 0.05
    run = tuned(tiny_folder, tmp_path / "two", with_training(steps=2), tokens)
    assert run.loss == pytest.approx((math.log(2) + second) / 2, abs=1e-5)


@pytest.mark.parametrize("change", [{}, {"optimizer": "rmsprop"}, {"lora_rank": 2, "learning_rate": 1e-2}])
def test_the_chosen_answers_gain_on_the_rejected_ones(
    tiny_folder: Path, tokens: PreTrainedTokenizerBase, tmp_path: Path, change: dict[str, Any]
) -> None:
    tuned(tiny_folder, tmp_path / "model", with_training(**change), tokens)
    with torch.inference_mode():
        gained = margins(load(tmp_path / "model"), tokens) - margins(load(tiny_folder), tokens)
    assert bool((gained > 0).all())
    assert gained.mean() > 2.0


def test_a_larger_beta_keeps_the_policy_nearer_to_its_reference(
    tiny_folder: Path, tokens: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    moved = {}
    for beta in (0.05, 5.0):
        settings = replace(with_training(steps=15), beta=beta)
        tuned(tiny_folder, tmp_path / f"{beta}", settings, tokens)
        with torch.inference_mode():
            moved[beta] = (margins(load(tmp_path / f"{beta}"), tokens) - margins(load(tiny_folder), tokens)).mean()
    assert moved[5.0] < moved[0.05] / 2


def test_the_optimizer_and_a_share_of_warm_up_are_the_recipes(tiny_folder: Path, tmp_path: Path) -> None:
    *_, optimizer = one_update(tiny_folder, with_training(steps=1), tmp_path / "a")
    assert optimizer is torch.optim.AdamW
    *_, optimizer = one_update(tiny_folder, with_training(steps=1, optimizer="rmsprop"), tmp_path / "b")
    assert optimizer is torch.optim.RMSprop
    assert Recipe("test").dpo.training.optimizer == "rmsprop"
    for warmup, updates in ((20, 20), (0.1, 30), (0, 0)):
        given = arguments(Training(warmup_steps=warmup), seed=0, dtype="float32")
        assert trl.DPOConfig("x", **given).get_warmup_steps(300) == updates


# What is left out, resuming and exporting


def test_pairs_with_a_side_over_the_context_are_left_out_and_counted(
    tiny_folder: Path, tokens: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    lengths = sorted(longer_side(row) for row in tokenize_pairs(ROWS, tokens))
    assert lengths[-2] < lengths[-1] <= PAIR.training.context
    fitted = tuned(tiny_folder, tmp_path / "model", with_training(steps=1, context=lengths[-1] - 1), tokens)
    assert (fitted.rows, fitted.too_long) == (3, 1)
    fitted = tuned(tiny_folder, tmp_path / "model", with_training(steps=1, context=lengths[-1]), tokens)
    assert (fitted.rows, fitted.too_long) == (4, 0)
    with pytest.raises(ValueError, match=r"no pair of 4 fits a context of 5 tokens; raise it"):
        tuned(tiny_folder, tmp_path / "none", with_training(context=5), tokens)


@pytest.mark.parametrize("change", [{"packing": True}, {"loss_on": "text"}])
def test_what_dpo_cannot_do_is_refused(
    tiny_folder: Path, tokens: PreTrainedTokenizerBase, tmp_path: Path, change: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r'needs packing = false and loss_on = "answer", not (true|false and "text")'):
        tuned(tiny_folder, tmp_path / "model", with_training(**change), tokens)


class Stopped(Exception):
    """Stands for a kill."""


MANY = [
    pair(f"explain {a} and {b}.", f"{a} is red. {b} is hot.", f"{a} is red. " * (1 + i % 4))
    for i, (a, b) in enumerate(itertools.permutations(("fox", "tea", "iron", "owl"), 2))
]
"""Twelve pairs: three updates an epoch."""


@pytest.mark.parametrize("change", [{"optimizer": "rmsprop", "schedule": "linear"}, {"lora_rank": 2}])
@pytest.mark.parametrize("kill", [3, 6], ids=["first epoch", "second epoch"])
def test_a_training_cut_off_goes_on_to_the_same_bytes(
    tiny_folder: Path,
    tokens: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    kill: int,
) -> None:
    """Stopped within an epoch, one update after a checkpoint, it goes on from there with the same reference."""
    settings = with_training(steps=7, save_every=kill - 1, **change)
    unbroken = tuned(tiny_folder, tmp_path / "unbroken" / "model", settings, tokens, MANY)

    def stop(_: Any, __: Any, state: Any, *___: Any, **____: Any) -> None:
        if state.global_step == kill:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(common.ProgressCallback, "on_step_end", stop)
        with pytest.raises(Stopped):
            tuned(tiny_folder, tmp_path / "broken" / "model", settings, tokens, MANY)
    scratch = tmp_path / "broken" / "resume"
    assert not (tmp_path / "broken" / "model").exists()
    assert last_checkpoint(scratch) == str(scratch / f"checkpoint-{kill - 1}")

    steps = []
    monkeypatch.setattr(
        common.ProgressCallback, "on_step_end", lambda _, __, state, *___, **____: steps.append(state.global_step)
    )
    resumed = tuned(tiny_folder, tmp_path / "broken" / "model", settings, tokens, MANY)
    assert steps == list(range(kill, 8))
    assert (resumed.rows, resumed.updates, resumed.tokens) == (unbroken.rows, unbroken.updates, unbroken.tokens)
    assert tiny.weights(tmp_path / "broken" / "model") == tiny.weights(tmp_path / "unbroken" / "model")
    assert tiny.weights(tmp_path / "unbroken" / "model") != tiny.weights(tiny_folder)
    assert not scratch.exists()


def test_equal_seeds_give_equal_bytes_and_another_seed_does_not(
    tiny_folder: Path, tokens: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The seed orders the pairs."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        given = {"tokenizer": tokens, "dtype": "float32", "seed": seed, "resume": tmp_path / f"resume-{name}"}
        optimise(str(tiny_folder), MANY, tmp_path / name, with_training(steps=2), **given)
    assert tiny.weights(tmp_path / "a") == tiny.weights(tmp_path / "b") != tiny.weights(tmp_path / "c")


def test_an_update_has_pairs_of_like_length_in_another_order_each_epoch() -> None:
    """Whatever the number of processes that share the update; each epoch has every row once."""
    lengths = [length for length in range(32) for _ in range(3)]

    def order(epoch: float, seed: int = 1, processes: int = 1) -> list[int]:
        args = SimpleNamespace(
            train_batch_size=2, gradient_accumulation_steps=4 // processes, world_size=processes, data_seed=seed
        )
        return list(RowsByLength(SimpleNamespace(args=args, state=SimpleNamespace(epoch=epoch)), lengths))  # type: ignore[arg-type]

    assert sorted(order(0)) == list(range(96))
    spread = [max(row) - min(row) for row in [[lengths[i] for i in order(0)[k : k + 8]] for k in range(0, 96, 8)]]
    assert sorted(spread)[6] < 16  # at random nearly all updates span most of the 32
    assert order(1.0) == order(1.9) == order(1.5, processes=2)
    assert len({tuple(order(*key)) for key in ((0,), (1,), (0, 2))}) == 3


def stage(folder: Path, start: Path, settings: DPO) -> Job:
    """The stage's job, on a pairs folder."""
    write_rows(folder / "pairs" / "part-00000.parquet", ROWS, PAIRS)
    base = Recipe("test")
    recipe = replace(base, dpo=settings, model=replace(base.model, chat="world-v1", dtype="float32"))
    (folder / "dpo").mkdir()
    work: Any = SimpleNamespace(folder=folder / "dpo", resume=folder / "dpo" / "resume", tally=Tally())
    return Job(recipe, work, {"start": start, "pairs": folder / "pairs"})


def test_the_stage_leaves_a_plain_folder_and_counts_the_tokens_of_both_answers(
    tiny_folder: Path, tokens: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Two updates of four pairs are two passes: each pair's prompt is read twice a pass, and each answer once."""
    work = stage(tmp_path, tiny_folder, with_training(steps=2))
    dpo.dpo(work)
    assert {path.name for path in (tmp_path / "dpo").iterdir()} == {"model"}
    assert {path.name for path in (tmp_path / "dpo" / "model").iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    rows = list(tokenize_pairs(ROWS, tokens))
    once = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    tally = work.work.tally
    assert (tally.rows_in, tally.rows_out, tally.trained) == (4, 4, 2 * once)
    again = AutoTokenizer.from_pretrained(tmp_path / "dpo" / "model")
    plain = again.apply_chat_template(ROWS[0]["messages"], tokenize=False, add_generation_prompt=True)
    assert plain == "<|user|>explain fox and tea.<|assistant|>"
    assert load(tmp_path / "dpo" / "model").config.use_cache


def test_a_checkpoint_named_in_the_recipe_is_taken_in_place_of_training(tiny_folder: Path, tmp_path: Path) -> None:
    work = stage(tmp_path, tiny_folder, with_training(checkpoint="HuggingFaceH4/zephyr-7b-beta"))
    dpo.dpo(work)
    assert (tmp_path / "dpo" / "checkpoint.txt").read_text() == "HuggingFaceH4/zephyr-7b-beta\n"
