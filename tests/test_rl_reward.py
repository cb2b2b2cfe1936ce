"""The reward of reinforcement: which direction, of which heads, and what an answer that is not whole is worth."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from dpalign.paper.objectives import Objective
from dpalign.recipe import Recipe, Steering
from dpalign.rewards.score import FunctionScorer
from dpalign.train.rl import configuration, direction, scalar_reward
from test_rl import ASKED, HEADS, OBJECTIVES, RECIPE, SETTINGS, reinforced


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
    objectives = [Objective(name, heads) for name, heads in OBJECTIVES.items()]
    reward = scalar_reward(scorer, HEADS, objectives, np.array([0.8, -0.6]), tokens)
    answers = [[*tokens(text)["input_ids"], tokens.eos_token_id] for text in ("fox is red.", "tea is")]
    given = {"completions": None, "trainer_state": None}  # what TRL passes beside them
    assert reward(prompts=ASKED[:2], completion_ids=answers, **given) == pytest.approx([32.0, -42.0])
    assert scorer.asked == [(ASKED[0], "fox is red."), (ASKED[1], "tea is")]


def test_an_answer_that_says_nothing_or_does_not_end_is_worth_the_least_there_is(
    tokens: PreTrainedTokenizerBase,
) -> None:
    """At most -60 on the scale of 0-100; less where a whole answer earns less, by a reward of another scale."""
    objectives = [Objective(name, heads) for name, heads in OBJECTIVES.items()]
    word, end = tokens("fox")["input_ids"][0], tokens.eos_token_id
    answers = [[word, word, end], [end], [*[word] * 7, end], [word] * 8]
    for whole, least in (([90.0, 10.0, 90.0], -60.0), ([-500.0, 10.0, -500.0], -406.0)):
        scorer = Table([[90.0, 10.0, 90.0], [50.0, -40.0, 50.0], whole, [90.0, 10.0, 90.0]])
        reward = scalar_reward(scorer, HEADS, objectives, np.array([0.8, -0.6]), tokens)
        earned = 0.8 * whole[0] - 0.6 * whole[1]
        assert reward(prompts=ASKED[:1] * 4, completion_ids=answers) == pytest.approx([66.0, least, earned, least])


def test_a_score_that_is_no_number_ends_the_training_and_shows_its_answer(
    tiny_folder: Path, tokens: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    scorer = FunctionScorer("python:test_rl:no_number", HEADS)
    objectives = [Objective(name, heads) for name, heads in OBJECTIVES.items()]
    reward = scalar_reward(scorer, HEADS, objectives, np.array([0.8, -0.6]), tokens)
    with pytest.raises(ValueError, match=r"no_number: head 1 scored nan on answer 2 of 8: '.*'; a reward must be"):
        reinforced(tiny_folder, tmp_path / "model", tokens, reward)
    assert not (tmp_path / "model").exists()


def test_the_divergence_is_weighed_in_the_rewards_own_units(tmp_path: Path) -> None:
    """GRPO divides rewards by their spread; RLOO takes the divergence from points, 25 of which are about a spread."""
    settings = replace(SETTINGS, beta=0.04)
    assert configuration(settings, 8, seed=1, resume=tmp_path).beta == 0.04
    assert configuration(replace(settings, algorithm="rloo"), 8, seed=1, resume=tmp_path).beta == 1.0


def test_a_direction_is_one_and_weighs_every_objective() -> None:
    def asked(**steering: Any) -> Recipe:
        return replace(RECIPE, preference=Steering(directions=1, **steering))

    assert direction(asked(distribution="fixed", listed=((3.0, -4.0),))).tolist() == pytest.approx([0.6, -0.8])
    with pytest.raises(ValueError, match=r"one direction, and preference.distribution is 'arc' of \[\]; give 'fixed'"):
        direction(asked())
    with pytest.raises(ValueError, match=r"one direction, and preference.distribution is 'fixed' of \[\(1.0, 0.0\), "):
        direction(asked(distribution="fixed", listed=((1.0, 0.0), (0.0, -1.0))))
    with pytest.raises(ValueError, match=r"preference.listed weighs 3 objectives of 2"):
        direction(asked(distribution="fixed", listed=((1.0, 0.0, 0.0),)))
