"""What is exported: a run's policy, a finished stage's, or a checkpoint that the user describes."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from dpalign.dial.dial import Dial
from dpalign.dial.golden import chats, shown_directions
from dpalign.engines.sandbox import render
from dpalign.paper.direction import Arc, Preference
from dpalign.paper.objectives import PAPER_OBJECTIVES
from dpalign.recipe import Recipe, load
from dpalign.rewards.golden import ONLY, GoldenModel, read_golden
from dpalign.rewards.scale import FILE as SCALES
from dpalign.rewards.scale import read_scales
from dpalign.rows import CANDIDATES, HEADS, read_rows
from dpalign.runs.hub import revised
from dpalign.runs.ledger import LEDGER, hash_of, outputs_as_read, read_ledger
from dpalign.runs.modelfolder import CONFIG, read_marks, require_fit, template_of
from dpalign.train.contract import FILE, Contract, RewardRecord, read_contract

if TYPE_CHECKING:
    from dpalign.measure.summary import Summary

FORMS: Final[Mapping[str, Contract]] = {
    "RLHFlow/DPA-v1-Mistral-7B": Contract(
        "dpa-v1",
        "zephyr",
        {objective.name: objective.heads for objective in PAPER_OBJECTIVES},
        HEADS,
        Arc(),
        reward_template="dpa-v1",
    )
}
"""Checkpoints that others released, by their name on the hub, with the meaning of their directions."""
EXAMPLES: Final = 3
"""Questions on the card of a run of the world."""


@dataclass(frozen=True)
class Example:
    """A question of the evaluation, with the policy's own first answers from one end of the dial to the other."""

    question: str
    answers: tuple[tuple[Preference, str], ...]


@dataclass(frozen=True)
class Source:
    """A policy with its directions, and the records of its training."""

    model: Path
    """The folder with its weights."""
    contract: Contract
    form: str | None = None
    """Its name in `FORMS`, if it is a released checkpoint."""
    recipe: Recipe | None = None
    summary: "Summary | None" = None
    """The run's report, if it evaluated this very policy."""
    data: Sequence[Mapping[str, Any]] = ()
    """The run's report on each data file: rows read and rows kept."""
    rewards: Mapping[str, Path] = field(default_factory=dict)
    """The folders with the weights of the run's reward models, by name."""
    golden_scores: Mapping[str, GoldenModel] = field(default_factory=dict)
    """The golden scores of these reward models, by name."""
    examples: Sequence[Example] = ()
    evaluation: Path | None = None
    """The run's finished evaluation of this very policy."""
    stages: tuple[Path, ...] = ()
    """The finished stages that the policy and the report were read from."""
    notes: tuple[str, ...] = ()
    """What is missing or unusable, for the user."""


@dataclass(frozen=True)
class Card:
    """What only the publisher can say about a model."""

    name: str
    license: str | None
    base_model: str | None


def find_source(
    path: Path, iteration: int | None = None, form: str | None = None, described: Contract | None = None
) -> Source:
    """Find the policy at a path: a run folder, a finished stage's, or a checkpoint.

    Args:
        iteration: of a run; None takes its last finished policy.
        form: a name in FORMS, if the user gives one.
        described: the contract in the user's words, for a folder without one.

    Raises:
        ValueError: no such folder or iteration, no contract, or two.
    """
    if not path.is_dir():
        if str(path) in FORMS:
            fetch = f"hf download {path} --local-dir FOLDER"
            raise ValueError(f"{path}: no such folder; fetch it (`{fetch}`), then `dpa export FOLDER --form {path}`")
        raise ValueError(f"{path}: no such folder; give a run, a finished policy or a local checkpoint")
    stage, model, contract_folder = find_folders(path, iteration)
    contract = read_contract(contract_folder)
    if contract is not None and (form is not None or described is not None):
        raise ValueError(f"{contract_folder / FILE}: says what its directions mean already; leave --form and the rest")
    if form is not None and form not in FORMS:
        known = ", ".join(FORMS)
        raise ValueError(f"--form {form}: known: {known}; for others give --template, --objectives, --range")
    contract = contract or described or (None if form is None else FORMS[form])
    if contract is None:
        raise ValueError(
            f"{contract_folder / FILE}: no such file: say what the policy was trained to read, with "
            f"--template, --objectives and --range, or --form {' or '.join(FORMS)}"
        )
    finished, run = (stage / LEDGER).is_file(), stage.resolve().parent
    source = Source(model, contract, form, stages=(stage,) if finished else ())
    at_home = finished and re.fullmatch(r"policy-\d+", stage.name) and (run / "recipe.toml").is_file()
    return _with_run(source, stage, run) if at_home else source


