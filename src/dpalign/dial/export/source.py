"""What is exported: a run's policy, a finished stage's, or a checkpoint whose form the user tells."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from dpalign.measure.summary import Measured, Summary
from dpalign.paper.direction import Arc
from dpalign.paper.objectives import PAPER_OBJECTIVES
from dpalign.recipe import Recipe, load
from dpalign.rows import HEADS
from dpalign.run.ledger import LEDGER, read_ledger
from dpalign.run.modelfolder import CONFIG
from dpalign.train.contract import FILE, Contract, contract_of, read_contract

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
"""Checkpoints that others released, by their name on the hub: what their directions mean."""


@dataclass(frozen=True)
class Source:
    """A policy with its directions, and what is known of how it was made."""

    model: Path
    """The folder with its weights."""
    contract: Contract
    form: str | None = None
    """The released checkpoint that it is."""
    recipe: Recipe | None = None
    summary: Summary | None = None
    """The run's report, if it evaluated this very policy."""
    reports: Sequence[Mapping[str, Any]] = ()
    """What the run read of each data file, and what it kept."""
    reward: Path | None = None
    """The folder with the weights of the run's reward model."""
    notes: tuple[str, ...] = field(default=())
    """What could not be found or used, in words."""


@dataclass(frozen=True)
class Card:
    """What only its publisher can say of a model."""

    name: str
    license: str | None
    base_model: str | None


def find_source(named: Path, iteration: int | None, form: str | None, told: Contract | None) -> Source:
    """The policy at a path: a run folder, a finished stage's, or a checkpoint.

    Args:
        iteration: of a run; None takes its last finished policy.
        form: a name of FORMS; None unless the user says that it is that.
        told: the contract that the user tells; None unless the folder has none.

    Raises:
        ValueError: no such folder or iteration, no contract, or two.
    """
    if not named.is_dir():
        if str(named) in FORMS:
            fetch = f"hf download {named} --local-dir FOLDER"
            raise ValueError(f"{named}: no such folder; fetch it (`{fetch}`), then `dpa export FOLDER --form {named}`")
        raise ValueError(f"{named}: no such folder; give a run, a finished policy or a local checkpoint")
    stage, model, contract_folder = located(named, iteration)
    contract = read_contract(contract_folder)
    if contract is not None and (form is not None or told is not None):
        raise ValueError(f"{contract_folder / FILE}: says what its directions mean already; leave --form and the rest")
    if form is not None:
        contract = _released(form)
    contract = told or contract
    if contract is None:
        raise ValueError(
            f"{contract_folder / FILE}: no such file: say what the policy was trained to read, with "
            f"--template, --objectives and --range, or --form {' or '.join(FORMS)}"
        )
    source = Source(model, contract, form)
    run = stage.resolve().parent
    at_home = re.fullmatch(r"policy-\d+", stage.name) and (run / "recipe.toml").is_file() and (stage / LEDGER).is_file()
    return _with_run(source, stage, run) if at_home else source


def located(named: Path, iteration: int | None = None) -> tuple[Path, Path, Path]:
    """The stage or checkpoint that a path means, the folder with its weights, and that with its contract.

    Args:
        named: a run, whose policy is meant; a finished stage, or the model in it; a checkpoint.
        iteration: of a run; None takes its last finished policy.

    Raises:
        ValueError: a run without that policy, or an iteration of what is no run.
    """
    if is_run(named):
        named = policy_of(named, iteration)
    elif iteration is not None:
        raise ValueError(f"--iteration {iteration}: {named} is no run folder, whose iterations could be chosen from")
    stage = named.parent if named.name == "model" and (named.parent / LEDGER).is_file() else named
    return stage, *_model_in(stage)


def opened(named: Path) -> tuple[str, Path, Path]:
    """What answers as the model at a path: its name, the folder with its weights, and that with its contract.

    Raises:
        ValueError: no model lies there.
    """
    _, model, contract_folder = located(named)
    if not (model / CONFIG).is_file():
        raise ValueError(f"{named}: no {CONFIG} here: not a model's folder")
    whole = named.resolve()
    return whole.parent.name if whole.name == "model" else whole.name, model, contract_folder


def is_run(named: Path) -> bool:
    """Whether a path is a run's folder."""
    return (named / "recipe.toml").is_file() and not (named / CONFIG).is_file()


