"""The web page in a real Chromium, against a server of the tests; `pytest -m browser`."""

import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from dial_server import PAGE, Model, serving
from dpalign.page.looks import INKS

Opener = Callable[..., AbstractContextManager[Any]]

FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


def test_no_text_of_a_model_can_become_html_and_nothing_is_inline() -> None:
    scripts = "".join((PAGE / name.name).read_text("utf-8") for name in PAGE.iterdir() if name.name.endswith(".js"))
    page = (PAGE / "index.html").read_text("utf-8")
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert way not in scripts
    assert not re.search(r"<style|style=|\son\w+=|<script(?![^>]*\ssrc=)|https?://", page)


def test_the_page_has_the_inks_of_the_report() -> None:
    css = (PAGE / "page.css").read_text("utf-8")
    for name, colours in INKS.items():
        assert re.findall(rf"--{name}: (#\w+);", css) == list(colours)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any) -> Opener:
    """Opens the page of a model in a window of its own; any error that the page logs fails the test."""

    @contextmanager
    def open_page(
        model: Model, address: str = "", size: tuple[int, int] = (1280, 860), **options: Any
    ) -> Iterator[Any]:
        window = chromium.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        page = window.new_page()
        page.set_default_timeout(15_000)
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: wrong.append(line.text) if "Content Security" in line.text else None)
        page.goto(f"{model.url}/{address}")
        if model.key is None and model.dial:
            page.wait_for_selector("#send:enabled")
        yield page
        window.close()
        assert not wrong

    return open_page


def expect(thing: Any) -> Any:
    """playwright's own, imported where a browser is there."""
    return pytest.importorskip("playwright.sync_api").expect(thing)


def ask(page: Any, question: str) -> None:
    page.locator("#question").fill(question)
    page.keyboard.press("Enter")


def shown(page: Any, side: str) -> Any:
    return page.locator(f"article.{side} .text")


def whole(page: Any, answers: int = 2) -> None:
    """Wait until so many answers are there, each with its rewards."""
    expect(page.locator(".rating b")).to_have_count(answers)
    expect(page.locator("#send")).to_be_visible()


@pytest.mark.browser
def test_both_answers_stream_side_by_side_at_their_own_directions(opened: Opener) -> None:
    hold = threading.Event()
    with serving(Model(hold=hold)) as model, opened(model) as page:
        ask(page, "explain tea.")
        for side in "AB":  # the first word is there while the server still writes
            expect(shown(page, side)).to_have_text("tea")
        expect(page.locator("#stop")).to_be_visible()
        hold.set()
        whole(page)
        expect(shown(page, "A")).to_have_text(re.compile(r"^tea is dark .* in rain\.$"))
        expect(shown(page, "B")).to_have_text("tea is dark")
        boxes = [page.locator(f"article.{side}").bounding_box() for side in "AB"]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    asked = sorted(model.preferences(), key=lambda preference: preference["verbosity"])
    assert asked == [{"helpfulness": 0.707107, "verbosity": -0.707107}, {"helpfulness": 1, "verbosity": 0}]
    assert {request["seed"] for request in model.requests} == {0}


@pytest.mark.browser
def test_keys_turn_the_dial_and_the_request_follows(opened: Opener) -> None:
    with serving() as model, opened(model) as page:
        page.locator("#one").click()
        handle = page.get_by_role("slider", name="Direction A")
        handle.focus()
        for key, angle in {"ArrowLeft": -1, "PageDown": -11, "ArrowUp": -10, "Home": -45, "End": 0}.items():
            page.keyboard.press(key)
            expect(handle).to_have_attribute("aria-valuenow", str(angle))
        for _ in range(3):
            page.keyboard.press("PageDown")
        expect(handle).to_have_attribute("aria-valuetext", "\u221230\u00b0: helpfulness*0.87 - verbosity*0.50")
        ask(page, "explain tea.")
        whole(page, 1)
    assert model.preferences() == [{"helpfulness": 0.866025, "verbosity": -0.5}]


