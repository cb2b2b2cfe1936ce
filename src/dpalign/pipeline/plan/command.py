"""`dpa plan`: what a recipe will cost, as a table or as JSON."""

import argparse
import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Final

from dpalign.paper.direction import name_hint
from dpalign.pipeline.plan.count import Efficiency, Plan, make
from dpalign.pipeline.plan.hardware import GIB, GPUS, Need
from dpalign.pipeline.plan.measured import HOUR
from dpalign.pipeline.plan.spread import gpus_used
from dpalign.pipeline.shipped import add_recipe, recipe_file
from dpalign.recipe import load
from dpalign.runs.progress import spell_seconds
from dpalign.stages.cost import Load, Sizes
from dpalign.stages.preference import asked_in_words

NUMBER: Final = re.compile(r"[\d.,e+-]*( [kMGT])?|\?|\d+ (s|min|h \d+ min)")


LARGEST: Final = 1e15
"""The largest count or price that is accepted."""
WIDTH: Final = 100
"""The most columns of a line."""


def declare(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    add_recipe(parser)
    parser.add_argument(
        "--gpu", nargs="+", choices=list(GPUS), metavar="KIND", help=f"{', '.join(GPUS)} (default: A6000, the paper's)"
    )
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="how many there are (default: as many as the recipe uses)"
    )
    parser.add_argument(
        "--price",
        nargs="+",
        default=[],
        metavar="[KIND=]PRICE",
        help="of a GPU-hour, of all kinds or of one: 2.5, H100=3",
    )
    run = "a run folder of this recipe or a smaller one: its lengths and, without --gpu, its hours"
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
        gpus=[GPUS[name] for name in arguments.gpu or ()],
        count=arguments.gpus,
        run=arguments.run,
        compared=arguments.compared,
        shared=not arguments.whole_prompts,
        efficiency=replace(Efficiency(), **_numbers("--mfu", arguments.mfu, Efficiency)),
        assumed=_numbers("--assume", arguments.assume, Sizes),
    )
    if not plan.gpus and plan.rates is None and plan.counts_hours:
        plan = replace(plan, gpus=[GPUS["A6000"]])
    prices = _prices(arguments.price, [gpu.name for gpu in plan.gpus])
    return json.dumps(as_json(plan, prices), indent=1) if arguments.json else plan_text(plan, prices)


def _prices(words: Sequence[str], kinds: Sequence[str]) -> dict[str, float]:
    """The price of a GPU-hour by kind: a word PRICE sets all kinds, a word KIND=PRICE one."""
    prices: dict[str, float] = {}
    for word in words:
        kind, _, number = word.rpartition("=")
        if kind and kind not in kinds:
            raise ValueError(f"--price {word}: no such kind is planned ({', '.join(kinds) or 'name one in --gpu'})")
        price = _number("--price", word, number, "[KIND=]PRICE")
        prices |= {kind: price} if kind else dict.fromkeys(kinds, price)
    return prices


def _numbers(option: str, words: Sequence[str], known: type) -> dict[str, float]:
    """NAME=NUMBER words, by the fields of a dataclass."""
    names = [field.name for field in fields(known)]
    numbers = {}
    for word in words:
        name, _, number = word.partition("=")
        if name not in names:
            raise ValueError(f"{option} {word}: no such name ({name_hint(name, names)})")
        numbers[name] = _number(option, word, number, "NAME=NUMBER")
    return numbers


def _number(option: str, word: str, number: str, form: str) -> float:
    """The number of a word, from 0 to LARGEST: sums and products of such numbers stay finite."""
    try:
        value = float(number)
    except ValueError:
        raise ValueError(f"{option} {word}: give {form}") from None
    if not 0 <= value <= LARGEST:
        raise ValueError(f"{option} {word}: give a number of at least 0 and at most {LARGEST:g}")
    return value


