"""A policy's folder: its contract, and a chat template that writes what the contract means."""

import importlib.util
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final

from dpalign.dial import golden
from dpalign.dial.dial import Dial
from dpalign.dial.doctor.files import Folder, checked, pickles, sampling, special, weights
from dpalign.dial.doctor.findings import Finding
from dpalign.dial.doctor.reward import reward_model
from dpalign.page.words import degrees, listed, number
from dpalign.paper.direction import Preference
from dpalign.run.modelfolder import (
    CONFIG,
    TEMPLATE,
    TOKENIZER,
    label_names,
    read_object,
    special_tokens,
    template_of,
    walk,
)
from dpalign.train.contract import FILE, Contract, read_contract

DIRECTIONS: Final = 19
"""At which the template is held against our own Python."""


def policy(folder: Folder) -> Iterator[Finding]:
    yield from checked(folder, weights=weights, pickles=pickles, tokens=special, sampling=sampling)
    try:
        contract = read_contract(folder.path)
    except ValueError as error:
        yield Finding("bad", "contract", str(error), "export the policy again: dpa export")
        return
    if contract is None:
        takes = "takes a preference all the same" if "preference" in (template_of(folder.path) or "") else "has no dial"
        said = f"no {FILE}: what its directions mean is not on record; its chat template {takes}"
        yield Finding("bad", "contract", said, f"dpa export {folder.path} --template T --objectives NAME... --out DIR")
        return
    yield _said_of(contract)
    yield from checked(
        folder,
        template=partial(_template, contract=contract),
        golden=partial(_golden, contract=contract),
        tokenizer=partial(_lengths, contract=contract),
        files=_manifest,
    )
    if contract.reward is not None:
        yield from _reward_beside(folder, contract)


def _said_of(contract: Contract) -> Finding:
    names = contract.names
    said = f"{listed(names)}; line {contract.template}, chat {contract.chat}"
    if contract.arc is not None:
        said += f"; trained from {degrees(contract.arc[1])} to {degrees(contract.arc[0])}"
    elif contract.population is None:
        said += "; the trained range is not on record"
    if contract.front:
        said += f"; measured at {len(contract.front)} directions"
    return Finding("ok", "dial", said)


def _template(folder: Folder, contract: Contract) -> Finding:
    """The chat template against our Python, at many directions, plainly, and where it must refuse."""
    text, dial = template_of(folder.path), Dial.of(contract)
    mend = f"dpa export {folder.path} --out DIR writes it anew"
    if text is None:
        return Finding("bad", "template", f"no {TEMPLATE}: nothing turns a chat into a prompt", mend)
    eos = special_tokens(folder.path).eos or ""
    asked: list[Preference | None] = [None, *golden.shown_directions(dial, DIRECTIONS)]
    for chat in golden.chats(dial.chat):
        for v in asked:
            given = {} if v is None else {"preference": v.weights}
            found, meant = golden.render(text, chat, **given), golden.expected(dial, chat, v, eos)
            if found != meant:
                where = "without a preference" if v is None else f"at {given['preference']}"
                said = f"{where} it writes {_short(found)}, where the model was trained on {_short(meant)}"
                return Finding("bad", "template", said, mend)
    try:
        golden.render(text, golden.chats(dial.chat)[0], preference={contract.names[0]: 1.0, "no such": 1.0})
    except ValueError:
        said = f"takes preference{' and angle' if len(contract.objectives) == 2 else ''}, refuses unknown names"
        return Finding("ok", "template", f"{said}; {len(asked)} directions give the prompts of {FILE}")
    return Finding("note", "template", "takes a preference, but lets unknown names pass in silence", mend)


