"""A model's folder: whether it is a sound policy with a dial, or a sound reward model. Nothing in it is run.

Its template is rendered in Jinja's sandbox, its weights are read by their headers, its tokenizer is asked where the
package `tokenizers` is installed.
"""

from collections.abc import Iterator
from pathlib import Path

from dpalign.dial.doctor.files import Folder
from dpalign.dial.doctor.findings import Finding
from dpalign.dial.doctor.policy import policy
from dpalign.dial.doctor.reward import reward_model
from dpalign.dial.export.source import is_run, policy_of
from dpalign.page.words import listed
from dpalign.run.modelfolder import CONFIG, read_object


def examine(named: Path) -> Iterator[Finding]:
    """Everything about one folder: a model's own, a finished stage's, a reward model's, or a run's last policy."""
    found = _found(named)
    if isinstance(found, Finding):
        yield found
        return
    folder = Folder(found, {})
    try:
        folder = Folder(found, read_object(found / CONFIG))
        kinds = [str(name) for name in folder.config.get("architectures") or []]
    except (ValueError, TypeError) as error:
        yield Finding("bad", "config", str(error), "fetch or write the folder again")
        return
    if any(kind.endswith("ForSequenceClassification") for kind in kinds):
        yield from reward_model(folder)
    elif any(kind.endswith("ForCausalLM") for kind in kinds):
        yield from policy(folder)
    else:
        said = f"{CONFIG} names {listed(kinds) if kinds else 'no architecture'}: neither a policy nor a reward model"
        yield Finding(
            "bad", "config", said, "a policy is a ...ForCausalLM, a reward model a ...ForSequenceClassification"
        )


def _found(named: Path) -> Path | Finding:
    """The folder with the weights."""
    if not named.is_dir():
        said = f"{named}: no such folder"
        return Finding("bad", "folder", said, f"hf download {named} --local-dir FOLDER, if it is a name on the hub")
    try:
        if is_run(named):
            named = policy_of(named, None)
    except ValueError as error:
        return Finding("bad", "folder", str(error), "let the run finish: dpa run RECIPE")
    folder = named / "model" if (named / "model").is_dir() else named
    if (folder / CONFIG).is_file():
        return folder
    if (folder / "adapter_config.json").is_file():
        return Finding("bad", "folder", f"{folder}: an adapter without its model", "merge it: peft's merge_and_unload")
    return Finding("bad", "folder", f"{folder}: no {CONFIG}: not a model's folder", "name the folder with the weights")
