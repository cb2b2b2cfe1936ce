"""Prompts and ratings: every data set read into the package's own rows, and split by prompt (section 3.1)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import Field

from dpalign.data.chats import read_chats
from dpalign.data.ratings import BINARIZED, RatedFormat, Rescaling, read_rated, require_labels
from dpalign.data.report import ReadReport, render_reports, require_rows
from dpalign.data.sources import read_source, split_named
from dpalign.data.union import drop_held_out, merge_repeats, prompts_of, split_prompts
from dpalign.paper.objectives import Objective
from dpalign.rows import (
    CONVERSATIONS,
    HALVES,
    PROMPTS,
    RATED,
    Conversation,
    Message,
    Prompt,
    Rated,
    prompt_id,
    user_prompt,
    write_rows,
)
from dpalign.runs.environment import expanded
from dpalign.runs.folder import write_json, write_text
from dpalign.runs.tables import DataName, Table
from dpalign.stages.stage import Job, objectives_read, stage

if TYPE_CHECKING:
    from dpalign.recipe import Recipe

EVALUATED: Final = ("validation", "tuning")
"""The splits whose prompts nothing is trained on or sampled for."""

WORLD_FILES: Final = {
    "helpsteer": "helpsteer.jsonl",
    "ultrafeedback": "ultrafeedback.jsonl",
    "prompts": "test.jsonl",
    "tuning_prompts": "tuning.jsonl",
    "sft": "sft.jsonl",
}

Read = tuple[list[Rated], list[Conversation], list[Prompt], list[ReadReport]]


class Data(Table):
    """Where prompts and ratings come from: hub names, or local jsonl, json and parquet files."""

    world: bool = False
    """Take everything from the embedded world instead."""
    helpsteer: DataName = "nvidia/HelpSteer"
    """Rated answers with five attributes 0-4 (section 3.1); "" for none."""
    ultrafeedback: DataName = "openbmb/UltraFeedback"
    """Raw UltraFeedback: four answers a prompt, four aspects and an overall score (section 3.1)."""
    pairs: DataName = ""
    """Preference pairs with overall scores only, in place of raw UltraFeedback: rows of prompt, chosen, rejected and
    metadata, or ultrafeedback_binarized (on the hub its `train_prefs`)."""
    splits: DataName = "HuggingFaceH4/ultrafeedback_binarized"
    """Names the validation prompts, by its `test_prefs` (section 3.1, footnote 3); "" draws them by hash. All other
    prompts that have rated answers are for training, whether or not its `train_prefs` has them."""
    prompts: DataName = ""
    """A file of validation prompts of its own, in place of both."""
    tuning_prompts: DataName = ""
    """A file of prompts that settings may be chosen on, in place of a share of the training prompts."""
    sft: DataName = "HuggingFaceH4/ultrachat_200k"
    """Chats for SFT (section 3.1); a file may hold rows of instruction, input and output instead."""
    helpsteer_scale: Literal["20l+10", "25l"] = "20l+10"
    """HelpSteer's 0-4 to 0-100; the default is the released reward model's."""
    ultrafeedback_scale: Literal["20r-10", "25r-25"] = "20r-10"
    """UltraFeedback's 1-5 to 0-100 (paper silent; the analogue of the former)."""
    overall_scale: Literal["10s-5", "100/9(s-1)"] = "10s-5"
    """UltraFeedback's overall 1-10 to 0-100 (paper silent)."""
    validation_prompts: int = Field(2000, ge=0)
    """Prompts of the validation set (section 3.2)."""
    heldout: float = Field(0.05, ge=0, lt=1)
    """Share of rated prompts kept out of all training, to measure the reward model on (paper silent)."""
    judge: float = Field(0.0, ge=0, lt=1)
    """Share of prompts whose ratings train the judge alone (paper silent: it has no second model)."""
    tuning: float = Field(0.0, ge=0, lt=1)
    """Share of prompts that settings may be chosen on (paper silent); `dpa compare` needs some."""

    @property
    def rated(self) -> bool:
        """Whether there are rated answers; else prompts alone."""
        return self.world or bool(self.helpsteer or self.ultrafeedback or self.pairs)


