"""A model's folder: whether it is a sound policy with a dial, or a sound reward model. Nothing in it is run.

Its template is rendered in Jinja's sandbox, its weights are read by their headers, its tokenizer is asked where the
package `tokenizers` is installed.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dpalign.contract import FILE, Contract, read_contract
from dpalign.doctor.findings import Finding
from dpalign.modelfolder import (
    CONFIG,
    GENERATION,
    TEMPLATE,
    TOKENIZER,
    check_weights,
    pickles_in,
    read_header,
    read_object,
    special_tokens,
    template_of,
    vocabulary,
    walk,
    weights_files,
)
from dpalign.preference import Preference
from dpalign.report.words import degrees, listed, number, size
from dpalign.serving import golden
from dpalign.serving.dial import Dial
from dpalign.serving.source import policy_of

DIRECTIONS: Final = 19
"""At which the template is held against our own Python."""
SCORE: Final = "score.weight"
"""A classifier's head, of shape (labels, width)."""


@dataclass(frozen=True)
class Folder:
    """A model's folder with its configuration."""

    path: Path
    config: dict[str, Any]


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
        yield from _reward_model(folder)
    elif any(kind.endswith("ForCausalLM") for kind in kinds):
        yield from _policy(folder)
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
        if (named / "recipe.toml").is_file() and not (named / CONFIG).is_file():
            named = policy_of(named, None)
    except ValueError as error:
        return Finding("bad", "folder", str(error), "let the run finish: dpa run RECIPE")
    folder = named / "model" if (named / "model").is_dir() else named
    if (folder / CONFIG).is_file():
        return folder
    if (folder / "adapter_config.json").is_file():
        return Finding("bad", "folder", f"{folder}: an adapter without its model", "merge it: peft's merge_and_unload")
    return Finding("bad", "folder", f"{folder}: no {CONFIG}: not a model's folder", "name the folder with the weights")


def _policy(folder: Folder) -> Iterator[Finding]:
    yield from _checked(folder, _weights, _pickles, _tokens, _sampling)
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
    yield from _checked(folder, *(_with(contract, check) for check in (_template, _golden, _lengths, _manifest)))
    if contract.reward is not None:
        yield from _reward_beside(folder, contract)


def _with(
    contract: Contract, check: Callable[[Folder, Contract], Finding | None]
) -> Callable[[Folder], Finding | None]:
    return lambda folder: check(folder, contract)


def _reward_model(folder: Folder) -> Iterator[Finding]:
    yield from _checked(folder, _weights, _pickles, _tokens, _labels)


def _checked(folder: Folder, *checks: Callable[[Folder], Finding | None]) -> Iterator[Finding]:
    """What each check says; a damaged file is a finding, and the others are looked at all the same."""
    for check in checks:
        try:
            finding = check(folder)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            finding = Finding("bad", "files", said, "fetch or write the folder again")
        if finding is not None:
            yield finding


def _weights(folder: Folder) -> Finding:
    try:
        found = check_weights(folder.path)
    except ValueError as error:
        mend = "save it as safetensors: save_pretrained does" if pickles_in(folder.path) else "fetch or write it again"
        return Finding("bad", "weights", str(error), mend)
    files = found.files[0] if len(found.files) == 1 else f"{len(found.files)} files"
    said = f"{found.parameters:,} parameters, {'/'.join(found.types)}, {size(found.bytes)} in {files}, whole"
    return Finding("ok", "weights", said)


def _pickles(folder: Folder) -> Finding | None:
    names = pickles_in(folder.path)
    if not names:
        return None
    return Finding(
        "bad",
        "pickles",
        f"{listed(names)}: files that run code when they are loaded; nothing needs them",
        f"rm {' '.join(str(folder.path / name) for name in names)}",
    )


def _tokens(folder: Folder) -> Finding:
    """Special tokens that are there, agree with the configuration, and lie within the model's vocabulary."""
    tokens, config = special_tokens(folder.path), folder.config
    reward = "id2label" in config and any("Classification" in str(one) for one in config["architectures"])
    wrong: list[str] = []
    remarks: list[str] = []
    if tokens.eos is None:
        wrong.append("no eos_token, with which an answer could end")
    if (folder.path / TOKENIZER).is_file():
        ids = vocabulary(folder.path)
        for what, token in (("eos", tokens.eos), ("pad", tokens.pad)):
            if token is not None and token not in ids:
                wrong.append(f"{what}_token {token!r} is not in the vocabulary")
        if ids and max(ids.values()) >= int(config.get("vocab_size") or 0):
            wrong.append(f"token {max(ids.values())} for a model of {config.get('vocab_size')} tokens")
    ends = _ids(config.get("eos_token_id")) | _ids(_generation(folder).get("eos_token_id"))
    if tokens.eos_id is not None and ends and tokens.eos_id not in ends:
        wrong.append(f"eos_token is token {tokens.eos_id}, but the model stops at {sorted(ends)}")
    if tokens.pad is None:
        (wrong if reward else remarks).append("no pad_token: answers can be drawn one at a time only")
    elif tokens.pad == tokens.eos:
        same = "pad_token is the eos_token"
        (wrong if reward else remarks).append(
            f"{same}: the score is read at the last token that is no pad"
            if reward
            else f"{same}: fine to ask, not to train"
        )
    if reward and tokens.pad_id is not None and config.get("pad_token_id") != tokens.pad_id:
        wrong.append(f"pad_token is token {tokens.pad_id}, but pad_token_id is {config.get('pad_token_id')}")
    if wrong:
        return Finding("bad", "tokens", "; ".join(wrong), "mend tokenizer_config.json and config.json")
    said = f"an answer ends with {tokens.eos!r}" if not reward else "eos and pad differ, as scoring needs it"
    if remarks:
        return Finding("note", "tokens", "; ".join([said, *remarks]))
    return Finding("ok", "tokens", f"{said}, pad is {tokens.pad!r}")


