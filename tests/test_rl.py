"""Reinforcement: its reward, its prompts and tokens, what is counted, and that the reward rises."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralForCausalLM, PreTrainedTokenizerBase

import tiny
from dpalign.engines.tokens import PromptReader
from dpalign.engines.transformers_engine import TransformersEngine
from dpalign.paper.objectives import Objective
from dpalign.recipe import RL, Recipe, Sampling, Steering
from dpalign.rewards.knobs import RewardTable
from dpalign.rewards.score import FunctionScorer
from dpalign.rows import PROMPTS, Message, prompt_id, user_prompt, write_rows
from dpalign.runs.folder import Tally
from dpalign.stages.rl import direction, rl
from dpalign.stages.stage import Job
from dpalign.train.knobs import Training
from dpalign.train.rl import configuration, prompts_in_order, scalar_reward
from tiny import changed
from trainings import ASKED, PLAIN_FOLDER, context, run

HEADS = ("pleased", "length", "correct")
OBJECTIVES = {"helpfulness": ("pleased", "correct"), "verbosity": ("length",)}
READ = [Objective(name, heads) for name, heads in OBJECTIVES.items()]
SIX = Training(learning_rate=1e-2, warmup_steps=0, steps=6, batch=8, micro_batch=4, packing=False, save_every=4)
RECIPE = Recipe(
    name="test",
    rewards={"own": RewardTable(function="test_rl:rate", heads=HEADS, scale=(1.0, 0.0))},
    objectives=OBJECTIVES,
    rl=RL(samples=4, training=SIX),
    preference=Steering(distribution="fixed", listed=((0.8, -0.6),), directions=1),
    sampling=Sampling(max_new_tokens=8, prompt_tokens=16),
)
RECIPE = changed(
    RECIPE,
    model=changed(RECIPE.model, chat="world-v1", dtype="float32"),
)
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
    nothing = lambda prompts, **_: [0.0] * len(prompts)  # noqa: E731
    own: dict[str, Any] = {"samples": 4, "max_new_tokens": 2, "reward": nothing}
    run(algorithm, folder, tmp_path / "model", changed(SIX, steps=3), **own)
    engine = TransformersEngine(str(folder), rows=8)
    order = [tuple(engine.reader.prompt_ids(messages)) for messages in prompts_in_order(ASKED, 6, seed=1)]
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

    training = changed(SIX, steps=1, batch=160, micro_batch=160)
    own: dict[str, Any] = {"samples": 160, "temperature": 0.9, "max_new_tokens": 1, "reward": reward}
    run(algorithm, folder, tmp_path / "model", training, **own)
    assert len(set(firsts)) > 100
    config = generated[0]["generation_config"]
    assert (config.temperature, config.top_k, config.top_p, config.min_p) == (0.9, 0, 1.0, None)


def test_every_prompt_has_its_turn_before_any_has_a_second() -> None:
    """Seven groups of three prompts: two whole rounds in orders of their own, and one prompt of the third."""
    order = [messages[0]["content"] for messages in prompts_in_order(ASKED, 7, seed=1)]
    assert Counter(order[:3]) == Counter(order[3:6]) == Counter(messages[0]["content"] for messages in ASKED)
    assert prompts_in_order(ASKED, 7, seed=1) == prompts_in_order(ASKED, 7, seed=1)
    assert len({tuple(m[0]["content"] for m in prompts_in_order(ASKED, 3, seed=seed)) for seed in range(20)}) > 1


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prompt .*: \d+ tokens and 250 new ones exceed the model's context of 256"):
        run("grpo", tiny_folder, tmp_path / "model", SIX, max_new_tokens=250)


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
    samples = change.pop("samples", 4)
    with pytest.raises(ValueError, match=message):
        configuration(context(tmp_path, changed(SIX, **change)), samples=samples, max_new_tokens=8, beta=0.04)


# The reward


class Table:
    """A scorer of given rewards, which keeps what it was asked."""

    heads = HEADS

    def __init__(self, rewards: list[list[float]]) -> None:
        self.rewards, self.asked = rewards, []

    def score(self, pairs: Sequence[Any]) -> np.ndarray:
        self.asked += pairs
        return np.array(self.rewards, dtype=np.float32)


def test_the_reward_is_the_direction_times_the_objectives_read_from_their_heads(
    tokens: PreTrainedTokenizerBase,
) -> None:
    """Helpfulness is (60 + 80) / 2 = 70 and verbosity 40, so v . r = 0.8 * 70 - 0.6 * 40 = 32; the first head is 60."""
    scorer = Table([[60.0, 40.0, 80.0], [20.0, 90.0, 10.0]])
    reward = scalar_reward(
        scorer.score, HEADS, READ, np.array([0.8, -0.6]), PromptReader(tokens, [tokens.eos_token_id])
    )
    answers = [[*tokens(text)["input_ids"], tokens.eos_token_id] for text in ("fox is red.", "tea is")]
    given = {"completions": None, "trainer_state": None}  # what TRL passes beside them
    assert reward(prompts=ASKED[:2], completion_ids=answers, **given) == pytest.approx([32.0, -42.0])
    assert scorer.asked == [(ASKED[0], "fox is red."), (ASKED[1], "tea is")]


def test_an_answer_that_says_nothing_or_does_not_end_is_worth_the_least_there_is(
    tokens: PreTrainedTokenizerBase,
) -> None:
    """At most -60 on the scale of 0-100; less where a whole answer earns less, by a reward of another scale."""
    word, end = tokens("fox")["input_ids"][0], tokens.eos_token_id
    answers = [[word, word, end], [end], [*[word] * 7, end], [word] * 8]
    for whole, least in (([90.0, 10.0, 90.0], -60.0), ([-500.0, 10.0, -500.0], -406.0)):
        scorer = Table([[90.0, 10.0, 90.0], [50.0, -40.0, 50.0], whole, [90.0, 10.0, 90.0]])
        reward = scalar_reward(
            scorer.score, HEADS, READ, np.array([0.8, -0.6]), PromptReader(tokens, [tokens.eos_token_id])
        )
        earned = 0.8 * whole[0] - 0.6 * whole[1]
        assert reward(prompts=ASKED[:1] * 4, completion_ids=answers) == pytest.approx([66.0, least, earned, least])


def test_a_score_that_is_no_number_ends_the_training_and_shows_its_answer(
    tiny_folder: Path, tokens: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    scorer = FunctionScorer("test_rl:no_number", HEADS)
    reward = scalar_reward(
        scorer.score, HEADS, READ, np.array([0.8, -0.6]), PromptReader(tokens, [tokens.eos_token_id])
    )
    with pytest.raises(
        ValueError, match=r"no_number: head 1 scored nan on answer 2 of 8: '.*', to prompt \w+; a reward must be"
    ):
        run("grpo", tiny_folder, tmp_path / "model", SIX, samples=4, reward=reward)
    assert not (tmp_path / "model").exists()


def test_the_divergence_is_weighed_in_the_rewards_own_units(tmp_path: Path) -> None:
    """GRPO divides rewards by their spread; RLOO takes the divergence from points, 25 of which are about a spread."""
    given: dict[str, Any] = {"samples": 4, "max_new_tokens": 8, "beta": 0.04}
    assert configuration(context(tmp_path, SIX), **given).beta == 0.04
    assert configuration(context(tmp_path, SIX), algorithm="rloo", **given).beta == 1.0


def test_a_direction_is_one_and_weighs_every_objective() -> None:
    def asked(**steering: Any) -> Recipe:
        return changed(RECIPE, preference=Steering(directions=1, **steering))

    assert direction(asked(distribution="fixed", listed=((3.0, -4.0),))).tolist() == pytest.approx([0.6, -0.8])
    with pytest.raises(ValueError, match=r"one direction, and preference.distribution is 'arc' of \[\]; give 'fixed'"):
        direction(asked())
    with pytest.raises(ValueError, match=r"one direction, and preference.distribution is 'fixed' of \[\(1.0, 0.0\), "):
        direction(asked(distribution="fixed", listed=((1.0, 0.0), (0.0, -1.0))))
    with pytest.raises(ValueError, match=r"preference.listed weighs 3 objectives of 2"):
        direction(asked(distribution="fixed", listed=((1.0, 0.0, 0.0),)))


# Training


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_a_trivial_reward_rises_within_a_few_updates(tiny_folder: Path, tmp_path: Path, algorithm: Any) -> None:
    """100 points for tokens of even number alone: half of a random model's, nearly all after twelve updates."""

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [100 * float(np.mean([token % 2 == 0 for token in ids])) for ids in completion_ids]

    training = changed(SIX, learning_rate=3e-2, schedule="constant", steps=12, batch=32, micro_batch=32)
    curve = run(algorithm, tiny_folder, tmp_path / "model", training, samples=16, reward=reward).curve
    assert np.mean(curve["reward"][:2]) < 60
    assert np.mean(curve["reward"][-2:]) > 75
    assert curve["kl"][0] == pytest.approx(0, abs=1e-6)  # the reference is the start
    assert curve["kl"][-1] > 1e-3


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
    training = changed(SIX, steps=3, batch=16, learning_rate=1e-6)
    own: dict[str, Any] = {"samples": 4, "max_new_tokens": 5, "reward": reward}
    done = run("grpo", tmp_path / "start", tmp_path / "model", training, **own)
    finished = [ids[-1] == tokens.eos_token_id for ids in answers]
    assert 0 < sum(finished) < 48 == len(answers) == done.scored
    assert done.sampled == sum(map(len, answers))
    lengths = [len(tokens.apply_chat_template(m, add_generation_prompt=True, return_dict=False)) for m in asked]
    assert done.trained == done.sampled + sum(lengths)
    assert done.cut == 48 - sum(finished)
    assert done.curve["step"] == [1, 2, 3]
    assert done.curve["tokens"] == pytest.approx([sum(map(len, answers[i : i + 16])) / 16 for i in (0, 16, 32)])


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_an_update_is_the_same_however_its_answers_are_read(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, algorithm: Any
) -> None:
    """By TRL's own reading of all rows at once, by micro-batches at their own width, and by whole logits."""
    widths: list[int] = []
    plain = MistralForCausalLM.forward

    def forward(self: Any, *given: Any, **named: Any) -> Any:
        if self.training and (mask := named.get("attention_mask")) is not None and torch.is_grad_enabled():
            assert mask.any(dim=0).all(), "a column of padding alone"
            widths.append(mask.shape[1])
        return plain(self, *given, **named)

    monkeypatch.setattr(MistralForCausalLM, "forward", forward)
    often_ending(tiny_folder, tmp_path / "start")

    def trained(name: str, whole: bool, micro_batch: int) -> torch.Tensor:
        monkeypatch.setattr("dpalign.train.rl.wants_whole_logits", lambda model: whole)
        training = changed(SIX, steps=2, batch=16, micro_batch=micro_batch, learning_rate=1e-3)
        reward = lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids]  # noqa: E731
        own: dict[str, Any] = {"samples": 4, "max_new_tokens": 12, "temperature": 0.8, "reward": reward}
        run(algorithm, tmp_path / "start", tmp_path / name, training, **own)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        return torch.cat([weights.flatten() for weights in model.parameters()])

    tiled = trained("tiled", whole=False, micro_batch=16)
    assert (
        tiled - torch.cat([w.flatten() for w in AutoModelForCausalLM.from_pretrained(tmp_path / "start").parameters()])
    ).abs().max() > 1e-3
    for name, whole, micro_batch in (("narrow", False, 2), ("whole", True, 16), ("both", True, 2)):
        widths.clear()
        torch.testing.assert_close(trained(name, whole, micro_batch), tiled, rtol=0, atol=2e-5)
        if whole:
            assert len(set(widths)) > (micro_batch == 2)