@stage(reads=lambda r: (r.seed, r.data, *objectives_read(r)), optional=("world",), heavy=False)
def data(job: Job) -> None:
    """Read prompts and ratings, rescale them, join them under the heads, and split them by prompt.

    A table says what was read, kept and left out.

    Raises:
        ValueError: a malformed row, a data set that is empty after filtering, or an objective without a label that a
            reward model is to learn.
    """
    recipe = job.recipe
    world = job.inputs.get("world")
    sources = _sources(recipe, world)
    rated, chats, evaluated, reports = _read(sources)
    require_rows(rated, "rated answers", reports)
    split_of = _split(recipe, sources, rated, evaluated)
    asked = prompts_of([row for row in rated if row["source"] != "helpsteer"], split_of)
    known = {prompt["prompt_id"] for prompt in asked}
    prompts = [*asked, *(prompt for prompt in evaluated if prompt["prompt_id"] not in known)]
    held_out = [prompt["messages"] for prompt in prompts if prompt["split"] in EVALUATED]
    rated, dropped = drop_held_out(rated, held_out)
    reports.append(replace(dropped, source=f"{dropped.source}: rated answers"))
    left, dropped = drop_held_out([prompt for prompt in prompts if prompt["split"] not in EVALUATED], held_out)
    if dropped.filtered:  # the same text but for case or spacing, which is another prompt to `split_prompts`
        reports.append(replace(dropped, source=f"{dropped.source}: prompts"))
        kept = {prompt["prompt_id"] for prompt in left}
        prompts = [prompt for prompt in prompts if prompt["split"] in EVALUATED or prompt["prompt_id"] in kept]
    chats, dropped = drop_held_out(chats, held_out)
    reports.append(replace(dropped, source=f"{dropped.source}: chats"))
    splits = {"train": HALVES, "heldout": ("heldout",), "judge": ("judge",)}
    parts = {name: [row for row in rated if split_of[row["prompt_id"]] in own] for name, own in splits.items()}
    require_rows(parts["train"], "rated training answers", reports)
    require_rows([p for p in prompts if p["split"] == "validation"], "validation prompts", reports)
    for part, objectives in trained_on(recipe).items():  # the stages that train refuse it too, but hours later
        require_labels(parts[part], objectives, recipe.heads, part)
    for name, rows in parts.items():
        write_rows(job.out / name / "part-00000.parquet", rows, RATED)
    if chats:
        write_rows(job.out / "chats" / "part-00000.parquet", chats, CONVERSATIONS)
    write_rows(job.out / "prompts" / "part-00000.parquet", prompts, PROMPTS)
    reports = [replace(report, file=Path(report.file).name if world else report.file) for report in reports]
    write_json(job.out / "reports.json", [report.to_json() for report in reports])
    write_text(job.out / "reports.txt", render_reports(reports))
    job.work.run.log(render_reports(reports))
    for report in reports:
        job.work.tally.add(rows_in=report.read, rows_out=report.kept, filtered=report.filtered)


def trained_on(recipe: "Recipe") -> dict[str, tuple[Objective, ...]]:
    """The parts of the rated answers that a model is trained on, and what reads it; a reward that is given needs no
    labels."""
    parts = {"train": recipe.trained_objectives} if recipe.trains_reward else {}
    return parts | ({"judge": recipe.judged().objective_list} if recipe.data.judge else {})


