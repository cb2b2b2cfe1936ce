"""Prompts and ratings: read every data set into the package's own rows, and split them by prompt (section 3.1)."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from dpalign.data.chats import read_chats
from dpalign.data.own import EVALUATED_SPLITS, SPLITS, read_own, read_prompts, scale_text
from dpalign.data.ratings import Rescaling, read_rated, require_labels
from dpalign.data.report import ReadReport, Scale, render_reports, require_rows
from dpalign.data.sources import located, require_there
from dpalign.data.union import AnyRow, drop_held_out, merge_repeats, split_prompts
from dpalign.paper.objectives import Objective
from dpalign.rows import (
    CONVERSATIONS,
    HALVES,
    PAIRS,
    PROMPTS,
    RATED,
    Conversation,
    Message,
    Pair,
    Prompt,
    Rated,
    prompt_id,
    write_rows,
)
from dpalign.runs.environment import expanded
from dpalign.runs.folder import write_json, write_text
from dpalign.runs.tables import DataName, Table
from dpalign.stages.stage import Job, objectives_read, stage

if TYPE_CHECKING:
    from dpalign.recipe import Recipe

EVALUATED: Final = ("validation", "tuning")
"""The splits whose prompts are used for no training and no sampling."""

WORLD_FILES: Final = {
    "rows": "ultrafeedback.jsonl",
    "helpsteer": "helpsteer.jsonl",
    "validation": "test.jsonl",
    "tuning_prompts": "tuning.jsonl",
    "sft": "sft.jsonl",
}
OF_THE_PAPER: Final = {"rows": (), "helpsteer": "", "validation": "", "sft": ""}
"""The knobs of the paper's data sets, emptied if a recipe names rows or prompts of its own."""


