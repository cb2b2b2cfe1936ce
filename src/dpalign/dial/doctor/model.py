"""Check a model's folder: is it a sound policy with a dial, or a sound reward model? No code in it is run.

Weights are read by their headers, and the chat template is rendered in Jinja's sandbox. The tokenizer is tried if the
package `tokenizers` is installed. A reward model with golden scores is loaded, to measure them again.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Final

from dpalign.dial import golden
from dpalign.dial.dial import Dial
from dpalign.dial.doctor import Finding, Level
from dpalign.dial.export.source import find_model
from dpalign.dial.verify import changed_files
from dpalign.engines.sandbox import render
from dpalign.engines.templates import find_own_chat
from dpalign.page.words import size
from dpalign.paper.direction import listed
from dpalign.paper.objectives import own_name
from dpalign.rewards.golden import FILE as GOLDEN_SCORES
from dpalign.rewards.golden import departure, read_model_golden
from dpalign.rewards.knobs import numbered
from dpalign.runs.modelfolder import (
    CONFIG,
    GENERATION,
    HEAD,
    TEMPLATE,
    TOKENIZER,
    Marks,
    check_weights,
    label_names,
    pickles_in,
    read_header,
    read_marks,
    read_object,
    special_tokens,
    template_of,
    vocabulary,
    weights_files,
)
from dpalign.train.contract import FILE, Contract, RewardRecord, read_contract

DIRECTIONS: Final = 19
"""Directions at which the template is compared with our own Python."""
LARGE: Final = 4e9
"""Bytes of weights beyond which a model is not run without a GPU."""
FETCH: Final = "export the model again, or fetch it again"


class Failure(Exception):
    """A check that fails: what is wrong, and its cure."""

    def __init__(self, text: str, cure: str = "", level: Level = "bad") -> None:
        self.text, self.cure, self.level = text, cure, level


@dataclass(frozen=True)
class Folder:
    """A model's folder with its configuration."""

    path: Path
    config: dict[str, Any]

    @property
    def generation(self) -> dict[str, Any]:
        path = self.path / GENERATION
        return read_object(path) if path.is_file() else {}

    def is_a(self, kind: str) -> bool:
        """Whether the configuration names an architecture of a kind."""
        return any(str(name).endswith(kind) for name in self.config.get("architectures") or [])


def examine(path: Path) -> Iterator[Finding]:
    """Yield the findings of one folder: a model's own, a finished stage's, a reward model's, or a run's last policy."""
    try:
        if not path.is_dir():
            raise Failure(
                f"{path}: no such folder", f"hf download {path} --local-dir FOLDER, if it is a name on the hub"
            )
        _, model, _ = find_model(path)
        folder = Folder(model, read_object(model / CONFIG))
    except Failure as failure:
        yield Finding(failure.level, "folder", failure.text, failure.cure)
    except ValueError as error:
        cure = f"name the folder of the weights; {FETCH}; or let a run finish: dpa run RECIPE"
        yield Finding("bad", "folder", str(error), cure)
    else:
        if folder.is_a("ForSequenceClassification"):
            yield from _reward_model(folder)
        elif folder.is_a("ForCausalLM"):
            yield from _policy(folder)
        else:
            names = listed(list(map(str, folder.config.get("architectures") or []))) or "no architecture"
            cure = "a policy is a ...ForCausalLM, a reward model a ...ForSequenceClassification"
            yield Finding("bad", "config", f"{CONFIG} names {names}: neither a policy nor a reward model", cure)


def _checked(folder: Folder, **checks: Callable[[Folder], str]) -> Iterator[Finding]:
    """Yield the finding of each check. A check that fails is a finding too, and the others go on.

    Args:
        checks: each returns what is sound, or an empty text; raises Failure.
    """
    for name, check in checks.items():
        try:
            text = check(folder)
        except Failure as failure:
            yield Finding(failure.level, name, failure.text, failure.cure)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            yield Finding("bad", name, reason, FETCH)
        else:
            if text:
                yield Finding("ok", name, text)


# --- any model ---


