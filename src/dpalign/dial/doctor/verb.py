"""`dpa doctor [MODEL]`: the machine, the software and a model's folder; ends with 1 where something needs mending."""

import argparse
import json
import shutil
import sys
from pathlib import Path


def declare(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    add = parser.add_argument
    what = "a model's folder, a finished stage's, or a run's (its last policy): is it a sound policy or reward model?"
    add("models", nargs="*", type=Path, metavar="MODEL", help=what)
    add("--quick", action="store_true", help="read what is installed, but do not try whether it loads (seconds)")
    add("--json", action="store_true", help="the findings as JSON, for programs")


def execute(given: argparse.Namespace) -> tuple[str, bool]:
    """(what to print, whether all is well)."""
    from dpalign.dial.doctor.findings import Part, as_json, as_text, sound
    from dpalign.dial.doctor.machine import machine
    from dpalign.dial.doctor.model import examine
    from dpalign.dial.doctor.software import software

    found = tuple(machine())
    parts = [Part("machine", found)]
    if not given.quick and sys.stderr.isatty():
        sys.stderr.write("trying what is installed; this takes a minute on a slow machine\n")
    gpu = any(finding.level == "ok" and finding.what.startswith("GPU") for finding in found)
    parts.append(Part("software", tuple(software(given.quick, gpu))))
    parts += [Part(str(model), tuple(examine(model))) for model in given.models]
    if given.json:
        return json.dumps(as_json(parts), ensure_ascii=False, indent=2), sound(parts)
    return as_text(parts, min(100, shutil.get_terminal_size().columns)), sound(parts)
