"""Several rewards as one: which tables may stand, what their heads are called, and how raw rewards become points."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, MistralForSequenceClassification

from conftest import MICRO
from dpalign.paper.objectives import PAPER_OBJECTIVES
from dpalign.pipeline.steps import STAGES, steps
from dpalign.recipe import Recipe, from_mapping, load
from dpalign.recipe.localfiles import require_models
from dpalign.rewards.knobs import RewardTable
from dpalign.rewards.scale import fit, fitted_scales, read_scales, to_points, write_scales
from dpalign.rewards.score import CombinedScorer, FunctionScorer, ModelScorer, Pair
from dpalign.rows import HEADS, PROMPTS, Message, prompt_id, user_prompt, write_rows
from dpalign.stages.score import Asked, open_scorer, scales_of

WORLD = {"model": {"chat": "world-v1", "dtype": "float32"}}
TEMPLATE = """\
{%- for message in messages -%}
  {%- if message["role"] == "system" and not loop.first -%}{{- raise_exception("system first") -}}{%- endif -%}
  {{- bos_token ~ message["role"] ~ ": " ~ message["content"] | trim ~ eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "assistant: " -}}{%- endif -%}
"""
"""A chat template of a model's own, unlike any of ours."""
NO_SYSTEM = TEMPLATE.replace("and not loop.first", "")
"""One that refuses the system's role."""


def length(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def two(prompts: list[str], responses: list[str]) -> np.ndarray:
    return np.array([[len(p), len(r)] for p, r in zip(prompts, responses, strict=True)], dtype=float).reshape(-1, 2)


def breaks_at_owl(prompts: list[str], responses: list[str]) -> list[float]:
    return [1 / (0 if "owl" in response else 1) for response in responses]


def no_number_at_owl(prompts: list[str], responses: list[str]) -> list[float]:
    return [float("nan") if "owl" in response else 1.0 for response in responses]


def recipe_of(rewards: dict[str, Any], **more: Any) -> Recipe:
    return from_mapping(Recipe, {"name": "test", "rewards": rewards, "preference": {"low": -45}} | WORLD | more)


def refused(rewards: dict[str, Any], **more: Any) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        recipe_of(rewards, **more)
    return str(error.value)


def write_chat_model(start: Path, folder: Path, template: str = TEMPLATE, heads: int = 1) -> Path:
    """A random classifier that only numbers its heads, with a chat template of its own."""
    config = AutoConfig.from_pretrained(start)
    config.update({"num_labels": heads, "id2label": {i: f"LABEL_{i}" for i in range(heads)}})
    torch.manual_seed(1)
    MistralForSequenceClassification(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat_model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tiny_folder, tmp_path_factory.mktemp("chat") / "model")


# Which tables may stand


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({}, "[rewards.a] gives nothing to score with; give exactly one of model, function and trained = true"),
        ({"model": "m", "function": "m:f"}, "[rewards.a] gives model and function; give exactly one"),
        ({"function": "m.f"}, "function is 'm.f'; write it as module:function"),
        ({"function": "m:f", "scale": [0, 1]}, "scale is [0.0, 1.0]; give [slope, offset], the slope not 0"),
        ({"function": "m:f", "scale": [1]}, "scale is [1.0]; give [slope, offset]"),
        ({"function": "m:f", "scale": [float("inf"), 0]}, "rewards.a.scale[0] must be a finite number, got inf"),
        ({"function": "m:f", "scale": [1, float("nan")]}, "rewards.a.scale[1] must be a finite number, got nan"),
        ({"function": "m:f", "heads": ["x", "x"]}, "heads names 'x' twice"),
        ({"function": "m:f", "heads": ["x/y"]}, "a head's name is not empty and has no '/'"),
        ({"trained": True, "heads": ["x"]}, "name a trained model's heads in the recipe's own `heads`"),
        ({"modle": "m"}, "unknown key rewards.a.modle; the nearest is rewards.a.model"),
        ({"model": "m", "input": "poem"}, 'rewards.a.input must be one of "chat", "dpa-v1", "world-v1"'),
    ],
)
def test_a_table_that_cannot_stand_is_refused_by_its_name(table: dict[str, Any], words: str) -> None:
    assert words in refused({"a": table, "b": {"function": "m:f"}})


