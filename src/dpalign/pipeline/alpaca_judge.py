"""AlpacaEval's judge: the package `alpaca_eval` asks it, caches its judgements and computes the win rates.

This module adds what the package lacks. Its cache is written whole or not at all. A request that the server
refuses is one failed judgement. A judge that only fails is stopped. `df_gamed.csv` is a path, not a download.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import math
import os
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest import mock

import numpy as np

from dpalign.data.sources import shorten
from dpalign.measure.bootstrap import Array
from dpalign.runs.errors import without_credentials
from dpalign.runs.ledger import hash_of
from dpalign.runs.progress import Progress

OFFICIAL: Final = "weighted_alpaca_eval_gpt4_turbo"
"""AlpacaEval 2's annotator, the one of Fig. 5."""
CHUNK: Final = 16
"""Judgements between two writes of the cache: a kill costs at most these."""
HOPELESS: Final = 5
"""Failures without one success that stop a judge: more of them would cost money for nothing."""
REFUSED: Final = (400, 413, 422)
"""HTTP status codes that refuse one request, such as a prompt too long. Any other stops the command."""
CLIENT: Final = {"timeout": 300.0, "max_retries": 6}
"""Settings of OpenAI's client: seconds for an answer; retries after 408, 409, 429, 5xx and lost connections."""
RATE_LIMITED: Final = "Max retries reached"
"""How the package's warning begins when its last retry met the rate limit; it then goes on without an answer."""
FAILURES: Final = ("Error while parsing", "Cannot find any logprobs", "Found ")
"""How the package's warnings about failed judgements begin."""


@dataclass(frozen=True)
class Pair:
    """The texts of one judgement."""

    instruction: str
    reference: str
    output: str


class Judge:
    """An annotator of the package.

    Args:
        folder: keeps the caches, one file for each point and judge.
        annotator: a name of the package's, or a folder with a configs.yaml of that form.
        model: the model to ask for; None keeps the annotator's own.
        url: base of an OpenAI-compatible server; None leaves address and key to the package.
        key: sent to `url`; None sends none.
        extra: more fields of each request, such as {"chat_template_kwargs": {"enable_thinking": false}}.
        workers: requests to `url` at a time.
        seed: for the order of the two answers, which is drawn for each instruction.

    Raises:
        ValueError: the package is not installed, or no such annotator.
    """

    def __init__(
        self,
        folder: Path,
        *,
        annotator: str = OFFICIAL,
        model: str | None = None,
        url: str | None = None,
        key: str | None = None,
        extra: Mapping[str, Any] | None = None,
        workers: int = 4,
        seed: int = 0,
    ) -> None:
        self.name, self.folder, self._key = model or Path(annotator).name, folder, key
        self._annotator = open_annotator(annotator, seed)
        options: dict[str, Any] = {} if model is None else {"model_name": model}
        if extra:
            options["extra_body"] = dict(extra)
        for single in self._annotator.annotators.values():
            chat = {"requires_chatml": True} if single.prompt_template.startswith("<|im_start|>") else {}
            single.completions_kwargs |= options | chat  # else the package guesses the form from the model's name
        configs = {name: [s.prompt_template, s.completions_kwargs] for name, s in self._annotator.annotators.items()}
        self.identity = {
            "annotator": annotator,
            "model": model,
            "alpaca_eval": importlib.metadata.version("alpaca_eval"),
            "seed": seed,
            "config": hash_of(configs)[:16],
        }
        self._address: dict[str, Any] = {}
        if url is not None:  # in memory alone: no key is written
            base = url.rstrip("/").removesuffix("/chat/completions")
            self._address = {"openai_api_base": base, "openai_api_keys": [key or "none"], "num_procs": workers}
            self._address |= {"client_config_path": os.devnull, "client_kwargs": CLIENT}

    def preferences(
        self, name: str, slug: str, pairs: Sequence[Pair], log: Callable[[str], None], *, retry_failed: bool = False
    ) -> Array:
        """Each pair's preference in [1, 2], NaN if the judgement failed: (P,).

        Earlier judgements come from the cache; so do failures, unless `retry_failed`.

        Raises:
            ValueError: the judge cannot be asked, or every judgement fails; earlier judgements are kept.
        """
        judge = re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip("-.")
        cache = self.folder / f"{slug}-{judge}-{hash_of(self.identity)[:8]}.json"
        cache.parent.mkdir(parents=True, exist_ok=True)
        self._annotator.df_annotations = None
        self._annotator.load_(cache)
        self._annotator.is_store_missing_annotations = not (retry_failed and cache.is_file())
        values: list[float] = []
        asked: list[float] = []  # without the answers equal to the reference's, which cost no request
        reasons: list[str] = []
        with Progress(f"{name}: judgement", len(pairs)) as progress:
            while (start := len(values)) < len(pairs):
                # until its first success a judge is asked for no more than it may fail
                size = HOPELESS - len(asked) if all(map(math.isnan, asked)) else CHUNK
                try:
                    values += self._ask(pairs[start : start + size], reasons)
                except ValueError as error:
                    kept = f"{start} of {len(pairs)} judgements are kept; the same command resumes"
                    raise ValueError(f"{name}: {self.name}: {error} ({kept})") from None
                beside = cache.with_suffix(".partial")
                with package():
                    self._annotator.save(beside)
                os.replace(beside, cache)
                asked = [value for pair, value in zip(pairs, values, strict=False) if pair.output != pair.reference]
                ended = len(asked) >= HOPELESS or len(values) == len(pairs)
                if asked and ended and all(map(math.isnan, asked)):
                    last = " ".join(reasons[-1:])
                    raise ValueError(
                        f"{name}: {self.name}: all of the first {len(asked)} judgements failed ({last}); "
                        "correct the judge, then ask again with --retry-failed"
                    )
                progress.update(len(values))
        if failed := sum(map(math.isnan, values)):
            reason = f": {reasons[-1]}" if reasons else ""
            log(f"{name}: {failed} of {len(values)} judgements failed{reason}")
        return np.array(values)

    def _ask(self, pairs: Sequence[Pair], reasons: list[str]) -> list[float]:
        """One chunk's preferences. If a request is refused, the chunk's pairs are asked one by one."""
        import openai

        rows = [{"instruction": p.instruction, "output_1": p.reference, "output_2": p.output} for p in pairs]
        warned: list[str] = []
        try:
            with package(warned):
                annotated = self._annotator.annotate_pairs(rows, chunksize=None, **self._address)
        except Exception as error:
            reason = self._redacted(f"{type(error).__name__}: {error}")
            if isinstance(error, openai.OpenAIError) and getattr(error, "status_code", None) not in REFUSED:
                raise ValueError(reason) from None
            if len(pairs) > 1:
                return [value for pair in pairs for value in self._ask([pair], reasons)]
            reasons.append(reason)
            return [math.nan]
        if any(line.startswith(RATE_LIMITED) for line in warned):
            raise ValueError("the server keeps refusing for its rate limit; wait, or take fewer --workers")
        reasons += [self._redacted(line) for line in warned if line.startswith(FAILURES)]
        # The cache keeps 10 digits. With 8 here the figures are the same before and after a resume.
        return [math.nan if row["preference"] is None else round(float(row["preference"]), 8) for row in annotated]

    def _redacted(self, text: str) -> str:
        """A server's message without the key, which some servers repeat, and without passwords in URLs."""
        text = without_credentials(text.replace(self._key, "[the key]") if self._key else text)
        return shorten(" ".join(text.split()), 200)