@pytest.mark.browser
def test_a_hand_turns_the_dial(opened: Opener) -> None:
    with serving() as model, opened(model) as page:
        knobs = [page.locator(f".handle.{side} .knob").bounding_box() for side in "AB"]
        a, b = [(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2) for box in knobs]
        hub = page.locator("#arc .hub").bounding_box()
        centre = (hub["x"] + hub["width"] / 2, hub["y"] + hub["height"] / 2)
        radius = a[0] - centre[0]
        page.mouse.move(*a)
        page.mouse.down()
        for angle in (10, 20, 30):  # clockwise, from 0 to -30 degrees
            page.mouse.move(
                centre[0] + radius * (1 - (angle / 57.3) ** 2 / 2), centre[1] + radius * (angle / 57.3) * 0.955
            )
        page.mouse.up()
        handle = page.get_by_role("slider", name="Direction A")
        expect(handle).to_have_attribute("aria-valuenow", re.compile(r"-(29|30)"))
        expect(page.get_by_role("slider", name="Direction B")).to_have_attribute("aria-valuenow", "-45")
        page.mouse.click(b[0] - 22, b[1] + 17)  # the arc itself, past B: the nearer handle comes
        expect(page.get_by_role("slider", name="Direction B")).to_have_attribute("aria-valuenow", re.compile("-5[0-9]"))


@pytest.mark.browser
def test_a_finger_turns_the_dial_and_does_not_scroll_the_page(opened: Opener) -> None:
    with serving() as model, opened(model, size=(390, 500), has_touch=True, is_mobile=True) as page:
        box = page.locator(".handle.B .knob").bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        session = page.context.new_cdp_session(page)
        session.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
        for step in range(1, 9):  # upwards along the arc
            point = {"x": x + 3 * step, "y": y - 8 * step}
            session.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [point]})
        session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        handle = page.get_by_role("slider", name="Direction B")
        expect(handle).to_have_attribute("aria-valuenow", re.compile(r"^-(1[0-9]|2[0-9])$"))
        assert page.evaluate("scrollY") == 0


@pytest.mark.browser
def test_beyond_the_trained_range_the_page_warns(opened: Opener) -> None:
    with serving(Model(warning="-60 degrees lies outside")) as model, opened(model) as page:
        warning = page.locator(".reading.B .warning")
        expect(warning).to_be_hidden()
        page.get_by_role("slider", name="Direction B").focus()
        page.keyboard.press("PageDown")
        expect(warning).to_contain_text("Outside the range this model was trained on, \u221245\u00b0 to 0\u00b0")
        expect(page.locator(".reading.A .warning")).to_be_hidden()
        expect(page.locator("#front-note")).to_have_text("B not measured there")
        ask(page, "explain tea.")
        whole(page)
        expect(page.locator("article.B .warning")).to_have_text("-60 degrees lies outside")
        page.get_by_label("Direction B in degrees").fill("170")  # far beyond: the whole circle is drawn
        page.keyboard.press("Enter")
        expect(page.get_by_role("slider", name="Direction B")).to_have_attribute(
            "aria-valuenow", re.compile("-190|170")
        )


@pytest.mark.browser
def test_the_address_restores_directions_question_and_settings(opened: Opener) -> None:
    with serving() as model:
        with opened(model) as page:
            page.locator("#settings summary").click()
            page.get_by_label("Seed").fill("7")
            page.get_by_label("Temperature").fill("0")
            page.get_by_label("Direction A in degrees").fill("-12.5")
            ask(page, "is <b>tea</b> & iron = 50% #hot?")
            whole(page)
            address = page.evaluate("location.hash")
        with opened(model, address) as page:
            expect(page.locator("#question")).to_have_value("is <b>tea</b> & iron = 50% #hot?")
            expect(page.get_by_label("Direction A in degrees")).to_have_value("-12.5")
            expect(page.get_by_label("Direction B in degrees")).to_have_value("-45")
            assert len(model.requests) == 2  # a link asks nothing by itself
            page.locator("#send").click()
            whole(page)
    first, again = model.requests[:2], model.requests[2:]
    ordered = [sorted(some, key=lambda request: request["preference"]["verbosity"]) for some in (first, again)]
    assert ordered[0] == ordered[1]
    assert ordered[0][1]["seed"] == 7
    assert ordered[0][1]["temperature"] == 0
    assert ordered[0][1]["preference"] == {"helpfulness": 0.976296, "verbosity": -0.21644}


