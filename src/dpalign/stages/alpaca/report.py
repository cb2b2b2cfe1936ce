"""Fig. 5: average length against win rate, a curve a steered system; and its table. Drawn from alpaca.json alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from dpalign.data.sources import shorten
from dpalign.measure.bootstrap import Bootstrap
from dpalign.page.drawing import arms, house_style, legend, png, svg, values
from dpalign.page.looks import INKS
from dpalign.page.words import MISSING, Figure, degrees, number
from dpalign.recipe import Recipe, config
from dpalign.run.folder import Run, Work
from dpalign.run.ledger import sha256_of, write_json, write_text
from dpalign.stages.alpaca.benchmark import read_instructions, read_outputs
from dpalign.stages.alpaca.judge import Judge
from dpalign.stages.alpaca.length_control import read_difficulty
from dpalign.stages.alpaca.stages import JUDGEMENTS, Task, read_answers, read_failures
from dpalign.stages.alpaca.summary import summarize

Numbers = Mapping[str, Any]

Rate = Literal["win_rate", "length_controlled"]

VERSION: Final = 1
FIGURES: Final[Mapping[str, Rate]] = {"fig5": "win_rate", "fig5-length-controlled": "length_controlled"}
"""Fig. 5 shows the raw rate; the other is drawn where there are difficulties."""

_CURVES: Final = (("#08306b", "o"), ("#c75000", "D"), ("#00795f", "v"), ("#9c3f83", "^"), ("#8a6d00", "p"))
_POINTS: Final = (("#3f444d", "s"), ("#c75000", "D"), ("#9c3f83", "^"), ("#8a6d00", "v"), ("#5b5fc7", "p"))
"""Colour and marker of each system in turn, safe for the colour-blind (after Okabe and Ito)."""
_PAPER: Final = {"DPA": "o", "SteerLM": "^", "SFT": "s", "DPO": "D"}


def figure(
    run: Run, recipe: Recipe, tasks: Sequence[Task], judge: Judge, *, difficulty: Path | None, paper: bool
) -> Path:
    """Take the last stage unless it is done: alpaca.json, table.md and the figure of what the tasks left."""
    knobs = config.knobs(recipe, "seed", "evaluation.bootstrap") | {"paper": paper, "judge": judge.name}
    knobs["points"] = [task.point.name for task in tasks]
    inputs: dict[str, str | Path] = {task.stage: task.stage for task in tasks}
    inputs |= {"reference": tasks[0].reference.resolve(), "instructions": tasks[0].source.resolve()}
    if difficulty is not None:
        inputs["difficulty"] = difficulty.resolve()
    with run.stage("figure", VERSION, inputs, knobs) as work:
        if not work.done:
            _write(work, recipe, tasks, judge, difficulty, paper)
    return work.folder


def _write(
    work: Work, recipe: Recipe, tasks: Sequence[Task], judge: Judge, difficulty: Path | None, paper: bool
) -> None:
    judged = {task.point.name: work.run.folder / task.stage / JUDGEMENTS for task in tasks}
    known = None if difficulty is None else read_difficulty(difficulty)
    answers = [read_answers(path, name) for name, path in judged.items()]
    bootstrap = Bootstrap(recipe.seed, recipe.evaluation.bootstrap)
    numbers = summarize([task.point for task in tasks], answers, bootstrap, difficulty=known, paper=paper)
    task = tasks[0]
    instructions = read_instructions(task.source, task.limit)
    reference = read_outputs(task.reference, instructions, part=task.limit is not None)
    numbers |= {
        "instructions": {
            "file": task.source.name,
            "sha256": sha256_of(task.source),
            "count": len(instructions),
            "first_of_more": task.limit is not None,
        },
        "reference": {
            "file": task.reference.name,
            "sha256": sha256_of(task.reference),
            "generator": reference.generator,
            "length": sum(map(len, reference.texts)) / len(reference.texts),
        },
        "judge": {"name": judge.name, **judge.identity},
        "failures": [
            {"of": name, "index": index, "instruction": shorten(instructions[index]), "reason": reason}
            for name, path in judged.items()
            for index, reason in read_failures(path)
        ],
    }
    for name, rate in FIGURES.items():
        if rate == "win_rate" or known is not None:
            drawn = fig_5(numbers, rate)
            write_text(work.folder / f"{name}.svg", svg(drawn, name))
            (work.folder / f"{name}.png").write_bytes(png(drawn))
    write_text(work.folder / "table.md", table(numbers))
    write_json(work.folder / "alpaca.json", numbers)


def fig_5(numbers: Numbers, rate: Rate = "win_rate") -> Canvas:
    """The figure; the paper's own points (of the raw rate) behind it, hollow and grey, where the numbers have them."""
    seen = {True: 0, False: 0}
    with house_style():
        canvas = Canvas(figsize=(8.6, 5.0), layout="constrained")
        axes = canvas.subplots()
        for name, system in numbers["systems"].items():
            palette = _CURVES if _curve(system) else _POINTS
            _system(axes, name, system, palette[seen[_curve(system)] % len(palette)], rate)
            seen[_curve(system)] += 1
        for name, points in (numbers.get("paper") or {}).items() if rate == "win_rate" else ():
            _paper_curve(axes, name, points)
        control = "length-controlled " if rate == "length_controlled" else ""
        axes.set(
            xlabel="average length, characters",
            ylabel=f"{control}win rate against {numbers['reference']['generator']}, %",
        )
        axes.margins(0.07)
        legend(canvas, axes, 4)
    return canvas


