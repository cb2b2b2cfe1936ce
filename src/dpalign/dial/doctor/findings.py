"""What a doctor says: one finding a line, good or bad, and how to mend it."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["ok", "note", "bad"]
"""ok: as it should be. note: works, but something is missing or worth knowing. bad: does not work until mended."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    what: str
    said: str
    mend: str = ""
    """A command, or what to do; "" where nothing needs doing."""


@dataclass(frozen=True)
class Part:
    """Findings that belong together."""

    title: str
    findings: tuple[Finding, ...]


def as_text(parts: Sequence[Part], width: int = 100) -> str:
    """The findings for a reader, and at the end what they come to."""
    lines: list[str] = []
    for part in parts:
        lines.append(part.title)
        column = max((len(finding.what) for finding in part.findings), default=0)
        for finding in part.findings:
            head = f"  {finding.level:4}  {finding.what:{column}}  "
            indent = " " * len(head)
            lines += textwrap.wrap(
                finding.said,
                max(width, len(head) + 30),
                initial_indent=head,
                subsequent_indent=indent,
                break_on_hyphens=False,
            )
            if finding.mend:  # one line, however long: it is there to be copied
                lines.append(f"{indent}-> {finding.mend}")
        lines.append("")
    bad = [finding for part in parts for finding in part.findings if finding.level == "bad"]
    if not bad:
        return "\n".join([*lines, "All is well."])
    things = "1 thing needs" if len(bad) == 1 else f"{len(bad)} things need"
    return "\n".join([*lines, f"{things} mending: {', '.join(finding.what for finding in bad)}."])


def as_json(parts: Sequence[Part]) -> dict[str, Any]:
    """{ok, findings: [{part, level, what, said, mend}]}."""
    found = [{"part": part.title, **vars(finding)} for part in parts for finding in part.findings]
    return {"ok": sound(parts), "findings": found}


def sound(parts: Sequence[Part]) -> bool:
    """Whether nothing is bad."""
    return all(finding.level != "bad" for part in parts for finding in part.findings)
