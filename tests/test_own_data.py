"""A user's own files, each as it usually lies about: read by `dpa data`, or refused with what to do."""

import csv
import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpalign import cli
from dpalign.data.forms import EXAMPLES, form_of, read_example
from dpalign.data.own import points_on, read_own, read_prompts, usual_scale
from dpalign.data.ratings import Rescaling
from dpalign.data.sources import Row
from dpalign.rows import CONVERSATIONS, PAIRS, PROMPTS, RATED, prompt_id, read_rows, user_prompt
from dpalign.stages.data import Data

N = 40
GIVEN = """
[preference]
low = -45.0
[rewards.short]
function = "dpalign.rewards.functions:sentences"
[rewards.words]
function = "dpalign.rewards.functions:words"
"""
"""Rewards that need no labels."""
TRAINED = (
    'heads = ["helpfulness", "brevity"]\n[objectives]\nhelpfulness = ["helpfulness"]\nbrevity = ["brevity"]\n'
    "[preference]\nlow = 0.0\nhigh = 90.0\n"
)


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def ask(i: int) -> str:
    return f"Why is {i} a number?"


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def conversational(folder: Path) -> str:
    """TRL's conversational preference form."""
    rows = [
        {"prompt": [said("user", ask(i))], "chosen": [said("assistant", "Yes.")], "rejected": [said("assistant", "No")]}
        for i in range(N)
    ]
    return write_jsonl(folder / "conversational.jsonl", rows)


def implicit(folder: Path) -> str:
    """Whole chats without a prompt column."""
    chats = [
        {side: [said("system", "Be kind."), said("user", ask(i)), said("assistant", text)] for side, text in SIDES}
        for i in range(N)
    ]
    return write_jsonl(folder / "implicit.jsonl", chats)


SIDES = (("chosen", "Yes."), ("rejected", "No"))


def plain_pairs(folder: Path) -> str:
    return write_jsonl(folder / "pairs.jsonl", [{"prompt": ask(i), **dict(SIDES), "id": i} for i in range(N)])


def prompts_only(folder: Path) -> str:
    return write_jsonl(folder / "prompts.jsonl", [{"prompt": ask(i)} for i in range(N)])


def saved(folder: Path) -> str:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = [{"prompt": ask(i), "completion": "Yes.", "brevity": i % 5} for i in range(N)]
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def saved_splits(folder: Path) -> str:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    mine = datasets.Dataset.from_list([{"prompt": ask(i)} for i in range(N)])
    datasets.DatasetDict({"mine": mine, "other": mine.select([0])}).save_to_disk(str(folder / "splits"))
    return f"{folder}/splits:mine"


def parquet_folder(folder: Path) -> str:
    (folder / "parts").mkdir()
    for part in range(2):
        rows = [{"prompt": ask(i), "response": "Yes.", "brevity": i / 9} for i in range(part, N, 2)]
        pq.write_table(pa.Table.from_pylist(rows), folder / "parts" / f"part-{part}.parquet")
    return str(folder / "parts")


def own_ratings(folder: Path) -> str:
    rows = [
        {"id": i, "prompt": ask(i), "response": f"{i}, {r}.", "helpfulness": r, "brevity": 5 - r, "rater": "me"}
        for i in range(N)
        for r in (0, 2, 4)
    ]
    return write_jsonl(folder / "ratings.jsonl", rows)


def own_csv(folder: Path) -> str:
    with (folder / "mine.csv").open("w", newline="") as file:
        cells = csv.DictWriter(file, ["prompt", "response", "helpfulness", "brevity"])
        cells.writeheader()
        for i in range(N):
            cells.writerow({"prompt": ask(i), "response": "Yes,\nno.", "helpfulness": i % 5, "brevity": i % 10 + 1})
            cells.writerow({"prompt": ask(i), "response": str(i), "helpfulness": 4 - i % 5, "brevity": ""})
    return str(folder / "mine.csv")


