"""`dpa export`: a folder that plain transformers steers, with its card; and what is refused."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpalign import cli
from dpalign.dial import golden
from dpalign.dial.dial import Dial
from dpalign.dial.doctor.model import examine
from dpalign.dial.export import folder
from dpalign.dial.export.source import find_folders, find_model, find_source
from dpalign.dial.export.verbosity import calibrated, lengths_of
from dpalign.dial.rewards import open_scorer
from dpalign.dial.server.engine import Rewards
from dpalign.paper.direction import Preference, Sphere, draw_directions, rng_for
from dpalign.pipeline.shipped import recipe_file
from dpalign.recipe import load
from dpalign.rows import CANDIDATES, HEADS, Message, read_rows, write_rows
from dpalign.runs.ledger import LEDGER, hash_of, output_files, scratch_of, sha256_of
from dpalign.runs.modelfolder import check_weights, special_tokens
from dpalign.train.contract import read_contract

TWO = ("helpfulness", "verbosity")
THREE = ("helpfulness", "verbosity", "wit")

PLAIN_TRANSFORMERS = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer

for folder, cases, refusals in json.load(open(sys.argv[1])):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for messages, asked, text in cases:
        found = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **asked)
        assert found == text, (asked, found, text)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **asked)
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"], asked
    for asked, said in refusals:
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, **asked)
        except Exception as error:
            assert said in str(error), (asked, str(error))
        else:
            raise SystemExit(f"{asked} was not refused")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    config = model.generation_config
    assert (config.do_sample, config.temperature, config.top_k, config.top_p) == (True, 0.7, 0, 1.0), config
    assert config.eos_token_id == tokenizer.eos_token_id, config
assert "dpalign" not in sys.modules
"""


def export(source: Path, out: Path, *words: str) -> Path:
    cli.main(["export", str(source), "--out", str(out), *words])
    return out


