"""All numbers of Fig. 5 as plain JSON: what the figure and the table are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import numpy as np

from dpalign.measure.bootstrap import Bootstrap, Estimate
from dpalign.measure.paper_curves import FIG_5
from dpalign.stages.alpaca.length_control import FORMULA, Difficulty, LengthControlled, length_controlled
from dpalign.stages.alpaca.systems import Point
from dpalign.stages.alpaca.winrate import Answers, difference, mean_of, standard_error, win_rate

RAW_ONLY: Final = "not computed: they need the benchmark's own difficulty file (--difficulty FILE)"
OVERLAY_NOTE: Final = (
    "805 prompts of AlpacaEval 2, judged by GPT-4 Turbo against GPT-4 Turbo; digitised within 0.2 points"
)


def summarize(
    points: Sequence[Point],
    answers: Sequence[Answers],
    bootstrap: Bootstrap,
    *,
    difficulty: Difficulty | None = None,
    paper: bool = False,
) -> dict[str, Any]:
    """The figures of every point and every pair of points.

    Args:
        answers: of each point, on the same instructions.
        difficulty: of the benchmark's instructions; without it, raw win rates only.
        paper: put the paper's own points beside ours.
    """
    controlled = [None if difficulty is None else length_controlled(a, difficulty, bootstrap) for a in answers]
    systems: dict[str, Any] = {}
    for point, one, control in zip(points, answers, controlled, strict=True):
        entry = systems.setdefault(point.system, {"points": []})
        entry["points"].append(_point(point, one, control, bootstrap))
    return {
        "systems": systems,
        "differences": _differences(points, answers, controlled, bootstrap),
        "length_control": _length_control(difficulty),
        "intervals": {"level": bootstrap.level, "replicates": bootstrap.replicates, "seed": bootstrap.seed},
        "paper": {name: [list(point) for point in curve] for name, curve in FIG_5.items()} if paper else None,
        "paper_note": OVERLAY_NOTE if paper else None,
    }


def _point(point: Point, answers: Answers, control: LengthControlled | None, bootstrap: Bootstrap) -> dict[str, Any]:
    every_P = np.ones_like(answers.judged_P)
    win_N = answers.win_P[answers.judged_P]
    return {
        "label": point.label,
        "angle": point.angle,
        "weights": None if point.weights is None else dict(point.weights),
        "line": point.line,
        "length": asdict(mean_of(answers.length_P, every_P, bootstrap)),
        "win_rate": asdict(win_rate(answers, bootstrap)),
        "standard_error": standard_error(answers),
        "length_controlled": None if control is None else asdict(control.rate),
        "extrapolated": None if control is None else control.extrapolated,
        "coefficients": None if control is None else {name: getattr(control, name) for name in ("theta", "phi", "psi")},
        "wins": int((win_N > 50).sum()),
        "draws": int((win_N == 50).sum()),
        "judged": int(answers.judged_P.sum()),
        "failed": dict(answers.reasons),
        "empty": int((answers.length_P == 0).sum()),
    }


def _differences(
    points: Sequence[Point],
    answers: Sequence[Answers],
    controlled: Sequence[LengthControlled | None],
    bootstrap: Bootstrap,
) -> list[dict[str, Any]]:
    """Every pair of points, the earlier less the later; `shown` marks those that the table has room for."""
    rows = []
    for i in range(len(points)):
        for j in range(i + 1, len(points)):
            wins, length, judged = difference(answers[i], answers[j], bootstrap)
            rows.append(
                {
                    "a": points[i].name,
                    "b": points[j].name,
                    "win_rate": None if wins is None else asdict(wins),
                    "length_controlled": _controlled_difference(controlled[i], controlled[j], bootstrap),
                    "length": asdict(length),
                    "instructions": judged,
                    "shown": _shown(points, i, j),
                }
            )
    return rows


def _controlled_difference(
    a: LengthControlled | None, b: LengthControlled | None, bootstrap: Bootstrap
) -> dict[str, Any] | None:
    if a is None or b is None or len(a.rate_R) != len(b.rate_R):
        return None
    found: Estimate = bootstrap.interval(a.rate.value - b.rate.value, a.rate_R - b.rate_R)
    return asdict(found)


def _shown(points: Sequence[Point], i: int, j: int) -> bool:
    """The two ends of a curve, and every system's ends against those of the others."""

    def end(k: int) -> bool:
        own = [n for n, point in enumerate(points) if point.system == points[k].system]
        return k in (own[0], own[-1])

    return end(i) and end(j)


def _length_control(difficulty: Difficulty | None) -> Mapping[str, Any]:
    if difficulty is None:
        return {"applied": False, "note": RAW_ONLY}
    return {"applied": True, "note": difficulty.kind, "formula": FORMULA, "difficulty": difficulty.source}