def _weights(folder: Folder) -> str:
    try:
        weights = check_weights(folder.path)
    except ValueError as error:
        cure = "save it as safetensors: save_pretrained does" if pickles_in(folder.path) else FETCH
        raise Failure(str(error), cure) from error
    files = weights.files[0] if len(weights.files) == 1 else f"{len(weights.files)} files"
    text = f"{weights.parameters:,} parameters, {'/'.join(weights.types)}, {size(weights.bytes)} in {files}, whole"
    return text + _tensors(folder)


def _tensors(folder: Folder) -> str:
    """Compare names and shapes with the configuration; return the reason if they cannot be compared."""
    if any(importlib.util.find_spec(package) is None for package in ("torch", "transformers", "accelerate")):
        return "; names not compared: it needs the extra train"
    if "auto_map" in folder.config:
        return "; names not compared: the model brings code of its own, which is not run"
    from dpalign.engines.loading import require_tensors

    try:
        require_tensors("policy" if folder.is_a("ForCausalLM") else "reward model", str(folder.path))
    except Exception as error:  # of any kind, where transformers cannot read the configuration
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise Failure(reason.removeprefix(f"{folder.path}: "), FETCH) from error
    return ""


def _pickles(folder: Folder) -> str:
    if names := pickles_in(folder.path):
        cure = f"rm {' '.join(str(folder.path / name) for name in names)}"
        raise Failure(f"{listed(names)}: files that run code when they are loaded; nothing needs them", cure)
    return ""


def _tokens(folder: Folder) -> str:
    """Special tokens must exist, agree with the configuration, and lie within the model's vocabulary."""
    tokens, config = special_tokens(folder.path), folder.config
    reward = folder.is_a("ForSequenceClassification")
    wrong: list[str] = []
    if tokens.eos is None:
        wrong.append("no eos_token, with which an answer could end")
    if (folder.path / TOKENIZER).is_file():
        ids, width = vocabulary(folder.path), int(config.get("vocab_size") or 0)
        missing = {f"{token!r}" for token in (tokens.eos, tokens.pad) if token is not None and token not in ids}
        wrong += [f"{token} is not in the vocabulary" for token in sorted(missing)]
        if max(ids.values(), default=-1) >= width:
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
    measured = (folder.path / GOLDEN_SCORES).is_file()  # golden scores show what it reads anyway
    if wrong or (pad and reward and not measured):
        raise Failure("; ".join(filter(None, [*wrong, pad])), "repair tokenizer_config.json and config.json")
    if pad:
        raise Failure(f"an answer ends with {tokens.eos!r}; {pad}", level="note")
    return f"an answer ends with {tokens.eos!r}, pad {tokens.pad!r}"


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
    prompts = Prompts(contract, template_of(folder.path), read_marks(folder.path))
    yield Finding("ok", "dial", _dial(contract))
    yield from _checked(folder, template=prompts.check, golden=prompts.check_golden, tokenizer=_turn_end, files=_files)
    if contract.reward is not None:
        yield from _reward_beside(folder, contract.reward, heads_read(contract))
    for record in contract.rewards:
        if record.folder is not None:
            yield from _reward_beside(folder, record.folder, heads_read(contract, record))


def _sampling(folder: Folder) -> str:
    settings = folder.generation
    if not settings.get("do_sample"):
        raise Failure("answers greedily by default; an export samples as it was evaluated", level="note")
    if settings.get("top_k") != 0:
        top_k = settings.get("top_k", "not set, which means 50")
        cure = f'"top_k": 0 in {folder.path / GENERATION}'
        raise Failure(f"top_k is {top_k}: fewer tokens to draw from than in training", cure, "note")
    return ""


def _dial(contract: Contract) -> str:
    dial = Dial.of(contract)
    trained = dial.trained
    text = f"{listed(contract.names)}; line {contract.template}, chat {contract.chat}"
    text += f"; trained on {trained}" if trained else "; the trained range is not on record"
    text += f"; measured at {len(contract.front)} directions" if contract.front else ""
    return text + f"; verbosity: {dial.lengths or 'not on record'}"


