"""Python functions as rewards: some to use as they are, and the code that finds and calls your own.

A reward function takes prompts and responses, two lists of text. It returns one number per answer. With several heads
it returns an array with a row per answer and a column per head. Name it in a recipe:

    [rewards.length]
    function = "dpalign.rewards.functions:words"

Shapes: N answers, H heads.
"""

import ast
import importlib
import importlib.util
import math
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Function = Callable[[list[str], list[str]], Any]

PACKAGE: Final = Path(__file__).resolve().parents[1]
"""Where this package lies."""
PROBE: Final = (("What is tea?", "Is the sky blue?"), ("A drink made of leaves.", "Yes.\n\n- It is **blue**."))
"""Prompts with an answer each, on which a function is tried before any work."""
WORLD_PROBE: Final = (("explain tea and iron.", "name fox."), ("tea is hot. iron is hard.", "fox is red."))
"""The same in the language of the embedded world."""
LARGEST: Final = 1e12
"""The largest size of a reward: far beyond any rating, and float32 still has room for its square."""


# --- rewards to use as they are ---


def words(prompts: list[str], responses: list[str]) -> list[float]:
    """Count the words of each answer."""
    return [float(len(response.split())) for response in responses]


def log_words(prompts: list[str], responses: list[str]) -> list[float]:
    """Return log(1 + words) of each answer, the natural logarithm: raters' verbosity grows evenly with it."""
    return [math.log1p(len(response.split())) for response in responses]


def sentences(prompts: list[str], responses: list[str]) -> list[float]:
    """Count the sentences of each answer. A full stop, question mark, exclamation mark or empty line ends one."""
    return [float(sum(1 for part in _SENTENCE_END.split(r) if _LETTER.search(part))) for r in responses]


def markdown_share(prompts: list[str], responses: list[str]) -> list[float]:
    """The share of each answer's lines that use markdown, 0 to 1: headings, lists, quotes, tables, code, bold text."""
    return [_markdown_share(response) for response in responses]


def reading_grade(prompts: list[str], responses: list[str]) -> list[float]:
    """The school grade that can read an answer (Flesch-Kincaid); 0 for an answer without words.

    Raises:
        ValueError: the package textstat is not installed, or its dictionary of syllables is not there.
    """
    try:
        import textstat  # type: ignore[import-not-found, unused-ignore]  # an extra

        return [float(textstat.flesch_kincaid_grade(r)) if _LETTER.search(r) else 0.0 for r in responses]
    except ModuleNotFoundError:
        raise ValueError("reading_grade needs textstat, which is not installed: pip install textstat") from None
    except LookupError:  # it reads syllables in a dictionary that it fetches at first use
        raise ValueError(
            "reading_grade needs a dictionary of syllables, once and with a network: python -m nltk.downloader cmudict"
        ) from None


_LETTER: Final = re.compile(r"\w")
_SENTENCE_END: Final = re.compile(r"[.!?]+(?:\s|$)|\n\s*\n")
_FENCE: Final = re.compile(r"\s*(```|~~~)")
_MARKDOWN: Final = re.compile(r"\s*(#{1,6} |[-*+] |\d+[.)] |> |\|.*\|)|.*(\*\*[^*]+\*\*|__[^_]+__|`[^`]+`)")


def _markdown_share(response: str) -> float:
    lines = [line for line in response.splitlines() if line.strip()]
    inside = False
    marked = 0
    for line in lines:
        fence = bool(_FENCE.match(line))
        marked += fence or inside or bool(_MARKDOWN.match(line))
        inside ^= fence
    return marked / len(lines) if lines else 0.0


# --- functions of your own ---


def load_function(source: str, named: str) -> Function:
    """Import the function at module:function, from a package or the current folder.

    Args:
        named: its name in messages.

    Raises:
        ValueError: there is no such function.
    """
    module, _, name = source.partition(":")
    _search_current_folder()
    try:
        function = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        raise ValueError(
            f"{named}: {type(error).__name__}: {error}; name a function that Python can import, as module:function"
        ) from error
    if not callable(function):
        raise ValueError(f"{named}: is a {type(function).__name__}; name a function")
    return function  # type: ignore[no-any-return]


def module_file(source: str) -> Path:
    """Return the file of module:function; an empty path if only an import would find it."""
    _search_current_folder()
    with suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(source.partition(":")[0])
        if spec is not None and spec.origin is not None:
            return Path(spec.origin)
    return Path()