def helpsteer(folder: Path, prompts: int) -> str:
    ratings = dict.fromkeys(("helpfulness", "correctness", "coherence", "complexity"), 3)
    rows = [{"prompt": ask(i), "response": f"{i}.", **ratings, "verbosity": i % 5} for i in range(prompts)]
    return write_jsonl(folder / "helpsteer.jsonl", rows)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("datasets"):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def dpa_data(
    folder: Path,
    rows: str | Sequence[str],
    more: str = GIVEN,
    knobs: str = "",
    out: str = "data",
    knob: str = "rows",
) -> Path:
    """`dpa data` on a recipe as short as a user writes it; the heads go before all tables."""
    before, tables = (more, "") if more.startswith("heads") else ("", more)
    top, table, rest = before.partition("[objectives]")
    data = f"[data]\n{knob} = {json.dumps(rows)}\nvalidation_prompts = 5\n{knobs}\n"
    (folder / "mine.toml").write_text(f'name = "mine"\n{top}{tables}{data}{table}{rest}')
    cli.main(["data", str(folder / "mine.toml"), "--out", str(folder / out)])
    return folder / out


def split_sizes(data: Path) -> dict[str, int]:
    splits = [row["split"] for row in read_rows(data / "prompts", PROMPTS)]
    return {split: splits.count(split) for split in sorted(set(splits))}


def reports(data: Path) -> list[dict[str, Any]]:
    return json.loads((data / "reports.json").read_text())


@pytest.mark.parametrize("write", [conversational, implicit, plain_pairs], ids=lambda write: write.__name__)
def test_preference_pairs_give_prompts_originals_and_pairs(tmp_path: Path, write: Callable[[Path], str]) -> None:
    data = dpa_data(tmp_path, write(tmp_path))
    sizes = split_sizes(data)
    assert (sum(sizes.values()), sizes.keys()) == (N, {"D1", "D2", "validation"})
    trained = sizes["D1"] + sizes["D2"]
    pairs = list(read_rows(data / "pairs", PAIRS))
    assert len(pairs) == trained
    assert {(p["chosen"], p["rejected"], p["chosen_score"], p["rejected_score"], p["origin"]) for p in pairs} == {
        ("Yes.", "No", None, None, "pairs")
    }
    originals = list(read_rows(data / "train", RATED))
    assert len(originals) == 2 * trained
    assert all(row["labels"] == {} and row["messages"][-1]["content"].startswith("Why") for row in originals)
    assert not (data / "heldout").exists()
    counts = {report["source"]: (report["in"], report["out"]) for report in reports(data)}
    assert (counts["pairs"], counts["preferences"]) == ((2 * N, 2 * N), (N, N))


@pytest.mark.parametrize("write", [prompts_only, saved_splits], ids=lambda write: write.__name__)
@pytest.mark.parametrize("heldout", [0.0, 0.05])
def test_prompts_alone_suffice_where_the_reward_is_given(
    tmp_path: Path, write: Callable[[Path], str], heldout: float
) -> None:
    knobs = f"heldout = {heldout}\ntuning = 0.2"
    data = dpa_data(tmp_path, write(tmp_path), knobs=knobs, knob="prompts")
    assert sorted(path.name for path in data.iterdir() if path.is_dir()) == ["prompts"]
    sizes = split_sizes(data)
    assert sum(sizes.values()) == N
    assert sizes.keys() == {"D1", "D2", "tuning", "validation"}
    assert 0 <= sizes["D1"] - sizes["D2"] <= 1


@pytest.mark.parametrize(("write", "high"), [(saved, 4), (parquet_folder, 39 / 9)], ids=["saved", "parquet"])
def test_a_folder_is_read_and_its_numbers_are_ratings(
    tmp_path: Path, write: Callable[[Path], str], high: float
) -> None:
    data = dpa_data(tmp_path, write(tmp_path))
    (report,) = [report for report in reports(data) if report["source"] == "answers"]
    assert report["scales"] == {"brevity": [0, pytest.approx(high)]}
    assert (report["in"], report["out"]) == (N, N)
    labels = [row["labels"]["brevity"] for part in ("train", "heldout") for row in read_rows(data / part, RATED)]
    assert 0 <= min(labels) < 20
    assert 80 < max(labels) <= 100
    assert f"to 0-100: brevity 0 to {high:g}" in (data / "reports.txt").read_text()