def policy_of(run: Path, iteration: int | None) -> Path:
    """The finished policy of an iteration of a run; None takes the last.

    Raises:
        ValueError: there is none.
    """
    finished = {
        int(path.parent.name.removeprefix("policy-")): path.parent
        for path in run.glob(f"policy-*/{LEDGER}")
        if path.parent.name.removeprefix("policy-").isdecimal()
    }
    known = ", ".join(map(str, sorted(finished))) or "none"
    t = max(finished, default=-1) if iteration is None else iteration
    if t not in finished:
        which = "no finished policy" if iteration is None else f"no finished policy of iteration {iteration}"
        raise ValueError(f"{run}: {which}; finished: {known} (t=0 is SteerLM's, which takes no directions)")
    return finished[t]


def weights_folder(named: Path) -> Path:
    """Where the weights lie: in the `model` of a finished stage's folder, or there itself."""
    return named / "model" if (named / "model").is_dir() else named


def _model_in(stage: Path) -> tuple[Path, Path]:
    """Where the weights lie, and where the contract: apart where a checkpoint was taken in place of training."""
    folder = weights_folder(stage)
    taken = stage / "checkpoint.txt"
    if not taken.is_file():
        return folder, folder
    checkpoint = Path(taken.read_text(encoding="utf-8").strip())
    if not checkpoint.is_dir():
        raise ValueError(f"{taken}: names {checkpoint}, which is no local folder; fetch it and export that folder")
    return checkpoint, folder


def _released(form: str) -> Contract:
    if form not in FORMS:
        raise ValueError(f"--form {form}: known: {', '.join(FORMS)}; of others tell --template, --objectives, --range")
    return FORMS[form]


def _with_run(source: Source, stage: Path, run: Path) -> Source:
    """The same policy with what its run tells of it."""
    notes: list[str] = []
    try:
        recipe = load(run / "recipe.toml")
    except ValueError as error:
        return replace(source, notes=(f"the card says nothing of the recipe, which this version cannot read: {error}",))
    t = int(stage.name.removeprefix("policy-"))
    contract, own = source.contract, contract_of(recipe, t)
    if (contract.names, contract.template, contract.chat) != (own.names, own.template, own.chat):
        return replace(source, notes=("the run's recipe has changed since this policy was trained: it is left out",))
    if contract.population is None:  # format 1 told no more than an arc
        contract = replace(contract, population=own.population)
    contract = replace(contract, reward_template=own.reward_template)
    summary = _summary_of(run, stage, notes)
    reports = run / "data" / "reports.json"
    read = json.loads(reports.read_text(encoding="utf-8")) if reports.is_file() else []
    reward = _model_in(run / "reward")[0] if (run / "reward" / LEDGER).is_file() else None
    return replace(
        source, contract=contract, recipe=recipe, summary=summary, reports=read, reward=reward, notes=tuple(notes)
    )


def _summary_of(run: Path, stage: Path, notes: list[str]) -> Summary | None:
    """The run's report, where it is finished and evaluated the policy that lies there now."""
    evaluated, path = f"evaluate-{stage.name}", run / "report" / "summary.json"
    if not path.is_file() or not (run / "report" / LEDGER).is_file():
        notes.append("the run has no finished report: the export has no measured front")
        return None
    own = read_ledger(stage)["digest"]
    reported = read_ledger(run / "report")["inputs"].get(evaluated, {}).get("digest")
    if not (run / evaluated / LEDGER).is_file():
        notes.append(f"the run has no {evaluated}: the export has no measured front")
        return None
    evaluation = read_ledger(run / evaluated)
    if evaluation["digest"] != reported or evaluation["inputs"]["policy"]["digest"] != own:
        notes.append("the run's report is of an earlier policy: the export has no measured front; run it again")
        return None
    return Summary.model_validate_json(path.read_text(encoding="utf-8"))


def entry_of(source: Source) -> Measured | None:
    """The policy in its run's summary."""
    policies = source.summary.of_role("iteration") if source.summary else []
    return next((one for one in policies if one.steered and one.system.iteration == source.contract.iteration), None)


def hub_name(base: str) -> str | None:
    """A model's or data set's name on the hub; None for a path, for the world, and for nothing."""
    parts = base.split("/")
    return (
        base if len(parts) == 2 and all(parts) and not base.startswith((".", "~")) and not Path(base).exists() else None
    )