@pytest.mark.browser
def test_the_best_of_several_is_chosen_under_the_dial_and_restored_by_the_address(opened: Opener) -> None:
    chosen = {
        "drawn": 4,
        "angle_spread": 10.0,
        "drawn_at": {"helpfulness": 0.996195, "verbosity": -0.087156},
        "rewards": {"helpfulness": 70.0, "verbosity": 30.0},
        "value": 70.0,
        "mean_value": 64.2,
    }
    with serving(Model(chosen=chosen)) as model, opened(model, "#sides=1") as page:
        choice = page.get_by_label("Show")
        assert choice.locator("option").all_inner_texts() == [
            *("one answer", "the best of 2", "the best of 4", "the best of 8", "the best of 16"),
        ]
        expect(page.locator("#best-note")).to_have_text("")
        choice.focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowDown")
        expect(choice).to_have_value("4")
        expect(page.locator("#best-note")).to_contain_text("it comes when all are drawn")
        ask(page, "explain tea.")
        whole(page, 1)
        expect(page.locator(".choice")).to_have_text("the best of 4, drawn at \u22125\u00b0; the mean of all is 64.2")
        expect(page.locator(".reward output").first).to_have_text("70.0")  # by the one who chose: else 90
        address = page.evaluate("location.hash")
        assert "best=4" in address
        for named, n in {"#best=3": "3", "#best=99": "16", "#best=x": "1", address: "4", "": "1"}.items():
            page.evaluate("named => (location.hash = named)", named)
            expect(choice).to_have_value(n)
    assert [request["best_of"] for request in model.requests] == [4]


@pytest.mark.browser
def test_a_few_choices_find_a_direction_and_the_dial_turns_to_it(opened: Opener) -> None:
    front = ({"helpfulness": 1.0, "verbosity": 0.0}, {"helpfulness": 0.8, "verbosity": -0.6})
    reply = {"preference": front[1], "angle": -36.9, "within": 7.5, "words": "in words", "next": front}
    with serving(Model(taste=reply)) as model, opened(model) as page:
        ask(page, "tea?")
        whole(page)
        page.locator("article.B .prefer").click()
        expect(page.locator("#taste-words")).to_contain_text("after 1 choice: in words")
        expect(page.locator("article.A .prefer")).to_be_disabled()
        (sent,) = model.choices
        assert sent["choices"][0]["preferred"]["verbosity"] != sent["choices"][0]["other"]["verbosity"]
        page.locator("#taste-use").click()
        ask(page, "iron?")
        whole(page, 3)
        assert model.preferences()[-1] == pytest.approx(front[1])


