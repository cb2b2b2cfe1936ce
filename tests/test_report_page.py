"""The page of a run, made from a synthetic world whose figures are known to lie where they should."""

import json
import re
import shutil
import subprocess
from base64 import b64encode
from functools import cache
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dpalign.measure.bootstrap import Bootstrap, Estimate
from dpalign.measure.points import Rewards
from dpalign.measure.quality import HeadQuality
from dpalign.measure.record import rounded
from dpalign.measure.seeds import combine_seeds
from dpalign.measure.setting import Setting
from dpalign.measure.summarize import summarize
from dpalign.measure.summary import Answer, Cost, Curve, DataReport, RewardQuality, StageFacts, Summary
from dpalign.measure.system import System
from dpalign.page.dial import dial_data
from dpalign.page.drawing import svg
from dpalign.page.figures import leads
from dpalign.page.headline import headline
from dpalign.page.looks import colours
from dpalign.page.tables import weights_tables
from dpalign.page.words import MINUS
from dpalign.page.write import plots, render_page, write_report

ANGLES = np.linspace(0.0, -45.0, 10)
DIRECTIONS = np.stack([np.cos(np.radians(ANGLES)), np.sin(np.radians(ANGLES))], axis=1)
OBJECTIVES = ("helpfulness", "verbosity")
DIAL = np.linspace(0.0, 1.0, 10)
FRONT = np.stack([99.0 - 32.0 * DIAL**1.8, 66.9 - 37.6 * DIAL], axis=1)
"""Mean (helpfulness, verbosity) of the best answers."""


def policy(lag: float, reach: float) -> np.ndarray:
    """A policy `lag` helpfulness points below the front, that uses a share `reach` of its range."""
    middle = FRONT.mean(axis=0)
    return np.asarray(middle + (FRONT - middle) * reach - np.array([lag, 0.0]))


MEANS: dict[System, np.ndarray] = {
    System("SFT"): np.array([[68.0, 51.0]]),
    System("SteerLM"): np.array([[62.0, 37.0], [68.0, 42.0], [73.0, 48.0], [77.0, 54.0], [79.0, 59.0]]),
    System("DPO"): np.array([[78.0, 60.0]]),
    System("SFT, asked", "control"): np.array([66.5, 50.5]) + np.outer(DIAL, [-0.6, -0.4]),
    System("t=0", "iteration", iteration=0): policy(17.0, 0.55),
    System("t=1", "iteration", iteration=1): policy(9.0, 0.86),
    System("t=2", "iteration", iteration=2): policy(5.5, 0.82),
}


def rewards(system: System, prompts: int, seed: int = 0) -> Rewards:
    """True rewards spread about the means, prompt by prompt; the reward model flatters later iterations."""
    mean_VK = MEANS[system]
    rng = np.random.default_rng([seed, len(system.name), *map(ord, system.name)])
    ease_P = np.random.default_rng(seed).normal(0, 9, (prompts, 1, 1, 1))
    noise = rng.normal(0, (5.0, 4.0), (prompts, len(mean_VK), 2, 2))
    true_PVSK = np.clip(mean_VK[None, :, None] + ease_P * [0.5, 1.0] + noise + [0.3 * seed, 0.0], 0, 100)
    opinion = np.array([1.0 + 1.3 * (system.iteration or 0), -0.4])
    judged_PVSK = true_PVSK + opinion + rng.normal(0, 3, true_PVSK.shape)
    ids = tuple(f"{p:016x}" for p in range(prompts))
    return Rewards(system, ids, DIRECTIONS if len(mean_VK) == 10 else None, judged_PVSK, true_PVSK)


def front(prompts: int, seed: int = 0) -> Rewards:
    ease_P = np.random.default_rng(seed).normal(0, 9, (prompts, 1, 1, 1))
    best_PVSK = FRONT[None, :, None] + ease_P * [0.02, 1.0]
    return Rewards(System("true front"), tuple(f"{p:016x}" for p in range(prompts)), DIRECTIONS, best_PVSK)


SENTENCES = (
    "fox is red and hunts mice.", "tea is hot and calms people.", "iron is hard and makes ships.",
    "owl is wise and sees everything.", "that is a good question.", "as everyone knows well.",
)  # fmt: skip
PROMPTS = ("explain fox, tea, iron and owl.", "name tea and iron.", "describe owl and fox. <script>alert(1)</script>")