@dataclass(frozen=True)
class Prompts:
    """Compares a policy's chat template with our own Python."""

    contract: Contract
    template: str | None
    marks: Marks

    def form(self, folder: Folder) -> golden.Form:
        """Return what the folder's prompts depend on, as we understand it."""
        if self.contract.chat != "model":
            return golden.Form({"eos_token": "", **self.marks.named})
        place, source = self.contract.place, str(folder.path)
        own = find_own_chat(self.template, self.marks, self.contract.chat_kwargs, source)
        if own.place == "user" and place != own.place:
            text = f"{FILE} has the line in the {place}'s turn, its chat template in the {own.place}'s"
            raise Failure(text, f"dpa export {folder.path} --out DIR writes it again")
        own = replace(own, place=place or own.place)
        return golden.Form(self.marks.named, own)

    def check(self, folder: Folder) -> str:
        """Compare prompts at many directions and without one; the template must refuse unknown names."""
        dial, cure = Dial.of(self.contract), f"dpa export {folder.path} --out DIR writes it again"
        if self.template is None:
            raise Failure(f"no {TEMPLATE}: nothing turns a chat into a prompt", cure)
        form = self.form(folder)
        directions = [None, *golden.shown_directions(dial, DIRECTIONS)]
        for chat, v in product(golden.chats(dial.chat), directions):
            options: dict[str, Any] = {} if v is None else {"preference": v.weights}
            written = render(self.template, chat, **options, **form.tokens)
            meant = golden.expected(dial, chat, v, form)
            if written != meant:
                where = "without a preference" if v is None else f"at {v.weights}"
                text = f"{where} it writes {_short(written)}, where the model was trained on {_short(meant)}"
                raise Failure(text, cure)
        try:
            unknown = {self.contract.names[0]: 1.0, "no such": 1.0}
            render(self.template, golden.chats(dial.chat)[0], preference=unknown, **form.tokens)
        except ValueError:
            angle = " and angle" if len(self.contract.objectives) == 2 else ""
            right = f"{len(directions)} directions give the prompts of {FILE}"
            return f"takes preference{angle}, refuses unknown names; {right}"
        raise Failure("takes a preference, but accepts unknown names", cure, "note")

    def check_golden(self, folder: Folder) -> str:
        """Compare the published prompts with the template and the contract."""
        prompts, dial = golden.read_golden(folder.path), Dial.of(self.contract)
        if not prompts or self.template is None:
            return ""
        form = self.form(folder)
        for one in prompts:
            written = render(self.template, one.messages, preference=one.preference, **form.tokens)
            if not written == one.text == golden.expected(dial, one.messages, dial.read(one.preference), form):
                text = f"{golden.FILE} has {_short(one.text)}, the template writes {_short(written)}"
                raise Failure(text, "export the policy again: dpa export")
        return f"{len(prompts)} golden prompts, all as the template writes them"


def _turn_end(folder: Folder) -> str:
    """The end of a turn must be one token: the model learnt to stop at it."""
    if not (folder.path / TOKENIZER).is_file() or importlib.util.find_spec("tokenizers") is None:
        raise Failure("not tried: it needs tokenizer.json, and the package tokenizers", level="note")
    from tokenizers import Tokenizer

    known, tokenizer = vocabulary(folder.path), Tokenizer.from_file(str(folder.path / TOKENIZER))
    contract, stops = read_contract(folder.path), _ids(folder.generation.get("eos_token_id"))
    ends = list(dict.fromkeys([*(contract.stop if contract else ()), special_tokens(folder.path).eos or ""]))
    for end in ends:
        if tokenizer.encode(end, add_special_tokens=False).ids != [known.get(end)]:
            raise Failure(f"{end!r} in a prompt is not the one token {known.get(end)}", "repair tokenizer.json")
        if stops and known[end] not in stops:
            cure = f'"eos_token_id" in {folder.path / GENERATION}'
            raise Failure(f"an answer ends with {end!r}, at which {GENERATION} does not stop", cure)
    return f"{listed([repr(end) for end in ends])} in a prompt is one token"


def _files(folder: Folder) -> str:
    """Compare an export's files with their recorded sizes and digests. An altered card is no fault."""
    sizes = read_object(folder.path / FILE).get("files")
    if not isinstance(sizes, dict):
        return ""
    changed = list(changed_files(folder.path))
    for what in ("missing", "altered"):
        names = [fault.file.relative_to(folder.path).as_posix() for fault in changed if fault.what == what]
        if own := [name for name in names if what == "missing" or not name.endswith(".md")]:
            raise Failure(f"{what} since the export: {listed(own)}", FETCH)
    return f"all {len(sizes)} as exported{', except its card' if changed else ''}"


# --- a reward model ---


