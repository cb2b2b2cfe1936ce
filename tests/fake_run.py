"""A run folder of a whole comparison, made in a moment: every step of the plan with made-up answers and real ledgers.

What a system earns is set here, so that a test knows what the page must say. Nothing is trained or sampled.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpalign.measure.bootstrap import Bootstrap
from dpalign.measure.feasibility import TRAINED, Wish, figures
from dpalign.measure.points import Rewards
from dpalign.measure.summary import Summary
from dpalign.measure.system import System
from dpalign.page import write
from dpalign.paper.direction import evaluation_grid, rng_for
from dpalign.pipeline import runner
from dpalign.pipeline.steps import knobs_of, steps
from dpalign.recipe import Recipe, changed, load
from dpalign.rows import CANDIDATES, DIVERGENCES, HEADS, SCORES, prompt_id, read_rows, user_prompt, write_rows
from dpalign.runs import folder as runs
from dpalign.runs.folder import Run, Work, write_json
from dpalign.runs.ledger import TIMES
from dpalign.stages.stage import Step
from dpalign.world.language import say_prompt
from dpalign.world.people import draw_tasks

RECIPE = Path(__file__).parent.parent / "recipes" / "micro.toml"
SETTINGS = {
    "model.base": "world",
    "evaluation.directions": 10,
    "evaluation.controls": True,
    "evaluation.divergence": 50,
    "compare.ablations": ["no replay", "one half"],
    "dpo.betas": [0.1, 0.5],
    "steerlm.targets": 5,
}
"""What the fake's recipe changes of micro.toml."""
DIAL = np.linspace(0.0, 1.0, 10)
FRONT = np.stack([97.0 - 27.0 * DIAL**1.8, 62.0 - 30.0 * DIAL], axis=1)
"""Mean (helpfulness, verbosity) about as high as anything can get."""


def steered(lag: float, reach: float) -> np.ndarray:
    """A dial `lag` helpfulness points below the front that uses a share `reach` of its range."""
    middle = FRONT.mean(axis=0)
    return np.asarray(middle + (FRONT - middle) * reach - np.array([lag, 0.0]))


MEANS: dict[str, np.ndarray] = {
    "steerlm-d2": np.array([[60.0, 36.0], [66.0, 41.0], [70.0, 46.0], [74.0, 52.0], [75.0, 57.0]]),
    "policy-1": steered(9.0, 0.95),
    "policy-2": steered(5.0, 0.85),
    "steerlm": np.array([[61.0, 35.0], [68.0, 41.0], [73.0, 47.0], [77.0, 53.0], [79.0, 58.0]]),
    "steerlm-2": np.array([[63.0, 36.0], [70.0, 41.0], [76.0, 47.0], [80.0, 53.0], [81.0, 58.0]]),
    "steerlm-3": np.array([[60.0, 38.0], [66.0, 42.0], [70.0, 47.0], [74.0, 52.0], [75.0, 56.0]]),
    "sft": np.array([[68.0, 50.0]]),
    "sft-asked": np.array([66.5, 50.0]) + np.outer(DIAL, [-0.6, -0.4]),
    "base-asked": np.array([52.0, 47.0]) + np.outer(DIAL, [-0.2, -0.1]),
    "sft-brief": np.array([[63.0, 41.0]]),
    "dpo-1": np.array([[76.0, 58.0]]),
    "dpo-2": np.array([[79.0, 57.0]]),
    "dpo-1-brief": np.array([[72.0, 48.0]]),
    "dpo-2-brief": np.array([[74.0, 47.0]]),
    "rsf-1": np.array([[93.0, 62.0]]),
    "rsf-2": np.array([[87.0, 48.0]]),
    "rsf-3": np.array([[70.0, 32.0]]),
    "rl-1-1": np.array([[88.0, 64.0]]),
    "rl-2-1": np.array([[65.0, 33.0]]),
    "soup-1": steered(6.5, 0.9),
    "soup-2": steered(5.2, 0.8),
    "sft-best-of-n": steered(13.0, 0.6),
    "no-replay-policy": steered(5.2, 0.85),
    "one-half-policy": steered(8.0, 0.8),
}  # fmt: skip
"""The true mean rewards of each evaluation, a row a condition."""
OPINIONS = {"policy-1": 1.0, "policy-2": 4.0}
"""Helpfulness points that the reward model adds to the truth; 0.5 to all others."""
DIVERGENCES_OF = {"sft": 0.0, "steerlm-d2": 2.0, "policy-1": 6.0, "policy-2": 9.0}
"""KL divergence from SFT in nats; 3 of all others."""
SENTENCES = ("fox is red and hunts mice.", "tea is hot.", "iron is hard and makes ships.", "owl is wise.")


