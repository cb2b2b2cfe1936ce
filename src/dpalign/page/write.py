"""Write the report of a run: one self-contained page, its figures as SVG, and its Summary as JSON."""

from base64 import b64encode
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from dpalign.measure.summary import Summary
from dpalign.page import comparison_tables, headline, tables
from dpalign.page.comparison_figures import comparison_plots
from dpalign.page.dial import dial_data
from dpalign.page.drawing import Plot, inline, svg
from dpalign.page.figures import loop_plots
from dpalign.page.looks import colours, looks_of
from dpalign.page.several_figures import several_plots
from dpalign.runs.folder import write_json, write_text
from dpalign.runs.progress import spell_seconds


def write_report(folder: Path, summary: Summary) -> Path:
    """Write index.html, figures/*.svg and summary.json; returns the page.

    Each file appears whole or not at all, the page last. The page loads nothing: it can be sent by mail.
    """
    drawings = {name: (plot, svg(plot.canvas, name)) for name, plot in plots(summary).items()}
    for name, (_, document) in drawings.items():
        write_text(folder / "figures" / f"{name}.svg", document)
    write_json(folder / "summary.json", summary.model_dump(mode="json"))
    write_text(folder / "index.html", render_page(summary, drawings))
    return folder / "index.html"


def plots(summary: Summary) -> dict[str, Plot]:
    """All figures that this summary has the data for, by name."""
    return {plot.name: plot for plot in (*loop_plots(summary), *several_plots(summary), *comparison_plots(summary))}


def render_page(summary: Summary, drawings: Mapping[str, tuple[Plot, str]]) -> str:
    """The page as text.

    Args:
        drawings: figures with their SVG documents, by name.
    """
    last, palette, js = summary.last, colours(summary), _resource("page.js")
    return str(
        _template().render(
            summary=summary,
            words=headline,
            tables=tables,
            compared=comparison_tables,
            spelled=spell_seconds,
            dial=dial_data(summary),
            plots={name: _inlined(*drawing, palette) for name, drawing in drawings.items()},
            palette=palette,
            accent=looks_of(summary)[last.name].name if last is not None else "ink",
            css=Markup(_resource("page.css")),
            js=Markup(js),
            js_digest=b64encode(sha256(js.encode()).digest()).decode(),  # a browser runs this script alone
        )
    ).lstrip()


def _inlined(plot: Plot, document: str, palette: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """A figure as the template reads it."""
    element = inline(document, plot.name, str(escape(plot.title)), palette)
    return {"name": plot.name, "title": plot.title, "caption": plot.caption, "svg": Markup(element)}


@cache
def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "ensure_ascii": False, "separators": (",", ":")}
    environment.filters["subscript"] = lambda text: Markup(str(escape(text)).replace("E_v", "E<sub>v</sub>"))
    return environment.from_string(_resource("page.html.j2"))


def _resource(name: str) -> str:
    return files("dpalign.page").joinpath(name).read_text(encoding="utf-8")