def find_folders(path: Path, iteration: int | None = None) -> tuple[Path, Path, Path]:
    """Return the stage or checkpoint at a path, the folder with its weights, and the folder with its contract.

    Args:
        path: a run, for its policy; a finished stage, or the model in it; a checkpoint.
        iteration: of a run; None takes its last finished policy.

    Raises:
        ValueError: a run without that policy, or an iteration although the path is no run.
    """
    if is_run(path):
        path = policy_of(path, iteration)
    elif iteration is not None:
        raise ValueError(f"--iteration {iteration}: {path} is no run folder, whose iterations could be chosen from")
    stage = path.parent if path.name == "model" and (path.parent / LEDGER).is_file() else path
    return stage, *_model_in(stage)


def find_model(path: Path) -> tuple[str, Path, Path]:
    """Return the name of the model at a path, the folder with its weights, and the folder with its contract.

    Raises:
        ValueError: there is no model.
    """
    _, model, contract_folder = find_folders(path)
    if not (model / CONFIG).is_file():
        adapter = (model / "adapter_config.json").is_file()
        cure = "an adapter alone: merge it into its model (peft's merge_and_unload)" if adapter else ""
        raise ValueError(f"{path}: no {CONFIG} here: {cure or 'not a model folder'}")
    whole = path.resolve()
    return whole.parent.name if whole.name == "model" else whole.name, model, contract_folder


def require_sound(path: Path) -> None:
    """Check, before a model is loaded, that its weights fit and that its template writes its contract's directions.

    Raises:
        ValueError: names the file and the fault.
    """
    _, model, contract_folder = find_model(path)
    require_fit(model)
    contract, template = read_contract(contract_folder), template_of(model)
    if contract is None or template is None:
        return
    dial, tokens = Dial.of(contract), read_marks(model).named
    for v in shown_directions(dial, 3):
        try:
            written = render(template, chats(dial.chat)[0], preference=v.weights, **tokens)
        except ValueError as error:
            raise ValueError(f"{model}: {error}; export the policy again") from error
        if dial.line(v) not in written:
            raise ValueError(
                f"{contract_folder / FILE}: a direction over {', '.join(contract.names)} is {dial.line(v)!r}, and the "
                "chat template writes another line; export the policy again"
            )


def is_run(path: Path) -> bool:
    """Whether a path is a run's folder."""
    return (path / "recipe.toml").is_file() and not (path / CONFIG).is_file()


def policy_of(run: Path, iteration: int | None) -> Path:
    """The finished policy of an iteration of a run; None takes the last.

    Raises:
        ValueError: there is none.
    """
    numbers = [path.parent.name.removeprefix("policy-") for path in run.glob(f"policy-*/{LEDGER}")]
    finished = sorted(int(number) for number in numbers if number.isdecimal())
    t = max(finished, default=-1) if iteration is None else iteration
    if t not in finished:
        which = "no finished policy" if iteration is None else f"no finished policy of iteration {iteration}"
        known = ", ".join(map(str, finished)) or "none"
        raise ValueError(f"{run}: {which}; finished: {known} (t=0 is SteerLM's, which takes no directions)")
    return run / f"policy-{t}"


def weights_folder(path: Path) -> Path:
    """Return the folder with the weights: `model` in a finished stage's folder, or the path itself."""
    return path / "model" if (path / "model").is_dir() else path


def _model_in(stage: Path) -> tuple[Path, Path]:
    """Return the folders of weights and contract. They differ if a checkpoint was taken in place of training."""
    folder, taken = weights_folder(stage), stage / "checkpoint.txt"
    if not taken.is_file():
        return folder, folder
    checkpoint = Path(taken.read_text(encoding="utf-8").strip())
    if not checkpoint.is_dir():
        raise ValueError(f"{taken}: names {checkpoint}, which is no local folder; fetch it and export that folder")
    return checkpoint, folder


def _with_run(source: Source, stage: Path, run: Path) -> Source:
    """The same policy with the records of its run."""
    try:
        recipe = load(run / "recipe.toml")
    except ValueError as error:
        return replace(source, notes=(f"this version cannot read the run's recipe, and leaves it out: {error}",))
    contract = source.contract
    trained = (tuple(recipe.objectives), recipe.preference.template, recipe.model.chat)
    if trained != (contract.names, contract.template, contract.chat):
        return replace(source, notes=("the run's recipe has changed since this policy was trained: it is left out",))
    evaluation = _evaluation_of(run, stage)
    examples: tuple[Example, ...] = ()
    if recipe.data.world and evaluation is not None:  # other prompts belong to others: not ours to publish
        examples = _examples(evaluation, contract.names)
    files = run / "data" / "reports.json"
    summary, note = _summary_of(run, stage)
    return replace(
        source,
        contract=replace(contract, rewards=tuple(_with_scale(run, contract))),
        recipe=recipe,
        summary=summary,
        data=json.loads(files.read_text(encoding="utf-8")) if files.is_file() else (),
        rewards=_reward_folders(run, contract),
        golden_scores=read_golden(run / "reward"),
        examples=examples,
        evaluation=evaluation,
        stages=(stage,) if summary is None else (stage, run / "report"),
        notes=(note,) if note else (),
    )


