"""The order of the loop, and that no prompt is seen by two who must not share it."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import MICRO
from dpalign.pipeline.align import execute, steps
from dpalign.recipe import Data, Evaluation, Recipe, load
from dpalign.rows import CANDIDATES, CONVERSATIONS, PROMPTS, RATED, read_rows
from dpalign.stages.stage import Step, uses

PAPER = Recipe(name="paper")
ANNOTATED = {"data": "data", "annotate": "annotate"}


def named(recipe: Recipe) -> dict[str, Step]:
    planned = steps(recipe)
    assert len({step.name for step in planned}) == len(planned)
    return {step.name: step for step in planned}


def test_the_papers_loop_in_order() -> None:
    """Section 3.1: reward model, SFT, then sample, score, select and fine-tune, four times."""
    assert list(named(PAPER))[:5] == ["data", "reward", "annotate", "sft", "steerlm-d2"]
    assert list(named(PAPER))[5:21] == [
        f"{s}-{t}" for t in (1, 2, 3, 4) for s in ("sample", "score", "select", "policy")
    ]
    assert list(named(PAPER))[21:] == [
        "steerlm",
        "evaluate-steerlm-d2",
        *[f"evaluate-policy-{t}" for t in (1, 2, 3, 4)],
        "evaluate-steerlm",
        "evaluate-sft",
        "report",
    ]


def test_every_step_reads_only_what_stands_before_it_and_what_its_stage_knows() -> None:
    recipe = replace(PAPER, data=Data(judge=0.2), evaluation=Evaluation(dpo="some/model", controls=True))
    for chosen in (PAPER, recipe, load(MICRO)):
        done: set[str] = set()
        for step in steps(chosen):
            assert set(step.inputs.values()) <= done, step.name
            missing = set(step.stage.inputs) - set(step.inputs)
            assert missing <= ({"policy"} if step.name == "evaluate-dpo" else set()), step.name
            if step.kind != "report":
                assert set(step.inputs) <= {*step.stage.inputs, *step.stage.optional}, step.name
            done.add(step.name)


def test_the_halves_take_turns_and_sampling_uses_the_last_policy() -> None:
    samples, selects = uses(steps(PAPER), "sample"), uses(steps(PAPER), "select")
    assert [step.half for step in samples] == [step.half for step in selects] == ["D1", "D2", "D1", "D2"]
    assert [step.inputs["policy"] for step in samples] == ["steerlm-d2", "policy-1", "policy-2", "policy-3"]
    assert [step.condition for step in samples] == ["targets", "directions", "directions", "directions"]
    assert [step.t for step in samples] == [1, 2, 3, 4]
    assert named(PAPER)["steerlm-d2"].half == "D2"
    assert named(PAPER)["steerlm"].half == "both"


def test_each_policy_starts_from_sft_and_learns_what_was_selected_for_it() -> None:
    assert [step.inputs for step in uses(steps(PAPER), "finetune")] == [
        {"start": "sft", "chosen": f"select-{t}"} for t in (1, 2, 3, 4)
    ]


def test_without_restart_a_policy_goes_on_from_the_last() -> None:
    recipe = replace(PAPER, restart=False)
    starts = [step.inputs["start"] for step in uses(steps(recipe), "finetune")]
    assert starts == ["sft", "policy-1", "policy-2", "policy-3"]


def test_without_turns_every_iteration_samples_d1() -> None:
    recipe = replace(PAPER, alternate=False)
    assert {step.half for kind in ("sample", "select") for step in uses(steps(recipe), kind)} == {"D1"}


def test_the_judge_never_selects() -> None:
    """It stands beside the reward model where systems are evaluated, and nowhere else."""
    assert "judge" not in named(PAPER)
    judged = named(replace(PAPER, data=Data(judge=0.2)))
    assert "judge" in judged
    readers = {step.kind for step in judged.values() if "judge" in step.inputs.values()}
    assert readers == {"evaluate", "report"}


def test_every_evaluated_system_is_in_the_report() -> None:
    """Asked for v = none, directions, or the baseline's targets, each as it was trained."""
    recipe = replace(load(MICRO), evaluation=Evaluation(dpo="some/model", controls=True))
    evaluated = uses(steps(recipe), "evaluate")
    assert {step.name: step.condition for step in evaluated} == {
        "evaluate-steerlm-d2": "targets",
        "evaluate-policy-1": "directions",
        "evaluate-policy-2": "directions",
        "evaluate-steerlm": "targets",
        "evaluate-sft": "plain",
        "evaluate-dpo": "plain",
        "evaluate-sft-asked": "directions",
        "evaluate-base-asked": "directions",
    }
    (report,) = uses(steps(recipe), "report")
    assert {step.name for step in evaluated} <= set(report.inputs.values())