def recipe(**changes: Any) -> Recipe:
    """The recipe of the fake run."""
    return changed(load(RECIPE), SETTINGS | changes)


def fake_run(
    folder: Path,
    given: Recipe,
    *,
    prompts: int = 24,
    means: Mapping[str, np.ndarray] = MEANS,
    opinions: Mapping[str, float] = OPINIONS,
    compared: bool = True,
) -> Path:
    """Write every step but the report.

    Args:
        means: what a system truly earns, by the name of its evaluation.
        opinions: what the reward model adds to its helpfulness.
    """
    world = World(given, prompts, means, opinions)
    with Run.open(folder, None, {"git_commit": None}) as run:
        for step in steps(given, compared)[:-1]:
            with run.stage(step.name, step.stage.version, step.inputs, knobs_of(given, step)) as work:
                world.write(work, step)
    return folder


def report(folder: Path, given: Recipe, compared: bool = True) -> Path:
    """Take the report step of a fake run; its folder."""
    step = steps(given, compared)[-1]
    with runs.Run.open(folder, None, {"git_commit": None}) as run:
        runner.take(given, run, step)
    return folder / "report"


def summary_of(folder: Path, given: Recipe, compared: bool = True) -> Summary:
    """The Summary that the report step of a fake run makes, without the page and its figures."""
    made: list[Summary] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "write_report", lambda out, summary: made.append(summary))
        shutil.rmtree(report(folder, given, compared))
    return made[0]