class Data(Table):
    """Where prompts and ratings come from. A data set is a local file (.jsonl, .json, .csv, .parquet), a folder, or a
    name on the hub. NAME:SPLIT names a split; NAME@REVISION names a branch, tag or commit."""

    world: bool = False
    """Take everything from the embedded world instead."""
    rows: tuple[DataName, ...] = ("openbmb/UltraFeedback",)
    """Prompts with answers, in the forms of docs/data.md: policies are aligned on the prompts, and the reward model
    learns from the ratings (section 3.1). If a recipe sets `rows` or `prompts`, the paper's data sets are read only
    where it names them."""
    prompts: tuple[DataName, ...] = ()
    """Further prompts to align on; their answers, if any, are not read. They suffice if all rewards are given (not in
    the paper)."""
    hints: tuple[str, ...] = ()
    """Hints for prompts without answers, such as "Answer in one short sentence.": each prompt gets one original answer
    under each hint, kept without the hint. SteerLM then learns from answers of many kinds (not in the paper)."""
    helpsteer: DataName = "nvidia/HelpSteer"
    """Rated answers with five attributes 0-4, which only train the reward model (section 3.1); "" for none."""
    validation: DataName = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"
    """Validation prompts (section 3.1, footnote 3: test_prefs); "" draws them from the rows by hash. The default's
    other splits are not read: all other prompts with rated answers are for training."""
    tuning_prompts: DataName = ""
    """Prompts that settings may be chosen on, in place of a share of the training prompts."""
    sft: DataName = "HuggingFaceH4/ultrachat_200k"
    """Chats for SFT (section 3.1), or rows of instruction, input and output, or of prompt and response."""
    scales: dict[str, Scale] = Field(default_factory=dict)
    """The two ends of a rating's scale, by its column in `rows`, such as `brevity = [0, 4]`: they become 0 and 100. A
    scale that is not stated is read from the ratings."""
    helpsteer_scale: Literal["20l+10", "25l"] = "20l+10"
    """HelpSteer's 0-4 to 0-100; the default is the released reward model's."""
    ultrafeedback_scale: Literal["20r-10", "25r-25"] = "20r-10"
    """UltraFeedback's 1-5 to 0-100 (paper silent; by analogy with `helpsteer_scale`)."""
    overall_scale: Literal["10s-5", "100/9(s-1)"] = "10s-5"
    """UltraFeedback's overall 1-10 to 0-100 (paper silent)."""
    validation_prompts: int = Field(2000, ge=0)
    """Prompts of the validation set (section 3.2)."""
    heldout: float = Field(0.05, ge=0, lt=1)
    """Share of rated prompts kept out of all training, to measure the reward model on (paper silent)."""
    judge: float = Field(0.0, ge=0, lt=1)
    """Share of prompts whose ratings train only the judge (paper silent: it has no second model)."""
    judge_takes: Literal["prompts", "ratings"] = "prompts"
    """What the judge's share takes away: the prompts, or only their ratings. With "ratings" policies are still aligned
    on the prompts, and their answers stay as original answers without a rating. Neither the reward model nor DPO learns
    from the judge's ratings."""
    tuning: float = Field(0.0, ge=0, lt=1)
    """Share of prompts that settings may be chosen on (paper silent); `dpa compare` needs some."""

    @field_validator("rows", "prompts", "hints", mode="before")
    @classmethod
    def _one_source_is_a_list_too(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _own_rows_stand_alone(self) -> Self:
        stated = self.model_fields_set
        if not stated.isdisjoint(("rows", "prompts")):
            for name in OF_THE_PAPER.keys() - stated:
                object.__setattr__(self, name, OF_THE_PAPER[name])
        return self

    @model_validator(mode="after")
    def _hints_are_for_prompts_alone(self) -> Self:
        if self.hints and self.answered:
            raise ValueError(
                "hints ask for original answers to prompts alone, and rows have their own; leave hints out, or name "
                "prompts alone and set rows = []"
            )
        return self

    @model_validator(mode="after")
    def _scales_have_two_ends(self) -> Self:
        for head, (low, high) in self.scales.items():
            if low >= high:
                raise ValueError(f"scales.{head} is [{low:g}, {high:g}]; give the worst rating, then a greater one")
        return self

    @property
    def answered(self) -> bool:
        """Whether the prompts to align on may have answers; else there are only prompts."""
        return self.world or bool(self.rows)

    @property
    def rated(self) -> bool:
        """Whether there may be ratings to train a reward model on."""
        return self.answered or bool(self.helpsteer)


@dataclass
class Read:
    """The content of all sources."""

    rated: list[Rated] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    chats: list[Conversation] = field(default_factory=list)
    asked: dict[str, list[Message]] = field(default_factory=dict)
    """The prompts to align on, by id."""
    evaluated: list[Prompt] = field(default_factory=list)
    """The prompts of the validation and tuning files that the recipe names."""
    reports: list[ReadReport] = field(default_factory=list)


@stage(
    version=2,
    reads=lambda r: (r.seed, r.data, r.reward.probe, *objectives_read(r)),
    optional=("world",),
    heavy=False,
)
def data(job: Job) -> None:
    """Read prompts and ratings, rescale them, join them under the heads, and split them by prompt.

    The log and `reports.txt` have a table of the rows that were read, kept and left out.

    Raises:
        ValueError: a malformed row, a data set that is empty after filtering, no prompt to align on, or an objective
            without labels to train a reward model on.
    """
    recipe = job.recipe
    world = job.inputs.get("world")
    sources = _sources(recipe, world)
    read = _read(sources)
    reports = read.reports
    if not read.asked:
        raise ValueError(_without_prompts(sources, reports))
    split_of, judged = _split(recipe.seed, sources, read)
    prompts = _prompts(read.asked, split_of)
    prompts += [prompt for prompt in read.evaluated if prompt["prompt_id"] not in read.asked]
    held_out = [prompt["messages"] for prompt in prompts if prompt["split"] in EVALUATED]
    rated = _without(held_out, read.rated, "rated answers", reports)
    pairs = _without(held_out, read.pairs, "preferences", reports)
    left = _without(held_out, [p for p in prompts if p["split"] not in EVALUATED], "prompts", reports)
    # A prompt that differs from a held-out one only by case or spacing has another id, and is dropped too.
    kept = {prompt["prompt_id"] for prompt in left}
    prompts = [prompt for prompt in prompts if prompt["split"] in EVALUATED or prompt["prompt_id"] in kept]
    chats = _without(held_out, read.chats, "chats", reports)
    require_rows([p for p in prompts if p["split"] == "validation"], "validation prompts", reports)

    parts = _learned_from(recipe, sources, rated, split_of, judged, reports)
    for name, rows in parts.items():
        if rows:
            write_rows(job.out / name / "part-00000.parquet", rows, RATED)
    pairs = [pair for pair in pairs if split_of[pair["prompt_id"]] in HALVES and pair["prompt_id"] not in judged]
    if pairs:
        write_rows(job.out / "pairs" / "part-00000.parquet", pairs, PAIRS)
    if chats:
        write_rows(job.out / "chats" / "part-00000.parquet", chats, CONVERSATIONS)
    write_rows(job.out / "prompts" / "part-00000.parquet", prompts, PROMPTS)
    reports = [replace(report, file=Path(report.file).name if world else report.file) for report in reports]
    write_json(job.out / "reports.json", [report.to_json() for report in reports])
    write_text(job.out / "reports.txt", render_reports(reports))
    job.work.run.log(render_reports(reports))
    for report in reports:
        job.work.tally.add(rows_in=report.read, rows_out=report.kept, filtered=report.filtered)


def _learned_from(
    recipe: "Recipe",
    sources: Data,
    rated: Sequence[Rated],
    split_of: Mapping[str, str],
    judged: Set[str],
    reports: Sequence[ReadReport],
) -> dict[str, list[Rated]]:
    """The rated answers by purpose: "train", "heldout" (to measure reward models on) and "judge".

    Raises:
        ValueError: there are no training answers, no labels for an objective that a trained model reads, or no held-out
            answers to measure it on.
    """
    parts: dict[str, list[Rated]] = {
        # The judge's ratings are hidden from all other trainings.
        "train": [
            {**row, "labels": {}} if row["prompt_id"] in judged else row
            for row in rated
            if split_of[row["prompt_id"]] in HALVES
        ],
        "heldout": [row for row in rated if split_of[row["prompt_id"]] == "heldout" and row["labels"]],
        "judge": [row for row in rated if row["prompt_id"] in judged and row["labels"]],
    }
    trained = trained_on(recipe)
    if "train" in trained or recipe.data.answered:
        require_rows(parts["train"], "training answers", reports)
    for part, objectives in trained.items():  # the training stages refuse it too, but hours later
        require_labels(parts[part], objectives, recipe.heads, part)
        if not parts["heldout"]:
            raise ValueError(
                f"no rated answer is held out to measure the reward model on: data.heldout is {sources.heldout:g} of "
                f"{len(split_of)} prompts; give a greater share"
            )
    return parts


def trained_on(recipe: "Recipe") -> dict[str, tuple[Objective, ...]]:
    """The parts of the rated answers that train a model, and the objectives that read it."""
    parts = {"train": recipe.trained_objectives} if recipe.learns_rewards else {}
    return parts | ({"judge": recipe.judged().objective_list} if recipe.data.judge else {})


def _sources(recipe: "Recipe", world: Path | None) -> Data:
    """The recipe's [data] with environment variables in its paths filled in, or with the world's files instead."""
    names = ("helpsteer", "validation", "tuning_prompts", "sft")
    if world is not None:
        files = {name: world / file for name, file in WORLD_FILES.items()}
        # The world writes an empty file for a role without prompts.
        empty = {name for name, file in files.items() if file.is_file() and not file.stat().st_size}
        paths: dict[str, Any] = {name: "" if name in empty else str(files[name]) for name in names}
        paths |= {"rows": (str(files["rows"]),), "prompts": ()}
    else:
        paths = {name: expanded(f"data.{name}", getattr(recipe.data, name)) for name in names}
        for name, sources in (("rows", recipe.data.rows), ("prompts", recipe.data.prompts)):
            paths[name] = tuple(expanded(f"data.{name}[{i}]", source) for i, source in enumerate(sources))
    return recipe.data.model_copy(update=paths)


def _read(sources: Data) -> Read:
    rescaling = Rescaling(
        helpsteer=sources.helpsteer_scale, aspects=sources.ultrafeedback_scale, overall=sources.overall_scale
    )
    read = Read()
    alone = (sources.helpsteer, sources.sft, sources.validation, sources.tuning_prompts)
    for source in filter(None, (*sources.rows, *sources.prompts, *alone)):
        require_there(source)
    if sources.helpsteer:
        rows, report = read_rated("helpsteer", *located(sources.helpsteer, ("train",)), rescaling)
        read.rated += rows
        read.reports.append(_with_rows(report))
    for source in sources.rows:
        own = read_own(source, rescaling, sources.scales)
        _with_rows(own.reports[0])
        read.rated += own.rated
        read.pairs += own.pairs
        read.reports += own.reports
        for messages in own.prompts:
            read.asked.setdefault(prompt_id(messages), messages)
    for source in sources.prompts:
        asked, report = read_prompts(source, "prompts", SPLITS)
        read.asked = asked | read.asked
        read.reports.append(_with_rows(report))
    _require_scales(sources.scales, read.reports)
    read.rated, report = merge_repeats(read.rated)
    read.reports.append(report)
    if sources.sft:
        read.chats, report = read_chats(*located(sources.sft, ("train", "train_sft")))
        read.reports.append(_with_rows(report))
    for split, source in (("validation", sources.validation), ("tuning", sources.tuning_prompts)):
        if source:
            asked, report = read_prompts(source, f"{split} prompts", EVALUATED_SPLITS)
            read.evaluated += _prompts(asked, dict.fromkeys(asked, split))
            read.reports.append(_with_rows(report))
    return read


def _with_rows(report: ReadReport) -> ReadReport:
    """The report; raises ValueError if its source has no rows."""
    if not report.read and not report.notes:
        raise ValueError(f"{report.file}: no rows in it; fetch it again, or leave it out")
    return report


def _prompts(asked: Mapping[str, list[Message]], split_of: Mapping[str, str]) -> list[Prompt]:
    return [{"prompt_id": key, "messages": asked[key], "split": split_of[key]} for key in asked]


def _require_scales(stated: Mapping[str, Scale], reports: Sequence[ReadReport]) -> None:
    """Raise ValueError if two sources have a rating on different scales, or a stated scale matches no rating."""
    found: dict[str, ReadReport] = {}
    for report in reports:
        for head, (low, high) in report.scales.items():
            other = found.setdefault(head, report)
            if other.scales[head] != (low, high):
                raise ValueError(
                    f"{head} goes from {scale_text(other.scales[head])} in {other.file}, and from "
                    f"{scale_text((low, high))} in {report.file}; state its scale: [data.scales] {head} = "
                    f"[{low:g}, {high:g}]"
                )
    if unknown := [head for head in stated if head not in found]:
        raise ValueError(
            f"[data.scales] has {unknown[0]}, and no answer in data.rows is rated in a column of that name (rated: "
            f"{', '.join(found) or 'none'})"
        )


def _without_prompts(sources: Data, reports: Sequence[ReadReport]) -> str:
    """The error message if there are no prompts to align on."""
    if sources.rows or sources.prompts:
        return f"no prompts left to align on; where the rows went:\n{render_reports(reports)}"
    alone = f": data.helpsteer ({sources.helpsteer}) trains the reward model alone" if sources.helpsteer else ""
    cure = "name prompts in data.prompts (this source can stand there too)" if alone else "name prompts in data.prompts"
    return f"no prompts to align on{alone}; {cure}, or rows with answers in data.rows (docs/data.md)"


def _without(
    held_out: Sequence[Sequence[Message]], rows: Sequence[AnyRow], what: str, reports: list[ReadReport]
) -> list[AnyRow]:
    """The rows that answer no held-out prompt; a report counts the others."""
    left, dropped = drop_held_out(rows, held_out)
    if dropped.filtered or (rows and what in ("rated answers", "chats")):
        reports.append(replace(dropped, source=f"{dropped.source}: {what}"))
    return left


def _split(seed: int, sources: Data, read: Read) -> tuple[dict[str, str], set[str]]:
    """The split of every prompt (validation, tuning, heldout, judge, D1 or D2), and the judge's prompts.

    Ratings of the judge's prompts train only the judge. With `judge_takes` "ratings" these prompts are in the halves.
    """
    labelled = {row["prompt_id"] for row in read.rated if row["labels"]}
    shares = {"heldout": sources.heldout, "judge": sources.judge}
    only = dict.fromkeys(shares, labelled)
    named: dict[str, list[str]] = {}
    for prompt in read.evaluated:
        named.setdefault(prompt["split"], []).append(prompt["prompt_id"])
    by_hash = {}
    if "validation" not in named:
        by_hash["validation"] = min(0.5, sources.validation_prompts / len(read.asked))
    if "tuning" not in named:
        by_hash["tuning"] = sources.tuning
    split_of = split_prompts(read.asked, seed, shares | by_hash, named, only)
    judged = {key for key, part in split_of.items() if part == "judge"}
    if sources.judge_takes == "ratings":
        apart: dict[str, list[str]] = {}
        for key, part in split_of.items():
            if part not in (*HALVES, "judge"):
                apart.setdefault(part, []).append(key)
        split_of = split_prompts(read.asked, seed, named=apart)
    # No policy sees the prompts that only train the reward model, so these are not divided into halves.
    others = {row["prompt_id"] for row in read.rated} - read.asked.keys()
    alone = split_prompts(others, seed, shares, only=only) if others else {}
    judged |= {key for key, part in alone.items() if part == "judge"}
    return split_of | {key: "D1" if part in HALVES else part for key, part in alone.items()}, judged
