"""Write an export: the checkpoint's own files, and what the dial needs beside them.

The folder appears whole or not at all. It replaces an earlier export, and nothing else.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from dpalign import __version__
from dpalign.chat import chat_template
from dpalign.dial import TEMPERATURE, golden
from dpalign.dial.dial import Dial
from dpalign.dial.export.card_figures import PICTURE, front_of, picture_of
from dpalign.dial.export.source import Card, Source, hub_name
from dpalign.dial.export.verbosity import lengths_of
from dpalign.engines.sandbox import render
from dpalign.engines.templates import find_own_chat
from dpalign.paper.prompts import RewardInput
from dpalign.rewards.golden import ONLY, GoldenModel, write_model_golden
from dpalign.rewards.inputs import reward_chat_template
from dpalign.runs.errors import naming
from dpalign.runs.ledger import FileHashes, into_place, scratch_of, sha256_of, sync, write_json, write_text
from dpalign.runs.lock import hold
from dpalign.runs.modelfolder import (
    CONFIG,
    GENERATION,
    INDEX,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_SETTINGS,
    SpecialTokens,
    check_weights,
    read_marks,
    read_object,
    require_kind,
    require_unpickled,
    special_tokens,
    template_of,
    vocabulary,
    walk,
    weights_files,
)
from dpalign.runs.verify import require_intact, stage_at
from dpalign.train.contract import DIGESTS, FILE, Contract, RewardRecord

CARD: Final = "README.md"
REWARD: Final = "reward"
COPIED: Final = (
    *(CONFIG, INDEX, TOKENIZER, TOKENIZER_SETTINGS, "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"),
)
"""Files that serving needs beside the weights. training_args.bin is a pickle and stays behind."""
LONGEST: Final = 2048
"""Tokens per answer without a recipe, as in the released policy."""


def export(source: Source, out: Path, card: Card, *, with_reward: bool) -> list[str]:
    """Write the folder; return the names of the checkpoint's files that stayed behind.

    Raises:
        ValueError: pickled or damaged weights, no tokenizer, a place that is taken or in use by another export, or a
            file that is not as its stage wrote it.
    """
    require_free(out)
    require_safe(source.model)
    hashes, rewards = FileHashes(), source.rewards.values() if with_reward else ()
    for stage in (*source.stages, *filter(None, map(stage_at, rewards))):
        require_intact(stage, hashes)
    out.parent.mkdir(parents=True, exist_ok=True)
    place = scratch_of(out, "lock")
    lock = hold(out, place)
    try:
        return _export(source, out, card, with_reward=with_reward)
    finally:
        place.unlink(missing_ok=True)
        os.close(lock)


def _export(source: Source, out: Path, card: Card, *, with_reward: bool) -> list[str]:
    """Write the folder while no other export works on this place."""
    require_free(out)
    partial = scratch_of(out, "partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(scratch_of(out, "old"), ignore_errors=True)
    partial.mkdir()
    try:
        form = _copy_policy(source, partial)
        contract = replace(
            source.contract,
            eos=form.tokens["eos_token"],
            front=front_of(source),
            place=None if form.own is None else form.own.place,
            stop=tuple(_ends(source, form)),
            verbosity=lengths_of(source),
        )
        if with_reward:
            contract = _copy_rewards(source, contract, partial)
        contract = replace(contract, rewards=tuple(map(_published, contract.rewards)))
        prompts = golden.golden_prompts(Dial.of(contract), form)
        golden.write_golden(partial, prompts)
        _check(partial, prompts, form)
        write_card(partial, replace(source, contract=contract), card, prompts)
        files = {path.relative_to(partial).as_posix(): path.stat().st_size for path in walk(partial)}
        digests = {name: sha256_of(partial / name) for name in files}
        written = {"dpalign": __version__, "files": files, DIGESTS: digests}
        write_json(partial / FILE, contract.to_json() | written)
        into_place(out, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    names = {path.name for path in source.model.iterdir() if path.is_file()}
    return sorted(names - set(files) - {FILE, "ledger.json", "checkpoint.txt"})


def require_free(out: Path) -> None:
    """Raise ValueError unless the place is free, or holds an export without changes since."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"--out {out}: a file; name a folder")
    try:
        files = read_object(out / FILE)["files"] if (out / FILE).is_file() else None
    except (ValueError, KeyError):
        files = None
    if not isinstance(files, dict):
        raise ValueError(f"--out {out}: stands already, and is no export; name another place")
    for path in walk(out):
        name = path.relative_to(out).as_posix()
        if name != FILE and files.get(name) != path.stat().st_size:
            raise ValueError(f"--out {out}: {name} was added or changed since it was exported; name another place")


