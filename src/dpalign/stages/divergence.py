"""The KL divergence of a policy from SFT, on the answers that its evaluation sampled.

KL(pi || pi_sft) = E[log pi(y | x, v) - log pi_sft(y | x)] over answers y of pi. The mean over sampled answers is its
Monte Carlo estimate, in nats an answer. The answers were drawn at the evaluation's temperature, so both models read
them at that temperature. The policy reads a prompt with its dial, as in the evaluation; SFT reads it without, as it
was trained.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from dpalign.measure.lineage import made_from
from dpalign.rows import CANDIDATES, DIVERGENCES, read_rows, read_table, shards
from dpalign.runs.folder import Tally
from dpalign.runs.ledger import FileHashes, input_digest, read_ledger
from dpalign.runs.shards import make_shards
from dpalign.stages.cost import Costs, Load
from dpalign.stages.pools import KEYS
from dpalign.stages.sample import open_reader
from dpalign.stages.score import Asked
from dpalign.stages.shards import PART, Output, Row, Shards
from dpalign.stages.stage import Job, Step, chat_read, model_read, stage
from dpalign.stages.training import Checkpoint, checkpoint_of

if TYPE_CHECKING:
    from dpalign.recipe import Recipe

BATCH_TOKENS: Final = 16_384
"""The most tokens in a forward."""
LEFT_OUT: Final = "to a prompt beyond evaluation.divergence"
"""The reason under which the counts have answers that are not read."""


def _cost(costs: Costs, step: Step) -> Load:
    """Two models read each prompt and answer, and compute logits for the answer's tokens."""
    recipe, sizes, model = costs.of_step(step), costs.sizes, costs.model
    drawn = costs.load(costs.steps[str(step.inputs["evaluate"])])
    share = min(1.0, recipe.evaluation.divergence / sizes.evaluated) if sizes.evaluated else 0.0
    answers = 2 * share * drawn.answers
    flops = model.forward(answers * sizes.prompt, sizes.prompt / 2, logits=False)
    flops += model.forward(answers * sizes.answer, sizes.prompt + sizes.answer / 2, logits=True)
    read = answers * costs.row
    return Load(read=read, scoring=flops, forwards=read / BATCH_TOKENS, parts=drawn.parts)


@stage(
    reads=lambda r: (
        *(r.evaluation.divergence, r.evaluation.temperature, r.sampling.max_new_tokens),
        *(*chat_read(r), *model_read(r)),
    ),
    inputs=("policy", "sft", "evaluate", "data"),
    takes="evaluate",
    cost=_cost,
)
def divergence(job: Job) -> None:
    """Measure the KL divergence of a policy from SFT, on answers that it was evaluated with."""
    make_shards(job, reading)
    read = read_table(job.out, DIVERGENCES, ["prompt_id", "tokens"]).to_pydict()
    drawn = read_table(job.inputs["evaluate"] / "answers", CANDIDATES, ["prompt_id", "tokens"]).to_pydict()
    kept = set(read["prompt_id"])
    tokens = [n for name, n in zip(drawn["prompt_id"], drawn["tokens"], strict=True) if name in kept]
    if other := sum(a != b for a, b in zip(tokens, read["tokens"], strict=True)):
        job.work.run.log(
            f"{job.out.stem}: {other:,} of {len(tokens):,} answers are read in other tokens than they were drawn in"
        )


class Reader:
    """A model that reads answers; always on transformers."""

    def __init__(self, recipe: "Recipe", checkpoint: Checkpoint) -> None:
        import torch

        from dpalign.engines.loading import load_whole

        self.source, self.prompts = checkpoint.source, open_reader(recipe, checkpoint)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype, trusted = recipe.model.dtype, recipe.model.trust_remote_code
        self.model = load_whole("policy", self.source, dtype=dtype, trust_remote_code=trusted).to(device).eval()
        self.temperature, self.longest = recipe.evaluation.temperature, recipe.sampling.max_new_tokens

    def read(self, rows: Sequence[Row]) -> tuple[list[float], list[int]]:
        """Each answer's log-probability in nats and its number of tokens, with the end token unless it was cut."""
        from dpalign.engines.log_probs import log_probs

        # an unfinished answer was cut at the longest length, or it ended and is empty
        ended = [row["finished"] or row["tokens"] < self.longest for row in rows]
        ids = [
            self.prompts.answered(row["messages"], row["response"], whole)
            for row, whole in zip(rows, ended, strict=True)
        ]
        found_N = log_probs(
            self.model, ids, temperature=self.temperature, batch_tokens=BATCH_TOKENS, source=self.source
        )
        return found_N.tolist(), [len(answer) for _, answer in ids]


def _differs(job: Job) -> bool:
    """Whether another policy than the given one drew the answers, by their weights."""
    drew = read_ledger(job.inputs["evaluate"])["inputs"]["policy"]["digest"]
    return drew != input_digest(job.work.run.folder, job.inputs["policy"], FileHashes(job.work.run.folder))


def reading(job: Job) -> Shards[tuple[Reader, Reader]]:
    """The answers to the first prompts by hash, in the shards that they were drawn in.

    Raises:
        ValueError: `evaluation.divergence` is 0, or another policy than the given one drew the answers.
    """
    recipe, source, count = job.recipe, job.inputs["evaluate"], job.recipe.evaluation.divergence
    if not count:
        raise ValueError("evaluation.divergence is 0; give the number of prompts to measure on, such as 50")
    drew = made_from(source).get("policy")
    if drew is not None and drew != job.inputs["policy"].resolve() and _differs(job):  # a copied run has the same
        raise ValueError(f"{source}: {drew} drew these answers, not {job.inputs['policy']}; give the policy that did")
    files, asked = shards(source / "answers"), Asked(job.inputs["data"])
    names = read_table(source / "answers", CANDIDATES, ["prompt_id"])["prompt_id"].to_pylist()
    kept = set(sorted(set(names))[:count])
    if left_out := sum(name not in kept for name in names):
        job.work.tally.add(left_out, filtered={LEFT_OUT: left_out})

    def part(index: int) -> list[Row]:
        return [row for row in read_rows(files[index], CANDIDATES) if row["prompt_id"] in kept]

    def models() -> tuple[Reader, Reader]:
        policy, sft = (Reader(recipe, checkpoint_of(job.inputs[name])) for name in ("policy", "sft"))
        return policy, sft

    def work(models: tuple[Reader, Reader], _: int, rows: Sequence[Row], tally: Tally) -> Iterator[Output]:
        policy, sft = models
        log_policy, tokens = policy.read(rows)
        log_sft = sft.read(asked.shown(rows) if rows else ())[0]
        found = [
            {key: row[key] for key in KEYS} | {"log_policy": ours, "log_sft": theirs, "tokens": n}
            for row, ours, theirs, n in zip(rows, log_policy, log_sft, tokens, strict=True)
        ]
        yield "", DIVERGENCES, found
        tally.add(len(rows), len(rows))

    return Shards(job, PART, len(files), part, models, work)