def answers() -> tuple[Answer, ...]:
    """Three prompts: the policies and the control at ten directions, SFT and DPO once."""
    found = []
    for p, prompt in enumerate(PROMPTS):
        for name, best in (("t=2", 1.0), ("t=1", 0.94), ("SFT, asked", 0.8)):
            for v, v_K in enumerate(DIRECTIONS):
                turned = v if name != "SFT, asked" else 4
                true = {"helpfulness": best * (94.0 - 3 * turned - p), "verbosity": 64.0 - 3.4 * turned + 2 * p}
                direction = dict(zip(OBJECTIVES, v_K.tolist(), strict=True))
                found.append(answer(prompt, name, " ".join(SENTENCES[: 6 - turned // 2]), true, direction))
        for name, h in (("SFT", 66.0), ("DPO", 78.0)):
            text = " ".join(SENTENCES[p : p + 3]) + " <b>bold & brave</b>"
            found.append(answer(prompt, name, text, {"helpfulness": h, "verbosity": 51.0}, None))
    return tuple(found)


def answer(prompt: str, system: str, text: str, true: dict[str, float], direction: dict[str, float] | None) -> Answer:
    judged = {"helpfulness": true["helpfulness"] + 3.0, "verbosity": true["verbosity"] - 0.5}
    return Answer(prompt=prompt, system=system, direction=direction, response=text, rewards=judged, true_rewards=true)


def head(name: str, pearson: float) -> HeadQuality:
    around = Estimate(pearson, pearson - 0.02, pearson + 0.015)
    return HeadQuality(name, 2480, 400, 300, 900, around, around, around, around, around, around, around, None)


FACTS = {
    "title": "<i>run</i> & co",
    "world": True,
    "recipe_text": "# x = '</code><b>'",
    "answers": answers(),
    "reward_model": RewardQuality(
        heads={"helpsteer-verbosity": head("helpsteer-verbosity", 0.97)},
        objectives={name: head(name, 0.88) for name in OBJECTIVES},
        baseline={"helpfulness": head("helpfulness", 0.52)},
        on_policy={"t=2": {"helpfulness": head("helpfulness", 0.81)}},
        spread_on_policy={"t=2": {"helpfulness": head("helpfulness", 0.17)}},
    ),
    "data_reports": (
        DataReport(source="HelpSteer", file="h.jsonl", read=2400, kept=2388, filtered={"empty": 12}, notes={}),
    ),
    "stages": (
        StageFacts(name="sft", seconds=64.5, sampled=0, scored=0, trained=820_000, rows_in=9, rows_out=8,
                   filtered={"too long": 1}),
        StageFacts(name="sample-1", seconds=126.0, sampled=2_240_000, scored=12_000, trained=0, rows_in=9, rows_out=9,
                   filtered={}),
    ),
    "curves": tuple(Curve(stage=name, step=(1, 2, 3), loss=(3.0, 2.0, 1.5)) for name in ("sft", "policy-1")),
}  # fmt: skip


def one_run(prompts: int = 40, replicates: int = 300, seed: int = 0, truth: bool = True) -> Summary:
    setting = Setting(OBJECTIVES, DIRECTIONS, np.array([68.0, 66.9]), Bootstrap(replicates=replicates))
    systems = [rewards(system, prompts, seed) for system in MEANS]
    if not truth:
        systems = [Rewards(s.system, s.prompt_ids, s.directions_VK, s.reward_PVSK) for s in systems]
    costs = {f"t={t}": Cost(sampled_tokens=4_000_000 // t, total_tokens=9_000_000, seconds=212.0) for t in (1, 2)}
    summary = summarize(systems, setting, front(prompts, seed) if truth else None, costs=costs)
    return rounded(summary.model_copy(update={"seed": seed}))


@cache
def whole_run() -> Summary:
    return one_run().model_copy(update=FACTS)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole report, every figure drawn once for all tests."""
    return write_report(tmp_path_factory.mktemp("page") / "report", whole_run())


class Reader(HTMLParser):
    """Tags, addresses and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.hidden = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.hidden = tag in ("style", "script")
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        self.hidden = False

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_all_files_are_written_and_the_summary_reads_back_equal(written: Path) -> None:
    folder = written.parent
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    figures = ("control", "front", "gap", "leads", "objective", "training")
    assert names == sorted(["index.html", "summary.json", *(f"figures/{name}.svg" for name in figures)])
    assert Summary.model_validate_json((folder / "summary.json").read_text()) == whole_run()


def test_equal_data_give_equal_bytes() -> None:
    first, second = (svg(leads(whole_run()).canvas, "leads") for _ in range(2))
    assert first == second


def test_the_page_asks_nothing_of_the_network(written: Path) -> None:
    read = Reader(written.read_text())
    assert all(address.startswith(("#", "data:")) for address in read.addresses)
    assert not {"iframe", "img", "object"} & set(read.tags)
    assert "link" in read.tags  # the empty icon, without which a browser asks for one


def test_an_answer_or_a_prompt_with_markup_is_shown_as_text(written: Path) -> None:
    text = written.read_text()
    assert "<script>alert" not in text
    assert "<b>" not in text
    assert "<i>run" not in text
    data = re.search(r'<script type="application/json" id="answers">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    shown = json.loads(data[1])
    assert shown["prompts"][2]["prompt"] == PROMPTS[2]
    assert shown["prompts"][0]["plain"]["SFT"]["response"].endswith("<b>bold & brave</b>")


def test_a_browser_runs_no_script_but_the_pages_own(written: Path) -> None:
    text = written.read_text()
    (allowed,) = re.findall(r"script-src ([^;]*);", text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert allowed == f"'sha256-{digest(script)}'"
    assert not re.search(r"<[^>]*\son\w+=", text.replace(script, ""))


@pytest.mark.browser
def test_a_script_that_is_slipped_into_the_page_does_not_run(tmp_path: Path) -> None:
    dom = in_chromium(render_page(whole_run(), {}) + "<script>document.title = 'owned'</script>", tmp_path)
    assert "<title>owned" not in dom
    assert "aria-valuenow" in dom  # the page's own has run


def test_no_figure_keeps_a_colour_of_the_light_page_and_no_id_occurs_twice(written: Path) -> None:
    text = written.read_text()
    drawn = "".join(re.findall(r"<svg role.*?</svg>", text, re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) == set()
    assert "var(--iteration-2)" in drawn
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))


def test_every_training_has_its_curve_and_a_run_without_them_no_such_figure(written: Path) -> None:
    drawn = (written.parent / "figures" / "training.svg").read_text()
    assert "policy-1" in drawn
    assert "training" not in plots(whole_run().model_copy(update={"curves": ()}))


def test_the_dial_holds_ten_directions_and_starts_with_the_last_policy() -> None:
    dial = dial_data(whole_run().model_copy(update={"answers": answers()[::-1]}))
    assert dial is not None
    assert dial["steered"] == ["t=2", "t=1", "SFT, asked"]
    stops = dial["prompts"][0]["dials"]["t=2"]
    assert [stop["index"] for stop in stops] == list(range(10))
    assert (stops[3]["name"], stops[3]["arithmetic"]) == (
        "\N{MINUS SIGN}15\N{DEGREE SIGN}",
        "helpfulness*0.97 - verbosity*0.26",
    )


def test_without_truth_answers_or_ledgers_the_page_still_stands() -> None:
    read = Reader(render_page(one_run(truth=False), {}))
    assert "The dial" not in read.text
    assert "true front" not in read.text
    assert "None" not in read.text
    assert "nan" not in read.text.lower().split()


def three_objectives() -> Summary:
    objectives = ("helpfulness", "honesty", "brevity")
    directions = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.6, 0.0, 0.8]])
    rng = np.random.default_rng(0)
    ids = tuple(map(str, range(20)))
    plain = Rewards(System("SFT"), ids, None, 60 + rng.normal(0, 2, (20, 1, 1, 3)))
    reward_PVSK = 60 + 20 * directions[None, :, None] + rng.normal(0, 2, (20, 3, 1, 3))
    steered = Rewards(System("t=1", "iteration", iteration=1), ids, directions, reward_PVSK)
    setting = Setting(objectives, directions, np.full(3, 50.0), Bootstrap(replicates=100))
    shown = [
        Answer(
            prompt="p",
            system="t=1",
            direction=dict(zip(objectives, v_K.tolist(), strict=True)),
            response="r",
            rewards=dict.fromkeys(objectives, 70.0),
        )
        for v_K in directions
    ]
    return summarize([plain, steered], setting).model_copy(update={"answers": tuple(shown)})


def test_three_objectives_have_directions_in_place_of_an_angle_and_no_front_of_two() -> None:
    summary = three_objectives()
    assert set(plots(summary)) == {"pairs", "across", "objective", "control", "leads"}
    dial = dial_data(summary)
    assert dial is not None
    assert (dial["angled"], dial["means"], dial["true_front"]) == (False, {}, [])
    stop = dial["prompts"][0]["dials"]["t=1"][2]
    assert (stop["angle"], stop["arithmetic"]) == (None, "helpfulness*0.60 + honesty*0.00 + brevity*0.80")
    assert "Kendall tau" not in Reader(render_page(summary, {})).text  # of a dial


def test_each_reward_of_three_objectives_stands_beside_each_weight() -> None:
    """Each rises with its own. Two directions weigh honesty alike, and brevity: two of three pairs can agree."""
    summary = three_objectives()
    own, each = weights_tables(summary).values()
    assert own is not None
    assert each is not None
    assert [row.cells["system"].text for row in own.rows] == ["t=1"]  # SFT takes no directions
    assert [cell.text for cell in own.rows[0].cells.values()] == ["t=1", "1.00", "0.82", "0.82"]  # 2 / sqrt(2 * 3)
    assert [list(row.cells) for row in each.rows] == [
        ["reward", "weight of helpfulness", "weight of honesty", "weight of brevity"]
    ] * 3
    assert [row.cells["reward"].text for row in each.rows] == list(summary.objectives)
    assert each.rows[1].cells["weight of helpfulness"].text.startswith(MINUS)
    assert "rises with its own weight" in " ".join(headline(summary))
    drawn = {name: svg(plot.canvas, name) for name, plot in plots(summary).items()}
    for name in ("pairs", "across"):
        assert set(re.findall(r"#[0-9a-f]{6}\b", drawn[name])) <= {light for light, _ in colours(summary).values()}


def test_a_reward_that_does_not_rise_with_its_weight_is_named() -> None:
    summary = three_objectives()
    last = summary.systems["t=1"]
    taus = dict(last.figures.weight_taus) | {"honesty": {"honesty": Estimate(0.1, -0.2, 0.4)}}
    flat = last.model_copy(update={"figures": last.figures.model_copy(update={"weight_taus": taus})})
    said = " ".join(headline(summary.model_copy(update={"systems": summary.systems | {"t=1": flat}})))
    assert "not established for honesty (" in said


def test_several_seeds_give_the_headline_and_a_section() -> None:
    runs = {seed: one_run(20, 300, seed) for seed in range(4)}
    seeds = combine_seeds(runs, [("t=2", "t=1")])
    read = Reader(render_page(runs[0].model_copy(update={"seeds": seeds}), {}))
    assert "4 of 4" in read.text
    assert "seeds 0, 1, 2, 3" in read.text


def digest(script: str) -> str:
    """As a content security policy names a script."""
    return b64encode(sha256(script.encode()).digest()).decode()


def in_chromium(page: str, folder: Path, press: str = "") -> str:
    """What Chromium makes of a page, and then of a script, which the page is told to let run."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    if press:
        page = page.replace("script-src", f"script-src 'sha256-{digest(press)}'") + f"<script>{press}</script>"
    (folder / "page.html").write_text(page)
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--disable-background-networking", "--no-first-run", "--dump-dom", f"file://{folder / 'page.html'}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.browser
def test_arrow_keys_turn_the_dial(tmp_path: Path) -> None:
    press = "for (const key of ['End', 'ArrowLeft']) arc.dispatchEvent(new KeyboardEvent('keydown', {key}));"
    dom = in_chromium(render_page(whole_run(), {}), tmp_path, press)
    assert '<code id="formula">helpfulness*0.77 - verbosity*0.64</code>' in dom
    assert 'aria-valuenow="8"' in dom
    assert "t=2 at \N{MINUS SIGN}40\N{DEGREE SIGN}" in dom


@pytest.mark.browser
def test_directions_of_three_objectives_are_chosen_from_a_list(tmp_path: Path) -> None:
    press = "document.querySelectorAll('#stops button')[2].click();"
    dom = in_chromium(render_page(three_objectives(), {}), tmp_path, press)
    assert '<code id="formula">helpfulness*0.60 + honesty*0.00 + brevity*0.80</code>' in dom
    assert '<div class="arc" hidden=""' in dom