def _ids(said: object) -> set[int]:
    return set(said) if isinstance(said, list) else {said} if isinstance(said, int) else set()


def _generation(folder: Folder) -> dict[str, Any]:
    path = folder.path / GENERATION
    return read_object(path) if path.is_file() else {}


def _sampling(folder: Folder) -> Finding | None:
    settings = _generation(folder)
    if settings.get("do_sample") and settings.get("top_k") != 0:
        said = (
            f"top_k is {settings.get('top_k', 'not set, which means 50')}: fewer tokens to draw from than in training"
        )
        return Finding("note", "sampling", said, f'"top_k": 0 in {folder.path / GENERATION}')
    if not settings.get("do_sample"):
        said = "answers greedily unless it is told to sample (an export says how it was evaluated)"
        return Finding("note", "sampling", said)
    return None


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
        golden.render(text, golden.chats(dial.chat)[0], preference={"no such objective": 1.0})
    except ValueError:
        said = f"takes preference{' and angle' if len(contract.objectives) == 2 else ''}, refuses unknown names"
        return Finding("ok", "template", f"{said}; {len(asked)} directions give the prompts of {FILE}")
    return Finding("note", "template", "takes a preference, but lets unknown names pass in silence", mend)


def _golden(folder: Folder, contract: Contract) -> Finding | None:
    prompts, text = golden.read_golden(folder.path), template_of(folder.path)
    if not prompts or text is None:
        return None
    for one in prompts:
        found = golden.render(text, one.messages, preference=one.preference)
        if found != one.text:
            said = f"{golden.FILE} has {_short(one.text)}, the template writes {_short(found)}"
            return Finding("bad", "golden prompts", said, "export the policy again: dpa export")
    return Finding("ok", "golden prompts", f"{len(prompts)}, all as the template writes them")


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


def _manifest(folder: Folder, contract: Contract) -> Finding | None:
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


def _labels(folder: Folder) -> Finding:
    """k labels, each with a name, as many as the head has rows."""
    names = _label_names(folder.config)
    rows = _score_rows(folder.path)
    mend = "train it with dpa reward, or set id2label and problem_type in config.json"
    if not names:
        return Finding("bad", "labels", "no id2label: what the scores mean is not on record", mend)
    if rows is not None and rows != len(names):
        return Finding("bad", "labels", f"{len(names)} names for {rows} scores", mend)
    kind = folder.config.get("problem_type")
    if kind != "regression":
        said = f"problem_type is {kind!r}: servers would squeeze the scores through an activation"
        return Finding("bad", "labels", said, '"problem_type": "regression" in config.json')
    if all(name.startswith("LABEL_") for name in names):
        return Finding(
            "note", "labels", f"{len(names)} scores without names of their own; objectives name them by index"
        )
    return Finding("ok", "labels", f"{len(names)}: {', '.join(names)}")


def _label_names(config: dict[str, Any]) -> list[str]:
    named = config.get("id2label") or {}
    return [str(named[key]) for key in sorted(named, key=int)]


def _score_rows(folder: Path) -> int | None:
    for file in weights_files(folder):
        header = read_header(folder / file)
        if SCORE in header:
            return int(header[SCORE]["shape"][0])
    return None


def _reward_beside(folder: Folder, contract: Contract) -> Iterator[Finding]:
    """The reward model inside an export: sound, and with the heads that the objectives read."""
    path = folder.path / str(contract.reward)
    if not (path / CONFIG).is_file():
        yield Finding("bad", "reward", f"{FILE} names {path.name}/, which is not there", "dpa export RUN --reward")
        return
    found: Sequence[Finding] = list(_reward_model(Folder(path, read_object(path / CONFIG))))
    for finding in found:
        if finding.level != "ok":
            yield Finding(finding.level, f"reward: {finding.what}", finding.said, finding.mend)
    heads = _label_names(read_object(path / CONFIG))
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
