"""`dpa alpaca-eval`: answers, judgements and Fig. 5, in one folder that goes on from wherever it was stopped.

OUT/outputs-SYSTEM-DIRECTION/   answers of a policy, in AlpacaEval's form (a stage each)
OUT/judgements/                 every judgement as it was made: never paid for twice, whatever is changed
OUT/judge-SYSTEM-DIRECTION/     the judgements of those answers, or why there is none (a stage each)
OUT/figure/                     alpaca.json, table.md, fig5.svg and fig5.png

Answers may come from another machine (`--outputs-from`) or from anyone (`--outputs`); without a judge
the command ends when the answers are drawn.
"""

import argparse
import contextlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpalign.recipe import Recipe
from dpalign.run.folder import Run

if TYPE_CHECKING:
    from dpalign.stages.alpaca.judge import Judge
    from dpalign.stages.alpaca.systems import Point


@dataclass(frozen=True)
class Order:
    """What the command line asks for; `declare` says what each is."""

    policies: Sequence[str]
    out: Path
    instructions: Path | None
    reference: Path | None
    outputs: Sequence[str]
    outputs_from: Sequence[Path]
    angles: Sequence[float]
    weights: Sequence[Sequence[float]]
    lines: Mapping[str, Sequence[str]]
    limit: int | None
    judge_url: str | None
    judge_model: str | None
    annotator: str | None
    prompt: Path | None
    judge_extra: Mapping[str, Any]
    api_key_env: str | None
    workers: int
    timeout: float
    retry_failed: bool
    judgements: Path | None
    difficulty: Path | None
    paper: bool
    dry_run: bool

    def __post_init__(self) -> None:
        if self.judged and self.reference is None:
            raise ValueError("a judge compares with something: give --reference FILE")
        if self.annotator is None and (self.judge_url is None) != (self.judge_model is None):
            raise ValueError("our own client needs both --judge-url and --judge-model")
        if self.annotator is not None and (self.prompt is not None or self.judge_extra):
            raise ValueError("--prompt and --judge-extra are for our own client; an annotator brings its own prompt")
        if self.judge_url is not None and not re.match(r"https?://[^/]", self.judge_url):
            raise ValueError(
                f"--judge-url {self.judge_url}: give the base of a server, such as http://127.0.0.1:8000/v1"
            )
        if (self.limit is not None and self.limit < 1) or self.workers < 1 or not 0 < self.timeout < math.inf:
            raise ValueError("--limit, --workers and --timeout must be above 0")

    @property
    def source(self) -> Path:
        """Where the instructions are read."""
        source = self.instructions or self.reference
        if source is None:
            raise ValueError("no instructions: give --instructions FILE, or --reference FILE whose rows hold them")
        return source

    @property
    def store(self) -> Path:
        return self.judgements or self.out / "judgements"

    @property
    def judged(self) -> bool:
        return self.judge_url is not None or self.judge_model is not None or self.annotator is not None