def _curve(system: Numbers) -> bool:
    return len(system["points"]) > 1


def _system(axes: Axes, name: str, system: Numbers, look: tuple[str, str], rate: Rate) -> None:
    points, (colour, marker) = system["points"], look
    x, y = ([Figure.read(point[which]) for point in points] for which in ("length", rate))
    axes.errorbar(
        values(x), values(y), xerr=arms(x), yerr=arms(y), fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.55,
        zorder=3,
    )  # fmt: skip
    axes.plot(
        values(x),
        values(y),
        color=colour,
        marker=marker,
        markersize=5.0 if _curve(system) else 6.5,
        markeredgecolor=INKS["surface"][0],
        markeredgewidth=0.6,
        linewidth=1.7,
        linestyle="-" if _curve(system) else "",
        label=name,
        zorder=4,
    )
    for i in (0, -1) if _curve(system) else ():
        axes.annotate(
            said(points[i]),
            (values(x)[i], values(y)[i]),
            xytext=(7, 5),
            textcoords="offset points",
            fontsize=8.5,
            color=colour,
            zorder=5,
        )


def _paper_curve(axes: Axes, name: str, points: Sequence[Sequence[float]]) -> None:
    x, y = zip(*points, strict=True)
    muted = INKS["muted"][0]
    axes.plot(
        x,
        y,
        color=muted,
        marker=_PAPER.get(name, "o"),
        markersize=4.6,
        markerfacecolor=INKS["surface"][0],
        linewidth=0.9,
        linestyle=(0, (4, 2.5)) if len(points) > 1 else "",
        alpha=0.8,
        label=f"paper: {name}",
        zorder=2,
    )


def said(point: Numbers) -> str:
    """A point's label as the dial shows it."""
    if point["angle"] is not None:
        return degrees(point["angle"])
    return str(point["label"]) or MISSING


def table(numbers: Numbers) -> str:
    """All points with their figures, and the differences that matter first, as Markdown."""
    controlled = numbers["length_control"]["applied"]
    head = ["system", "at", "length, characters", "win rate, %", "judged", "failed"]
    head += ["length-controlled win rate, %"] if controlled else []
    rows = [_row(name, point, controlled) for name, system in numbers["systems"].items() for point in system["points"]]
    lines = [_line(head), _line(["---"] * len(head)), *map(_line, rows)]
    lines += ["", *_notes(numbers)]
    paired = [_difference(row) for row in numbers["differences"] if row["shown"]]
    if paired:
        lines += [
            "",
            "Paired differences, on the instructions that both were judged on (not corrected for their number):",
            "",
        ]
        lines += [_line(["", "win rate, points", "length, characters"]), _line(["---"] * 3), *map(_line, paired)]
    return "\n".join(lines) + "\n"


def _row(name: str, point: Numbers, controlled: bool) -> list[str]:
    cells = [
        name,
        said(point),
        Figure.read(point["length"]).said(0),
        Figure.read(point["win_rate"]).said(1),
        number(point["judged"], 0),
        number(sum(point["failed"].values()), 0),
    ]
    starred = " *" if point["extrapolated"] else ""
    return cells + ([Figure.read(point["length_controlled"]).said(1) + starred] if controlled else [])


def _difference(row: Numbers) -> list[str]:
    win_rate = Figure.read(row["win_rate"]).said(1, sign=True)
    return [f"{_spoken(row['a'])} less {_spoken(row['b'])}", win_rate, Figure.read(row["length"]).said(0, sign=True)]


def _spoken(name: str) -> str:
    system, _, label = name.partition("@")
    try:
        return f"{system} {degrees(float(label))}"
    except ValueError:
        return f"{system} {label}".strip()


def _notes(numbers: Numbers) -> list[str]:
    level = 100 * numbers["intervals"]["level"]
    notes = [
        f"{numbers['instructions']['count']:,} instructions; judge {numbers['judge']['name']}, against "
        f"{numbers['reference']['generator']} ({number(numbers['reference']['length'], 0)} characters). {level:.0f}% "
        "intervals, by a bootstrap over the instructions."
    ]
    if not numbers["length_control"]["applied"]:
        notes.append(f"Length-controlled win rates: {numbers['length_control']['note']}.")
    points = [point for system in numbers["systems"].values() for point in system["points"]]
    if any(point["extrapolated"] for point in points):
        notes.append(
            "* Nearly all of these answers are longer than the reference's, or shorter: their rate at equal length is "
            "extrapolated."
        )
    reasons: dict[str, int] = {}
    for point in points:
        for reason, count in point["failed"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    if reasons:
        notes.append(
            "Failed judgements, in no mean: " + "; ".join(f"{n} {reason}" for reason, n in reasons.items()) + "."
        )
    return notes


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
