"""Reward targets: distinct as SteerLM reads them, whatever the annotated answers are like."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import MICRO
from dpalign.engines.engine import Answer, Request
from dpalign.paper.prompts import parse_condition, render_condition, stated_reward
from dpalign.recipe import Recipe, changed, load
from dpalign.rows import CANDIDATES, PROMPTS, RATED, SCORES, Message, prompt_id, read_rows, user_prompt, write_rows
from dpalign.runs.folder import Run
from dpalign.stages import sample as stages
from dpalign.stages.sample import shares
from dpalign.stages.stage import Job
from dpalign.stages.steerlm import condition_line, reward_targets
from dpalign.stages.training import Checkpoint

LABELS = load(MICRO, ["--steerlm.template", "steerlm"])
POINTS = load(MICRO, ["--steerlm.template", "steerlm-100-v1"])
WORLD = load(MICRO)


def lines(recipe: Recipe, target_VK: np.ndarray) -> list[str]:
    names = [f"objective-{k}" for k in range(target_VK.shape[1])]
    return [render_condition(dict(zip(names, r_K, strict=True)), recipe.steerlm.template) for r_K in target_VK]


def realistic(n: int = 2000) -> np.ndarray:
    """What a reward model says of answers: helpfulness near 65, verbosity near 45, with no two alike."""
    rng = np.random.default_rng(0)
    return np.column_stack([rng.normal(65, 10, n), rng.normal(45, 14, n)]).clip(0, 100)


@pytest.mark.parametrize("template", ["steerlm", "steerlm-100-v1", "world-v1"])
def test_what_a_line_states_is_what_it_reads_back_as(template: Any) -> None:
    for reward in (0.0, 19.9, 20.0, 55.4, 66.6, 100.0):
        stated = stated_reward(reward, template)
        assert parse_condition(render_condition({"verbosity": reward}, template), template) == {"verbosity": stated}


def test_a_line_can_say_in_words_too_how_verbose_an_answer_shall_be() -> None:
    """Three parts of 0-100 points, by the last objective; fitted points may lie beyond the ends."""
    recipe = load(MICRO, ["--preference.levels", '["Be short.", "Be brief.", "Be long."]'])
    asked = {verbosity: condition_line(recipe, (50, verbosity)) for verbosity in (-8, 33, 34, 66, 67, 104)}
    assert [line.rpartition(". ")[2] for line in asked.values()] == [
        *("Be short.", "Be short.", "Be brief.", "Be brief.", "Be long.", "Be long."),
    ]
    assert asked[34] == "helpfulness 50 verbosity 34. Be brief."
    assert condition_line(WORLD, (50, 34)) == "helpfulness 50 verbosity 34"


def test_labels_are_taken_once_each_with_the_helpfulness_that_goes_with_them() -> None:
    """Of 2,000 answers some have each label of verbosity: 16 targets are five lines, and so are five."""
    reward_NK = realistic()
    for count, quantile in ((16, 0.9), (5, 1.0)):
        found = reward_targets(LABELS, reward_NK, count, quantile)
        assert found[:, 1].tolist() == [10.0, 30.0, 50.0, 70.0, 90.0]
        assert len(set(lines(LABELS, found))) == 5
        for helpful, verbose in found:
            alike = reward_NK[[stated_reward(v, "steerlm") == verbose for v in reward_NK[:, 1]], 0]
            assert helpful == stated_reward(float(np.quantile(alike, quantile)), "steerlm")


def test_fewer_targets_than_labels_are_spread_and_a_label_that_no_answer_has_is_not_asked_for() -> None:
    assert reward_targets(LABELS, realistic(), 3, 1.0)[:, 1].tolist() == [10.0, 50.0, 90.0]
    assert reward_targets(LABELS, realistic(), 1, 1.0)[:, 1].tolist() == [50.0]
    reward_NK = np.array([[60.0, 52.0], [72.0, 48.0], [80.0, 71.0]])
    assert reward_targets(LABELS, reward_NK, 5, 1.0).tolist() == [[70.0, 50.0], [90.0, 70.0]]


def test_over_three_objectives_a_target_is_a_row_of_labels_that_occurs() -> None:
    reward_NK = np.column_stack([realistic(), realistic()[::-1, 1]])
    occur = {tuple(stated_reward(v, "steerlm") for v in row) for row in reward_NK[:, 1:]}
    found = reward_targets(LABELS, reward_NK, 6, 0.9)
    assert len(set(lines(LABELS, found))) == len(found) == 6
    assert {tuple(row) for row in found[:, 1:].tolist()} < occur
    assert len(reward_targets(LABELS, reward_NK, 1000, 0.9)) == len(occur)


def test_where_any_reward_can_be_stated_quantiles_are_and_only_equal_lines_are_left_out() -> None:
    reward_NK = realistic()
    found = reward_targets(WORLD, reward_NK, 16, 0.9)
    assert len(set(lines(WORLD, found))) == len(found) == 16
    assert found[:, 1] == pytest.approx(np.quantile(reward_NK[:, 1], (np.arange(16) + 0.5) / 16))
    alike = np.array([[50.0, 40.0 + i / 100] for i in range(50)] + [[60.0, 80.0]])  # all but one are read as 40
    assert [line.split()[-1] for line in lines(WORLD, reward_targets(WORLD, alike, 6, 1.0))] == ["40"]


def test_whole_points_tell_fig_4s_targets_apart_where_five_labels_cannot() -> None:
    """Fig. 4's SteerLM has five verbosities between 40 and 59: one label, and five lines in points."""
    verbosity = np.repeat(np.linspace(40, 59, 5), 100)
    reward_NK = np.column_stack([70 - np.arange(500) % 100 / 10, verbosity])
    assert reward_targets(LABELS, reward_NK, 5, 1.0).tolist() == [[70.0, 50.0]]
    found = reward_targets(POINTS, reward_NK, 5, 1.0)
    assert [line.rpartition(": ")[2] for line in lines(POINTS, found)] == [
        f"objective-0:70,objective-1:{v}" for v in (40, 45, 50, 54, 59)
    ]
    found = reward_targets(POINTS, realistic(), 16, 0.9)
    assert len(set(lines(POINTS, found))) == len(found) == 16