def test_the_old_knob_is_answered_with_the_new_form() -> None:
    with pytest.raises(ValueError, match=r"reward\.checkpoint is gone: .*\n\[rewards\.mine\]\nmodel = "):
        from_mapping(Recipe, {"name": "x", "reward": {"checkpoint": "some/model"}})


def test_only_one_reward_is_trained() -> None:
    assert "rewards a and b say trained = true" in refused({"a": {"trained": True}, "b": {"trained": True}})


# Heads and objectives


def test_each_reward_with_one_head_is_an_objective() -> None:
    recipe = recipe_of({"good": {"model": "some/model"}, "short": {"function": "m:f"}})
    assert recipe.scored_heads == ("good/score", "short/score")
    assert recipe.objectives == {"good": ("good/score",), "short": ("short/score",)}
    assert not recipe.trains_reward
    assert recipe.fits_scales
    assert "rewards have 3 heads (good/score, two/x, two/y)" in refused(
        {"good": {"model": "some/model"}, "two": {"function": "m:f", "heads": ["x", "y"]}}
    )


def test_a_head_may_be_called_by_its_own_name_or_by_its_reward() -> None:
    rewards = {"good": {"model": "some/model", "heads": ["help", "style"]}, "short": {"function": "m:f"}}
    objectives = {"a": ["help"], "b": ["short"], "c": ["good/style"]}
    recipe = recipe_of(rewards, objectives=objectives, preference={"distribution": "simplex"})
    assert [recipe.heads_read(o) for o in recipe.objective_list] == [("good/help",), ("short/score",), ("good/style",)]
    two_of_a_name = {"good": {"function": "m:f"}, "bad": {"function": "m:g"}}
    said = refused(two_of_a_name, objectives={"a": ["score"], "b": ["bad"]})
    assert "several go by that name; write one of good/score, bad/score" in said


def test_the_authors_reward_model_needs_its_name_and_form_alone() -> None:
    released = {"model": "RLHFlow/RewardModel-Mistral-7B-for-DPA-v1", "input": "dpa-v1"}
    recipe = from_mapping(Recipe, {"name": "x", "rewards": {"dpa": released}})  # the paper's objectives, its directions
    assert recipe.scored_heads == tuple(f"dpa/{head}" for head in HEADS)
    assert recipe.objectives == {o.name: o.heads for o in PAPER_OBJECTIVES}
    assert recipe.heads_read(recipe.objective_list[1]) == ("dpa/helpsteer-verbosity",)
    assert scales_of(recipe, None) == [(1.0, 0.0)] * 10


def test_a_judge_has_the_heads_that_the_data_label() -> None:
    said = refused({"good": {"model": "m"}, "short": {"function": "m:f"}}, data={"judge": 0.1})
    assert "objective 'good' reads head 'score'" in said
    assert "set data.judge = 0" in said


def test_what_is_trained_reads_no_function_and_no_scale() -> None:
    """An edit of a function or a scale redoes scores, and never the training of a reward model."""
    recipe = recipe_of({"good": {"trained": True}, "short": {"function": "test_rewards:length"}},
                       objectives={"help": ["helpsteer-helpfulness"], "short": ["short"]})  # fmt: skip
    for stage in ("reward", "judge", "data"):
        knobs = STAGES[stage].knobs(recipe)
        assert knobs["rewards.good.trained"] is True
        assert not {"rewards.short.function", "rewards.short.scale"} & set(knobs)
    assert STAGES["score"].knobs(recipe)["rewards.short.function"] == "test_rewards:length"


# Objectives say what they mean


