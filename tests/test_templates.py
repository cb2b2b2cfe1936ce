"""Every string a model sees: golden texts, Jinja against Python, and the parsers that read them back."""

import itertools
import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from dpalign.chat import chat_template, render_chat, with_system_line
from dpalign.paper.direction import Preference, Sphere, draw_directions, rng_for
from dpalign.paper.prompts import (
    parse_condition,
    render_condition,
    render_preference,
    render_reward_input,
)

NAMES = ("helpfulness", "verbosity")
PREFERENCES = ("dpa-v1", "fig1", "world-v1")
STYLES = ("zephyr", "world-v1")
HI = [{"role": "user", "content": "hi"}]
CHAT = [
    {"role": "system", "content": "Answer in French."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Moi."},
    {"role": "user", "content": "Why? </s>\n"},
    {"role": "assistant", "content": ""},
]
RELEASED_LINE = (
    "You are a helpful, respectful, and honest assistant who always responds to the user in a harmless way. "
    "Your response should maximize weighted rating = "
)


@pytest.fixture(scope="module")
def jinja() -> Callable[..., str]:
    """A chat template rendered as transformers does."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")

    def render(template: str, messages: list, **kwargs: object) -> str:
        return utils.render_jinja_template([messages], chat_template=template, **kwargs)[0][0]

    return render


# --- preference lines


@pytest.mark.parametrize(
    ("angle", "helpfulness", "verbosity"),
    [
        (0, 100, 0),
        (-5, 100, -9),
        (-10, 98, -17),
        (-15, 97, -26),
        (-20, 94, -34),
        (-25, 91, -42),
        (-30, 87, -50),
        (-35, 82, -57),
        (-40, 77, -64),
        (-45, 71, -71),
    ],
)
def test_the_released_prompt_at_ten_even_angles(jinja: Callable, angle: int, helpfulness: int, verbosity: int) -> None:
    golden = f"{RELEASED_LINE}helpfulness*{helpfulness} + verbosity*{verbosity}"
    assert render_preference(Preference.from_angle(angle, NAMES), "dpa-v1") == golden
    prompt = jinja(chat_template("zephyr", "dpa-v1", NAMES), HI, angle=angle, add_generation_prompt=True)
    assert prompt == f"<|system|>\n{golden}</s>\n<|user|>\nhi</s>\n<|assistant|>\n"


def test_the_papers_figure_1_prompt() -> None:
    assert render_preference(Preference.from_weights({"helpfulness": 0.8, "verbosity": -0.6}, NAMES), "fig1") == (
        "You are a helpful assistant. Your response should maximize weighted rating = helpfulness*0.8 - verbosity*0.6"
    )


@pytest.mark.parametrize(
    ("v", "dpa", "fig", "world"),
    [
        ((1, 0), "a*100 + b*0", "a*1.0 + b*0.0", "a*100 b*0"),
        ((-1, 1), "a*-71 + b*71", "a*-0.71 + b*0.71", "a*-71 b*71"),
        ((1, -1e-9), "a*100 + b*0", "a*1.0 + b*0.0", "a*100 b*0"),
        ((20, -1), "a*100 + b*-5", "a*1.0 - b*0.05", "a*100 b*-5"),
        ((2, -1, 2), "a*67 + b*-33 + c*67", "a*0.67 - b*0.33 + c*0.67", "a*67 b*-33 c*67"),
        ((-5,), "a*-100", "a*-1.0", "a*-100"),
    ],
)
def test_signs_zeros_and_any_number_of_objectives(v: tuple, dpa: str, fig: str, world: str) -> None:
    preference = Preference.from_vector(v, ("a", "b", "c")[: len(v)])
    opening = "You are a helpful assistant. Your response should maximize weighted rating = "
    assert render_preference(preference, "dpa-v1") == RELEASED_LINE + dpa
    assert render_preference(preference, "fig1") == opening + fig
    assert render_preference(preference, "world-v1") == world


def test_a_half_goes_away_from_zero_whatever_its_last_bit() -> None:
    # v2 = -1/8 is 12.5 hundredths; one step of the last bit to either side must not change the digits.
    for v2 in (-0.125, np.nextafter(-0.125, 0), np.nextafter(-0.125, -1)):
        preference = Preference.from_vector([math.sqrt(1 - v2 * v2), float(v2)], NAMES)
        assert render_preference(preference, "world-v1") == "helpfulness*99 verbosity*-13"


@pytest.mark.parametrize("template", PREFERENCES)
def test_jinja_writes_python_s_line_at_hundreds_of_angles(jinja: Callable, template: str) -> None:
    source = chat_template("world-v1", template, NAMES)
    for angle in [*np.linspace(-45, 0, 451).tolist(), *np.linspace(-360, 360, 241).tolist()]:
        preference = Preference.from_angle(angle, NAMES)
        golden = f"<|system|>{render_preference(preference, template)}<|user|>hi"
        assert jinja(source, HI, angle=angle) == golden, angle
        assert jinja(source, HI, preference=preference.weights) == golden, angle


@pytest.mark.parametrize("template", PREFERENCES)
def test_jinja_normalises_weights_of_any_length_as_python_does(jinja: Callable, template: str) -> None:
    names = ("a", "b", "c", "d")
    source = chat_template("world-v1", template, names)
    rng = rng_for(0, "lengths")
    integers_NK = rng.integers(-9, 10, size=(150, 4))
    reals_NK = draw_directions(Sphere(4), 150, rng) * 10.0 ** rng.integers(-200, 200, size=(150, 1))
    for weights in [*integers_NK[integers_NK.any(axis=1)].tolist(), *reals_NK.tolist()]:
        line = render_preference(Preference.from_vector(weights, names), template)
        given = {name: w for name, w in zip(names, weights, strict=True) if w}
        assert jinja(source, HI, preference=given) == f"<|system|>{line}<|user|>hi", weights


# --- SteerLM's conditions


def test_steerlm_labels_are_the_inverse_of_20_l_plus_10_clipped_and_rounded() -> None:
    line = render_condition({"helpfulness": 90, "verbosity": 50.0}, "steerlm")
    assert line == RELEASED_LINE.replace("maximize weighted rating = ", "have these attributes: ") + (
        "helpfulness:4,verbosity:2"
    )
    rewards = {"a": 120.0, "b": -7.0, "c": 39.9, "d": 40.0, "e": None, "f": -100.0}
    assert render_condition(rewards, "steerlm").endswith(": a:4,b:0,c:1,d:2")
    assert render_condition(rewards, "world-v1") == "a 100 b 0 c 40 d 40"


def test_steerlm_s_points_are_whole_numbers_of_the_whole_scale() -> None:
    line = render_condition({"helpfulness": 80.5, "verbosity": 40.4}, "steerlm-100-v1")
    assert line == RELEASED_LINE.replace("maximize weighted rating = ", "have these attributes, from 0 to 100: ") + (
        "helpfulness:81,verbosity:40"
    )
    chat = render_chat(with_system_line(CHAT, line, "zephyr"), "zephyr")
    assert parse_condition(chat, "steerlm-100-v1") == {"helpfulness": 81, "verbosity": 40}
    with pytest.raises(ValueError, match="no condition line of 'steerlm' in"):  # 81 is no label
        parse_condition(line, "steerlm")


def test_a_condition_reads_back_as_rewards() -> None:
    line = render_condition({"helpfulness": 85.4, "verbosity": 35}, "steerlm")
    chat = render_chat(with_system_line(CHAT, line, "zephyr"), "zephyr")
    assert parse_condition(line, "steerlm") == parse_condition(chat, "steerlm") == {"helpfulness": 90, "verbosity": 30}
    assert parse_condition("helpfulness 85 verbosity 35", "world-v1") == {"helpfulness": 85, "verbosity": 35}


@pytest.mark.parametrize("template", ["steerlm", "steerlm-100-v1", "world-v1"])
def test_every_stated_condition_survives_a_round_trip(template: str) -> None:
    for helpfulness, verbosity in itertools.product(range(10, 91, 20), repeat=2):
        rewards = {"helpfulness": float(helpfulness), "verbosity": float(verbosity)}
        assert parse_condition(render_condition(rewards, template), template) == rewards


def test_a_condition_without_a_reward_or_with_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="no reward to condition on"):
        render_condition({"helpfulness": None, "verbosity": -100}, "steerlm")
    with pytest.raises(ValueError, match="'verbosity' is nan"):
        render_condition({"helpfulness": 3, "verbosity": math.nan}, "world-v1")
    with pytest.raises(ValueError, match="no condition line of 'steerlm' in 'helpfulness 85'"):
        parse_condition("helpfulness 85", "steerlm")
    with pytest.raises(ValueError, match="no condition line of 'world-v1'"):
        parse_condition("helpfulness 85 and verbosity 35", "world-v1")


# --- reward inputs


def test_the_released_reward_input_character_by_character() -> None:
    assert render_reward_input([{"role": "user", "content": "What is tea?"}], "A drink.", "dpa-v1") == (
        "[INST] You must read the following conversation carefully and rate the assistant's response from score 0-100 "
        "in these aspects: helpfulness, correctness, coherence, honesty, complexity, verbosity\n\n"
        "User: What is tea?\n\nAssistant: A drink. [/INST]"
    )


def test_a_longer_chat_alternates_inside_the_reward_input() -> None:
    assert render_reward_input(CHAT[:4], "So.", "dpa-v1").endswith(
        ", verbosity\n\nUser: Who?\n\nAssistant: Moi.\n\nUser: Why? </s>\n\n\nAssistant: So. [/INST]"
    )
    assert render_reward_input(CHAT[1:4], "So.", "world-v1") == (
        "rate: Who?\nanswer: Moi.\nrate: Why? </s>\n\nanswer: So.\nscore:"
    )
    assert render_reward_input(HI, "Hello.", "world-v1") == "rate: hi\nanswer: Hello.\nscore:"


@pytest.mark.parametrize("template", ["dpa-v1", "world-v1"])
def test_the_reward_model_never_sees_the_direction(template: str) -> None:
    line = render_preference(Preference.from_angle(-30, NAMES), template)
    conditioned = with_system_line(HI, line, "world-v1")
    assert render_reward_input(conditioned, "Hello.", template) == render_reward_input(HI, "Hello.", template)


def test_a_chat_that_awaits_no_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="4 turns does not end with the user's"):
        render_reward_input(CHAT, "So.", "dpa-v1")
    with pytest.raises(ValueError, match="0 turns"):
        render_reward_input(CHAT[:1], "So.", "dpa-v1")
    with pytest.raises(ValueError, match="turn 1 is the user's"):
        render_reward_input(HI * 3, "So.", "dpa-v1")


# --- chat templates


def test_zephyr_s_turns_character_by_character(jinja: Callable) -> None:
    template = chat_template("zephyr", "dpa-v1", NAMES)
    turns = "<|user|>\nWho?</s>\n<|assistant|>\nMoi.</s>\n<|user|>\nWhy? </s>\n</s>\n<|assistant|>\n"
    assert jinja(template, CHAT) == f"<|system|>\nAnswer in French.</s>\n{turns}</s>\n"
    assert jinja(template, CHAT[:4], add_generation_prompt=True) == f"<|system|>\nAnswer in French.</s>\n{turns}"


def test_the_worlds_turns_character_by_character(jinja: Callable) -> None:
    template = chat_template("world-v1", "world-v1", NAMES)
    prompt = jinja(template, CHAT[:2], preference={"verbosity": -1, "helpfulness": 1}, add_generation_prompt=True)
    assert prompt == "<|system|>Answer in French. helpfulness*71 verbosity*-71<|user|>Who?<|assistant|>"
    assert jinja(template, CHAT[1:3]) == "<|user|>Who?<|assistant|>Moi.</s>"


def test_a_users_system_message_comes_before_the_preference_line(jinja: Callable) -> None:
    prompt = jinja(
        chat_template("zephyr", "dpa-v1", NAMES), CHAT[:2], preference={"helpfulness": 0.8, "verbosity": -0.6}
    )
    assert prompt == (
        f"<|system|>\nAnswer in French.\n{RELEASED_LINE}helpfulness*80 + verbosity*-60</s>\n<|user|>\nWho?</s>\n"
    )


@pytest.mark.parametrize("empty_system", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_jinja_renders_every_chat_as_python_does(jinja: Callable, style: str, empty_system: bool) -> None:
    late_system = [*HI, {"role": "system", "content": "Now in verse."}]
    empty_own = [{"role": "system", "content": ""}, *HI]
    options = {"empty_system": empty_system}
    template = chat_template(style, "fig1", NAMES, **options)
    plain = chat_template(style, **options)
    line = render_preference(Preference.from_angle(-20, NAMES), "fig1")
    for messages in (HI, CHAT, CHAT[:4], CHAT[1:], late_system, empty_own, []):
        for prompt in (False, True):
            rendered = render_chat(messages, style, add_generation_prompt=prompt, **options)
            assert jinja(template, messages, add_generation_prompt=prompt) == rendered
            assert jinja(template, messages, add_generation_prompt=prompt, preference=None, angle=None) == rendered
            assert jinja(plain, messages, add_generation_prompt=prompt) == rendered
            steered = render_chat(with_system_line(messages, line, style), style, add_generation_prompt=prompt)
            assert jinja(template, messages, add_generation_prompt=prompt, angle=-20) == steered


def test_an_answer_ends_with_the_tokenizers_own_eos(jinja: Callable) -> None:
    chat = [*HI, {"role": "assistant", "content": "yo"}]
    for eos in ("<|im_end|>", "<｜end▁of▁sentence｜>"):  # noqa: RUF001
        assert jinja(chat_template("world-v1", eos=eos), chat) == f"<|user|>hi<|assistant|>yo{eos}"


def test_zephyr_s_baselines_can_have_an_empty_system_message() -> None:
    assert render_chat(HI, "zephyr", empty_system=True) == "<|system|>\n</s>\n<|user|>\nhi</s>\n"
    assert render_chat(HI, "zephyr") == "<|user|>\nhi</s>\n"
    assert render_chat(HI, "zephyr", eos="<|end|>") == "<|user|>\nhi<|end|>\n"


def test_a_tokenizer_folder_is_steered_with_none_of_our_code(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({character: i for i, character in enumerate(alphabet)}, [])
    raw = tokenizers.Tokenizer(model)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    made.chat_template = chat_template("zephyr", "dpa-v1", NAMES)
    made.save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.apply_chat_template(HI, preference={"helpfulness": 4, "verbosity": -3}, return_dict=False)
    golden = f"<|system|>\n{RELEASED_LINE}helpfulness*80 + verbosity*-60</s>\n<|user|>\nhi</s>\n"
    assert tokenizer.decode(ids) == golden
    assert ids.count(tokenizer.eos_token_id) == 2
    answered = [*HI, {"role": "assistant", "content": "yo"}]
    masked = tokenizer.apply_chat_template(answered, angle=-10, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, m in zip(masked["input_ids"], masked["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(said) == "yo</s>"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"preference": {"helpfulness": 1, "verbocity": -1}},
            "unknown objective 'verbocity' \\(known: helpfulness, verb",
        ),
        ({"preference": {"helpfulness": math.nan}}, "weight of 'helpfulness' is nan"),
        ({"preference": {"verbosity": -math.inf}}, "weight of 'verbosity' is -inf"),
        ({"preference": {"verbosity": "low"}}, "weight of 'verbosity' is low"),
        ({"preference": {"verbosity": True}}, "weight of 'verbosity' is True"),
        ({"preference": {"helpfulness": 0, "verbosity": 0}}, "all weights are zero"),
        ({"preference": "helpfulness*1"}, "preference is helpfulness\\*1; give weights by name"),
        ({"angle": "-15"}, "angle is -15; give a finite number"),
        ({"angle": math.nan}, "angle is nan"),
        ({"angle": True}, "angle is True"),
        ({"angle": 0, "preference": {"helpfulness": 1}}, "a preference or an angle, not both"),
    ],
)
def test_jinja_refuses_what_is_no_direction(jinja: Callable, kwargs: dict, message: str) -> None:
    error = pytest.importorskip("jinja2").exceptions.TemplateError
    with pytest.raises(error, match=message):
        jinja(chat_template("zephyr", "dpa-v1", NAMES), HI, **kwargs)


def test_jinja_refuses_an_angle_of_three_objectives_and_a_plain_model_any_preference(jinja: Callable) -> None:
    error = pytest.importorskip("jinja2").exceptions.TemplateError
    with pytest.raises(error, match="two objectives; give weights for: a, b, c"):
        jinja(chat_template("zephyr", "dpa-v1", ("a", "b", "c")), HI, angle=-15)
    for kwargs in ({"angle": 0}, {"preference": {"helpfulness": 1}}):
        with pytest.raises(error, match="this model takes no preference"):
            jinja(chat_template("zephyr"), HI, **kwargs)


def test_jinja_and_python_refuse_a_role_they_do_not_know_and_jinja_what_is_no_text(jinja: Callable) -> None:
    error = pytest.importorskip("jinja2").exceptions.TemplateError
    tool = [*HI, {"role": "tool", "content": "42"}]
    with pytest.raises(error, match="a message of role 'tool' \\(known: system, user, assistant\\)"):
        jinja(chat_template("zephyr"), tool)
    with pytest.raises(ValueError, match="a message of role 'tool'"):
        render_chat(tool, "zephyr")
    for role in ("system", "user"):
        with pytest.raises(error, match="message 0: its content is no text"):
            jinja(chat_template("zephyr"), [{"role": role, "content": [{"type": "text", "text": "hi"}]}])


@pytest.mark.parametrize(
    "build",
    [
        lambda: chat_template("zephyr-v2"),
        lambda: chat_template("zephyr", "dpa-v2", NAMES),
        lambda: render_preference(Preference.from_angle(0, NAMES), "dpa"),
        lambda: render_condition({"a": 1}, "dpa-v1"),
        lambda: render_reward_input(HI, "", "fig1"),
    ],
)
def test_an_unknown_template_is_refused_with_the_known_ones(build: Callable) -> None:
    with pytest.raises(ValueError, match=r"unknown .* \(nearest: .*; known: .*\)"):
        build()


def test_a_preference_template_and_its_objectives_come_together() -> None:
    with pytest.raises(ValueError, match="give both or neither"):
        chat_template("zephyr", "dpa-v1")
    with pytest.raises(ValueError, match="give both or neither"):
        chat_template("zephyr", objectives=NAMES)
    with pytest.raises(ValueError, match="a name is a letter"):
        chat_template("zephyr", "dpa-v1", ('a"}}', "b"))


def test_the_papers_definitions_need_numpy_alone() -> None:
    modules = "direction", "objectives", "prompts", "selection"
    code = f"import sys; from dpalign.paper import {', '.join(modules)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    own = {name for name in imported if name.startswith("dpalign")}
    assert own == {"dpalign", "dpalign.paper", *(f"dpalign.paper.{module}" for module in modules)}
    assert imported.isdisjoint({"torch", "transformers", "pyarrow", "jinja2"})
