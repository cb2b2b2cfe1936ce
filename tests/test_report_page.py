"""The page of a run, made from a synthetic world whose figures are known to lie where they should."""

import json
import re
import shutil
import subprocess
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpalign.measure.bootstrap import Bootstrap
from dpalign.measure.points import SystemRewards
from dpalign.measure.seeds import combine_seeds
from dpalign.measure.summary import Setting, summarize
from dpalign.page.dial import dial_data
from dpalign.page.drawing import png, svg
from dpalign.page.figures import plots
from dpalign.page.systems import systems_of
from dpalign.page.write import render_page, write_report

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


MEANS: dict[str, tuple[int | None, bool, np.ndarray]] = {
    "SFT": (None, False, np.array([[68.0, 51.0]])),
    "SteerLM": (None, False, np.array([[62.0, 37.0], [68.0, 42.0], [73.0, 48.0], [77.0, 54.0], [79.0, 59.0]])),
    "DPO": (None, False, np.array([[78.0, 60.0]])),
    "SFT given v": (None, True, np.array([66.5, 50.5]) + np.outer(DIAL, [-0.6, -0.4])),
    "t=0": (0, True, policy(17.0, 0.55)),
    "t=1": (1, True, policy(9.0, 0.86)),
    "t=2": (2, True, policy(5.5, 0.82)),
}


def rewards(name: str, prompts: int, seed: int = 0, shift: float = 0.0) -> SystemRewards:
    """True rewards spread about the means, prompt by prompt; the reward model flatters later iterations."""
    iteration, steered, mean_VK = MEANS[name]
    rng = np.random.default_rng([seed, len(name), *map(ord, name)])
    ease_P = np.random.default_rng(seed).normal(0, 9, (prompts, 1, 1, 1))
    noise = rng.normal(0, (5.0, 4.0), (prompts, len(mean_VK), 2, 2))
    true_PVSK = np.clip(mean_VK[None, :, None] + ease_P * [0.5, 1.0] + noise + [shift, 0.0], 0, 100)
    opinion = np.array([1.0 + 1.3 * (iteration or 0), -0.4])
    judged_PVSK = true_PVSK + opinion + rng.normal(0, 3, true_PVSK.shape)
    ids = tuple(f"{p:016x}" for p in range(prompts))
    return SystemRewards(name, iteration, ids, DIRECTIONS if steered else None, judged_PVSK, true_PVSK)


def front(prompts: int, seed: int = 0) -> SystemRewards:
    ease_P = np.random.default_rng(seed).normal(0, 9, (prompts, 1, 1, 1))
    best_PVSK = FRONT[None, :, None] + ease_P * [0.02, 1.0]
    return SystemRewards("true front", None, tuple(f"{p:016x}" for p in range(prompts)), DIRECTIONS, best_PVSK)


def one_run(prompts: int, replicates: int, seed: int = 0, truth: bool = True) -> dict[str, Any]:
    setting = Setting(OBJECTIVES, DIRECTIONS, np.array([68.0, 66.9]), Bootstrap(replicates=replicates))
    systems = [rewards(name, prompts, seed, shift=0.3 * seed) for name in MEANS]
    if not truth:
        systems = [SystemRewards(s.name, s.iteration, s.prompt_ids, s.directions_VK, s.reward_PVSK) for s in systems]
    costs = {f"t={t}": {"sampled_tokens": 4.1e6 / t, "trained_tokens": 1.2e6, "seconds": 212.0} for t in (1, 2)}
    return summarize(systems, setting, front(prompts, seed) if truth else None, costs=costs)


SENTENCES = (
    "fox is red and hunts mice.", "tea is hot and calms people.", "iron is hard and makes ships.",
    "owl is wise and sees everything.", "that is a good question.", "as everyone knows well.",
)  # fmt: skip
PROMPTS = ("explain fox, tea, iron and owl.", "name tea and iron.", "describe owl and fox. <script>alert(1)</script>")