def as_json(plan: Plan, prices: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The plan's figures; an unknown figure is null."""
    return {
        "recipe": plan.recipe.name,
        "model": asdict(plan.model) | {"parameters": plan.model.parameters},
        "assumed": {
            "sizes": asdict(plan.sizes),
            "mfu": asdict(plan.efficiency),
            "prompts": _reading(plan),
            "measured_in": plan.run or None,
        },
        "steps": [{"step": step.name, "kind": step.stage.name} | _step(plan, step.name) for step in plan.steps],
        "total": _costs(plan, list(plan.loads))
        | {
            "hours_elapsed": {gpu.name: _counted(plan, plan.wall(gpu)) for gpu in plan.gpus},
            "hours_as_measured": _known(plan.measured_wall) if plan.rates else None,
            "price": {name: _known(cost) for name, cost in costs_of(plan, prices or {}).items()},
        },
        "idle": [{"steps": names, "cure": cure} for cure, names in idle(plan).items()],
        "memory_bytes": [asdict(need) | {"verdict": _verdicts(plan, need)} for need in plan.needs],
        "host_memory_bytes": plan.host,
        "disk_bytes": plan.disk,
        "gpus": plan.count,
    }


def _step(plan: Plan, name: str) -> dict[str, Any]:
    measured = {"hours_as_measured": _known(plan.taken[name]) if plan.rates else None}
    hours = {gpu.name: _counted(plan, plan.elapsed(name, gpu)) for gpu in plan.gpus}
    return _costs(plan, [name]) | {"gpus": plan.spreads[name].gpus, "hours_elapsed": hours} | measured


def _costs(plan: Plan, names: Sequence[str]) -> dict[str, Any]:
    load = sum((plan.loads[name] for name in names), Load())
    hours = {gpu.name: _counted(plan, plan.busy(names, gpu)) for gpu in plan.gpus}
    peak = {gpu.name: plan.peak_hours(load, gpu) for gpu in plan.gpus}
    return asdict(load) | {"gpu_hours": hours, "gpu_hours_at_peak": peak}


def _counted(plan: Plan, hours: float) -> float | None:
    """Hours by FLOPs; None if the model is too small for that."""
    return hours if plan.counts_hours else None


def _known(number: float) -> float | None:
    return None if math.isnan(number) else number


def _verdicts(plan: Plan, need: Need) -> dict[str, str]:
    return {gpu.name: need.verdict(gpu, plan.count) for gpu in plan.gpus}


def costs_of(plan: Plan, prices: Mapping[str, float]) -> dict[str, float]:
    """What all GPUs cost for all hours, idle ones included, by kind; NaN where hours are not counted."""
    priced = [gpu for gpu in plan.gpus if gpu.name in prices]
    return {g.name: plan.wall(g) * plan.count * prices[g.name] if plan.counts_hours else math.nan for g in priced}


def idle(plan: Plan) -> dict[str, list[str]]:
    """The steps that leave GPUs idle, by the cure."""
    cures: dict[str, list[str]] = {}
    for step in plan.steps:
        if cure := plan.spreads[step.name].cure:
            cures.setdefault(cure, []).append(step.name)
    return cures


def plan_text(plan: Plan, prices: Mapping[str, float] | None = None) -> str:
    """The plan in a terminal."""
    parts = (
        head(plan),
        table(plan),
        totals(plan, prices or {}),
        memory_table(plan),
        host_table(plan),
        disk_table(plan),
    )
    return "\n\n".join(part for part in parts if part)


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
        f"users ask for: {asked_in_words(plan.recipe)}",
        f"{'measured in ' + plan.run if plan.run else 'assumed'}: {sizes.prompts:,.0f} prompts a half, a prompt of "
        f"{sizes.prompt:.0f} tokens, an answer of {sizes.answer:.0f}, a chat of {sizes.chat:.0f} (--assume)",
        f"prompts are {_reading(plan)} (--whole-prompts)",
    ]
    if plan.gpus:
        peaks = ", ".join(f"{gpu.name} {gpu.peak(plan.recipe.model.dtype) / 1e12:g}" for gpu in plan.gpus)
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
    return "\n".join(_wrapped(line) for line in lines)


def table(plan: Plan) -> str:
    """What each step computes, on how many GPUs, and the hours that pass; steps without a model are left out."""
    counted = plan.gpus if plan.counts_hours else ()
    heads = ["step", "sampled", "scored", "trained", "FLOPs"]
    heads += ["GPUs"] if counted else []
    heads += ["GPU-hours"] if len(counted) == 1 else []
    heads += [f"{gpu.name} hours" for gpu in counted]
    heads += ["as measured"] if plan.rates else []
    rows = [
        _cells(plan, step.name, [step.name])
        for step in plan.steps
        if plan.loads[step.name].flops or plan.taken.get(step.name)
    ]
    last = f"policy-{plan.recipe.iterations}"
    own = [f"{stage}-{plan.recipe.iterations}" for stage in ("sample", "score")] + [last]
    rows += [_cells(plan, "(the last iteration)", [name for name in own if name in plan.loads])]
    rows += [_cells(plan, "(all)", [step.name for step in plan.steps])]
    note = "tokens sampled and trained, answers scored"
    if plan.rates:
        note += f"; as measured: what {plan.run} took, or would take by its stages' rates"
    if counted:
        note += f"; hours that pass on {plan.count} GPU{'s' if plan.count > 1 else ''}"
    if not plan.counts_hours and not plan.rates:
        note += (
            f"\nno hours: a model of {_short(plan.model.parameters)} parameters waits for Python and memory, not for "
            f"arithmetic. A finished run tells them: --run runs/{plan.recipe.name}, or a smaller one of the kind"
        )
    return f"{_aligned([heads, *rows])}\n" + "\n".join(_wrapped(line) for line in note.split("\n"))


