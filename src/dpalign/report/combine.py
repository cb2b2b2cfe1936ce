"""Several full-pipeline seeds of one recipe on one page: the claims that a paper makes rest on these."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpalign.evaluation.seeds import combine_seeds
from dpalign.report.write import write_report
from dpalign.runs import write_json


def combine(runs: Sequence[Path], out: Path) -> Path:
    """The first run's page, with the figures over the seeds of all; returns the page.

    Raises:
        ValueError: fewer than two runs, one without a finished report, or two of one seed.
    """
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} run to combine; name the folders of at least two seeds")
    summaries: dict[int, dict[str, Any]] = {}
    for run in runs:
        summary = _read(run, "summary.json")
        (seed,) = summary["seeds"]["seeds"]
        if seed in summaries:
            raise ValueError(f"{run}: seed {seed} a second time; a seed counts once")
        summaries[seed] = summary
    first, page = _read(runs[0], "summary.json"), _read(runs[0], "page.json")
    seeds = combine_seeds(summaries, pairs_to_compare(list(summaries.values())))
    write_json(out / "seeds.json", seeds)
    return write_report(out, first | {"seeds": seeds}, answers=_read(runs[0], "answers.json"), **page)


def pairs_to_compare(summaries: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The last iteration against every other system that all runs share."""
    shared = {
        name: system["iteration"]
        for name, system in summaries[0]["systems"].items()
        if all(name in summary["systems"] for summary in summaries)
    }
    last = max((name for name in shared if shared[name]), key=lambda name: shared[name] or 0, default=None)
    return [(last, name) for name in shared if name != last] if last is not None else []


def _read(run: Path, name: str) -> Any:
    path = run / "report" / name
    if not path.is_file():
        raise ValueError(f"{path}: missing; finish the run with `dpa run` first")
    return json.loads(path.read_text(encoding="utf-8"))