def test_rating_columns_become_heads_to_train_on(tmp_path: Path) -> None:
    data = dpa_data(tmp_path, own_ratings(tmp_path), TRAINED, "heldout = 0.2")
    (report,) = [report for report in reports(data) if report["source"] == "answers"]
    assert report["scales"] == {"helpfulness": [0, 4], "brevity": [1, 5]}  # 1 to 5 as seen; the id is no rating
    assert report["remarks"] == []
    rows = list(read_rows(data / "train", RATED))
    assert {row["response"].split(", ")[1]: row["labels"] for row in rows} == {
        "0.": {"helpfulness": 0.0, "brevity": 100.0},
        "2.": {"helpfulness": 50.0, "brevity": 50.0},
        "4.": {"helpfulness": 100.0, "brevity": 0.0},
    }
    stated = dpa_data(tmp_path, own_ratings(tmp_path), TRAINED, "heldout = 0.2\nscales = {brevity = [0, 10]}", "again")
    assert {row["labels"]["brevity"] for row in read_rows(stated / "train", RATED)} == {10.0, 30.0, 50.0}


def test_a_judge_that_takes_ratings_leaves_its_prompts_and_answers_to_the_others(tmp_path: Path) -> None:
    """The judge's fifth is the same either way; then D1 and D2 have it too, without its ratings and preferences."""
    files = [own_ratings(tmp_path), plain_pairs(tmp_path)]
    knobs, found = "heldout = 0.2\njudge = 0.2\n", {}
    for takes in ("prompts", "ratings"):
        data = dpa_data(tmp_path, files, TRAINED, f'{knobs}judge_takes = "{takes}"', takes)
        found[takes] = {part: list(read_rows(data / part, RATED)) for part in ("train", "heldout", "judge")}
        paired = {row["prompt_id"] for row in read_rows(data / "pairs", PAIRS)}
        judged = {row["prompt_id"] for row in found[takes]["judge"]}
        sizes = split_sizes(data)
        assert abs(sizes["D1"] - sizes["D2"]) <= 1
        assert not judged & paired
        rated = {row["prompt_id"] for row in found[takes]["train"] if row["labels"]}
        assert rated == paired
        assert not judged & rated
    assert found["prompts"]["judge"] == found["ratings"]["judge"]
    assert found["prompts"]["heldout"] == found["ratings"]["heldout"]
    before, after = ({row["prompt_id"] for row in found[takes]["train"]} for takes in found)
    assert after == before | judged
    assert sizes["D1"] + sizes["D2"] == len(after)
    unrated = {(row["prompt_id"], row["response"]) for row in found["ratings"]["train"] if not row["labels"]}
    assert {(row["prompt_id"], row["response"]) for row in found["ratings"]["judge"]} < unrated


def test_a_csv_file_holds_texts_with_line_breaks_and_missing_ratings(tmp_path: Path) -> None:
    data = dpa_data(tmp_path, own_csv(tmp_path), TRAINED, "heldout = 0.2")
    (report,) = [report for report in reports(data) if report["source"] == "answers"]
    assert report["scales"] == {"helpfulness": [0, 4], "brevity": [1, 10]}
    first, second = list(read_rows(data / "train", RATED))[:2]
    i = int(second["response"])  # an answer that is a number is text
    assert first["response"] == "Yes,\nno."
    assert first["labels"] == pytest.approx({"helpfulness": 25 * (i % 5), "brevity": 100 / 9 * (i % 10)}, rel=1e-6)
    assert second["labels"] == {"helpfulness": 100.0 - 25 * (i % 5)}


def test_helpsteer_alone_says_that_it_has_no_prompts_to_align_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = helpsteer(tmp_path, 2 * N)
    objectives = "\n".join(f'{name} = ["helpsteer-{name}"]' for name in ("helpfulness", "verbosity"))
    recipe = f"[objectives]\n{objectives}\n"
    told = refused(tmp_path, capsys, [], recipe, f'helpsteer = "{file}"')
    assert "no prompts to align on: data.helpsteer" in told
    assert "name prompts in data.prompts" in told
    knobs = f'helpsteer = "{file}"\nheldout = 0.2'
    beside = dpa_data(tmp_path, prompts_only(tmp_path), recipe, knobs, knob="prompts")
    assert sum(split_sizes(beside).values()) == N
    assert {row["source"] for row in read_rows(beside / "train", RATED)} == {"helpsteer"}
    among = dpa_data(tmp_path, file, recipe, "heldout = 0.2", "among")
    assert sum(split_sizes(among).values()) == 2 * N
    assert {row["labels"]["helpsteer-helpfulness"] for row in read_rows(among / "train", RATED)} == {70.0}


