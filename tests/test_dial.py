"""The dial, its reading of what users ask, and the contract that it is loaded from."""

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpalign.chat import chat_template
from dpalign.dial import golden
from dpalign.dial.dial import Dial
from dpalign.paper.direction import Arc, Cone, Fixed, Grid, Population, Preference, Simplex, Sphere, rng_for
from dpalign.paper.objectives import PAPER_OBJECTIVES
from dpalign.rows import HEADS, Message
from dpalign.train.contract import Contract, FrontPoint, Length, read_contract, write_contract
from dpalign.world.language import read_prompt

TWO = ("helpfulness", "verbosity")
DIAL = Dial(TWO, "world-v1", "world-v1", Arc(-45.0, 0.0))
THREE = Dial(("helpfulness", "verbosity", "wit"), "dpa-v1", "zephyr")


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"preference": {"helpfulness": 0.8, "verbosity": -0.6}}, "helpfulness*80 verbosity*-60"),
        ({"preference": {"helpfulness": 8, "verbosity": -6}}, "helpfulness*80 verbosity*-60"),
        ({"preference": {"verbosity": -2}}, "helpfulness*0 verbosity*-100"),
        ({"angle": -15}, "helpfulness*97 verbosity*-26"),
        ({"angle": -15 + 720}, "helpfulness*97 verbosity*-26"),
        ({"angle": 0.0}, "helpfulness*100 verbosity*0"),
    ],
)
def test_a_request_is_read_as_the_template_reads_it(asked: dict[str, Any], line: str) -> None:
    preference = DIAL.read(**asked)
    assert preference is not None
    assert DIAL.line(preference) == line


def test_without_a_preference_the_model_is_the_plain_one() -> None:
    chat: list[Message] = [{"role": "user", "content": "Hello"}]
    assert DIAL.read() is None
    assert DIAL.messages(chat, None) == chat
    assert DIAL.messages(chat, DIAL.read(angle=-45))[0] == {
        "role": "system",
        "content": "helpfulness*71 verbosity*-71",
    }
    own: list[Message] = [{"role": "system", "content": "Be kind."}, *chat]
    assert DIAL.messages(own, DIAL.read(angle=0))[0]["content"] == "Be kind. helpfulness*100 verbosity*0"
    assert own[0]["content"] == "Be kind."


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"preference": {"helpfulnes": 1}}, "unknown objective 'helpfulnes'"),
        ({"preference": {"helpfulness": 0, "verbosity": 0}}, "zero"),
        ({"preference": {}}, "zero"),
        ({"preference": {"helpfulness": math.nan}}, "nan"),
        ({"preference": {"helpfulness": math.inf}}, "inf"),
        ({"preference": {"helpfulness": 10**400}}, "inf"),
        ({"preference": {"helpfulness": "much"}}, "'much', a str; give a number"),
        ({"preference": {"helpfulness": True}}, "True, a bool; give a number"),
        ({"preference": {"helpfulness": None}}, "a NoneType; give a number"),
        ({"preference": {3: 1.0}}, "unknown objective 3"),
        ({"preference": "helpfulness"}, "give weights by name"),
        ({"preference": [0.8, -0.6]}, "give weights by name"),
        ({"angle": "-30"}, "'-30', a str; give a number"),
        ({"angle": math.nan}, "nan"),
        ({"angle": math.inf}, "inf"),
        ({"angle": True}, "a bool"),
        ({"angle": [1]}, "a list"),
        ({"angle": -30, "preference": {"helpfulness": 1}}, "give one"),
    ],
)
def test_a_bad_preference_is_refused_with_the_known_names(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="known: helpfulness, verbosity") as error:
        DIAL.read(**asked)
    assert said in str(error.value)
    assert str(error.value).count("known:") == 1


def test_a_model_of_the_small_world_offers_questions_that_it_can_read() -> None:
    assert [len(read_prompt(question).things) for question in DIAL.questions] == [3, 2, 4]
    assert "32 things" in str(DIAL.note)
    assert (THREE.note, THREE.questions) == (None, ())


