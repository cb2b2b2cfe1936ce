"""`dpa reproduce RUN`: make a run again from its own recipe, and list the differences.

It ends with code 0 if all files are identical, with 1 if some differ, and with 2 if it could not be done.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dpalign.pipeline import runner
from dpalign.pipeline.ready import require_machine
from dpalign.pipeline.steps import steps, steps_until
from dpalign.recipe import Recipe, load
from dpalign.runs.differences import difference
from dpalign.runs.folder import Run
from dpalign.runs.ledger import LEDGER, Ledger, other_versions, read_ledger
from dpalign.runs.tables import changes
from dpalign.stages.report import report
from dpalign.stages.stage import Step


def declare(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the folder of a run")
    where = "the folder to make it again in; a second call goes on there (default: RUN-reproduced)"
    add("--out", type=Path, metavar="DIR", help=where)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--until", metavar="STEP", help="the last step to make (default: the last that RUN has finished)"
    )
    which.add_argument("--stage", metavar="STEP", help="make this step alone, from RUN's own earlier stages")
    parser.epilog = (
        "Nothing in RUN is changed. Ends with code 0 where all files are identical, 1 where some differ, 2 where it "
        "could not be done. Times by the clock are left out. Call it in the folder that the run was started in."
    )


def execute(arguments: argparse.Namespace, _: Sequence[str]) -> str:
    """Make the steps again. Return the differences as text; exit with code 1 if there are any."""
    run: Path = arguments.run.resolve()
    out: Path = (arguments.out or run.with_name(f"{run.name}-reproduced")).resolve()
    if not (run / "recipe.toml").is_file():
        raise ValueError(f"{arguments.run}: no run; it has no recipe.toml")
    if out == run or out.is_relative_to(run):
        raise ValueError(f"--out {out}: lies in the run itself; name another place")
    recipe = load(run / "recipe.toml")
    compared = is_compared(recipe, run)
    if arguments.stage:
        made = [make_alone(recipe, run, out, finished(recipe, run, arguments.stage, compared)[-1])]
    else:
        made = finished(recipe, run, arguments.until, compared)
        runner.execute(recipe, out, made[-1].name, compared)
    done = [step.name for step in made if (run / step.name / LEDGER).is_file()]
    verdicts = [compare(run / name, out / name) for name in done]
    text = as_text(verdicts, out)
    if not all(one.identical for one in verdicts):
        sys.stdout.write(f"{text}\n")
        sys.exit(1)
    return text


@dataclass(frozen=True)
class Verdict:
    """How a stage that was made again compares with the first one."""

    stage: str
    files: int
    differences: dict[str, str]
    """What differs, by file; under the ledger's name, its counts."""
    otherwise: tuple[str, ...]
    """Possible causes: knobs, inputs, code or packages that differ."""

    @property
    def identical(self) -> bool:
        return not self.differences


def is_compared(recipe: Recipe, run: Path) -> bool:
    """Whether a run was made by `dpa compare`: it has finished steps that `dpa run` does not take."""
    own = {step.name for step in steps(recipe)}
    if not any(path.parent.name not in own for path in run.glob(f"*/{LEDGER}")):
        return False
    return any((run / step.name / LEDGER).is_file() for step in steps(recipe, True) if step.name not in own)


def finished(recipe: Recipe, run: Path, until: str | None, compared: bool) -> list[Step]:
    """The steps to make: all up to `until`, or to the last that the run has finished.

    Raises:
        ValueError: there is no such step, or the run has not finished it.
    """
    planned = steps_until(recipe, until, compared)
    done = [step for step in planned if (run / step.name / LEDGER).is_file()]
    if not done or (until is not None and done[-1].name != until):
        raise ValueError(
            f"{run}: has not finished {until or 'any step of its recipe'}; there is nothing to compare with"
        )
    return planned[: planned.index(done[-1]) + 1]


def make_alone(recipe: Recipe, run: Path, out: Path, step: Step) -> Step:
    """Make one step from the run's own stages."""
    alone = replace(step, inputs={name: run / value for name, value in step.inputs.items()})
    require_machine(recipe, [alone])
    with Run.open(out, recipe.to_toml()) as opened:
        runner.take(recipe, opened, alone)
    return step


def compare(before: Path, after: Path) -> Verdict:
    """What differs between a stage and the same one made again. Of a report only JSON: the page is drawn from it.

    Raises:
        ValueError: a ledger or a file that cannot be read.
    """
    old, new = read_ledger(before), read_ledger(after)
    files = sorted(old["outputs"].keys() | new["outputs"].keys())
    if old["name"] == report.name:
        files = [file for file in files if file.endswith(".json")]
    apart: dict[str, str] = {}
    for file in files:
        if file not in new["outputs"] or file not in old["outputs"]:
            apart[file] = "was not made again" if file in old["outputs"] else "was not there before"
        elif old["outputs"][file] != new["outputs"][file] and (what := difference(before / file, after / file)):
            apart[file] = what
    if counts := changes(dict(old["counts"]), dict(new["counts"])):
        apart[LEDGER] = f"counts: {'; '.join(counts)}"
    return Verdict(old["name"], len(files), apart, tuple(_otherwise(old, new)) if apart else ())


def _otherwise(old: Ledger, new: Ledger) -> list[str]:
    """What was different before the stages were made, by their ledgers."""
    said = changes({"version": old["version"], **old["knobs"]}, {"version": new["version"], **new["knobs"]})
    inputs = {name: (one, new["inputs"].get(name, one)) for name, one in old["inputs"].items()}
    said += [f"input {key} differs" for key, (a, b) in inputs.items() if a["path"] == b["path"] and a != b]
    if other := other_versions(old.get("packages", {}), new.get("packages", {})):
        said.append(f"packages: {other}")
    if old["git_commit"] != new["git_commit"]:
        said.append(f"code of commit {old['git_commit']} -> {new['git_commit']}")
    return said


def as_text(verdicts: Sequence[Verdict], out: Path) -> str:
    """One line a stage with its differences below, and at the end the number of identical stages."""
    width = max(len(one.stage) for one in verdicts)
    lines = []
    for one in verdicts:
        said = (
            f"{one.files} files identical" if one.identical else f"{len(one.differences)} of {one.files} files differ"
        )
        lines.append(f"{one.stage:{width}}  {said}")
        lines += [f"  {file}: {what}" for file, what in one.differences.items()]
        lines += [f"  before: {what}" for what in one.otherwise]
    same = sum(one.identical for one in verdicts)
    return "\n".join([*lines, f"{same} of {len(verdicts)} stages are identical; made again in {out}"])