def answers() -> list[dict[str, Any]]:
    """Three prompts: the last policy and the control at ten directions, SFT and DPO once."""
    found: list[dict[str, Any]] = []
    for p, prompt in enumerate(PROMPTS):
        for name, best in (("t=2", 1.0), ("t=1", 0.94), ("SFT given v", 0.8)):
            for v, (angle, v_K) in enumerate(zip(ANGLES, DIRECTIONS, strict=True)):
                turned = v if name != "SFT given v" else 4
                text = " ".join(SENTENCES[: 6 - turned // 2])
                true = {"helpfulness": best * (94.0 - 3 * turned - p), "verbosity": 64.0 - 3.4 * turned + 2 * p}
                found.append(answer(prompt, name, text, true, dict(zip(OBJECTIVES, v_K.tolist(), strict=True)), angle))
        for name, h in (("SFT", 66.0), ("DPO", 78.0)):
            text = " ".join(SENTENCES[p : p + 3]) + " <b>bold & brave</b>"
            found.append(answer(prompt, name, text, {"helpfulness": h, "verbosity": 51.0}, None, None))
    return found


def answer(prompt: str, system: str, text: str, true: dict[str, float], condition: Any, angle: Any) -> dict[str, Any]:
    judged = {"helpfulness": true["helpfulness"] + 3.0, "verbosity": true["verbosity"] - 0.5}
    return {
        "prompt": prompt, "system": system, "iteration": MEANS[system][0], "condition": condition, "angle": angle,
        "response": text, "rewards": judged, "true_rewards": true,
    }  # fmt: skip


def figures(pearson: float) -> dict[str, Any]:
    around = {"value": pearson, "low": pearson - 0.02, "high": pearson + 0.015}
    return {
        "n": 2480, "r2": pearson**2, "pearson": around, "spearman": pearson - 0.01, "length_correlation": 0.41,
        "within_prompt_spearman": pearson - 0.05, "pairwise_accuracy": {"value": 0.88, "low": 0.86, "high": 0.9},
    }  # fmt: skip


QUALITY = {
    "heads": {"helpsteer-helpfulness": figures(0.86), "helpsteer-verbosity": figures(0.97)},
    "objectives": {"helpfulness": figures(0.88), "verbosity": figures(0.97)},
    "on_policy": {"SFT": {"helpfulness": figures(0.87)}, "t=2": {"helpfulness": figures(0.81)}},
    "baseline": {"helpfulness": {"pearson": 0.52}, "verbosity": {"pearson": 0.9}},
}
DATA = [
    {"source": "HelpSteer", "file": "data/helpsteer.jsonl", "read": 2400, "kept": 2388, "filtered": {"empty": 12}},
    {
        "source": "UltraFeedback", "file": "data/ultrafeedback.jsonl", "in": 4800, "out": 4703,
        "filtered": {"rating N/A": 61, "response is NaN": 36}, "notes": {"overall_score repaired": 19},
    },
]  # fmt: skip
STAGES = [
    {
        "name": name, "seconds": seconds, "tokens": {"sampled": sampled, "scored": scored, "trained": trained},
        "counts": {"in": rows, "out": kept, "filtered": {"longer than the context": rows - kept}},
    }
    for name, seconds, sampled, scored, trained, rows, kept in (
        ("data", 3.1, 0, 0, 0, 7200, 7091), ("reward", 141.0, 0, 0, 1_910_000, 6300, 6300),
        ("sft", 64.5, 0, 0, 820_000, 4000, 3988), ("steerlm", 71.2, 0, 0, 910_000, 4703, 4703),
        ("sample-1", 126.0, 2_240_000, 0, 0, 32_000, 32_000), ("score-1", 44.0, 0, 3_100_000, 0, 32_000, 32_000),
        ("finetune-1", 69.0, 0, 0, 1_180_000, 2353, 2353), ("sample-2", 118.0, 1_870_000, 0, 0, 16_000, 16_000),
        ("score-2", 40.0, 0, 2_700_000, 0, 16_000, 16_000), ("finetune-2", 70.0, 0, 0, 1_200_000, 2353, 2353),
        ("evaluate", 95.0, 640_000, 690_000, 0, 300, 300),
    )
]  # fmt: skip


@cache
def small_run(truth: bool = True) -> str:
    """A summary as text, so that no test can change another's."""
    return json.dumps(one_run(40, 300, truth=truth))


def page(summary: dict[str, Any], **changed: Any) -> str:
    given = {
        "answers": answers(), "quality": QUALITY, "data_reports": DATA, "stages": STAGES,
        "recipe_text": "# x = '</code><b>'", "title": "<i>run</i> & co",
    }  # fmt: skip
    return render_page(summary, changed.pop("drawn", {}), **{**given, **changed})


@cache
def whole_page() -> str:
    summary = json.loads(small_run())
    return page(summary, drawn=plots(summary, systems_of(summary)))


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


def test_all_files_are_written_and_none_is_left_half(tmp_path: Path) -> None:
    summary = json.loads(small_run())
    made = write_report(tmp_path / "report", summary, answers=answers(), title="world")
    names = sorted(str(path.relative_to(made.parent)) for path in made.parent.rglob("*") if path.is_file())
    figures = ("control", "front", "gap", "leads", "objective")
    assert names == sorted(
        ["answers.json", "index.html", "summary.json"]
        + [f"figures/{n}.{form}" for n in figures for form in ("png", "svg")]
    )
    assert json.loads((made.parent / "summary.json").read_text()) == summary
    assert len(json.loads((made.parent / "answers.json").read_text())) == len(answers())
    assert (made.parent / "figures/front.png").read_bytes().startswith(b"\x89PNG")


def test_equal_data_give_equal_bytes() -> None:
    summary = json.loads(small_run())
    first, second = (plots(summary, systems_of(summary))["leads"].narrow for _ in range(2))
    assert svg(first, "leads") == svg(second, "leads")
    assert png(first) == png(second)


def test_the_page_asks_nothing_of_the_network() -> None:
    read = Reader(whole_page())
    assert all(address.startswith(("#", "data:")) for address in read.addresses)
    assert not {"iframe", "img", "object"} & set(read.tags)
    assert "link" in read.tags  # the empty icon, without which a browser asks for one


def test_an_answer_or_a_prompt_with_markup_is_shown_as_text() -> None:
    text = whole_page()
    assert "<script>alert" not in text
    assert "<b>" not in text
    assert "<i>run" not in text
    data = re.search(r'<script type="application/json" id="answers">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    shown = json.loads(data[1])
    assert shown["prompts"][2]["prompt"] == PROMPTS[2]
    assert shown["prompts"][0]["plain"]["SFT"]["response"].endswith("<b>bold & brave</b>")


def test_no_figure_keeps_a_colour_of_the_light_page_and_no_id_occurs_twice() -> None:
    text = whole_page()
    drawn = "".join(re.findall(r"<svg role.*?</svg>", text, re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) == set()
    assert "var(--iteration-2)" in drawn
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))


def test_the_dial_holds_ten_directions_and_starts_with_the_last_policy() -> None:
    systems = systems_of(json.loads(small_run()))
    dial = dial_data(answers()[::-1], json.loads(small_run()), systems)
    assert dial is not None
    assert dial["steered"] == ["t=2", "t=1", "SFT given v"]
    stops = dial["prompts"][0]["dials"]["t=2"]
    assert [stop["index"] for stop in stops] == list(range(10))
    assert (stops[3]["name"], stops[3]["arithmetic"]) == (
        "\N{MINUS SIGN}15\N{DEGREE SIGN}",
        "helpfulness*0.97 - verbosity*0.26",
    )


def test_an_answer_without_rewards_is_named() -> None:
    broken = [*answers(), {"prompt": "p", "system": "SFT", "response": "r", "rewards": {"helpfulness": 1.0}}]
    with pytest.raises(ValueError, match=r"answer 96 \(system 'SFT'\): rewards lack 'verbosity'"):
        page(json.loads(small_run()), answers=broken)


def test_without_truth_answers_or_ledgers_the_page_still_stands() -> None:
    summary = json.loads(small_run(truth=False))
    read = Reader(page(summary, answers=[], quality={}, data_reports=[], stages=[], recipe_text=""))
    assert "the truth is not known here" in read.text
    assert "The dial" not in read.text
    assert "true front" not in read.text
    assert "None" not in read.text
    assert "nan" not in read.text.lower().split()


def test_three_objectives_have_directions_in_place_of_an_angle() -> None:
    objectives = ("helpfulness", "honesty", "brevity")
    directions = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.6, 0.0, 0.8]])
    rng = np.random.default_rng(0)
    ids = tuple(map(str, range(20)))
    plain = SystemRewards("SFT", None, ids, None, 60 + rng.normal(0, 2, (20, 1, 1, 3)))
    steered = SystemRewards(
        "t=1", 1, ids, directions, 60 + 20 * directions[None, :, None] + rng.normal(0, 2, (20, 3, 1, 3))
    )
    summary = summarize([plain, steered], Setting(objectives, directions, np.full(3, 50.0), Bootstrap(replicates=100)))
    shown = [
        {
            "prompt": "p", "system": "t=1", "iteration": 1, "angle": None,
            "condition": dict(zip(objectives, v_K.tolist(), strict=True)),
            "response": "r", "rewards": dict.fromkeys(objectives, 70.0), "true_rewards": None,
        }
        for v_K in directions
    ]  # fmt: skip
    text = page(summary, answers=shown, drawn=plots(summary, systems_of(summary)))
    assert "direction 3 of 3" in text
    assert "helpfulness*0.60 + honesty*0.00 + brevity*0.80" in text
    assert "Kendall" not in Reader(text).text


def test_several_seeds_give_the_headline_and_a_section() -> None:
    runs = {seed: one_run(30, 300, seed) for seed in range(4)}
    summary = {**runs[0], "seeds": combine_seeds(runs, [("t=2", "t=1")])}
    read = Reader(page(summary))
    assert (
        "Over 4 seeds of the whole pipeline, t=2 beats SFT, SteerLM and DPO at every one of 10 directions" in read.text
    )
    assert "decided so in 4 of them" in read.text
    assert "seeds 0, 1, 2, 3" in read.text


@pytest.mark.browser
def test_arrow_keys_turn_the_dial(tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    press = "for (const key of ['End', 'ArrowLeft']) arc.dispatchEvent(new KeyboardEvent('keydown', {key}));"
    (tmp_path / "page.html").write_text(page(json.loads(small_run())) + f"<script>{press}</script>")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--disable-background-networking", "--no-first-run", "--dump-dom", f"file://{tmp_path / 'page.html'}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert '<code id="formula">helpfulness*0.77 - verbosity*0.64</code>' in dom
    assert 'aria-valuenow="8"' in dom
    assert "t=2 at \N{MINUS SIGN}40\N{DEGREE SIGN}" in dom
