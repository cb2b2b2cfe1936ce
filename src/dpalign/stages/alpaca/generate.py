"""Answers of a policy to the benchmark's instructions: one stage a direction, resumed by shard."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from dpalign.recipe import Recipe, config
from dpalign.rows import CANDIDATES, prompt_id, read_table, user_prompt, write_rows
from dpalign.run.environment import settle_threads
from dpalign.run.folder import Run, Work, write_json
from dpalign.stages.alpaca.benchmark import write_outputs
from dpalign.stages.alpaca.systems import OUTPUTS, SYSTEM, Point
from dpalign.stages.stage import knobs_read

VERSION: Final = 1
KNOBS: Final = (
    *("seed", "threads", "evaluation.temperature", "sampling.max_new_tokens", "sampling.rows", "sampling.shard"),
    *("model.dtype", "model.trust_remote_code", "engines.sampling", "engines.tensor_parallel"),
)
"""The recipe's knobs that answers depend on."""


class Policies:
    """Opens the engine of one policy at a time, when the first of its points needs it."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._open: tuple[Path, Any] | None = None

    def engine(self, policy: Path) -> Any:
        """The policy's engine.

        Raises:
            ValueError: a package is missing, or a folder without weights.
        """
        if self._open is None or self._open[0] != policy:
            self._open = None  # its memory is given back before the next is read
            settle_threads(self.recipe.threads, for_torch=True)
            try:
                from dpalign.run.modelfolder import require_weights
                from dpalign.stages.sample import open_engine
            except ModuleNotFoundError as error:
                raise ValueError(
                    f"drawing answers needs {error.name}; install it: pip install 'dpalign[train]'"
                ) from error
            require_weights(policy)
            self._open = (policy, open_engine(self.recipe, str(policy), alone=True))
        return self._open[1]


def generate(run: Run, policies: Policies, point: Point, source: Path, instructions: Sequence[str]) -> Path:
    """Take one point's stage unless it is done; the answers in AlpacaEval's form.

    Args:
        source: the file that the instructions were read from.
        instructions: the first of it, or all.
    """
    assert point.policy is not None
    recipe = policies.recipe
    knobs = knobs_read(recipe, KNOBS) | {"line": point.line, "instructions": len(instructions)}
    inputs = {"policy": point.policy.resolve(), "instructions": source.resolve()}
    with run.stage(f"outputs-{point.slug}", VERSION, inputs, knobs) as work:
        if not work.done:
            _draw(work, policies, point, instructions)
    return work.folder / OUTPUTS


def _draw(work: Work, policies: Policies, point: Point, instructions: Sequence[str]) -> None:
    recipe, size = policies.recipe, policies.recipe.sampling.shard
    weights = tuple((point.weights or {}).values())
    for shard in work.shards(-(-len(instructions) // size), "answers/part-{:05d}.parquet"):
        assert point.policy is not None
        engine = policies.engine(point.policy)
        from dpalign.stages.sample import Condition, draw

        condition = Condition("plain" if point.weights is None else "direction", weights, point.line)
        part = [user_prompt(text) for text in instructions[shard.index * size : (shard.index + 1) * size]]
        rows = draw(
            engine,
            recipe,
            [({"prompt_id": prompt_id(messages), "messages": messages}, [condition]) for messages in part],
            1,
            recipe.evaluation.temperature,
            key=(recipe.seed, "alpaca-eval", point.line or ""),
            t=0,
            tally=shard.tally,
        )
        write_rows(shard.path, rows, CANDIDATES)
    drawn = read_table(work.folder / "answers", CANDIDATES, ["response", "finished"])
    texts: list[str] = drawn["response"].to_pylist()
    write_outputs(work.folder / OUTPUTS, instructions, texts, point.name)
    said = {name: getattr(point, name) for name in ("system", "label", "line", "angle")}
    empty = sum(not text.strip() for text in texts)
    counts = {"answers": len(texts), "cut": drawn["finished"].to_pylist().count(False) - empty, "empty": empty}
    write_json(
        work.folder / SYSTEM,
        said | {"weights": point.weights, "counts": counts, "sampled_with": config.knobs(recipe, *KNOBS)},
    )
    if counts["cut"] or counts["empty"]:
        work.run.log(
            f"{point.name}: {counts['cut']} answers were cut at the longest length, {counts['empty']} are empty"
        )