def test_an_unknown_last_step_is_refused_with_the_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no step is called 'policy-9'; this recipe has data, reward, .*policy-4"):
        execute(PAPER, tmp_path, until="policy-9")


# On the files of a run


def ids(folder: Path, *files: str) -> set[str]:
    schemas = {"sample": CANDIDATES, "select": CONVERSATIONS, "train": RATED, "heldout": RATED, "judge": RATED}
    return {
        row["prompt_id"] for file in files for row in read_rows(folder / file, schemas[Path(file).name.split("-")[0]])
    }


def splits(run: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for row in read_rows(run / "data" / "prompts", PROMPTS):
        found[row["split"]].add(row["prompt_id"])
    return found


def test_no_prompt_is_sampled_from_a_policy_that_has_seen_it(micro_run: Path) -> None:
    """Neither selected nor replayed for theta_t is what theta_t samples at t + 1; pi_0 learned D2 and samples D1."""
    split = splits(micro_run)
    rated = ids(micro_run, "data/train")
    seen = {0: rated & split["D2"], 1: ids(micro_run, "select-1"), 2: ids(micro_run, "select-2")}
    asked = {t: ids(micro_run, f"sample-{t}") for t in (1, 2)}
    assert all(seen.values())
    assert all(asked.values())
    assert not asked[1] & seen[0]
    assert not asked[2] & seen[1]
    assert (asked[1] | seen[1]) <= split["D1"]
    assert (asked[2] | seen[2]) <= split["D2"]
    replayed = {
        row["prompt_id"] for row in read_rows(micro_run / "select-1", CONVERSATIONS) if row["origin"] == "replay"
    }
    assert replayed
    assert replayed <= split["D1"]


def test_the_splits_share_no_text(micro_run: Path) -> None:
    texts: dict[str, set[str]] = defaultdict(set)
    for row in read_rows(micro_run / "data" / "prompts", PROMPTS):
        texts[" ".join(message["content"] for message in row["messages"])].add(row["split"])
    every = {"D1", "D2", "validation", "tuning", "heldout", "judge"}
    assert {split for found in texts.values() for split in found} == every
    assert all(len(found) == 1 for found in texts.values())


def test_no_rating_that_judges_the_reward_model_trained_it(micro_run: Path) -> None:
    """Training, held-out and judge's answers share no prompt, whatever data set they are of; nor with validation."""
    parts = {name: ids(micro_run, f"data/{name}") for name in ("train", "heldout", "judge")}
    assert all(parts.values())
    assert not parts["train"] & parts["heldout"]
    assert not parts["train"] & parts["judge"]
    assert not parts["heldout"] & parts["judge"]
    chats = {row["prompt_id"] for row in read_rows(micro_run / "data" / "chats", CONVERSATIONS)}
    trained = parts["train"] | parts["heldout"] | parts["judge"] | chats
    assert not (splits(micro_run)["validation"] | splits(micro_run)["tuning"]) & trained
    validated = {row["prompt_id"] for row in read_rows(micro_run / "evaluate-policy-2" / "answers", CANDIDATES)}
    assert validated == splits(micro_run)["validation"]
