"""The readers on small files in the official schemas: what is kept, filtered and refused."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpalign.data.chats import read_chats
from dpalign.data.own import read_own
from dpalign.data.ratings import Rescaling, labels_for, read_rated, repair_ten
from dpalign.data.report import ReadReport, render_reports, require_rows
from dpalign.data.sources import located, read_source
from dpalign.data.union import merge_repeats
from dpalign.rows import CONVERSATIONS, HEADS, RATED, prompt_id, read_rows, user_prompt, write_rows

FIXTURES = Path(__file__).parent / "fixtures"
HELPSTEER = str(FIXTURES / "helpsteer.jsonl")
ULTRAFEEDBACK = str(FIXTURES / "ultrafeedback.jsonl")
BINARIZED = str(FIXTURES / "ultrafeedback_binarized.jsonl")
PAIRS = str(FIXTURES / "preference_pairs.jsonl")
ULTRACHAT = str(FIXTURES / "ultrachat_200k.jsonl")

HELPSTEER_ROW = {
    "prompt": "Why?",
    "response": "So.",
    "helpfulness": 3,
    "correctness": 4,
    "coherence": 4,
    "complexity": 2,
    "verbosity": 2,
}


def write_jsonl(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def first_ultrafeedback_row() -> dict[str, Any]:
    row: dict[str, Any] = json.loads((FIXTURES / "ultrafeedback.jsonl").read_text().splitlines()[0])
    return row


def test_helpsteer_labels_go_to_heads_0_to_4_as_20l_plus_10() -> None:
    rows, report = read_rated("helpsteer", HELPSTEER)
    assert rows[0]["labels"] == dict(zip(HEADS[:5], [90.0, 90.0, 90.0, 30.0, 10.0], strict=True))
    assert rows[0]["prompt_id"] == prompt_id(user_prompt("Why is the sky blue?"))
    assert (report.read, report.kept, report.filtered) == (5, 4, {"empty response": 1})


def test_the_full_range_is_a_knob() -> None:
    rows, _ = read_rated("helpsteer", HELPSTEER, rescaling=Rescaling(helpsteer="25l"))
    assert list(rows[0]["labels"].values()) == [100.0, 100.0, 100.0, 25.0, 0.0]
    rows, _ = read_rated("ultrafeedback", ULTRAFEEDBACK, rescaling=Rescaling(aspects="25r-25", overall="100/9(s-1)"))
    assert labels_for(rows[0]["labels"], HEADS[6:]) == [100.0, 100.0, 100.0, 75.0]
    assert rows[0]["labels"][HEADS[5]] == pytest.approx(750 / 9)
    with pytest.raises(ValueError, match="'30l'"):
        read_rated("helpsteer", HELPSTEER, rescaling=Rescaling(helpsteer="30l"))  # type: ignore[arg-type]


def test_ultrafeedback_quirks_are_counted_and_repaired() -> None:
    rows, report = read_rated("ultrafeedback", ULTRAFEEDBACK)
    # overall, instruction following, truthfulness, honesty, helpfulness
    assert [labels_for(row["labels"], HEADS[5:]) for row in rows] == [
        [80.0, 90.0, 90.0, 90.0, 70.0],
        [5.0, 10.0, 10.0, 30.0, 30.0],  # 10, but the aspects' mean is 1.5: it was a 1
        [None, 50.0, None, 50.0, 50.0],  # "10.0", mean 3: in doubt
        [95.0, 90.0, 90.0, 70.0, 90.0],  # 10, mean 4.75: meant
        [65.0, 90.0, 90.0, None, 70.0],  # "7"; honesty "N/A"
    ]
    assert all(row["labels"].keys() <= {*HEADS[5:]} for row in rows)
    assert (report.read, report.kept) == (7, 5)
    assert report.filtered == {"empty response": 1, "no rating at all": 1}
    assert report.notes == {
        "prompt without completions": 1,
        "aspect rated N/A": 6,
        "overall_score missing": 1,
        "overall_score 10 repaired to 1": 1,
        "overall_score 10 in doubt, left out": 1,
    }


@pytest.mark.parametrize(
    ("aspects", "repaired"),
    [([2, 2, 2, 2], 1.0), ([2, 2, 2, 3], None), ([4, 4, 4, 4], None), ([4, 4, 4, 5], 10.0), ([], None)],
)
def test_a_ten_is_repaired_by_the_mean_of_the_aspects(aspects: list[float], repaired: float | None) -> None:
    assert repair_ten(aspects) == repaired


def test_pairs_label_the_overall_head_alone() -> None:
    for rows in (read_rated("ultrafeedback_binarized", BINARIZED)[0], read_rated("pairs", PAIRS)[0]):
        assert all([*row["labels"]] == [HEADS[5]] for row in rows)
    assert [row["labels"][HEADS[5]] for row in read_rated("ultrafeedback_binarized", BINARIZED)[0]] == [80.0, 5.0, 65.0]
    assert [row["labels"][HEADS[5]] for row in read_rated("pairs", PAIRS)[0]] == [85.0, 40.0, 75.0, 75.0]
    assert read_rated("ultrafeedback_binarized", BINARIZED)[1].filtered == {"empty response": 1}


def test_a_binarized_row_joins_the_raw_row_by_prompt_id() -> None:
    assert (
        read_rated("ultrafeedback_binarized", BINARIZED)[0][0]["prompt_id"]
        == read_rated("ultrafeedback", ULTRAFEEDBACK)[0][0]["prompt_id"]
    )


def test_a_chat_becomes_its_turns_and_its_last_answer() -> None:
    rows, report = read_chats(ULTRACHAT)
    assert [message["content"] for message in rows[0]["messages"]] == ["Name a prime number.", "Seven.", "Another?"]
    assert rows[0]["response"] == "Eleven."
    assert (report.read, report.kept, report.filtered) == (3, 2, {"does not end with an answer": 1})


def test_the_same_answer_again_is_one_row_with_the_labels_of_both() -> None:
    rows = read_rated("helpsteer", HELPSTEER)[0] + read_rated("ultrafeedback", ULTRAFEEDBACK)[0]
    merged, report = merge_repeats(rows)
    # "Air scatters .." was rated 4 and 3 for helpfulness: 90 and 70; "Seven." stands in both data sets.
    assert merged[0]["labels"][HEADS[0]] == 80.0
    seven = next(row for row in merged if row["response"] == "Seven.")
    assert labels_for(seven["labels"], HEADS) == [70.0, 90.0, 90.0, 10.0, 10.0, 80.0, 90.0, 90.0, 90.0, 70.0]
    assert (merged[0]["source"], seven["source"]) == ("helpsteer", "ultrafeedback")
    assert report.filtered == {"same answer again, labels averaged": 2}
    assert (report.read, report.kept) == (9, 7)


def test_every_form_is_read_by_its_name_and_fits_its_parquet_schema(tmp_path: Path) -> None:
    rows = [
        *read_rated("helpsteer", HELPSTEER)[0],
        *read_rated("ultrafeedback", ULTRAFEEDBACK)[0],
        *read_rated("ultrafeedback_binarized", BINARIZED)[0],
        *read_rated("pairs", PAIRS)[0],
    ]
    assert write_rows(tmp_path / "rated.parquet", rows, RATED) == 16
    assert next(read_rows(tmp_path / "rated.parquet", RATED)) == rows[0]
    write_rows(tmp_path / "sft.parquet", read_chats(ULTRACHAT)[0], CONVERSATIONS)


def test_json_parquet_and_compressed_files_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(HELPSTEER).read_text().splitlines()]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(Path(HELPSTEER).read_bytes()))
    for name in ("rows.json", "rows.parquet", "rows.jsonl.gz"):
        assert read_rated("helpsteer", str(tmp_path / name))[0] == read_rated("helpsteer", HELPSTEER)[0]


def test_a_null_or_nan_response_in_parquet_is_an_empty_one(tmp_path: Path) -> None:
    rows = [{**HELPSTEER_ROW, "response": None}, HELPSTEER_ROW]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read_rated("helpsteer", str(tmp_path / "rows.parquet"))[1].filtered == {"empty response": 1}


def test_a_row_cut_in_half_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl"
    whole = json.dumps(HELPSTEER_ROW)
    path.write_text(f"{whole}\n{whole[:40]}")
    with pytest.raises(ValueError, match=r"cut\.jsonl, line 2: "):
        read_rated("helpsteer", str(path))


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"verbosity": 7}, "line 2: verbosity is 7"),
        ({"verbosity": -1}, "verbosity is -1"),
        ({"verbosity": "3"}, "verbosity is '3'"),
        ({"verbosity": True}, "verbosity is True"),
        ({"verbosity": float("nan")}, "verbosity is nan"),
        ({"verbosity": None}, "verbosity is None"),
        ({"response": 12}, "response is 12"),
        ({"response": "half a pair \ud83d"}, "response is 'half a pair"),
    ],
)
def test_a_malformed_helpsteer_value_is_refused(tmp_path: Path, change: dict[str, Any], place: str) -> None:
    source = write_jsonl(tmp_path / "bad.jsonl", HELPSTEER_ROW, {**HELPSTEER_ROW, **change})
    with pytest.raises(ValueError, match=place):
        read_rated("helpsteer", source)


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("Rating", "6", r"line 1, completions\[0\], annotations, honesty: Rating is '6'"),
        ("Rating", "good", "Rating is 'good'"),
        ("Rating", float("nan"), "Rating is nan"),
        ("Rating", ["5"], r"Rating is \['5'\]"),
        ("Rating", True, "Rating is True"),
        ("overall_score", 11, r"completions\[0\]: overall_score is 11"),
    ],
)
def test_a_malformed_ultrafeedback_rating_is_refused(tmp_path: Path, key: str, value: Any, place: str) -> None:
    row = first_ultrafeedback_row()
    completion = row["completions"][0]
    (completion["annotations"]["honesty"] if key == "Rating" else completion)[key] = value
    with pytest.raises(ValueError, match=place):
        read_rated("ultrafeedback", write_jsonl(tmp_path / "bad.jsonl", row))


def test_a_missing_column_is_refused_with_those_there_are(tmp_path: Path) -> None:
    row = first_ultrafeedback_row()
    del row["completions"][2]["annotations"]["truthfulness"]
    with pytest.raises(ValueError, match=r"completions\[2\], annotations: no column 'truthfulness'"):
        read_rated("ultrafeedback", write_jsonl(tmp_path / "bad.jsonl", row))
    with pytest.raises(ValueError, match="no column 'instruction'"):
        read_rated("ultrafeedback", HELPSTEER)


def test_pairs_and_chats_with_bad_values_are_refused(tmp_path: Path) -> None:
    pair = json.loads(Path(PAIRS).read_text().splitlines()[0])
    pair["metadata"]["score_rejected"] = 0
    with pytest.raises(ValueError, match="line 1, metadata: score_rejected is 0"):
        read_rated("pairs", write_jsonl(tmp_path / "pairs.jsonl", pair))
    with pytest.raises(ValueError, match=r"messages\[0\]: role is 'robot'"):
        read_chats(write_jsonl(tmp_path / "chat.jsonl", {"messages": [{"role": "robot", "content": "Hi"}]}))
    with pytest.raises(ValueError, match="line 1: chosen is "):
        read_rated(
            "ultrafeedback_binarized",
            write_jsonl(tmp_path / "bin.jsonl", {"chosen": [{"role": "user", "content": "Hi"}]}),
        )


def test_a_missing_file_and_a_broken_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "object.json").write_text('{"rows": []}')
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    for name in ("none.jsonl", "broken.parquet", "object.json", "list.jsonl"):
        with pytest.raises(ValueError, match=name):
            list(read_source(str(tmp_path / name)))


@pytest.mark.parametrize("split", [None, "train+test", "train[:10]"])
def test_the_hub_gives_one_named_split_and_never_a_sum_of_splits(split: str | None) -> None:
    with pytest.raises(ValueError, match="nvidia/HelpSteer: split is "):
        list(read_source("nvidia/HelpSteer", split))


def test_a_copy_of_a_hub_folder_is_read_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    (tmp_path / "copy").mkdir()
    write_jsonl(tmp_path / "copy" / "train.jsonl", HELPSTEER_ROW, HELPSTEER_ROW)
    write_jsonl(tmp_path / "copy" / "test.jsonl", {**HELPSTEER_ROW, "prompt": "held out"})
    rows, report = read_rated("helpsteer", str(tmp_path / "copy"), "train")
    assert [row["messages"][0]["content"] for row in rows] == ["Why?", "Why?"]
    assert report.file.endswith("copy[train]")
    with pytest.raises(ValueError, match="split 'validation' could not be read"):
        read_rated("helpsteer", str(tmp_path / "copy"), "validation")


@pytest.mark.parametrize(
    ("form", "file"),
    [
        ("helpsteer", HELPSTEER),
        ("ultrafeedback", ULTRAFEEDBACK),
        ("ultrafeedback_binarized", BINARIZED),
        ("pairs", PAIRS),
    ],
)
def test_the_papers_data_sets_are_known_by_their_columns(form: Any, file: str) -> None:
    """Among the rows the prompts of HelpSteer are aligned on too, so that none is of the reward model alone."""
    own = read_own(file, Rescaling(), {})
    rows, report = read_rated(form, file)
    assert own.rated == [row | {"source": "rows"} for row in rows]
    assert own.reports[0] == report
    assert own.prompts == [row["messages"] for row in rows]


def test_of_ultrafeedback_binarized_on_the_hub_train_prefs_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the hub's folder, which has six splits and none that is called train."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    rows = [json.loads(line) for line in Path(BINARIZED).read_text().splitlines()]
    (tmp_path / "copy" / "data").mkdir(parents=True)
    for split, part in (("train_prefs", rows), ("test_prefs", rows[:1]), ("train_sft", rows[:1])):
        pq.write_table(pa.Table.from_pylist(part), tmp_path / "copy" / "data" / f"{split}-00000-of-00001.parquet")
    found = read_own(str(tmp_path / "copy"), Rescaling(), {})
    assert [row["response"] for row in found.rated] == [
        row["response"] for row in read_rated("ultrafeedback_binarized", BINARIZED)[0]
    ]
    assert found.reports[0].file.endswith("copy[train_prefs]")
    assert located(f"{tmp_path}/copy:test_prefs", ("train",)) == (f"{tmp_path}/copy", "test_prefs")
    assert located(str(tmp_path / "nothing"), ("train_prefs", "train")) == (str(tmp_path / "nothing"), "train")
    with pytest.raises(ValueError, match=r"has the splits .*train_prefs.*; name one of them: .*/copy:"):
        located(f"{tmp_path}/copy", ("validation",))


def test_the_table_says_what_was_read_kept_and_filtered() -> None:
    reports = [
        ReadReport("helpsteer", "data/h.jsonl", 1500, 1488, Counter({"empty prompt": 2, "empty response": 10})),
        ReadReport("pairs", "p.jsonl", 4, 4, Counter(), Counter({"aspect rated N/A": 3})),
    ]
    assert render_reports(reports) == (
        "source     file      read   kept  filtered\n"
        "helpsteer  h.jsonl  1,500  1,488  10 empty response, 2 empty prompt\n"
        "pairs      p.jsonl      4      4  -\n"
        "                                  kept, but: 3 aspect rated N/A"
    )


def test_an_empty_data_set_is_refused_with_its_counts() -> None:
    report = ReadReport("helpsteer", "h.jsonl", 3, 0, Counter({"empty response": 3}))
    with pytest.raises(ValueError, match=r"rated answers(.|\n)*3 empty response"):
        require_rows([], "rated answers", [report])


def test_a_report_that_loses_a_row_is_impossible() -> None:
    with pytest.raises(AssertionError, match="unaccounted"):
        ReadReport("helpsteer", "h.jsonl", 3, 1, Counter({"empty response": 1})).to_json()


# --- instruction rows


def write_json(path: Path, *rows: dict[str, str | None]) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


def test_an_instruction_and_its_input_are_one_user_turn(tmp_path: Path) -> None:
    source = write_json(
        tmp_path / "rows.json",
        {"instruction": "Correct the spelling.", "input": "freind", "output": "friend"},
        {"instruction": "Name a prime number.", "input": None, "output": "Seven."},
        {"instruction": " ", "input": "freind", "output": "friend"},
        {"instruction": "Name a prime number.", "input": "", "output": ""},
    )
    rows, report = read_chats(source)
    assert [row["messages"] for row in rows] == [
        user_prompt("Correct the spelling.\n\nfreind"),
        user_prompt("Name a prime number."),
    ]
    assert [(row["response"], row["origin"]) for row in rows] == [("friend", "sft"), ("Seven.", "sft")]
    assert rows[1]["prompt_id"] == prompt_id(user_prompt("Name a prime number."))
    assert (report.read, report.filtered) == (4, {"empty prompt": 1, "empty response": 1})


def test_the_columns_decide_which_reader_takes_a_file(tmp_path: Path) -> None:
    whole = write_json(tmp_path / "rows.json", {"instruction": "Name a prime number.", "input": "", "output": "7"})
    assert read_chats(whole)[1].source == "instructions"
    assert read_chats(ULTRACHAT)[1].source == "chats"
    assert read_chats(write_json(tmp_path / "none.json"))[0] == []
    row = {"instruction": "Name a prime number.", "input": ""}
    cut = write_json(tmp_path / "cut.json", {**row, "output": "7"}, row)
    with pytest.raises(ValueError, match=r"cut\.json, row 2: no column 'output'"):
        read_chats(cut)


@pytest.mark.skipif("DPA_REAL_DATA" not in os.environ, reason="DPA_REAL_DATA is not set")
def test_the_real_rows_are_read_without_a_loss() -> None:
    folder = Path(os.environ["DPA_REAL_DATA"])
    rows, report = read_rated("helpsteer", str(folder / "helpsteer_500.jsonl"))
    assert (report.read, report.kept, len({row["prompt_id"] for row in rows})) == (500, 500, 139)
    assert merge_repeats(rows)[1].kept == 472
    pairs, report = read_rated("pairs", str(folder / "ultrafeedback_pairs_1000.jsonl"))
    assert (report.read, report.kept, len({row["prompt_id"] for row in pairs})) == (2000, 1998, 1000)
    assert report.filtered == {"empty response": 2}
    instructions, report = read_chats(str(folder / "rasbt_instruction_1100.json"))
    assert (report.read, report.kept) == (1100, 1100)
    assert sum("\n\n" in row["messages"][0]["content"] for row in instructions) >= 325  # these have an input
