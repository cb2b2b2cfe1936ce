"""The evaluation of one system: what it is asked for, what is written and counted, and best of n by hand."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpalign.engines.engine import Answer, Engine, Request
from dpalign.pipeline.runner import take
from dpalign.recipe import Recipe, changed, from_mapping
from dpalign.rewards.score import FunctionScorer
from dpalign.rows import CANDIDATES, PROMPTS, RATED, SCORES, Message, prompt_id, read_rows, user_prompt, write_rows
from dpalign.runs.folder import Run, Tally
from dpalign.runs.ledger import Ledger, read_ledger
from dpalign.stages import evaluate as evaluating
from dpalign.stages.best_of_n import best_of_n
from dpalign.stages.evaluate import evaluate
from dpalign.stages.sample import PLAIN, draw
from dpalign.stages.stage import Step

HEADS = ("a", "b")
RECIPE = from_mapping(
    Recipe,
    {
        "name": "test",
        "launcher": "inprocess",
        "rewards": {"own": {"function": "test_evaluate:spoken", "heads": HEADS, "scale": [1, 0]}},
        "objectives": {"helpfulness": ["a"], "verbosity": ["b"]},
        "model": {"chat": "world-v1"},
        "preference": {"template": "world-v1", "low": -45},
        "sampling": {"shard": 1},
        "evaluation": {"directions": 2, "samples": 2, "best_of": 3},
    },
)
"""Two directions, (1, 0) and (0.707, -0.707); every prompt is a shard."""

FIRST, SECOND = user_prompt("first"), user_prompt("second")
TRAINING = [user_prompt(f"training {i}") for i in range(4)]
"""Prompts of D1, which no evaluation asks."""


def spoken(prompts: list[str], responses: list[str]) -> list[list[float]]:
    """The rewards that an answer itself states: `90 80` is helpful by 90 and verbose by 80."""
    return [[float(word) for word in response.split()] for response in responses]


class Scripted:
    """An engine that says what is written down for a prompt: in turn for each request, `!` where it is cut."""

    def __init__(self, script: Mapping[str, Sequence[str]]) -> None:
        self.script, self.asked = script, list[Request]()

    def prompt_tokens(self, messages: Sequence[Message]) -> int:
        return len(messages[-1]["content"])

    def sample(self, requests: Sequence[Request], *, temperature: float, max_new_tokens: int) -> Iterator[list[Answer]]:
        self.asked += requests
        said = {prompt: iter(answers) for prompt, answers in self.script.items()}
        for request in requests:
            words = [next(said[request.messages[-1]["content"]]) for _ in range(request.n)]
            yield [Answer(word.strip("!"), int(word.split()[0]), not word.endswith("!")) for word in words]


@pytest.fixture
def evaluated(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Evaluates a scripted policy; returns the rows, the ledger and what the engine was asked."""

    def run(
        condition: str,
        script: Mapping[str, Sequence[str]],
        recipe: Recipe = RECIPE,
        prompts: Sequence[Any] = (FIRST, SECOND),
        **more: Path,
    ) -> tuple[Path, Ledger, list[Request]]:
        engine = Scripted(script)
        monkeypatch.setattr(evaluating, "open_engine", lambda recipe, policy: engine)
        split_of = [*((p, "validation") for p in prompts), *((p, "D1") for p in TRAINING)]
        rows = [{"prompt_id": prompt_id(p), "messages": p, "split": split} for p, split in split_of]
        write_rows(tmp_path / "data" / "prompts" / "part-00000.parquet", rows, PROMPTS)
        inputs = {"policy": tiny_folder, "data": tmp_path / "data", "reward": tiny_folder} | more
        name = f"evaluate-{len(list(tmp_path.glob('run/evaluate-*')))}"
        with Run.open(tmp_path / "run", None, {}) as opened:
            stage = best_of_n if condition == "best-of-n" else evaluate
            take(recipe, opened, Step(name, stage, inputs, condition=condition))
        return tmp_path / "run" / name, read_ledger(tmp_path / "run" / name), engine.asked

    return run


def answers(folder: Path) -> list[dict[str, Any]]:
    return list(read_rows(folder / "answers", CANDIDATES))


# Asked in words to be brief


