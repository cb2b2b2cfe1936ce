"""What best_of gains in the world: true v . r of the answer returned, against a single answer at v.

    python bench/best_of.py runs/world-21

draws answers of the last policy of a finished world run for validation prompts at five directions of its arc, chooses
by the run's own reward model, and scores the choice by the truth. The single answer's figure is the mean over sixteen
at the direction itself. Intervals are 95%, by resampling prompts. Prints the table of docs/serving.md.

Shapes: P prompts, V directions, N answers, K objectives.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpalign.dial.best_of import best_answer, neighbours
from dpalign.dial.dial import Dial
from dpalign.engines.engine import Request
from dpalign.engines.transformers_engine import TransformersEngine
from dpalign.measure.bootstrap import Bootstrap
from dpalign.paper.direction import Preference
from dpalign.paper.objectives import Objective, read_objectives
from dpalign.rewards.score import FunctionScorer, ModelScorer
from dpalign.rows import HEADS, PROMPTS, Message, read_rows
from dpalign.train.contract import read_contract

Array = NDArray[np.float64]

SETTINGS = [(n, spread) for n in (4, 16) for spread in (0.0, 10.0, 20.0)]
DIRECTIONS = 5
NEW_TOKENS = 64


class World:
    """A finished run: its last policy, its reward model, the truth, and validation prompts."""

    def __init__(self, run: Path, prompts: int, temperature: float) -> None:
        model = max(run.glob("policy-*"), key=lambda folder: int(folder.name.rpartition("-")[2])) / "model"
        contract = read_contract(model)
        if contract is None:
            raise SystemExit(f"{model}: no dpa.json: not a policy that takes directions")
        self.dial = Dial.load(model)
        self.objectives = [Objective(name, heads) for name, heads in contract.objectives.items()]
        self.engine = TransformersEngine(str(model), rows=512)
        options: dict[str, Any] = {"template": "world-v1", "batch_tokens": 16384, "dtype": "float32"}
        self.reward = ModelScorer(str(run / "reward" / "model"), **options)
        self.truth = FunctionScorer("dpalign.world.truth:score", HEADS)
        split = [row for row in read_rows(run / "data" / "prompts", PROMPTS) if row["split"] == "validation"]
        self.prompts: list[list[Message]] = [row["messages"] for row in split[:prompts]]
        self.temperature = temperature

    def answers(self, asked: Preference, n: int, spread: float) -> tuple[Array, Array, NDArray[np.bool_]]:
        """Rewards by the model and by the truth, (P, N, K) each, and which are finished and not empty, (P, N)."""
        around = neighbours(asked, n, spread, self.dial.arc)
        lines = {self.dial.line(near): near for near in around}
        count = {line: sum(self.dial.line(near) == line for near in around) for line in lines}
        place = (n, round(spread), round(asked.angle * 100))
        requests = [
            Request(tuple(self.dial.messages(messages, near)), count[line], ("best of", *place, p, i))
            for p, messages in enumerate(self.prompts)
            for i, (line, near) in enumerate(lines.items())
        ]
        drawn = self.engine.sample(requests, temperature=self.temperature, max_new_tokens=NEW_TOKENS)
        flat = [answer for answers in drawn for answer in answers]
        pairs = [(self.prompts[i // n], answer.text) for i, answer in enumerate(flat)]
        shape = (len(self.prompts), n)
        said, true = (
            read_objectives(scorer.score(pairs), scorer.heads, self.objectives).reshape(*shape, -1)
            for scorer in (self.reward, self.truth)
        )
        return said, true, np.array([answer.whole for answer in flat]).reshape(shape)


def values(world: World, asked: Preference) -> dict[str, Array]:
    """True v . r of each prompt: of the answer returned in each setting, and of a single one; (P,) each."""
    found: dict[str, Array] = {}
    for n, spread in SETTINGS:
        said_PNK, true_PNK, finished_PN = world.answers(asked, n, spread)
        best_P = [best_answer(said_PNK[p], finished_PN[p].tolist(), asked) for p in range(len(said_PNK))]
        true_PN = true_PNK @ asked.v_K
        found[f"{n} {spread:g}"] = true_PN[np.arange(len(best_P)), best_P]
        if (n, spread) == (16, 0.0):
            found["single"] = true_PN.mean(axis=1)
    return found


def table(value_PV: dict[str, Array]) -> Sequence[str]:
    """Gains over a single answer, and over as many answers all drawn at the direction itself."""
    bootstrap = Bootstrap()
    weight_RP = bootstrap.weights(len(value_PV["single"]))

    def shown(gain_PV: Array) -> str:
        gain_P = gain_PV.mean(axis=1)
        estimate = bootstrap.interval(gain_P.mean(), weight_RP @ gain_P)
        return f"{estimate.value:+.2f} ({estimate.low:+.2f} to {estimate.high:+.2f})"

    lines = [
        f"A single answer: {value_PV['single'].mean():.2f}.",
        "",
        "| n | spread (degrees) | gain in true v.r over a single answer | over n answers without spread |",
        "|---|---|---|---|",
    ]
    for n, spread in SETTINGS:
        own, plain = value_PV[f"{n} {spread:g}"], value_PV[f"{n} 0"]
        against = shown(own - plain) if spread else ""
        lines.append(f"| {n} | {spread:g} | {shown(own - value_PV['single'])} | {against} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run folder of a finished world run")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.7)
    given = parser.parse_args()
    world = World(given.run, given.prompts, given.temperature)
    low, high = world.dial.arc or (-45.0, 0.0)
    asked_V = [Preference.from_angle(a, world.dial.objectives) for a in np.linspace(high, low, DIRECTIONS)]
    by_direction = []
    for asked in asked_V:
        by_direction.append(values(world, asked))
        sys.stderr.write(f"{asked.angle:g} degrees done\n")
    sys.stdout.write(
        "\n".join(table({k: np.stack([v[k] for v in by_direction], axis=1) for k in by_direction[0]})) + "\n"
    )


if __name__ == "__main__":
    main()