def _golden(folder: Folder, contract: Contract) -> Finding | None:
    """The prompts that an export publishes: what the template writes, and what the contract means."""
    prompts, text = golden.read_golden(folder.path), template_of(folder.path)
    if not prompts or text is None:
        return None
    for one in prompts:
        found = golden.render(text, one.messages, preference=one.preference)
        dial, eos = Dial.of(contract), special_tokens(folder.path).eos or ""
        if not found == one.text == golden.expected(dial, one.messages, dial.read(one.preference), eos):
            said = f"{golden.FILE} has {_short(one.text)}, the template writes {_short(found)}"
            return Finding("bad", "golden", said, "export the policy again: dpa export")
    return Finding("ok", "golden", f"{len(prompts)} golden prompts, all as the template writes them")


def _lengths(folder: Folder, contract: Contract) -> Finding | None:
    """Tokens of the prompt at both ends of the dial, and whether the end of a turn is one token."""
    if not (folder.path / TOKENIZER).is_file() or importlib.util.find_spec("tokenizers") is None:
        return Finding("note", "tokenizer", "not tried: it needs tokenizer.json, and the package tokenizers")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder.path / TOKENIZER))
    dial, tokens = Dial.of(contract), special_tokens(folder.path)
    eos = tokens.eos or ""
    if tokenizer.encode(eos, add_special_tokens=False).ids != [tokens.eos_id]:
        return Finding(
            "bad", "tokenizer", f"{eos!r} in a prompt is not the one token {tokens.eos_id}", "mend tokenizer.json"
        )
    directions, chat = golden.shown_directions(dial, 3), golden.chats(dial.chat)[0]
    said = [f"{len(tokenizer.encode(golden.expected(dial, chat, None, eos), add_special_tokens=False).ids)} plainly"]
    for v in (directions[0], directions[-1]):
        angle = dial.angle_of(v)
        where = degrees(angle) if angle is not None else " ".join(number(w, 2) for w in v.v)
        text = golden.expected(dial, chat, v, eos)
        said.append(f"{len(tokenizer.encode(text, add_special_tokens=False).ids)} at {where}")
    question = chat[-1]["content"]
    return Finding("ok", "tokenizer", f"tokens of the prompt {question!r}: {', '.join(said)}")


def _manifest(folder: Folder) -> Finding | None:
    """The files that an export lists."""
    listed_sizes = read_object(folder.path / FILE).get("files")
    if not isinstance(listed_sizes, dict):
        return None
    here = {path.relative_to(folder.path).as_posix(): path.stat().st_size for path in walk(folder.path)}
    missing = sorted(set(listed_sizes) - set(here))
    altered = sorted(name for name, bytes_ in listed_sizes.items() if name in here and here[name] != bytes_)
    if missing:
        return Finding("bad", "files", f"missing since the export: {listed(missing)}", "export or fetch it again")
    own = [name for name in altered if not name.endswith(".md")]
    if own:
        return Finding("bad", "files", f"another size than exported: {listed(own)}", "export or fetch it again")
    return Finding("ok", "files", f"all {len(listed_sizes)} as exported{', but for its card' if altered else ''}")


def _reward_beside(folder: Folder, contract: Contract) -> Iterator[Finding]:
    """The reward model inside an export: sound, and with the heads that the objectives read."""
    path = folder.path / str(contract.reward)
    if not (path / CONFIG).is_file():
        yield Finding("bad", "reward", f"{FILE} names {path.name}/, which is not there", "dpa export RUN --reward")
        return
    found: Sequence[Finding] = list(reward_model(Folder(path, read_object(path / CONFIG))))
    for finding in found:
        if finding.level != "ok":
            yield Finding(finding.level, f"reward: {finding.what}", finding.said, finding.mend)
    heads = label_names(read_object(path / CONFIG))
    lacking = [head for read in contract.objectives.values() for head in read if head not in heads]
    if lacking:
        yield Finding(
            "bad", "reward", f"has no head {listed(lacking)}, which the objectives read", "dpa export RUN --reward"
        )
    elif all(finding.level != "bad" for finding in found):
        yield Finding("ok", "reward", f"a sound reward model of {len(heads)} heads lies beside it")


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 90 else f"{shown[:40]}...{shown[-45:]}"
