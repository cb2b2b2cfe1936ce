"""Figures as words: one way to write each kind of number."""

from typing import Final

from dpalign.measure.bootstrap import Estimate
from dpalign.measure.feasibility import Rule
from dpalign.measure.summary import Point, Summary

MINUS: Final = "\N{MINUS SIGN}"
MISSING: Final = "\N{EN DASH}"
DEGREE: Final = "\N{DEGREE SIGN}"


def said(estimate: Estimate | None, digits: int = 1, sign: bool = False) -> str:
    """`3.1 (2.2 to 4.0)`, or the value alone where there is no interval."""
    if estimate is None:
        return MISSING
    interval = between(estimate.low, estimate.high, digits)
    return number(estimate.value, digits, sign) + (f" ({interval})" if interval else "")


def number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """A number with a true minus, never "-0.0"; a dash for None."""
    if value is None:
        return MISSING
    text = f"{value:+,.{digits}f}" if sign else f"{value:,.{digits}f}"
    if not any(c in "123456789" for c in text):
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def between(low: float | None, high: float | None, digits: int = 1) -> str:
    """`2.2 to 4.0`; empty if an end is unknown."""
    return f"{number(low, digits)} to {number(high, digits)}" if low is not None and high is not None else ""


def probability(p: float) -> str:
    """Three decimals, or `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def whole(n: float | None) -> str:
    """12,345 up to six figures, then 1.23 M; a dash for 0 and None."""
    if not n:
        return MISSING
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if n >= size:
            return f"{n / size:.3g}\N{NO-BREAK SPACE}{unit}"
    return f"{n:,.0f}"


def size(bytes_on_disk: float | None) -> str:
    """3.9 MB; a dash for 0 and None."""
    if not bytes_on_disk:
        return MISSING
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if bytes_on_disk >= scale:
            return f"{bytes_on_disk / scale:.3g}\N{NO-BREAK SPACE}{unit}"
    return f"{bytes_on_disk:.0f}\N{NO-BREAK SPACE}B"


def degrees(angle: float) -> str:
    """An angle as the dial shows it, with the degree sign; a tenth only if it is not 0."""
    rounded = round(angle, 1)
    return number(rounded, 0 if rounded == round(rounded) else 1) + DEGREE


def direction(point: Point) -> str:
    """An angle, or the weights by objective of a direction without one."""
    if point.angle is not None:
        return degrees(point.angle)
    return ", ".join(f"{name} {number(w, 2)}" for name, w in (point.direction or {}).items())


def turns(summary: Summary) -> str:
    """Whether the second objective "falls" or "rises", as asked from the dial's first direction to its last."""
    name = summary.objectives[:2][-1]
    return "falls" if summary.directions[-1][name] < summary.directions[0][name] else "rises"


def degenerate_rule(rule: Rule) -> str:
    """When an answer counts as degenerate."""
    return (
        f"Degenerate: cut off at the longest allowed length, empty, a sentence of {rule.sentence_words} words or more "
        f"repeated, or over {100 * rule.repetition:g}% of its runs of {rule.run} words repeated."
    )


def by_prompt(summary: Summary) -> str:
    """What kind of intervals a caption has."""
    level = 100 * summary.intervals.bootstrap.level
    return f"{level:.0f}% intervals, by a bootstrap over the {summary.intervals.prompts:,} evaluation prompts"


def by_prompt_or_seed(summary: Summary) -> str:
    """The same, for figures that are shown over seeds if there are several."""
    if summary.seeds is not None and len(summary.seeds.seeds) > 1:
        return f"{100 * summary.seeds.level:.0f}% t-intervals over {len(summary.seeds.seeds)} seeds"
    return by_prompt(summary)
