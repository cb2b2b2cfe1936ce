"""A model's folder: is it a sound policy with a dial, or a sound reward model? Nothing in it is run.

Weights are read by their headers, the chat template is rendered in Jinja's sandbox, and the tokenizer is tried where
the package `tokenizers` is installed.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from dpalign.dial import golden
from dpalign.dial.dial import Dial
from dpalign.dial.doctor.finding import Finding
from dpalign.dial.export.source import opened
from dpalign.page.words import listed, size
from dpalign.run.modelfolder import (
    CONFIG,
    GENERATION,
    TEMPLATE,
    TOKENIZER,
    check_weights,
    label_names,
    pickles_in,
    read_header,
    read_object,
    special_tokens,
    template_of,
    vocabulary,
    walk,
    weights_files,
)
from dpalign.train.contract import FILE, Contract, read_contract

DIRECTIONS: Final = 19
"""At which the template is compared with our own Python."""
SCORE: Final = "score.weight"
"""A classifier's head, of shape (labels, width)."""
FETCH: Final = "export the model again, or fetch it again"


@dataclass(frozen=True)
class Folder:
    """A model's folder with its configuration."""

    path: Path
    config: dict[str, Any]

    @property
    def generation(self) -> dict[str, Any]:
        path = self.path / GENERATION
        return read_object(path) if path.is_file() else {}


def examine(path: Path) -> Iterator[Finding]:
    """Everything about one folder: a model's own, a finished stage's, a reward model's, or a run's last policy."""
    folder = _find(path)
    if isinstance(folder, Finding):
        yield folder
        return
    kinds = [str(name) for name in folder.config.get("architectures") or []]
    if any(kind.endswith("ForSequenceClassification") for kind in kinds):
        yield from _reward_model(folder)
    elif any(kind.endswith("ForCausalLM") for kind in kinds):
        yield from _policy(folder)
    else:
        text = f"{CONFIG} names {listed(kinds) if kinds else 'no architecture'}: neither a policy nor a reward model"
        cure = "a policy is a ...ForCausalLM, a reward model a ...ForSequenceClassification"
        yield Finding("bad", "config", text, cure)


def _find(path: Path) -> Folder | Finding:
    """The folder with the weights."""
    if not path.is_dir():
        cure = f"hf download {path} --local-dir FOLDER, if it is a name on the hub"
        return Finding("bad", "folder", f"{path}: no such folder", cure)
    try:
        _, folder, _ = opened(path)
    except ValueError as error:
        return Finding("bad", "folder", str(error), "name the folder of the weights; let a run finish: dpa run RECIPE")
    try:
        return Folder(folder, read_object(folder / CONFIG))
    except ValueError as error:
        return Finding("bad", "config", str(error), FETCH)


def _checked(folder: Folder, **checks: Callable[[Folder], Finding | None]) -> Iterator[Finding]:
    """The finding of each check. A check that fails is a finding too, and the others go on."""
    for name, check in checks.items():
        try:
            finding = check(folder)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            finding = Finding("bad", name, reason, FETCH)
        if finding is not None:
            yield finding


# --- any model ---


def _weights(folder: Folder) -> Finding:
    try:
        weights = check_weights(folder.path)
    except ValueError as error:
        cure = "save it as safetensors: save_pretrained does" if pickles_in(folder.path) else FETCH
        return Finding("bad", "weights", str(error), cure)
    files = weights.files[0] if len(weights.files) == 1 else f"{len(weights.files)} files"
    text = f"{weights.parameters:,} parameters, {'/'.join(weights.types)}, {size(weights.bytes)} in {files}, whole"
    return Finding("ok", "weights", text)


def _pickles(folder: Folder) -> Finding | None:
    names = pickles_in(folder.path)
    if not names:
        return None
    text = f"{listed(names)}: files that run code when they are loaded; nothing needs them"
    return Finding("bad", "pickles", text, f"rm {' '.join(str(folder.path / name) for name in names)}")


