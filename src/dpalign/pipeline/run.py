"""`run` in Python: does what `dpa run` does, and gives access to the run's policy and figures."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpalign.pipeline import runner
from dpalign.pipeline.shipped import recipe_file
from dpalign.recipe import Recipe, changed, dotted, load
from dpalign.runs.progress import SILENT
from dpalign.runs.tables import literal

if TYPE_CHECKING:
    from dpalign import Policy
    from dpalign.measure.summary import Summary


@dataclass(frozen=True)
class RunResult:
    """A run that has taken its steps."""

    folder: Path

    @property
    def page(self) -> Path:
        """The report, to open in a browser."""
        return self.folder / "report" / "index.html"

    @cached_property
    def summary(self) -> "Summary":
        """The figures of the report.

        Raises:
            ValueError: the run stopped before its report.
        """
        from dpalign.measure.summary import Summary

        path = self.folder / "report" / "summary.json"
        if not path.is_file():
            raise ValueError(f"{self.folder}: no report yet; run it to the end, without until")
        return Summary.model_validate_json(path.read_text(encoding="utf-8"))

    @cached_property
    def policy(self) -> "Policy":
        """The last policy with the run's rewards, your own functions included; loaded once.

        Raises:
            ValueError: the run has no finished policy.
        """
        from dpalign import Policy

        named = load(self.folder / "recipe.toml").rewards
        rewards = [f"{name}={reward.source or self.folder / 'reward'}" for name, reward in named.items()]
        return Policy.load(self.folder, reward=rewards or True)


def run(
    recipe: str | Path | Recipe,
    out: str | Path | None = None,
    *,
    until: str | None = None,
    compared: bool = False,
    quiet: bool = False,
    **overrides: Any,
) -> RunResult:
    """Take every step of a recipe that is not done yet, as `dpa run` does.

        run("micro", out="runs/small", seed=2, sampling={"n": 8})

    Args:
        recipe: a TOML file, the name of an installed recipe, or a `Recipe`.
        out: the run folder; None: runs/ and the recipe's name.
        until: the last step to take; None takes all.
        compared: also take the steps of every system that the recipe compares, as `dpa compare` does.
        quiet: write nothing to stderr. In a notebook the lines of progress are left out anyway.
        overrides: knobs by name; those of a table as a mapping.

    Raises:
        ValueError: a recipe, knob or input that is refused; names it.
    """
    knobs = dict(dotted(Recipe, overrides))
    if isinstance(recipe, Recipe):
        chosen = changed(recipe, knobs)
    else:
        chosen = load(recipe_file(str(recipe)), [f"--{key}={literal(value)}" for key, value in knobs.items()])
    folder = Path("runs") / chosen.name if out is None else Path(out)
    with _silence(quiet):
        return RunResult(runner.execute(chosen, folder, until, compared))


@contextlib.contextmanager
def _silence(quiet: bool) -> Iterator[None]:
    """Hide the lines of progress in a notebook, which would keep them all; if quiet, all of stderr."""
    with contextlib.ExitStack() as stack:
        if quiet or "ipykernel" in sys.modules:
            stack.enter_context(_environment(SILENT))
        if quiet:
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