def test_a_word_for_a_length_is_read_where_lengths_are_on_record() -> None:
    levels = {"low": Length(-40.0, 12.0), "medium": Length(-22.5, 16.0), "high": Length(-5.0, 20.0)}
    dial = Dial(TWO, "fig1", "zephyr", Arc(-45, 0), verbosity=levels)
    assert dial.read(verbosity="low") == Preference.from_angle(-40, TWO)
    assert (
        dial.lengths
        == "low \u221240\u00b0 (12 words), medium \u221222.5\u00b0 (16 words), high \u22125\u00b0 (20 words)"
    )
    for asked, said in (
        ({"verbosity": "Low"}, "verbosity 'Low'; give low, medium, high"),
        ({"verbosity": "low", "angle": -30}, "angle and verbosity each name a direction; give one"),
    ):
        with pytest.raises(ValueError, match=said):
            dial.read(**asked)
    for bare, said in (
        (Dial(TWO, "fig1", "zephyr"), "no lengths of answers are on record for this model; give a preference"),
        (Dial((), "fig1", "zephyr"), "takes no directions"),
    ):
        assert bare.lengths == ""
        with pytest.raises(ValueError, match=said):
            bare.read(verbosity="low")


def test_an_angle_is_of_two_objectives() -> None:
    with pytest.raises(ValueError, match=r"not of 3 .*known: helpfulness, verbosity, wit"):
        THREE.read(angle=-30)
    wit = THREE.read({"wit": 1})
    assert wit is not None
    assert THREE.angle_of(wit) is None
    assert DIAL.angle_of(DIAL.parse("helpfulness=1 verbosity=-1")) == -45.0


@pytest.mark.parametrize(
    "words",
    [
        "helpfulness=0.8 verbosity=-0.6",
        "helpfulness=0.8,verbosity=-0.6",
        "helpfulness*0.8 - verbosity*0.6",
        "helpfulness*0.8-verbosity*0.6",
        "0.8*helpfulness - 0.6*verbosity",
        "8*helpfulness-6*verbosity",
        "  verbosity: -.6; helpfulness: .8 ",
        "helpfulness*80 + verbosity*-60",
        "helpfulness=8e-1 verbosity=\u22120.6",
    ],
)
def test_directions_are_read_as_people_type_them(words: str) -> None:
    assert DIAL.parse(words).v == pytest.approx((0.8, -0.6))


@pytest.mark.parametrize("words", ["-30", "-30.0", "\u221230\u00b0", " -30 degrees", "-3e1 deg", "330"])
def test_a_number_alone_is_an_angle(words: str) -> None:
    assert DIAL.parse(words).v == pytest.approx((math.cos(math.pi / 6), -0.5))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "helpfulness=0.8 verbosity=-0.6"),
        ("nan", "'nan'"),
        ("helpfulness=much", "'helpfulness=much'"),
        ("helpfulness=0.8 and verbosity=1", "'helpfulness=0.8 and verbosity=1'"),
        ("helpfulness=1 helpfulness=2", "'helpfulness' twice"),
        ("wit=1", "unknown objective 'wit'"),
        ("helpfulness=0", "zero"),
        ("1e999", "inf"),
    ],
)
def test_words_that_are_no_direction_are_refused_with_an_example(words: str, said: str) -> None:
    with pytest.raises(ValueError, match="known: helpfulness, verbosity") as error:
        DIAL.parse(words)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("population", "inside", "outside", "said"),
    [
        (Arc(), [0.0, -45.0, -45.0000005, 315.0], [0.01, -45.1, 180.0], "-45 to 0 degrees"),
        (Arc(0.0, 360.0), [0.0, 90.0, -90.0], [], ""),
        (Grid(-45, 0, 4), [-10.0], [10.0], "-45 to 0 degrees"),
        (Cone((1.0, 0.0), 20.0), [20.0, -20.0, 0.0], [20.1], "within 20 degrees of helpfulness=1.00 verbosity=0.00"),
        (Simplex(2), [0.0, 45.0, 90.0], [-1.0, 91.0], "weights of 0 and above"),
        (Fixed(((1.0, 0.0), (1.0, -1.0))), [0.0, -45.0], [-20.0], "2 fixed ones"),
        (Sphere(2), [0.0, 180.0, -90.0], [], ""),
    ],
)
def test_directions_outside_the_trained_ones_are_allowed_with_a_warning(
    population: Population, inside: list[float], outside: list[float], said: str
) -> None:
    dial = replace(DIAL, population=population)
    assert [dial.warning(Preference.from_angle(angle, TWO)) for angle in inside] == [None] * len(inside)
    for angle in outside:
        warning = dial.warning(Preference.from_angle(angle, TWO))
        assert warning is not None
        assert f"({said})" in warning