def _reward_folders(run: Path, contract: Contract) -> dict[str, Path]:
    """Return the folders of a run's reward models: the one that it trained, and those that its recipe names."""
    own = run / "reward" / "model"
    trained = own if (run / "reward" / LEDGER).is_file() and (own / CONFIG).is_file() else None
    if not contract.rewards:
        return {} if trained is None else {ONLY: trained}
    folders = {}
    for record in contract.rewards:
        folder = trained if record.kind == "trained" else _given_folder(record)
        if folder is not None:
            folders[record.name] = folder
    return folders


def _given_folder(record: RewardRecord) -> Path | None:
    """Return the folder of a given reward model, local or in the hub's cache; None if it is in neither."""
    if record.kind != "model":
        return None
    if Path(record.source).is_dir():
        return weights_folder(Path(record.source))
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ModuleNotFoundError:
        return None
    try:
        name, revision = revised(record.source)
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def _with_scale(run: Path, contract: Contract) -> Iterator[RewardRecord]:
    """Yield the reward records; a scale that the policy's contract lacks comes from the run's annotation."""
    for record in contract.rewards:
        if not record.scale and (run / "annotate" / SCALES).is_file():
            heads = [f"{record.name}/{head}" for head in record.heads]
            yield replace(record, scale=tuple(read_scales(run / "annotate", heads)))
        else:
            yield record


def _examples(evaluation: Path, names: Sequence[str]) -> tuple[Example, ...]:
    """Return an evaluation's first questions, each with its first answers at both ends and the middle of the dial."""
    examples = []
    for rows in _questions(evaluation / "answers"):
        at = sorted(row["condition_index"] for row in rows)
        picked = {at[0], at[len(at) // 2], at[-1]}
        answers = [
            (Preference.from_vector(row["condition"], names), row["response"])
            for row in rows
            if row["condition_index"] in picked and row["condition_kind"] == "direction"
        ]
        examples.append(Example(rows[0]["messages"][-1]["content"], tuple(answers)))
        if len(examples) == EXAMPLES:
            break
    return tuple(examples)


def _questions(answers: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the first answers to each question, one question at a time."""
    first = (row for row in read_rows(answers, CANDIDATES) if row["sample"] == 0)
    return (list(rows) for _, rows in groupby(first, key=lambda row: row["prompt_id"]))


def _evaluation_of(run: Path, stage: Path) -> Path | None:
    folder = run / f"evaluate-{stage.name}"
    if not (folder / LEDGER).is_file():
        return None
    return folder if read_ledger(folder)["inputs"]["policy"]["digest"] == hash_of(outputs_as_read(stage)) else None


def _summary_of(run: Path, stage: Path) -> "tuple[Summary | None, str]":
    """Return the report if it is finished and evaluates the policy that is there now; else the reason."""
    missing = "the export has no measured front"
    report, evaluation = run / "report", run / f"evaluate-{stage.name}"
    if not (report / "summary.json").is_file() or not (report / LEDGER).is_file():
        return None, f"the run has no finished report: {missing}"
    if not (evaluation / LEDGER).is_file():
        return None, f"the run has no {evaluation.name}: {missing}"
    evaluated = read_ledger(evaluation)
    reported = read_ledger(report)["inputs"].get(evaluation.name, {}).get("digest")
    if evaluated["digest"] != reported or evaluated["inputs"]["policy"]["digest"] != hash_of(outputs_as_read(stage)):
        return None, f"the run's report is of an earlier policy, or of an earlier commit: {missing}; run it again"
    from dpalign.measure.summary import Summary

    try:
        return Summary.model_validate_json((report / "summary.json").read_text(encoding="utf-8")), ""
    except ValidationError:
        return None, f"the run's report is of another version: {missing}; run it again"


def hub_name(base: str) -> str | None:
    """Return the hub name of a model or data set, without a revision; None for a path, the world or an empty text."""
    base, _ = revised(base)
    parts = base.split("/")
    named = len(parts) == 2 and all(parts) and not base.startswith((".", "~"))
    return base if named and not Path(base).exists() else None