def _tokens(folder: Folder) -> Finding:
    """Special tokens must exist, agree with the configuration, and lie within the model's vocabulary."""
    tokens, config = special_tokens(folder.path), folder.config
    reward = "id2label" in config and any("Classification" in str(one) for one in config["architectures"])
    wrong: list[str] = []
    if tokens.eos is None:
        wrong.append("no eos_token, with which an answer could end")
    if (folder.path / TOKENIZER).is_file():
        ids, width = vocabulary(folder.path), config.get("vocab_size")
        for name, token in (("eos", tokens.eos), ("pad", tokens.pad)):
            if token is not None and token not in ids:
                wrong.append(f"{name}_token {token!r} is not in the vocabulary")
        if ids and max(ids.values()) >= int(width or 0):
            wrong.append(f"token {max(ids.values())} for a model of {width} tokens")
    ends = _ids(folder.generation.get("eos_token_id")) or _ids(config.get("eos_token_id"))
    if tokens.eos_id is not None and ends and tokens.eos_id not in ends:
        wrong.append(f"eos_token is token {tokens.eos_id}, but the model stops at {sorted(ends)}")
    if reward and tokens.pad_id is not None and config.get("pad_token_id") != tokens.pad_id:
        wrong.append(f"pad_token is token {tokens.pad_id}, but pad_token_id is {config.get('pad_token_id')}")
    pad = ""
    if tokens.pad is None:
        pad = "no pad_token: answers can be drawn one at a time only"
    elif tokens.pad == tokens.eos:
        consequence = "the score is read at the last token that is no pad" if reward else "fine to ask, not to train"
        pad = f"pad_token is the eos_token: {consequence}"
    if wrong or (pad and reward):
        text = "; ".join([*wrong, *([pad] if pad else [])])
        return Finding("bad", "tokens", text, "repair tokenizer_config.json and config.json")
    text = "eos and pad differ, as scoring needs it" if reward else f"an answer ends with {tokens.eos!r}"
    return (
        Finding("note", "tokens", f"{text}; {pad}") if pad else Finding("ok", "tokens", f"{text}, pad {tokens.pad!r}")
    )


def _ids(value: object) -> set[int]:
    return set(value) if isinstance(value, list) else {value} if isinstance(value, int) else set()


# --- a policy ---


def _policy(folder: Folder) -> Iterator[Finding]:
    yield from _checked(folder, weights=_weights, pickles=_pickles, tokens=_tokens, sampling=_sampling)
    try:
        contract = read_contract(folder.path)
    except ValueError as error:
        yield Finding("bad", "contract", str(error), "export the policy again: dpa export")
        return
    if contract is None:
        takes = "takes a preference all the same" if "preference" in (template_of(folder.path) or "") else "has no dial"
        text = f"no {FILE}: what its directions mean is not on record; its chat template {takes}"
        cure = f"dpa export {folder.path} --template T --objectives NAME... --out DIR"
        yield Finding("bad", "contract", text, cure)
        return
    yield _dial(contract)
    template, prompts = partial(_template, contract=contract), partial(_golden, contract=contract)
    yield from _checked(folder, template=template, golden=prompts, tokenizer=_turn_end, files=_files)
    if contract.reward is not None:
        yield from _reward_beside(folder, contract, contract.reward)


def _sampling(folder: Folder) -> Finding | None:
    settings = folder.generation
    if not settings.get("do_sample"):
        return Finding("note", "sampling", "answers greedily by default; an export samples as it was evaluated")
    if settings.get("top_k") != 0:
        top_k = settings.get("top_k", "not set, which means 50")
        text = f"top_k is {top_k}: fewer tokens to draw from than in training"
        return Finding("note", "sampling", text, f'"top_k": 0 in {folder.path / GENERATION}')
    return None


def _dial(contract: Contract) -> Finding:
    text = f"{listed(contract.names)}; line {contract.template}, chat {contract.chat}"
    trained = Dial.of(contract).trained
    text += f"; trained on {trained}" if trained else "; the trained range is not on record"
    if contract.front:
        text += f"; measured at {len(contract.front)} directions"
    return Finding("ok", "dial", text)


def _template(folder: Folder, contract: Contract) -> Finding:
    """The chat template against our Python, at many directions, plainly, and where it must refuse."""
    text, dial = template_of(folder.path), Dial.of(contract)
    cure = f"dpa export {folder.path} --out DIR writes it anew"
    if text is None:
        return Finding("bad", "template", f"no {TEMPLATE}: nothing turns a chat into a prompt", cure)
    eos = special_tokens(folder.path).eos or ""
    directions = [None, *golden.shown_directions(dial, DIRECTIONS)]
    for chat in golden.chats(dial.chat):
        for v in directions:
            preference = None if v is None else v.weights
            written = golden.render(text, chat, **({} if v is None else {"preference": preference}))
            meant = golden.expected(dial, chat, v, eos)
            if written != meant:
                where = "without a preference" if v is None else f"at {preference}"
                problem = f"{where} it writes {_short(written)}, where the model was trained on {_short(meant)}"
                return Finding("bad", "template", problem, cure)
    try:
        golden.render(text, golden.chats(dial.chat)[0], preference={contract.names[0]: 1.0, "no such": 1.0})
    except ValueError:
        takes = f"takes preference{' and angle' if len(contract.objectives) == 2 else ''}, refuses unknown names"
        return Finding("ok", "template", f"{takes}; {len(directions)} directions give the prompts of {FILE}")
    return Finding("note", "template", "takes a preference, but accepts unknown names", cure)