def test_a_dial_warns_of_its_arc_unless_the_trained_range_is_unknown() -> None:
    assert "-45 to 0 degrees" in str(DIAL.warning(DIAL.parse("-60")))
    assert replace(DIAL, population=None).warning(DIAL.parse("-60")) is None


@pytest.mark.parametrize(
    "words",
    [
        "1" * 999 + "x",
        "helpfulness=" + " " * 980 + "x",
        "a" * 999,
        "helpfulness" + "-" * 980,
        "- " * 499,
        "9" * 1_000_000,
        "helpfulness=1 " * 70,
        {"a" * 1_000_000: 1.0},
    ],
    ids=lambda words: str(words)[:12],
)
def test_hostile_words_are_refused_at_once(words: str | dict[str, float]) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match="known: helpfulness, verbosity") as error:
        DIAL.parse(words) if isinstance(words, str) else DIAL.read(words)
    assert time.process_time() - began < 0.25
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("style", ["world-v1", "dpa-v1", "fig1"])
def test_what_the_dial_takes_the_template_takes_and_with_the_same_text(style: Any) -> None:
    """Requests as JSON can spell them, well and badly formed."""
    values = [0, 1, -1, 0.5, -1e-300, 1e300, 3.7, math.nan, math.inf, -math.inf, True, None, "1", "", [1], {"a": 1}]
    rng = rng_for("requests")
    dial = replace(DIAL, template=style, chat="zephyr")
    template = chat_template("zephyr", style, TWO)
    chat: list[Message] = [{"role": "user", "content": "Hi"}]
    taken = 0
    for _ in range(400):
        drawn = [values[i] for i in rng.integers(len(values), size=4)]
        names = ["helpfulness", "verbosity", "wit"] if rng.random() < 0.1 else ["helpfulness", "verbosity"]
        asked: dict[str, Any] = {"preference": dict(zip(names, drawn, strict=False))}
        if rng.random() < 0.3:
            asked = {"angle": drawn[0], "preference": None if rng.random() < 0.9 else drawn[1]}
        try:
            text = golden.expected(dial, chat, dial.read(**asked), golden.Form({"eos_token": "</s>"}))
        except ValueError:
            with pytest.raises(ValueError, match="the chat template says"):
                golden.render(template, chat, **asked)
        else:
            assert golden.render(template, chat, **asked) == text
            taken += 1
    assert 100 < taken < 300


def test_a_direction_over_other_objectives_is_refused() -> None:
    with pytest.raises(ValueError, match="a direction over helpfulness, verbosity for a model that weighs helpfulness"):
        THREE.line(DIAL.parse("-30"))


POPULATIONS = [Arc(-60.0, 10.0), Grid(-30.0, 0.0, 4), Cone((0.8, -0.6), 30.0), Fixed(((1.0, 0.0),)), Sphere(2)]


@pytest.mark.parametrize("population", [*POPULATIONS, Simplex(2), None])
def test_a_contract_is_read_as_it_was_written(population: Population | None, tmp_path: Path) -> None:
    front = (FrontPoint(Preference.from_angle(-30, TWO), {"helpfulness": 70.5, "verbosity": 40.0}),)
    heads = ("a", "b", "c")
    contract = Contract(
        "fig1",
        "zephyr",
        {"helpfulness": ("a", "c"), "verbosity": ("b",)},
        heads,
        population,
        4,
        "</s>",
        front,
        "reward",
        "dpa-v1",
        verbosity={"low": Length(-40.5, 30.0), "medium": Length(-20.0, 80.0), "high": Length(-3.0, 130.5)},
    )
    write_contract(tmp_path, contract)
    read = read_contract(tmp_path)
    assert read is not None
    assert read.front[0].direction.v == pytest.approx(front[0].direction.v, abs=1e-9)
    assert replace(read, front=front) == contract
    dial = Dial.load(tmp_path)
    assert (dial.objectives, dial.template, dial.chat) == (TWO, "fig1", "zephyr")
    assert dial.population == population
    assert dial.to_json()["front"] == [
        {
            "angle": -30.0,
            "direction": {"helpfulness": 0.866025404, "verbosity": -0.5},
            "rewards": {"helpfulness": 70.5, "verbosity": 40.0},
        }
    ]