def open_annotator(name: str, seed: int) -> Any:
    """The package's annotator, without its own cache file.

    Raises:
        ValueError: the package is not installed, or no such annotator.
    """
    folder = Path(name)
    try:
        with package():
            from alpaca_eval import annotators, constants

            named = folder.resolve() if (folder / "configs.yaml").is_file() else name
            return annotators.PairwiseAnnotator(annotators_config=named, seed=seed, caching_path=None)
    except ModuleNotFoundError as error:
        raise ValueError(f"a judge needs {error.name}; install it: pip install -e '.[alpaca]'") from error
    except FileNotFoundError:
        known = ", ".join(sorted(path.parent.name for path in constants.EVALUATORS_CONFIG_DIR.glob("*/configs.yaml")))
        raise ValueError(f"--annotator {name}: no folder with a configs.yaml; alpaca_eval has {known}") from None


def win_rates(
    pairs: Sequence[Pair], preference_P: Array, names: tuple[str, str], difficulty: Path | None
) -> dict[str, float]:
    """The package's figures of one point: win_rate, standard_error, n_wins, n_draws and so on.

    Args:
        names: the reference's and the system's.
        difficulty: AlpacaEval's df_gamed.csv; adds length_controlled_winrate and lc_standard_error.

    Raises:
        ValueError: the file has another form, or fewer instructions.
    """
    with package(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pandas  # type: ignore[import-untyped]
        from alpaca_eval.metrics import get_winrate, glm_winrate

        table = pandas.DataFrame({"preference": preference_P}).assign(
            output_1=[pair.reference for pair in pairs],
            output_2=[pair.output for pair in pairs],
            generator_1=names[0],
            generator_2=names[1],
        )
        one_length = len({len(pair.output) - len(pair.reference) for pair in pairs}) == 1
        if difficulty is None or one_length:  # with one length the package would fit only the baselines' rows
            computed = get_winrate(table)
        else:
            try:
                with mock.patch.object(glm_winrate, "hf_hub_download", return_value=str(difficulty)):
                    computed = glm_winrate.get_length_controlled_winrate(table, save_weights_dir=None)
            except (OSError, ValueError, KeyError, AttributeError) as error:
                said = f"{type(error).__name__}: {error}"
                raise ValueError(f"--difficulty {difficulty}: {said}; take this benchmark's df_gamed.csv") from error
    return {name: float(value) for name, value in computed.items() if math.isfinite(value)}


@contextlib.contextmanager
def package(warned: list[str] | None = None) -> Iterator[None]:
    """Keep alpaca_eval's bars and log lines off the screen within this context; its warnings go to `warned`.

    Version 0.6.6 imports two functions of pkg_resources, which setuptools 82 no longer has. A stand-in provides them.
    """
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: None if warned is None else warned.append(record.getMessage())  # type: ignore[method-assign]
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    root.handlers = [handler]
    missing = importlib.util.find_spec("pkg_resources") is None
    if missing:
        from packaging.version import parse

        stand_in: Any = types.ModuleType("pkg_resources")
        stand_in.parse_version, stand_in.get_distribution = parse, importlib.metadata.distribution
        sys.modules["pkg_resources"] = stand_in
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        root.handlers = handlers
        root.setLevel(level)
        if missing:
            del sys.modules["pkg_resources"]