def _golden(folder: Folder, contract: Contract) -> Finding | None:
    """The published prompts against the template and the contract."""
    prompts, text = golden.read_golden(folder.path), template_of(folder.path)
    if not prompts or text is None:
        return None
    dial, eos = Dial.of(contract), special_tokens(folder.path).eos or ""
    for one in prompts:
        written = golden.render(text, one.messages, preference=one.preference)
        if not written == one.text == golden.expected(dial, one.messages, dial.read(one.preference), eos):
            problem = f"{golden.FILE} has {_short(one.text)}, the template writes {_short(written)}"
            return Finding("bad", "golden", problem, "export the policy again: dpa export")
    return Finding("ok", "golden", f"{len(prompts)} golden prompts, all as the template writes them")


def _turn_end(folder: Folder) -> Finding:
    """The end of a turn must be one token: the model learnt to stop at it."""
    if not (folder.path / TOKENIZER).is_file() or importlib.util.find_spec("tokenizers") is None:
        return Finding("note", "tokenizer", "not tried: it needs tokenizer.json, and the package tokenizers")
    from tokenizers import Tokenizer

    tokens = special_tokens(folder.path)
    ids = Tokenizer.from_file(str(folder.path / TOKENIZER)).encode(tokens.eos or "", add_special_tokens=False).ids
    if ids != [tokens.eos_id]:
        problem = f"{tokens.eos!r} in a prompt is not the one token {tokens.eos_id}"
        return Finding("bad", "tokenizer", problem, "repair tokenizer.json")
    return Finding("ok", "tokenizer", f"{tokens.eos!r} in a prompt is one token")


def _files(folder: Folder) -> Finding | None:
    """The files that an export lists, by their sizes."""
    sizes = read_object(folder.path / FILE).get("files")
    if not isinstance(sizes, dict):
        return None
    here = {path.relative_to(folder.path).as_posix(): path.stat().st_size for path in walk(folder.path)}
    missing = sorted(set(sizes) - set(here))
    if missing:
        return Finding("bad", "files", f"missing since the export: {listed(missing)}", FETCH)
    altered = sorted(name for name, bytes_ in sizes.items() if here[name] != bytes_)
    if own := [name for name in altered if not name.endswith(".md")]:
        return Finding("bad", "files", f"another size than exported: {listed(own)}", FETCH)
    return Finding("ok", "files", f"all {len(sizes)} as exported{', but for its card' if altered else ''}")


# --- a reward model ---


def _reward_model(folder: Folder) -> Iterator[Finding]:
    yield from _checked(folder, weights=_weights, pickles=_pickles, tokens=_tokens, labels=_labels)


def _labels(folder: Folder) -> Finding:
    """k labels, each with a name, as many as the head has rows."""
    names = label_names(folder.config)
    headers = [read_header(folder.path / file) for file in weights_files(folder.path)]
    rows = next((int(header[SCORE]["shape"][0]) for header in headers if SCORE in header), None)
    cure = "train it with dpa reward, or set id2label and problem_type in config.json"
    if not names:
        return Finding("bad", "labels", "no id2label: what the scores mean is not on record", cure)
    if rows is not None and rows != len(names):
        return Finding("bad", "labels", f"{len(names)} names for {rows} scores", cure)
    kind = folder.config.get("problem_type")
    if kind != "regression":
        text = f"problem_type is {kind!r}: servers would squeeze the scores through an activation"
        return Finding("bad", "labels", text, '"problem_type": "regression" in config.json')
    if all(name.startswith("LABEL_") for name in names):
        return Finding("note", "labels", f"{len(names)} scores without names; objectives name them by number")
    return Finding("ok", "labels", f"{len(names)}: {', '.join(names)}")


def _reward_beside(folder: Folder, contract: Contract, name: str) -> Iterator[Finding]:
    """The reward model inside an export: sound, and with the heads that the objectives read."""
    path, cure = folder.path / name, "dpa export RUN --reward"
    if not (path / CONFIG).is_file():
        yield Finding("bad", "reward", f"{FILE} names {name}/, which is not there", cure)
        return
    config = read_object(path / CONFIG)
    faults = [finding for finding in _reward_model(Folder(path, config)) if finding.level != "ok"]
    yield from (Finding(one.level, f"reward: {one.check}", one.text, one.cure) for one in faults)
    heads = label_names(config)
    lacking = [head for read in contract.objectives.values() for head in read if head not in heads]
    if lacking:
        yield Finding("bad", "reward", f"has no head {listed(lacking)}, which the objectives read", cure)
    elif all(one.level != "bad" for one in faults):
        yield Finding("ok", "reward", f"a sound reward model of {len(heads)} heads lies beside it")


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 90 else f"{shown[:40]}...{shown[-45:]}"