def refused(
    folder: Path, capsys: pytest.CaptureFixture[str], rows: str | Sequence[str], more: str = GIVEN, knobs: str = ""
) -> str:
    """The one sentence that a user gets."""
    with pytest.raises(SystemExit):
        dpa_data(folder, rows, more, knobs, "refused")
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            {"question": "Why?", "answer": "So."},
            [EXAMPLES["answers"], "rename question to prompt and rename answer to response"],
        ),
        ({"Prompt": "Why?"}, [EXAMPLES["prompts"], "rename Prompt to prompt"]),
        ({"prompt": "Why?", "answer": "So."}, ["name it in data.prompts", "or rename answer to response"]),
        ({"messages": [said("user", "Why?")]}, ["prompts without answers; name it in data.prompts"]),
        ({"a": "Why?", "b": 3}, ["has the columns a, b", EXAMPLES["prompts"], "add prompt"]),
        ({"chosen": "So.", "rejected": "No."}, [EXAMPLES["pairs"], "add prompt"]),
        ({"prompt": "Why?", "chosen": "So."}, [EXAMPLES["pairs"], "add rejected"]),
        ({"query": "Why?", "preferred": "So.", "worse": "No."}, [EXAMPLES["pairs"], "rename preferred to chosen"]),
        (
            {"conversations": [{"from": "human", "value": "Why?"}]},
            ["rename conversations to messages", "from to role", "value to content"],
        ),
        ({"prompt": "Why?", "chosen": [said("user", "Why?")], "rejected": []}, ["chosen is", "assistant's answer"]),
        ({"messages": [said("tool", "3")]}, ["messages[0]: role is 'tool'", "system, user, assistant"]),
        ({"messages": [said("user", [{"type": "image"}])]}, ["content[0]: type is 'image'"]),
        ({"prompt": "[{'role': 'user', 'content': 'Why?'}]"}, ["a chat as a list and not as text"]),
        ({"prompt": "Why?", "response": "So.", "brevity": 9}, ["brevity is 9", "from 0 to 4", "[data.scales]"]),
        ({"prompt": "Why?", "response": "So.", "brevity": "low"}, ["brevity is 'low'", "a number"]),
        ({"prompt": "Why?", "response": "So."}, ["[data.scales] has brevity", "rated: none"]),
    ],
)
def test_what_is_not_read_is_refused_with_its_row_and_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, Any], told: list[str]
) -> None:
    scales = "scales = {brevity = [0, 4]}" if "response" in row else ""
    message = refused(tmp_path, capsys, write_jsonl(tmp_path / "mine.jsonl", [row]), GIVEN, scales)
    assert [part for part in told if part not in message] == []
    assert "mine.jsonl" in message or "rated: none" in message


def test_a_file_of_another_kind_and_a_data_set_of_several_splits_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("Why?\n")
    assert ".csv" in refused(tmp_path, capsys, str(tmp_path / "mine.txt"))
    assert "no such file or folder" in refused(tmp_path, capsys, str(tmp_path / "nothing"))
    source = saved_splits(tmp_path).removesuffix(":mine")
    assert f"has the splits mine, other; name one of them: {source}:mine" in refused(tmp_path, capsys, source)
    (tmp_path / "short.csv").write_text("prompt,response\nWhy, and how?,So,there\n")
    assert "short.csv, row 1" in refused(tmp_path, capsys, str(tmp_path / "short.csv"))
    assert "no prompts to align on" in refused(tmp_path, capsys, [])


def test_a_rating_far_beyond_the_scale_of_all_others_is_refused_unless_its_scale_is_stated(tmp_path: Path) -> None:
    """One 40 among 199 ratings of 1 to 5 is in line 120; among 99 of them it may be meant."""
    rows = [{"prompt": ask(i), "response": "So.", "wit": 40 if i == 119 else 1 + i % 5} for i in range(200)]
    path = write_jsonl(tmp_path / "wit.jsonl", rows)
    with pytest.raises(ValueError, match=r"wit\.jsonl, line 120: wit is 40, and 199 of 200 .*\[data.scales\] wit = "):
        read_own(path, Rescaling(), {})
    assert read_own(path, Rescaling(), {"wit": (1, 40)}).reports[0].scales == {"wit": (1, 40)}
    few = write_jsonl(tmp_path / "few.jsonl", rows[101:])
    assert read_own(few, Rescaling(), {}).reports[0].scales == {"wit": (1, 40)}


