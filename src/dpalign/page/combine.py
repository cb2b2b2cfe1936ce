"""One page for several full-pipeline seeds of one recipe; a paper's claims rest on these."""

import argparse
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from dpalign.measure.record import rounded
from dpalign.measure.seeds import combine_seeds
from dpalign.measure.summary import Summary
from dpalign.page.write import write_report
from dpalign.runs.tables import leaves

OF_NO_RESULT: Final = (
    *("name", "seed", "threads", "launcher", "jobs", "processes", "launch", "cluster", "engines", "kernels", "compare"),
    "report_to",
    *("sampling.rows", "sampling.shard", "reward.score_tokens", "reward.share_prefix"),
)
"""Knobs and tables that may differ between runs of one recipe: the name and the seed, where and how fast a run
computes, and what DPA is compared with."""
OF_A_TRAINING: Final = ("micro_batch", "save_every")
"""The same, for the knobs of any training."""
SUMMARY: Final = Path("report", "summary.json")


def combine(runs: Sequence[Path], out: Path) -> Path:
    """Write the first run's page with the figures over all seeds; returns the page's path.

    Raises:
        ValueError: fewer than two runs, one without a finished report, two of one seed, or runs of two recipes; a
            folder that holds another page.
    """
    require_free(out)
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} run to combine; name the folders of at least two seeds")
    summaries: dict[int, Summary] = {}
    for run in runs:
        summary = read_summary(run)
        if summary.seed in summaries:
            raise ValueError(f"{run}: seed {summary.seed} a second time; a seed counts once")
        summaries[summary.seed] = summary
    require_one_recipe(dict(zip(runs, summaries.values(), strict=True)))
    first = next(iter(summaries.values()))
    seeds = combine_seeds(summaries, pairs_to_compare(list(summaries.values())))
    return write_report(out, rounded(first.model_copy(update={"seeds": seeds})))


def require_free(out: Path) -> None:
    """Raise ValueError if the page would replace files that `dpa combine` did not write."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: a file; name a folder")
    taken = next((out / name for name in ("index.html", "summary.json", "figures") if (out / name).exists()), None)
    try:
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        ours = bool(summary["systems"]) and bool(summary["seeds"]["seeds"])
    except (OSError, ValueError, TypeError, KeyError):
        ours = False
    if taken is not None and not ours:
        raise ValueError(f"{taken}: stands already, and is not of a page that dpa combine wrote; name another place")


def read_summary(run: Path) -> Summary:
    """The Summary of a finished run.

    Raises:
        ValueError: the summary is missing, damaged, or of another version.
    """
    path = run / SUMMARY
    if not path.is_file():
        raise ValueError(f"{path}: missing; finish the run with `dpa run` first")
    try:
        return Summary.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise ValueError(f"{path}: of another version, or damaged; `dpa run` writes it again") from error


def require_one_recipe(summaries: dict[Path, Summary]) -> None:
    """Require one recipe for all runs: a t-interval needs runs that differ by chance alone.

    Raises:
        ValueError: two recipes; the message names both files, the knob that differs, and both values.
    """
    first, *others = [(run, _knobs(summary)) for run, summary in summaries.items()]
    for run, knobs in others:
        key = next((key for key in {**first[1], **knobs} if first[1].get(key) != knobs.get(key)), None)
        if key is not None:
            values = [f"{read.get(key, 'unknown')!r} in {one / SUMMARY}" for one, read in (first, (run, knobs))]
            raise ValueError(
                f"two recipes: {key} is {' and '.join(values)}; combine the seeds of one recipe, which differ by "
                "chance alone"
            )


def _knobs(summary: Summary) -> dict[str, Any]:
    """The knobs that decide a run's results."""
    return {key: value for key, value in leaves(tomllib.loads(summary.recipe_text)) if _decides(key)}


def _decides(key: str) -> bool:
    parts = key.split(".")
    return not ({parts[0], key} & set(OF_NO_RESULT)) and parts[-1] not in OF_A_TRAINING


def pairs_to_compare(summaries: Sequence[Summary]) -> list[tuple[str, str]]:
    """The last iteration against every other system that all runs share."""
    shared = [
        one for name, one in summaries[0].systems.items() if all(name in summary.systems for summary in summaries)
    ]
    last = max((one for one in shared if one.system.iteration), key=lambda one: one.system.iteration or 0, default=None)
    return [(last.name, one.name) for one in shared if one is not last] if last is not None else []


def declare(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dpa combine`."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the finished run folder of a seed")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write the page into")


def execute(arguments: argparse.Namespace, _: Sequence[str]) -> str:
    """Write the page; returns its path."""
    return str(combine(arguments.runs, arguments.out))