@pytest.mark.browser
@pytest.mark.parametrize("objectives", [("helpfulness", "verbosity"), ("helpfulness", "honesty", "verbosity")])
def test_a_choice_turns_both_sides_to_the_next_question_and_can_be_taken_back(
    opened: Opener, objectives: tuple[str, ...]
) -> None:
    own, *compared = [dict(zip(objectives, v, strict=False)) for v in ((0.8, -0.6, 0), (0.6, -0.8, 0), (1.0, 0, 0))]
    reply = {"preference": own, "angle": None, "within": 7.5, "words": "in words", "next": compared}
    arc = (-45.0, 0.0) if len(objectives) == 2 else None
    differing = Model(
        objectives=objectives, arc=arc, front=None, taste=reply, answer=lambda body: f"tea at {body['preference']}"
    )
    with serving(differing) as model, opened(model) as page:
        ask(page, "tea?")
        whole(page)
        expect(page.locator("#taste-ask")).to_be_visible()
        button = page.get_by_role("button", name="I prefer this one: answer B")
        button.focus()
        page.keyboard.press("Enter")
        expect(page.locator("#taste-words")).to_contain_text("in words")
        expect(button).to_be_focused()
        expect(page.locator("#taste-ask")).to_be_hidden()
        expect(page.locator("#arc .own")).to_have_count(1 if arc else 0)
        ask(page, "iron?")
        whole(page, 4)
        asked = sorted(model.preferences()[2:], key=lambda weights: weights["helpfulness"])
        assert asked == [pytest.approx(weights) for weights in compared]
        page.locator(".turn").first.locator("article.B .prefer").press("Enter")  # once more: taken back
        expect(page.locator("#taste-words")).to_be_hidden()
        expect(page.locator("#arc .own")).to_have_count(0)
        page.locator(".turn").first.locator("article.A .prefer").click()
        expect(page.locator("#taste-words")).to_contain_text("after 1 choice:")
        page.locator(".turn").last.locator("article.A .prefer").click()
        expect(page.locator("#taste-words")).to_contain_text("after 2 choices:")
        page.locator("#again").click()  # answered anew, it is to be chosen anew
        whole(page, 4)
        expect(page.locator("#taste-words")).to_contain_text("after 1 choice:")
        page.get_by_role("button", name="Start over").click()
        expect(page.locator("#taste-words")).to_be_hidden()
        expect(page.locator(".prefer[aria-pressed=true]")).to_have_count(0)
    assert [len(body["choices"]) for body in model.choices] == [1, 1, 2, 1]


@pytest.mark.browser
def test_without_a_reward_model_or_a_difference_nothing_is_to_be_chosen(opened: Opener) -> None:
    with serving(Model(rewards=False)) as model, opened(model) as page:
        ask(page, "tea?")
        expect(page.locator("#taste-ask")).to_contain_text("dpa serve --reward")
        expect(page.locator(".prefer:visible")).to_have_count(0)
    with serving(Model(answer=lambda _: "tea is hot.")) as model, opened(model) as page:
        ask(page, "tea?")
        whole(page)
        expect(page.locator("#taste")).to_be_hidden()
        expect(page.locator(".prefer:visible")).to_have_count(0)


@pytest.mark.browser
def test_without_a_reward_model_the_best_of_several_cannot_be_asked_for_and_the_page_says_why(opened: Opener) -> None:
    with serving(Model(rewards=False)) as model, opened(model, "#best=4&sides=1") as page:
        expect(page.get_by_label("Show")).to_be_disabled()
        expect(page.locator("#best-note")).to_have_text("The best of several needs a reward model: dpa serve --reward")
        ask(page, "explain tea.")
        expect(shown(page, "A")).to_have_text(re.compile(r" in rain\.$"))
    assert "best_of" not in model.requests[0]


@pytest.mark.browser
@pytest.mark.parametrize("objectives", [("helpfulness", "verbosity"), ("helpfulness", "honesty", "verbosity")])
def test_on_a_phone_nothing_scrolls_sideways(opened: Opener, objectives: tuple[str, ...]) -> None:
    long = "antidisestablishmentarianism" * 6
    model = Model(objectives=objectives, arc=None, answer=lambda _: f"{long} and so on")
    with serving(model), opened(model, size=(320, 640), has_touch=True, is_mobile=True) as page:
        ask(page, f"what is {long}?")
        whole(page)
        page.locator("#settings summary").click()
        assert page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [320, 320]
        boxes = [page.locator(f"article.{side}").bounding_box() for side in "AB"]
        small = page.evaluate(
            "[...document.querySelectorAll('button, select')]"
            ".filter(one => one.offsetHeight && one.offsetHeight < 40).map(one => one.id)"
        )
    assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]  # one column
    assert small == []


@pytest.mark.browser
def test_an_answer_that_looks_like_html_is_shown_as_text(opened: Opener) -> None:
    evil = "<img src=x onerror=\"document.title='owned'\"> <script>document.title='owned'</script> <b>bold</b>"
    with serving(Model(answer=lambda _: evil)) as model, opened(model) as page:
        ask(page, "<i>explain</i> tea.")
        whole(page)
        expect(shown(page, "A")).to_have_text(evil)
        expect(page.locator(".question")).to_have_text("<i>explain</i> tea.")
        assert page.locator("#turns img, #turns script, #turns i, .text b").count() == 0
        assert page.title() == "world \u00b7 dpalign"


