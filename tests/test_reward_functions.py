"""The reward functions that come with the package, by hand."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpalign.rewards.functions import (
    PROBE,
    call,
    load_function,
    log_words,
    markdown_share,
    probe,
    reading_grade,
    sentences,
    words,
)


def test_words_and_sentences_are_counted() -> None:
    asked = ["q"] * 4
    said = ["One two. Three? Four!", "no end", "", "A heading\n\n3.5 percent rose. Yes."]
    assert words(asked, said) == [4.0, 2.0, 0.0, 6.0]
    assert log_words(asked, said) == pytest.approx([math.log(n) for n in (5, 3, 1, 7)])
    assert sentences(asked, said) == [3.0, 1.0, 0.0, 3.0]


def test_the_share_of_markdown_is_one_of_lines() -> None:
    """Of four lines with words a heading and a list item; all three lines of a code block; bold text; prose."""
    said = ["# Title\n\nText.\n- item\nMore text.", "```\ncode\n```", "so **bold**", "a * b is 3 > 2", ""]
    assert markdown_share([""] * 5, said) == [0.5, 1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["words", "log_words", "sentences", "markdown_share"])
def test_each_is_a_reward_function(name: str) -> None:
    probe(load_function(f"dpalign.rewards.functions:{name}", name), 1, name)


@pytest.mark.parametrize("code", [0, 3])
def test_a_function_that_asks_python_to_exit_is_named_with_the_answer(code: int) -> None:
    def leaves(prompts: list[str], responses: list[str]) -> list[float]:
        if "iron" in responses:
            sys.exit(code)
        return [1.0] * len(responses)

    with pytest.raises(ValueError, match=rf"^function mine:leaves: SystemExit: {code} .*answer 1 of 2, to 'b': 'iron'"):
        call(leaves, ["a", "b"], ["tea", "iron"], 1, "function mine:leaves")


def test_a_module_that_asks_python_to_exit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leaving_module.py").write_text("import sys\nsys.exit()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"^function leaving_module:f: SystemExit"):
        load_function("leaving_module:f", "function leaving_module:f")


def test_the_reading_grade_needs_textstat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "textstat", None)
    with pytest.raises(ValueError, match="pip install textstat"):
        reading_grade(*map(list, PROBE))


def test_the_reading_grade_says_what_its_dictionary_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(text: str) -> float:
        raise LookupError("Resource 'cmudict' not found.")

    monkeypatch.setitem(sys.modules, "textstat", SimpleNamespace(flesch_kincaid_grade=lacking))
    with pytest.raises(ValueError, match=r"python -m nltk\.downloader cmudict"):
        reading_grade(*map(list, PROBE))


def test_the_reading_grade_is_textstats_own() -> None:
    pytest.importorskip("textstat", reason="the extra dpalign[reading]")
    hard = "Notwithstanding considerable institutional opposition, parliamentary representatives ratified it."
    try:
        easy, difficult, empty = reading_grade([""] * 3, ["The cat sat on the mat. It was fat.", hard, ""])
    except ValueError as error:
        pytest.skip(str(error))
    assert easy < 3 < 12 < difficult
    assert empty == 0.0