def declare(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser._negative_number_matcher = re.compile(r"^-[\d.][\d.,+-]*$")  # --angles -15,-30 is a value, no option
    add = parser.add_argument
    text = "a finished policy folder or plain checkpoint, or NAME=FOLDER; with a dpa.json beside it, it is steered"
    add("policies", nargs="*", metavar="POLICY", help=text)
    add("--out", type=Path, required=True, metavar="DIR", help="the folder to work in; the same command goes on in it")
    add("--instructions", type=Path, metavar="FILE", help="the benchmark's instructions (default: the reference's)")
    add("--reference", type=Path, metavar="FILE", help="outputs to compare with, in AlpacaEval's form")
    text = "answers that are there already, in that form too; NAME@LABEL=FILE for one point of a curve"
    add("--outputs", action="append", default=[], metavar="NAME=FILE", help=text)
    text = "the --out folder of an earlier command, on another machine, say: all the answers in it"
    add("--outputs-from", action="append", type=Path, default=[], metavar="DIR", help=text)
    text = "degrees to ask for, such as 0,-15,-30,-45 (default: 7 even steps of the arc that the policy was trained on)"
    add("--angles", type=_numbers, default=(), metavar="LIST", help=text)
    text = "a direction by objective, such as 0.8,-0.6; any number of times"
    add("--weights", type=_numbers, action="append", default=[], metavar="LIST", help=text)
    text = "a system line to ask a policy under, SteerLM's targets, say; any number of times"
    add("--line", type=_line, action="append", default=[], metavar="NAME=TEXT", help=text)
    add("--limit", type=int, metavar="N", help="only the first N instructions")
    text = (
        "base of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1; without a judge, answers are drawn only"
    )
    add("--judge-url", metavar="URL", help=text)
    add("--judge-model", metavar="NAME", help="the judge, as the server calls it")
    text = "alpaca_eval:NAME, an annotator of the package alpaca_eval, in place of our own client"
    add("--annotator", type=_annotator, metavar="NAME", help=text)
    text = "what the judge is asked, with places {instruction}, {output_1} and {output_2} (default: our own words)"
    add("--prompt", type=Path, metavar="FILE", help=text)
    text = "more fields of each request to the judge, as a JSON object"
    add("--judge-extra", type=_object, default={}, metavar="JSON", help=text)
    text = "the environment variable with the judge's key (default: no key is sent)"
    add("--api-key-env", metavar="VARIABLE", help=text)
    add("--workers", type=int, default=4, metavar="N", help="requests to the judge at a time (default: %(default)s)")
    add("--timeout", type=float, default=120.0, metavar="SECONDS", help="for one judgement (default: %(default)g)")
    text = "where every judgement is kept; several --out folders may share it (default: OUT/judgements)"
    add("--judgements", type=Path, metavar="DIR", help=text)
    add("--retry-failed", action="store_true", help="ask again for judgements that failed, which may cost again")
    text = "AlpacaEval's instruction_difficulty.csv or df_gamed.csv: adds length-controlled win rates"
    add("--difficulty", type=Path, metavar="FILE", help=text)
    add("--paper", action="store_true", help="draw the paper's own points behind ours")
    text = "a recipe whose knobs say how to sample and to resample (default: %(default)s)"
    add("--recipe", default="paper", metavar="RECIPE", help=text)
    add("--dry-run", action="store_true", help="say what would be drawn and asked, and about how many tokens")


def read_order(given: argparse.Namespace) -> Order:
    """The parsed arguments as an order.

    Raises:
        ValueError: arguments that do not go together.
    """
    values = dict(vars(given))
    del values["recipe"]
    lines: dict[str, list[str]] = {}
    for name, text in values.pop("line"):
        lines.setdefault(name, []).append(text)
    return Order(**values, lines=lines)


def execute(order: Order, recipe: Recipe) -> str:
    """Do all that is not done yet; what to tell the user at the end.

    Raises:
        ValueError: bad input, or a judge that cannot be asked; what was drawn and judged is kept.
    """
    from dpalign.stages.alpaca.benchmark import read_instructions, read_outputs

    instructions = read_instructions(order.source, order.limit)
    points, reference = points_of(order), None
    if order.reference is not None:
        reference = read_outputs(order.reference, instructions, part=order.limit is not None)
    for point in points:  # before anything is drawn or paid for
        if point.outputs is not None:
            read_outputs(point.outputs, instructions, part=order.limit is not None)
    judge = judge_of(order, recipe) if order.judged else None
    if order.dry_run:
        from dpalign.stages.alpaca.stages import forecast

        return forecast(order.out, points, instructions, reference, judge, order.store)
    with Run.open(order.out, recipe.to_toml()) as run:
        drawn = _drawn(run, recipe, order, points, instructions)
        if judge is None or reference is None:
            return "\n".join(str(point.outputs) for point in drawn)
        return _judged_and_shown(run, recipe, order, drawn, judge)


def points_of(order: Order) -> "list[Point]":
    """Every system at every direction that the command line names.

    Raises:
        ValueError: none, two of one name, or what a policy cannot be asked for.
    """
    from dpalign.stages.alpaca.systems import earlier_points, given_point, in_order, policy_points

    points = [p for word in order.policies for p in policy_points(word, order.angles, order.weights, order.lines)]
    points += [given_point(word) for word in order.outputs]
    points += [point for folder in order.outputs_from for point in earlier_points(folder)]
    unused = set(order.lines) - {point.system for point in points if point.policy is not None}
    if unused:
        raise ValueError(f"--line {min(unused)}=...: no POLICY is called {min(unused)!r}; name one NAME=FOLDER")
    if (order.angles or order.weights) and not any(point.policy and point.weights for point in points):
        raise ValueError("--angles and --weights: no POLICY here takes directions (it needs its dpa.json beside it)")
    return in_order(points)


def judge_of(order: Order, recipe: Recipe) -> "Judge":
    """The judge that the command line names.

    Raises:
        ValueError: a bad prompt, a key that is not set, or an annotator that is not there.
    """
    from dpalign.stages.alpaca.client import Endpoint
    from dpalign.stages.alpaca.judge import LogprobJudge
    from dpalign.stages.alpaca.package import PackageJudge
    from dpalign.stages.alpaca.prompt import read_prompt

    key = None
    if order.api_key_env is not None:
        key = os.environ.get(order.api_key_env, "").strip()
        if not key:
            raise ValueError(f"--api-key-env {order.api_key_env}: that environment variable is not set")
    endpoint = None
    if order.judge_url is not None:
        url = order.judge_url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        endpoint = Endpoint(url, key, order.timeout, key_from=order.api_key_env or "")
    if order.annotator is not None:
        return PackageJudge(
            order.annotator, endpoint=endpoint, model=order.judge_model, seed=recipe.seed, workers=order.workers
        )
    assert endpoint is not None
    assert order.judge_model is not None
    return LogprobJudge(
        endpoint,
        order.judge_model,
        read_prompt(order.prompt),
        seed=recipe.seed,
        extra=order.judge_extra,
        workers=order.workers,
    )


def _drawn(
    run: Run, recipe: Recipe, order: Order, points: "Sequence[Point]", instructions: Sequence[str]
) -> "list[Point]":
    """The points with their answers, those of policies drawn."""
    from dpalign.stages.alpaca.generate import Policies, generate

    if recipe.cluster.address and any(point.policy is not None for point in points):
        run.log("cluster.address is for the stages of a run; these answers are few, and drawn in this process")
    policies = Policies(recipe)
    return [
        point
        if point.policy is None
        else replace(point, outputs=generate(run, policies, point, order.source, instructions))
        for point in points
    ]


def _judged_and_shown(run: Run, recipe: Recipe, order: Order, points: "Sequence[Point]", judge: "Judge") -> str:
    from dpalign.stages.alpaca.stages import Task, judge_point, open_store

    assert order.reference is not None
    tasks = [Task(point, order.source, order.reference, order.limit) for point in points]
    with contextlib.closing(open_store(order.store, judge)) as store:
        for task in tasks:
            judge_point(run, task, judge, store, retry_failed=order.retry_failed)
    from dpalign.stages.alpaca.report import figure

    folder = figure(run, recipe, tasks, judge, difficulty=order.difficulty, paper=order.paper)
    return f"{(folder / 'table.md').read_text(encoding='utf-8')}\n{folder / 'fig5.svg'}"


def _numbers(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers, such as 0,-15,-30") from None
    if not all(map(math.isfinite, numbers)):
        raise argparse.ArgumentTypeError(f"{text!r}: finite numbers are needed")
    return numbers


def _line(text: str) -> tuple[str, str]:
    name, equals, line = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=TEXT, the policy's name and the line")
    return name, line


def _annotator(text: str) -> str:
    name = text.removeprefix("alpaca_eval:")
    if name == text or not name:
        raise argparse.ArgumentTypeError(f"{text!r}: give alpaca_eval:NAME, an annotator of that package")
    return name


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value
