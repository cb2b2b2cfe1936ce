"""Which two answers make a pair: of rated answers and of scored candidates; what makes none is counted."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpalign.recipe import Recipe, changed, from_mapping
from dpalign.rows import CANDIDATES, HEADS, PAIRS, PROMPTS, RATED, SCORES, prompt_id, read_rows, user_prompt, write_rows
from dpalign.runs.folder import Tally
from dpalign.stages.pairs import pairs
from dpalign.stages.stage import Job

RATINGS = Recipe(name="test")
CANDIDATE_PAIRS = from_mapping(
    Recipe,
    {
        "name": "test",
        "heads": ["a", "b"],
        "objectives": {"helpfulness": ["a"], "verbosity": ["b"]},
        "dpo": {"pairs": "candidates"},
    },
)
FEW, ALIKE = "fewer than two answers", "the two score alike"


def rated(
    prompt: str, response: str, overall: float | None = None, aspects: tuple[float, ...] = (), source: str = "uf"
) -> dict[str, Any]:
    """An answer with its overall score and its four aspects, heads 5 and 6 to 9."""
    labels = dict(zip(HEADS[6:], aspects, strict=False)) | ({} if overall is None else {HEADS[5]: overall})
    messages = user_prompt(prompt)
    key = prompt_id(messages)
    return {"prompt_id": key, "messages": messages, "response": response, "source": source, "labels": labels}


def job(folder: Path, recipe: Recipe, inputs: dict[str, Path]) -> Job:
    work: Any = SimpleNamespace(folder=folder / "pairs", run=SimpleNamespace(log=print), tally=Tally())
    return Job(recipe, work, inputs)


def of_ratings(folder: Path, rows: list[dict[str, Any]], recipe: Recipe = RATINGS) -> Job:
    write_rows(folder / "data" / "train" / "part-00000.parquet", rows, RATED)
    return job(folder, recipe, {"data": folder / "data"})


def test_answers_preferred_without_a_rating_are_the_datas_own_pair(tmp_path: Path) -> None:
    """Ratings come first: the second prompt has both."""
    plain, both = user_prompt("boil an egg"), user_prompt("name a prime")
    rows = [rated("boil an egg", "no"), rated("boil an egg", "seven minutes")]
    rows += [rated("name a prime", "seven", 80.0), rated("name a prime", "eight", 10.0)]
    own = [
        {"prompt_id": prompt_id(asked), "messages": asked, "chosen": chosen, "rejected": rejected, "origin": "pairs"}
        for asked, chosen, rejected in ((plain, "seven minutes", "no"), (both, "eight", "seven"))
    ]
    write_rows(tmp_path / "data" / "pairs" / "part-00000.parquet", own, PAIRS)
    pairs.run(of_ratings(tmp_path, rows))
    found = read_rows(tmp_path / "pairs", PAIRS)
    assert {(row["chosen"], row["rejected"], row["chosen_score"], row["origin"]) for row in found} == {
        ("seven minutes", "no", None, "pairs"),
        ("seven", "eight", 80.0, "ratings"),
    }


def of_candidates(folder: Path, answers: list[tuple[str, str, list[float], bool]]) -> Job:
    """Candidates as (prompt, response, rewards, whether it was finished), drawn under a system line."""
    asked = {prompt_id(user_prompt(prompt)): user_prompt(prompt) for prompt, *_ in answers}
    candidates, scores = [], []
    for i, (prompt, response, rewards, finished) in enumerate(answers):
        key = {"prompt_id": prompt_id(user_prompt(prompt)), "t": 1, "condition_index": 0, "sample": i}
        scores.append(key | {"rewards": rewards})
        messages = [{"role": "system", "content": "as it was sampled"}, *user_prompt(prompt)]
        drawn = {"condition_kind": "target", "condition": [90.0, 50.0], "messages": messages}
        candidates.append(key | drawn | {"response": response, "tokens": 3, "finished": finished})
    prompts = [{"prompt_id": key, "messages": messages, "split": "D1"} for key, messages in asked.items()]
    write_rows(folder / "sample" / "part-00000.parquet", candidates, CANDIDATES)
    write_rows(folder / "score" / "part-00000.parquet", scores, SCORES)
    write_rows(folder / "data" / "prompts" / "part-00000.parquet", prompts, PROMPTS)
    places = {"data": "data", "candidates": "sample", "scores": "score"}
    return job(folder, CANDIDATE_PAIRS, {name: folder / place for name, place in places.items()})


def made(work: Job) -> list[dict[str, Any]]:
    pairs.run(work)
    return list(read_rows(work.out, PAIRS))


# Of ratings


def test_the_best_rated_answer_is_preferred_to_one_of_the_others_at_random(tmp_path: Path) -> None:
    """Each of the other three about a third of the time: 300 +- 4 standard deviations of 14."""
    scores = {"poor": 15.0, "best": 95.0, "fair": 55.0, "good": 85.0}
    rows = [rated(f"prompt {i}", text, score) for i in range(900) for text, score in scores.items()]
    work = of_ratings(tmp_path, rows)
    found = made(work)
    assert [row["messages"][0]["content"] for row in found] == [f"prompt {i}" for i in range(900)]
    for row in found:
        assert (row["chosen"], row["chosen_score"], row["origin"]) == ("best", 95.0, "ratings")
        assert row["rejected_score"] == scores[row["rejected"]]
        assert row["prompt_id"] == prompt_id(row["messages"])
    drawn = Counter(row["rejected"] for row in found)
    assert drawn.keys() == {"poor", "fair", "good"}
    assert all(244 < count < 356 for count in drawn.values())
    assert (work.work.tally.rows_in, work.work.tally.rows_out) == (900, 900)


def test_which_answer_is_rejected_depends_on_seed_and_prompt_alone(tmp_path: Path) -> None:
    rows = [rated(f"prompt {i}", f"{score}", float(score)) for i in range(40) for score in (10, 20, 30, 40)]
    rejected = {row["prompt_id"]: row["rejected"] for row in made(of_ratings(tmp_path / "all", rows))}
    some = {row["prompt_id"]: row["rejected"] for row in made(of_ratings(tmp_path / "some", rows[80:]))}
    assert len(some) == 20
    assert some.items() <= rejected.items()
    other = made(of_ratings(tmp_path / "seed", rows, changed(RATINGS, {"seed": 43})))
    assert {row["prompt_id"]: row["rejected"] for row in other} != rejected


def test_what_makes_no_pair_is_counted(tmp_path: Path) -> None:
    """Two answers rated alike; one answer; two of which one has no rating. The last prompt is the one pair."""
    rows = [
        rated("alike", "a", 50.0),
        rated("alike", "b", 50.0),
        rated("alone", "a", 90.0),
        rated("unrated", "a", 90.0),
        rated("unrated", "b"),
        rated("fine", "a", 40.0),
        rated("fine", "b", 60.0),
    ]
    work = of_ratings(tmp_path, rows)
    (row,) = made(work)
    assert (row["chosen"], row["rejected"]) == ("b", "a")
    tally = work.work.tally
    assert (tally.rows_in, tally.rows_out, tally.filtered) == (4, 1, {ALIKE: 1, FEW: 2})


def test_without_overall_scores_the_mean_aspect_decides(tmp_path: Path) -> None:
    """Means of 70 and 60; of an answer that lacks one aspect there is no mean."""
    uneven, even = (90.0, 70.0, 70.0, 50.0), (60.0, 60.0, 60.0, 60.0)
    partly: Any = (95.0, 95.0, 95.0, None)
    rows = [
        *(rated("both", "overall", 75.0, even), rated("both", "aspects", 65.0, uneven)),
        *(rated("one", "even", 95.0, even), rated("one", "uneven", None, uneven), rated("one", "-", None, partly)),
    ]
    both, one = made(of_ratings(tmp_path, rows))
    assert (both["chosen"], both["chosen_score"], both["rejected_score"]) == ("overall", 75.0, 65.0)
    assert (one["chosen"], one["rejected"]) == ("uneven", "even")
    assert (one["chosen_score"], one["rejected_score"]) == (70.0, 60.0)


def test_helpsteers_answers_make_no_pairs(tmp_path: Path) -> None:
    """They train the reward model alone (section 3.1)."""
    rows = [rated("x", "worst", 10.0), rated("x", "better", 20.0), rated("x", "best", 90.0, source="helpsteer")]
    (row,) = made(of_ratings(tmp_path, rows))
    assert (row["chosen"], row["rejected"]) == ("better", "worst")


def test_no_pair_at_all_is_an_error_that_says_why(tmp_path: Path) -> None:
    rows = [rated("alone", "a", 90.0), rated("alike", "a", 50.0), rated("alike", "b", 50.0)]
    with pytest.raises(ValueError, match=r"no pair is left of 2 prompts: 1 have fewer than two .* of 1 score alike"):
        pairs.run(of_ratings(tmp_path, rows))


# Of candidates


def test_the_most_helpful_candidate_is_preferred_to_the_least_whatever_their_verbosity(tmp_path: Path) -> None:
    answers = [("x", f"helps {help}", [help, verbosity], True) for help, verbosity in ((40.0, 90.0), (80.0, 5.0))]
    answers += [("x", "helps least", [10.0, 60.0], True)]
    (row,) = made(of_candidates(tmp_path, answers))
    assert (row["chosen"], row["rejected"]) == ("helps 80.0", "helps least")
    assert (row["chosen_score"], row["rejected_score"], row["origin"]) == (80.0, 10.0, "candidates")


def test_a_pair_of_candidates_has_the_plain_prompt(tmp_path: Path) -> None:
    """Not the system line that they were drawn under: DPO's policy is asked without one."""
    (row,) = made(of_candidates(tmp_path, [("x", "a", [1.0, 0.0], True), ("x", "b", [2.0, 0.0], True)]))
    assert row["messages"] == user_prompt("x")
    assert row["prompt_id"] == prompt_id(user_prompt("x"))


def test_a_candidate_that_was_cut_is_on_neither_side(tmp_path: Path) -> None:
    """The best and the worst of `x` were cut, and all but one of `y`; those of `z` score alike."""
    answers = [("x", f"{help}", [help, 0.0], help not in (10.0, 90.0)) for help in (10.0, 20.0, 30.0, 90.0)]
    answers += [("y", f"{help}", [help, 0.0], help == 10.0) for help in (10.0, 20.0)]
    answers += [("z", f"{i}", [50.0, float(i)], True) for i in range(3)]
    work = of_candidates(tmp_path, answers)
    (row,) = made(work)
    assert (row["chosen"], row["rejected"]) == ("30.0", "20.0")
    tally = work.work.tally
    assert (tally.rows_in, tally.rows_out, tally.filtered) == (3, 1, {FEW: 1, ALIKE: 1})


def test_pairs_of_candidates_need_candidates_and_their_scores(tmp_path: Path) -> None:
    work = of_candidates(tmp_path, [("x", "a", [1.0, 0.0], True)])
    without = replace(work, inputs={"data": work.inputs["data"]})
    with pytest.raises(
        ValueError, match=r'dpo\.pairs is "candidates", and the stage was given no candidates and no sco'
    ):
        pairs.run(without)
