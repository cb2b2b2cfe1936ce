"""`dpa doctor [MODEL]`: check the machine, the software and models' folders; exit with 1 if any needs a repair."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rich.console import Console

    from dpalign.dial.doctor import Finding

COLOURS: Final = {"ok": "green", "note": "yellow", "bad": "bold red"}

Parts = Mapping[str, Sequence["Finding"]]
"""Findings by part: the machine, the software, each folder."""


def declare(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    add = parser.add_argument
    what = "a model's folder, a finished stage's, or a run's (its last policy): is it a sound policy or reward model?"
    add("models", nargs="*", type=Path, metavar="MODEL", help=what)
    add("--quick", action="store_true", help="read what is installed, but do not try whether it loads (seconds)")
    add("--json", action="store_true", help="the findings as JSON, for programs")


def execute(arguments: argparse.Namespace, _: Sequence[str]) -> str:
    """Return the findings as text or JSON; exit with code 1 if something needs a repair."""
    from rich.console import Console

    from dpalign.dial.doctor.machine import machine, software
    from dpalign.dial.doctor.model import examine

    parts = {"machine": tuple(machine())}
    if not arguments.quick and sys.stderr.isatty():
        sys.stderr.write("loading each extra once; this takes a minute on a slow machine\n")
    gpu = any(finding.level == "ok" and finding.check.startswith("GPU") for finding in parts["machine"])
    parts["software"] = tuple(software(arguments.quick, gpu))
    parts |= {str(model): tuple(examine(model)) for model in arguments.models}
    if arguments.json:
        text = json.dumps(as_json(parts), ensure_ascii=False, indent=2)
    else:
        console = Console(highlight=False)
        console.width = min(100, console.width)
        text = as_text(parts, console)
    if not sound(parts):
        sys.stdout.write(f"{text}\n")
        sys.exit(1)
    return text


def as_text(parts: Parts, console: "Console") -> str:
    """Return the findings as a table, each cure in one line to copy, and the needed repairs at the end."""
    from rich.table import Table
    from rich.text import Text

    column = max((len(finding.check) for findings in parts.values() for finding in findings), default=0)
    with console.capture() as capture:
        for part, findings in parts.items():
            console.print(Text(part, "bold"))
            for finding in findings:
                row = Table.grid(padding=(0, 2, 0, 0))
                row.add_column(width=6)
                row.add_column(width=column)
                row.add_row(Text(f"  {finding.level}", COLOURS[finding.level]), Text(finding.check), Text(finding.text))
                console.print(row)
                if finding.cure:
                    console.print(Text(f"{' ' * (column + 10)}-> {finding.cure}"), soft_wrap=True)
            console.print()
        bad = [finding.check for findings in parts.values() for finding in findings if finding.level == "bad"]
        console.print(Text(f"To repair: {', '.join(bad)}." if bad else "All is well."))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def as_json(parts: Parts) -> dict[str, Any]:
    """{ok, findings: [{part, level, check, text, cure}]}."""
    rows = [{"part": part, **vars(finding)} for part, findings in parts.items() for finding in findings]
    return {"ok": sound(parts), "findings": rows}


def sound(parts: Parts) -> bool:
    """Whether nothing is bad."""
    return all(finding.level != "bad" for findings in parts.values() for finding in findings)