PAPER = Contract(
    "dpa-v1",
    "zephyr",
    {objective.name: objective.heads for objective in PAPER_OBJECTIVES},
    HEADS,
    Arc(-45.0, 0.0),
    3,
    reward_template="dpa-v1",
)


def test_the_file_has_the_papers_template_heads_and_range(tmp_path: Path) -> None:
    write_contract(tmp_path, PAPER)
    assert read_contract(tmp_path) == PAPER
    dial = Dial.load(tmp_path)
    assert (dial.template, dial.chat, dial.arc) == ("dpa-v1", "zephyr", (-45.0, 0.0))
    content = json.loads((tmp_path / "dpa.json").read_text())
    assert content["objectives"]["verbosity"] == ["helpsteer-verbosity"]
    assert (content["format"], content["iteration"], content["units"], len(content["heads"])) == (2, 3, "0-100", 10)
    assert content["reward_template"] == "dpa-v1"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 3}, "format 3; this version reads 2"),
        ({"format": 1}, "format 1"),
        ({"format": "2"}, "format '2'"),
        ({"template": "poem"}, "template 'poem'; known: dpa-v1, fig1, world-v1"),
        ({"chat": "poem"}, "chat 'poem'; known: zephyr, world-v1"),
        ({"template": None}, "template None"),
        ({"objectives": []}, "not a policy's contract"),
        ({"objectives": {}}, "no objectives are named"),
        ({"objectives": {"help me": []}}, "objective 'help me'"),
        ({"objectives": {"helpfulness": ["nowhere"]}}, "reads head 'nowhere', which this reward model lacks"),
        ({"objectives": {"helpfulness": "head"}}, "reads head 'h'"),
        ({"distribution": "arc", "range": [0.0, -45.0]}, "it needs low < high"),
        ({"distribution": "arc", "range": ["low", 0]}, "not a policy's contract"),
        ({"distribution": "cone", "center": [1, 0, 0], "angle": 3}, "directions of 3 objectives for 2 objectives"),
        ({"distribution": "bell"}, "distribution 'bell'; known: arc, grid"),
        ({"distribution": "cone"}, "distribution 'cone'; known: arc"),
        ({"front": [{"direction": {"helpfulness": 1}, "rewards": {"helpfulness": 1}}]}, "KeyError: 'verbosity'"),
        ({"eos": 2}, "2, where text is needed"),
        ({"reward_template": "poem"}, "reward_template 'poem'; known: chat, dpa-v1, world-v1"),
        ({"verbosity": {"low": {"angle": 0, "words": 9}}}, 'give {"low", "medium", "high"}'),
        ({"verbosity": {key: {"angle": 0} for key in ("low", "medium", "high")}}, '"words": number above 0'),
        ({"verbosity": {key: {"angle": 0, "words": 0} for key in ("low", "medium", "high")}}, "number above 0"),
        ({"verbosity": dict.fromkeys(("low", "medium", "high"), 5)}, '"angle": degrees'),
    ],
)
def test_a_damaged_contract_is_refused_by_name(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_contract(tmp_path, PAPER)
    path = tmp_path / "dpa.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"dpa\.json: ") as error:
        Dial.load(tmp_path)
    assert said in str(error.value)


def test_a_folder_without_a_contract_has_no_dial(tmp_path: Path) -> None:
    assert read_contract(tmp_path) is None
    with pytest.raises(ValueError, match=r"dpa\.json: no such file: this model takes no directions"):
        Dial.load(tmp_path)


def test_the_dial_needs_no_torch() -> None:
    code = "import sys, dpalign.dial.dial; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