def test_objectives_of_ones_own_need_their_directions_stated(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    text = 'name = "mine"\n[objectives]\ncoverage = ["0"]\nbrevity = ["4"]\n'
    mine.write_text(text)
    with pytest.raises(ValueError, match=r"low = 0, high = 90 for more coverage and brevity; low = -45, high = 0 for "
                       r"more coverage, less brevity"):  # fmt: skip
        load(mine)
    mine.write_text(text + "[preference]\nlow = 0\nhigh = 90\n")
    assert load(mine).preference.high == 90
    # What stands in a file that is not about these objectives says nothing of them.
    mine.write_text('name = "mine"\n[preference]\nlow = -30\n')
    with pytest.raises(ValueError, match=r"\[preference\] does not say"):
        load(mine, ["--objectives", '{coverage = ["0"], brevity = ["4"]}'])
    assert load(mine, ["--objectives", '{coverage = ["0"], brevity = ["4"]}', "--preference.low", "-45"])
    assert load(mine, ["--objectives", '{helpfulness = ["0"], verbosity = ["4"]}'])  # the paper's, of other heads


def test_a_later_layer_may_change_a_rewards_scale_without_stating_directions_again(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    rewards = '[rewards.a]\nfunction = "m:f"\n[rewards.b]\nfunction = "m:g"\n'
    mine.write_text(f'name = "mine"\n{rewards}[preference]\nlow = 0\nhigh = 90\n')
    assert load(mine, ["--rewards.a.scale", "[2, 1]"]).rewards["a"].scale == (2.0, 1.0)
    with pytest.raises(ValueError, match="objectives"):
        load(mine, ["--rewards.c.function", "m:h"])  # a third objective, and an arc


# Functions


@pytest.mark.parametrize(
    ("source", "heads", "words"),
    [
        ("test_rewards:two", [], r"\[rewards\.a\] function test_rewards:two: returned shape \(2, 2\) for 2 answers"),
        ("test_rewards:length", ["x", "y"], r"returned shape \(2,\) for 2 answers and 2 heads"),
        ("test_rewards:no_such", [], "AttributeError: module 'test_rewards' has no attribute 'no_such'"),
        ("no_such_module:f", [], "ModuleNotFoundError: No module named 'no_such_module'"),
        ("os:getcwd", [], "TypeError"),
    ],
)
def test_a_function_is_tried_before_any_work(source: str, heads: list[str], words: str) -> None:
    objectives = {"help": ["b"], "short": ["0"]}
    recipe = recipe_of({"a": {"function": source, "heads": heads}, "b": {"function": "test_rewards:length"}},
                       objectives=objectives)  # fmt: skip
    with pytest.raises(ValueError, match=words):
        require_models(recipe)


def test_a_function_is_found_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "found_here.py").write_text("def rate(prompts, responses):\n    return [2.0] * len(responses)\n")
    monkeypatch.chdir(tmp_path)
    assert FunctionScorer("found_here:rate", ("score",)).score([(user_prompt("a"), "b")]).tolist() == [[2.0]]


def test_a_reward_that_fails_names_itself_and_the_answer() -> None:
    asked: list[Pair] = [(user_prompt(f"name {thing}."), f"{thing} is wise.") for thing in ("fox", "owl", "tea")]
    bad = FunctionScorer("test_rewards:breaks_at_owl", ("score",))
    good = FunctionScorer("test_rewards:length", ("score",))
    both = CombinedScorer(("a/score", "b/score"), [("[rewards.a]", good), ("[rewards.b]", bad)], [None, None])
    with pytest.raises(ValueError, match=r"\[rewards\.b\] function test_rewards:breaks_at_owl: ZeroDivisionError: .* "
                       r"\(answer 1 of 3, to 'name owl\.': 'owl is wise\.'\)"):  # fmt: skip
        both.score(asked)
    bad = FunctionScorer("test_rewards:no_number_at_owl", ("score",))
    both = CombinedScorer(("a/score", "b/score"), [("[rewards.a]", good), ("[rewards.b]", bad)], [None, None])
    with pytest.raises(ValueError, match=rf"\[rewards\.b\] .*: head 0 scored nan on answer 1 of 3: 'owl is wise\.', "
                       rf"to prompt {prompt_id(asked[1][0])}"):  # fmt: skip
        both.score(asked)


# Scales


def test_a_fitted_scale_takes_the_5th_and_95th_percentile_to_10_and_90() -> None:
    """0..100 in steps of 1: the percentiles are 5 and 95, so a point is 80/90 of a unit."""
    slope, offset = fit(np.arange(101.0))
    assert (slope, offset) == pytest.approx((80 / 90, 10 - 5 * 80 / 90))
    points_NH = to_points([[5.0, 3.0], [95.0, 4.0]], [(slope, offset), (10.0, 1.0)])
    np.testing.assert_allclose(points_NH, [[10.0, 31.0], [90.0, 41.0]])


def test_scales_that_cannot_be_fitted_or_taken_as_points_are_refused() -> None:
    flat, wild = np.full((20, 1), 3.0), np.linspace(-3.0, 3.0, 20)[:, None]
    with pytest.raises(ValueError, match=r"\[rewards\.a\] head 'score': no scale .* 20 annotated answers: .* both 3"):
        fitted_scales({"a": RewardTable(function="m:f")}, (), flat)
    points = RewardTable(model="m", input="dpa-v1", heads=("x",))
    with pytest.raises(ValueError, match=r"50% of 20 annotated answers earn less than 0 .* give scale"):
        fitted_scales({"a": points}, (), wild)
    assert fitted_scales({"a": points}, (), wild + 50) == [(1.0, 0.0)]
    assert fitted_scales({"a": points.model_copy(update={"scale": (10.0, 50.0)})}, (), wild) == [(10.0, 50.0)]


def test_recorded_scales_are_read_back_by_the_names_of_heads(tmp_path: Path) -> None:
    write_scales(tmp_path, ("a/x", "b/y"), [(0.1, 1 / 3), (2.0, -1.0)])
    assert read_scales(tmp_path, ("b/y", "a/x")) == [(2.0, -1.0), (0.1, 1 / 3)]
    with pytest.raises(ValueError, match="run the annotate stage"):
        read_scales(tmp_path, ("c/z",))
    recipe = recipe_of({"a": {"function": "m:f"}, "b": {"function": "m:g"}})
    with pytest.raises(ValueError, match=r"\[rewards\.a\] has no scale"):
        scales_of(recipe, None)


def test_a_run_scores_with_all_its_rewards_in_points(chat_model: Path, tmp_path: Path) -> None:
    rewards = {
        "good": {"model": str(chat_model), "scale": [10.0, 50.0]},
        "pair": {"function": "test_rewards:two", "heads": ["asked", "said"], "scale": [2.0, 1.0]},
    }
    recipe = recipe_of(rewards, objectives={"help": ["good"], "short": ["said"]})
    scorer = open_scorer(recipe, tmp_path)
    assert tuple(scorer.heads) == recipe.scored_heads == ("good/score", "pair/asked", "pair/said")
    asked: list[Pair] = [(user_prompt("name fox."), "fox is red."), (user_prompt("name tea."), "tea.")]
    alone = ModelScorer(str(chat_model), template="chat", batch_tokens=100, dtype="float32").score(asked)
    expected = np.column_stack([10 * alone[:, 0] + 50, [19.0, 19.0], [23.0, 9.0]])
    np.testing.assert_allclose(scorer.score(asked), expected, rtol=1e-6)


def test_a_hub_models_one_head_may_have_any_name_and_several_must_be_named(
    tiny_folder: Path, chat_model: Path, tmp_path: Path
) -> None:
    several = write_chat_model(tiny_folder, tmp_path / "several", heads=3)
    rewards: dict[str, Any] = {"good": {"model": str(several)}, "short": {"function": "test_rewards:length"}}
    with pytest.raises(ValueError, match=r"\[rewards\.good\]: this reward model has the heads \['LABEL_0', "):
        open_scorer(recipe_of(rewards), tmp_path, raw=True)
    rewards["good"]["heads"] = ["a", "b", "c"]
    recipe = recipe_of(rewards, objectives={"help": ["a", "b"], "short": ["short"]})
    assert open_scorer(recipe, tmp_path, raw=True).score([(user_prompt("a"), "b")]).shape == (1, 4)


# The chat that a reward model reads


def chat_scorer(folder: Path, share: bool = True) -> ModelScorer:
    return ModelScorer(str(folder), template="chat", batch_tokens=400, dtype="float32", share_prefix=share)


def test_a_model_reads_its_own_chat_template(chat_model: Path) -> None:
    """The same as transformers gives for the chat with its answer; the prompt is read once for all answers."""
    system: Message = {"role": "system", "content": "Be kind."}
    chats: list[list[Message]] = [[system, *user_prompt("name fox.")], user_prompt("name tea and owl.")]
    asked: list[Pair] = [(chat, f" {word} is it. ") for chat in chats for word in ("red", "hot", "wise and old")]
    scorer = chat_scorer(chat_model)
    assert scorer.shares
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    model = MistralForSequenceClassification.from_pretrained(chat_model)
    with torch.no_grad():
        expected = [
            model(**tokenizer.apply_chat_template(
                [*chat, {"role": "assistant", "content": answer}], return_tensors="pt", return_dict=True
            )).logits[0].tolist()
            for chat, answer in asked
        ]  # fmt: skip
    np.testing.assert_allclose(scorer.score(asked), expected, atol=1e-5)
    np.testing.assert_allclose(chat_scorer(chat_model, share=False).score(asked), expected, atol=1e-5)


def test_a_template_without_a_system_role_shows_the_users_system_text_in_the_first_turn(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = write_chat_model(tiny_folder, tmp_path / "model", NO_SYSTEM)
    system: Message = {"role": "system", "content": "Be kind."}
    scores = chat_scorer(folder).score(
        [([system, *user_prompt("name fox.")], "red."), (user_prompt("Be kind.\n\nname fox."), "red.")]
    )
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("template", "words"),
    [(None, "its tokenizer has none"), ("{{ messages[0].content }}", "does not show the question and the answer")],
)
def test_a_template_that_cannot_show_an_answer_is_refused(
    tiny_folder: Path, tmp_path: Path, template: Any, words: str
) -> None:
    folder = write_chat_model(tiny_folder, tmp_path / "model")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=words):
        chat_scorer(folder)


