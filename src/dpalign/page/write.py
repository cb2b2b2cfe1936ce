"""Write the report of a run: one page that holds all it shows, beside its figures and its numbers as data."""

import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from dpalign.measure.summary import jsonable
from dpalign.page.accounts import costs_table, data_table, quality_tables, stages_table
from dpalign.page.compared_tables import (
    ablation_table,
    budget_table,
    differences_table,
    specialists_table,
    table_1,
    tuning_table,
)
from dpalign.page.compared_words import recipe_note, trust_warning, undecided, what_was_run
from dpalign.page.dial import dial_data
from dpalign.page.drawing import Plot, inline, png, svg
from dpalign.page.figures import plots
from dpalign.page.headline import headline, left_out
from dpalign.page.seeds_tables import seeds_of_comparison, seeds_tables
from dpalign.page.systems import System, colours, last_iteration, systems_of
from dpalign.page.tables import dominance_tables, gap_table, sensitivity_table, systems_table
from dpalign.page.trust_tables import feasibility_tables, pairwise_table, trust_table
from dpalign.run.folder import write_json, write_text


def write_report(
    folder: Path,
    summary: Mapping[str, Any],
    *,
    answers: Sequence[Mapping[str, Any]] = (),
    quality: Mapping[str, Any] | None = None,
    data_reports: Sequence[Mapping[str, Any]] = (),
    stages: Sequence[Mapping[str, Any]] = (),
    recipe_text: str = "",
    title: str = "dpalign",
) -> Path:
    """Write index.html, figures/*.svg and *.png, summary.json and answers.json; returns the page.

    Each file appears whole or not at all, the page last. The page loads nothing: it can be sent by mail.

    Args:
        folder: made where it is missing.
        summary: of `evaluation.summary.summarize`.
        answers: {prompt, system, iteration, condition, angle, response, rewards, true_rewards}, one a sample;
            `condition` is the direction by objective, None for a system that no direction steers.
        quality: {heads, objectives, on_policy, baseline} of the reward model, any of them missing.
        data_reports: `ReadReport.to_json` of every file read.
        stages: the ledgers of the run, in their order.
        recipe_text: the resolved recipe as TOML.

    Raises:
        ValueError: an answer without its prompt, system, response or rewards.
    """
    drawn = plots(summary, systems_of(summary))
    page = render_page(
        summary,
        drawn,
        answers=answers,
        quality=quality or {},
        data_reports=data_reports,
        stages=stages,
        recipe_text=recipe_text,
        title=title,
    )
    for plot in drawn.values():
        write_text(folder / "figures" / f"{plot.name}.svg", svg(plot.wide, plot.name))
        _write_bytes(folder / "figures" / f"{plot.name}.png", png(plot.wide))
    write_json(folder / "summary.json", jsonable(summary))
    write_json(folder / "answers.json", jsonable(list(answers)))
    write_text(folder / "index.html", page)
    return folder / "index.html"


def render_page(
    summary: Mapping[str, Any],
    drawn: Mapping[str, Plot],
    *,
    answers: Sequence[Mapping[str, Any]],
    quality: Mapping[str, Any],
    data_reports: Sequence[Mapping[str, Any]],
    stages: Sequence[Mapping[str, Any]],
    recipe_text: str,
    title: str,
) -> str:
    """The page as text, from `figures.plots` and the arguments of `write_report`."""
    systems = systems_of(summary)
    last, palette = last_iteration(systems), colours(systems)
    dial = dial_data(jsonable(list(answers)), summary, systems)
    dominance, more_dominance = dominance_tables(summary, systems)
    judged, _ = dominance_tables(summary, systems, "dominance_judged")
    truth_known = summary["measure"] == "true"
    return _template().render(
        title=title,
        headline=headline(summary, systems),
        left_out=left_out(summary),
        dial=dial,
        plots={name: _inlined(plot, palette) for name, plot in drawn.items()},
        systems=systems_table(summary, systems),
        systems_judged=systems_table(summary, systems, judged=True) if truth_known else None,
        dominance=dominance,
        more_dominance=more_dominance,
        dominance_judged=judged,
        seeds=[*seeds_tables(summary, systems), *seeds_of_comparison(summary, systems)],
        gap=gap_table(summary, systems),
        comparison=comparison_part(summary, systems),
        trust=trust_table(summary),
        warning=trust_warning(summary),
        pairwise=pairwise_table(summary),
        quality=quality_tables(jsonable(quality)),
        sensitivity=sensitivity_table(summary, systems),
        stages=stages_table(stages),
        costs=costs_table(summary) if not summary.get("comparison") else None,  # which has budgets of its own
        data=data_table(data_reports),
        recipe_text=recipe_text,
        recipe_note=recipe_note(summary),
        palette=palette,
        accent=last.look.name if last is not None else "ink",
        css=Markup(_resource("page.css")),
        js=Markup(_resource("page.js")),
    )


def comparison_part(summary: Mapping[str, Any], systems: Sequence[System]) -> dict[str, Any] | None:
    """What the section of a comparison holds; None of a run without one."""
    if not summary.get("comparison"):
        return None
    return {
        "words": what_was_run(summary, systems),
        "undecided": undecided(summary, systems),
        "differences": differences_table(summary, systems),
        "table_1": table_1(summary, systems),
        "specialists": specialists_table(summary, systems),
        "tuning": tuning_table(summary, systems),
        "budget": budget_table(summary, systems),
        "feasibility": feasibility_tables(summary),
        "ablations": ablation_table(summary, systems),
    }


def _inlined(plot: Plot, palette: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """A figure as the template wants it: two SVG elements, of which a screen shows one."""
    label = str(escape(plot.title))
    wide, narrow = (
        inline(svg(canvas, f"{plot.name}-{width}"), f"{plot.name}-{width}", label, palette)
        for width, canvas in (("wide", plot.wide), ("narrow", plot.narrow))
    )
    return {
        "name": plot.name,
        "title": plot.title,
        "caption": plot.caption,
        "wide": Markup(wide),
        "narrow": Markup(narrow),
    }


@cache
def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "ensure_ascii": False, "separators": (",", ":")}
    environment.filters["subscript"] = lambda text: Markup(str(escape(text)).replace("E_v", "E<sub>v</sub>"))
    return environment.from_string(_resource("page.html.j2"))


def _resource(name: str) -> str:
    return files("dpalign.page").joinpath(name).read_text(encoding="utf-8")


def _write_bytes(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.partial")
    beside.write_bytes(content)
    os.replace(beside, path)
