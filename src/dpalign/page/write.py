"""Write the report of a run: one page that holds all it shows, beside its figures and its Summary as data."""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from dpalign.measure.summary import Summary
from dpalign.page import comparison_tables as compared
from dpalign.page import headline, tables
from dpalign.page.dial import dial_data
from dpalign.page.drawing import Plot, inline, svg
from dpalign.page.figures import plots
from dpalign.page.looks import colours, looks_of
from dpalign.run.folder import write_json, write_text
from dpalign.run.progress import spell_seconds


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


def render_page(summary: Summary, drawings: Mapping[str, tuple[Plot, str]]) -> str:
    """The page as text.

    Args:
        drawings: figures with their SVG documents, by name.
    """
    last, palette = summary.last, colours(summary)
    own = [row for row in summary.dominance if last is not None and row.a == last.name]
    judged = [row for row in summary.dominance_judged or () if last is not None and row.a == last.name]
    return str(
        _template().render(
            title=summary.title or "dpalign",
            world=summary.world,
            prompt=summary.answers[0].prompt if summary.answers else "",
            sentences=headline.headline(summary),
            scope=headline.scope(summary),
            tiles=headline.tiles(summary),
            left_out=headline.left_out(summary),
            warning=headline.warning(summary),
            recipe_note=headline.recipe_note(summary),
            machine=headline.machine_words(summary),
            seconds=sum(stage.seconds for stage in summary.stages),
            spelled=spell_seconds,
            dial=dial_data(summary),
            plots={name: _inlined(*drawing, palette) for name, drawing in drawings.items()},
            verdicts=tables.verdicts_table(summary),
            systems=tables.systems_table(summary),
            systems_judged=tables.systems_table(summary, judged=True) if summary.measure == "true" else None,
            dominance=tables.dominance_table(summary, own),
            more_dominance=tables.dominance_table(summary, [row for row in summary.dominance if row not in own]),
            dominance_judged=tables.dominance_table(summary, judged),
            sensitivity=tables.sensitivity_table(summary),
            seeds=tables.seeds_tables(summary),
            comparison=_comparison(summary),
            quality=tables.quality_tables(summary),
            pairwise=tables.pairwise_table(summary),
            trust=tables.trust_table(summary),
            gap=tables.gap_table(summary),
            costs=tables.costs_table(summary),
            stages=tables.stages_table(summary),
            data=tables.data_table(summary.data_reports),
            recipe_text=summary.recipe_text,
            palette=palette,
            accent=looks_of(summary)[last.name].name if last is not None else "ink",
            css=Markup(_resource("page.css")),
            js=Markup(_resource("page.js")),
        )
    ).lstrip()


def _comparison(summary: Summary) -> dict[str, Any] | None:
    """What the section of a comparison holds; None of a run without one."""
    found = summary.comparison
    if found is None:
        return None
    return {
        "wishes": compared.wishes_table(summary, found),
        "table_1": compared.table_1(summary, found),
        "specialists": compared.specialists_table(summary, found),
        "tuning": compared.tuning_table(summary, found),
        "feasibility": compared.feasibility_tables(summary, found),
        "ablations": compared.ablation_table(summary, found),
    }


def _inlined(plot: Plot, document: str, palette: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """A figure as the template wants it."""
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
