"""A reward model on real rows against a ruler: HelpSteer and HelpSteer2, on prompts that no fit has seen.

    DPA_REAL_DATA=FOLDER python bench/reward_model.py order MODEL --work DIR
    DPA_REAL_DATA=FOLDER python bench/reward_model.py probe MODEL --work DIR
    DPA_REAL_DATA=FOLDER python bench/reward_model.py tune MODEL --work DIR --order swept --bradley-terry 1

MODEL is a folder or a hub name. FOLDER holds helpsteer_500.jsonl, helpsteer2_998.jsonl and
ultrafeedback_pairs_1000.jsonl. `order` counts padding and how far the mean label of an update strays. `probe` fits the
heads on the backbone as it is, five times, on four fifths of the prompts each. `tune` trains on four fifths, and
rates the other fifth; with other seeds, other fifths, and the figures are of all of them. The ruler is ridge regression
on length and punctuation, on the same parts. What is read or trained is kept in DIR: the same command goes on there.
Figures go to standard output and to DIR.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpalign.engines.tokens import spare_token
from dpalign.measure.baseline import ridge_cross_validated, surface_features
from dpalign.measure.quality import HeadQuality, quality
from dpalign.rewards import model as reward_model
from dpalign.rewards.functions import log_words
from dpalign.rewards.model import BradleyTerry, collator, last_hidden_states, load_classifier, tokenize_rated
from dpalign.rewards.ridge import ridge_heads
from dpalign.rewards.scale import fit as fit_scale
from dpalign.rewards.scale import to_points
from dpalign.rewards.score import ModelScorer
from dpalign.rows import Message, prompt_id, user_prompt
from dpalign.train.dataset import FairBatches, RowsByLength
from dpalign.train.knobs import Training
from dpalign.train.trainer import RunContext
from harness import say

Array = NDArray[np.float64]

SETS: Final = ("helpsteer_500", "helpsteer2_998")
PAIRS: Final = "ultrafeedback_pairs_1000"
HEADS: Final = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
FOLDS: Final = 5
ORDERS: Final = {"shuffled": FairBatches, "swept": RowsByLength}
TEMPLATE: Final = "dpa-v1"


@dataclass(frozen=True)
class Rated:
    """A rated answer of one of the sets."""

    source: str
    prompt_id: str
    messages: list[Message]
    response: str
    labels: list[float]

    @property
    def row(self) -> dict[str, Any]:
        """As `rows.RATED`, with the labels of `HEADS`."""
        return {**vars(self), "response": self.response}


def read(folder: Path) -> list[Rated]:
    """The rated answers of both sets, their 0-4 as 20 l + 10."""
    rated = []
    for source in SETS:
        for line in (folder / f"{source}.jsonl").read_text().splitlines():
            row = json.loads(line)
            messages = user_prompt(row["prompt"])
            labels = [20.0 * row[head] + 10.0 for head in HEADS]
            rated.append(Rated(source, prompt_id(messages), messages, row["response"], labels))
    return rated


def read_pairs(folder: Path, most: int) -> list[dict[str, Any]]:
    """Some of UltraFeedback's pairs, as `rows.PAIRS`."""
    pairs = [json.loads(line) for line in (folder / f"{PAIRS}.jsonl").read_text().splitlines()]
    pairs.sort(key=lambda pair: hashlib.sha256(pair["prompt"].encode()).digest())
    return [
        {
            "prompt_id": prompt_id(user_prompt(pair["prompt"])),
            "messages": user_prompt(pair["prompt"]),
            "chosen": pair["chosen"],
            "rejected": pair["rejected"],
        }
        for pair in pairs[:most]
    ]


def fold_of(rated: Sequence[Rated]) -> NDArray[np.int64]:
    """The part that each answer's prompt is in: the ruler's own parts (`ridge_cross_validated`)."""
    unique = sorted({one.prompt_id for one in rated}, key=lambda key: hashlib.sha256(key.encode()).digest())
    rank = {key: i % FOLDS for i, key in enumerate(unique)}
    return np.array([rank[one.prompt_id] for one in rated])


