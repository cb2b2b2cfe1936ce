"""The world: what can be said, what it is worth, and the best that can be reached."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from dpalign.data.ratings import read_rated
from dpalign.measure.bootstrap import Bootstrap
from dpalign.measure.control import control, regret
from dpalign.measure.hypervolume import hypervolume
from dpalign.measure.points import Rewards
from dpalign.measure.system import System
from dpalign.paper.direction import Arc, evaluation_grid, rng_for
from dpalign.paper.objectives import Objective, read_objectives
from dpalign.rows import HEADS
from dpalign.world.corpus import documents
from dpalign.world.files import write_world
from dpalign.world.language import FILLERS, Claim, Task, fact, read_answer, read_prompt, say, say_prompt
from dpalign.world.optimum import best_answer, faultless_is_best, optimal_rewards
from dpalign.world.people import RATED_STYLES, ROLES, STYLES, draw_tasks, rate, role_of, write_answer
from dpalign.world.truth import WORDS_AT_FULL_VERBOSITY, read, score, true_rewards

FOX_AND_TEA = Task("explain", ("fox", "tea", "iron"))
GRID = evaluation_grid(Arc(), 10)
SENSES = np.array([1.0, -1.0])


def test_a_prompt_reads_back_as_its_task() -> None:
    assert say_prompt(FOX_AND_TEA) == "explain fox, tea and iron."
    assert read_prompt("explain fox, tea and iron.") == FOX_AND_TEA


@pytest.mark.parametrize("text", ["explain fox, unicorn and iron.", "why?", "explain fox and fox."])
def test_another_prompt_is_refused_and_shown(text: str) -> None:
    with pytest.raises(ValueError, match="not a prompt of this world") as error:
        read_prompt(text)
    assert text in str(error.value)


def test_an_answer_reads_back_as_its_sentences() -> None:
    sentences = [fact("fox", detailed=True), FILLERS[0], Claim("tea", "red")]
    text = say(sentences)
    assert text == "fox is red and hunts mice. that is a good question. tea is red."
    assert read_answer(text) == sentences


def test_a_full_answer_is_perfectly_helpful_and_an_empty_one_worthless() -> None:
    full = read(FOX_AND_TEA, say([fact(thing, detailed=True) for thing in FOX_AND_TEA.things]))
    assert full.helpfulness == pytest.approx(100)
    assert full.verbosity == pytest.approx(100 * 18 / WORDS_AT_FULL_VERBOSITY)
    assert read(FOX_AND_TEA, "").helpfulness == 0


def test_earlier_things_matter_more() -> None:
    """Weights 1, 0.6, 0.36 over 1.96; `explain` gives half of each to the trait."""
    first, last = read(FOX_AND_TEA, "fox is red."), read(FOX_AND_TEA, "iron is hard.")
    assert first.quality == pytest.approx(0.5 / 1.96)
    assert last.quality == pytest.approx(0.5 * 0.36 / 1.96)


def test_each_fault_spoils_its_own_aspect() -> None:
    by_head = {
        answer: dict(zip(HEADS, true_rewards(FOX_AND_TEA, answer), strict=True))
        for answer in ("fox is red.", "fox is red. tea is red.", "fox is red. owl is wise.", "fox is red. fox is red.")
    }
    clean, wrong, stray, repeated = by_head.values()
    quality = clean["ultrafeedback-instruction_following"]
    assert clean["ultrafeedback-truthfulness"] == clean["ultrafeedback-honesty"] == quality
    assert wrong["ultrafeedback-truthfulness"] == pytest.approx(quality / 2)
    assert stray["ultrafeedback-honesty"] == pytest.approx(quality / 2)
    assert repeated["ultrafeedback-helpfulness"] == pytest.approx(quality / 2)
    assert clean["helpsteer-verbosity"] == pytest.approx(100 * 3 / WORDS_AT_FULL_VERBOSITY)


def test_the_helpfulness_objective_is_the_mean_of_the_four_aspects() -> None:
    answer = "fox is red. tea is red. there is much to say. iron is hard. iron is hard."
    aspects = score([say_prompt(FOX_AND_TEA)], [answer])[0, 6:10]
    assert aspects.mean() == pytest.approx(read(FOX_AND_TEA, answer).helpfulness, rel=1e-5)


def test_raters_see_answers_that_take_one_thing_for_another() -> None:
    """Of the claims of `mistaking` 0.35 are about something else, and no more claims are made than things are asked."""
    rng = rng_for(5, "mistakes")
    tasks = draw_tasks("ultrafeedback", 400, rng)
    answers = [write_answer(task, RATED_STYLES["mistaking"], rng) for task in tasks]
    about = [c.thing in task.things for task, a in zip(tasks, answers, strict=True) for c in a if isinstance(c, Claim)]
    assert np.mean(about) == pytest.approx(0.65, abs=0.05)
    said = [len({s.thing for s in a if isinstance(s, Claim)}) for a in answers]
    assert np.mean([n > len(task.things) for n, task in zip(said, tasks, strict=True)]) < 0.05  # strays alone add one


def test_no_answer_of_up_to_four_sentences_beats_the_optimum() -> None:
    """Brute force over claims right and wrong, on and off the task, fillers and repetitions."""
    task = Task("sketch", ("fox", "tea"))
    sentences = [
        *(fact(thing, detailed) for thing in ("fox", "tea", "owl") for detailed in (False, True)),
        Claim("fox", "hot"),
        Claim("tea", "hot", "hunts mice"),
        FILLERS[0],
    ]
    answers = [say(chosen) for n in range(5) for chosen in itertools.product(sentences, repeat=n)]
    readings = [read(task, answer) for answer in answers]
    reward_NK = np.array([[r.helpfulness, r.verbosity] for r in readings])
    best_VK = optimal_rewards([task], GRID)[0]
    for v_K, best_K in zip(GRID, best_VK, strict=True):
        assert (reward_NK @ v_K).max() == pytest.approx(v_K @ best_K)
        said = read(task, best_answer(task, v_K))
        assert [said.helpfulness, said.verbosity] == pytest.approx(best_K.tolist())


def objectives_of(*heads: str) -> list[Objective]:
    """One objective a HelpSteer head, by its short name."""
    return [Objective(head, (f"helpsteer-{head}",)) for head in heads]


@pytest.mark.parametrize(
    ("objectives", "direction"),
    [
        (objectives_of("complexity", "verbosity"), (0.8, -0.6)),
        (objectives_of("helpfulness", "complexity", "verbosity"), (0.6, 0.6, -0.5)),
        (objectives_of("helpfulness", "complexity", "correctness"), (0.1, 0.2, 0.9)),
        (objectives_of("coherence", "correctness"), (1.0, 0.0)),
    ],
)
def test_where_no_fault_pays_a_faultless_answer_is_the_best_of_all_by_any_objectives(
    objectives: list[Objective], direction: tuple[float, ...]
) -> None:
    task = Task("sketch", ("fox", "tea"))
    v_K = np.array(direction) / np.linalg.norm(direction)
    assert faultless_is_best(v_K[None], objectives)
    sentences = [
        fact("fox"),
        fact("fox", True),
        fact("tea"),
        fact("tea", True),
        Claim("tea", "cold"),
        FILLERS[0],
        "yes",
    ]
    answers = [say(chosen) for n in range(4) for chosen in itertools.product(sentences, repeat=n)]
    reward_NK = read_objectives([true_rewards(task, answer) for answer in answers], HEADS, objectives)
    best_K = optimal_rewards([task], v_K[None], objectives)[0, 0]
    assert (reward_NK @ v_K).max() == pytest.approx(v_K @ best_K)
    said = true_rewards(task, best_answer(task, v_K, objectives))
    assert read_objectives([said], HEADS, objectives)[0] == pytest.approx(best_K)


@pytest.mark.parametrize(
    ("objectives", "direction", "answer"),
    [
        (objectives_of("helpfulness", "verbosity"), (0.2, 0.98), "fox is red and hunts mice. tea is hot. " * 4),
        (objectives_of("correctness", "verbosity"), (0.7, -0.7), "yes."),
        (
            objectives_of("complexity", "coherence"),
            (0.9, -0.4),
            "fox is red and hunts mice. tea is hot and calms people. " * 9,
        ),
    ],
)
def test_where_a_fault_pays_no_plan_is_called_the_best(
    objectives: list[Objective], direction: tuple[float, ...], answer: str
) -> None:
    """Repeating gives more words and less coherence; a single word is as correct as any answer."""
    task = Task("sketch", ("fox", "tea"))
    v_K = np.array(direction) / np.linalg.norm(direction)
    assert not faultless_is_best(v_K[None], objectives)
    earned = read_objectives([true_rewards(task, answer)], HEADS, objectives)[0] @ v_K
    assert earned > v_K @ optimal_rewards([task], v_K[None], objectives)[0, 0] + 1


def test_heads_are_read_by_name_whatever_their_order() -> None:
    heads = ("kind", "helpsteer-verbosity", "helpsteer-complexity")
    tasks = draw_tasks("test", 20, rng_for(0, "order"))
    by_index = [Objective("complexity", ("2",)), Objective("verbosity", ("1",))]
    front_VK = optimal_rewards(tasks, GRID, by_index, heads).mean(axis=0)
    by_name_PVK = optimal_rewards(tasks, GRID, objectives_of("complexity", "verbosity"))
    assert front_VK == pytest.approx(by_name_PVK.mean(axis=0))
    assert front_VK[0, 0] == pytest.approx(100)  # all that is asked for in detail, where words cost nothing
    assert faultless_is_best(GRID, by_index, heads)


def test_the_best_verbosity_falls_by_two_points_at_each_of_ten_directions() -> None:
    front_V2 = optimal_rewards(draw_tasks("test", 400, rng_for(0, "front")), GRID).mean(axis=0)
    assert np.diff(front_V2[:, 1]).max() < -2
    assert np.diff(front_V2[:, 0]).max() < 0


def test_what_people_write_lies_inside_the_range_of_the_best_and_well_below_it() -> None:
    tasks = draw_tasks("sft", 400, rng_for(0, "people"))
    front_V2 = optimal_rewards(tasks, GRID).mean(axis=0)
    rng = rng_for(0, "written")
    styles = list(STYLES.values())
    readings = [read(task, say(write_answer(task, styles[i % 5], rng))) for i, task in enumerate(tasks)]
    verbosity = np.array([r.verbosity for r in readings])
    helpfulness = np.array([r.helpfulness for r in readings])
    assert front_V2[-1, 1] < verbosity.mean() < front_V2[0, 1]
    assert helpfulness.mean() < front_V2[:, 0].min() - 10
    assert 0.15 < np.corrcoef(helpfulness, verbosity)[0, 1] < 0.5  # HelpSteer's sample: 0.26


def test_an_optimal_policy_passes_every_figure_asked_of_dpa() -> None:
    """At evaluation size, in at least 5 of 6 draws of the test prompts."""
    passed = 0
    front = optimal_rewards(draw_tasks("test", 300, rng_for(0, "reference")), GRID).mean(axis=0)
    for draw in range(6):
        tasks = draw_tasks("test", 300, rng_for(draw, "optimal policy"))
        reward_PVK = optimal_rewards(tasks, GRID)
        ids = tuple(str(i) for i in range(len(tasks)))
        system = Rewards(System("optimal"), ids, GRID, reward_PVK[:, :, None, :])
        bootstrap = Bootstrap(seed=draw, replicates=200)
        figures = control(system, bootstrap)
        reference = np.array([55.0, front[0, 1]])
        share = hypervolume(system.point_VK, SENSES, reference) / hypervolume(front, SENSES, reference)
        span = (system.point_VK[0, 1] - system.point_VK[-1, 1]) / (front[0, 1] - front[-1, 1])
        regretted = regret(system, bootstrap).value
        assert regretted is not None
        passed += all(drop.value > 0 for drop in figures.drops) and share >= 0.85 and span >= 0.6 and regretted <= 2
    assert passed >= 5


def test_no_two_roles_share_a_composition() -> None:
    assert sum(ROLES.values()) == 100
    assert role_of(("fox", "tea", "iron")) == role_of(("iron", "fox", "tea"))
    for role in ROLES:
        assert {role_of(task.things) for task in draw_tasks(role, 50, rng_for(1, role))} == {role}


def test_the_base_model_reads_no_prompt_of_another_role() -> None:
    for document in documents(300, rng_for(0, "documents")):
        for depth in ("name", "sketch", "describe", "explain"):
            if (start := document.find(f"{depth} ")) >= 0:
                task = read_prompt(document[start : document.index(".", start) + 1])
                assert len(task.things) < 3 or role_of(task.things) == "pretrain"


def test_raters_round_the_truth_to_their_scale() -> None:
    rng = rng_for(0, "raters")
    assert {rate(50, 0, 4, rng) for _ in range(50)} == {1, 2, 3} or {rate(50, 0, 4, rng) for _ in range(50)} == {2}
    seen = np.array([rate(x, 1, 5, rng) for x in np.linspace(0, 100, 500)])
    assert np.corrcoef(seen, np.linspace(0, 100, 500))[0, 1] > 0.9
    assert seen.min() == 1
    assert seen.max() == 5


def test_the_world_passes_through_the_real_readers(tmp_path: Path) -> None:
    counts = {"helpsteer": 10, "ultrafeedback": 200, "sft": 5, "tuning": 3, "test": 4}
    written = write_world(tmp_path, 3, counts)
    assert written == {
        "helpsteer.jsonl": 40,
        "ultrafeedback.jsonl": 200,
        "sft.jsonl": 5,
        "tuning.jsonl": 3,
        "test.jsonl": 4,
    }
    _, report = read_rated("helpsteer", str(tmp_path / "helpsteer.jsonl"))
    assert (report.read, report.kept) == (40, 40)
    rows, report = read_rated("ultrafeedback", str(tmp_path / "ultrafeedback.jsonl"))
    assert report.read == 800
    assert report.kept == len(rows) == 800 - report.filtered.get("empty response", 0)
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert [role_of(read_prompt(prompt).things) for prompt in prompts] == ["test"] * 4


def test_a_seed_writes_the_same_world_again(tmp_path: Path) -> None:
    counts = {"helpsteer": 3, "ultrafeedback": 3, "sft": 3, "tuning": 3, "test": 3}
    for name in ("a", "b"):
        write_world(tmp_path / name, 7, counts)
    write_world(tmp_path / "c", 8, counts)
    text = {name: (tmp_path / name / "ultrafeedback.jsonl").read_text() for name in "abc"}
    assert text["a"] == text["b"] != text["c"]