def test_answers_are_shared_as_evenly_as_can_be() -> None:
    assert shares(80, 16) == [5] * 16
    assert shares(80, 3) == [27, 27, 26]


class Echo:
    """An engine that answers by number."""

    def prompt_tokens(self, messages: Sequence[Message]) -> int:
        return len(messages)

    def sample(self, requests: Sequence[Request], *, temperature: float, max_new_tokens: int) -> Iterator[list[Answer]]:
        for request in requests:
            yield [Answer(f"{i}.", 2, True) for i in range(request.n)]


def first_sampling(
    recipe: Recipe, verbosities: Sequence[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[dict[str, Any]], list[Any]]:
    """pi_0 asked for 16 targets with 80 answers, of prompts whose original answers are so verbose: rows and ids."""
    recipe = changed(recipe, {"sampling.first": 80, "sampling.first_targets": 16, "sampling.prompts": 0})
    monkeypatch.setattr(stages, "checkpoint_of", Checkpoint)
    monkeypatch.setattr(stages, "open_reader", lambda recipe, policy: Echo())
    monkeypatch.setattr(stages, "open_engine", lambda recipe, policy, alone: Echo())
    asked = [user_prompt(f"question {i}") for i in range(len(verbosities))]
    rated = [
        {"prompt_id": prompt_id(p), "messages": p, "response": "so", "source": "ultrafeedback", "labels": {}}
        for p in asked
    ]
    scored = [
        {"prompt_id": prompt_id(p), "t": 0, "condition_index": 0, "sample": 0, "rewards": [v] * 5 + [60.0] * 5}
        for p, v in zip(asked, verbosities, strict=True)
    ]
    prompts = [{"prompt_id": prompt_id(p), "messages": p, "split": "D1"} for p in asked]
    write_rows(tmp_path / "data" / "train" / "part-00000.parquet", rated, RATED)
    write_rows(tmp_path / "data" / "prompts" / "part-00000.parquet", prompts, PROMPTS)
    write_rows(tmp_path / "annotate" / "part-00000.parquet", scored, SCORES)
    inputs = {"policy": tmp_path, "data": tmp_path / "data", "annotate": tmp_path / "annotate"}
    with Run.open(tmp_path / "run", None) as run:
        with run.stage("sample-1", 1, inputs, {}) as work:
            job = Job(recipe, work, inputs, 1, "D1", "targets")
            stages.sample.run(job)
            ids = stages.drawing(job).ids(0)
        return list(read_rows(tmp_path / "run" / "sample-1", CANDIDATES)), ids


def test_the_targets_there_are_share_the_first_answers_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels 1, 2 and 3 of verbosity occur: of 16 targets that are asked for there are 3, which share 80 answers."""
    rows, ids = first_sampling(LABELS, (31.0, 47.0, 73.0), tmp_path, monkeypatch)
    first = [row for row in rows if row["prompt_id"] == rows[0]["prompt_id"]]
    assert Counter(row["condition_index"] for row in first) == {0: 27, 1: 27, 2: 26}
    assert [tuple(row["condition"]) for row in first[::27]] == [(70.0, 30.0), (70.0, 50.0), (70.0, 70.0)]
    assert ids == [(row["prompt_id"], row["condition_index"], row["sample"]) for row in rows]
    assert "sample-1: 3 distinct reward targets, not 16" in (tmp_path / "run" / "log.txt").read_text()


def test_in_points_the_first_answers_are_asked_for_16_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five answers for each of 16, where the labels of the same answers are three."""
    rows, _ = first_sampling(POINTS, np.linspace(30, 75, 32).tolist(), tmp_path, monkeypatch)
    first = [row for row in rows if row["prompt_id"] == rows[0]["prompt_id"]]
    assert Counter(row["condition_index"] for row in first) == dict.fromkeys(range(16), 5)
    stated = [parse_condition(row["messages"][0]["content"], "steerlm-100-v1")["verbosity"] for row in first[::5]]
    assert stated == [round(row["condition"][1]) for row in first[::5]]
    assert len(set(stated)) == 16