@pytest.mark.browser
def test_a_server_with_a_key_asks_for_it_and_the_page_keeps_it_for_the_tab_alone(opened: Opener) -> None:
    with serving(Model(key="sesame")) as model, opened(model, "#a=-20&q=explain+tea.") as page:
        expect(page.get_by_label("API key")).to_be_focused()
        expect(page.locator("#problem")).to_have_text("This server asks for an API key.")
        page.keyboard.type("guess")
        page.keyboard.press("Enter")
        expect(page.locator("#key-note")).to_contain_text("refused this key")
        page.get_by_label("API key").fill("sesame")
        page.keyboard.press("Enter")
        expect(page.get_by_label("Direction A in degrees")).to_have_value("-20")
        expect(page.locator("#problem")).to_be_hidden()
        page.locator("#send").click()
        whole(page)
        model.key = "another"  # a key that is refused later gives the question back
        ask(page, "explain iron.")
        expect(page.locator("#problem")).to_be_visible()
        expect(page.locator("#question")).to_have_value("explain iron.")
        page.get_by_label("API key").fill("another")
        page.keyboard.press("Enter")
        whole(page, 4)
        assert "sesame" not in page.url
        kept = page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]")
    assert kept == [0, "", 1]


@pytest.mark.browser
def test_stop_ends_both_answers_and_frees_the_server(opened: Opener) -> None:
    with serving(Model(hold=threading.Event())) as model, opened(model) as page:
        ask(page, "explain tea.")
        expect(shown(page, "B")).to_have_text("tea")
        page.locator("#stop").click()
        for side in "AB":
            expect(page.locator(f"article.{side} header > span").last).to_have_text("1 word, stopped")
        expect(page.locator("#send")).to_be_visible()
        for _ in range(100):
            if model.gone == 2:
                break
            page.wait_for_timeout(50)
    assert model.gone == 2


@pytest.mark.browser
def test_each_side_goes_on_with_its_own_answer(opened: Opener) -> None:
    with serving() as model, opened(model) as page:
        ask(page, "explain tea.")
        whole(page)
        ask(page, "and iron?")
        whole(page, 4)
    for request in model.requests[2:]:
        before = next(one for one in model.requests[:2] if one["preference"] == request["preference"])
        said = model.answer(before)
        assert [message["content"] for message in request["messages"]] == ["explain tea.", said, "and iron?"]


@pytest.mark.browser
def test_as_the_dial_turns_the_last_question_is_answered_again(opened: Opener) -> None:
    with serving() as model, opened(model) as page:
        ask(page, "explain tea.")
        whole(page)
        page.locator("#settings summary").click()
        page.get_by_label("Answer again as the dial turns").check()
        page.get_by_role("slider", name="Direction B").focus()
        page.keyboard.press("End")
        expect(shown(page, "B")).to_have_text(re.compile(r" in rain\.$"))
        expect(page.locator(".turn")).to_have_count(1)
    assert len(model.requests) == 4


@pytest.mark.browser
def test_a_button_turns_a_side_to_answers_of_a_length_that_is_on_record(opened: Opener) -> None:
    levels = {
        name: {"angle": angle, "words": 10.0} for name, angle in (("low", -41.4), ("medium", -22.5), ("high", -7))
    }
    with serving(Model(verbosity=levels)) as model, opened(model) as page:
        long, short = (page.get_by_role("button", name=name) for name in ("A: long answers", "B: short answers"))
        short.click()
        expect(page.get_by_role("slider", name="Direction B")).to_have_attribute("aria-valuenow", "-41.4")
        expect(short).to_have_attribute("aria-pressed", "true")
        expect(long).to_have_attribute("aria-pressed", "false")
        ask(page, "explain tea.")
        whole(page)
    assert {"helpfulness": 0.750111, "verbosity": -0.661312} in model.preferences()
    with serving() as model, opened(model) as page:
        expect(page.get_by_role("button", name="B: short answers")).to_have_count(0)