class World:
    """Made-up answers to real prompts of the embedded world."""

    def __init__(
        self, given: Recipe, prompts: int, means: Mapping[str, np.ndarray], opinions: Mapping[str, float]
    ) -> None:
        self.recipe, self.means, self.opinions = given, means, opinions
        self.prompts = {
            split: [user_prompt(say_prompt(task)) for task in draw_tasks(role, prompts, rng_for(given.seed, role))]
            for split, role in (("validation", "test"), ("tuning", "tuning"))
        }
        self.grid = evaluation_grid(given.preference.population(len(given.objectives)), given.evaluation.directions)

    def write(self, work: Work, step: Step) -> None:
        """The outputs of one step, and what it counts."""
        write: Callable[[Work, Step], None] | None = {
            "evaluate": self._evaluation, "soup": self._evaluation, "best_of_n": self._evaluation,
            "feasibility": self._feasibility, "data": self._data, "pairwise": self._pairwise,
            "divergence": self._divergence,
        }.get(step.stage.name)  # fmt: skip
        match step.stage.name:
            case "sft" | "steerlm" | "finetune" | "specialist" | "dpo" | "rl" | "base" | "reward" | "judge":
                (work.folder / "model").mkdir(parents=True)
                (work.folder / "model" / "model.safetensors").write_bytes(step.name.encode().ljust(4_000_000, b"."))
                work.tally.add(100, 100, trained=1_000_000)
            case "sample":
                work.tally.sampled += 2_000_000
            case "score":
                work.tally.add(scored=40_000)
            case "annotate":
                work.tally.add(scored=12_000)
        if step.stage.name == "rl":
            work.tally.sampled, work.tally.scored = 900_000, 18_000
        if write is not None:
            write(work, step)
        else:
            write_json(work.folder / "made.json", {"step": step.name})

    def _data(self, work: Work, step: Step) -> None:
        write_json(
            work.folder / "reports.json",
            [{"source": "test", "file": "t.jsonl", "in": 9, "out": 9, "filtered": {}, "notes": {}}],
        )

    def _pairwise(self, work: Work, step: Step) -> None:
        share = {"accuracy": {"value": 0.8, "low": 0.7, "high": 0.9}, "pairs": 100, "ties": 1}
        subsets = {"all": share, "chat": share | {"pairs": 60}}
        write_json(work.folder / "accuracy.json", {"objective": "helpfulness", "subsets": subsets})

    def _evaluation(self, work: Work, step: Step) -> None:
        name = step.name.partition("-")[2]
        mean_VK = self.means["steerlm" if name == "steerlm-1" else name]  # the paper's own targets
        split = "tuning" if step.name.startswith("tune-") else "validation"
        chats = self.prompts[split]
        samples = self.recipe.evaluation.samples
        kind = {1: "plain", 10: "direction"}.get(len(mean_VK), "target")
        rng = np.random.default_rng([self.recipe.seed, len(step.name), *step.name.encode()])
        ease_P = np.random.default_rng(self.recipe.seed).normal(0, 4, (len(chats), 1, 1, 1))
        noise = rng.normal(0, 2.5, (len(chats), len(mean_VK), samples, 2))
        true_PVSK = np.clip(mean_VK[None, :, None] + ease_P * [0.5, 1.0] + noise, 0, 100)
        judged = true_PVSK + np.array([self.opinions.get(name, 0.5), 0.0]) + rng.normal(0, 1.0, true_PVSK.shape)
        rows = []
        for p, chat in enumerate(chats):
            for v in range(len(mean_VK)):
                condition = {"plain": [], "direction": self.grid[v].tolist(), "target": mean_VK[v].tolist()}[kind]
                for s in range(samples):
                    text = " ".join(SENTENCES[: max(1, int(true_PVSK[p, v, s, 1] // 16))])
                    rows.append(
                        {
                            "prompt_id": prompt_id(chat), "t": step.t, "condition_index": v, "sample": s,
                            "condition_kind": kind, "condition": condition, "messages": chat, "response": text,
                            "tokens": len(text.split()), "finished": True,
                        }
                    )  # fmt: skip
        write_rows(work.folder / "answers" / "part-00000.parquet", rows, CANDIDATES)
        for folder, reward_PVSK in (
            ("scores", judged),
            ("truth", true_PVSK),
            ("judged", true_PVSK - np.array([0.0, 1.0])),
        ):
            write_rows(work.folder / folder / "part-00000.parquet", scored(rows, reward_PVSK), SCORES)
        work.tally.add(len(rows), len(rows), scored=len(rows) * (1 + ("judge" in step.inputs)))
        work.tally.sampled += sum(row["tokens"] for row in rows)
        if step.stage.name == "soup":
            write_json(work.folder / TIMES, {"switch_seconds": {"0": 0.1, "1": 0.14}})
            write_json(work.folder / "soup.json", {"experts": step.knobs["soups.experts"]})

    def _divergence(self, work: Work, step: Step) -> None:
        """Every answer is this much likelier by the policy than by SFT, give or take one."""
        answers = list(read_rows(work.run.folder / step.inputs["evaluate"] / "answers", CANDIDATES))
        nats = DIVERGENCES_OF.get(step.name.partition("-")[2], 3.0)
        keys = ("prompt_id", "t", "condition_index", "sample", "tokens")
        rows = [
            {key: row[key] for key in keys} | {"log_policy": -20.0, "log_sft": -20.0 - nats + (-1) ** row["sample"]}
            for row in answers
        ]
        write_rows(work.folder / "part-00000.parquet", rows, DIVERGENCES)
        work.tally.add(len(rows), len(rows))

    def _feasibility(self, work: Work, step: Step) -> None:
        rng = np.random.default_rng(3)
        wishes, mean_VK, sound = directions_asked() if step.condition == "directions" else targets_asked()
        ids = tuple(prompt_id(chat) for chat in self.prompts["validation"])
        reward_PVSK = mean_VK[None, :, None] + rng.normal(0, 3, (len(ids), len(wishes), 1, 2))
        directions = np.array([wish.value for wish in wishes]) if step.condition == "directions" else None
        fine = rng.random((len(ids), len(wishes))) < sound
        faults = [[[() if ok else ("repeated sentence",)] for ok in row] for row in fine]
        optimum = mean_VK + np.array([4.0, -3.0]) if directions is not None else None
        system = Rewards(System("asked"), ids, directions, reward_PVSK, reward_PVSK)
        chance = Bootstrap(replicates=200)
        write_json(
            work.folder / "feasibility.json",
            figures(system, faults, wishes, 0.3, chance, optimum).model_dump(mode="json"),
        )
        rows = [
            {
                "prompt_id": ids[p], "t": step.t, "condition_index": v, "sample": 0, "condition_kind": wish.kind,
                "condition": list(wish.value), "messages": self.prompts["validation"][p],
                "response": " ".join(SENTENCES[:1] * (1 if fine[p, v] else 2)), "tokens": 6, "finished": True,
            }
            for p in range(len(ids))
            for v, wish in enumerate(wishes)
        ]  # fmt: skip
        write_rows(work.folder / "answers" / "part-00000.parquet", rows, CANDIDATES)
        for folder in ("scores", "truth"):
            write_rows(work.folder / folder / "part-00000.parquet", scored(rows, reward_PVSK), SCORES)


def scored(rows: list[dict[str, Any]], reward_PVSK: np.ndarray) -> list[dict[str, Any]]:
    """Rewards of two objectives as rows of all heads."""
    keys = ("prompt_id", "t", "condition_index", "sample")
    found = []
    for row, (helpful, verbose) in zip(rows, reward_PVSK.reshape(-1, 2), strict=True):
        heads = [helpful if head.startswith("ultrafeedback-") else 50.0 for head in HEADS]
        heads[HEADS.index("helpsteer-verbosity")] = verbose
        found.append({key: row[key] for key in keys} | {"rewards": heads})
    return found


def directions_asked() -> tuple[list[Wish], np.ndarray, np.ndarray]:
    """Angles within the arc and beyond, what the policy gives there, and how often it is sound."""
    angles = (15.0, 7.5, 0.0, -15.0, -30.0, -45.0, -52.5, -60.0, -75.0)
    wishes = []
    for angle in angles:
        v_2 = (float(np.cos(np.radians(angle))), float(np.sin(np.radians(angle))))
        group = TRAINED if -45 <= angle <= 0 else f"{'above 0' if angle > 0 else 'below -45'} degrees"
        wishes.append(Wish("direction", v_2, "", group, ("helpfulness", "verbosity"), {"angle": angle}))
    verbosity = np.array([62.0, 61.0, 60.0, 52.0, 44.0, 36.0, 34.0, 33.0, 32.0])
    helpfulness = np.array([90.0, 90.5, 91.0, 88.0, 82.0, 74.0, 72.0, 70.0, 66.0])
    sound = np.array([0.97, 0.98, 0.7, 0.99, 0.99, 0.99, 0.97, 0.96, 0.94])
    return wishes, np.stack([helpfulness, verbosity], axis=1), sound


def targets_asked() -> tuple[list[Wish], np.ndarray, np.ndarray]:
    """Targets as annotated and beyond, what SteerLM gives, and how often it is sound."""
    wishes, got, sound = [], [], []
    for share in (0.0, 0.5, 1.0):
        for verbosity, highest in ((35.0, 66.0), (45.0, 78.0), (55.0, 88.0)):
            asked = highest + share * (100 - highest)
            group = f"{100 * share:g}% of the way beyond" if share else "as annotated"
            about = {"highest": highest, "share": share}
            wishes.append(Wish("target", (asked, verbosity), "", group, ("helpfulness", "verbosity"), about))
            got.append((highest - 4 - 6 * share, verbosity + 8 * share))
            sound.append(0.98 - 0.15 * share)
    return wishes, np.array(got), np.array(sound)