def test_asked_to_be_brief_a_model_is_told_so_after_the_users_own_system_message(evaluated: Any) -> None:
    own: list[Message] = [{"role": "system", "content": "you are a pirate"}, *SECOND]
    script = {"first": ["60 40", "50 50"], "second": ["70 30", "80 20"]}
    folder, ledger, _ = evaluated("brief", script, prompts=(FIRST, own))
    rows = answers(folder)
    assert [row["messages"] for row in rows[::2]] == [
        [{"role": "system", "content": "Answer as briefly as you can."}, *FIRST],
        [{"role": "system", "content": "you are a pirate Answer as briefly as you can."}, *SECOND],
    ]
    assert {row["condition_kind"] for row in rows} == {"plain"}
    assert [row["condition"] for row in rows] == [[]] * 4
    assert ledger["tokens"] == {"sampled": 60 + 50 + 70 + 80, "scored": 4, "trained": 0}


def test_the_wish_for_brevity_is_the_recipes_and_changes_no_chance(evaluated: Any) -> None:
    script = {"first": ["60 40", "50 50"], "second": ["70 30", "80 20"]}
    brief = evaluated("brief", script, changed(RECIPE, {"evaluation.brevity": "be short"}))[2]
    assert {request.messages[0]["content"] for request in brief} == {"be short"}
    assert [request.key for request in brief] == [request.key for request in evaluated("plain", script)[2]]
    with pytest.raises(ValueError, match=r'evaluation.brevity is ""'):
        evaluated("brief", script, changed(RECIPE, {"evaluation.brevity": ""}))


# Shards


def test_an_evaluation_is_cut_into_as_many_shards_as_are_to_share_it_and_its_answers_stay(evaluated: Any) -> None:
    third = user_prompt("third")
    script = {prompt: ["60 40", "50 50"] for prompt in ("first", "second", "third")}
    files, rows = {}, {}
    for shards in (1, 2, 3):
        recipe = changed(RECIPE, {"sampling.shard": 256, "evaluation.shards": shards})
        folder, _, _ = evaluated("plain", script, recipe, prompts=(FIRST, SECOND, third))
        files[shards] = len(list((folder / "answers").iterdir()))
        assert len(list((folder / "scores").iterdir())) == files[shards]
        rows[shards] = [(row["prompt_id"], row["sample"], row["response"]) for row in answers(folder)]
    assert files == {1: 1, 2: 2, 3: 3}
    assert rows[1] == rows[2] == rows[3]


# Best of n


SCRIPT = {
    # Three answers for the first sample, three for the second. At (1, 0) they are worth their first number, at
    # (0.707, -0.707) in proportion to its lead over the second: 10, 50 and 0; 5, 0 and 30.
    "first": ["90 80", "70 20", "60 60", "95 90!", "50 50", "40 10"],
    # All of the first sample are cut: 0, 30 and 20. The second ends in a draw: 0, 0 and 0.
    "second": ["80 80!", "30 0!", "20 0!", "50 50", "50 50", "10 10"],
}