def wits(folder: Path, name: str, counts: dict[int, int]) -> str:
    """A file with so many ratings of each value, the lowest first."""
    values = [value for value, count in sorted(counts.items()) for _ in range(count)]
    rows = [{"prompt": ask(i), "response": "So.", "wit": value} for i, value in enumerate(values)]
    return write_jsonl(folder / f"{name}.jsonl", rows)


def test_a_rating_beyond_the_scale_of_all_others_is_refused_though_a_wider_usual_scale_has_it(tmp_path: Path) -> None:
    path = wits(tmp_path, "eight", {1: 50, 2: 50, 3: 50, 5: 49, 8: 1})
    with pytest.raises(ValueError, match=r"eight\.jsonl, line 200: wit is 8, and 199 of 200 .*\[data.scales\] wit = "):
        read_own(path, Rescaling(), {})
    assert read_own(path, Rescaling(), {"wit": (1, 10)}).reports[0].scales == {"wit": (1, 10)}
    six = wits(tmp_path, "six", {0: 100, 1: 300, 4: 2})
    with pytest.raises(ValueError, match=r"six\.jsonl, line 401: wit is 4, and 400 of 402 ratings are 0 to 1"):
        read_own(six, Rescaling(), {})


@pytest.mark.parametrize(
    ("counts", "scale"),
    [
        ({1: 500, 2: 300, 3: 100, 5: 85, 8: 15}, (1, 10)),  # 1.5% of the ratings are high: too many for mistakes
        ({1: 500, 2: 300, 3: 100, 5: 95, 6: 3, 8: 2}, (1, 10)),  # 0.5%, and they begin right above 5: a thin end
        ({0: 600, 1: 395, 2: 4, 3: 1}, (0, 4)),
        ({1: 995, 2: 5}, (1, 5)),  # a single value below is no scale
        ({1: 3, 2: 300, 3: 300, 4: 300, 0: 2}, (0, 4)),  # 1 to 5 is no narrower than 0 to 4
    ],
)
def test_a_column_of_mostly_low_ratings_keeps_its_scale(
    tmp_path: Path, counts: dict[int, int], scale: tuple[int, int]
) -> None:
    assert read_own(wits(tmp_path, "low", counts), Rescaling(), {}).reports[0].scales == {"wit": scale}


def test_one_rating_on_two_scales_is_refused_unless_its_scale_is_stated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        write_jsonl(tmp_path / f"{high}.jsonl", [{"prompt": ask(i), "response": "So.", "wit": i} for i in (0, 1, high)])
        for high in (4, 9)
    ]
    told = refused(tmp_path, capsys, files)
    assert "wit goes from 0 to 4 in" in told
    assert "[data.scales] wit = [0, 9]" in told
    data = dpa_data(tmp_path, files, GIVEN, "heldout = 0\nscales = {wit = [0, 9]}")
    labels = {row["messages"][0]["content"]: row["labels"]["wit"] for row in read_rows(data / "train", RATED)}
    points = {0: 0.0, 1: 100 / 9, 4: 400 / 9, 9: 100.0}
    assert labels == pytest.approx({ask(i): points[i] for i in points if ask(i) in labels})
    assert len(labels) == 3


def test_a_trained_reward_model_needs_labels_and_held_out_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "data.heldout is 0" in refused(tmp_path, capsys, own_ratings(tmp_path), TRAINED, "heldout = 0")
    told = refused(tmp_path, capsys, own_ratings(tmp_path), TRAINED.replace('"brevity"]', '"wit"]'), "heldout = 0.2")
    assert "objective 'brevity' reads head 'wit'" in told
    assert "labelled: helpfulness, brevity" in told
    assert "reads head 'helpfulness'" in refused(tmp_path, capsys, plain_pairs(tmp_path), TRAINED)


# The forms