def require_safe(model: Path) -> None:
    """Raise ValueError unless a folder holds whole safetensors of a causal model, with a tokenizer."""
    require_unpickled(model)
    check_weights(model)
    architectures = read_object(model / CONFIG).get("architectures") or []
    if not any(str(name).endswith("ForCausalLM") for name in architectures):
        raise ValueError(f"{model / CONFIG}: architectures {architectures}; a policy is a ...ForCausalLM")
    if not any((model / name).is_file() for name in (TOKENIZER, "tokenizer.model", "vocab.json")):
        raise ValueError(f"{model}: no tokenizer; put the model's own files beside its weights")


def write_card(folder: Path, source: Source, card: Card, prompts: Sequence[golden.Golden]) -> None:
    """Write the model card, and the picture of the front if one was measured."""
    from dpalign.dial.export.card import card_text

    picture = picture_of(source)
    if picture is not None:
        (folder / PICTURE).write_bytes(picture)
    write_text(folder / CARD, card_text(folder, source, card, prompts, PICTURE if picture is not None else None))


def _copy_policy(source: Source, out: Path) -> golden.Form:
    """Copy weights and tokenizer as they are; write our own template and the settings that must fit it."""
    model = source.model
    _copy(model, out)
    tokens = special_tokens(model)
    if tokens.eos is None:
        raise ValueError(f"{model / TOKENIZER_SETTINGS}: names no eos_token, with which an answer could end")
    contract, own = source.contract, None
    if contract.chat == "model":
        own = find_own_chat(template_of(model), read_marks(model), contract.chat_kwargs, str(model), contract.place)
        template = own.template(contract.template, contract.names, contract.levels)
    else:
        template = chat_template(
            contract.chat, contract.template, contract.names, eos=tokens.eos, levels=contract.levels
        )
    write_text(out / TEMPLATE, template)
    config = read_object(out / CONFIG)
    settings = read_object(out / TOKENIZER_SETTINGS) if (out / TOKENIZER_SETTINGS).is_file() else {}
    for table in (config, settings):
        table.pop("auto_map", None)  # it names code that is not copied
    settings.pop("chat_template", None)
    config.pop("_name_or_path", None)
    if tokens.pad is None:
        settings["pad_token"] = settings.get("unk_token") or tokens.eos
    write_json(out / TOKENIZER_SETTINGS, settings)
    tokens = special_tokens(out)
    if config.get("pad_token_id") is None:
        config["pad_token_id"] = tokens.pad_id
    write_json(out / CONFIG, config)
    form = golden.Form(read_marks(out).named, own)
    write_json(out / GENERATION, _generation(source, config, tokens, _end_ids(out, _ends(source, form))))
    return form


def _ends(source: Source, form: golden.Form) -> Iterable[str]:
    """The tokens that end an answer, the chat template's own first."""
    stop = () if form.own is None else (form.own.stop,)
    return dict.fromkeys([*stop, *source.contract.stop, form.tokens["eos_token"]])


def _end_ids(folder: Path, ends: Iterable[str]) -> list[int]:
    ids = vocabulary(folder) if (folder / TOKENIZER).is_file() else {}
    return [ids[token] for token in ends if token in ids]