def ruler(rated: Sequence[Rated]) -> Array:
    """What ridge regression on length and punctuation says of prompts that it has not seen."""
    feature_NF = np.stack([surface_features(one.messages[-1]["content"], one.response) for one in rated])
    return ridge_cross_validated(feature_NF, labels_of(rated), [one.prompt_id for one in rated], FOLDS)


def labels_of(rated: Sequence[Rated]) -> Array:
    return np.array([one.labels for one in rated])


def figures(rated: Sequence[Rated], predicted_NH: Array) -> dict[str, tuple[HeadQuality, ...]]:
    """Quality by set, with intervals by prompt."""
    found = {}
    for source in SETS:
        own = [n for n, one in enumerate(rated) if one.source == source]
        prompts, lengths = [rated[n].prompt_id for n in own], [len(rated[n].response) for n in own]
        label_NH = labels_of([rated[n] for n in own])
        found[source] = quality(predicted_NH[own], label_NH, HEADS, prompts, lengths).heads
    return found


def show(name: str, found: dict[str, tuple[HeadQuality, ...]], work: Path) -> None:
    """Print the figures as rows of a table, and keep all of them."""
    for source, heads in found.items():
        for head in heads:
            if head.name in ("helpfulness", "verbosity"):
                r, accuracy = (
                    f"{e.value:.3f} ({e.low:.3f}, {e.high:.3f})" if e else "" for e in
                    (head.pearson, head.within_prompt_accuracy)
                )  # fmt: skip
                say(f"| {name} | {source} | {head.name} | {r} | {accuracy} | {head.n} | {head.pairs} |")
    kept = {source: [asdict(head) for head in heads] for source, heads in found.items()}
    (work / f"{name}.json").write_text(json.dumps(kept, indent=1))


def context_of(start: str, work: Path, name: str, training: Training, dtype: str, seed: int) -> RunContext:
    tokens: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(start)
    tokens.pad_token = spare_token(tokens)
    return RunContext(start, training, tokens, work / name, seed, work / f"{name}.resume", dtype, name=name)


