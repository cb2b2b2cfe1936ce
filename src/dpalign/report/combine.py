"""Several full-pipeline seeds of one recipe on one page: the claims that a paper makes rest on these."""

import json
from collections.abc import Sequence
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
    policies = [name for name, system in first["systems"].items() if system["iteration"]]
    differences = [(policies[-1], name) for name in policies[:-1]]
    seeds = combine_seeds(summaries, differences)
    write_json(out / "seeds.json", seeds)
    return write_report(out, first | {"seeds": seeds}, answers=_read(runs[0], "answers.json"), **page)


def _read(run: Path, name: str) -> Any:
    path = run / "report" / name
    if not path.is_file():
        raise ValueError(f"{path}: missing; finish the run with `dpa run` first")
    return json.loads(path.read_text(encoding="utf-8"))