def _sources(recipe: "Recipe", world: Path | None) -> Data:
    """The recipe's data, environment variables in paths filled in; or the world's files in its place."""
    names = ("helpsteer", "ultrafeedback", "pairs", "splits", "prompts", "tuning_prompts", "sft")
    paths: dict[str, Any] = {}
    for name in names:
        if world is None:
            paths[name] = expanded(f"data.{name}", getattr(recipe.data, name))
        else:
            paths[name] = str(world / WORLD_FILES[name]) if name in WORLD_FILES else ""
    return recipe.data.model_copy(update=paths)


def _read(sources: Data) -> Read:
    scale = Rescaling(
        helpsteer=sources.helpsteer_scale, aspects=sources.ultrafeedback_scale, overall=sources.overall_scale
    )
    rated: list[Rated] = []
    chats: list[Conversation] = []
    reports: list[ReadReport] = []
    forms: tuple[RatedFormat, ...] = ("helpsteer", "ultrafeedback", "pairs")
    for form in forms:
        if source := getattr(sources, form):
            rows, report = read_ratings(form, source, scale)
            rated += rows
            reports.append(report)
    rated, report = merge_repeats(rated)
    reports.append(report)
    if sources.sft:
        chats, report = read_chats(sources.sft, split_named(sources.sft, ("train_sft",)))
        reports.append(report)
    evaluated: list[Prompt] = []
    for split in EVALUATED:
        if split == "validation" or sources.tuning_prompts:
            prompts, report = _prompts_named(sources, split)
            evaluated += prompts
            reports.append(report)
    return rated, chats, evaluated, reports


def read_ratings(form: RatedFormat, source: str, scale: Rescaling) -> tuple[list[Rated], ReadReport]:
    """Rated answers: the first row's columns say whether ultrafeedback_binarized stands in another form's place."""
    split = split_named(source, ("train_prefs", "train"))
    first = next(read_source(source, split), None)
    binarized = form != "helpsteer" and first is not None and set(BINARIZED) <= set(first.values)
    return read_rated("ultrafeedback_binarized" if binarized else form, source, split, scale)


def _prompts_named(sources: Data, split: str) -> tuple[list[Prompt], ReadReport]:
    """A split's prompts that a file or the authors' own split names, each text once; none: they are drawn later."""
    source = sources.prompts if split == "validation" else sources.tuning_prompts
    chats: list[list[Message]] = []
    if source:
        chats = [user_prompt(row.text("prompt")) for row in read_source(source)]
    elif source := sources.splits:
        chats = [row.chat("chosen")[:-1] for row in read_source(source, split_named(source, ("test_prefs",)))]
    unique = {prompt_id(chat): chat for chat in chats}
    prompts: list[Prompt] = [{"prompt_id": key, "messages": chat, "split": split} for key, chat in unique.items()]
    return prompts, ReadReport.of_filter(f"{split} prompts", source, len(chats), len(prompts), "repeated prompt")


def _split(recipe: "Recipe", sources: Data, rated: Sequence[Rated], evaluated: Sequence[Prompt]) -> dict[str, str]:
    """A split for every prompt: validation, tuning, held out for the reward model, the judge's, or a half."""
    shares = {"heldout": sources.heldout} | ({"judge": sources.judge} if sources.judge else {})
    policy_ids = {row["prompt_id"] for row in rated if row["source"] != "helpsteer"}
    named: dict[str, list[str]] = {}
    for prompt in evaluated:
        named.setdefault(prompt["split"], []).append(prompt["prompt_id"])
    by_hash = {}
    if "validation" not in named:
        by_hash["validation"] = min(0.5, sources.validation_prompts / max(1, len(policy_ids)))
    if "tuning" not in named and sources.tuning:
        by_hash["tuning"] = sources.tuning
    split_of = split_prompts(policy_ids, recipe.seed, shares | by_hash, named)
    # No policy is asked what only the reward model trains on, so it has no halves.
    others = {row["prompt_id"] for row in rated} - policy_ids
    alone = split_prompts(others, recipe.seed, shares) if others else {}
    return split_of | {key: "D1" if part in HALVES else part for key, part in alone.items()}
