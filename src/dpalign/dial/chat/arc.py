"""The dial drawn in a terminal: an arc of dots over two objectives, bars over more."""

import math
from typing import Final

from dpalign.dial.chat.terminal import Style, Terminal
from dpalign.dial.dial import Dial
from dpalign.page.words import arithmetic, degrees
from dpalign.paper.direction import Preference

ROWS: Final = 9
"""Lines of a quarter of the circle."""
_DOTS: Final = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Braille's dots in their order, four rows of two."""


def senses(dial: Dial) -> tuple[float, ...]:
    """The signs that weights have in the middle of the trained range: those to show for a weight of 0."""
    if dial.arc is None or len(dial.objectives) != 2:
        return (1.0,) * len(dial.objectives)
    middle = math.radians(sum(dial.arc) / 2)
    return tuple(-1.0 if w < -1e-9 else 1.0 for w in (math.cos(middle), math.sin(middle)))


def words(dial: Dial, preference: Preference) -> str:
    """As the paper writes it: helpfulness*0.97 - verbosity*0.26."""
    return arithmetic(preference.weights, senses(dial))


def label(dial: Dial, preference: Preference | None) -> str:
    """The direction in a few characters: an angle, or weights where there is none."""
    if preference is None:
        return "plain"
    angle = dial.angle_of(preference)
    if angle is not None:
        return degrees(angle)
    return " ".join(f"{name}={w:.2f}" for name, w in preference.weights.items() if abs(w) >= 0.005)


def drawn(terminal: Terminal, dial: Dial, preference: Preference | None) -> list[str]:
    """Where the user stands on the dial, in lines for a terminal."""
    if len(dial.objectives) != 2 or terminal.columns < 44:
        return _scales(terminal, dial, preference)
    return _arc(terminal, dial, preference)


def _arc(terminal: Terminal, dial: Dial, preference: Preference | None) -> list[str]:
    angle = None if preference is None else dial.angle_of(preference)
    low, high = _view(dial, angle)
    canvas = _Canvas(terminal, low, high)
    trained = dial.arc or (low, high)
    for tenth in range(round(low * 10), round(high * 10) + 1, 4):
        inside = trained[0] - 0.01 <= tenth / 10 <= trained[1] + 0.01
        if inside:
            for radius in (0.97, 1.0):
                canvas.dot(tenth / 10, radius, "bold")
        elif tenth % 60 == 0:
            canvas.dot(tenth / 10, 1.0, "dim")
    for edge in trained if dial.arc else ():
        for step in range(24, 96, 6):
            canvas.dot(edge, step / 100, "dim")
    if angle is not None:
        for step in range(96):
            canvas.dot(angle, step / 100, "a")
        canvas.write(angle, 1.1, f"{'o' if terminal.ascii else '●'} {label(dial, preference)}", "a")
    first, second = dial.objectives
    right, up, down = ("->", "^", "v") if terminal.ascii else ("→", "↑", "↓")
    lines = canvas.lines()
    above = [f"  {terminal.styled(f'{up} more {second}', 'dim')}"] if high > 20 else []
    below = [f"  {terminal.styled(f'{down} less {second}', 'dim')}"] if low < -20 else []
    said = [f"  {terminal.styled(f'{first} {right}', 'dim')}"] if high <= 20 else []
    return [*above, *said, *lines, *below, *_said(terminal, dial, preference)]


def _view(dial: Dial, angle: float | None) -> tuple[float, float]:
    """The quarters of the circle that hold the trained range and the direction."""
    low, high = dial.arc or (-90.0, 0.0)
    if angle is not None and not low <= angle <= high:
        low, high = min(low, angle), max(high, angle)
    low, high = 90 * math.floor(low / 90), 90 * math.ceil(high / 90)
    return (low, high) if high - low < 270 else (-180.0, 180.0)


class _Canvas:
    """Dots on a circle, two by four to a character; in ASCII one to a character."""

    def __init__(self, terminal: Terminal, low: float, high: float) -> None:
        self.terminal = terminal
        rays = [0.0, *(low + (high - low) * i / 90 for i in range(91))]
        xs, ys = ([f(math.radians(a)) * (i > 0) for i, a in enumerate(rays)] for f in (math.cos, math.sin))
        self.left, self.top = min(xs), max(ys)
        self.rows = max(1, round((max(ys) - min(ys)) * ROWS)) + 1
        self.cells: dict[tuple[int, int], int] = {}
        self.styles: dict[tuple[int, int], Style] = {}
        self.texts: dict[int, tuple[int, str, Style]] = {}

    def _place(self, angle: float, radius: float) -> tuple[float, float]:
        """(column, row), in characters twice as high as wide."""
        x, y = radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))
        return 2 + (x - self.left) * 2 * ROWS, (self.top - y) * ROWS

    def dot(self, angle: float, radius: float, style: Style) -> None:
        column, row = self._place(angle, radius)
        cell = (int(row + 1e-9), int(column))
        if cell[0] >= self.rows:
            return
        within = _DOTS[int((row + 1e-9 - cell[0]) * 4)][int((column - cell[1]) * 2)]
        self.cells[cell] = self.cells.get(cell, 0) | within
        self.styles[cell] = style

    def write(self, angle: float, radius: float, text: str, style: Style) -> None:
        column, row = self._place(angle, radius)
        column = column if math.cos(math.radians(angle)) > -0.1 else max(0, column - len(text))
        self.texts[min(self.rows - 1, max(0, round(row)))] = (round(column), text, style)

    def lines(self) -> list[str]:
        drawn = []
        for row in range(self.rows):
            at, text, style = self.texts.get(row, (0, "", "plain"))
            last = max((column for r, column in self.cells if r == row), default=-1)
            cells = [self._cell(row, column) for column in range(last + 1)]
            if text:
                cells = (
                    cells[:at]
                    + [" "] * (at - len(cells))
                    + [self.terminal.styled(text, style)]
                    + cells[at + len(text) :]
                )
            drawn.append("".join(cells))
        return drawn

    def _cell(self, row: int, column: int) -> str:
        dots = self.cells.get((row, column), 0)
        if not dots:
            return " "
        style = self.styles[row, column]
        if self.terminal.ascii:
            return self.terminal.styled("*" if style == "a" else "o" if style == "bold" else ".", style)
        return self.terminal.styled(chr(0x2800 + dots), style)


def _scales(terminal: Terminal, dial: Dial, preference: Preference | None) -> list[str]:
    """A line an objective: its weight on a scale from -1 to 1."""
    lines = []
    for name in dial.objectives:
        weight = 0.0 if preference is None else preference.weights[name]
        half = 10
        at = half + round(weight * half)
        scale = ["-" if terminal.ascii else "─"] * (2 * half + 1)
        scale[half] = "|" if terminal.ascii else "┼"
        if preference is not None:
            scale[at] = terminal.styled("o" if terminal.ascii else "●", "a")
        lines.append(f"  {name:{max(map(len, dial.objectives))}}  {''.join(scale)}  {weight:+.2f}")
    return lines + _said(terminal, dial, preference)


def _said(terminal: Terminal, dial: Dial, preference: Preference | None) -> list[str]:
    trained = "" if dial.arc is None else f"; trained on {degrees(dial.arc[0])} to {degrees(dial.arc[1])}"
    if preference is None:
        return [f"no direction: the plain model{trained}"]
    said = [f"{terminal.styled(label(dial, preference), 'a')}  maximize {words(dial, preference)}{trained}"]
    warning = dial.warning(preference)
    return said if warning is None else [*said, terminal.styled(warning, "warning")]
