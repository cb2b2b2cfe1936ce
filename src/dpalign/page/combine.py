"""Several full-pipeline seeds of one recipe on one page: the claims that a paper makes rest on these."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from dpalign.measure.seeds import combine_seeds
from dpalign.page.write import write_report
from dpalign.recipe import Recipe
from dpalign.run.folder import write_json
from dpalign.run.tables import leaves

OF_NO_RESULT: Final = (
    *("name", "seed", "threads", "launcher", "jobs", "processes", "launch", "cluster", "engines", "kernels", "compare"),
    *("sampling.rows", "sampling.shard", "reward.score_tokens", "reward.share_prefix"),
)
"""Knobs, and tables of them, in which the runs of one recipe may differ: what draws the seed, where and how fast it is
computed, and what stands beside DPA."""
OF_A_TRAINING: Final = ("micro_batch", "save_every")
"""The same of every training."""
PAGE: Final = Path("report", "page.json")
"""Where a run keeps its resolved recipe beside its report."""


def combine(runs: Sequence[Path], out: Path) -> Path:
    """The first run's page, with the figures over the seeds of all; returns the page.

    Raises:
        ValueError: fewer than two runs, one without a finished report, two of one seed, or runs of two recipes.
    """
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} run to combine; name the folders of at least two seeds")
    require_one_recipe(runs)
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


def require_one_recipe(runs: Sequence[Path]) -> None:
    """A t-interval is over runs that differ by chance alone.

    Raises:
        ValueError: naming the files of two runs, the knob in which their recipes differ, and both values.
    """
    first, *others = [(run, _knobs(run)) for run in runs]
    for run, knobs in others:
        key = next((key for key in {**first[1], **knobs} if first[1].get(key) != knobs.get(key)), None)
        if key is not None:
            values = [f"{read.get(key, 'unknown')!r} in {one / PAGE}" for one, read in (first, (run, knobs))]
            raise ValueError(
                f"two recipes: {key} is {' and '.join(values)}; combine the seeds of one recipe, which differ by "
                "chance alone"
            )


def _knobs(run: Path) -> dict[str, Any]:
    """The knobs that decide a run's results, those that its recipe did not know yet with their defaults."""
    read = tomllib.loads(_read(run, "page.json")["recipe_text"])
    known = dict(leaves(Recipe(name=run.name).as_mapping()))
    return {key: value for key, value in (known | dict(leaves(read))).items() if _decides(key)}


def _decides(key: str) -> bool:
    parts = key.split(".")
    return not ({parts[0], key} & set(OF_NO_RESULT)) and parts[-1] not in OF_A_TRAINING


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
