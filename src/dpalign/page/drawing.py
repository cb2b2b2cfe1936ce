"""Turn matplotlib figures into files, and into SVG inside a page.

The output does not depend on the time or on the machine's settings: equal data give equal bytes.
"""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray

from dpalign.measure.bootstrap import Estimate
from dpalign.page.looks import INKS

_LIGHT: Final = {name: light for name, (light, _) in INKS.items()}
_SETTINGS: Final[dict[str, Any]] = {
    "svg.fonttype": "none",  # text stays text: searchable, and in the page's own typeface
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.color": _LIGHT["ink"],
    "axes.labelcolor": _LIGHT["muted"],
    "axes.edgecolor": _LIGHT["muted"],
    "axes.facecolor": "none",
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 9.0,
    "axes.unicode_minus": True,
    "grid.color": _LIGHT["grid"],
    "grid.linewidth": 0.7,
    "xtick.color": _LIGHT["muted"],
    "ytick.color": _LIGHT["muted"],
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.7,
    "legend.columnspacing": 1.4,
    "legend.handletextpad": 0.5,
    "figure.facecolor": _LIGHT["surface"],
    "savefig.facecolor": _LIGHT["surface"],
}


WIDTH: Final = 8.6
"""Width of every figure, in inches. The page scales the drawing; on a phone it scrolls sideways."""


@dataclass(frozen=True)
class Plot:
    """One figure of the page."""

    name: str
    title: str
    caption: str
    canvas: Canvas


@contextmanager
def house_style(salt: str = "dpalign") -> Iterator[None]:
    """Set the style for drawing and saving. Drawing functions use it as a decorator."""
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": salt}):
        yield


def svg(drawn: Canvas, salt: str) -> str:
    """The figure as an SVG document."""
    out = io.StringIO()
    with house_style(salt):
        drawn.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def png(drawn: Canvas) -> bytes:
    """The figure as a PNG image."""
    out = io.BytesIO()
    with house_style():
        drawn.savefig(out, format="png", dpi=200, metadata={"Software": None})
    return out.getvalue()


def inline(document: str, prefix: str, label: str, colours: Mapping[str, tuple[str, str]]) -> str:
    """An SVG document as an element of a page, with unique ids and colours for both light and dark.

    Args:
        prefix: makes the ids of this figure unique within the page.
        label: plain words without markup, for screen readers.
        colours: name -> (light, dark); the light ones, as drawn, become `var(--name)`.
    """
    element = document[document.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>\s*", "", element, flags=re.DOTALL)
    element = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{prefix}-", element)
    variable = {light: f"var(--{name})" for name, (light, _) in colours.items()}
    element = re.sub(r"#[0-9a-f]{6}\b", lambda found: variable.get(found[0], found[0]), element)
    element = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", element, count=1)
    element = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", element, count=1)
    return element.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def new_canvas(height: float) -> Canvas:
    """An empty figure, `height` inches high."""
    return Canvas(figsize=(WIDTH, height), layout="constrained")


def panels(
    titles: Sequence[str], each: float, margin: float, x: str, y: str, sharey: bool = False
) -> tuple[Canvas, list[Axes]]:
    """A figure of small panels, up to four in a line, and their axes.

    Args:
        each: height of a line of panels, in inches; `margin` is added once.
        x, y: axis labels for all panels.
        sharey: the panels share one scale.
    """
    columns = min(len(titles), 4)
    lines = math.ceil(len(titles) / columns)
    canvas = new_canvas(each * lines + margin)
    grid = canvas.subplots(lines, columns, squeeze=False, sharey=sharey).ravel()
    for axes, title in zip(grid, titles, strict=False):
        axes.set_title(title)
    for axes in grid[len(titles) :]:
        axes.set_visible(False)
    canvas.supxlabel(x, color=_LIGHT["muted"], fontsize=9)
    canvas.supylabel(y, color=_LIGHT["muted"], fontsize=9)
    return canvas, list(grid[: len(titles)])


def legend(canvas: Canvas, axes: Axes, columns: int) -> None:
    """Draw one legend above all axes of a figure."""
    handles, labels = axes.get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), columns), borderaxespad=0.2)


def names_beside(axes: Axes, names: Sequence[str]) -> NDArray[np.int64]:
    """Label the y axis with names, from the top; returns the place of each."""
    places = np.arange(len(names))[::-1]
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", labelcolor=_LIGHT["ink"])
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_ylim(-0.6, len(names) - 0.4)
    return places


def values(estimates: Sequence[Estimate]) -> NDArray[np.float64]:
    """The values: (n,)."""
    return np.array([one.value for one in estimates])


def arms(estimates: Sequence[Estimate]) -> NDArray[np.float64]:
    """Distances from the values to both ends of their intervals, 0 where there is none: (2, n)."""
    lows = [one.value if one.low is None else one.low for one in estimates]
    highs = [one.value if one.high is None else one.high for one in estimates]
    return np.maximum(0.0, [values(estimates) - lows, highs - values(estimates)])