def _generation(
    source: Source, config: dict[str, Any], tokens: SpecialTokens, own_ends: Sequence[int]
) -> dict[str, Any]:
    """Return the default sampling: as the policy was evaluated, from the whole distribution."""
    path, recipe = source.model / GENERATION, source.recipe
    settings = read_object(path) if path.is_file() else {}
    settings.pop("_from_model_config", None)  # with it, transformers would derive the settings from the config
    ends = settings.get("eos_token_id", config.get("eos_token_id"))
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    listed = [*(end for end in own_ends if end not in listed), *listed]
    return settings | {
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_id": listed[0] if len(listed) == 1 else listed,
        "pad_token_id": tokens.pad_id if tokens.pad_id is not None else config.get("pad_token_id"),
        "do_sample": True,
        "temperature": TEMPERATURE if recipe is None else recipe.evaluation.temperature,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": LONGEST if recipe is None else recipe.sampling.max_new_tokens,
    }


def _copy_rewards(source: Source, contract: Contract, out: Path) -> Contract:
    """Copy the reward models: one to `reward`, several to `reward/NAME`; return the contract with these folders."""
    several = len(source.rewards) > 1
    folders = {name: f"{REWARD}/{name}" if several else REWARD for name in source.rewards}
    records = {record.name: record for record in contract.rewards}
    for name, model in source.rewards.items():
        form = records[name].input if name in records else contract.reward_template
        _copy_reward(model, out / folders[name], form, source.golden_scores.get(name))
    if not records:
        return replace(contract, reward=folders.get(ONLY))
    told = (replace(record, folder=folders.get(name)) for name, record in records.items())
    return replace(contract, rewards=tuple(told))


def _published(record: RewardRecord) -> RewardRecord:
    """Reduce a local folder in the record to its name."""
    own = record.kind == "model" and hub_name(record.source) is None
    return replace(record, source=Path(record.source).name) if own else record


def _copy_reward(model: Path, out: Path, form: RewardInput | None, scores: GoldenModel | None) -> None:
    """Copy a reward model with a chat template that writes what it reads, and its golden scores if the run has some."""
    config = read_object(model / CONFIG)
    require_kind(config, "reward model", model)
    if not config.get("id2label") and not config.get("num_labels"):
        raise ValueError(f"{model / CONFIG}: no labels; a reward model is a classifier with a label a head")
    check_weights(model)
    out.mkdir(parents=True)
    _copy(model, out, TEMPLATE)
    config.pop("auto_map", None)  # it names code that is not copied
    write_json(out / CONFIG, config | {"problem_type": "regression"})  # or servers put the scores through an activation
    if form is not None and form != "chat":
        written = scores.template if scores is not None else None
        write_text(out / TEMPLATE, written or reward_chat_template(form, _opening(model)))
        if (out / TOKENIZER_SETTINGS).is_file():
            settings = read_object(out / TOKENIZER_SETTINGS)
            settings.pop("chat_template", None)
            write_json(out / TOKENIZER_SETTINGS, settings)
    if scores is not None:
        write_model_golden(out, scores)


def _opening(model: Path) -> str:
    """Return the template's first line: the start of text, if the tokenizer adds it to any text by itself."""
    if not (model / TOKENIZER).is_file():
        return ""
    tokenizer = read_object(model / TOKENIZER)
    after = tokenizer.get("post_processor") or {}
    processors = after.get("processors") or [after]
    single: list[Any] = next((one["single"] for one in processors if one.get("type") == "TemplateProcessing"), [])
    return "{{- bos_token -}}\n" if single and "SpecialToken" in single[0] else ""


def _copy(model: Path, out: Path, *more: str) -> None:
    """Copy the needed files and flush them to disk."""
    for name in _needed(model, more):
        with naming(out / name):
            shutil.copyfile(model / name, out / name)
            sync(out / name)


def _needed(model: Path, more: Sequence[str]) -> Iterator[str]:
    yield from weights_files(model)
    yield from (name for name in (*COPIED, *more) if (model / name).is_file())


def _check(folder: Path, prompts: Sequence[golden.Golden], form: golden.Form) -> None:
    """Assert that the template writes the golden prompts; a failure is a fault of this module."""
    check_weights(folder)
    template = (folder / TEMPLATE).read_text(encoding="utf-8")
    for one in prompts:
        assert render(template, one.messages, preference=one.preference, **form.tokens) == one.text, one
        if one.angle is not None:
            assert render(template, one.messages, angle=one.angle, **form.tokens) == one.text, one