def test_the_best_of_each_group_is_kept_for_each_direction(evaluated: Any) -> None:
    folder, ledger, _ = evaluated("best-of-n", SCRIPT)
    rows = answers(folder)
    assert [row["response"] for row in rows] == [
        *("90 80", "50 50"),  # first, at (1, 0): 95 90 was cut
        *("70 20", "40 10"),  # first, at (0.707, -0.707)
        *("80 80", "50 50"),  # second: a cut answer, since there is no other
        *("30 0", "50 50"),
    ]
    assert [(row["condition_index"], row["sample"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)] * 2
    assert {row["condition_kind"] for row in rows} == {"direction"}
    np.testing.assert_allclose(
        [row["condition"] for row in rows[:4]], [[1, 0]] * 2 + [[0.70711, -0.70711]] * 2, atol=1e-5
    )
    assert [row["finished"] for row in rows] == [True] * 4 + [False, True, False, True]
    assert [row["messages"] for row in rows] == [FIRST] * 4 + [SECOND] * 4
    scores = list(read_rows(folder / "scores", SCORES))
    assert [row["rewards"] for row in scores] == [[float(w) for w in row["response"].split()] for row in rows]
    keys = ("prompt_id", "t", "condition_index", "sample")
    assert [[row[k] for k in keys] for row in scores] == [[row[k] for k in keys] for row in rows]
    first, second = 90 + 70 + 60 + 95 + 50 + 40, 80 + 30 + 20 + 50 + 50 + 10
    assert ledger["tokens"] == {"sampled": first + second, "scored": 12, "trained": 0}  # not the kept ones alone
    # Of 12 answers 7 are kept, one of them twice; of the 5 others 2 were cut.
    assert ledger["counts"] == {
        "in": 12,
        "out": 8,
        "filtered": {"cut at max_new_tokens, or empty": 2, "not the best": 3},
    }


class Silent(Engine):
    """Says something, says nothing, and says nothing but a space, before it ends."""

    def prompt_tokens(self, messages: Any) -> int:
        return 1

    def sample(self, requests: Any, **_: Any) -> Iterator[list[Answer]]:
        for _ in requests:
            yield [Answer("60 40", 2, True), Answer("", 1, True), Answer(" ", 2, True), Answer("60", 1, False)]


def test_an_answer_that_says_nothing_is_not_a_finished_one() -> None:
    asked = [({"prompt_id": "first", "messages": list(FIRST)}, [PLAIN])]
    rows = list(draw(Silent(), RECIPE, asked, 4, 1.0, key=(0,), t=1, tally=Tally()))
    assert [row["finished"] for row in rows] == [True, False, False, False]


def test_the_judge_sees_the_kept_answers_and_chooses_none(
    evaluated: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluating, "judge_scorer", lambda recipe, stage: FunctionScorer("test_evaluate:other", HEADS))
    folder, ledger, _ = evaluated("best-of-n", SCRIPT, judge=tiny_folder)
    assert [row["response"] for row in answers(folder)[:4]] == ["90 80", "50 50", "70 20", "40 10"]
    judged = [row["rewards"] for row in read_rows(folder / "judged", SCORES)]
    assert judged[:4] == [[10.0, 0.0], [50.0, 0.0], [30.0, 0.0], [60.0, 0.0]]
    assert ledger["tokens"]["scored"] == 12 + 8


def other(prompts: list[str], responses: list[str]) -> list[list[float]]:
    """A judge of the opposite opinion."""
    return [[100.0 - float(response.split()[0]), 0.0] for response in responses]


def test_what_is_drawn_does_not_depend_on_the_directions(evaluated: Any) -> None:
    """Groups are drawn apart, by keys that no direction enters; the same answers then serve other directions."""
    asked = evaluated("best-of-n", SCRIPT)[2]
    assert [request.key for request in asked[:2]] == [(42, "best-of-n", prompt_id(FIRST), group) for group in (0, 1)]
    assert {request.n for request in asked} == {3}
    other = changed(RECIPE, {"preference.low": -90.0})
    folder, _, again = evaluated("best-of-n", SCRIPT, other)
    assert again == asked
    # At (0, -1) the least verbose of each group.
    assert [row["response"] for row in answers(folder) if row["condition_index"] == 1] == [
        *("70 20", "40 10"),
        *("30 0", "10 10"),
    ]


# SteerLM's targets


@pytest.mark.parametrize(("quantile", "helpfulness"), [(1.0, 80.0), (0.75, 70.0), (0.5, 60.0)])
def test_the_helpfulness_asked_for_is_the_recipes_quantile_among_the_nearest(
    evaluated: Any, tmp_path: Path, quantile: float, helpfulness: float
) -> None:
    """One target of four answers: the median verbosity is 25, the nearest two have 80 and 40 of helpfulness."""
    rewards = [[60.0, 10.0], [80.0, 20.0], [40.0, 30.0], [90.0, 40.0]]
    ids = [prompt_id(p) for p in TRAINING]
    rated = [
        {"prompt_id": i, "messages": p, "response": "so", "source": "ultrafeedback", "labels": {}}
        for i, p in zip(ids, TRAINING, strict=True)
    ]
    scored = [
        {"prompt_id": i, "t": 0, "condition_index": 0, "sample": 0, "rewards": reward}
        for i, reward in zip(ids, rewards, strict=True)
    ]
    write_rows(tmp_path / "data" / "train" / "part-00000.parquet", rated, RATED)
    write_rows(tmp_path / "annotate" / "part-00000.parquet", scored, SCORES)
    recipe = changed(RECIPE, {"steerlm": {"template": "world-v1", "targets": 1, "quantile": quantile}})
    script = {"first": ["60 40", "50 50"], "second": ["70 30", "80 20"]}
    folder, _, _ = evaluated("targets", script, recipe, annotate=tmp_path / "annotate")
    assert {tuple(row["condition"]) for row in answers(folder)} == {(helpfulness, 25.0)}
    assert {row["condition_kind"] for row in answers(folder)} == {"target"}