# The stage


def with_training(**changes: Any) -> Recipe:
    return changed(RECIPE, rl=changed(RECIPE.rl, training=changed(SIX, **changes)))


def job(folder: Path, start: Path, recipe: Recipe = RECIPE) -> Job:
    """An rl job on four prompts of D1 and D2, one of them too long, and one of validation."""
    split = {"name fox.": "D1", "explain tea.": "D2", "name owl.": "validation", "name rain.": "D1"}
    split["explain rain, salt and wolf, then iron and owl and tea and fox."] = "D2"
    prompts = [
        {"prompt_id": prompt_id(user_prompt(p)), "messages": user_prompt(p), "split": s} for p, s in split.items()
    ]
    write_rows(folder / "data" / "prompts" / "part-00000.parquet", prompts, PROMPTS)
    log: list[str] = []
    keeper = SimpleNamespace(log=log.append, lines=log)
    work = SimpleNamespace(folder=folder / "out", tally=Tally(), resume=folder / "out" / "resume", run=keeper)
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
    often_ending(tiny_folder, start := tmp_path / "start")
    work = job(tmp_path, start)
    rl.function(work)
    assert {prompt for prompt, _ in SEEN} == {"name fox.", "explain tea.", "name rain."}
    tally = work.work.tally
    assert (tally.rows_in, tally.rows_out, dict(tally.filtered)) == (4, 3, {"prompt too long": 1})
    assert tally.scored == 48 == len(SEEN)
    curve = json.loads((work.out / "curve.json").read_text())
    by_hand = [
        0.8 * (5 * a.count("e") + 5 * a.count("a")) - 0.6 * len(a) if whole and a.strip() else -60.0
        for (_, a), whole in zip(SEEN, ended, strict=True)
    ]
    assert curve["reward"] == pytest.approx(np.mean(np.reshape(by_hand, (6, 8)), axis=1), rel=1e-5)
    assert tally.sampled == sum(round(8 * tokens) for tokens in curve["tokens"])
    assert tally.trained > tally.sampled
    cut = ended.count(False)
    assert 0 < cut < 40
    (line,) = work.work.run.lines
    assert f"{cut} of 48 answers" in line
    assert {path.name for path in (work.out / "model").iterdir()} == PLAIN_FOLDER
    for name in ("config.json", "generation_config.json"):  # nothing of the training's own sampling stays behind
        assert json.loads((work.out / "model" / name).read_text()) == json.loads((start / name).read_text())
    with pytest.raises(Exception, match="this model takes no preference"):
        AutoTokenizer.from_pretrained(work.out / "model").apply_chat_template(ASKED[0], tokenize=False, angle=-15)


def test_prompts_that_no_update_reaches_are_counted(tiny_folder: Path, tmp_path: Path) -> None:
    work = job(tmp_path, tiny_folder, with_training(steps=1))
    rl.function(work)
    tally = work.work.tally
    assert (tally.rows_in, tally.rows_out, dict(tally.filtered)) == (4, 2, {"prompt too long": 1, "not reached": 1})
