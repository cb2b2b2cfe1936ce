"""The package `alpaca_eval` with any of its annotators, official prompts and all, asked through our store.

Its own cache is left out: judgements are kept as ours are, one pair at a time, so that an interruption
costs no more than the pairs under way. Its leaderboards and downloads are left out too.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from dpalign.data.sources import shorten
from dpalign.run.ledger import hash_of
from dpalign.stages.alpaca.client import Endpoint, Unavailable
from dpalign.stages.alpaca.judge import Judgement, Pair

PREFIX: Final = "alpaca_eval:"
"""How an annotator of the package is named: `alpaca_eval:weighted_alpaca_eval_gpt4_turbo`, or a folder's path."""
EXHAUSTED: Final = "Max retries reached"
"""What the package logs when a server refused for too long, before it returns an empty completion."""


class PackageJudge:
    """An annotator of the package.

    Args:
        annotator: its name, or the path of a folder with a configs.yaml.
        endpoint: where its OpenAI client asks; None leaves that to the package and its environment variables.
        model: the model to ask for, in place of the annotator's own.
        workers: pairs at a time.
    """

    def __init__(
        self, annotator: str, *, endpoint: Endpoint | None, model: str | None, seed: int = 0, workers: int = 4
    ) -> None:
        self.annotator, self.workers = annotator, workers
        self._made = _annotator(annotator, seed)
        self._given: dict[str, Any] = {}
        if endpoint is not None:
            base = endpoint.url.removesuffix("/chat/completions")
            self._given = {"openai_api_base": base, "openai_api_keys": [endpoint.key or "none"], "num_procs": workers}
        if model is not None:
            for single in self._made.annotators.values():
                single.completions_kwargs = {**single.completions_kwargs, "model_name": model}
        self._endpoint = endpoint
        configs = {
            name: {"prompt": single.prompt_template, "asked": single.completions_kwargs}
            for name, single in self._made.annotators.items()
        }
        self.identity: Mapping[str, Any] = {
            "annotator": f"{PREFIX}{annotator}",
            "version": importlib.metadata.version("alpaca_eval"),
            "config": hash_of(configs)[:16],
            "order_seed": seed,
        }

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.annotator}"

    def ask(self, pairs: Sequence[Pair], keep: Callable[[Pair, Judgement], None]) -> None:
        """See `Judge.ask`; so many pairs at a time as there are workers."""
        for start in range(0, len(pairs), self.workers):
            part = pairs[start : start + self.workers]
            said: list[str] = []
            with _listening(said):
                rows = self._annotate(part)
            lacking = [row for row in rows if row is None]
            for pair, preference in zip(part, rows, strict=True):
                if preference is not None:
                    keep(pair, Judgement(preference))
            if lacking and any(EXHAUSTED in line for line in said):
                raise Unavailable(f"{self.name}: no answer after the package's retries; it said: {_last(said)}")
            for pair, preference in zip(part, rows, strict=True):
                if preference is None:
                    keep(pair, Judgement(None, f"no preference from the annotator: {_last(said)}"))

    def _annotate(self, pairs: Sequence[Pair]) -> list[float | None]:
        """The package's preferences of some pairs, in their order.

        Raises:
            Unavailable: its client could not ask.
        """
        import openai

        rows = [{"instruction": p.instruction, "output_1": p.reference, "output_2": p.output} for p in pairs]
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # its bars: ours says how far it is
                annotated = self._made(rows, **self._given)
        except openai.OpenAIError as error:
            said = str(error) if self._endpoint is None else self._endpoint.redacted(str(error))
            raise Unavailable(f"{self.name}: {type(error).__name__}: {shorten(said, 300)}") from None
        found = {(row["instruction"], row["output_1"], row["output_2"]): row["preference"] for row in annotated}
        return [_preference(found.get((p.instruction, p.reference, p.output))) for p in pairs]


def _preference(found: object) -> float | None:
    value = float(found) if isinstance(found, int | float) else math.nan
    return value if 1 <= value <= 2 else None


def _annotator(name: str, seed: int) -> Any:
    """The package's annotator, without its cache.

    Raises:
        ValueError: the package is not installed, or knows no such annotator.
    """
    try:
        with _listening([]), pkg_resources_stand_in():
            from alpaca_eval import constants
            from alpaca_eval.annotators import PairwiseAnnotator

            return PairwiseAnnotator(annotators_config=name, seed=seed, caching_path=None, is_avoid_reannotations=False)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{PREFIX}{name} needs {error.name}; install it: pip install -e '.[alpaca]' (or leave --annotator out)"
        ) from error
    except FileNotFoundError:
        known = sorted(path.parent.name for path in constants.EVALUATORS_CONFIG_DIR.glob("*/configs.yaml"))
        raise ValueError(f"the package alpaca_eval has no annotator {name!r}; it has {', '.join(known)}") from None


@contextlib.contextmanager
def pkg_resources_stand_in() -> Iterator[None]:
    """Import alpaca_eval within this: 0.6.6 wants two functions of pkg_resources, which setuptools 82 no longer has."""
    if importlib.util.find_spec("pkg_resources") is not None:
        yield
        return
    from packaging.version import parse

    module: Any = types.ModuleType("pkg_resources")
    module.parse_version, module.get_distribution = parse, importlib.metadata.distribution
    sys.modules["pkg_resources"] = module
    try:
        yield
    finally:
        del sys.modules["pkg_resources"]


@contextlib.contextmanager
def _listening(said: list[str]) -> Iterator[None]:
    """Collect what the package warns of meanwhile; the screen is spared, and the root logger left as it was."""

    class Collects(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    root = logging.getLogger()
    level, others = root.level, list(root.handlers)
    root.handlers = [Collects(logging.WARNING)]
    try:
        yield
    finally:
        root.handlers = others
        root.setLevel(level)


def _last(said: Sequence[str]) -> str:
    return shorten(" ".join(said[-1].split()), 200) if said else "it did not say why"
