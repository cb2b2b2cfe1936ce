"""Figures as words: one way to write each kind of number, and one to read it from a summary."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

MINUS = "\N{MINUS SIGN}"
MISSING = "\N{EN DASH}"
DEGREE = "\N{DEGREE SIGN}"
COUNTED = "trained tokens include prompts, which DPO reads with each of its two answers; sampled and scored ones do not"
"""What the ledgers' tokens are of."""


class Figure(NamedTuple):
    """A figure and its interval, any of them unknown."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @classmethod
    def read(cls, found: Any) -> Self:
        """From a bare number, {value, low, high}, {mean, low, high} or None."""
        if isinstance(found, Mapping):
            value = found.get("value", found.get("mean"))
            return cls(value, found.get("low"), found.get("high"))
        return cls(found)

    @property
    def above_zero(self) -> bool:
        """The whole interval lies above 0."""
        return self.low is not None and self.low > 0

    def __str__(self) -> str:
        return self.said()

    def said(self, digits: int = 1, sign: bool = False) -> str:
        """`3.1 (2.2 to 4.0)`, or the value alone where there is no interval."""
        interval = between(self.low, self.high, digits)
        return number(self.value, digits, sign) + (f" ({interval})" if interval else "")


def below_zero(found: Any) -> bool:
    """The whole interval of a figure lies below 0."""
    high = Figure.read(found).high
    return high is not None and high < 0


def seed_count(summary: Mapping[str, Any]) -> int:
    """Runs of the whole pipeline that a summary speaks of."""
    return len((summary.get("seeds") or {}).get("seeds") or [])


def figure(entry: Mapping[str, Any] | None, name: str) -> Figure:
    """A figure of a system's summary: bare, its interval under "intervals", or whole, as hypervolume is."""
    found = (entry or {}).get(name)
    if isinstance(found, Mapping):
        return Figure.read(found)
    interval = ((entry or {}).get("intervals") or {}).get(name) or {}
    return Figure(found, interval.get("low"), interval.get("high"))


def number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """With a true minus, never "-0.0"; a dash where there is none."""
    if value is None:
        return MISSING
    text = f"{value:+,.{digits}f}" if sign else f"{value:,.{digits}f}"
    if not any(c in "123456789" for c in text):
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def between(low: float | None, high: float | None, digits: int = 1) -> str:
    return f"{number(low, digits)} to {number(high, digits)}" if low is not None and high is not None else ""


def percent(found: Figure) -> Figure:
    """The same figure in hundredths."""
    return Figure(*(None if one is None else 100 * one for one in found))


def probability(p: float | None) -> str:
    if p is None:
        return MISSING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def whole(n: float | None) -> str:
    """12,345 up to six figures, then 1.23 M; a dash for nothing."""
    if not n:
        return MISSING
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if n >= size:
            return f"{n / size:.3g}\N{NO-BREAK SPACE}{unit}"
    return f"{n:,.0f}"


def size(bytes_on_disk: float | None) -> str:
    """3.9 MB; a dash where it is not known."""
    if not bytes_on_disk:
        return MISSING
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if bytes_on_disk >= scale:
            return f"{bytes_on_disk / scale:.3g}\N{NO-BREAK SPACE}{unit}"
    return f"{bytes_on_disk:.0f}\N{NO-BREAK SPACE}B"


def turns(summary: Mapping[str, Any]) -> str:
    """What the second objective is to do as the dial turns from its first direction to its last: it falls or rises."""
    name = summary["objectives"][:2][-1]
    first, last = (summary["directions"][i][name] for i in (0, -1))
    return "falls" if last < first else "rises"


def degrees(angle: float) -> str:
    """-15 as the dial shows it; a tenth only where there is one."""
    rounded = round(angle, 1)
    return number(rounded, 0 if rounded == round(rounded) else 1) + DEGREE


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def agreeing(names: Sequence[str], singular: str, plural: str) -> str:
    """The verb that goes with a list of names: `SteerLM beats`, `SteerLM and DPO beat`, `rewarded soups beat`."""
    return plural if len(names) > 1 or names[0].endswith("s") else singular


def arithmetic(weights: Mapping[str, float], senses: Sequence[float]) -> str:
    """The direction as the paper writes it (Fig. 1), two decimals throughout: `helpfulness*0.97 - verbosity*0.26`.

    A weight of 0 takes the sign of its objective's sense, so that the sign does not flip along the arc.
    """
    text = ""
    for (name, weight), sense in zip(weights.items(), senses, strict=True):
        shown = abs(round(weight, 2))
        negative = sense < 0 if shown == 0 else weight < 0
        joint = (" - " if negative else " + ") if text else ("-" if negative else "")
        text += f"{joint}{name}*{shown:.2f}"
    return text