def refused(capsys: pytest.CaptureFixture[str], source: Path, out: Path, *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        export(source, out, *words)
    assert ended.value.code == 2
    return capsys.readouterr().err


def alone(code: list[str], folder: Path) -> str:
    """What a Python prints that has none of our sources on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *code], cwd=folder, env=environment, check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture(scope="module")
def from_run(micro_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last policy of a whole run, with its reward model."""
    return export(micro_run, tmp_path_factory.mktemp("from-run") / "mine", "--reward", "--license", "mit")


@pytest.fixture(scope="module")
def of_three(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of which nothing is known but what the command line tells."""
    told = ("--template", "dpa-v1", "--objectives", *THREE)
    return export(tiny_folder, tmp_path_factory.mktemp("of-three") / "three", *told)


def chats() -> list[list[Message]]:
    return [
        [{"role": "user", "content": "explain tea.\nPlease </s> <|user|>"}],
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": "Moi."},
            {"role": "user", "content": ""},
        ],
    ]


def cases(folder: Path, asked: list[dict[str, Any]]) -> list[Any]:
    """(messages, what is asked, what our own Python says is the prompt)."""
    dial, eos = Dial.load(folder), special_tokens(folder).eos
    assert eos is not None
    found = []
    for i, one in enumerate(asked):
        chat = chats()[i % 2]
        found.append([chat, one, golden.expected(dial, chat, dial.read(**one), golden.Form({"eos_token": eos}))])
    return found


def test_plain_transformers_reads_the_same_prompt_token_for_token(
    from_run: Path, of_three: Path, tmp_path: Path
) -> None:
    angles = [*range(-180, 181, 9), *np.linspace(-45, 0, 40).tolist(), 1000.5, -30.000001]
    v_VK = draw_directions(Sphere(3), 60, rng_for("export"))
    weights = [dict(zip(THREE, (v_K * 7).tolist(), strict=True)) for v_K in v_VK]
    two = [{"angle": angle} for angle in angles]
    two += [{"preference": Preference.from_angle(angle, TWO).weights} for angle in angles]
    two += [{}, {"preference": None}, {"preference": {"verbosity": -3}}, {"preference": {"helpfulness": 1e-300}}]
    known = "helpfulness, verbosity"
    refusals = [
        [{"preference": {"wit": 1}}, f"unknown objective 'wit' (known: {known})"],
        [{"preference": {"helpfulness": 0}}, known],
        [{"preference": {"helpfulness": float("nan")}}, "give a finite number"],
        [{"preference": {"helpfulness": "much"}}, "give a finite number"],
        [{"preference": "helpfulness"}, known],
        [{"angle": "-30"}, "give a finite number of degrees"],
        [{"angle": -30, "preference": {"helpfulness": 1}}, "not both"],
    ]
    three = [{"preference": one} for one in weights]
    no_angle = [[{"angle": -30}, "helpfulness, verbosity, wit"]]
    told = [
        [str(from_run), cases(from_run, two), refusals],
        [str(of_three), cases(of_three, three), no_angle],
    ]
    (tmp_path / "told.json").write_text(json.dumps(told))
    (tmp_path / "check.py").write_text(PLAIN_TRANSFORMERS)
    alone(["check.py", "told.json"], tmp_path)


def test_what_the_card_says_to_type_works(from_run: Path) -> None:
    code = re.search(r"```python\n(from transformers.*?)```", (from_run / "README.md").read_text(), re.DOTALL)
    assert code is not None
    alone(["-c", code[1].replace(".generate(**prompt)", ".generate(**prompt, max_new_tokens=3)")], from_run.parent)


def test_the_folder_holds_what_is_needed_and_no_more(from_run: Path, micro_run: Path) -> None:
    files = {path.relative_to(from_run).as_posix() for path in from_run.rglob("*") if path.is_file()}
    model = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    ours = {"generation_config.json", "dpa.json", "golden_prompts.json", "README.md", "front.png"}
    assert files == model | ours | {f"reward/{name}" for name in model | {"golden_scores.json"}}
    trained = micro_run / "policy-2" / "model" / "model.safetensors"
    assert (from_run / "model.safetensors").read_bytes() == trained.read_bytes()
    assert (from_run / "front.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not (from_run.parent / "mine.partial").exists()


def test_the_contract_of_an_export_tells_the_measured_front(from_run: Path, micro_run: Path) -> None:
    said = json.loads((from_run / "dpa.json").read_text())
    summary = json.loads((micro_run / "report" / "summary.json").read_text())
    points = summary["systems"]["DPA t=2"]["points"]
    assert [point["angle"] for point in said["front"]] == pytest.approx([p["angle"] for p in points], abs=1e-4)
    assert [point["rewards"]["verbosity"] for point in said["front"]] == [
        p["rewards"]["verbosity"]["value"] for p in points
    ]
    assert (said["eos"], said["stop"], said["iteration"], said["reward"]) == ("</s>", ["</s>"], 2, "reward")
    assert said["reward_template"] == "world-v1"
    assert len(Dial.load(from_run).front) == len(points)
    sizes = {p.relative_to(from_run).as_posix(): p.stat().st_size for p in from_run.rglob("*") if p.is_file()}
    assert said["files"] == {name: size for name, size in sizes.items() if name != "dpa.json"}


def test_the_card_has_a_header_a_hub_can_read_and_the_figures_of_the_report(from_run: Path, of_three: Path) -> None:
    yaml = pytest.importorskip("yaml")
    card, plain = ((folder / "README.md").read_text() for folder in (from_run, of_three))
    header = yaml.safe_load(card.split("---\n")[1])
    assert (header["license"], header["library_name"]) == ("mit", "transformers")
    assert "base_model" not in header  # the world's is on no hub
    assert "license" not in yaml.safe_load(plain.split("---\n")[1])
    for fact in ("**DPA t=2**", "| 0\u00b0 |", "helpsteer.jsonl", "finetune.batch", "(front.png)", "```text"):
        assert fact in card
    for absent in ("angle=", "front.png", "Traceback"):
        assert absent not in plain
    for text in (card, plain):
        assert "{{" not in text
        assert "None" not in text


def test_a_card_of_the_world_shows_questions_with_the_policys_own_answers(from_run: Path, micro_run: Path) -> None:
    rows = list(read_rows(micro_run / "evaluate-policy-2" / "answers", CANDIDATES))
    questions = list(dict.fromkeys(row["messages"][-1]["content"] for row in rows))
    card = (from_run / "README.md").read_text()
    assert f"| {questions[0]} | 0\u00b0 | {rows[0]['response']} |" in card
    assert card.count(f'"content": "{questions[0]}"') == 3  # transformers, vLLM and an OpenAI client


def test_a_card_names_no_folder_of_the_machine_it_was_made_on(from_run: Path, micro_run: Path) -> None:
    from dpalign.dial.export.card import changed_knobs
    from dpalign.recipe import load

    assert str(micro_run) not in (from_run / "README.md").read_text()
    overrides = ["--data.helpsteer", "/home/me/secret/h.jsonl", "--model.base", "~/m/x"]
    given = load(recipe_file("world"), overrides)
    lines = changed_knobs(given)
    assert 'data.helpsteer "nvidia/HelpSteer" -> "h.jsonl"' in lines
    assert any(line.startswith("model.base") and line.endswith('-> "x"') for line in lines)


def test_golden_prompts_are_what_the_template_writes(from_run: Path) -> None:
    prompts = golden.read_golden(from_run)
    template = (from_run / "chat_template.jinja").read_text()
    assert len(prompts) == 8
    assert [one.angle for one in prompts[:4]] == [None, 0.0, -22.5, -45.0]
    assert prompts[2].text == "<|system|>helpfulness*92 verbosity*-38<|user|>explain tea and iron.<|assistant|>"
    for one in prompts:
        assert golden.render(template, one.messages, preference=one.preference) == one.text
    with pytest.raises(ValueError, match="the chat template says: preference names an unknown objective 'wit'"):
        golden.render(template, chats()[0], preference={"wit": 1})


def test_an_iteration_of_a_run_can_be_chosen(
    micro_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = export(micro_run, tmp_path / "first", "--iteration", "1", "--name", "me/mine", "--base-model", "org/base")
    assert json.loads((first / "dpa.json").read_text())["iteration"] == 1
    card = (first / "README.md").read_text()
    for fact in ("Iteration 1 of 2", "base_model: org/base", 'LLM("me/mine")', "**DPA t=1**"):
        assert fact in card
    assert not (first / "reward").exists()
    by_stage = export(micro_run / "policy-1", tmp_path / "stage", "--name", "me/mine", "--base-model", "org/base")
    assert (by_stage / "README.md").read_bytes() == (first / "README.md").read_bytes()
    said = refused(capsys, micro_run, tmp_path / "none", "--iteration", "0")
    assert "no finished policy of iteration 0; finished: 1, 2" in said
    said = refused(capsys, micro_run / "policy-1", tmp_path / "none", "--iteration", "1")
    assert "is no run folder" in said


def test_the_card_says_what_trained_the_policy_at_each_iteration(micro_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(micro_run, tmp_path / "run"))
    (run / "recipe.toml").write_text(load(run / "recipe.toml", ["--policy.method", '["rsf", "grpo"]']).to_toml())
    rows = re.findall(
        r"^\| (\d) \| `(\w+)` \| (.+) \|$", (export(run, tmp_path / "mine") / "README.md").read_text(), re.M
    )
    assert [row[:2] for row in rows] == [("1", "rsf"), ("2", "grpo")]
    assert rows[0][2] != rows[1][2]


def test_a_report_of_an_earlier_policy_is_not_taken_for_this_ones(
    micro_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    kept = ("policy-2", "evaluate-policy-2", "report")
    for name in kept:
        shutil.copytree(micro_run / name, run / name)
    shutil.copy(micro_run / "recipe.toml", run)
    path = run / "evaluate-policy-2" / "ledger.json"
    path.write_text(path.read_text().replace(json.loads(path.read_text())["inputs"]["policy"]["digest"], "0" * 64))
    refused(capsys, run, tmp_path / "out")  # a ledger at odds with itself is damaged, not merely old
    shutil.rmtree(run / "evaluate-policy-2")
    out = export(run, tmp_path / "out")
    assert "note: the run has no evaluate-policy-2: the export has no measured front" in capsys.readouterr().out
    assert "front" not in json.loads((out / "dpa.json").read_text())
    assert not (out / "front.png").exists()


def listed_anew(stage: Path) -> None:
    """Let a stage's ledger name the files that it now has."""
    told = json.loads((stage / LEDGER).read_text())
    outputs = {file: sha256_of(stage / file) for file in output_files(stage)}
    told |= {"outputs": outputs, "sizes": {file: (stage / file).stat().st_size for file in outputs}}
    (stage / LEDGER).write_text(json.dumps(told | {"digest": hash_of(outputs)}))


WORDS = {0.0: 40, -15.0: 30, -30.0: 32, -45.0: 10}
"""Of an answer at each angle, for the test below."""


def test_verbosity_is_an_angle_at_which_the_policys_own_answers_have_a_length(micro_run: Path, tmp_path: Path) -> None:
    """From 10 words to 40: a tenth of the way is 13 words, half 25, nine tenths 37."""
    run = tmp_path / "run"
    for name in ("policy-2", "evaluate-policy-2", "report"):
        shutil.copytree(micro_run / name, run / name)
    shutil.copy(micro_run / "recipe.toml", run)
    answers = run / "evaluate-policy-2" / "answers"
    rows = [
        row | {"condition": Preference.from_angle(angle, TWO).v, "response": " ".join(["tea"] * (words + more))}
        for row in list(read_rows(answers, CANDIDATES))[:2]
        for angle, words in WORDS.items()
        for more in (-1, 1)
    ]
    shutil.rmtree(answers)
    write_rows(answers / "part-00000.parquet", rows, CANDIDATES)
    listed_anew(answers.parent)
    out = export(run, tmp_path / "out")
    # 13 and 25 words lie between -45 (10) and -30 degrees (32); the dip at -15 counts as 32; 37 lies before 0 (40)
    low, medium, high = -45 + 15 * 3 / 22, -45 + 15 * 15 / 22, -15 + 15 * 5 / 8
    said = json.loads((out / "dpa.json").read_text())["verbosity"]
    assert said == {
        "low": {"angle": round(low, 1), "words": 13.0},
        "medium": {"angle": round(medium, 1), "words": 25.0},
        "high": {"angle": round(high, 1), "words": 37.0},
    }
    assert Dial.load(out).read(verbosity="high") == Preference.from_angle(round(high, 1), TWO)
    assert "(13 words), medium" in (out / "README.md").read_text()
    found = {finding.check: finding.text for finding in examine(out)}
    assert "verbosity: low" in found["dial"]
    # a run that is served without an export says the same; one without its evaluation says nothing
    assert lengths_of(find_source(run)) == read_contract(out).verbosity
    shutil.rmtree(run / "evaluate-policy-2")
    assert "verbosity" not in json.loads((export(run, tmp_path / "bare") / "dpa.json").read_text())
    assert "verbosity: not on record" in {one.check: one.text for one in examine(tmp_path / "bare")}["dial"]


def test_levels_of_verbosity_follow_the_length_wherever_the_dial_turns() -> None:
    angle_V = np.array([-60.0, -30.0, 0.0])
    rising = calibrated(angle_V, np.array([10.0, 20.0, 110.0]))
    assert [(one.angle, one.words) for one in rising.values()] == [(-30.0, 20.0), (-16.7, 60.0), (-3.3, 100.0)]
    falling = calibrated(angle_V, np.array([110.0, 20.0, 10.0]))
    assert [(one.angle, one.words) for one in falling.values()] == [(-30.0, 20.0), (-43.3, 60.0), (-56.7, 100.0)]
    assert calibrated(angle_V, np.array([100.0, 110.0, 124.0])) == {}  # less than a quarter longer
    assert calibrated(angle_V[:1], np.array([100.0])) == {}
    assert calibrated(angle_V, np.zeros(3)) == {}


def test_a_released_checkpoint_is_exported_by_its_name(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = export(tiny_folder, tmp_path / "released", "--form", "RLHFlow/DPA-v1-Mistral-7B")
    dial = Dial.load(out)
    assert (dial.template, dial.chat, dial.arc, dial.objectives) == ("dpa-v1", "zephyr", (-45.0, 0.0), TWO)
    text = golden.render((out / "chat_template.jinja").read_text(), chats()[0][:1], angle=-15)
    assert "weighted rating = helpfulness*97 + verbosity*-26</s>\n<|user|>\n" in text
    assert "RLHFlow/RewardModel-Mistral-7B-for-DPA-v1" in (out / "README.md").read_text()
    said = refused(capsys, Path("RLHFlow/DPA-v1-Mistral-7B"), tmp_path / "o")
    assert "hf download RLHFlow/DPA-v1-Mistral-7B --local-dir FOLDER" in said


def test_a_checkpoint_without_a_contract_needs_to_be_told_its_form(
    tiny_folder: Path, from_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for source, words, said in (
        (tiny_folder, (), "say what the policy was trained to read, with --template, --objectives and --range"),
        (tiny_folder, ("--form", "me/mine"), "known: RLHFlow/DPA-v1-Mistral-7B"),
        (tiny_folder, ("--template", "dpa-v1"), "needs --objectives"),
        (tiny_folder, ("--range", "-45", "0"), "--range: goes with --template"),
        (tiny_folder, ("--template", "dpa-v1", "--objectives", "help me"), "objective 'help me'"),
        (tiny_folder, ("--template", "dpa-v1", "--objectives", *THREE, "--range", "-45", "0"), "directions of 2 objec"),
        (tiny_folder, ("--template", "dpa-v1", "--objectives", *TWO, "--range", "0", "-45"), "low < high"),
        (tiny_folder, ("--template", "dpa-v1", "--objectives", *TWO, "--reward"), "no finished reward model"),
        (from_run, ("--template", "dpa-v1", "--objectives", *TWO), "says what its directions mean already"),
        (tmp_path / "nowhere", (), "no such folder"),
        (tiny_folder, ("--sampling.n", "3"), "takes no knobs"),
    ):
        assert said in refused(capsys, source, out, *words)
        assert not out.exists()
    told = export(tiny_folder, out, "--template", "fig1", "--objectives", *TWO, "--range", "-45", "0")
    assert Dial.load(told).arc == (-45.0, 0.0)


def test_a_reward_model_beside_such_a_checkpoint_must_be_told_which_heads_are_read(
    tiny_folder: Path, from_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = ("--template", "fig1", "--reward-model", str(from_run / "reward"), "--objectives")
    said = refused(capsys, tiny_folder, tmp_path / "out", *reward, *TWO)
    assert "nobody said which reward heads 'helpfulness' reads; give --objectives helpfulness=HEAD,..." in said
    said = refused(
        capsys, tiny_folder, tmp_path / "out", *reward, "helpfulness=kindness", "verbosity=helpsteer-verbosity"
    )
    assert "reads head 'kindness', which this reward model lacks" in said
    read = ("helpfulness=helpsteer-helpfulness,9", "verbosity=helpsteer-verbosity", "--reward-template", "world-v1")
    told = read_contract(export(tiny_folder, tmp_path / "out", *reward, *read))
    assert told is not None
    assert told.objectives == {"helpfulness": ("helpsteer-helpfulness", "9"), "verbosity": ("helpsteer-verbosity",)}
    assert (told.heads, told.reward, told.reward_template) == (HEADS, "reward", "world-v1")
    scorer = open_scorer(tmp_path / "out", told, dtype="auto")
    assert scorer is not None
    reward_NK = asyncio.run(Rewards(scorer, told).score([{"role": "user", "content": "explain tea."}], ["tea warms."]))
    assert reward_NK.shape == (1, 2)


def damaged(folder: Path, change: Callable[[Path], object], tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    change(copy)
    return copy


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def classifier(folder: Path) -> None:
    (folder / "config.json").write_text('{"architectures": ["MistralForSequenceClassification"]}')


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (pickled, "pytorch_model.bin: pickled weights, which run code when they are loaded"),
        (cut, "model.safetensors: "),
        (classifier, "a policy is a ...ForCausalLM"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda folder: (folder / "config.json").unlink(), "no folder with config.json"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{}"), "names no eos_token"),
    ],
)
def test_weights_that_are_no_whole_safetensors_policy_are_refused(
    change: Callable[[Path], object],
    said: str,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = damaged(tiny_folder, change, tmp_path)
    assert said in refused(capsys, model, tmp_path / "out", "--form", "RLHFlow/DPA-v1-Mistral-7B")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_the_trainers_leavings_stay_behind_and_are_named(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(folder: Path) -> None:
        (folder / "training_args.bin").write_bytes(b"pickle")
        (folder / "modeling_x.py").write_text("evil()")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_x.X"}}))

    model = damaged(tiny_folder, leave, tmp_path)
    out = export(model, tmp_path / "out", "--form", "RLHFlow/DPA-v1-Mistral-7B")
    assert "note: left behind: modeling_x.py, training_args.bin" in capsys.readouterr().out
    assert not list(out.rglob("*.bin"))
    assert not list(out.rglob("*.py"))
    assert "auto_map" not in json.loads((out / "config.json").read_text())


def test_divided_weights_go_along_whole(tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    def divide(folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="40KB")

    model = damaged(tiny_folder, divide, tmp_path)
    out = export(model, tmp_path / "out", "--form", "RLHFlow/DPA-v1-Mistral-7B")
    assert len(check_weights(out).files) > 1
    assert check_weights(out) == check_weights(model)
    AutoModelForCausalLM.from_pretrained(out)


def test_an_export_takes_only_the_place_of_an_unchanged_export(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    form = ("--form", "RLHFlow/DPA-v1-Mistral-7B")
    out = export(tiny_folder, tmp_path / "out", *form)
    export(tiny_folder, out, *form, "--license", "mit")
    assert "license: mit" in (out / "README.md").read_text()
    (out / "mine.txt").write_text("keep me")
    assert "mine.txt was added or changed since it was exported" in refused(capsys, tiny_folder, out, *form)
    (out / "mine.txt").unlink()
    (out / "README.md").write_text("my own words")
    assert "README.md was added or changed" in refused(capsys, tiny_folder, out, *form)
    assert (out / "README.md").read_text() == "my own words"
    (tmp_path / "other").mkdir()
    assert "stands already, and is no export" in refused(capsys, tiny_folder, tmp_path / "other", *form)
    assert "stands already, and is no export" in refused(capsys, tiny_folder, tiny_folder, *form)
    (tmp_path / "file").write_text("")
    assert "a file; name a folder" in refused(capsys, tiny_folder, tmp_path / "file", *form)


def test_an_export_deletes_nothing_that_a_user_calls_like_its_scratch(tiny_folder: Path, tmp_path: Path) -> None:
    mine = [tmp_path / name / "notes.txt" for name in ("model.old", "model.v2.old", "model.v2.partial", ".model.v2")]
    for path in mine:
        path.parent.mkdir()
        path.write_text(path.parent.name)
    for _ in range(2):  # the second time an earlier export is replaced
        export(tiny_folder, tmp_path / "model.v2", "--form", "RLHFlow/DPA-v1-Mistral-7B")
    assert [path.read_text() for path in mine] == [path.parent.name for path in mine]
    assert {path.name for path in tmp_path.iterdir()} == {"model.v2", *(path.parent.name for path in mine)}


def test_a_second_export_into_the_same_place_at_once_is_refused(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, form = tmp_path / "out", ("--form", "RLHFlow/DPA-v1-Mistral-7B")
    write_card, refusals = folder.write_card, list[str]()

    def meanwhile(*given: Any) -> None:
        if not refusals:
            refusals.append("")
            refusals.append(refused(capsys, tiny_folder, out, *form))
        write_card(*given)

    monkeypatch.setattr(folder, "write_card", meanwhile)
    export(tiny_folder, out, *form)
    assert f"dpa: {out}: two runs into one folder: process {os.getpid()} on " in refusals[1]
    assert examine(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    export(tiny_folder, out, *form)  # and the place is free again


def test_what_a_killed_export_left_is_replaced(tiny_folder: Path, tmp_path: Path) -> None:
    left = scratch_of(tmp_path / "out", "partial")
    left.mkdir()
    (left / "half.safetensors").write_text("half")
    out = export(tiny_folder, tmp_path / "out", "--form", "RLHFlow/DPA-v1-Mistral-7B")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / "half.safetensors").exists()


def test_an_export_that_is_interrupted_leaves_nothing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "write_card", interrupt)
    with pytest.raises(SystemExit):
        export(tiny_folder, tmp_path / "out", "--form", "RLHFlow/DPA-v1-Mistral-7B")
    assert list(tmp_path.iterdir()) == []


def test_a_run_its_stage_and_the_folder_in_it_are_opened_as_one_model_under_three_names(tmp_path: Path) -> None:
    run = tmp_path / "world"
    for t in (1, 2):
        (run / f"policy-{t}" / "model").mkdir(parents=True)
        (run / f"policy-{t}" / LEDGER).write_text("{}")
        (run / f"policy-{t}" / "model" / "config.json").write_text("{}")
    (run / "recipe.toml").write_text("")
    model = run / "policy-2" / "model"
    assert find_model(run) == ("world", model, model)
    assert find_model(run / "policy-2") == find_model(model) == ("policy-2", model, model)
    with pytest.raises(ValueError, match=r"no config\.json here"):
        find_model(tmp_path)
    with pytest.raises(ValueError, match="no finished policy of iteration 3; finished: 1, 2"):
        find_folders(run, 3)
