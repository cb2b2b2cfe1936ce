"""The door from Python: a policy is loaded, its dial is turned, and a recipe is run, as the command line does it."""

import asyncio
import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="a model here needs the extra dpalign[train]")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpalign
import tiny
from conftest import MICRO
from dpalign import Policy, run
from dpalign.chat import chat_template
from dpalign.dial.chat.speakers import Ask
from dpalign.engines.knobs import WORLD_BASE
from dpalign.paper.direction import Arc, Preference
from dpalign.recipe import Recipe, load
from dpalign.rewards.score import ModelScorer
from dpalign.rows import HEADS, Message, user_prompt
from dpalign.train.contract import Contract, write_contract

NAMES = ("helpfulness", "verbosity")
OBJECTIVES = {"helpfulness": ("ultrafeedback-helpfulness",), "verbosity": ("helpsteer-verbosity",)}
CONTRACT = Contract("world-v1", "world-v1", OBJECTIVES, HEADS, Arc(-45.0, 0.0), reward_template="world-v1")
DOCS = Path(__file__).parents[1] / "docs"
QUESTION = "explain fox, tea and iron."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy with a dial and no reward model."""
    tokens = tiny.tokenizer()
    tokens.chat_template = chat_template("world-v1", "world-v1", NAMES)
    path = tiny.write_model(tmp_path_factory.mktemp("door") / "mine", tokens, tied=False, scale=0.4)
    write_contract(path, CONTRACT)
    return path


@pytest.fixture(scope="module")
def policy(folder: Path, micro_run: Path) -> Iterator[Policy]:
    """That policy, with a reward model from elsewhere."""
    with Policy.load(folder, reward=micro_run / "reward", rows=16) as policy:
        yield policy


def rewards_of(micro_run: Path, question: str, answer: str) -> dict[str, float]:
    """What that reward model itself says, by objective."""
    model = str(micro_run / "reward" / "model")
    scorer = ModelScorer(model, HEADS, template="world-v1", batch_tokens=512, dtype="float32")
    of_head = dict(zip(scorer.heads, scorer.score([(user_prompt(question), answer)])[0], strict=True))
    return {name: pytest.approx(of_head[head], abs=2e-3) for name, (head,) in OBJECTIVES.items()}


# What is drawn


def test_greedy_answers_are_those_of_transformers_own_generate(policy: Policy, folder: Path) -> None:
    tokens, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    for angle in (0, -45):
        (answer,) = policy.sample(QUESTION, angle=angle, temperature=0, max_new_tokens=20)
        text = tokens.apply_chat_template(
            user_prompt(QUESTION), tokenize=False, add_generation_prompt=True, angle=float(angle)
        )
        prompt = tokens(text, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**prompt, do_sample=False, max_new_tokens=20)[0, prompt["input_ids"].shape[1] :]
        assert answer.text == tokens.decode(ids, skip_special_tokens=True).lstrip()
        assert (answer.tokens, answer.finished) == (len(ids), ids[-1] == tokens.eos_token_id)


def test_an_answer_is_that_of_the_chat_and_the_seed_decides_it(policy: Policy) -> None:
    first, second = policy.sample(QUESTION, angle=-30, n=2, seed=3, max_new_tokens=12)
    assert first.text != second.text
    asked = Ask(user_prompt(QUESTION), Preference.from_angle(-30, NAMES), 0.7, 3, 12)
    assert "".join(piece.text for piece in policy._speaker.stream(asked)) == first.text
    again = policy.sample(QUESTION, angle=-30, n=2, seed=3, max_new_tokens=12)
    assert again == [first, second]
    assert policy.sample(QUESTION, angle=-30, n=2, seed=4, max_new_tokens=12) != again


def test_each_of_several_prompts_is_answered_as_alone(policy: Policy) -> None:
    chat: list[Message] = [*user_prompt("name owl."), {"role": "assistant", "content": "owl."}, *user_prompt("more.")]
    prompts = [QUESTION, "name owl.", chat]
    together = policy.sample(prompts, angle=-10, n=3, max_new_tokens=9)
    assert together == [policy.sample(prompt, angle=-10, n=3, max_new_tokens=9) for prompt in prompts]
    assert [len(answers) for answers in together] == [3, 3, 3]
    many = policy.sample([f"name owl {i}." for i in range(40)], n=2, max_new_tokens=2)
    assert [len(answers) for answers in many] == [2] * 40
    assert policy.sample([]) == []


def test_a_direction_has_one_meaning_in_every_form(policy: Policy) -> None:
    forms = [
        {"angle": -45},
        {"preference": {"helpfulness": 2, "verbosity": -2}},
        {"preference": "helpfulness*0.5 - verbosity*0.5"},
        {"preference": "-45"},
        {"preference": Preference.from_angle(-45, NAMES)},
    ]
    drawn = [policy.sample(QUESTION, max_new_tokens=9, **form)[0] for form in forms]
    assert len({answer.text for answer in drawn}) == 1
    assert all(answer.direction.angle == pytest.approx(-45) for answer in drawn)
    (plain,) = policy.sample(QUESTION, max_new_tokens=9)
    assert plain.direction is None
    assert plain.text != drawn[0].text


def test_rewards_read_the_objectives_heads_and_best_of_takes_the_best(policy: Policy, micro_run: Path) -> None:
    short, long = policy.score(QUESTION, ["fox is red.", "fox is red and hunts mice."])
    assert short == rewards_of(micro_run, QUESTION, "fox is red.")
    assert short != long
    (drawn,) = policy.sample(QUESTION, angle=-45, max_new_tokens=24)
    assert drawn.rewards == rewards_of(micro_run, QUESTION, drawn.text)
    best = policy.best_of(QUESTION, 8, angle=-45, spread=20, max_new_tokens=24, temperature=1.0)
    assert best.rewards == pytest.approx(policy.score(QUESTION, [best.text])[0], abs=2e-3)
    assert best.choice is not None
    assert best.choice.drawn == 8
    assert best.choice.value >= best.choice.mean_value
    assert best.direction == Preference.from_angle(-45, NAMES)


def test_choices_between_answers_find_a_direction_and_what_to_compare_next(policy: Policy) -> None:
    asked = policy.taste([]).next
    assert asked is not None
    a, b = (policy.sample(QUESTION, preference=v, max_new_tokens=24)[0] for v in asked)
    long, short = (replace(a, rewards={"helpfulness": 60.0, "verbosity": v}) for v in (70.0, 20.0))
    own = policy.taste([(short, long)] * 3)
    assert own.direction.angle < policy.taste([(long, short)] * 3).direction.angle
    assert own.within < policy.taste([]).within
    assert policy.sample(QUESTION, preference=own.direction, max_new_tokens=4)[0].direction == own.direction
    assert policy.taste([(a, b)]).within > 0
    with pytest.raises(ValueError, match=r"choice 1: .* no rewards"):
        policy.taste([(a, b), (a, replace(b, rewards=None))])


def test_a_policy_says_what_it_is(policy: Policy) -> None:
    assert (policy.name, policy.objectives, policy.arc, policy.front) == ("mine", NAMES, (-45.0, 0.0), ())
    assert repr(policy) == "Policy('mine': helpfulness, verbosity, -45 to 0 degrees)"


def test_a_direction_outside_the_trained_range_is_warned_of_where_it_was_asked_for(policy: Policy) -> None:
    with pytest.warns(UserWarning, match=r"-80 degrees .* outside the directions") as caught:
        policy.sample([QUESTION, "name owl."], angle=-80, max_new_tokens=2)
    assert [Path(warning.filename) for warning in caught] == [Path(__file__)]


def test_a_running_event_loop_such_as_a_notebooks_is_no_hindrance(policy: Policy) -> None:
    async def cell() -> str:
        return policy.sample(QUESTION, angle=0, max_new_tokens=5)[0].text

    assert asyncio.run(cell()) == policy.sample(QUESTION, angle=0, max_new_tokens=5)[0].text


# What is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": 0}, "n is 0: 1 to 16"),
        ({"n": 17}, "n is 17: .* load with rows=17"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": 3.0}, "temperature: .* 2"),
        ({"angle": 0, "preference": "-30"}, "give one"),
        ({"preference": "kindness=1"}, "unknown objective 'kindness'.*known: helpfulness, verbosity"),
        ({"preference": {"verbosity": 0}}, "zero"),
        ({"angle": float("nan")}, "nan"),
    ],
)
def test_a_bad_number_or_direction_is_refused_with_its_value(
    policy: Policy, options: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        policy.sample(QUESTION, **options)  # type: ignore[call-overload]


def test_a_bad_chat_is_refused_and_the_policy_goes_on(policy: Policy) -> None:
    ends: list[Message] = [*user_prompt("name owl."), {"role": "assistant", "content": "owl."}]
    with pytest.raises(ValueError, match="end with the user's"):
        policy.sample(ends)
    with pytest.raises(ValueError, match=r"the prompt is .* tokens long"):
        policy.sample([QUESTION, "name owl. " * 200])
    with pytest.raises(ValueError, match="give a list"):
        policy.score(QUESTION, "fox is red.")
    with pytest.raises(ValueError, match="best_of ranks answers by a direction"):
        policy.best_of(QUESTION, 4)
    with pytest.raises(ValueError, match="best_of 17: at most 16"):
        policy.best_of(QUESTION, 17, angle=0)
    assert len(policy.sample(QUESTION, max_new_tokens=3)) == 1


def test_a_model_without_a_dial_answers_plainly_and_takes_no_direction(tiny_folder: Path, tmp_path: Path) -> None:
    with Policy.load(tiny_folder) as plain:
        assert (plain.objectives, plain.arc) == ((), None)
        assert plain.sample("name owl.", max_new_tokens=4)[0].rewards is None
        with pytest.raises(ValueError, match=r"takes no directions: no dpa\.json"):
            plain.sample("name owl.", angle=0)
        with pytest.raises(ValueError, match=r"without a reward model.*reward="):
            plain.score("name owl.", ["owl."])
    with pytest.raises(ValueError, match="is closed; load it again"):
        plain.sample("name owl.")
    with pytest.raises(ValueError, match=r"no config\.json here"):
        Policy.load(tmp_path)


# Its life


def test_a_policy_that_nobody_refers_to_lets_go_of_its_model(folder: Path) -> None:
    policy = Policy.load(folder)
    thread = policy._speaker.thread
    policy.sample(QUESTION, max_new_tokens=2)
    del policy
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_script_that_closes_nothing_says_nothing_of_its_own_and_ends(folder: Path) -> None:
    script = f"import dpalign; p = dpalign.Policy.load({str(folder)!r}); print(len(p.sample('name owl.', n=2)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")


def test_the_package_names_what_it_offers() -> None:
    assert [name for name in dpalign.__all__ if not callable(getattr(dpalign, name))] == []
    assert set(dpalign.__all__) <= set(dir(dpalign))
    with pytest.raises(AttributeError, match="no attribute 'Polcy'"):
        _ = dpalign.Polcy


# A run


def test_a_finished_run_is_gone_through_again_and_gives_its_policy_and_its_figures(
    micro_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(micro_run, tmp_path / "micro")
    result = run(MICRO, tmp_path / "micro", quiet=True)
    assert capfd.readouterr() == ("", "")
    assert result.page.is_file()
    measured = result.summary.of_role("iteration")[-1]
    policy = result.policy
    assert result.policy is policy
    front = {point.direction.angle: point.rewards["verbosity"] for point in policy.front}
    assert len(front) == len(measured.points) == 4
    assert policy.arc == (-45.0, 0.0)
    (answer,) = policy.sample(QUESTION, angle=-45)
    assert answer.rewards["verbosity"] == rewards_of(micro_run, QUESTION, answer.text)["verbosity"]
    policy.close()
    with Policy.load(tmp_path / "micro" / "policy-1", reward=False) as first:
        assert first.sample(QUESTION, angle=-45)[0].rewards is None


def test_overrides_are_laid_over_the_recipe_and_a_run_may_stop_early(tmp_path: Path) -> None:
    few = {"helpsteer_prompts": 5, "ultrafeedback_prompts": 7, "sft_prompts": 3, "tuning_prompts": 2}
    result = run("micro", tmp_path / "run", until="world", seed=7, world=few, **{"sampling.n": 3})
    kept = load(tmp_path / "run" / "recipe.toml")
    assert (kept.seed, kept.world.helpsteer_prompts, kept.world.test_prompts, kept.sampling.n) == (7, 5, 6, 3)
    assert (result.folder / "world" / "ledger.json").is_file()
    with pytest.raises(ValueError, match="no report yet"):
        _ = result.summary
    with pytest.raises(ValueError, match="no finished policy"):
        _ = result.policy
    with pytest.raises(ValueError, match=r"unknown key sampling\.m; the nearest is sampling\.n"):
        run("micro", tmp_path / "other", sampling={"m": 3})
    with pytest.raises(ValueError, match=r"sampling\.n is 0"):
        run(Recipe(name="paper"), tmp_path / "other", **{"sampling.n": 0})
    with pytest.raises(ValueError, match=r"micro\.toml with --sampling\.n=0: sampling\.n is 0"):
        run("micro", tmp_path / "other", sampling={"n": 0})
    assert not (tmp_path / "other").exists()


# vLLM


@pytest.mark.vllm
def test_greedy_answers_are_the_same_through_vllm(tmp_path: Path, micro_run: Path) -> None:
    """The world's base model with a dial: vLLM reads no narrower heads than its 32."""
    folder = tmp_path / "mine"
    tokens = AutoTokenizer.from_pretrained(WORLD_BASE)
    tokens.chat_template = chat_template("world-v1", "world-v1", NAMES)
    tokens.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(WORLD_BASE, dtype="float32").save_pretrained(folder)
    write_contract(folder, CONTRACT)
    prompts = [QUESTION, "describe owl and moon.", "name bell."]
    asked = {"temperature": 0, "max_new_tokens": 24, "n": 2}
    drawn = []
    for engine in ("transformers", "vllm"):
        options = {} if engine == "transformers" else {"max_model_len": 384}
        with Policy.load(folder, reward=micro_run / "reward", engine=engine, **options) as policy:
            drawn.append([policy.sample(prompts, angle=angle, **asked) for angle in (0, -45)])
            seeded = [policy.sample(prompts, angle=-30, n=3, seed=5, max_new_tokens=24) for _ in range(2)]
            assert seeded[0] == seeded[1]
            assert policy.best_of(QUESTION, 4, angle=-30).choice is not None
    assert drawn[0] == drawn[1]


# The notebook


def test_the_notebooks_cells_run_and_what_it_keeps_tells_nothing_of_the_machine(
    micro_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sys.path.append(str(DOCS))
    try:
        import notebook
    finally:
        sys.path.remove(str(DOCS))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(micro_run, tmp_path / "runs" / "micro")
    text = notebook.NOTEBOOK.read_text(encoding="utf-8")
    names: dict[str, object] = {}
    kinds = []
    for count, cell in enumerate(notebook.code_cells(json.loads(text)), start=1):
        outputs = notebook.execute("".join(cell["source"]).replace('"demo"', '"micro"'), names)
        kept = [output["output_type"] for output in cell["outputs"]]
        assert kept == [output["output_type"] for output in outputs], cell["source"]
        assert cell["execution_count"] == count
        kinds += kept
    assert {"stream", "execute_result", "display_data"} == set(kinds)
    assert [place for place in ("/tmp", "/home", "/root", "/work", "site-packages") if place in text] == []
    assert len(text) < 200_000