@pytest.mark.browser
def test_more_objectives_have_sliders_and_zero_is_no_direction(opened: Opener) -> None:
    model = Model(objectives=("helpfulness", "honesty", "verbosity"), arc=None, front=None)
    with serving(model), opened(model, "#a=helpfulness:0.5,honesty:0.5,verbosity:-1&sides=1") as page:
        expect(page.locator("#arc")).to_be_hidden()
        expect(page.locator("#front")).to_be_hidden()
        expect(page.locator(".reading.A .formula")).to_have_text(
            "helpfulness*0.41 + honesty*0.41 - verbosity*0.82", use_inner_text=True
        )
        for name in model.objectives:
            page.get_by_label(f"A: {name}").fill("0")
        expect(page.locator("#send")).to_be_disabled()
        expect(page.locator(".reading.A .warning")).to_contain_text("no direction")
        page.get_by_label("A: honesty").fill("-0.5")
        ask(page, "explain tea.")
        whole(page, 1)
        page.get_by_label("A: honesty").fill("0")
        page.locator("#again").click()  # nowhere to ask it at: the answer stays
        expect(page.locator(".turn")).to_have_count(1)
        page.get_by_label("A: verbosity").fill("-1")
        page.locator("#again").click()
        whole(page, 1)
    assert model.preferences() == [
        {"helpfulness": 0, "honesty": -1, "verbosity": 0},
        {"helpfulness": 0, "honesty": 0, "verbosity": -1},
    ]


@pytest.mark.browser
def test_sliders_keep_one_length_and_warn_beyond_the_trained_cone(opened: Opener) -> None:
    """As one is moved the others give way in their ratio; back at its place they are as they were."""
    cone = {"distribution": "cone", "center": [2, -3, 1], "angle": 15.0}
    model = Model(objectives=("helpfulness", "verbosity", "complexity"), arc=None, trained=cone, front=None)
    with serving(model), opened(model) as page:
        for side, weights in {"A": ["0.73", "\u22120.64", "0.21"], "B": ["0.33", "\u22120.93", "0.17"]}.items():
            expect(page.locator(f"fieldset.{side} output")).to_have_text(weights)  # the rim, towards an end each
            expect(page.locator(f".reading.{side} .warning")).to_be_hidden()
        slider = page.get_by_label("A: helpfulness")
        slider.evaluate("one => { one.value = 1; one.dispatchEvent(new Event('input')); }")  # a hand still holds it
        expect(page.locator("fieldset.A output")).to_have_text(["1.00", "0.00", "0.00"])
        expect(page.locator(".reading.A .warning")).to_contain_text("within 15\u00b0 of helpfulness*0.53")
        slider.fill("0.6")
        expect(page.locator("fieldset.A output")).to_have_text(["0.60", "\u22120.76", "0.25"])
        assert page.get_by_label("A: verbosity").input_value() == "-0.76"
        expect(page.locator(".reading.A .warning")).to_be_hidden()
        ask(page, "explain tea.")
        whole(page)
        address = page.evaluate("location.hash")
    asked = max(model.preferences(), key=lambda weights: weights["helpfulness"])
    assert sum(w * w for w in asked.values()) == pytest.approx(1, abs=1e-5)
    assert asked["verbosity"] / asked["complexity"] == pytest.approx(-3, abs=0.01)
    assert "helpfulness%3A0.6%2C" in address


@pytest.mark.browser
def test_what_goes_wrong_is_said_where_it_happens(opened: Opener) -> None:
    with serving(Model(breaks=True, rewards=False)) as model, opened(model) as page:
        ask(page, "explain tea.")
        expect(page.locator("article.A .warning")).to_have_text("The answer broke off: the connection was lost.")
        expect(shown(page, "A")).to_have_text("tea")
        expect(page.locator(".reward")).to_have_count(0)
    with serving(Model(dial=False)) as model, opened(model) as page:
        expect(page.locator("#problem")).to_have_text("not found")


