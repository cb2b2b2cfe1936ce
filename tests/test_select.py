"""What the next policy learns: the best answer for each direction, never a cut one, and the replay."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from dpalign import cli
from dpalign import rows as records
from dpalign.chat import with_system_line
from dpalign.paper.direction import Cone, Preference
from dpalign.paper.prompts import render_preference
from dpalign.recipe import Recipe, changed, from_mapping
from dpalign.rows import (
    CANDIDATES,
    CONVERSATIONS,
    PROMPTS,
    RATED,
    SCORES,
    prompt_id,
    read_rows,
    read_table,
    user_prompt,
    write_rows,
)
from dpalign.runs.folder import Tally
from dpalign.stages.preference import Steering, directions_of, line
from dpalign.stages.select import replay, select
from dpalign.stages.stage import Job

RECIPE = from_mapping(
    Recipe,
    {
        "name": "test",
        "heads": ["a", "b"],
        "objectives": {"helpfulness": ["a"], "verbosity": ["b"]},
        "preference": {"directions": 3, "template": "world-v1"},
    },
)
ASKED = {half: [user_prompt(f"{half} prompt {i}") for i in range(20)] for half in ("D1", "D2")}


def candidate(prompt: Any, condition: int, sample: int, response: str, **changes: Any) -> dict[str, Any]:
    kind = changes.pop("kind", "direction")
    return {
        "prompt_id": prompt_id(prompt),
        "t": 2,
        "condition_index": condition,
        "sample": sample,
        "condition_kind": kind,
        "condition": [1.0, 0.0],
        "messages": [{"role": "system", "content": "as it was sampled"}, *prompt],
        "response": response,
        "tokens": 3,
        "finished": True,
    } | changes


def job(
    folder: Path, candidates: list[dict[str, Any]], rewards: list[list[float]], recipe: Recipe = RECIPE, t: int = 2
) -> Job:
    """A select job on answers and their rewards; every prompt has two original answers, `better` and `worse`.

    An answer of the kind `direction` was drawn under the direction of its prompt that its index says.
    """
    keys = ("prompt_id", "t", "condition_index", "sample")
    for row in candidates:
        if row["condition_kind"] == "direction":
            v_VK = directions_of(recipe.preference, len(recipe.objectives), recipe.seed, t, row["prompt_id"])
            row["condition"] = v_VK[row["condition_index"]].tolist()
    scores = [{k: row[k] for k in keys} | {"rewards": r} for row, r in zip(candidates, rewards, strict=True)]
    prompts = [{"prompt_id": prompt_id(p), "messages": p, "split": half} for half, all_ in ASKED.items() for p in all_]
    rated, annotation = [], []
    for prompt in prompts:
        for i, (text, reward) in enumerate((("worse", 20.0), ("better", 80.0))):
            rated.append(prompt | {"response": f"{text} {prompt['split']}", "source": "ultrafeedback", "labels": {}})
            annotation.append(
                {"prompt_id": prompt["prompt_id"], "t": 0, "condition_index": 0, "sample": i, "rewards": [reward, 50.0]}
            )
    for row in rated:
        del row["split"]
    for path, rows, schema in (
        ("sample/part-00000.parquet", candidates, CANDIDATES),
        ("score/part-00000.parquet", scores, SCORES),
        ("data/prompts/part-00000.parquet", prompts, PROMPTS),
        ("data/train/part-00000.parquet", rated, RATED),
        ("annotate/part-00000.parquet", annotation, SCORES),
    ):
        write_rows(folder / path, rows, schema)
    inputs = {
        "candidates": folder / "sample",
        "scores": folder / "score",
        "data": folder / "data",
        "annotate": folder / "annotate",
    }
    work: Any = SimpleNamespace(folder=folder / "select", run=SimpleNamespace(log=print), tally=Tally())
    return Job(recipe, work, inputs, t=t, half="D1")


def chosen(work: Job) -> list[dict[str, Any]]:
    select.run(work)
    return list(read_rows(work.out, CONVERSATIONS))


ONE = ASKED["D1"][0]
FIXED = {"preference.distribution": "fixed", "preference.directions": 2}
STEEP = changed(RECIPE, {"replay": 0.0, "preference.listed": [[1.0, 0.0], [0.6, -0.8]], **FIXED})
"""Directions (1, 0) and (0.6, -0.8), in one order or the other for each prompt."""


def of_direction(work: Job, prompt: Any = ONE) -> dict[tuple[float, ...], str]:
    """The answer chosen for each of the prompt's directions."""
    wanted_VK = directions_of(work.recipe.preference, 2, work.recipe.seed, work.t, prompt_id(prompt))
    told = {row["messages"][0]["content"]: row["response"] for row in chosen(work)}
    return {tuple(v_K): told.get(line(work.recipe, v_K), "none") for v_K in wanted_VK.round(6).tolist()}


