"""`dpa export`: a policy as a plain Hugging Face folder that anything can serve, its dial in the chat template.

OUT/*.safetensors, config.json, tokenizer files   as they are, and nothing else of the checkpoint
OUT/chat_template.jinja                           takes `preference`, and over two objectives `angle`
OUT/generation_config.json                        samples as the policy was evaluated, without a hidden top-k
OUT/dpa.json, golden_prompts.json                 the contract, and what the model must read
OUT/README.md, front.png                          the model card
OUT/reward/ or OUT/reward/NAME/                   the reward models, if requested, with golden scores
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from dpalign.chat import ChatStyle
from dpalign.dial.export.source import FORMS, Card, Source, find_source, hub_name, weights_folder
from dpalign.dial.rewards import OWN_MODULE
from dpalign.paper.direction import Arc
from dpalign.paper.prompts import PreferenceTemplate, RewardInput
from dpalign.rewards.golden import ONLY
from dpalign.runs.modelfolder import CONFIG, label_names, read_object
from dpalign.train.contract import Contract


def declare(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    add = parser.add_argument
    what = "a run folder (its last finished policy), a finished policy's folder, or a local checkpoint"
    add("source", type=Path, metavar="SOURCE", help=what)
    add("--out", type=Path, required=True, metavar="DIR", help="the folder to write; an earlier export is replaced")
    add("--iteration", type=int, metavar="N", help="of a run: the policy of this iteration (default: the last)")
    add("--name", metavar="NAME", help="the model's name on its card, ORG/NAME of a hub, say (default: the folder's)")
    add("--license", metavar="ID", help="for the card's header; without it the card says that none was given")
    text = "the model that it was trained from, by its name on the hub (default: the recipe's)"
    add("--base-model", metavar="ID", help=text)
    add("--reward", action="store_true", help="put the run's reward model beside the policy, to show scores with")
    add("--reward-model", type=Path, metavar="DIR", help="put this reward model beside the policy instead")
    add("--form", metavar="NAME", help=f"what a released checkpoint is: {', '.join(FORMS)}")
    text = "of a checkpoint without a dpa.json: the preference line that it was trained on"
    add("--template", choices=get_args(PreferenceTemplate), help=text)
    text = "with --template: the objectives, in that line's order; with the heads that they read, to be scored"
    add("--objectives", nargs="+", metavar="NAME[=HEAD,...]", help=text)
    text = "with --template: how a reward model of those heads reads a chat"
    add("--reward-template", choices=get_args(RewardInput), help=text)
    text = "with --template: degrees of the trained range (two objectives)"
    add("--range", nargs=2, type=float, metavar=("LOW", "HIGH"), help=text)
    text = "with --template: how turns are set out; model: by its own chat template (default: world-v1, or zephyr)"
    add("--chat", choices=get_args(ChatStyle), help=text)


def execute(given: argparse.Namespace, _: Sequence[str]) -> str:
    """Export what the command line names; return the message for the user.

    Raises:
        ValueError: no policy there, no contract, pickled or damaged weights, or a place that is taken.
    """
    from dpalign.dial.export.folder import export

    for option in ("name", "license", "base_model"):
        words = getattr(given, option)
        if words is not None and (not words.strip() or not words.isprintable()):
            raise ValueError(f"--{option.replace('_', '-')} {words!r}: give words in one line")
    source = find_source(given.source, given.iteration, given.form, _told(given))
    records = source.contract.rewards
    if given.reward_model is not None:
        if len(records) > 1:
            named = ", ".join(record.name for record in records)
            raise ValueError(f"--reward-model: this policy has the rewards {named}; --reward takes those of its run")
        name = records[0].name if records else ONLY
        source = replace(source, rewards={name: weights_folder(given.reward_model)}, golden_scores={})
    elif given.reward:
        source = replace(source, notes=(*source.notes, *notes_on_rewards(source, given.source)))
    mute = [name for name, heads in source.contract.objectives.items() if not heads]
    if mute and (given.reward or given.reward_model is not None):
        raise ValueError(f"nobody said which reward heads {mute[0]!r} reads; give --objectives {mute[0]}=HEAD,...")
    recipe = source.recipe
    base = given.base_model or (hub_name(recipe.model.base) if recipe is not None else None)
    card = Card(given.name or given.out.resolve().name, given.license, base)
    left_out = export(source, given.out, card, with_reward=given.reward or given.reward_model is not None)
    said = [str(given.out), *(f"note: {note}" for note in source.notes)]
    return "\n".join(said + ([f"note: left behind: {', '.join(left_out)}"] if left_out else []))


def notes_on_rewards(source: Source, place: Path) -> list[str]:
    """Return a note for each reward that no folder can hold.

    Raises:
        ValueError: a reward model is missing.
    """
    records = source.contract.rewards
    if not records and not source.rewards:
        raise ValueError(f"--reward: no finished reward model with {place}; name one with --reward-model DIR")
    notes = []
    for record in records:
        if record.kind != "function" and record.name not in source.rewards:
            fetch = f"hf download {record.source}" if record.kind == "model" else "let the run's reward stage finish"
            raise ValueError(f"--reward: reward {record.name!r} ({record.source or 'trained'}) is not here: {fetch}")
        if record.kind == "function" and not record.source.startswith(OWN_MODULE):
            notes.append(
                f"reward {record.name!r} is the Python function {record.source}, which no folder holds; where Python "
                f"can import it, serve with --reward {record.name}={record.source}"
            )
    return notes


def _told(given: argparse.Namespace) -> Contract | None:
    """Build the contract that the command line describes; None if it describes none."""
    if given.template is None:
        names = ("objectives", "range", "chat", "reward_template")
        if extra := [name.replace("_", "-") for name in names if getattr(given, name) is not None]:
            raise ValueError(f"--{extra[0]}: goes with --template, for a checkpoint without a dpa.json")
        return None
    if given.objectives is None or given.form is not None:
        raise ValueError("--template: needs --objectives, and no --form")
    chat: ChatStyle = given.chat or ("world-v1" if given.template == "world-v1" else "zephyr")
    trained = None if given.range is None else Arc(*given.range)
    pairs = [word.partition("=") for word in given.objectives]
    read = {name: tuple(heads.split(",")) if heads else () for name, _, heads in pairs}
    if given.reward_model is not None:
        heads = label_names(read_object(weights_folder(given.reward_model) / CONFIG))
    else:
        heads = tuple(dict.fromkeys(head for of_one in read.values() for head in of_one))
    return Contract(given.template, chat, read, heads, population=trained, reward_template=given.reward_template)