@pytest.mark.parametrize(
    ("row", "form", "messages", "answers"),
    [
        ({"prompt": "Q"}, "prompts", ["Q"], ()),
        ({"prompt": [said("user", "Q")]}, "prompts", ["Q"], ()),
        ({"messages": [said("user", "Q")]}, "chats", ["Q"], ()),
        ({"messages": [said("user", "Q"), said("assistant", "A")]}, "chats", ["Q"], ("A",)),
        ({"messages": [said("user", "Q")], "response": "A"}, "answers", ["Q"], ("A",)),
        ({"prompt": "Q", "completion": "A"}, "answers", ["Q"], ("A",)),
        ({"prompt": [said("user", "Q")], "completion": [said("assistant", "A")]}, "answers", ["Q"], ("A",)),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "pairs", ["Q"], ("A", "B")),
        (
            {"prompt": "Q", "chosen": [said("user", "Q"), said("assistant", "A")],
             "rejected": [said("user", "Q"), said("assistant", "B")]},
            "pairs", ["Q"], ("A", "B"),
        ),
        ({"instruction": "Q", "input": "X", "output": "A"}, "instructions", ["Q\n\nX"], ("A",)),
        ({"messages": [said("user", [{"type": "text", "text": "Q"}, {"type": "text", "text": "?"}])]}, "chats",
         ["Q?"], ()),
    ],
)  # fmt: skip
def test_each_form_is_known_by_its_columns(row: Any, form: str, messages: list[str], answers: tuple[str, ...]) -> None:
    asked = Row("here", row)
    assert form_of(asked) == form
    example = read_example(asked, form_of(asked))
    assert ([turn["content"] for turn in example.messages], example.answers, example.gap) == (messages, answers, "")