def local_modules(source: str) -> dict[str, Path]:
    """Return the files of a function's module and of all local modules that it imports, by the modules' names.

    Imports are read in the files, and nothing is imported. Installed packages, the standard library and this package
    are left out: they have versions of their own. A module whose name is computed at run time is not found.
    """
    _search_current_folder()
    found: dict[str, Path] = {}
    waiting = [source.partition(":")[0]]
    while waiting:
        for name, path in _on_the_way(waiting.pop()).items():
            if name not in found:
                found[name] = path
                waiting += _imported(name, path)
    return found


def _on_the_way(name: str) -> dict[str, Path]:
    """Return the local files that an import of a module runs: its packages' and its own."""
    files: dict[str, Path] = {}
    places: Sequence[str] | None = None
    parts = name.split(".")
    for end, part in enumerate(parts, start=1):
        with suppress(ImportError, ValueError):
            spec = PathFinder.find_spec(part, places)
            if spec is None and places is None:  # an editable install has a finder of its own
                spec = importlib.util.find_spec(part)
            if spec is None or (spec.has_location and not _is_local(Path(str(spec.origin)))):
                return files
            if spec.has_location:
                files[".".join(parts[:end])] = Path(str(spec.origin))
            if spec.submodule_search_locations is not None:
                places = list(spec.submodule_search_locations)
                continue
        return files
    return files


def _is_local(path: Path) -> bool:
    """Whether a file is neither installed nor a part of Python or of this package."""
    paths = sysconfig.get_paths()
    library = [Path(paths[name]).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return not (
        {"site-packages", "dist-packages"} & set(path.parts)
        or any(path.resolve().is_relative_to(place) for place in (*library, PACKAGE))
    )


def _imported(name: str, path: Path) -> list[str]:
    """Return the modules that a file imports anywhere, also names that may be modules or something in them."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    names: list[str] = []
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # importing it says what is wrong
        return names
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)] if base else []
    return names


def _search_current_folder() -> None:
    """Let imports find the current folder, after all else: nothing in it may hide an installed package."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())


def call(function: Function, prompts: Sequence[str], responses: Sequence[str], heads: int, named: str) -> Array:
    """Call a function; return its rewards (N, H), which may be infinite or NaN.

    Raises:
        ValueError: it fails, or returns another shape, no real numbers, or a number beyond LARGEST. The message shows
            an answer at which it fails.
    """
    try:
        returned = function(list(prompts), list(responses))
    except (Exception, SystemExit) as error:
        place = _fails_at(function, prompts, responses)
        raise ValueError(f"{named}: {type(error).__name__}: {error}{place}") from error
    try:
        given = np.asarray(returned)
        if given.dtype.kind not in "biufO":
            raise ValueError(f"but {given.dtype}: {str(given.ravel()[:3].tolist())[:80]}")
        with np.errstate(over="ignore"):  # a too large number becomes infinite, and callers refuse it
            reward_NH = given.astype(np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{named}: returned no numbers ({error})") from error
    if heads == 1 and reward_NH.shape == (len(responses),):
        reward_NH = reward_NH[:, None]
    if reward_NH.shape != (len(responses), heads):
        wanted = f"({len(responses)}, {heads})" + (f" or ({len(responses)},)" if heads == 1 else "")
        raise ValueError(
            f"{named}: returned shape {reward_NH.shape} for {len(responses)} answers and {heads} heads; return "
            f"{wanted}, or name its heads in `heads`"
        )
    if len(large := np.argwhere(np.isfinite(reward_NH) & (np.abs(reward_NH) > LARGEST))):
        n, h = large[0]
        raise ValueError(
            f"{named}: returned {reward_NH[n, h]:g} for {responses[n][:80]!r}; give rewards within {LARGEST:g}"
        )
    return reward_NH


def _fails_at(function: Function, prompts: Sequence[str], responses: Sequence[str]) -> str:
    """Name the answer at which a function fails, tried one by one; empty if it fails at none alone."""
    for n, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        try:
            function([prompt], [response])
        except (Exception, SystemExit):
            return f" (answer {n} of {len(responses)}, to {prompt[:60]!r}: {response[:80]!r})"
    return ""


def probe(function: Function, heads: int, named: str, *, world: bool = False) -> None:
    """Try a function on two tiny questions.

    Args:
        world: ask in the language of the embedded world.

    Raises:
        ValueError: it fails, or returns another shape or a number that is not finite.
    """
    prompts, responses = WORLD_PROBE if world else PROBE
    reward_NH = call(function, prompts, responses, heads, named)
    if not np.isfinite(reward_NH).all():
        raise ValueError(
            f"{named}: returned {reward_NH.tolist()} for {list(responses)}; a reward must be a finite number"
        )