@pytest.mark.browser
def test_the_reader_stays_with_the_end_of_an_answer_or_where_they_scrolled(opened: Opener) -> None:
    with serving(Model(answer=lambda _: "tea is hot. " * 300, pause=0.002)) as model, opened(model) as page:
        ask(page, "explain tea at length.")
        expect(page.locator("article.A header > span").last).to_have_text(re.compile("[3-8][0-9][0-9] words"))
        page.mouse.move(900, 300)
        page.mouse.wheel(0, -400)
        page.wait_for_timeout(150)
        there = page.evaluate("scrollY")
        whole(page)
        assert page.evaluate("scrollY") == there
        model.pause = 0
        ask(page, "and again.")
        whole(page, 4)
        page.wait_for_timeout(200)
        ends = [page.locator(selector).bounding_box() for selector in (".turn:last-child article.A", "#ask")]
    assert ends[0]["y"] + ends[0]["height"] <= ends[1]["y"] + 1


@pytest.mark.browser
def test_a_model_of_the_small_world_says_what_it_knows_and_offers_questions(opened: Opener) -> None:
    asked = ("explain fox and tea.", "name owl.")
    with serving(Model(note="It knows 32 things.", questions=asked)) as model, opened(model, "#sides=1") as page:
        expect(page.locator("#note")).to_have_text("It knows 32 things.")
        expect(page.get_by_label("Your question")).to_have_attribute("placeholder", re.compile(asked[0]))
        page.get_by_role("button", name=asked[1]).click()
        whole(page, 1)
        expect(page.get_by_role("button", name=asked[0])).to_be_hidden()
    assert [request["messages"][-1]["content"] for request in model.requests] == [asked[1]]
    with serving() as model, opened(model) as page:
        expect(page.locator("#note")).to_be_hidden()
        expect(page.locator("#questions button")).to_have_count(0)


@pytest.mark.browser
def test_on_the_real_server_the_model_reads_what_its_template_writes_at_five_directions(
    opened: Opener, tmp_path: Path
) -> None:
    pytest.importorskip("fastapi", reason="the server needs the extra dpalign[serve]")
    pytest.importorskip("transformers", reason="a model needs the extra dpalign[train]")
    from transformers import AutoTokenizer

    import api_server

    folder = api_server.write_policy(tmp_path / "mine")
    tokens = AutoTokenizer.from_pretrained(folder)
    angles = (0.0, -11.25, -22.5, -33.75, -45.0)
    with (
        api_server.serving(folder, reward=True, key="sesame") as running,
        running.prompts_read() as read,
        opened(Model(url=running.url, key="sesame"), "#sides=1&max=12") as page,
    ):
        page.get_by_label("API key").fill("sesame")
        page.keyboard.press("Enter")
        page.wait_for_selector("#send:enabled")
        for i, angle in enumerate(angles):
            page.get_by_label("Direction A in degrees").fill(str(angle))
            ask(page, "explain fox, tea and iron.")
            whole(page, i + 1)
            expect(page.locator(".reward output").first).to_have_text(re.compile(r"^\d+\.\d$"))
    chat = [{"role": "user", "content": "explain fox, tea and iron."}]
    expected = [
        tokens.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, angle=angle) for angle in angles
    ]
    assert read == [tokens(text, add_special_tokens=False)["input_ids"] for text in expected]
    assert "helpfulness*71 verbosity*-71" in expected[-1]


def test_the_page_is_installed_with_the_package() -> None:
    names = {entry.name for entry in PAGE.iterdir()}
    assert {"index.html", "page.css", "page.js"} <= names
    linked = set(re.findall(r'(?:src|href)="([\w.]+)"', (PAGE / "index.html").read_text("utf-8")))
    for name in [name for name in names if name.endswith(".js")]:
        linked |= set(re.findall(r'from "\./([\w.]+)"', (PAGE / name).read_text("utf-8")))
    assert {*linked, "index.html"} == names
    assert all(Path(name).suffix in (".html", ".css", ".js") for name in names)
