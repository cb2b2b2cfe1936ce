"""The argument RECIPE of a command line."""

import argparse
from pathlib import Path

from dpalign.runs.environment import RECIPES, shipped


def recipe_file(name: str) -> Path:
    """The recipe file that a command line means: a path, or the name of an installed one.

    Raises:
        ValueError: neither.
    """
    if Path(name).is_file() or name.endswith(".toml") or "/" in name:
        return Path(name)  # reading it reports what is wrong
    if name not in shipped():
        raise ValueError(f"{name}: no such recipe file, and no installed recipe either ({', '.join(shipped())})")
    return RECIPES / f"{name}.toml"


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The argument RECIPE of a verb."""
    names = ", ".join(shipped())
    parser.add_argument("recipe", metavar="RECIPE", help=f"a TOML file, or the name of an installed recipe: {names}")