def test_a_reward_sees_the_chat_that_the_user_wrote(tmp_path: Path) -> None:
    """A candidate's own chat has the line of its direction."""
    chat: list[Message] = [{"role": "system", "content": "Be kind."}, *user_prompt("name fox.")]
    prompt = {"prompt_id": prompt_id(chat), "messages": chat, "split": "D1"}
    write_rows(tmp_path / "prompts" / "part-00000.parquet", [prompt], PROMPTS)
    lined = [{"role": "system", "content": "Be kind. helpfulness*71 verbosity*-71"}, *user_prompt("name fox.")]
    (row,) = Asked(tmp_path).shown([{"prompt_id": prompt_id(chat), "messages": lined, "response": "red."}])
    assert (row["messages"], row["response"]) == (chat, "red.")
    with pytest.raises(ValueError, match="prompt other is none of the data's"):
        Asked(tmp_path).shown([{"prompt_id": "other", "messages": lined}])


# The steps of a run


def test_what_is_fitted_to_the_annotation_is_read_by_all_that_score() -> None:
    given = ("--rewards.a.function", "test_rewards:length", "--rewards.b.function", "test_rewards:length")
    more = ("--preference.low", "-45", "--data.judge", "0")
    fits = {step.name: step for step in steps(load(MICRO, [*given, *more]), compared=True)}
    scoring = [step for step in fits.values() if "reward" in step.inputs and step.name not in ("annotate", "report")]
    assert len(scoring) > 10
    assert [step.name for step in scoring if step.inputs.get("annotate") != "annotate"] == []
    assert fits["policy-1"].inputs["annotate"] == "annotate"
    known = [*given, *more, "--rewards.a.scale", "[1, 0]", "--rewards.b.scale", "[1, 0]"]
    fixed = {step.name: step for step in steps(load(MICRO, known))}
    assert "annotate" not in fixed["score-1"].inputs
    assert "annotate" not in fixed["policy-1"].inputs