def test_every_row_that_the_page_on_data_shows_is_read(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    blocks = re.findall(r"```(json|csv)\n(.*?)```", text, re.DOTALL)
    rows = [("jsonl", line) for kind, block in blocks if kind == "json" for line in block.splitlines()]
    rows += [("csv", block) for kind, block in blocks if kind == "csv"]
    seen = set()
    for i, (kind, row) in enumerate(rows):
        file = tmp_path / f"{i}.{kind}"
        file.write_text(row)
        prompts, report = read_prompts(str(file), "prompts", ())
        assert (len(prompts), report.kept) == (1, 1)
        try:
            seen.add(read_own(str(file), Rescaling(), {}).reports[0].source)
        except ValueError as error:
            seen.add("prompts" if "name it in data.prompts" in str(error) else str(error))
    assert seen == {
        *("prompts", "answers", "pairs", "chats", "instructions"),
        *("helpsteer", "ultrafeedback", "ultrafeedback_binarized"),
    }


def test_rows_whose_prompts_are_no_prompts_are_left_out_and_counted(tmp_path: Path) -> None:
    sides = {side: [said("user", side), said("assistant", "A")] for side in ("chosen", "rejected")}
    own = read_own(write_jsonl(tmp_path / "pairs.jsonl", [sides]), Rescaling(), {})
    assert own.reports[0].filtered == {"chosen and rejected differ before their last turns": 1}
    rows = [{"prompt": [said("system", "Be kind.")]}, {"prompt": " "}, {"prompt": "Q"}, {"prompt": "Q"}]
    prompts, report = read_prompts(write_jsonl(tmp_path / "prompts.jsonl", rows), "prompts", ())
    assert report.filtered == {
        "the prompt does not end with the user's turn": 1, "empty prompt": 1, "repeated prompt": 1,
    }  # fmt: skip
    assert list(prompts.values()) == [user_prompt("Q")]


def test_scores_of_a_pair_rate_both_answers_and_a_tie_is_no_preference(tmp_path: Path) -> None:
    scores = [(8, 2), (5, 5), (10, 1)]
    rows = [
        {"prompt": ask(i), "chosen": "A", "rejected": "B", "score_chosen": a, "score_rejected": b, "wit-chosen": a / 10,
         "wit-rejected": 0.0, "margin": a - b}
        for i, (a, b) in enumerate(scores)
    ]  # fmt: skip
    own = read_own(write_jsonl(tmp_path / "scored.jsonl", rows), Rescaling(), {"wit": (0.0, 1.0)})
    assert own.reports[0].scales == {"score": (1, 10), "wit": (0, 1)}
    assert [row["labels"] for row in own.rated[:2]] == [
        {"score": pytest.approx(700 / 9), "wit": 80.0}, {"score": pytest.approx(100 / 9), "wit": 0.0},
    ]  # fmt: skip
    assert [pair["prompt_id"] for pair in own.pairs] == [prompt_id(user_prompt(ask(i))) for i in range(3)]
    plain = [{column: value for column, value in row.items() if "wit" not in column} for row in rows]
    own = read_own(write_jsonl(tmp_path / "tied.jsonl", plain), Rescaling(), {})
    assert [pair["prompt_id"] for pair in own.pairs] == [prompt_id(user_prompt(ask(i))) for i in (0, 2)]


@pytest.mark.parametrize(
    ("ratings", "scale"),
    [
        ([0, 1], (0, 1)),
        ([0, 3], (0, 4)),
        ([1, 4], (1, 5)),
        ([2, 9], (1, 10)),
        ([0, 7], (0, 7)),
        ([0.2, 0.9], (0.2, 0.9)),
    ],
)
def test_a_scale_that_is_not_stated_is_the_usual_one_or_from_the_least_to_the_greatest(
    ratings: list[float], scale: tuple[float, float]
) -> None:
    assert usual_scale(ratings) == scale
    assert points_on(scale[1], scale) == 100.0


def test_a_column_of_text_or_of_one_value_is_no_rating(tmp_path: Path) -> None:
    rows = [{"prompt": ask(i), "response": "A", "version": v, "turn": 1, "wit": i} for i, v in enumerate(["1", "2b"])]
    own = read_own(write_jsonl(tmp_path / "mine.jsonl", rows), Rescaling(), {})
    assert own.reports[0].scales == {"wit": (0, 1)}
    assert [remark.split(":")[0] for remark in own.reports[0].remarks] == [
        "version is no rating", "turn is no rating",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("stated", "answered", "rated"),
    [
        ({}, True, True),
        ({"world": True}, True, True),
        ({"rows": ("a.csv",)}, True, True),
        ({"prompts": ("a.csv",)}, False, False),
        ({"prompts": ("a.csv",), "helpsteer": "b.csv"}, False, True),
    ],
)
def test_a_recipe_says_whether_its_prompts_have_answers_and_ratings(
    stated: dict[str, Any], answered: bool, rated: bool
) -> None:
    data = Data(**stated)
    assert (data.answered, data.rated) == (answered, rated)
    paper = ("rows", "helpsteer", "validation", "sft")
    read = {name for name in paper if getattr(data, name) == getattr(Data(), name)}
    assert read == (set() if stated.keys() & {"rows", "prompts"} else set(paper))


def test_chats_of_several_forms_serve_sft(tmp_path: Path) -> None:
    chats = write_jsonl(tmp_path / "sft.jsonl", [{"prompt": "Q", "completion": "A"}])
    data = dpa_data(tmp_path, prompts_only(tmp_path), knobs=f'sft = "{chats}"', knob="prompts")
    (row,) = read_rows(data / "chats", CONVERSATIONS)
    assert (row["messages"], row["response"]) == (user_prompt("Q"), "A")


@pytest.mark.skipif("DPA_REAL_DATA" not in os.environ, reason="DPA_REAL_DATA is not set")
def test_real_rows_of_every_form_are_read(tmp_path: Path) -> None:
    folder = Path(os.environ["DPA_REAL_DATA"])
    (second,) = read_own(str(folder / "helpsteer2_998.jsonl"), Rescaling(), {}).reports
    assert (second.source, second.read, second.kept) == ("helpsteer", 998, 998)
    pairs = read_own(str(folder / "ultrafeedback_pairs_1000.jsonl"), Rescaling(), {})
    assert (len(pairs.rated), len(pairs.prompts)) == (1998, 1998)
    assert len(pairs.pairs) == 884  # 116 score alike, or have an empty answer
    files = sorted(map(str, (folder / "prompts").glob("*.jsonl")))
    assert sum(report.kept for _, report in (read_prompts(file, "prompts", ()) for file in files)) > 5500
    instructions = read_own(str(folder / "rasbt_instruction_1100.json"), Rescaling(), {})
    assert (len(instructions.rated), instructions.reports[0].source) == (1100, "instructions")
    data = dpa_data(tmp_path, files, knobs="heldout = 0", knob="prompts")
    assert sum(split_sizes(data).values()) > 5500


def test_answers_beside_prompts_are_counted_and_not_read(tmp_path: Path) -> None:
    prompts, report = read_prompts(plain_pairs(tmp_path), "prompts", ("train",))
    assert len(prompts) == report.kept == N
    assert report.notes == {"answer not read": 2 * N}