def order(rated: Sequence[Rated], given: argparse.Namespace) -> None:
    """Padding, and the standard deviation of the mean verbosity of an update, over 20 seeds."""
    tokens = AutoTokenizer.from_pretrained(given.model)
    lengths = [len(row["input_ids"]) for row in tokenize_rated((r.row for r in rated), len(HEADS), TEMPLATE, tokens)]
    length_N, label_N = np.array(lengths), labels_of(rated)[:, HEADS.index("verbosity")]
    for name, sampler in ORDERS.items():
        read_tokens, spread = [], []
        for seed in range(20):
            args = SimpleNamespace(
                train_batch_size=8, gradient_accumulation_steps=8, world_size=1, data_seed=seed
            )  # fmt: skip
            trainer: Any = SimpleNamespace(args=args, state=SimpleNamespace(epoch=0))
            full = np.array(list(sampler(trainer, lengths))[: len(lengths) // 64 * 64])
            read_tokens.append(8 * length_N[full].reshape(-1, 8).max(axis=1).sum() / length_N[full].sum())
            spread.append(label_N[full].reshape(-1, 64).mean(axis=1).std())
        say(f"{name}: {np.mean(read_tokens):.2f} tokens read for each real one; SD {np.mean(spread):.2f}")


def probe(rated: Sequence[Rated], given: argparse.Namespace) -> None:
    """Five fits of the heads on hidden states that are read once."""
    context = context_of(given.model, given.work, f"probe-{given.layers}", Training(), given.dtype, given.seed)
    rows = list(tokenize_rated((one.row for one in rated), len(HEADS), TEMPLATE, context.tokenizer))
    hidden_ND = last_hidden_states(
        load_classifier(context, HEADS, given.layers, frozen=True), rows, collator(context.tokenizer), "probe",
        context.resume,
    )  # fmt: skip
    label_NH, fold_N = labels_of(rated), fold_of(rated)
    predicted_NH, words_N = np.empty(label_NH.shape), np.array(log_words([], [one.response for one in rated]))
    points_N1 = np.empty((len(rated), 1))
    for fold in range(FOLDS):
        fit = np.flatnonzero(fold_N != fold)
        weights = ridge_heads(hidden_ND[fit], label_NH[fit], [rated[n].prompt_id for n in fit]).weights
        weight_DH = np.stack([weights[head] for head in range(len(HEADS))], axis=1)
        predicted_NH[fold_N == fold] = hidden_ND[fold_N == fold] @ weight_DH
        points_N1[fold_N == fold] = to_points(words_N[fold_N == fold, None], [fit_scale(words_N[fit])])
    show("ruler", figures(rated, ruler(rated)), given.work)
    show(f"probe-{given.layers}", figures(rated, predicted_NH), given.work)
    # an objective that reads two rewards is their mean
    verbosity = HEADS.index("verbosity")
    predicted_NH[:, verbosity] = (predicted_NH[:, verbosity] + points_N1[:, 0]) / 2
    show(f"probe-{given.layers}-log_words", figures(rated, predicted_NH), given.work)


def tune(rated: Sequence[Rated], given: argparse.Namespace) -> None:
    """One training, and figures of the prompts that it and those of other seeds have not seen."""
    training = Training(
        learning_rate=given.learning_rate, warmup_steps=0.1, epochs=given.epochs, batch=16, micro_batch=4,
        context=given.context, packing=False, lora_rank=16, save_every=5,
    )  # fmt: skip
    name = f"tune-{given.order}-{given.bradley_terry:g}"
    context = context_of(given.model, given.work, f"{name}-{given.seed}", training, given.dtype, given.seed)
    held_out_N = fold_of(rated) == given.seed % FOLDS
    if not context.output.exists():
        reward_model.RewardTrainer.sampler = ORDERS[given.order]
        pairs = read_pairs(given.data, given.pairs)
        outcome = reward_model.train_reward_model(
            context,
            [one.row for one, out in zip(rated, held_out_N, strict=True) if not out],
            HEADS,
            template=TEMPLATE,
            lm_loss=0.0,
            layers=given.layers,
            preference=BradleyTerry(given.bradley_terry, (0,), pairs) if given.bradley_terry else None,
        )
        say(f"{context.name}: {outcome.rows} rows, {outcome.tokens} tokens, {outcome.updates} updates")
    rewards_NH = np.full((len(rated), len(HEADS)), np.nan)
    scorer = ModelScorer(str(context.output), template=TEMPLATE, batch_tokens=8192, dtype=given.dtype)
    rewards_NH[held_out_N] = scorer.score(
        [(one.messages, one.response) for one, out in zip(rated, held_out_N, strict=True) if out]
    )
    np.save(given.work / f"{context.name}.npy", rewards_NH)
    # Of all fifths so far: each answer is rated by a model that has not seen its prompt.
    kept = [np.load(path) for path in sorted(given.work.glob(f"{name}-*.npy"))]
    pooled_NH = kept[0]
    for other_NH in kept[1:]:
        pooled_NH = np.where(np.isnan(pooled_NH), other_NH, pooled_NH)
    own = np.flatnonzero(~np.isnan(pooled_NH[:, 0]))
    measured = [rated[n] for n in own]
    show(f"ruler-{len(kept)}", figures(measured, ruler(rated)[own]), given.work)
    show(f"{name}-{len(kept)}", figures(measured, pooled_NH[own]), given.work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("order", "probe", "tune"))
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, required=True, help="what is kept from one command to the next")
    parser.add_argument("--layers", type=int, default=0, help="take the backbone's first layers alone; 0: all")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0, help="of the training; it also names the fifth held out")
    parser.add_argument("--order", choices=tuple(ORDERS), default="shuffled")
    parser.add_argument("--bradley-terry", type=float, default=0.0, help="weight of the term; 0: none")
    parser.add_argument("--pairs", type=int, default=1000, help="UltraFeedback's pairs at most")
    parser.add_argument("--context", type=int, default=384, help="tokens of a row at most, in training")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    given = parser.parse_args()
    given.data = Path(os.environ["DPA_REAL_DATA"])
    given.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    {"order": order, "probe": probe, "tune": tune}[given.part](read(given.data), given)


if __name__ == "__main__":
    main()
