"""Instruction rows (Alpaca's form) as chats for SFT, told from ultrachat's by their columns."""

import json
import os
from pathlib import Path

import pytest

from dpalign.data.instructions import read_instructions
from dpalign.rows import prompt_id, user_prompt
from dpalign.stages.data import read_chats

FIXTURES = Path(__file__).parent / "fixtures"


def write_json(path: Path, *rows: dict[str, str | None]) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


def test_an_instruction_and_its_input_are_one_user_turn(tmp_path: Path) -> None:
    source = write_json(
        tmp_path / "rows.json",
        {"instruction": "Correct the spelling.", "input": "freind", "output": "friend"},
        {"instruction": "Name a prime number.", "input": "", "output": "Seven."},
    )
    rows, report = read_instructions(source)
    assert [row["messages"] for row in rows] == [
        user_prompt("Correct the spelling.\n\nfreind"),
        user_prompt("Name a prime number."),
    ]
    assert [row["response"] for row in rows] == ["friend", "Seven."]
    assert [row["origin"] for row in rows] == ["sft", "sft"]
    assert rows[1]["prompt_id"] == prompt_id(user_prompt("Name a prime number."))
    assert (report.read, report.kept, report.filtered) == (2, 2, {})


def test_instructions_without_a_question_or_an_answer_are_counted(tmp_path: Path) -> None:
    source = write_json(
        tmp_path / "rows.json",
        {"instruction": " ", "input": "freind", "output": "friend"},
        {"instruction": "Name a prime number.", "input": "", "output": ""},
        {"instruction": "Name a prime number.", "input": None, "output": "Seven."},
    )
    rows, report = read_instructions(source)
    assert [row["response"] for row in rows] == ["Seven."]
    assert report.filtered == {"empty prompt": 1, "empty response": 1}


def test_an_instruction_row_without_its_output_column_is_refused(tmp_path: Path) -> None:
    source = write_json(tmp_path / "rows.json", {"instruction": "Name a prime number.", "input": ""})
    with pytest.raises(ValueError, match=r"rows\.json, row 1: no column 'output'"):
        read_instructions(source)


def test_the_columns_say_which_reader_takes_a_file(tmp_path: Path) -> None:
    source = write_json(tmp_path / "rows.json", {"instruction": "Name a prime number.", "input": "", "output": "7"})
    assert read_chats(source, None)[1].source == "instructions"
    assert read_chats(str(FIXTURES / "ultrachat_200k.jsonl"), None)[1].source == "ultrachat"


def test_an_empty_file_of_chats_has_no_rows_and_no_error(tmp_path: Path) -> None:
    rows, report = read_chats(write_json(tmp_path / "rows.json"), None)
    assert (rows, report.read) == ([], 0)


@pytest.mark.skipif("DPA_REAL_DATA" not in os.environ, reason="DPA_REAL_DATA names no folder of real rows")
def test_all_real_instructions_are_kept() -> None:
    rows, report = read_instructions(str(Path(os.environ["DPA_REAL_DATA"]) / "rasbt_instruction_1100.json"))
    assert (report.read, report.kept) == (1100, 1100)
    assert sum("\n\n" in row["messages"][0]["content"] for row in rows) >= 325  # so many have an input