def order(t: int) -> list[tuple[float, ...]]:
    v_VK = directions_of(STEEP.preference, 2, STEEP.seed, t, prompt_id(ONE))
    return [tuple(v_K) for v_K in v_VK.round(6).tolist()]


POOL = {"long": [90.0, 80.0], "short": [70.0, 20.0], "good": [80.0, 60.0], "poor": [30.0, 25.0]}
"""At (1, 0) they are worth 90, 70, 80, 30; at (0.6, -0.8): -10, 26, 0, -2."""


def test_a_direction_takes_the_best_of_its_own_answers_or_of_all_where_none_was_drawn_for_it(tmp_path: Path) -> None:
    """The first direction was given `long` and `short`, the second `good` and `poor`: it cannot take the others. Drawn
    under reward targets, as at first, no answer belongs to a direction."""
    for kind in ("direction", "target"):
        rows = [candidate(ONE, i // 2, i % 2, text, kind=kind) for i, text in enumerate(POOL)]
        best = of_direction(job(tmp_path / kind, rows, list(POOL.values()), STEEP))
        first, second = order(2)
        own = {(1.0, 0.0): ("long", "good"), (0.6, -0.8): ("short", "good")}
        whole = {(1.0, 0.0): "long", (0.6, -0.8): "short"}
        assert best == (whole if kind == "target" else {first: own[first][0], second: own[second][1]})


PROMPT = {"selection.reach": 180.0}
POOLED = changed(STEEP, PROMPT)


def other_directions(folder: Path, recipe: Recipe) -> Job:
    """Answers drawn under (1, 0) and (0.6, -0.8), and a recipe that now asks for others."""
    rows = [candidate(ONE, i // 2, i % 2, text) for i, text in enumerate(POOL)]
    work = job(folder, rows, list(POOL.values()), STEEP)
    return replace(work, recipe=recipe)


def test_no_answer_is_kept_twice_where_the_recipe_says_so(tmp_path: Path) -> None:
    """At (0.8, -0.6) the pool is worth 24, 44, 28, 9 and at (0.6, -0.8) `short` is the best as well: the direction that
    comes second takes the next best, `good`."""
    twice = changed(POOLED, {"preference.listed": [[0.8, -0.6], [0.6, -0.8]]})
    assert set(of_direction(other_directions(tmp_path / "a", twice)).values()) == {"short"}
    once = changed(twice, {"selection.distinct": True})
    assert sorted(of_direction(other_directions(tmp_path / "b", once)).values()) == ["good", "short"]


def test_directions_that_the_answers_were_not_drawn_under_are_refused_or_served_from_the_pool(tmp_path: Path) -> None:
    """At (0, -1) the shortest is the best, wherever it was drawn."""
    other = changed(STEEP, {"preference.listed": [[1.0, 0.0], [0.0, -1.0]]})
    advice = r"row \d was drawn under \[.*\], and direction \d .* is \[.*\]; .* set selection.reach to 180"
    with pytest.raises(ValueError, match=advice) as error:
        select.run(other_directions(tmp_path / "a", other))
    assert str(tmp_path / "a" / "sample" / "part-00000.parquet") in str(error.value)
    served = of_direction(other_directions(tmp_path / "b", changed(other, PROMPT)))
    assert served == {(1.0, 0.0): "long", (0.0, -1.0): "short"}


@pytest.mark.parametrize(("directions", "objectives"), [(1, 2), (5, 2), (2, 3)])
def test_another_number_of_directions_or_objectives_needs_the_pool(
    tmp_path: Path, directions: int, objectives: int
) -> None:
    heads = {"helpfulness": ["a"], "verbosity": ["b"], "third": ["a"]}
    knobs = {"preference.distribution": "sphere", "preference.directions": directions}
    other = changed(STEEP, {"objectives": dict(list(heads.items())[:objectives]), **knobs})
    with pytest.raises(ValueError, match=rf"{directions if objectives == 2 else 3}.*; .* set selection.reach to 180"):
        select.run(other_directions(tmp_path / "a", other))
    work = other_directions(tmp_path / "b", changed(other, PROMPT))
    assert len(chosen(work)) == directions


def test_an_answer_serves_the_directions_within_reach_of_its_own(tmp_path: Path) -> None:
    """Directions at 0, -36.87 and -90 degrees have an answer each, worth 90, 70, 99 at 0 degrees, 60, 38, 22.2
    at -36.87 and -20, -30, -95 at -90."""
    listed = {"preference.listed": [[1.0, 0.0], [0.8, -0.6], [0.0, -1.0]], "preference.directions": 3}
    recipe = changed(STEEP, listed)
    wanted_VK = directions_of(recipe.preference, 2, recipe.seed, 2, prompt_id(ONE)).round(6).tolist()
    answers = {(1.0, 0.0): [90.0, 20.0], (0.8, -0.6): [70.0, 30.0], (0.0, -1.0): [99.0, 95.0]}
    rows = [candidate(ONE, v, 0, f"{wanted_VK[v]}") for v in range(3)]
    rewards = [answers[tuple(v_K)] for v_K in wanted_VK]
    own, helps, brief = "[1.0, 0.0]", "[0.8, -0.6]", "[0.0, -1.0]"
    for reach, expected in (
        (0.0, (own, helps, brief)),
        (36.8, (own, helps, brief)),
        (36.9, (own, own, brief)),
        (53.2, (own, own, helps)),
        (90.0, (brief, own, own)),
        (180.0, (brief, own, own)),
    ):
        work = job(tmp_path / f"{reach}", rows, rewards, changed(recipe, {"selection.reach": reach}))
        assert tuple(of_direction(work)[v_K] for v_K in answers) == expected


def test_neighbours_of_three_objectives_are_those_within_an_angle(tmp_path: Path) -> None:
    """`middle` was drawn 45 degrees from `first` and from `third`, and these 90 degrees apart."""
    drawn = {"first": (1.0, 0.0, 0.0), "middle": (0.5**0.5, 0.5**0.5, 0.0), "third": (0.0, 1.0, 0.0)}
    worth = {"first": [80.0, 0.0], "middle": [10.0, 10.0], "third": [90.0, 5.0]}
    knobs = {"objectives": {"a": ["a"], "b": ["b"], "c": ["b"]}, "preference.directions": 3, "selection.reach": 46.0}
    recipe = changed(STEEP, {**knobs, "preference.listed": list(map(list, drawn.values()))})
    v_VK = directions_of(recipe.preference, 3, recipe.seed, 2, prompt_id(ONE))
    names = [min(drawn, key=lambda name: np.abs(v_K - drawn[name]).sum()) for v_K in v_VK]
    work = job(
        tmp_path, [candidate(ONE, v, 0, name) for v, name in enumerate(names)], [worth[n] for n in names], recipe
    )
    told = {row["messages"][0]["content"]: row["response"] for row in chosen(work)}
    served = {name: told[line(recipe, v_K)] for name, v_K in zip(names, v_VK, strict=True)}
    assert served == {"first": "first", "middle": "third", "third": "middle"}


def test_a_reach_needs_answers_drawn_under_as_many_objectives(tmp_path: Path) -> None:
    three = {"objectives": {"helpfulness": ["a"], "verbosity": ["b"], "third": ["a"]}}
    other = changed(STEEP, {**three, "preference.distribution": "sphere", "selection.reach": 20.0})
    with pytest.raises(ValueError, match=r"of 2 objectives, and the recipe has 3; .* set selection.reach to 180"):
        select.run(other_directions(tmp_path, other))


ARC = changed(RECIPE, {"replay": 0.0, "selection.rule": "hindsight", "selection.reach": 180.0})


def degrees_of(rows: list[dict[str, Any]], recipe: Recipe) -> dict[str, float]:
    """The angle under which each answer is learned, to the half of a degree."""
    spoken = {line(recipe, [np.cos(a), np.sin(a)]): np.degrees(a) for a in np.radians(np.arange(-90, 0.5, 0.5))}
    return {row["response"]: spoken[row["messages"][0]["content"]] for row in rows}


def test_in_hindsight_each_answer_is_learned_under_the_direction_that_it_serves_best(tmp_path: Path) -> None:
    """`long` and `short` are alike where 20 cos a = 60 sin a, at -18.43 degrees: they have 60.1, and `good` has 56.9.
    So `long` wins from 0 to there, `short` from there to -45."""
    rows = [candidate(ONE, i // 2, i % 2, text) for i, text in enumerate(POOL)]
    work = job(tmp_path, rows, list(POOL.values()), ARC)
    assert degrees_of(chosen(work), ARC) == pytest.approx({"long": -18.43 / 2, "short": -(18.43 + 45) / 2}, abs=0.6)
    assert work.work.tally.filtered["not the best"] == 2


def test_in_hindsight_answers_compete_within_reach_of_where_they_were_drawn(tmp_path: Path) -> None:
    """Drawn at 0 and at -40 degrees: within 10, `poor` meets no rival from -30 on, and it wins there to -45."""
    listed = [[1.0, 0.0], [np.cos(np.radians(40)), -np.sin(np.radians(40))]]
    drawn = changed(STEEP, {"preference.listed": listed})
    v_VK = directions_of(drawn.preference, 2, drawn.seed, 2, prompt_id(ONE))
    rows = [candidate(ONE, v, 0, "long" if v_K[0] == 1 else "poor") for v, v_K in enumerate(v_VK)]
    rewards = [POOL[row["response"]] for row in rows]
    near = changed(ARC, {"selection.reach": 10.0})
    work = replace(job(tmp_path, rows, rewards, drawn), recipe=near)
    assert degrees_of(chosen(work), near) == pytest.approx({"long": -5.0, "poor": -37.5}, abs=0.6)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"selection.rule": "hindsight"}, r"selection.*reach 0.*set reach = 180"),
        ({"selection.rule": "hindsight", "selection.reach": 180.0, "selection.distinct": True}, "leave distinct out"),
        ({"selection.pool": "prompt"}, r"selection\.pool is gone.*reach = 180"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(RECIPE, knobs)


def test_degenerate_answers_are_left_out_and_counted_where_the_recipe_says_so(tmp_path: Path) -> None:
    """The best at (1, 0) says a sentence twice; a cut answer that does so too counts as cut."""
    echo = "it is a hot drink. it is a hot drink."
    rows = [candidate(ONE, i // 2, i % 2, text, kind="target") for i, text in enumerate(POOL)]
    rows[0]["response"] = echo
    rows.append(candidate(ONE, 2, 0, echo, kind="target", finished=False))
    rewards = [*POOL.values(), [99.0, 0.0]]
    kept = job(tmp_path / "kept", rows, rewards, STEEP)
    assert of_direction(kept)[(1.0, 0.0)] == echo
    assert kept.work.tally.filtered["degenerate"] == 0
    for rule in ({}, {"selection.rule": "hindsight", "selection.reach": 180.0}):
        work = job(tmp_path / f"{len(rule)}", rows, rewards, changed(STEEP, {"selection.degenerate": False, **rule}))
        assert of_direction(work) == {(1.0, 0.0): "good", (0.6, -0.8): "short"}
        assert work.work.tally.filtered["degenerate"] == 1
        assert work.work.tally.filtered["cut at max_new_tokens, or empty"] == 1
        assert not work.work.tally.warnings


def test_nothing_but_degenerate_answers_is_an_error_that_says_so(tmp_path: Path) -> None:
    echo = "it is a hot drink. it is a hot drink."
    work = job(tmp_path, [candidate(ONE, 0, 0, echo, kind="target")], [[1.0, 1.0]], STEEP)
    with pytest.raises(ValueError, match=r"no answer of 1 is left .* 1 are degenerate"):
        select.run(replace(work, recipe=changed(STEEP, {"selection.degenerate": False})))


@pytest.mark.parametrize("knobs", [{}, PROMPT, {**PROMPT, "selection.distinct": True}])
def test_the_choice_by_columns_is_that_of_one_prompt_after_another(tmp_path: Path, knobs: dict[str, Any]) -> None:
    """Ragged pools of prompts that come in turns, a third of the answers cut, some prompts with none left."""
    rng = np.random.default_rng(0)
    recipe = changed(RECIPE, {"replay": 0.0, **knobs})
    selection = recipe.selection
    rows, rewards = [], []
    for p in ASKED["D1"]:
        for v in range(3):
            for n in range(rng.integers(1, 5)):
                finished = bool(rng.random() < 0.66) and p is not ASKED["D1"][7]
                rows.append(candidate(p, v, n, f"{v} {n} of {p[0]['content']}", finished=finished))
                rewards.append(rng.uniform(0, 100, 2).round(2).tolist())
    order = rng.permutation(len(rows))
    rows, rewards = [rows[i] for i in order], [rewards[i] for i in order]
    expected = []
    for key in dict.fromkeys(row["prompt_id"] for row in rows):
        left = [i for i, row in enumerate(rows) if row["prompt_id"] == key and row["finished"]]
        for v, (x, y) in enumerate(directions_of(recipe.preference, 2, recipe.seed, 2, key)):
            mine = [i for i in left if selection.reach == 180 or rows[i]["condition_index"] == v]
            if mine and not selection.distinct:
                best = max(mine, key=lambda i: np.float32(rewards[i][0]) * x + np.float32(rewards[i][1]) * y)
                expected.append(rows[best]["response"])
        if selection.distinct:
            v_VK = directions_of(recipe.preference, 2, recipe.seed, 2, key)
            served, best_of_all = linear_sum_assignment(-v_VK @ np.float32([rewards[i] for i in left]).reshape(-1, 2).T)
            assert len(served) == min(len(left), len(v_VK))
            expected += [rows[left[i]]["response"] for i in best_of_all]
    assert [row["response"] for row in chosen(job(tmp_path, rows, rewards, recipe))] == expected
    assert len(expected) > 40


def test_scored_answers_are_ranked_anew_from_the_command_line(tmp_path: Path) -> None:
    """`dpa select` on finished files, with other objectives and directions than a run's: nothing is sampled or scored.

    Who wants the most of head b gets `long` (80), who wants the least of it `short` (20).
    """
    work = other_directions(tmp_path / "files", POOLED)
    file = tmp_path / "mine.toml"
    file.write_text(STEEP.to_toml())
    words = [word for name, path in work.inputs.items() for word in (f"--{name}", str(path))]
    words += ["--t", "2", "--half", "D1", "--selection.reach", "180", "--replay", "0"]
    words += ["--objectives", '{b = ["b"], a = ["a"]}', "--preference.listed", "[[1, 0], [-1, 0]]"]
    cli.main(["select", str(file), "--out", str(tmp_path / "anew"), *words])
    rows = list(read_rows(tmp_path / "anew", CONVERSATIONS))
    said = {row["messages"][0]["content"]: row["response"] for row in rows}
    assert sorted(said.values()) == ["long", "short"]
    names = ("b", "a")
    template = STEEP.preference.template
    for v_K, response in (([1.0, 0.0], "long"), ([-1.0, 0.0], "short")):
        assert said[render_preference(Preference.from_vector(v_K, names), template)] == response


def test_many_rows_are_written_in_parts_that_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 rows in parts of 25."""
    whole = chosen(many(tmp_path / "whole"))
    monkeypatch.setattr(records, "PART", 25)
    work = many(tmp_path / "parts")
    assert chosen(work) == whole
    assert [read_table(path, CONVERSATIONS).num_rows for path in sorted(work.out.iterdir())] == [25, 25, 10]


@pytest.mark.parametrize("kind", ["target", "direction"])
def test_an_answer_that_was_cut_is_never_chosen_and_counted(tmp_path: Path, kind: str) -> None:
    """Cut are the best of all, and at t >= 2 all that the second direction has: it goes without."""
    cut = ("long", "good", "poor")
    rows = [candidate(ONE, i // 2, i % 2, text, kind=kind, finished=text not in cut) for i, text in enumerate(POOL)]
    work = job(tmp_path, rows, list(POOL.values()), STEEP)
    first, second = order(2)
    assert of_direction(work) == {first: "short", second: "short" if kind == "target" else "none"}
    assert work.work.tally.filtered["cut at max_new_tokens, or empty"] == 3


def test_nothing_but_cut_answers_is_an_error_that_says_how_many(tmp_path: Path) -> None:
    rows = [candidate(ONE, i % 3, i // 3, text, finished=False) for i, text in enumerate(POOL)]
    with pytest.raises(
        ValueError, match=r"no answer of 4 is left .* 4 are empty or were cut at sampling.max_new_tokens"
    ):
        select.run(job(tmp_path, rows, list(POOL.values())))


def many(folder: Path, recipe: Recipe = RECIPE) -> Job:
    """17 prompts of D1 with one answer for each of three directions: 51 rows to select."""
    rows = [candidate(p, v, 0, f"answer {v}") for p in ASKED["D1"][:17] for v in range(3)]
    return job(folder, rows, [[50.0, 50.0]] * len(rows), recipe)


def test_degenerate_answers_among_the_chosen_are_warned_of(tmp_path: Path) -> None:
    """Of 51 chosen answers 17 say a sentence twice; with 3 of 51 it is no more than what is borne."""
    echo = "it is a hot drink. it is a hot drink."
    for name, echoing, warned in (("many", 17, 1), ("few", 3, 0)):
        rows = [candidate(p, v, 0, f"answer {v}") for p in ASKED["D1"][:17] for v in range(3)]
        rows = [row | {"response": echo} if i < echoing else row for i, row in enumerate(rows)]
        work = job(tmp_path / name, rows, [[50.0, 50.0]] * len(rows))
        chosen(work)
        said = [text for text in work.work.tally.warnings if "degenerate" in text]
        assert len(said) == warned
        assert all(f"{echoing} of 51 " in text for text in said)


def test_an_objective_that_tells_no_answers_to_a_prompt_apart_is_warned_of(tmp_path: Path) -> None:
    """Of five prompts with two finished answers, helpfulness tells those of one apart, verbosity those of three."""
    rows, rewards = [], []
    for i, p in enumerate(ASKED["D1"][:5]):
        for n in range(3):
            rows.append(candidate(p, 0, n, f"answer {n}", kind="target", finished=n < 2))
            rewards.append([50.0 + n * (i < 1 or n == 2), 20.0 + n * (i < 3)])  # the unfinished one counts for nothing
    work = job(tmp_path, rows, rewards, STEEP)
    chosen(work)
    assert [("helpfulness" in text, "4 of 5 prompts" in text) for text in work.work.tally.warnings] == [(True, True)]


def test_replay_is_15_percent_of_all_rows_and_of_the_current_half(tmp_path: Path) -> None:
    """51 selected and 9 replayed are 60 rows; each replayed prompt comes once, with its better answer, unsteered."""
    rows = chosen(many(tmp_path))
    assert Counter(row["origin"] for row in rows) == {"selected": 51, "replay": 9}
    replayed = [row for row in rows if row["origin"] == "replay"]
    assert {row["prompt_id"] for row in replayed} <= {prompt_id(p) for p in ASKED["D1"]}
    assert len({row["prompt_id"] for row in replayed}) == 9
    assert {row["response"] for row in replayed} == {"better D1"}
    assert {message["role"] for row in replayed for message in row["messages"]} == {"user"}


def test_another_share_of_replay_and_none(tmp_path: Path) -> None:
    half = Counter(row["origin"] for row in chosen(many(tmp_path / "half", changed(RECIPE, {"replay": 0.5}))))
    assert half == {"selected": 51, "replay": 51}  # of 20 prompts: each comes again
    assert {row["origin"] for row in chosen(many(tmp_path / "none", changed(RECIPE, {"replay": 0.0})))} == {"selected"}
    work = many(tmp_path / "again")
    repeated = Counter(row["prompt_id"] for row in replay(work, 340))  # 60 of 20 prompts
    assert set(repeated.values()) == {3}
    assert [row["prompt_id"] for row in replay(work, 51)] != [
        row["prompt_id"] for row in replay(replace(work, t=3), 51)
    ]


def test_a_selected_row_is_the_bare_prompt_with_its_own_direction(tmp_path: Path) -> None:
    """Not the system line under which it was sampled."""
    work = many(tmp_path)
    rows = [row for row in chosen(work) if row["origin"] == "selected"]
    wanted_VK = directions_of(RECIPE.preference, 2, RECIPE.seed, 2, prompt_id(ONE))
    for v_K, row in zip(wanted_VK, rows[:3], strict=True):
        assert row["messages"] == with_system_line(ONE, line(RECIPE, v_K), "zephyr")
    assert len({row["messages"][0]["content"] for row in rows}) > 10


def test_a_prompts_directions_depend_on_seed_iteration_and_prompt_alone() -> None:
    first = directions_of(RECIPE.preference, 2, 42, 1, "p")
    np.testing.assert_array_equal(first, directions_of(RECIPE.preference, 2, 42, 1, "p"))
    others = [directions_of(RECIPE.preference, 2, *key) for key in ((43, 1, "p"), (42, 2, "p"), (42, 1, "q"))]
    assert not any(np.array_equal(first, other) for other in others)


def test_a_margin_widens_what_is_trained_on_and_not_what_users_ask_for() -> None:
    wide = changed(RECIPE, {"preference.margin": 10.0}).preference
    v_VK = np.concatenate([directions_of(wide, 2, 42, 1, str(i)) for i in range(400)])
    degrees_V = np.degrees(np.arctan2(v_VK[:, 1], v_VK[:, 0]))
    assert -55 <= degrees_V.min() < -54
    assert 9 < degrees_V.max() <= 10
    assert wide.population(2) == RECIPE.preference.population(2)


def test_a_margin_widens_a_cone_all_round() -> None:
    cone = Steering(distribution="cone", center=(2.0, -3.0, 1.0), angle=15.0, margin=10.0)
    v_VK = np.concatenate([directions_of(cone, 3, 42, 1, str(i)) for i in range(400)])
    degrees_V = np.degrees(np.arccos(v_VK @ np.array([2.0, -3.0, 1.0]) / math.sqrt(14.0)))
    assert 24 < degrees_V.max() <= 25
    assert cone.population(3) == Cone((2.0, -3.0, 1.0), 15.0)


def rotated(folder: Path) -> None:
    rows = list(read_rows(folder / "score" / "part-00000.parquet", SCORES))
    write_rows(folder / "score" / "part-00000.parquet", rows[1:] + rows[:1], SCORES)


def of_fewer_shards(folder: Path) -> None:
    write_rows(folder / "sample" / "part-00001.parquet", [candidate(ONE, 0, 0, "late")], CANDIDATES)


def without_a_score(folder: Path) -> None:
    rows = list(read_rows(folder / "score" / "part-00000.parquet", SCORES))
    rows[1]["rewards"] = [50.0, float("nan")]
    write_rows(folder / "score" / "part-00000.parquet", rows, SCORES)


def annotated_elsewhere(folder: Path) -> None:
    path = folder / "annotate" / "part-00000.parquet"
    write_rows(path, list(read_rows(path, SCORES))[2:], SCORES)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (rotated, r"score/part-00000\.parquet.*run the score stage on these answers again"),
        (of_fewer_shards, r"score: 1 shards of scores for 2 of .*sample; run the score stage"),
        (without_a_score, r"score.*row 1\b.*nan"),
        (annotated_elsewhere, r"annotat.*; run the annotate stage again"),
    ],
)
def test_scores_that_are_not_those_of_the_answers_are_refused(
    tmp_path: Path, harm: Callable[[Path], None], message: str
) -> None:
    work = many(tmp_path)
    harm(tmp_path)
    with pytest.raises(ValueError, match=message):
        select.run(work)


def test_what_answered_without_a_direction_learns_without_one(tmp_path: Path) -> None:
    """Scalar rejection sampling at (0.6, -0.8): 0.6 * 60 - 0.8 * 20 = 20 beats 0.6 * 80 - 0.8 * 60 = 0."""
    recipe = changed(STEEP, {"preference.listed": [[0.6, -0.8]], "preference.directions": 1})
    answers = [candidate(ONE, 0, i, text, kind="plain") for i, text in enumerate(("long", "short"))]
    (row,) = chosen(job(tmp_path, answers, [[80.0, 60.0], [60.0, 20.0]], recipe))
    assert row["response"] == "short"
    assert row["messages"] == ONE
