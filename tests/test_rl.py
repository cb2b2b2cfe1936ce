"""Reinforcement: which reward, for which prompts and tokens, what is counted, that it rises, and that it resumes."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralForCausalLM, PreTrainedTokenizerBase

import tiny
from dpalign.engines.transformers_engine import TransformersEngine, prompt_ids
from dpalign.recipe import RL, Recipe, Sampling, Steering
from dpalign.rows import PROMPTS, Message, prompt_id, user_prompt, write_rows
from dpalign.run.folder import Tally
from dpalign.stages.sample import within_limit
from dpalign.stages.stage import Job
from dpalign.train import rl as module
from dpalign.train.knobs import Training
from dpalign.train.rl import Reinforced, configuration, drawn, reinforce, rl, scalar_reward
from test_training import PLAIN_FOLDER, Stopped

HEADS = ("pleased", "length", "correct")
OBJECTIVES = {"helpfulness": ("pleased", "correct"), "verbosity": ("length",)}
SETTINGS = RL(
    samples=4,
    training=Training(learning_rate=1e-2, warmup_steps=0, steps=6, batch=8, micro_batch=4, packing=False, save_every=4),
)
RECIPE = Recipe(
    name="test",
    heads=HEADS,
    objectives=OBJECTIVES,
    rl=SETTINGS,
    preference=Steering(distribution="fixed", listed=((0.8, -0.6),), directions=1),
    sampling=Sampling(max_new_tokens=8, prompt_tokens=16),
)
RECIPE = replace(
    RECIPE,
    model=replace(RECIPE.model, chat="world-v1", dtype="float32"),
    reward=replace(RECIPE.reward, checkpoint="python:test_rl:rate"),
)
ASKED = [user_prompt(text) for text in ("name fox.", "explain tea.", "name owl and rain.")]
SEEN: list[tuple[str, str]] = []
"""The prompts and answers that `rate` was given."""


def rate(prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """Pleased by every letter e, correct by every a, and the length in letters."""
    SEEN.extend(zip(prompts, answers, strict=True))
    return np.array([[10.0 * a.count("e"), len(a), 10.0 * a.count("a")] for a in answers]).reshape(-1, 3)


def no_number(prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    return np.array([[1.0, np.nan if i == 2 else 1.0, 1.0] for i in range(len(answers))])


def often_ending(folder: Path, output: Path) -> None:
    """The model with an end of text that is as likely as not, so that short answers are cut or end by chance."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.eos_token_id] *= 4
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def reinforced(
    start: Path, output: Path, tokens: PreTrainedTokenizerBase, reward: Any, settings: RL = SETTINGS, new: int = 8
) -> Reinforced:
    training = settings.training
    prompts = drawn(ASKED, training.steps * training.batch // settings.samples, seed=1)
    args = configuration(settings, new, seed=1, resume=output.parent / "resume")
    given = {"tokenizer": tokens, "dtype": "float32", "lora_rank": training.lora_rank}
    return reinforce(str(start), prompts, output, args, reward, **given)


# Prompts and sampling


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each call of `generate` was given."""
    calls: list[dict[str, Any]] = []
    plain = MistralForCausalLM.generate

    def generate(self: Any, **given: Any) -> Any:
        calls.append(given)
        return plain(self, **given)

    monkeypatch.setattr(MistralForCausalLM, "generate", generate)
    return calls


def prompts_of(call: dict[str, Any]) -> Iterator[tuple[int, ...]]:
    for ids, mask in zip(call["input_ids"].tolist(), call["attention_mask"].tolist(), strict=True):
        yield tuple(token for token, seen in zip(ids, mask, strict=True) if seen)


@pytest.mark.parametrize("style", ["zephyr", "world-v1"])
@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_prompts_are_read_token_for_token_as_in_sampling(
    tmp_path: Path, generated: list[dict[str, Any]], style: Any, algorithm: Any
) -> None:
    """Also where the tokenizer itself would write a start of text, which the chat template does not."""
    tokens = tiny.tokenizer(style)
    start = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokens.bos_token_id)])
    tokens.backend_tokenizer.post_processor = start
    folder = tiny.write_model(tmp_path / "start", tokens)
    assert tokens("fox")["input_ids"][0] == tokens.bos_token_id
    settings = replace(SETTINGS, algorithm=algorithm, training=replace(SETTINGS.training, steps=3))
    reinforced(folder, tmp_path / "model", tokens, lambda prompts, **_: [0.0] * len(prompts), settings, new=2)
    engine = TransformersEngine(str(folder), rows=8)
    order = [tuple(engine.prompt_ids(messages)) for messages in drawn(ASKED, 6, seed=1)]
    assert [ids for call in generated for ids in prompts_of(call)] == [ids for ids in order for _ in range(4)]


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_answers_are_drawn_from_the_whole_distribution(
    tmp_path: Path, generated: list[dict[str, Any]], algorithm: Any
) -> None:
    """Of 400 tokens about as likely, 160 first tokens to one prompt are more different ones than the usual 50."""
    tokens = tiny.tokenizer()
    folder = tiny.write_model(tmp_path / "start", tokens, scale=1e-3)
    firsts: list[int] = []

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        firsts.extend(ids[0] for ids in completion_ids)
        return [0.0] * len(completion_ids)

    training = replace(SETTINGS.training, steps=1, batch=160, micro_batch=160)
    settings = RL(algorithm=algorithm, samples=160, temperature=0.9, training=training)
    reinforced(folder, tmp_path / "model", tokens, reward, settings, new=1)
    assert len(set(firsts)) > 100
    config = generated[0]["generation_config"]
    assert (config.temperature, config.top_k, config.top_p, config.min_p) == (0.9, 0, 1.0, None)


def test_every_prompt_has_its_turn_before_any_has_a_second() -> None:
    """Seven groups of three prompts: two whole rounds in orders of their own, and one prompt of the third."""
    order = [messages[0]["content"] for messages in drawn(ASKED, 7, seed=1)]
    assert Counter(order[:3]) == Counter(order[3:6]) == Counter(messages[0]["content"] for messages in ASKED)
    assert drawn(ASKED, 7, seed=1) == drawn(ASKED, 7, seed=1)
    assert len({tuple(m[0]["content"] for m in drawn(ASKED, 3, seed=seed)) for seed in range(20)}) > 1


def test_prompts_over_the_limit_are_left_out_and_counted_and_none_left_is_an_error(
    tiny_folder: Path, tokens: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    lengths = [len(tokens.apply_chat_template(m, add_generation_prompt=True, return_dict=False)) for m in ASKED]
    prompts = [{"messages": m} for m in ASKED]
    works: list[Job] = []

    def within(limit: int) -> list[list[Message]]:
        (folder := tmp_path / str(limit)).mkdir()
        works.append(job(folder, tiny_folder, replace(RECIPE, sampling=replace(RECIPE.sampling, prompt_tokens=limit))))
        kept = within_limit(works[-1], prompts, lambda messages: len(prompt_ids(tokens, messages)))
        return [prompt["messages"] for prompt in kept]

    limit = sorted(lengths)[1]
    assert within(limit) == [m for m, n in zip(ASKED, lengths, strict=True) if n <= limit]
    assert works[0].work.tally.filtered == {"prompt too long": 1}
    with pytest.raises(ValueError, match=r"none of 3 prompts is at most 2 tokens long; raise sampling.prompt_tokens"):
        within(2)


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused(
    tiny_folder: Path, tokens: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"a prompt of \d+ tokens and 250 new ones exceed the model's context of 256"):
        reinforced(tiny_folder, tmp_path / "model", tokens, None, new=250)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, r"rl.training.steps is 0; reinforcement counts updates"),
        ({"samples": 1}, r"rl.samples is 1; an answer is weighed against others"),
        ({"samples": 3}, r"rl.training.batch 8 is not a multiple of rl.samples 3"),
        ({"micro_batch": 3}, r"batch 8 is not a multiple of micro_batch 3"),
    ],
)
def test_a_batch_that_holds_no_whole_groups_is_refused(tmp_path: Path, change: dict[str, int], message: str) -> None:
    samples = change.pop("samples", SETTINGS.samples)
    settings = replace(SETTINGS, samples=samples, training=replace(SETTINGS.training, **change))
    with pytest.raises(ValueError, match=message):
        configuration(settings, 8, seed=1, resume=tmp_path)


# Training


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_a_trivial_reward_rises_within_a_few_updates(
    tiny_folder: Path, tokens: PreTrainedTokenizerBase, tmp_path: Path, algorithm: Any
) -> None:
    """100 points for tokens of even number alone: half of a random model's, nearly all after twelve updates."""

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [100 * float(np.mean([token % 2 == 0 for token in ids])) for ids in completion_ids]

    training = replace(SETTINGS.training, learning_rate=3e-2, schedule="constant", steps=12, batch=32, micro_batch=32)
    done = reinforced(tiny_folder, tmp_path / "model", tokens, reward, RL(algorithm, samples=16, training=training))
    mean_U = [update["reward"] for update in done.updates]
    assert np.mean(mean_U[:2]) < 60
    assert np.mean(mean_U[-2:]) > 75
    assert done.updates[0]["kl"] == pytest.approx(0, abs=1e-6)  # the reference is the start
    assert done.updates[-1]["kl"] > 1e-3


def test_what_is_counted_is_what_was_sampled_scored_and_trained(
    tiny_folder: Path, tokens: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Short answers of this model are cut or end by chance: both kinds are scored, and their tokens counted."""
    asked: list[list[Message]] = []
    answers: list[list[int]] = []

    def reward(prompts: Any, completion_ids: Sequence[list[int]], **_: Any) -> list[float]:
        asked.extend(prompts)
        answers.extend(completion_ids)
        return [float(len(ids) == 5) for ids in completion_ids]

    often_ending(tiny_folder, tmp_path / "start")
    training = replace(SETTINGS.training, steps=3, batch=16, learning_rate=1e-6)
    done = reinforced(tmp_path / "start", tmp_path / "model", tokens, reward, replace(SETTINGS, training=training), 5)
    finished = [ids[-1] == tokens.eos_token_id for ids in answers]
    assert 0 < sum(finished) < 48 == len(answers) == done.scored
    assert done.sampled == sum(map(len, answers))
    lengths = [len(tokens.apply_chat_template(m, add_generation_prompt=True, return_dict=False)) for m in asked]
    assert done.trained == done.sampled + sum(lengths)
    assert sum(update["cut"] for update in done.updates) == 48 - sum(finished)
    assert [update["update"] for update in done.updates] == [1, 2, 3]


@pytest.mark.parametrize(
    "change", [{}, {"algorithm": "rloo"}, {"lora_rank": 2}, {"beta": 0.0}], ids=["grpo", "rloo", "lora", "no reference"]
)
def test_a_training_cut_off_goes_on_to_the_same_bytes(
    tiny_folder: Path,
    tokens: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
) -> None:
    """Stopped after update 5 of 6, it starts again at update 4, draws the same answers and counts all six once."""
    training = replace(SETTINGS.training, lora_rank=change.pop("lora_rank", 0))
    settings = replace(SETTINGS, training=training, **change)
    drawn_answers: list[Any] = []

    def reward(completion_ids: Sequence[list[int]], **_: Any) -> list[float]:
        drawn_answers.append(completion_ids)
        return [float(sum(ids)) for ids in completion_ids]

    unbroken = reinforced(tiny_folder, tmp_path / "unbroken" / "model", tokens, reward, settings)
    whole = drawn_answers.copy()
    drawn_answers.clear()

    def stop(_: Any, __: Any, state: Any, *___: Any, **____: Any) -> None:
        if state.global_step == 5:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(module.ProgressCallback, "on_step_end", stop)
        with pytest.raises(Stopped):
            reinforced(tiny_folder, tmp_path / "broken" / "model", tokens, reward, settings)
    assert not (tmp_path / "broken" / "model").exists()
    drawn_answers.clear()
    resumed = reinforced(tiny_folder, tmp_path / "broken" / "model", tokens, reward, settings)
    assert drawn_answers == whole[4:]
    assert len({str(answers) for answers in whole}) == 6
    assert resumed == unbroken
    assert tiny.weights(tmp_path / "broken" / "model") == tiny.weights(tmp_path / "unbroken" / "model")
    assert tiny.weights(tmp_path / "unbroken" / "model") != tiny.weights(tiny_folder)
    assert not (tmp_path / "broken" / "resume").exists()


# The stage


def job(folder: Path, start: Path, recipe: Recipe = RECIPE) -> Job:
    """An rl job on four prompts of D1 and D2, one of them too long, and one of validation."""
    split = {"name fox.": "D1", "explain tea.": "D2", "name owl.": "validation", "name rain.": "D1"}
    split["explain rain, salt and wolf, then iron and owl and tea and fox."] = "D2"
    prompts = [
        {"prompt_id": prompt_id(user_prompt(p)), "messages": user_prompt(p), "split": s} for p, s in split.items()
    ]
    write_rows(folder / "data" / "prompts" / "part-00000.parquet", prompts, PROMPTS)
    said: list[str] = []
    run = SimpleNamespace(log=said.append, said=said)
    work = SimpleNamespace(folder=folder / "out", tally=Tally(), resume=folder / "out" / "resume", run=run)
    (folder / "out").mkdir()
    return Job(recipe, work, {"start": start, "data": folder / "data", "reward": folder / "reward"})  # type: ignore[arg-type]


def test_the_stage_answers_the_prompts_of_both_halves_and_counts_them(
    tiny_folder: Path, tmp_path: Path, tokens: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six updates of two groups reach all three prompts that fit; 48 answers are scored, and those cut earn least."""
    SEEN.clear()
    ended: list[bool] = []

    def watched(*given: Any) -> Any:
        def reward(completion_ids: Sequence[list[int]], **beside: Any) -> list[float]:
            ended.extend(ids[-1] == tokens.eos_token_id for ids in completion_ids)
            return scalar_reward(*given)(completion_ids=completion_ids, **beside)

        return reward

    monkeypatch.setattr("dpalign.train.rl.scalar_reward", watched)
    often_ending(tiny_folder, tmp_path / "start")
    work = job(tmp_path, tmp_path / "start")
    rl(work)
    assert {prompt for prompt, _ in SEEN} == {"name fox.", "explain tea.", "name rain."}
    tally = work.work.tally
    assert (tally.rows_in, tally.rows_out, dict(tally.filtered)) == (4, 3, {"prompt too long": 1})
    assert tally.scored == 48 == len(SEEN)
    updates = json.loads((work.out / "updates.json").read_text())
    by_hand = [
        0.8 * (5 * a.count("e") + 5 * a.count("a")) - 0.6 * len(a) if whole and a.strip() else -60.0
        for (_, a), whole in zip(SEEN, ended, strict=True)
    ]
    assert [update["reward"] for update in updates] == pytest.approx(
        np.mean(np.reshape(by_hand, (6, 8)), axis=1), rel=1e-5
    )
    assert tally.sampled == sum(round(8 * update["tokens"]) for update in updates)
    assert tally.trained > tally.sampled
    cut = sum(update["cut"] for update in updates)
    assert cut == ended.count(False)
    assert 0 < cut < 40
    assert work.work.run.said == [
        f"{cut} of 48 answers were cut at sampling.max_new_tokens, and given the least reward"
    ]


def test_prompts_that_no_update_reaches_are_counted(tiny_folder: Path, tmp_path: Path) -> None:
    training = replace(SETTINGS.training, steps=1)
    work = job(tmp_path, tiny_folder, replace(RECIPE, rl=replace(SETTINGS, training=training)))
    rl(work)
    tally = work.work.tally
    assert (tally.rows_in, tally.rows_out, dict(tally.filtered)) == (4, 2, {"prompt too long": 1, "not reached": 1})


def test_what_is_left_is_a_plain_folder_without_a_dial(tiny_folder: Path, tmp_path: Path) -> None:
    work = job(tmp_path, tiny_folder)
    rl(work)
    folder = work.out / "model"
    assert {path.name for path in folder.iterdir()} == PLAIN_FOLDER
    for name in ("config.json", "generation_config.json"):  # nothing of the training's own sampling stays behind
        assert json.loads((folder / name).read_text()) == json.loads((tiny_folder / name).read_text())
    again = AutoTokenizer.from_pretrained(folder)
    text = again.apply_chat_template(ASKED[0], tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>name fox.<|assistant|>"
    with pytest.raises(Exception, match="this model takes no preference"):
        again.apply_chat_template(ASKED[0], tokenize=False, angle=-15)
    assert not work.work.resume.exists()


def test_a_checkpoint_that_the_recipe_names_is_taken_in_place_of_training(tiny_folder: Path, tmp_path: Path) -> None:
    training = replace(SETTINGS.training, checkpoint=str(tiny_folder))
    work = job(tmp_path, tiny_folder, replace(RECIPE, rl=replace(SETTINGS, training=training)))
    rl(work)
    assert (work.out / "checkpoint.txt").read_text() == f"{tiny_folder}\n"
    assert [path.name for path in work.out.iterdir()] == ["checkpoint.txt"]
