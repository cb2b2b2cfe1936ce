"""`dpa plan`: what a recipe will cost, as a table or as JSON."""

import argparse
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Final

from dpalign.paper.direction import name_hint
from dpalign.pipeline.plan.count import Efficiency, Plan, make
from dpalign.pipeline.plan.hardware import GIB, GPUS, Need
from dpalign.pipeline.shipped import add_recipe, recipe_file
from dpalign.recipe import load
from dpalign.stages.cost import Load, Sizes
from dpalign.stages.preference import asked_in_words

NUMBER: Final = re.compile(r"[\d.,e+-]*( [kMGT])?|\?")


def declare(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    add_recipe(parser)
    parser.add_argument(
        "--gpu", nargs="+", choices=list(GPUS), metavar="KIND", help=f"{', '.join(GPUS)} (default: A6000, the paper's)"
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="how many work at once (default: 1)")
    run = "a run folder of this recipe or a smaller one: its lengths and, without --gpu, its rates"
    parser.add_argument("--run", type=Path, metavar="DIR", help=run)
    parser.add_argument("--compared", action="store_true", help="with all that `dpa compare` runs")
    whole = "read the prompt once for each answer, in sampling and scoring; else it is shared"
    parser.add_argument("--whole-prompts", action="store_true", help=whole)
    share = "sampling, scoring or training, and the share of the peak that it reaches, such as training=0.4"
    parser.add_argument("--mfu", nargs="+", default=[], metavar="WHAT=SHARE", help=share)
    names = ", ".join(field.name for field in fields(Sizes))
    parser.add_argument(
        "--assume", nargs="+", default=[], metavar="NAME=NUMBER", help=f"of rows and their lengths: {names}"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def execute(arguments: argparse.Namespace, overrides: Sequence[str]) -> str:
    """The plan of a recipe, as text or as JSON."""
    plan = make(
        load(recipe_file(arguments.recipe), overrides),
        gpus=[GPUS[name] for name in arguments.gpu or ([] if arguments.run else ["A6000"])],
        count=arguments.gpus,
        run=arguments.run,
        compared=arguments.compared,
        shared=not arguments.whole_prompts,
        efficiency=replace(Efficiency(), **_numbers("--mfu", arguments.mfu, Efficiency)),
        assumed=_numbers("--assume", arguments.assume, Sizes),
    )
    return json.dumps(as_json(plan), indent=1) if arguments.json else text(plan)


def _numbers(option: str, words: Sequence[str], known: type) -> dict[str, float]:
    """NAME=NUMBER words, by the fields of a dataclass."""
    names = [field.name for field in fields(known)]
    numbers = {}
    for word in words:
        name, _, number = word.partition("=")
        if name not in names:
            raise ValueError(f"{option} {word}: no such name ({name_hint(name, names)})")
        try:
            numbers[name] = float(number)
        except ValueError:
            raise ValueError(f"{option} {word}: give NAME=NUMBER") from None
        if not 0 <= numbers[name] < math.inf:
            raise ValueError(f"{option} {word}: give a number of at least 0")
    return numbers


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan's figures; a figure that nothing tells is null."""
    return {
        "recipe": plan.recipe.name,
        "model": asdict(plan.model) | {"parameters": plan.model.parameters},
        "assumed": {
            "sizes": asdict(plan.sizes),
            "mfu": asdict(plan.efficiency),
            "prompts": _reading(plan),
            "measured_in": plan.run or None,
        },
        "steps": [
            {"step": step.name, "kind": step.stage.name} | _costs(plan, plan.loads[step.name]) for step in plan.steps
        ],
        "total": _costs(plan, plan.total),
        "memory_bytes": [asdict(need) | {"verdict": _verdicts(plan, need)} for need in plan.needs],
        "disk_bytes": plan.disk,
        "gpus": plan.count,
    }


def _costs(plan: Plan, load: Load) -> dict[str, Any]:
    hours = {gpu.name: plan.hours(load, gpu) for gpu in plan.gpus}
    peak = {gpu.name: plan.peak_hours(load, gpu) for gpu in plan.gpus}
    measured = plan.measured_hours(load) if plan.rates else math.nan
    known = None if math.isnan(measured) else measured
    return asdict(load) | {"gpu_hours": hours, "gpu_hours_at_peak": peak, "hours_as_measured": known}


def _verdicts(plan: Plan, need: Need) -> dict[str, str]:
    return {gpu.name: need.verdict(gpu, plan.count) for gpu in plan.gpus}


def text(plan: Plan) -> str:
    """The plan in a terminal."""
    return "\n\n".join((head(plan), table(plan), memory_table(plan), disk_table(plan)))


def _reading(plan: Plan) -> str:
    if not plan.shared:
        return "read whole for each answer"
    return "read once for all their answers" + ("" if plan.recipe.reward.share_prefix else " in sampling alone")


def head(plan: Plan) -> str:
    """What is planned, and on which assumptions."""
    model, sizes, mfu = plan.model, plan.sizes, plan.efficiency
    lines = [
        f"{plan.recipe.name}: {plan.recipe.iterations} iterations of {model.name}, {_short(model.parameters)} "
        f"parameters in {plan.recipe.model.dtype}",
        f"{'measured in ' + plan.run if plan.run else 'assumed'}: {sizes.prompts:,.0f} prompts a half, a prompt of "
        f"{sizes.prompt:.0f} tokens, an answer of {sizes.answer:.0f}, a chat of {sizes.chat:.0f} (--assume); prompts "
        f"{_reading(plan)} (--whole-prompts)",
    ]
    lines.append(f"users ask for: {asked_in_words(plan.recipe)}")
    if plan.gpus:
        peaks = ", ".join(f"{gpu.name} {gpu.tflops:g}" for gpu in plan.gpus)
        lines.append(
            f"assumed: {mfu.sampling:.0%} of the peak in sampling, {mfu.scoring:.0%} in scoring, {mfu.training:.0%} in "
            f"training (--mfu); peak TFLOPS: {peaks}"
        )
    if plan.rates:
        units = {"sampling": "tokens sampled", "scoring": "answers scored", "training": "tokens trained"}
        speeds = [
            f"{rate:,.0f} {units[what]} a second" if rate else f"no {units[what]} yet"
            for what, rate in asdict(plan.rates).items()
        ]
        lines.append(f"{plan.run} went at {', '.join(speeds)}")
    return "\n".join(lines)


def table(plan: Plan) -> str:
    """Steps with what they compute and take; those that need no model are left out."""
    heads = ["step", "sampled", "scored", "trained", "FLOPs"]
    heads += [name for gpu in plan.gpus for name in (f"{gpu.name} h at peak", f"{gpu.name} h")]
    heads += ["h as measured"] if plan.rates else []
    named = [(step.name, plan.loads[step.name]) for step in plan.steps if plan.loads[step.name].flops]
    rows = [_cells(plan, name, load) for name, load in named]
    last = f"policy-{plan.recipe.iterations}"
    own = [f"{stage}-{plan.recipe.iterations}" for stage in ("sample", "score")] + [last]
    once = sum((plan.loads[name] for name in own if name in plan.loads), Load())
    rows += [_cells(plan, "(the last iteration)", once), _cells(plan, "(all)", plan.total)]
    note = "tokens sampled and trained, answers scored; GPU-hours"
    if plan.count > 1:
        note += f": divide by {plan.count} for the hours of {plan.count} GPUs that are always busy"
    return f"{_aligned([heads, *rows])}\n{note}"


def _cells(plan: Plan, name: str, load: Load) -> list[str]:
    costs = _costs(plan, load)
    cells = [name, *(_short(x) for x in (load.sampled, load.scored, load.trained)), f"{load.flops:.2e}"]
    for gpu in plan.gpus:
        cells += [_hours(costs["gpu_hours_at_peak"][gpu.name]), _hours(costs["gpu_hours"][gpu.name])]
    if plan.rates:
        cells.append("?" if costs["hours_as_measured"] is None else _hours(costs["hours_as_measured"]))
    return cells


def memory_table(plan: Plan) -> str:
    """GiB by kind of work, and on how many GPUs they fit."""
    fits = [f"fits {'one' if plan.count == 1 else plan.count} {gpu.name}?" for gpu in plan.gpus]
    heads = ["memory, GiB", "model", "beside", *fits, ""]
    rows = [
        [need.what, f"{need.model / GIB:.3g}", f"{need.beside / GIB:.3g}", *_verdicts(plan, need).values(), need.note]
        for need in plan.needs
    ]
    return _aligned([heads, *rows])


def disk_table(plan: Plan) -> str:
    """GB on disk."""
    rows = [[what, f"{size / 1e9:,.3g}"] for what, size in plan.disk.items()]
    return _aligned([["disk", "GB"], *rows, ["(all)", f"{sum(plan.disk.values()) / 1e9:,.3g}"]])


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns: the first and words to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = [all(NUMBER.fullmatch(row[column]) for row in rows[1:]) for column in range(len(widths))]
    lines = []
    for row in rows:
        cells = [f"{x:>{w}}" if r else f"{x:<{w}}" for x, w, r in zip(row, widths, right, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _short(number: float) -> str:
    """A count with three digits and a letter; nothing for none."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.0f}" if number else ""


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.2g}"