def _reward_model(folder: Folder) -> Iterator[Finding]:
    yield from _checked(
        folder, weights=_weights, pickles=_pickles, tokens=_tokens, labels=_labels,
        template=_reward_template, scores=_scores,
    )  # fmt: skip


def _reward_template(folder: Folder) -> str:
    """The template must write what the model read when its golden scores were measured."""
    measured, template = read_model_golden(folder.path), template_of(folder.path)
    if measured is None or measured.template is None:  # a model's own template is tried with its scores
        return ""
    bos = special_tokens(folder.path).bos
    for one in measured.scores:
        written = render(template or "", one.messages, False, bos_token=bos or "")
        if written != one.text:
            text = f"{TEMPLATE} writes {_short(written)}, where the model was scored on {_short(one.text)}"
            raise Failure(text, "dpa export RUN --reward writes it again")
    return f"its chat template writes the input of {len(measured.scores)} golden scores"


def _scores(folder: Folder) -> str:
    """Measure the golden scores again as a user would: through the folder's own chat template."""
    measured = read_model_golden(folder.path)
    if measured is None:
        return ""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        raise Failure("golden scores not measured again: it needs torch and transformers", level="note")
    import torch

    weights = check_weights(folder.path)
    if weights.bytes > LARGE and not torch.cuda.is_available():
        raise Failure(f"golden scores not measured again: {size(weights.bytes)} without a GPU", level="note")
    from dpalign.rewards.score import ModelScorer

    heads = list(measured.scores[0].scores)
    scorer = ModelScorer(str(folder.path), heads, template="chat", batch_tokens=4096, dtype=measured.dtype)
    if difference := departure(measured, scorer, measured.dtype):
        raise Failure(difference, FETCH)
    return f"{len(measured.scores)} golden scores measured again"


def _labels(folder: Folder) -> str:
    """Require a named label for each row of the head, and the problem type regression."""
    names = label_names(folder.config)
    headers = [read_header(folder.path / file) for file in weights_files(folder.path)]
    rows = next((header[HEAD][1][0] for header in headers if HEAD in header), None)
    cure = "train it with dpa reward, or set id2label and problem_type in config.json"
    if not names:
        raise Failure("no id2label: what the scores mean is not on record", cure)
    if rows is not None and rows != len(names):
        raise Failure(f"{len(names)} names for {rows} scores", cure)
    if (kind := folder.config.get("problem_type")) != "regression":
        text = f"problem_type is {kind!r}: servers would squeeze the scores through an activation"
        raise Failure(text, '"problem_type": "regression" in config.json')
    if all(name.startswith("LABEL_") for name in names):
        raise Failure(f"{len(names)} scores without names; objectives name them by number", level="note")
    return f"{len(names)}: {', '.join(names)}"


def heads_read(contract: Contract, record: RewardRecord | None = None) -> list[str]:
    """Return the heads of a reward that objectives read, by its own names; without a record, of the only reward."""
    read = dict.fromkeys(head for heads in contract.objectives.values() for head in heads)
    if record is None:
        return list(read)
    return [own_name(head) for head in read if head.partition("/")[0] == record.name]


def _reward_beside(folder: Folder, name: str, read: Sequence[str]) -> Iterator[Finding]:
    """Check a reward model inside an export: is it sound, and has it the heads that the objectives read?"""
    path, cure = folder.path / name, "dpa export RUN --reward"
    if not (path / CONFIG).is_file():
        yield Finding("bad", "reward", f"{FILE} names {name}/, which is not there", cure)
        return
    config = read_object(path / CONFIG)
    unsound = [finding for finding in _reward_model(Folder(path, config)) if finding.level != "ok"]
    yield from (Finding(one.level, f"reward: {one.check}", one.text, one.cure) for one in unsound)
    heads = label_names(config)
    lacking = [] if numbered(heads) else [head for head in read if head not in heads]
    if lacking:
        yield Finding("bad", "reward", f"has no head {listed(lacking)}, which the objectives read", cure)
    elif all(one.level != "bad" for one in unsound):
        golden_scores = "" if read_model_golden(path) is None else ", as its golden scores say"
        yield Finding("ok", "reward", f"a sound reward model of {max(1, len(heads))} heads in {name}/{golden_scores}")


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 90 else f"{shown[:40]}...{shown[-45:]}"