def _cells(plan: Plan, title: str, names: Sequence[str]) -> list[str]:
    """A row of the table: the sums of some steps. For all steps the measured hours are those until the last ends."""
    load = sum((plan.loads[name] for name in names), Load())
    counted = plan.gpus if plan.counts_hours else ()
    cells = [title, *(_short(x) for x in (load.sampled, load.scored, load.trained))]
    cells.append(f"{load.flops:.1e}" if load.flops else "")
    if counted:
        cells.append(str(plan.spreads[names[0]].gpus) if len(names) == 1 else "")
    if len(counted) == 1:
        cells.append(_hours(plan.busy(names, counted[0])))
    cells += [_hours(sum(plan.elapsed(name, gpu) for name in names)) for gpu in counted]
    if plan.rates:
        together = len(names) == len(plan.steps)
        hours = plan.measured_wall if together else sum(plan.taken[name] for name in names)
        cells.append("?" if math.isnan(hours) else spell_seconds(hours * HOUR))
    return cells


def totals(plan: Plan, prices: Mapping[str, float]) -> str:
    """For each kind of GPU the hours that pass, the share at work and the price; then the idle steps and the cure."""
    lines = []
    wanted = gpus_used(plan.recipe)
    if plan.gpus and wanted > plan.count:
        lines.append(f"the recipe asks for {wanted} GPUs and would not start on {plan.count}; counted on {plan.count}")
    for gpu in plan.gpus if plan.counts_hours else ():
        wall, busy = plan.wall(gpu), plan.busy(plan.loads, gpu)
        rented = wall * plan.count
        line = f"{plan.count} {gpu.name}: {_hours(wall)} hours"
        line += f" ({wall / 24:.1f} days)" if wall >= 48 else ""
        line += f", {_hours(rented)} GPU-hours, of which {busy / rented:.0%} at work"
        if gpu.name in prices:
            line += f"; {prices[gpu.name]:,.2f} each: {costs_of(plan, prices)[gpu.name]:,.0f}"
        lines.append(line)
    for cure, names in idle(plan).items() if plan.gpus and plan.counts_hours else ():
        lines.append(f"idle GPUs in {_numbered(names)}: {cure}")
    return "\n".join(_wrapped(line) for line in lines)


def _numbered(names: Sequence[str]) -> str:
    """Names in a sentence: sample-1, sample-2 and sample-3 as sample-1..3."""
    numbers: dict[str, list[str]] = {}
    for name in names:
        stem = name.rstrip("0123456789")
        numbers.setdefault(stem, []).append(name.removeprefix(stem))
    return ", ".join(stem + (own[0] if len(own) == 1 else f"{own[0]}..{own[-1]}") for stem, own in numbers.items())


def memory_table(plan: Plan) -> str:
    """GiB by kind of work, and on how many GPUs they fit."""
    fits = [f"fits {'one' if plan.count == 1 else plan.count} {gpu.name}?" for gpu in plan.gpus]
    heads = ["memory, GiB", "model", "beside", "logits", "gradients", *fits]
    rows, notes = [], dict[str, list[str]]()
    for need in plan.needs:
        sizes = (need.model, need.beside, need.logits, need.gradients)
        rows.append(
            [
                need.what,
                *(f"{size / GIB:.3g}" if size else "" for size in sizes),
                *(_fit(need.least(gpu), plan.count) for gpu in plan.gpus),
            ]
        )
        notes.setdefault(need.note, []).append(need.what)
    lines = [_wrapped(f"{'; '.join(whats)}: {note}") for note, whats in notes.items()]
    if plan.gpus:
        lines.append("on several: a training by FSDP or ZeRO-3 (or as a LoRA on fewer), vLLM by tensor_parallel")
    return "\n".join([_aligned([heads, *rows]), *lines])


def _fit(least: int | None, count: int) -> str:
    """Whether work that needs `least` GPUs fits `count`."""
    if least is None:
        return "no"
    return "yes" if least == 1 else f"{'yes' if least <= count else 'no'}: on {least}"


def host_table(plan: Plan) -> str:
    """GiB of the machine's own memory, by kind of work."""
    rows = [[what, f"{size / GIB:,.3g}"] for what, size in plan.host.items()]
    return _aligned([["host memory (weights)", "GiB"], *rows])


def disk_table(plan: Plan) -> str:
    """GB on disk."""
    rows = [[what, f"{size / 1e9:,.3g}"] for what, size in plan.disk.items()]
    return _aligned([["disk", "GB"], *rows, ["(all)", f"{sum(plan.disk.values()) / 1e9:,.3g}"]])


def _wrapped(line: str) -> str:
    """A sentence wrapped to WIDTH."""
    return textwrap.fill(line, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Align the columns: words to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = [all(NUMBER.fullmatch(row[column]) for row in rows[1:]) for column in range(len(widths))]
    lines = []
    for row in rows:
        cells = [f"{x:>{w}}" if r else f"{x:<{w}}" for x, w, r in zip(row, widths, right, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _short(number: float) -> str:
    """A count with three digits and a letter; empty for 0."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.0f}" if number else ""


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.2g}"
